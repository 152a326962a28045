//! Streams between hosts: one TCP connection for memory and one for each writable disk.
//!
//! ```text
//!   source node --DUNLIN1 session token stream--> destination node
//!               <--OK------------------------------
//!   each then gives its end to its shim and closes its own copy
//! ```
//!
//! Nothing is read beyond the preamble's line and nothing is written beyond the answer: every
//! byte after them belongs to the shims. What the socket is set to, it keeps: a peer that falls silent, with its host or with
//! the network, ends the connection within [`SILENCE`], whether something is on the way to it or not. Until then each write
//! of the guest to a disk that is being mirrored waits for it.

pub(crate) mod dial;
pub(crate) mod listen;

use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::TcpStream;

/// A peer whose kernel acknowledges nothing for this long is gone.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);
/// Of a connection on which nothing is sent: to the first question whether the peer is there, and from one to the next; s.
const IDLE: u32 = 5;
const INTERVAL: u32 = 5;

/// Sends at once, and does not wait for ever.
fn set_up(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let silence = u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &IDLE)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &INTERVAL)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &silence)?;
    Ok(())
}
