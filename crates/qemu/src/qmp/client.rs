//! The client: who waits for which answer.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::timeout;

use super::error::{CommandError, QmpError};
use super::frame::{MAX_LINE, next_line};
use super::message::{Incoming, RawEvent, parse};
use super::send::{Outgoing, send};

/// Commands on their way to the socket.
const OUTGOING_BOUND: usize = 32;
/// Events that a subscriber may be behind before it loses the oldest. A whole migration makes about a hundred.
const EVENT_BOUND: usize = 1024;
/// A command that has no deadline of its own gets this one.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// A connection to one QEMU monitor. Clones share it; it closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct QmpClient {
    outgoing: mpsc::Sender<Outgoing>,
    state: Arc<State>,
}

/// Shared by the callers and the two tasks; the lock is held for map operations only.
#[derive(Debug)]
struct State {
    next_id: AtomicU64,
    calls: Mutex<Calls>,
}

#[derive(Debug)]
enum Calls {
    Open { waiting: HashMap<u64, oneshot::Sender<Answer>>, events: broadcast::Sender<RawEvent> },
    Closed { reason: Arc<str> },
}

/// A refusal's command is known to the waiting caller, so the reader leaves it empty.
type Answer = Result<Value, QmpError>;

impl QmpClient {
    /// Connects, checks the greeting and leaves capability negotiation. All within `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<QmpClient, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|reason| QmpError::Connect { path: path.to_owned(), reason: Arc::new(reason) })?;
        QmpClient::negotiate(stream, deadline).await
    }

    /// The same over a stream that is connected already.
    pub async fn negotiate(stream: UnixStream, deadline: Duration) -> Result<QmpClient, QmpError> {
        let (read_half, write_half) = stream.into_split();
        let mut reader = BufReader::new(read_half);
        let greeting = timeout(deadline, next_line(&mut reader, MAX_LINE))
            .await
            .map_err(|_| QmpError::Timeout { command: "greeting".to_owned(), after: deadline })?
            .map_err(|error| QmpError::Greeting { reason: error.to_string() })?
            .ok_or_else(|| QmpError::Greeting { reason: "the stream ended at once".to_owned() })?;
        match parse(&greeting) {
            Ok(Incoming::Greeting) => {}
            Ok(other) => return Err(QmpError::Greeting { reason: format!("{other:?}") }),
            Err(reason) => return Err(QmpError::Greeting { reason }),
        }

        let (outgoing, commands) = mpsc::channel(OUTGOING_BOUND);
        let (events, _) = broadcast::channel(EVENT_BOUND);
        let state = Arc::new(State {
            next_id: AtomicU64::new(1),
            calls: Mutex::new(Calls::Open { waiting: HashMap::new(), events }),
        });
        // Neither task holds a sender: when the last client goes the writer ends, its half closes, QEMU hangs up, the reader ends.
        tokio::spawn(write_commands(write_half, commands, Arc::clone(&state)));
        tokio::spawn(read_lines(reader, Arc::clone(&state)));
        let client = QmpClient { outgoing, state };
        client.execute_within("qmp_capabilities", json!({}), deadline).await?;
        Ok(client)
    }

    /// Runs one command within 10 s; the answer's `return` member.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, DEFAULT_DEADLINE).await
    }

    /// Runs one command. After `deadline` the answer is no longer waited for, but QEMU may still give effect to it.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, None, deadline).await
    }

    /// Gives QEMU a file descriptor under a name (`getfd`), for one later command that names it.
    pub async fn pass_fd(&self, name: &str, fd: OwnedFd) -> Result<(), QmpError> {
        self.run("getfd", json!({ "fdname": name }), Some(fd), DEFAULT_DEADLINE).await.map(drop)
    }

    /// Takes back a descriptor that no command consumed; its failure means only that there was none.
    pub async fn forget_fd(&self, name: &str) {
        if let Err(error) = self.execute("closefd", json!({ "fdname": name })).await {
            tracing::debug!(%error, name, "closefd");
        }
    }

    /// Events from now on. The stream of a closed connection ends at once.
    pub fn events(&self) -> broadcast::Receiver<RawEvent> {
        match &*self.state.lock() {
            Calls::Open { events, .. } => events.subscribe(),
            Calls::Closed { .. } => broadcast::channel(1).1,
        }
    }

    async fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.state.next_id.fetch_add(1, Ordering::Relaxed);
        let line = json!({ "execute": command, "arguments": arguments, "id": id });
        let mut bytes = line.to_string().into_bytes();
        bytes.push(b'\n');
        let (answer, waiting) = self.state.expect_answer(id)?;
        let exchange = async {
            // A writer that is gone has failed all waiting calls, so the answer below tells why.
            let _ = self.outgoing.send(Outgoing { bytes, fd }).await;
            answer.await
        };
        let answer = timeout(deadline, exchange).await;
        drop(waiting);
        match answer {
            Ok(Ok(Err(QmpError::Refused(refusal)))) => {
                Err(CommandError { command: command.to_owned(), ..refusal }.into())
            }
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(self.state.closed_error()),
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), after: deadline }),
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect_answer(&self, id: u64) -> Result<(oneshot::Receiver<Answer>, Waiting<'_>), QmpError> {
        match &mut *self.lock() {
            Calls::Open { waiting, .. } => {
                let (sender, receiver) = oneshot::channel();
                waiting.insert(id, sender);
                Ok((receiver, Waiting { state: self, id }))
            }
            Calls::Closed { reason } => Err(QmpError::Closed { reason: Arc::clone(reason) }),
        }
    }

    fn closed_error(&self) -> QmpError {
        match &*self.lock() {
            Calls::Closed { reason } => QmpError::Closed { reason: Arc::clone(reason) },
            Calls::Open { .. } => QmpError::Closed { reason: "the answer was dropped".into() },
        }
    }

    fn take_in(&self, incoming: Incoming) -> Result<(), String> {
        let mut calls = self.lock();
        let Calls::Open { waiting, events } = &mut *calls else { return Ok(()) };
        match incoming {
            Incoming::Greeting => return Err("a second greeting".to_owned()),
            // Nobody may be subscribed, and that is fine.
            Incoming::Event(event) => drop(events.send(event)),
            Incoming::Reply { id, result } => {
                let answer = result.map_err(|refusal| {
                    CommandError { command: String::new(), class: refusal.class, desc: refusal.desc }.into()
                });
                match waiting.remove(&id) {
                    Some(caller) => drop(caller.send(answer)),
                    None => tracing::debug!(id, "answer to a command that is no longer waited for"),
                }
            }
        }
        Ok(())
    }

    /// The first reason stays; every open call and every event stream ends.
    fn close(&self, reason: &str) {
        let mut calls = self.lock();
        if matches!(&*calls, Calls::Closed { .. }) {
            return;
        }
        let reason: Arc<str> = reason.into();
        let before = std::mem::replace(&mut *calls, Calls::Closed { reason: Arc::clone(&reason) });
        drop(calls);
        if let Calls::Open { waiting, .. } = before {
            for caller in waiting.into_values() {
                drop(caller.send(Err(QmpError::Closed { reason: Arc::clone(&reason) })));
            }
        }
    }
}

/// Takes a call out of the map when its caller stops waiting, for whatever reason.
struct Waiting<'a> {
    state: &'a State,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Calls::Open { waiting, .. } = &mut *self.state.lock() {
            waiting.remove(&self.id);
        }
    }
}

async fn write_commands(half: OwnedWriteHalf, mut commands: mpsc::Receiver<Outgoing>, state: Arc<State>) {
    while let Some(outgoing) = commands.recv().await {
        if let Err(error) = send(&half, &outgoing).await {
            state.close(&format!("writing failed: {error}"));
            return;
        }
    }
}

async fn read_lines(mut reader: BufReader<OwnedReadHalf>, state: Arc<State>) {
    let reason = loop {
        let line = match next_line(&mut reader, MAX_LINE).await {
            Ok(Some(line)) => line,
            Ok(None) => break "QEMU hung up".to_owned(),
            Err(error) => break error.to_string(),
        };
        if let Err(reason) = parse(&line).and_then(|incoming| state.take_in(incoming)) {
            break format!("QEMU broke the protocol: {reason}");
        }
    };
    tracing::debug!(reason, "QMP connection ended");
    state.close(&reason);
}
