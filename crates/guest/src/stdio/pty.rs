//! The master side of a terminal.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A pty's master; clones share it. Reads end where the last process closed the terminal.
#[derive(Clone, Debug)]
pub struct Pty {
    master: Arc<AsyncFd<std::fs::File>>,
}

impl Pty {
    /// Takes the master over; must be called inside the runtime.
    pub fn new(master: OwnedFd) -> io::Result<Pty> {
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the file owns its descriptor, and nothing takes it out of the AsyncFd or closes
        // it before the AsyncFd is dropped.
        let master = unsafe { AsyncFd::register(std::fs::File::from(master)) }?;
        Ok(Pty { master: Arc::new(master) })
    }

    /// The master, non-blocking.
    pub(super) fn file(&self) -> &std::fs::File {
        self.master.get_ref()
    }

    /// Sets the window's size in characters; the foreground process gets SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        set_size(self.master.get_ref(), columns, rows)
    }
}

/// Sets the size of a terminal's window in characters.
pub fn set_size(master: &impl AsRawFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    let done = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl AsyncRead for Pty {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.master.poll_read_ready(context))?;
            let space = into.initialize_unfilled();
            match ready.try_io(|master| master.get_ref().read(space)) {
                Ok(Ok(read)) => {
                    into.advance(read);
                    return Poll::Ready(Ok(()));
                }
                // How a pty says that its other side is closed.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Pty {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.master.poll_write_ready(context))?;
            match ready.try_io(|master| master.get_ref().write(bytes)) {
                Ok(done) => return Poll::Ready(done),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The end of input does not close a terminal: whoever typed only stopped typing.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn carries_bytes_sizes_and_the_end() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let mut master = Pty::new(pair.master).unwrap();
        let mut slave = std::fs::File::from(pair.slave);
        master.resize(120, 40).unwrap();
        // SAFETY: an all-zero winsize is valid and the kernel fills it.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: TIOCGWINSZ writes one winsize.
        unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCGWINSZ as _, &raw mut size) };
        assert_eq!((size.ws_col, size.ws_row), (120, 40));

        slave.write_all(b"hi\n").unwrap();
        // In one piece or in several: a terminal promises neither.
        let mut text = [0u8; 4];
        master.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hi\r\n");
        master.write_all(b"x").await.unwrap();
        assert_eq!(master.read(&mut text).await.unwrap(), 1, "the terminal echoes");
        drop(slave);
        assert_eq!(master.read(&mut text).await.unwrap(), 0);
    }
}
