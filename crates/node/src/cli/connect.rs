//! Reaches the daemon of this host, or says why it cannot.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::containerd::client::root_cause;
use crate::proto::node_client::NodeClient;

const CONNECT: Duration = Duration::from_secs(5);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The socket is for root.
    #[error("{0} is for root only; run this with sudo")]
    NotRoot(PathBuf),
    /// No daemon.
    #[error(
        "no daemon answers on {socket} ({reason}); start it with `dunlin node --config FILE`, or name its socket with --socket"
    )]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The daemon said no, in its own words.
    #[error("{0}")]
    Refused(String),
    /// Ctrl-C could not be listened for.
    #[error("cannot wait for signals: {0}; the move goes on in the daemon, see `dunlin status`")]
    Signals(std::io::Error),
    /// The connection broke.
    #[error("the daemon on {socket} went away: {reason}; see its log")]
    Lost {
        /// The socket.
        socket: PathBuf,
        /// The transport's words.
        reason: String,
    },
}

/// Connects to the daemon on `socket`.
pub(crate) async fn connect(socket: &Path) -> Result<NodeClient<Channel>, CommandError> {
    let no_daemon = |reason: String| CommandError::NoDaemon { socket: socket.to_owned(), reason };
    // Tried by itself first: the transport's own error hides which it was.
    match tokio::net::UnixStream::connect(socket).await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(CommandError::NotRoot(socket.to_owned()));
        }
        Err(error) => return Err(no_daemon(error.to_string())),
    }
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))
        .map_err(|error| no_daemon(root_cause(&error)))?
        .connect_timeout(CONNECT);
    let channel = endpoint.connect().await.map_err(|error| no_daemon(root_cause(&error)))?;
    Ok(NodeClient::new(channel))
}

/// A status as the daemon meant it.
pub(crate) fn told(socket: &Path, status: &Status) -> CommandError {
    if std::error::Error::source(status).is_some() {
        return CommandError::Lost { socket: socket.to_owned(), reason: root_cause(status) };
    }
    CommandError::Refused(status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_daemon_is_told_with_the_command_that_starts_it() {
        let error = connect(Path::new("/nonexistent/node.sock")).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/node.sock"), "{error}");
        assert!(error.contains("dunlin node --config FILE"), "{error}");
    }

    #[test]
    fn a_refusal_is_the_daemons_own_words() {
        let error = told(Path::new("/s"), &Status::not_found("unknown node c; known: b"));
        assert_eq!(error.to_string(), "unknown node c; known: b");
    }

    #[test]
    fn ordinary_users_are_told_to_use_sudo() {
        let error = CommandError::NotRoot("/run/dunlin/node.sock".into()).to_string();
        assert!(error.contains("sudo"), "{error}");
    }
}
