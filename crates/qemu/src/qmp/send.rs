//! Bytes out of the socket, the first of them with a file descriptor when there is one.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::unix::OwnedWriteHalf;

/// One command line on its way to QEMU.
pub(super) struct Outgoing {
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

pub(super) async fn send(half: &OwnedWriteHalf, outgoing: &Outgoing) -> io::Result<()> {
    let stream = half.as_ref();
    let socket = stream.as_raw_fd();
    let mut sent = 0;
    while sent < outgoing.bytes.len() {
        let rest = &outgoing.bytes[sent..];
        // The descriptor rides on the first byte; a short write must not send it again.
        let passed: Vec<i32> = outgoing.fd.iter().filter(|_| sent == 0).map(|fd| fd.as_raw_fd()).collect();
        sent += stream
            .async_io(Interest::WRITABLE, || {
                let rights = [ControlMessage::ScmRights(&passed)];
                let control = if passed.is_empty() { &[][..] } else { &rights[..] };
                sendmsg::<()>(socket, &[IoSlice::new(rest)], control, MsgFlags::MSG_NOSIGNAL, None)
                    .map_err(io::Error::from)
            })
            .await?;
    }
    Ok(())
}
