//! A 9P2000.L server for one share: the guest dials the share's port, and each stream is one session.
//!
//! Files are touched on the runtime's blocking threads, which are there only while there is something to do: the
//! shim's one thread never waits for a disk, and a share that nobody uses costs no thread.

mod files;
mod message;
mod session;

use std::io;
use std::path::Path;
use std::sync::Arc;

use dunlin_link::host::PortListener;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinHandle;

use self::files::Node;
use self::session::{MAX_MESSAGE, Session};
use super::rules::Rules;

/// A directory that is to be served. It stays the same one when its path comes to name another.
#[derive(Debug)]
pub(super) struct Root(Arc<Node>);

impl Root {
    /// Opens the directory. Blocks.
    pub(super) fn open(path: &Path) -> io::Result<Root> {
        Ok(Root(Arc::new(Node::root(path)?)))
    }
}

/// A share being served; ends when dropped.
#[derive(Debug)]
pub(super) struct Server(JoinHandle<()>);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves the sessions that the guest opens, one at a time. `name`: what it must attach to.
pub(super) fn serve(mut listener: PortListener, root: Root, name: String, rules: Rules) -> Server {
    Server(tokio::spawn(async move {
        while let Some(stream) = listener.accept().await {
            let session = match Session::new(root.0.clone(), name.clone(), rules.clone()) {
                Ok(session) => session,
                Err(errno) => {
                    tracing::warn!(share = name, %errno, "the share's directory cannot be read");
                    continue;
                }
            };
            match converse(stream, session).await {
                Ok(()) => tracing::debug!(share = name, "a session of a share has ended"),
                Err(error) => tracing::info!(share = name, %error, "a session of a share broke"),
            }
        }
    }))
}

/// Answers requests until the client hangs up.
async fn converse<S>(mut stream: S, mut session: Session) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let bad = |text: &'static str| io::Error::new(io::ErrorKind::InvalidData, text);
    loop {
        let size = match stream.read_u32_le().await {
            Ok(size) => size,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        if size > MAX_MESSAGE {
            return Err(bad("the guest sent a message that is longer than was agreed on"));
        }
        let length =
            usize::try_from(size).unwrap_or(0).checked_sub(4).ok_or_else(|| bad("a message has no size"))?;
        let mut frame = vec![0; length];
        stream.read_exact(&mut frame).await?;
        let (back, answer) = tokio::task::spawn_blocking(move || {
            let answer = session.answer(&frame);
            (session, answer)
        })
        .await
        .map_err(io::Error::other)?;
        session = back;
        let answer = answer.ok_or_else(|| bad("a message has no type and tag"))?;
        stream.write_all(&answer).await?;
        stream.flush().await?;
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
