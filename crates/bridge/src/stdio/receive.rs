//! The receiving end: writes the process's pipe (guest) or containerd's FIFO or file (host).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::{debug, warn};

use super::{Connect, GREETING_DEADLINE, REDIAL, UNKNOWN};

const PIECE: usize = 32 * 1024;

/// How many bytes of a stream its receiver has taken for good. Clones are handles to the same number, so that it can
/// be held and saved while [`receive`] runs; one [`receive`] at a time.
#[derive(Debug, Clone)]
pub struct Resume(Arc<Mutex<Taking>>);

#[derive(Debug)]
struct Taking {
    /// [`UNKNOWN`] until the sender has spoken.
    total: u64,
    held: bool,
    /// Whoever would hand bytes on, once released.
    writer: Option<Waker>,
}

impl Resume {
    /// The receiver of a new stream, or one that goes on after this many bytes.
    #[must_use]
    pub fn at(total: u64) -> Resume {
        Resume(Arc::new(Mutex::new(Taking { total, held: false, writer: None })))
    }

    /// A receiver that does not know; bytes that were taken but not acknowledged come again.
    #[must_use]
    pub fn unknown() -> Resume {
        Resume::at(UNKNOWN)
    }

    /// Bytes taken for good; None while that is not known.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.lock().known()
    }

    /// From the return of this on no byte, and no end of the stream, is handed to the sink, over all connections, until
    /// [`Resume::release`]. The total counts every byte that the sink has taken, acknowledged or not; None while it is
    /// not known, and then none was handed on.
    #[must_use]
    pub fn hold(&self) -> Option<u64> {
        let mut taking = self.lock();
        taking.held = true;
        taking.known()
    }

    /// Ends [`Resume::hold`].
    pub fn release(&self) {
        let mut taking = self.lock();
        taking.held = false;
        if let Some(writer) = taking.writer.take() {
            writer.wake();
        }
    }

    fn raw(&self) -> u64 {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, Taking> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sender goes on at this offset: the total to go on with. Pending while held.
    async fn begin(&self, start: u64) -> u64 {
        poll_fn(|context| {
            let mut taking = ready!(self.poll_released(context));
            match taking.known() {
                Some(total) if total < start => {
                    warn!(missing = start - total, "the sender has no longer all of the stream");
                    taking.total = start;
                }
                Some(_) => {}
                None => taking.total = start,
            }
            Poll::Ready(taking.total)
        })
        .await
    }

    /// Writes once and counts under one lock: a total that is read while the sink blocks, or after this was
    /// cancelled, is neither short of what it took nor ahead. Pending while held.
    pub(super) async fn hand_on<W: AsyncWrite + Unpin>(
        &self,
        sink: &mut W,
        bytes: &[u8],
    ) -> io::Result<usize> {
        poll_fn(|context| {
            let mut taking = ready!(self.poll_released(context));
            let taken = ready!(Pin::new(&mut *sink).poll_write(context, bytes))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            // Plain streams never say where they begin.
            let before = taking.known().unwrap_or(0);
            taking.total = before + taken as u64;
            Poll::Ready(Ok(taken))
        })
        .await
    }

    pub(super) async fn released(&self) {
        poll_fn(|context| self.poll_released(context).map(drop)).await;
    }

    fn poll_released(&self, context: &mut Context<'_>) -> Poll<MutexGuard<'_, Taking>> {
        let mut taking = self.lock();
        if taking.held {
            taking.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(taking)
    }
}

impl Taking {
    fn known(&self) -> Option<u64> {
        (self.total != UNKNOWN).then_some(self.total)
    }
}

/// Receiving cannot go on.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The sink takes no more, such as a pipe whose process has closed its input.
    #[error("the bytes received cannot be handed on: {0}")]
    Sink(#[source] io::Error),
    /// There will be no more connections.
    #[error("the stream will not be connected again: the link is closed")]
    Disconnected,
}

/// A stream that was received to its end. The sink has been shut down. Where the stream is accepted, let it [`Ended::linger`]
/// until the process is gone: a sender that missed the last acknowledgement connects again and must be told.
#[derive(Debug)]
pub struct Ended<C> {
    /// Bytes of the stream in all.
    pub total: u64,
    connect: C,
}

impl<C: Connect> Ended<C> {
    /// Tells a late sender that all was taken; ends when one has understood, or there will be no more connections.
    /// For the end that accepts: one that dials would go on dialling a sender that is content.
    pub async fn linger(mut self) {
        while let Some(stream) = self.connect.connect().await {
            match tokio::time::timeout(GREETING_DEADLINE, tell(stream, self.total)).await {
                // A sender half-closes here only once it knows that it is done.
                Ok(Ok(())) => return,
                told => debug!(?told, "a late stdio sender was lost while it was told that all is taken"),
            }
        }
    }
}

async fn tell<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, total: u64) -> io::Result<()> {
    stream.write_all(&total.to_le_bytes()).await?;
    stream.flush().await?;
    let mut waste = [0u8; 64];
    while stream.read(&mut waste).await? > 0 {}
    stream.shutdown().await
}

/// Receives a stream into `sink` to its end, over as many connections as it takes. Acknowledges what the sink has
/// taken and flushed; a sink that blocks holds up the sender.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive<C, W>(mut connect: C, mut sink: W, resume: &Resume) -> Result<Ended<C>, ReceiveError>
where
    C: Connect,
    W: AsyncWrite + Unpin + Send,
{
    let mut buffer = vec![0; PIECE];
    loop {
        let Some(stream) = connect.connect().await else { return Err(ReceiveError::Disconnected) };
        match take(stream, &mut sink, resume, &mut buffer).await {
            Ok(total) => {
                resume.released().await;
                // A sink that cannot be shut down has all its bytes all the same.
                let _ = sink.shutdown().await;
                return Ok(Ended { total, connect });
            }
            Err(Broken::Sink(error)) => return Err(ReceiveError::Sink(error)),
            Err(Broken::Stream(error)) => debug!(%error, "a stdio stream broke; waiting for the next"),
        }
        tokio::time::sleep(REDIAL / 10).await;
    }
}

enum Broken {
    Stream(io::Error),
    Sink(io::Error),
}

/// Serves one connection. Ok: the sender has ended the stream; the total.
async fn take<S, W>(mut stream: S, sink: &mut W, resume: &Resume, buffer: &mut [u8]) -> Result<u64, Broken>
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: AsyncWrite + Unpin,
{
    stream.write_all(&resume.raw().to_le_bytes()).await.map_err(Broken::Stream)?;
    stream.flush().await.map_err(Broken::Stream)?;
    let start = tokio::time::timeout(GREETING_DEADLINE, stream.read_u64_le()).await;
    let start = start.map_err(|_| Broken::Stream(io::ErrorKind::TimedOut.into()))?.map_err(Broken::Stream)?;
    if start == UNKNOWN {
        return Err(Broken::Stream(io::Error::new(io::ErrorKind::InvalidData, "no such offset")));
    }
    // Bytes that the sender repeats although they were taken.
    let mut skip = resume.begin(start).await - start;
    loop {
        let n = stream.read(buffer).await.map_err(Broken::Stream)?;
        if n == 0 {
            let _ = stream.shutdown().await;
            return Ok(resume.raw());
        }
        let repeated = usize::try_from(skip).unwrap_or(usize::MAX).min(n);
        skip -= repeated as u64;
        let mut fresh = &buffer[repeated..n];
        while !fresh.is_empty() {
            let taken = resume.hand_on(sink, fresh).await.map_err(Broken::Sink)?;
            fresh = &fresh[taken..];
        }
        sink.flush().await.map_err(Broken::Sink)?;
        stream.write_all(&resume.raw().to_le_bytes()).await.map_err(Broken::Stream)?;
        stream.flush().await.map_err(Broken::Stream)?;
    }
}
