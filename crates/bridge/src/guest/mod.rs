//! The guest's end of the bridge.
//!
//! ```text
//! serve(connection) --request--> Handler, each in a task of its own
//!        ^                          |
//!        +---- outgoing answers <---+   outlive connections
//! ```
//!
//! A repeated id of the same host is answered from the table or, while it still runs, not at all: nothing runs
//! twice. A new host clears the table, and answers to the old host's requests are dropped. What waits for a host that
//! takes nothing is bounded.

mod dispatch;
mod handler;
mod ledger;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tracing::{debug, error, info};

pub use handler::{Failure, Handler, ShutdownKind};

use crate::frame::{Frame, FrameError, MAX_FROM_GUEST, MAX_FROM_HOST, MessageType};
use crate::hresult::HResult;
use crate::message::{
    ContainerNotification, GuestCapabilities, NegotiateRequest, NegotiateResponse, PROTOCOL_VERSION, Request,
    ResponseBase,
};
use ledger::{Admission, HostGeneration, Ledger};

/// Serves hosts, one connection after the other. Clones are handles.
#[derive(Debug)]
pub struct Server<H>(Arc<Inner<H>>);

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Server(self.0.clone())
    }
}

#[derive(Debug)]
struct Inner<H> {
    handler: Arc<H>,
    capabilities: GuestCapabilities,
    ledger: Mutex<Ledger>,
    to_write: Notify,
    /// Something was written: there may be room for more.
    room: Notify,
}

/// A connection has ended, as all of them do; serve the next one.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The host's frames cannot be read.
    #[error("the host's requests cannot be read: {0}")]
    Read(#[source] FrameError),
    /// The host does not take answers.
    #[error("the answers cannot be written: {0}")]
    Write(#[source] std::io::Error),
    /// The host's versions do not include ours.
    #[error(
        "the host speaks versions {minimum} to {maximum} of the bridge, this guest speaks {PROTOCOL_VERSION}"
    )]
    Version {
        /// The host's lowest.
        minimum: u32,
        /// The host's highest.
        maximum: u32,
    },
}

impl<H> Inner<H> {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: Handler> Server<H> {
    /// A server that advertises what Dunlin's guest can do.
    #[must_use]
    pub fn new(handler: Arc<H>) -> Server<H> {
        Server::with_capabilities(handler, GuestCapabilities::dunlin())
    }

    /// A server that advertises something else.
    #[must_use]
    pub fn with_capabilities(handler: Arc<H>, capabilities: GuestCapabilities) -> Server<H> {
        Server(Arc::new(Inner {
            handler,
            capabilities,
            ledger: Mutex::default(),
            to_write: Notify::new(),
            room: Notify::new(),
        }))
    }

    /// Tells the host, now or when it next connects.
    pub fn notify(&self, notification: &ContainerNotification) {
        match serde_json::to_vec(notification) {
            Ok(body) => {
                let frame = Frame { message: MessageType::NOTIFICATION, id: 0, body: Bytes::from(body) };
                self.0.lock().queue(frame.encode());
                self.0.to_write.notify_one();
            }
            Err(error) => error!(%error, "a notification cannot be written as JSON"),
        }
    }

    /// Serves a connection to its end. Ok: the host has closed it, or a newer connection has taken its place.
    ///
    /// # Errors
    /// [`ServeError`]; what was under way goes on, and its answers wait for the next connection.
    pub async fn serve<S>(&self, stream: S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Send,
    {
        let (mut read, mut write) = tokio::io::split(stream);
        let Some((connection, host)) = self.negotiate(&mut read, &mut write).await? else { return Ok(()) };
        let reading = async {
            loop {
                // A host that asks and takes no answers is not to fill the guest's memory with them.
                loop {
                    let written = self.0.room.notified();
                    if self.0.lock().has_room() {
                        break;
                    }
                    written.await;
                }
                match Frame::read(&mut read, MAX_FROM_HOST).await {
                    Ok(frame) => self.admit(host, frame),
                    Err(FrameError::Ended) => return Ok(()),
                    Err(error) => return Err(ServeError::Read(error)),
                }
            }
        };
        let writing = async {
            loop {
                let next = self.0.lock().next(connection);
                match next {
                    ledger::Next::Write(bytes) => {
                        write.write_all(&bytes).await.map_err(ServeError::Write)?;
                        write.flush().await.map_err(ServeError::Write)?;
                        self.0.lock().written(connection);
                        self.0.room.notify_waiters();
                    }
                    ledger::Next::Idle => self.0.to_write.notified().await,
                    ledger::Next::Superseded => {
                        // The wake-up was meant for the newer connection too.
                        self.0.to_write.notify_one();
                        return Ok(());
                    }
                }
            }
        };
        tokio::select! {
            ended = reading => ended,
            ended = writing => ended,
        }
    }

    /// None: the host has gone without negotiating.
    async fn negotiate<R, W>(
        &self,
        read: &mut R,
        write: &mut W,
    ) -> Result<Option<(u64, HostGeneration)>, ServeError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            let frame = match Frame::read(read, MAX_FROM_HOST).await {
                Ok(frame) => frame,
                Err(FrameError::Ended) => return Ok(None),
                Err(error) => return Err(ServeError::Read(error)),
            };
            let (answer, outcome) =
                if Request::from_message_type(frame.message) == Some(Request::NegotiateProtocol) {
                    self.negotiated(&frame)
                } else {
                    let failure =
                        Failure::new(HResult::NOT_IMPLEMENTED, "the bridge has not been negotiated yet");
                    (dispatch::failed(&frame, &failure), None)
                };
            let request = match outcome {
                Some(Ok(request)) => request,
                refused => {
                    write.write_all(&answer).await.map_err(ServeError::Write)?;
                    write.flush().await.map_err(ServeError::Write)?;
                    match refused {
                        Some(Err(error)) => return Err(error),
                        _ => continue,
                    }
                }
            };
            // The clock is right before the host can ask for anything.
            self.0.handler.negotiated(&request).await;
            write.write_all(&answer).await.map_err(ServeError::Write)?;
            write.flush().await.map_err(ServeError::Write)?;
            let begun = self.0.lock().begin(request.host_instance.as_deref());
            info!(host = request.host_instance.as_deref().unwrap_or("unnamed"), "a host has negotiated");
            self.0.to_write.notify_one();
            return Ok(Some(begun));
        }
    }

    fn negotiated(&self, frame: &Frame) -> (Bytes, Option<Result<NegotiateRequest, ServeError>>) {
        let request: NegotiateRequest = match serde_json::from_slice(&frame.body) {
            Ok(request) => request,
            Err(error) => {
                let failure = Failure::new(HResult::INVALID_JSON, format!("NegotiateProtocol: {error}"));
                return (dispatch::failed(frame, &failure), None);
            }
        };
        let (minimum, maximum) = (request.minimum_version, request.maximum_version);
        if maximum < PROTOCOL_VERSION || minimum > PROTOCOL_VERSION {
            let error = ServeError::Version { minimum, maximum };
            let failure = Failure::new(HResult::UNSUPPORTED_PROTOCOL_VERSION, error.to_string());
            return (dispatch::failed(frame, &failure), Some(Err(error)));
        }
        let answer = NegotiateResponse {
            base: ResponseBase { activity_id: request.base.activity_id.clone(), ..ResponseBase::default() },
            version: PROTOCOL_VERSION,
            capabilities: self.0.capabilities.clone(),
        };
        (dispatch::encode(frame, &answer), Some(Ok(request)))
    }

    /// Starts a request, unless it is known already.
    fn admit(&self, host: HostGeneration, frame: Frame) {
        if !frame.message.is_request() {
            debug!(message = frame.message.0, "dropped a frame that is no request");
            return;
        }
        let admission = self.0.lock().admit(frame.id);
        match admission {
            Admission::Repeated => self.0.to_write.notify_one(),
            Admission::Running => debug!(id = frame.id, "a repeated request still runs"),
            Admission::TooMany => {
                let failure = Failure::new(HResult::FAIL, "too many requests are under way in the guest");
                self.finish(host, frame.id, dispatch::failed(&frame, &failure));
            }
            Admission::New => {
                let server = self.clone();
                tokio::spawn(async move {
                    let (message, id) = (frame.message, frame.id);
                    let handler = server.0.handler.clone();
                    let empty = Frame { message, id, body: Bytes::new() };
                    // In a task of its own, so that a panic too is answered.
                    let answer = tokio::spawn(async move { dispatch::run(&*handler, &frame).await }).await;
                    let answer = answer.unwrap_or_else(|error| {
                        error!(%error, "a request's handler has ended by a panic");
                        dispatch::failed(
                            &empty,
                            &Failure::new(HResult::FAIL, "the guest's handler has panicked"),
                        )
                    });
                    server.finish(host, id, answer);
                });
            }
        }
    }

    fn finish(&self, host: HostGeneration, id: u64, answer: Bytes) {
        debug_assert!(answer.len() <= MAX_FROM_GUEST);
        self.0.lock().finish(host, id, answer);
        self.0.to_write.notify_one();
    }
}
