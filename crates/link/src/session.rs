//! One session: yamux over the DATA packets of one epoch.
//!
//! The driver task owns the yamux connection. It is fed the session's bytes, writes to the outbox, opens streams
//! on demand (guest) and hands in those that the other end opens (host). It ends when the session is dropped, or by
//! itself when the other end breaks the protocol.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use futures::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tracing::debug;

use crate::outbox::Outbox;
use crate::packet::MAX_PAYLOAD;
use crate::stream::SessionFlag;
use crate::{Epoch, LinkStream};

/// Streams that the guest opens at a time; more dials are refused.
const MAX_DIALLED: usize = 448;
/// Streams at which the multiplexer gives up the session. Each may hold 256 KiB of its peer's bytes. The host sees a
/// stream longer than the guest, which is why it has room for more of them.
const MAX_GUEST_STREAMS: usize = 512;
const MAX_HOST_STREAMS: usize = 1024;
const STREAM_WINDOW: usize = 256 * 1024;
/// A yamux frame and its 12-byte header fill one packet.
const SPLIT: usize = MAX_PAYLOAD - 12;
/// Requests to open a stream that may wait for the driver.
const MAX_DIALS: usize = 64;
/// Half-closed streams dropped at once by their users.
const MAX_LINGERING: usize = 64;

/// A request to open a stream.
pub(crate) type OpenRequest = oneshot::Sender<io::Result<LinkStream>>;

/// A running session. Dropping it ends it and resets its streams.
#[derive(Debug)]
pub(crate) struct Session {
    epoch: Epoch,
    next_seq: u32,
    inbound: Inbound,
    flag: Arc<SessionFlag>,
    dials: mpsc::Sender<OpenRequest>,
    driver: AbortHandle,
}

/// The other end broke the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    LostPacket,
    TooMuchUnread,
}

impl Session {
    /// Starts a session in which the other end opens streams, handed to `incoming`. `ended` is sent the epoch
    /// when the session breaks by itself.
    pub(crate) fn host(
        epoch: Epoch,
        outbox: &Outbox,
        incoming: impl FnMut(LinkStream) + Send + Unpin + 'static,
        ended: mpsc::Sender<Epoch>,
    ) -> Session {
        Session::spawn(epoch, outbox, yamux::Mode::Server, incoming, ended)
    }

    /// Starts a session in which this end opens streams.
    pub(crate) fn guest(epoch: Epoch, outbox: &Outbox, ended: mpsc::Sender<Epoch>) -> Session {
        Session::spawn(epoch, outbox, yamux::Mode::Client, drop, ended)
    }

    fn spawn(
        epoch: Epoch,
        outbox: &Outbox,
        mode: yamux::Mode,
        incoming: impl FnMut(LinkStream) + Send + Unpin + 'static,
        ended: mpsc::Sender<Epoch>,
    ) -> Session {
        outbox.begin(Some(epoch));
        let mut config = yamux::Config::default();
        let max_streams = match mode {
            yamux::Mode::Client => MAX_GUEST_STREAMS,
            yamux::Mode::Server => MAX_HOST_STREAMS,
        };
        let window = max_streams * STREAM_WINDOW;
        // In this order: the window must always cover the streams.
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(max_streams);
        config.set_max_connection_receive_window(Some(window));
        config.set_split_send_size(SPLIT);
        let inbound = Inbound::with_cap(window);
        let io = SessionIo { epoch, inbound: inbound.clone(), outbox: outbox.clone(), held: Vec::new() };
        let flag = SessionFlag::new();
        let (dials, dial_requests) = mpsc::channel(MAX_DIALS);
        let (linger, lingering) = mpsc::channel(MAX_LINGERING);
        let driver = Driver {
            flag: flag.clone(),
            connection: yamux::Connection::new(io, config, mode),
            dial_requests,
            opening: None,
            linger,
            lingering,
            drains: JoinSet::new(),
            incoming,
        };
        let driver = tokio::spawn(async move {
            let reason = driver.await;
            debug!(%epoch, %reason, "the session's multiplexer has ended");
            let _ = ended.send(epoch).await;
        })
        .abort_handle();
        Session { epoch, next_seq: 0, inbound, flag, dials, driver }
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Where to ask for a new stream.
    pub(crate) fn dials(&self) -> mpsc::Sender<OpenRequest> {
        self.dials.clone()
    }

    /// Takes a DATA packet of this session.
    pub(crate) fn data(&mut self, seq: u32, payload: Bytes) -> Result<(), Broken> {
        if seq != self.next_seq {
            return Err(Broken::LostPacket);
        }
        self.next_seq = seq.wrapping_add(1);
        self.inbound.push(payload)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Before the driver drops the streams: whoever is woken by that must see why.
        self.flag.end();
        self.driver.abort();
    }
}

#[derive(Debug, Clone)]
struct Inbound(Arc<Mutex<InboundQueue>>);

#[derive(Debug)]
struct InboundQueue {
    chunks: VecDeque<Bytes>,
    len: usize,
    /// yamux's credit keeps an honest peer below it.
    cap: usize,
    reader: Option<Waker>,
}

impl Inbound {
    fn with_cap(cap: usize) -> Inbound {
        Inbound(Arc::new(Mutex::new(InboundQueue { chunks: VecDeque::new(), len: 0, cap, reader: None })))
    }

    fn push(&self, payload: Bytes) -> Result<(), Broken> {
        let waker = {
            let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.len + payload.len() > queue.cap {
                return Err(Broken::TooMuchUnread);
            }
            queue.len += payload.len();
            queue.chunks.push_back(payload);
            queue.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}

/// The session's bytes as yamux wants them.
struct SessionIo {
    epoch: Epoch,
    inbound: Inbound,
    outbox: Outbox,
    held: Vec<u8>,
}

impl SessionIo {
    fn poll_push(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.held.is_empty() {
            return Poll::Ready(Ok(()));
        }
        if ready!(self.outbox.poll_data(context, self.epoch, &mut self.held)) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }
    }
}

impl AsyncRead for SessionIo {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut queue = self.inbound.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(front) = queue.chunks.front_mut() else {
            queue.reader = Some(context.waker().clone());
            return Poll::Pending;
        };
        let n = front.len().min(buffer.len());
        front.copy_to_slice(&mut buffer[..n]);
        let empty = front.is_empty();
        queue.len -= n;
        if empty {
            queue.chunks.pop_front();
        }
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for SessionIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.held.len() >= MAX_PAYLOAD {
            ready!(self.poll_push(context))?;
        }
        let n = bytes.len().min(MAX_PAYLOAD - self.held.len());
        self.held.extend_from_slice(&bytes[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_push(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_push(context)
    }
}

/// The task that owns the yamux connection; yields why it ended.
struct Driver<F> {
    // Dropped after `flag` is set by `drop`.
    connection: yamux::Connection<SessionIo>,
    flag: Arc<SessionFlag>,
    dial_requests: mpsc::Receiver<OpenRequest>,
    opening: Option<OpenRequest>,
    linger: mpsc::Sender<yamux::Stream>,
    lingering: mpsc::Receiver<yamux::Stream>,
    drains: JoinSet<()>,
    incoming: F,
}

impl<F: FnMut(LinkStream) + Send + Unpin> Driver<F> {
    fn wrap(&self, stream: yamux::Stream) -> LinkStream {
        LinkStream::new(stream, self.flag.clone(), self.linger.clone())
    }

    /// Streams that are in somebody's hands: each has the flag, as have the session and this driver.
    fn streams(&self) -> usize {
        Arc::strong_count(&self.flag).saturating_sub(2) + self.drains.len()
    }

    fn poll_dials(&mut self, context: &mut Context<'_>) {
        loop {
            if self.opening.is_none() {
                match self.dial_requests.poll_recv(context) {
                    Poll::Ready(Some(request)) => self.opening = Some(request),
                    Poll::Ready(None) | Poll::Pending => return,
                }
            }
            // yamux answers one stream too many by giving up the session with all the others.
            let opened = if self.streams() >= MAX_DIALLED {
                Err(io::Error::other(format!("{MAX_DIALLED} streams of the link are open; close some first")))
            } else {
                let Poll::Ready(opened) = self.connection.poll_new_outbound(context) else { return };
                opened.map(|stream| self.wrap(stream)).map_err(io::Error::other)
            };
            if let Some(request) = self.opening.take() {
                let _ = request.send(opened);
            }
        }
    }

    fn poll_lingering(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(mut stream)) = self.lingering.poll_recv(context) {
            self.drains.spawn(async move {
                let mut waste = vec![0; 16 * 1024];
                while matches!(futures::AsyncReadExt::read(&mut stream, &mut waste).await, Ok(1..)) {}
            });
        }
        while let Poll::Ready(Some(_)) = self.drains.poll_join_next(context) {}
    }
}

impl<F: FnMut(LinkStream) + Send + Unpin> Future for Driver<F> {
    type Output = String;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<String> {
        let this = &mut *self;
        this.poll_dials(context);
        this.poll_lingering(context);
        loop {
            let inbound = ready!(this.connection.poll_next_inbound(context));
            let reason = match inbound {
                Some(Ok(stream)) => {
                    let stream = this.wrap(stream);
                    (this.incoming)(stream);
                    continue;
                }
                Some(Err(error)) => error.to_string(),
                None => "closed by the other end".to_owned(),
            };
            this.flag.end();
            return Poll::Ready(reason);
        }
    }
}

impl<F> Drop for Driver<F> {
    fn drop(&mut self) {
        self.flag.end();
    }
}
