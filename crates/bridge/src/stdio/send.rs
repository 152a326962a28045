//! The sending end: reads the process's pipe (guest) or containerd's FIFO (host).

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tracing::debug;

use super::retained::{Position, Retained};
use super::{Connect, GREETING_DEADLINE, Numbers, REDIAL};

const PIECE: usize = 32 * 1024;

/// A stream's sending state. Clones are handles to the same state, so that it can be held and saved while [`send`]
/// runs; one [`send`] at a time.
#[derive(Debug, Clone)]
pub struct Sender(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    kept: Retained,
    held: bool,
    /// Whoever would read the source, once it is released or there is room.
    reader: Option<Waker>,
}

impl Default for Sender {
    fn default() -> Sender {
        Sender::of(Retained::new())
    }
}

impl Sender {
    /// A sender that goes on where another one stood. With a source that had ended there, it reads none.
    #[must_use]
    pub fn at(position: Position) -> Sender {
        Sender::of(Retained::at(position))
    }

    fn of(kept: Retained) -> Sender {
        Sender(Arc::new(Mutex::new(State { kept, held: false, reader: None })))
    }

    /// Where the stream stands now; more may be read meanwhile, unless it is held.
    #[must_use]
    pub fn position(&self) -> Position {
        self.lock().kept.position()
    }

    /// From the return of this on no byte is read from the source, over all connections, until [`Sender::release`].
    /// What was read is still sent and acknowledged. The position holds every byte read.
    #[must_use]
    pub fn hold(&self) -> Position {
        let mut state = self.lock();
        state.held = true;
        state.kept.position()
    }

    /// Bytes of the source that its owner has read beside [`send`], while it is held: they come before whatever
    /// is read later. They may go beyond the limit.
    pub fn append(&self, bytes: &[u8]) {
        self.lock().kept.push(bytes);
    }

    /// Ends [`Sender::hold`].
    pub fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        state.wake();
    }

    /// From now on at most this many unacknowledged bytes are kept: while there are more, the source is not read.
    /// [`super::RETAINED`] at first.
    pub fn limit(&self, bytes: usize) {
        let mut state = self.lock();
        state.kept.limit = bytes;
        state.wake();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// How a sender ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// The source has ended and the receiver has taken all of it.
    Complete {
        /// Bytes of the stream in all.
        total: u64,
    },
    /// Stopped, or never to be connected again, before that.
    Stopped {
        /// Bytes that the receiver has taken for sure.
        acknowledged: u64,
        /// Bytes read from the source and not known to be taken.
        pending: u64,
    },
}

/// Sends all of `source`, connecting again for ever on any break, until the receiver has taken everything or `stop`
/// resolves. A source that fails counts as ended: a closed pty does so.
pub async fn send<R, C, F>(sender: &Sender, source: R, mut connect: C, stop: F) -> Drained
where
    R: AsyncRead + Unpin + Send,
    C: Connect,
    F: Future<Output = ()> + Send,
{
    let mut stop = pin!(stop);
    let mut source = Source { reader: source, buffer: vec![0; PIECE] };
    loop {
        let connected = async {
            let mut connecting = pin!(connect.connect());
            loop {
                tokio::select! {
                    stream = &mut connecting => return stream,
                    () = source.fill(sender) => {}
                }
            }
        };
        let stream = tokio::select! {
            biased;
            () = &mut stop => return stopped(sender),
            stream = connected => stream,
        };
        let Some(stream) = stream else { return stopped(sender) };
        let ended = tokio::select! {
            biased;
            () = &mut stop => return stopped(sender),
            ended = pump(sender, &mut source, stream) => ended,
        };
        match ended {
            Ok(()) => return Drained::Complete { total: sender.lock().kept.end() },
            Err(error) => debug!(%error, "a stdio stream broke; connecting again"),
        }
        tokio::select! {
            biased;
            () = &mut stop => return stopped(sender),
            () = tokio::time::sleep(REDIAL) => {}
        }
    }
}

fn stopped(sender: &Sender) -> Drained {
    let state = sender.lock();
    let kept = &state.kept;
    if kept.drained() {
        return Drained::Complete { total: kept.end() };
    }
    Drained::Stopped { acknowledged: kept.base(), pending: kept.end() - kept.base() }
}

struct Source<R> {
    reader: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Source<R> {
    /// Reads once into the state; pending while it is held, there is no room or nothing more. Cancel safe.
    async fn fill(&mut self, sender: &Sender) {
        poll_fn(|context| self.poll_fill(sender, context)).await;
    }

    /// Reads under the state's lock: whoever holds the sender afterwards sees every byte that was read.
    fn poll_fill(&mut self, sender: &Sender, context: &mut Context<'_>) -> Poll<()> {
        let mut state = sender.lock();
        let room = state.kept.room().min(PIECE);
        if state.held || state.kept.source_ended || room == 0 {
            state.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let mut into = ReadBuf::new(&mut self.buffer[..room]);
        let read = ready!(Pin::new(&mut self.reader).poll_read(context, &mut into));
        if let Err(error) = &read {
            debug!(%error, "a stdio source has failed; taken as its end");
        }
        if read.is_err() || into.filled().is_empty() {
            state.kept.source_ended = true;
        } else {
            state.kept.push(into.filled());
        }
        Poll::Ready(())
    }
}

/// Serves one connection. Ok: the receiver has everything.
async fn pump<R, S>(sender: &Sender, source: &mut Source<R>, stream: S) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    S: AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let greeting = tokio::time::timeout(GREETING_DEADLINE, read.read_u64_le());
    let greeting = tokio::select! {
        biased;
        greeting = greeting => greeting,
        // A process must not wait for a host that says nothing, as long as there is room.
        () = async { loop { source.fill(sender).await } } => unreachable!("filling never ends"),
    };
    let total = greeting.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let resumed = sender.lock().kept.resume(total);
    let Some(mut cursor) = resumed else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the receiver has more than was sent"));
    };
    write.write_all(&cursor.to_le_bytes()).await?;

    let mut numbers = Numbers::default();
    let mut acks = [0u8; 512];
    let mut piece = Vec::with_capacity(PIECE);
    let mut half_closed = false;
    loop {
        let (drained, at_end) = {
            let state = sender.lock();
            let kept = &state.kept;
            piece.clear();
            let next = kept.from(cursor);
            piece.extend_from_slice(&next[..next.len().min(PIECE)]);
            (kept.drained(), kept.source_ended && piece.is_empty())
        };
        if at_end && !half_closed {
            half_closed = true;
            write.shutdown().await?;
            continue;
        }
        if drained {
            return Ok(());
        }
        tokio::select! {
            read = read.read(&mut acks) => {
                let n = read?;
                if n == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the receiver has closed early"));
                }
                if let Some(total) = numbers.feed(&acks[..n])
                    && !sender.lock().kept.acknowledge(total)
                {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the receiver took more than was sent"));
                }
            }
            written = write.write(&piece), if !piece.is_empty() => {
                let n = written?;
                if n == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                cursor += n as u64;
            }
            () = source.fill(sender) => {}
        }
    }
}
