//! The raw channel on the host: a unix socket to QEMU, or vsock.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::Endpoint;

const RETRY: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) enum Channel {
    Unix(UnixStream),
    Vsock(VsockStream),
}

impl Channel {
    pub(crate) async fn connect(endpoint: &Endpoint, deadline: Instant) -> io::Result<Channel> {
        loop {
            let attempt = tokio::time::timeout_at(deadline, Channel::try_connect(endpoint)).await;
            match attempt {
                Ok(Ok(channel)) => return Ok(channel),
                Ok(Err(error)) if Instant::now() + RETRY >= deadline => return Err(error),
                Ok(Err(_)) => tokio::time::sleep(RETRY).await,
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    async fn try_connect(endpoint: &Endpoint) -> io::Result<Channel> {
        match endpoint {
            Endpoint::VirtioSerial { socket } => UnixStream::connect(socket).await.map(Channel::Unix),
            Endpoint::Vsock { cid, port } => VsockStream::connect(*cid, *port).await.map(Channel::Vsock),
        }
    }
}

/// A connected AF_VSOCK socket.
#[derive(Debug)]
pub(crate) struct VsockStream(AsyncFd<OwnedFd>);

impl VsockStream {
    fn register(fd: OwnedFd) -> io::Result<VsockStream> {
        // SAFETY: an OwnedFd names one descriptor and keeps it open for as long as it lives.
        Ok(VsockStream(unsafe { AsyncFd::register(fd)? }))
    }

    async fn connect(cid: u32, port: u32) -> io::Result<VsockStream> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        match socket::connect(fd.as_raw_fd(), &VsockAddr::new(cid, port)) {
            Ok(()) => VsockStream::register(fd),
            Err(nix::Error::EINPROGRESS) => {
                let stream = VsockStream::register(fd)?;
                stream.0.writable().await?.retain_ready();
                match socket::getsockopt(stream.0.get_ref(), socket::sockopt::SocketError)? {
                    0 => Ok(stream),
                    code => Err(io::Error::from_raw_os_error(code)),
                }
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), unfilled)?)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let flags = socket::MsgFlags::MSG_NOSIGNAL;
            match guard.try_io(|fd| Ok(socket::send(fd.get_ref().as_raw_fd(), bytes, flags)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket::shutdown(self.0.as_raw_fd(), socket::Shutdown::Write).map_err(io::Error::from))
    }
}

impl AsyncRead for Channel {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Channel::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Channel::Vsock(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Channel {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Channel::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Channel::Vsock(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Channel::Unix(stream) => Pin::new(stream).poll_flush(context),
            Channel::Vsock(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Channel::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Channel::Vsock(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
