//! Destination: the `Peer` service. Translates, decides nothing.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream as DataStream;
use futures::Stream;
use protobuf::Message;
use tonic::{Request, Response, Status};

use super::caller::verified;
use super::incoming::{Incoming, IncomingError};
use super::preflight;
use super::session::{Created, SessionError};
use crate::config::NodeConfig;
use crate::containerd::Containerd;
use crate::images::exports::{ExportError, Exports};
use crate::images::piece::Piece;
use crate::images::serve::Fetched;
use crate::proto::peer_server::Peer;
use crate::proto::{
    AbortRequest, AbortResponse, Ack, AwaitStreamRequest, CleanupResponse, CreateTasksResponse,
    ImportRequest, ImportResponse, Notification, PreflightRequest, PreflightResponse, PrepareRequest,
    ReadImageRequest, ReadImageResponse, RunRequest, SessionRequest, TransferRequest, WatchRequest,
};
use crate::shim::ShimError;

/// What a transfer gets when the caller names no bound.
const TRANSFER: Duration = Duration::from_secs(600);

/// Serves other nodes.
#[derive(Debug)]
pub(crate) struct PeerService {
    config: Arc<NodeConfig>,
    containerd: Containerd,
    incoming: Incoming,
    exports: Exports,
    fetched: Fetched,
}

impl PeerService {
    pub(crate) fn new(
        config: Arc<NodeConfig>,
        containerd: Containerd,
        incoming: Incoming,
        exports: Exports,
        fetched: Fetched,
    ) -> PeerService {
        PeerService { config, containerd, incoming, exports, fetched }
    }
}

type Notifications = Pin<Box<dyn Stream<Item = Result<Notification, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for PeerService {
    async fn preflight(
        &self,
        request: Request<PreflightRequest>,
    ) -> Result<Response<PreflightResponse>, Status> {
        let request = verified(request)?;
        let (nics, mismatches) = preflight::compare(&self.config, &self.containerd, &request)
            .await
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(PreflightResponse { name: self.config.name.clone(), mismatches, nics }))
    }

    async fn import(&self, request: Request<ImportRequest>) -> Result<Response<ImportResponse>, Status> {
        let request = verified(request)?;
        let facts = request.sandbox.ok_or_else(|| Status::invalid_argument("the request lacks `sandbox`"))?;
        let session =
            self.incoming.begin(&request.session, &request.from, facts, &request.streams).map_err(refused)?;
        let config = Any { type_url: request.config_type, value: request.config, ..Any::default() };
        session.import(config).await.map_err(failed)?;
        Ok(Response::new(ImportResponse { token: session.token().expose().to_owned() }))
    }

    async fn create_tasks(
        &self,
        request: Request<SessionRequest>,
    ) -> Result<Response<CreateTasksResponse>, Status> {
        let SessionRequest { session, from } = verified(request)?;
        let arriving = self.incoming.find(&session, &from).map_err(refused)?;
        let created = arriving.create_tasks().await.map_err(failed);
        let fetched_bytes = self.fetched.take(&session);
        let Created { pids, nics } = created?;
        Ok(Response::new(CreateTasksResponse { pids, nics, fetched_bytes }))
    }

    async fn read_image(
        &self,
        request: Request<ReadImageRequest>,
    ) -> Result<Response<ReadImageResponse>, Status> {
        let ReadImageRequest { session, from, digest, offset, length, sparse } = verified(request)?;
        let exports = self.exports.clone();
        let reading = tokio::task::spawn_blocking(move || {
            exports.read(&session, &from, &digest, offset, length, sparse)
        });
        let read = reading.await.map_err(|error| Status::internal(error.to_string()))?;
        let Piece { zeros, data, size_bytes } = read.map_err(|error| match error {
            ExportError::Unknown(_) => Status::not_found(error.to_string()),
            ExportError::NotYours { .. } => Status::permission_denied(error.to_string()),
            ExportError::NoImage { .. } | ExportError::Read { .. } => {
                Status::failed_precondition(error.to_string())
            }
        })?;
        Ok(Response::new(ReadImageResponse { data, size_bytes, zeros }))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<Ack>, Status> {
        let PrepareRequest { session, from, downtime_limit_ms } = verified(request)?;
        let session = self.incoming.find(&session, &from).map_err(refused)?;
        session.prepare(downtime_limit_ms).await.map_err(failed)?;
        Ok(Response::new(Ack {}))
    }

    async fn await_stream(&self, request: Request<AwaitStreamRequest>) -> Result<Response<Ack>, Status> {
        let AwaitStreamRequest { session, from, stream } = verified(request)?;
        let session = self.incoming.find(&session, &from).map_err(refused)?;
        let stream: DataStream =
            stream.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        session.await_stream(stream).await.map_err(failed)?;
        Ok(Response::new(Ack {}))
    }

    async fn transfer(&self, request: Request<TransferRequest>) -> Result<Response<Ack>, Status> {
        let TransferRequest { session, from, timeout_ms } = verified(request)?;
        let session = self.incoming.find(&session, &from).map_err(refused)?;
        let timeout = if timeout_ms == 0 { TRANSFER } else { Duration::from_millis(timeout_ms) };
        session.transfer(timeout).await.map_err(failed)?;
        Ok(Response::new(Ack {}))
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Ack>, Status> {
        let RunRequest { session, from, handoff_type, handoff } = verified(request)?;
        let session = match self.incoming.find(&session, &from) {
            Ok(session) => session,
            Err(IncomingError::Ran(_)) => return Ok(Response::new(Ack {})),
            Err(error) => return Err(refused(error)),
        };
        let handoff = (!handoff_type.is_empty()).then(|| Any {
            type_url: handoff_type,
            value: handoff,
            ..Any::default()
        });
        session.run(handoff).await.map_err(failed)?;
        Ok(Response::new(Ack {}))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        let AbortRequest { session, from, namespace, sandbox_id } = verified(request)?;
        if self.exports.holds(&session) {
            // The shim that knows it is a source: its machine is this host's until the move is committed.
            let reason = format!(
                "session {session} leaves from {}; it is cancelled here, with `dunlin cancel`",
                self.config.name
            );
            return Err(Status::permission_denied(reason));
        }
        let aborted = self.incoming.abort(&session, &from, &namespace, &sandbox_id).await.map_err(refused)?;
        Ok(Response::new(AbortResponse {
            stopped: aborted.stopped,
            warnings: aborted.warnings,
            runs: aborted.runs,
        }))
    }

    async fn cleanup(&self, request: Request<SessionRequest>) -> Result<Response<CleanupResponse>, Status> {
        let SessionRequest { session, from } = verified(request)?;
        let warnings = match self.incoming.find(&session, &from) {
            Ok(session) => session.cleanup().await.map_err(failed)?,
            // Forgotten already: a repeated Cleanup has what it wants.
            Err(IncomingError::Unknown(_) | IncomingError::Ran(_)) => Vec::new(),
            Err(error) => return Err(refused(error)),
        };
        Ok(Response::new(CleanupResponse { warnings }))
    }

    type WatchStream = Notifications;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Notifications>, Status> {
        let WatchRequest { session, from, after_message_id } = verified(request)?;
        let session = self.incoming.find(&session, &from).map_err(refused)?;
        let (shim, watching) = session.watch().map_err(failed)?;
        let receiver = shim.notifications(after_message_id).await.map_err(|error| failed(error.into()))?;
        // The guard lives as long as the stream: a watched session is not abandoned.
        let stream = futures::stream::unfold(Some((receiver, watching)), |state| async move {
            let (mut receiver, watching) = state?;
            match receiver.recv().await {
                Ok(Some(told)) => {
                    let item = told
                        .write_to_bytes()
                        .map(|response| Notification { response })
                        .map_err(|error| Status::internal(error.to_string()));
                    Some((item, Some((receiver, watching))))
                }
                Ok(None) => None,
                Err(error) => {
                    Some((Err(Status::unavailable(format!("the destination's shim: {error}"))), None))
                }
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// What a caller may conclude is in the code: see `remote::kind`.
fn refused(error: IncomingError) -> Status {
    match error {
        IncomingError::Unknown(_) => Status::not_found(error.to_string()),
        IncomingError::NotYours { .. } => Status::permission_denied(error.to_string()),
        error => Status::failed_precondition(error.to_string()),
    }
}

fn failed(error: SessionError) -> Status {
    match &error {
        SessionError::Shim(shim) if shim.is_silence() => Status::unavailable(error.to_string()),
        SessionError::Shim(ShimError::Refused { no_session: true, .. }) | SessionError::Over(_) => {
            Status::not_found(error.to_string())
        }
        _ => Status::failed_precondition(error.to_string()),
    }
}
