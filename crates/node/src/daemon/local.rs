//! The `Node` service on the daemon's unix socket. Translates, decides nothing.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::future::join_all;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use super::moves::{MoveError, Moves};
use crate::config::NodeConfig;
use crate::containerd::facts::FactsError;
use crate::containerd::{Containerd, facts};
use crate::peer::incoming::Incoming;
use crate::peer::remote::Remote;
use crate::peer::tls::Keys;
use crate::proto::move_event::Event as Told;
use crate::proto::node_server::Node;
use crate::proto::{
    CancelMoveRequest, CancelMoveResponse, ListRequest, ListResponse, MigrateRequest, MoveEvent, PeerRow,
    Started, StatusRequest, StatusResponse,
};

/// Serves the command line of this host.
pub(crate) struct LocalService {
    pub(crate) config: Arc<NodeConfig>,
    pub(crate) containerd: Containerd,
    pub(crate) keys: Option<Arc<Keys>>,
    pub(crate) moves: Moves,
    pub(crate) incoming: Incoming,
}

type Events = Pin<Box<dyn Stream<Item = Result<MoveEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Node for LocalService {
    type MigrateStream = Events;

    async fn migrate(&self, request: Request<MigrateRequest>) -> Result<Response<Events>, Status> {
        let begun = self.moves.begin(&request.into_inner()).await.map_err(refused)?;
        let first = MoveEvent {
            event: Some(Told::Started(Started {
                session: begun.names.session,
                from: begun.names.from,
                to: begun.names.to,
                sandbox: begun.names.sandbox,
                containers: begun.names.containers,
            })),
        };
        let rest = futures::stream::unfold(begun.events, |mut events| async move {
            loop {
                match events.recv().await {
                    Ok(event) => return Some((Ok(event), events)),
                    // Readings were missed; the newest events, the end among them, are still there.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        });
        use futures::StreamExt;
        Ok(Response::new(Box::pin(futures::stream::once(async { Ok(first) }).chain(rest))))
    }

    async fn cancel(
        &self,
        request: Request<CancelMoveRequest>,
    ) -> Result<Response<CancelMoveResponse>, Status> {
        let CancelMoveRequest { namespace, container } = request.into_inner();
        let session = self.moves.cancel(&namespace, &container).await.map_err(refused)?;
        Ok(Response::new(CancelMoveResponse { session }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let namespace = request.into_inner().namespace;
        let mut containers = facts::list(&self.containerd, &namespace)
            .await
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let arriving = self.incoming.rows();
        for row in &mut containers {
            let arrives = || {
                let mut arriving = arriving.iter();
                let found = arriving
                    .find(|other| other.namespace == row.namespace && other.containers.contains(&row.id));
                found.map(|other| other.session.clone())
            };
            row.session = self.moves.session_of(&row.namespace, &row.id).or_else(arrives).unwrap_or_default();
        }
        Ok(Response::new(ListResponse { containers }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let peers = join_all(self.config.peers.iter().map(|peer| async {
            let problem = match Remote::new(peer, self.keys.as_deref(), &self.config.name, "status") {
                Ok(remote) => remote.problem().await,
                Err(error) => error.to_string(),
            };
            PeerRow {
                name: peer.name.clone(),
                address: peer.address.to_string(),
                data_address: peer.data_address.to_string(),
                problem,
            }
        }))
        .await;
        let containerd_version = match self.containerd.version().await {
            Ok(version) => version,
            Err(error) => error.to_string(),
        };
        let mut sessions = self.moves.rows();
        sessions.extend(self.incoming.rows());
        sessions.sort_by(|a, b| a.session.cmp(&b.session));
        Ok(Response::new(StatusResponse {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            listen: self.config.listen.to_string(),
            data_listen: self.config.data_listen.to_string(),
            tls: self.keys.is_some(),
            containerd_version,
            peers,
            sessions,
        }))
    }
}

fn refused(error: MoveError) -> Status {
    let message = error.to_string();
    match error {
        MoveError::UnknownNode { .. } | MoveError::Here { .. } => Status::invalid_argument(message),
        MoveError::Busy { .. } => Status::already_exists(message),
        MoveError::NotMoving { .. } | MoveError::Facts(FactsError::Unknown { .. }) => {
            Status::not_found(message)
        }
        _ => Status::failed_precondition(message),
    }
}
