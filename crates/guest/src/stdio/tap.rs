//! A reader that can be told to end, for output whose writer is gone but left the pipe open.
//!
//! A grandchild that inherited a pipe may keep it open for ever. Once the process itself is gone
//! and nothing has been waiting to be read for a while, the stream is cut: what is in the pipe is
//! still read, and after that it ends.
//!
//! Whether anything is in it, only the kernel knows: the runtime hears of bytes later than the
//! reaper does of the exit of the process that wrote them.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::unix::pipe;

use super::pty::Pty;

/// A source that can be read past the runtime.
pub(super) trait ReadNow {
    /// Reads what is there; `WouldBlock` when nothing is.
    fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize>;
}

impl ReadNow for pipe::Receiver {
    fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // The runtime made it non-blocking.
        Ok(nix::unistd::read(self.as_fd(), into)?)
    }
}

impl ReadNow for Pty {
    fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.file().read(into) {
            // How a pty says that its other side is closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            read => read,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Since when a read has found nothing.
    dry_since: Option<Instant>,
    cut: bool,
    ended: bool,
    reader: Option<Waker>,
}

/// Tells what a [`Tap`] is doing, and cuts it.
#[derive(Clone, Debug, Default)]
pub(super) struct TapHandle {
    state: Arc<Mutex<State>>,
}

impl TapHandle {
    /// Whether the stream has ended, by itself or by a cut.
    pub(super) fn ended(&self) -> bool {
        self.lock().ended
    }

    /// Whether a reader has found nothing for at least this long. A reader that is not reading,
    /// because whoever it reads for is behind, is not dry.
    pub(super) fn dry_for(&self, time: Duration) -> bool {
        self.lock().dry_since.is_some_and(|since| since.elapsed() >= time)
    }

    /// Lets the stream end as soon as nothing is left in it.
    pub(super) fn cut(&self) {
        let mut state = self.lock();
        state.cut = true;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reader.
#[derive(Debug)]
pub(super) struct Tap<R> {
    inner: R,
    handle: TapHandle,
}

impl<R> Tap<R> {
    /// Wraps a reader.
    pub(super) fn new(inner: R) -> (Tap<R>, TapHandle) {
        let handle = TapHandle::default();
        (Tap { inner, handle: handle.clone() }, handle)
    }
}

impl<R: AsyncRead + ReadNow + Unpin> AsyncRead for Tap<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let this = &mut *self;
        let polled = Pin::new(&mut this.inner).poll_read(context, into);
        let mut state = this.handle.lock();
        match polled {
            Poll::Pending if state.cut => {
                match this.inner.read_now(into.initialize_unfilled()) {
                    Ok(read @ 1..) => into.advance(read),
                    Ok(0) | Err(_) => state.ended = true,
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                state.dry_since.get_or_insert_with(Instant::now);
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
            Poll::Ready(done) => {
                state.dry_since = None;
                state.ended |= done.is_err() || into.filled().len() == before;
                Poll::Ready(done)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_cut_ends_the_stream_after_what_is_in_it() {
        let (mut writer, reader) = pipe::pipe().unwrap();
        let (mut tap, handle) = Tap::new(reader);
        writer.write_all(b"last words").await.unwrap();
        handle.cut();
        let mut text = String::new();
        tap.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "last words");
        assert!(handle.ended());
        drop(writer);
    }

    /// What the runtime has not heard of yet.
    struct Unheard(std::collections::VecDeque<u8>);

    impl AsyncRead for Unheard {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl ReadNow for Unheard {
        fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize> {
            match self.0.read(into)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                read => Ok(read),
            }
        }
    }

    #[tokio::test]
    async fn a_cut_loses_nothing_that_the_runtime_has_not_heard_of() {
        let (mut tap, handle) = Tap::new(Unheard(b"last words".to_vec().into()));
        handle.cut();
        let mut text = String::new();
        tap.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "last words");
    }

    #[tokio::test]
    async fn pipes_and_terminals_are_read_past_the_runtime() {
        let (ours, theirs) = nix::unistd::pipe().unwrap();
        let mut reader = pipe::Receiver::from_owned_fd(ours).unwrap();
        let mut bytes = [0u8; 16];
        assert_eq!(reader.read_now(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        nix::unistd::write(&theirs, b"now").unwrap();
        assert_eq!(reader.read_now(&mut bytes).unwrap(), 3);
        drop(theirs);
        assert_eq!(reader.read_now(&mut bytes).unwrap(), 0);

        let pair = nix::pty::openpty(None, None).unwrap();
        let mut master = Pty::new(pair.master).unwrap();
        assert_eq!(master.read_now(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        nix::unistd::write(&pair.slave, b"now").unwrap();
        // The kernel passes a terminal's bytes on in a work queue of its own: soon, in one piece or in several.
        assert_eq!(soon(&mut master, 3), b"now");
        drop(pair.slave);
        assert_eq!(soon(&mut master, 1), b"");
    }

    /// Reads until there are this many bytes or the end.
    fn soon(from: &mut impl ReadNow, wanted: usize) -> Vec<u8> {
        let (began, mut got, mut bytes) = (Instant::now(), Vec::new(), [0u8; 16]);
        while got.len() < wanted {
            match from.read_now(&mut bytes) {
                Ok(0) => break,
                Ok(read) => got.extend_from_slice(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(began.elapsed() < Duration::from_secs(30), "nothing came");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
        got
    }

    #[tokio::test]
    async fn a_cut_wakes_a_reader_and_dryness_is_measured() {
        let (_writer, reader) = pipe::pipe().unwrap();
        let (mut tap, handle) = Tap::new(reader);
        assert!(!handle.dry_for(Duration::ZERO), "nobody reads yet");
        let reading = tokio::spawn(async move { tap.read_u8().await });
        while !handle.dry_for(Duration::from_millis(20)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!handle.ended());
        handle.cut();
        assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
