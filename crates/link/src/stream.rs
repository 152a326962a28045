//! A stream of the link, for tokio.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;

/// What a session's streams share.
#[derive(Debug)]
pub(crate) struct SessionFlag {
    ended: AtomicBool,
}

impl SessionFlag {
    pub(crate) fn new() -> Arc<SessionFlag> {
        Arc::new(SessionFlag { ended: AtomicBool::new(false) })
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// One duplex stream between host and guest. `shutdown()` closes this end's direction only; the other end then
/// reads an end of file. Fails with `ConnectionReset` when the session ends or the other end is dropped unclosed,
/// so an end of file is always one that the other end meant.
#[derive(Debug)]
pub struct LinkStream {
    /// None only while being dropped.
    inner: Option<yamux::Stream>,
    session: Arc<SessionFlag>,
    linger: mpsc::Sender<yamux::Stream>,
    shut: bool,
    seen_end: bool,
}

impl LinkStream {
    pub(crate) fn new(
        inner: yamux::Stream,
        session: Arc<SessionFlag>,
        linger: mpsc::Sender<yamux::Stream>,
    ) -> LinkStream {
        LinkStream { inner: Some(inner), session, linger, shut: false, seen_end: false }
    }

    fn reset(&self) -> io::Error {
        let reason = if self.session.has_ended() {
            "the link's session has ended; dial again"
        } else {
            "the other end dropped the stream"
        };
        io::Error::new(io::ErrorKind::ConnectionReset, reason)
    }
}

impl AsyncRead for LinkStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.seen_end || buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(this.reset())) };
        let unfilled = buffer.initialize_unfilled();
        match ready!(futures::AsyncRead::poll_read(Pin::new(&mut *inner), context, unfilled)) {
            Ok(0) => {
                // yamux reports a reset as an end of file. Closed without our own half-close is a reset; after
                // it only an ended session can be told from a real end, and is taken for the worse.
                let reset = inner.is_closed() && (!this.shut || this.session.has_ended());
                if reset {
                    return Poll::Ready(Err(this.reset()));
                }
                this.seen_end = true;
                Poll::Ready(Ok(()))
            }
            Ok(n) => {
                buffer.advance(n);
                Poll::Ready(Ok(()))
            }
            Err(_) => Poll::Ready(Err(this.reset())),
        }
    }
}

impl AsyncWrite for LinkStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.shut {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "this end was shut down")));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(this.reset())) };
        match ready!(futures::AsyncWrite::poll_write(Pin::new(inner), context, bytes)) {
            Ok(n) => Poll::Ready(Ok(n)),
            Err(_) => Poll::Ready(Err(this.reset())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(this.reset())) };
        match ready!(futures::AsyncWrite::poll_flush(Pin::new(inner), context)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(_) => Poll::Ready(Err(this.reset())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.shut {
            return Poll::Ready(Ok(()));
        }
        let Some(inner) = this.inner.as_mut() else { return Poll::Ready(Err(this.reset())) };
        match ready!(futures::AsyncWrite::poll_close(Pin::new(inner), context)) {
            Ok(()) => {
                this.shut = true;
                Poll::Ready(Ok(()))
            }
            Err(_) => Poll::Ready(Err(this.reset())),
        }
    }
}

impl Drop for LinkStream {
    fn drop(&mut self) {
        // yamux sends no reset for a stream dropped after its half-close; the other end would wait for credit for
        // ever. The session reads such a stream to its end and throws the bytes away.
        if self.shut
            && !self.seen_end
            && !self.session.has_ended()
            && let Some(stream) = self.inner.take()
        {
            let _ = self.linger.try_send(stream);
        }
    }
}
