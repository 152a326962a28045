//! One channel between a host and its utility VM, and streams by port over it.
//!
//! ```text
//! LinkStream   LinkStream          by port; the guest dials, the host listens
//!      \          /
//!         yamux                    one connection a session
//!           |
//!   packets: COBS, CRC32, epoch    a session may begin in the middle of anything
//!           |
//! virtio-serial port or vsock      bytes; may vanish and come back at any byte
//! ```
//!
//! Invariants: a byte of one session never reaches another; a lost packet ends its session rather than pass
//! unnoticed; every stream of an ended session fails with `ConnectionReset`; nothing a peer sends makes this end
//! panic or allocate beyond its caps. What the streams carry is not known here.

pub mod guest;
pub mod host;
mod outbox;
pub mod packet;
mod session;
mod stream;

pub use stream::LinkStream;

/// The number of a session, chosen at random by the host for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch(pub u64);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// How an end of the link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkStatus {
    /// The channel is there, no session on it.
    Connected,
    /// A session: streams can be opened.
    Up {
        /// Its number.
        epoch: Epoch,
    },
    /// No channel. On the host that is for good (QEMU has ended, or the link was closed).
    Down,
}

/// The vsock port that a guest listens on.
pub const VSOCK_PORT: u32 = 1024;
/// The name of the virtio-serial port.
pub const VIRTIO_SERIAL_NAME: &str = "dunlin.link.0";
