//! Starts the daemon's three listeners and ends them in order.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::unfold;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use super::local::LocalService;
use super::moves::Moves;
use crate::config::NodeConfig;
use crate::containerd::client::root_cause;
use crate::containerd::{Containerd, ContainerdError};
use crate::data;
use crate::images::exports::Exports;
use crate::images::serve as images;
use crate::images::serve::Fetched;
use crate::peer::incoming::Incoming;
use crate::peer::leftover;
use crate::peer::remote::MESSAGE_MAX;
use crate::peer::service::PeerService;
use crate::peer::tls::{Keys, TlsError};
use crate::proto::node_server::NodeServer;
use crate::proto::peer_server::PeerServer;

/// Moves get so long to turn back when the daemon is told to end.
const CLOSING: Duration = Duration::from_secs(90);
/// Open calls get so long after that.
const LINGER: Duration = Duration::from_secs(2);
/// A peer without a sign of life loses its connection, and its watches with it.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Why the daemon could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// Not root.
    #[error(
        "`dunlin node` needs root: it talks to containerd and to shims; run it with sudo or as a systemd unit"
    )]
    NotRoot,
    /// Keys.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// containerd.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// A port.
    #[error("{key} = {address}: cannot listen: {reason}")]
    Listen {
        /// The configuration's key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's words.
        reason: std::io::Error,
    },
    /// The local socket.
    #[error("socket = {path}: cannot listen: {reason}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's words, or ours.
        reason: std::io::Error,
    },
    /// Another daemon.
    #[error(
        "socket = {0}: another `dunlin node` answers there; stop it first, or give this one a socket of its own"
    )]
    Taken(PathBuf),
    /// A server broke.
    #[error("the {which} server ended: {reason}")]
    Server {
        /// Which listener.
        which: &'static str,
        /// The transport's words.
        reason: String,
    },
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
}

/// Runs the daemon until SIGTERM or SIGINT.
pub(crate) async fn serve(config: NodeConfig) -> Result<(), DaemonError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    let stop = CancellationToken::new();
    let signals = stop.clone();
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        signals.cancel();
    });
    Box::pin(run(Arc::new(config), stop)).await
}

/// Runs the daemon until `stop`.
pub(crate) async fn run(config: Arc<NodeConfig>, stop: CancellationToken) -> Result<(), DaemonError> {
    let keys = match &config.tls {
        Some(tls) => {
            tracing::warn!(
                "the data streams (memory and disks) are not encrypted: keep data_listen on a trusted network"
            );
            Some(Arc::new(Keys::load(tls)?))
        }
        None => {
            tracing::warn!(
                "NO [tls] IN THE CONFIGURATION: everybody who reaches {} can move containers to this host, \
                 and everything between nodes is plain text",
                config.listen
            );
            None
        }
    };
    let containerd = Containerd::connect(&config.containerd).await?;
    let incoming = Incoming::new(Arc::clone(&config), containerd.clone());
    let (exports, fetched) = (Exports::default(), Fetched::default());
    let moves = Moves::new(Arc::clone(&config), containerd.clone(), keys.clone(), exports.clone());
    let peers = tcp("listen", config.listen).await?;
    let streams = tcp("data_listen", config.data_listen).await?;
    let local = unix(&config.socket).await?;
    let images = unix(&images::socket(&config)).await?;
    // Only now: another `dunlin node` that serves here would have its arriving moves swept away.
    leftover::sweep(&config, &containerd).await;
    let images_failed = |reason| DaemonError::Socket { path: images::socket(&config), reason };
    let _images = images::start(images, Arc::clone(&config), keys.clone(), incoming.clone(), fetched.clone())
        .await
        .map_err(images_failed)?;

    let data = tokio::spawn(data::listen::serve(streams, Arc::new(incoming.clone())));
    let peer_service = PeerServer::new(PeerService::new(
        Arc::clone(&config),
        containerd.clone(),
        incoming.clone(),
        exports,
        fetched,
    ))
    .max_decoding_message_size(MESSAGE_MAX)
    .max_encoding_message_size(MESSAGE_MAX);
    let closed = CancellationToken::new();
    let peer_server = peer_server(keys.as_deref())?.add_service(peer_service).serve_with_incoming_shutdown(
        tonic::transport::server::TcpIncoming::from(peers).with_nodelay(Some(true)),
        closed.clone().cancelled_owned(),
    );
    let local_service = NodeServer::new(LocalService {
        config: Arc::clone(&config),
        containerd,
        keys,
        moves: moves.clone(),
        incoming,
    });
    let connections = unfold(local, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    let local_server = Server::builder()
        .add_service(local_service)
        .serve_with_incoming_shutdown(connections, closed.clone().cancelled_owned());
    tracing::info!(
        name = config.name,
        listen = %config.listen,
        data_listen = %config.data_listen,
        socket = %config.socket.display(),
        "ready"
    );

    // Both go on while moves turn back: rolling back needs the peer, and somebody may be watching.
    let servers = async { tokio::try_join!(ended("peer", peer_server), ended("local", local_server)) };
    let closing = async {
        stop.cancelled().await;
        moves.close(CLOSING).await;
        closed.cancel();
        tokio::time::sleep(LINGER).await;
    };
    let result = tokio::select! {
        served = servers => served.map(drop),
        () = closing => Ok(()),
    };
    data.abort();
    let _ = tokio::fs::remove_file(&config.socket).await;
    let _ = tokio::fs::remove_file(images::socket(&config)).await;
    result
}

/// A server for peers: with keys, only for callers that show a certificate of the same authority.
pub(crate) fn peer_server(keys: Option<&Keys>) -> Result<Server, DaemonError> {
    let server =
        Server::builder().http2_keepalive_interval(Some(KEEPALIVE)).http2_keepalive_timeout(Some(KEEPALIVE));
    match keys {
        Some(keys) => server
            .tls_config(keys.server())
            .map_err(|error| DaemonError::Server { which: "peer", reason: root_cause(&error) }),
        None => Ok(server),
    }
}

async fn ended(
    which: &'static str,
    server: impl Future<Output = Result<(), tonic::transport::Error>>,
) -> Result<(), DaemonError> {
    server.await.map_err(|error| DaemonError::Server { which, reason: root_cause(&error) })
}

async fn tcp(key: &'static str, address: SocketAddr) -> Result<TcpListener, DaemonError> {
    TcpListener::bind(address).await.map_err(|reason| DaemonError::Listen { key, address, reason })
}

/// A socket that root alone may open, from its first moment on.
async fn unix(path: &Path) -> Result<UnixListener, DaemonError> {
    let failed = |reason| DaemonError::Socket { path: path.to_owned(), reason };
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await.map_err(failed)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(DaemonError::Taken(path.to_owned()));
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Bound under another name with nobody listening, closed to others, then given its own.
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_roots_alone_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/node.sock");
        let first = unix(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(unix(&path).await, Err(DaemonError::Taken(_))));
        drop(first);
        let _second = unix(&path).await.unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
    }
}
