//! The host's end of the bridge.
//!
//! A [`Bridge`] outlives its connections. Requests wait in one table until they are answered; whatever is
//! unanswered when a new connection is attached is sent again under its old id, and a guest of ours answers each
//! id once. Answers to ids that nobody waits for yet are kept for a while: after a move they may come before the
//! wait is adopted.

mod calls;
mod error;
mod table;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, WriteHalf};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

pub use calls::PendingWait;
pub use error::BridgeError;

use crate::frame::{Frame, FrameError, MAX_FROM_GUEST, MessageType};
use crate::message::{
    ContainerNotification, GuestCapabilities, NegotiateRequest, NegotiateResponse, PROTOCOL_VERSION, Request,
    RequestBase, ResponseBase,
};
use table::Table;

/// How long a request may go unanswered, connections lost and attached included. Waits are not bounded so.
pub const CALL_DEADLINE: Duration = Duration::from_secs(300);
/// How long a guest may take to negotiate.
pub const NEGOTIATE_DEADLINE: Duration = Duration::from_secs(30);
/// Notifications that may wait to be taken; more are dropped.
const NOTIFICATIONS: usize = 256;

/// A host's bridge to one guest. Clones are handles.
#[derive(Debug, Clone)]
pub struct Bridge(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    instance: String,
    next_id: AtomicU64,
    state: Mutex<State>,
    to_write: Notify,
    notify: mpsc::Sender<ContainerNotification>,
    notifications: Mutex<Option<mpsc::Receiver<ContainerNotification>>>,
    connected: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    last_connection: u64,
    connection: Option<Connection>,
    capabilities: Option<GuestCapabilities>,
    table: Table,
}

/// An attached connection; dropping it ends its tasks and so the stream.
#[derive(Debug)]
struct Connection {
    number: u64,
    _reader: Task,
    _writer: Task,
}

#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Takes a request out of the table when its caller goes away.
#[derive(Debug)]
struct Registration {
    inner: Arc<Inner>,
    id: u64,
    answer: oneshot::Receiver<Bytes>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.inner.lock().table.forget(self.id);
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of this number is gone.
    fn lost(&self, number: u64) {
        let lost = {
            let mut state = self.lock();
            let current = state.connection.as_ref().is_some_and(|connection| connection.number == number);
            if current { state.connection.take() } else { None }
        };
        if lost.is_some() {
            info!("the connection to the guest is lost; waiting for the next");
            self.connected.send_replace(false);
        }
    }

    /// Acts on a frame from the guest. False: no guest sends this.
    fn take(&self, frame: Frame) -> bool {
        if frame.message.is_response() {
            return self.lock().table.answer(frame);
        }
        if frame.message != MessageType::NOTIFICATION {
            return false;
        }
        match serde_json::from_slice::<ContainerNotification>(&frame.body) {
            Ok(notification) => {
                if self.notify.try_send(notification).is_err() {
                    warn!("too many notifications wait to be taken; one is dropped");
                }
                true
            }
            Err(error) => {
                warn!(%error, "a notification of the guest cannot be read");
                false
            }
        }
    }
}

impl Bridge {
    /// A bridge whose first request has this id. On the destination of a move: the source's [`Bridge::next_id`],
    /// so that no late answer to the source's requests is taken for an answer to one of these.
    #[must_use]
    pub fn new(first_id: u64) -> Bridge {
        let (notify, notifications) = mpsc::channel(NOTIFICATIONS);
        Bridge(Arc::new(Inner {
            instance: uuid::Uuid::new_v4().to_string(),
            next_id: AtomicU64::new(first_id),
            state: Mutex::default(),
            to_write: Notify::new(),
            notify,
            notifications: Mutex::new(Some(notifications)),
            connected: watch::Sender::new(false),
        }))
    }

    /// Negotiates on a fresh connection, then uses it in place of the one before and sends again what is
    /// outstanding.
    ///
    /// # Errors
    /// The connection is given up on any error; the bridge itself goes on and takes another one.
    pub async fn attach<S>(&self, stream: S) -> Result<GuestCapabilities, BridgeError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let negotiated = self.negotiate(stream);
        match tokio::time::timeout(NEGOTIATE_DEADLINE, negotiated).await {
            Ok(result) => result,
            Err(_) => {
                Err(BridgeError::Deadline { operation: "NegotiateProtocol", after: NEGOTIATE_DEADLINE })
            }
        }
    }

    async fn negotiate<S>(&self, stream: S) -> Result<GuestCapabilities, BridgeError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        const OPERATION: &str = "NegotiateProtocol";
        let (mut read, mut write) = tokio::io::split(stream);
        let id = self.take_id();
        let body = serde_json::to_vec(&NegotiateRequest {
            base: RequestBase::of(""),
            minimum_version: PROTOCOL_VERSION,
            maximum_version: PROTOCOL_VERSION,
            host_time_unix_nanos: now_unix_nanos(),
            host_instance: Some(self.0.instance.clone()),
        })
        .map_err(|source| BridgeError::Encode { operation: OPERATION, source })?;
        let asked = Request::NegotiateProtocol.message_type();
        let lost = |error: io::Error| BridgeError::ConnectionLost(FrameError::Read(error));
        let frame = Frame { message: asked, id, body: Bytes::from(body) };
        write.write_all(&frame.encode()).await.map_err(lost)?;
        write.flush().await.map_err(lost)?;
        // Exits and late answers may come first.
        let answer = loop {
            let frame = Frame::read(&mut read, MAX_FROM_GUEST).await.map_err(BridgeError::ConnectionLost)?;
            if frame.id == id && frame.message == asked.response() {
                break frame.body;
            }
            if !self.0.take(frame) {
                let unexpected = io::Error::new(io::ErrorKind::InvalidData, "a frame that no guest sends");
                return Err(lost(unexpected));
            }
        };
        check(OPERATION, &answer)?;
        let answer: NegotiateResponse = serde_json::from_slice(&answer)
            .map_err(|source| BridgeError::Answer { operation: OPERATION, source })?;
        if answer.version != PROTOCOL_VERSION {
            return Err(BridgeError::Version { version: answer.version });
        }
        self.adopt(read, write, &answer.capabilities)?;
        Ok(answer.capabilities)
    }

    fn adopt<R, S>(
        &self,
        mut read: R,
        write: WriteHalf<S>,
        capabilities: &GuestCapabilities,
    ) -> Result<(), BridgeError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let old = {
            let mut state = self.0.lock();
            if state.closed {
                return Err(BridgeError::Closed);
            }
            state.last_connection += 1;
            let number = state.last_connection;
            state.table.send_again(capabilities.speaks_dunlin());
            state.capabilities = Some(capabilities.clone());
            // Both tasks need the lock before they can report a loss, so the connection is in place by then.
            let inner = self.0.clone();
            let reader = tokio::spawn(async move {
                loop {
                    match Frame::read(&mut read, MAX_FROM_GUEST).await {
                        Ok(frame) => {
                            if !inner.take(frame) {
                                warn!("the guest has sent a frame that no guest sends");
                                break;
                            }
                        }
                        Err(error) => {
                            debug!(%error, "reading the bridge has ended");
                            break;
                        }
                    }
                }
                inner.lost(number);
            });
            let writer = tokio::spawn(write_requests(self.0.clone(), write, number));
            state.connection.replace(Connection { number, _reader: Task(reader), _writer: Task(writer) })
        };
        drop(old);
        self.0.connected.send_replace(true);
        Ok(())
    }

    /// The id that the next request will have; part of what moves.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.0.next_id.load(Ordering::Acquire)
    }

    /// What the guest can do, as it said when a connection was last attached; None before the first one.
    #[must_use]
    pub fn capabilities(&self) -> Option<GuestCapabilities> {
        self.0.lock().capabilities.clone()
    }

    /// Whether a negotiated connection is attached.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.0.connected.subscribe()
    }

    /// The guest's notifications from the beginning, of all connections; at most 256 wait here. The second call
    /// gets an empty, closed queue.
    #[must_use]
    pub fn notifications(&self) -> mpsc::Receiver<ContainerNotification> {
        let taken = self.0.notifications.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.unwrap_or_else(|| mpsc::channel(1).1)
    }

    /// Gives up the connection and fails all calls, these and later ones, with [`BridgeError::Closed`].
    pub fn close(&self) {
        let connection = {
            let mut state = self.0.lock();
            state.closed = true;
            state.table.clear();
            state.connection.take()
        };
        drop(connection);
        self.0.connected.send_replace(false);
    }

    fn take_id(&self) -> u64 {
        self.0.next_id.fetch_add(1, Ordering::AcqRel)
    }

    /// Puts a request in the table; it is written as soon as there is a connection.
    fn register(
        &self,
        id: u64,
        asked: MessageType,
        frame: Option<Bytes>,
    ) -> Result<Registration, BridgeError> {
        let answer = {
            let mut state = self.0.lock();
            if state.closed {
                return Err(BridgeError::Closed);
            }
            state.table.register(id, asked, frame)
        };
        self.0.to_write.notify_one();
        Ok(Registration { inner: self.0.clone(), id, answer })
    }
}

async fn write_requests<S>(inner: Arc<Inner>, mut write: WriteHalf<S>, number: u64)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    loop {
        let next = {
            let mut state = inner.lock();
            // A request taken here after the next connection was attached would be sent nowhere.
            if state.connection.as_ref().is_none_or(|connection| connection.number != number) {
                inner.to_write.notify_one();
                return;
            }
            state.table.next_to_write()
        };
        let Some((id, bytes)) = next else {
            inner.to_write.notified().await;
            continue;
        };
        let written = async {
            write.write_all(&bytes).await?;
            write.flush().await
        };
        if let Err(error) = written.await {
            debug!(%error, "writing the bridge has ended");
            inner.lost(number);
            return;
        }
        inner.lock().table.written(id);
    }
}

/// Fails when the answer is a failure.
fn check(operation: &'static str, answer: &[u8]) -> Result<(), BridgeError> {
    let base: ResponseBase =
        serde_json::from_slice(answer).map_err(|source| BridgeError::Answer { operation, source })?;
    if base.result.is_ok() {
        return Ok(());
    }
    let message = if base.error_message.is_empty() {
        base.error_records.last().map(|record| record.message.clone()).unwrap_or_default()
    } else {
        base.error_message
    };
    Err(BridgeError::Guest { operation, hresult: base.result, message })
}

fn now_unix_nanos() -> Option<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_nanos()).ok()
}
