//! Destination: the shims of this host ask here for images that they cannot make.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dunlin_wire::images::{ReadRequest, ReadResponse};
use dunlin_wire::images_ttrpc::{Images, create_images};
use tokio::net::UnixListener;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::config::NodeConfig;
use crate::peer::incoming::Incoming;
use crate::peer::remote::Remote;
use crate::peer::tls::Keys;
use crate::proto;

/// One chunk, from the source's disk to here.
const READ: Duration = Duration::from_secs(60);

/// Where the node of a configuration serves.
pub(crate) fn socket(config: &NodeConfig) -> PathBuf {
    beside(&config.socket)
}

fn beside(socket: &Path) -> PathBuf {
    socket.with_file_name("images.sock")
}

/// Bytes that were fetched, by session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fetched {
    table: Arc<Mutex<HashMap<String, u64>>>,
}

impl Fetched {
    fn add(&self, session: &str, bytes: usize) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let count = table.entry(session.into()).or_default();
        *count = count.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// What a session has fetched, which is forgotten here.
    pub(crate) fn take(&self, session: &str) -> u64 {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).remove(session).unwrap_or(0)
    }
}

struct Service {
    config: Arc<NodeConfig>,
    keys: Option<Arc<Keys>>,
    incoming: Incoming,
    fetched: Fetched,
    /// A session's way to its source; dialled once.
    sources: Mutex<HashMap<String, Remote>>,
}

impl Service {
    fn source(&self, session: &str) -> Result<Remote, String> {
        let from = self.incoming.source_of(session);
        let from = from.ok_or_else(|| format!("session {session} does not arrive at this host"))?;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(session) {
            return Ok(source.clone());
        }
        let peer = self.config.peer(&from).ok_or_else(|| {
            format!("node {from} is not among the peers of {}: add it under [[peers]] here, so that images can be read from it", self.config.name)
        })?;
        let source = Remote::new(peer, self.keys.as_deref(), &self.config.name, session)
            .map_err(|error| error.to_string())?;
        // Those of moves that are over.
        sources.retain(|known, _| self.incoming.source_of(known).is_some());
        sources.insert(session.into(), source.clone());
        Ok(source)
    }

    async fn read(&self, request: &ReadRequest) -> Result<ReadResponse, String> {
        let source = self.source(&request.session_id)?;
        let reading = source.read_image(&request.digest, request.offset, request.length, request.sparse);
        let answer = tokio::time::timeout(READ, reading).await;
        let answer = answer
            .map_err(|_| format!("node {} gave no answer within {} s", source.name(), READ.as_secs()))?
            .map_err(|failure| failure.message)?;
        self.fetched.add(&request.session_id, answer.data.len());
        let proto::ReadImageResponse { data, size_bytes, zeros } = answer;
        Ok(ReadResponse { data, size_bytes, zeros, ..ReadResponse::default() })
    }
}

#[async_trait]
impl Images for Service {
    async fn read(&self, _: &TtrpcContext, request: ReadRequest) -> ttrpc::Result<ReadResponse> {
        Service::read(self, &request).await.map_err(|reason| {
            tracing::warn!(session = request.session_id, digest = request.digest, reason, "no image");
            ttrpc::Error::RpcStatus(get_status(Code::FAILED_PRECONDITION, reason))
        })
    }
}

/// Serves on a socket until the server is dropped.
pub(crate) async fn start(
    listener: UnixListener,
    config: Arc<NodeConfig>,
    keys: Option<Arc<Keys>>,
    incoming: Incoming,
    fetched: Fetched,
) -> Result<Server, std::io::Error> {
    let listener = Listener::try_from(listener.into_std()?)?;
    let service = Service { config, keys, incoming, fetched, sources: Mutex::default() };
    let mut server = Server::new().add_listener(listener).register_service(create_images(Arc::new(service)));
    server.start().await.map_err(std::io::Error::other)?;
    Ok(server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_fetched_is_counted_by_session_and_told_once() {
        let fetched = Fetched::default();
        fetched.add("s", 10);
        fetched.add("s", 5);
        fetched.add("t", 1);
        assert_eq!((fetched.take("s"), fetched.take("s"), fetched.take("t")), (15, 0, 1));
        assert_eq!(beside(Path::new("/run/dunlin/node.sock")), Path::new("/run/dunlin/images.sock"));
    }
}
