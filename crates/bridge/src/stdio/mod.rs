//! One standard stream of a process, from one end to the other, whatever breaks in between.
//!
//! ```text
//! on each connection (Resumable):
//!   receiver -> sender   u64 LE  bytes taken for good so far; u64::MAX: "I do not know"
//!   sender -> receiver   u64 LE  offset of the first byte that follows
//!   sender -> receiver   bytes ..., half-close after the last one
//!   receiver -> sender   u64 LE  new total, each time bytes were handed on
//! ```
//!
//! The sender keeps what is not acknowledged, at most [`RETAINED`] bytes, and then reads no more from its source: a
//! sink that blocks blocks the process, and nothing is lost. A receiver that knows its total takes each byte once. One
//! that does not ("I do not know", after a move) gets everything from the last acknowledgement on.
//!
//! Output: guest = [`send`], host = [`receive`]. Input: host = [`send`], guest = [`receive`]. The guest dials, always;
//! see [`Connect`]. With hosts and guests that do not speak this, [`plain`].

pub mod plain;
mod receive;
mod retained;
mod send;

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

pub use receive::{Ended, ReceiveError, Resume, receive};
pub use retained::{Position, RETAINED};
pub use send::{Drained, Sender, send};

/// "I do not know how many bytes I have taken."
pub const UNKNOWN: u64 = u64::MAX;
/// Pause between a connection that broke, or could not be made, and the next.
pub const REDIAL: Duration = Duration::from_millis(100);
/// How long the other end may take to say where to go on.
const GREETING_DEADLINE: Duration = Duration::from_secs(10);

/// Makes connections for one stream: the guest dials, the host accepts. Must be cancel safe.
pub trait Connect: Send {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send;

    /// The next connection, waiting as long as it takes. None: there will never be one again.
    fn connect(&mut self) -> impl Future<Output = Option<Self::Stream>> + Send;
}

/// Connects by an attempt that is repeated every [`REDIAL`] until it succeeds.
#[derive(Debug)]
pub struct Dial<F>(pub F);

impl<F, A, S> Connect for Dial<F>
where
    F: FnMut() -> A + Send,
    A: Future<Output = io::Result<S>> + Send,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    type Stream = S;

    async fn connect(&mut self) -> Option<S> {
        loop {
            match (self.0)().await {
                Ok(stream) => return Some(stream),
                Err(_) => tokio::time::sleep(REDIAL).await,
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connect for tokio::sync::mpsc::Receiver<S> {
    type Stream = S;

    async fn connect(&mut self) -> Option<S> {
        self.recv().await
    }
}

/// Collects 8-byte numbers from reads that may stop anywhere.
#[derive(Debug, Default)]
struct Numbers {
    held: [u8; 8],
    len: usize,
}

impl Numbers {
    /// The last whole number in what came so far; earlier ones are superseded by it.
    fn feed(&mut self, bytes: &[u8]) -> Option<u64> {
        let mut last = None;
        for byte in bytes {
            self.held[self.len] = *byte;
            self.len += 1;
            if self.len == 8 {
                self.len = 0;
                last = Some(u64::from_le_bytes(self.held));
            }
        }
        last
    }
}

#[cfg(test)]
mod move_tests;
#[cfg(test)]
mod tests;
