//! Destination: one move that arrives, owned by one task.
//!
//! ```text
//!   Fresh -> Imported -> Created -> Prepared -> Receiving -> Running -> (forgotten)
//!     \________\____:______\__________\___________/-> Aborted
//!                   `-> HalfMade -----^
//! ```
//!
//! Requests are taken one at a time. Abort cuts short whatever is being done, except Run: once
//! the machine has been asked to run, only its answer counts. A session that nobody asks about
//! ends by itself: aborted before Run; after it only its id is remembered, and that it ran.

mod owner;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::{Stream, Token};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::owner::Owner;
use crate::config::NodeConfig;
use crate::containerd::arrival::ArrivalError;
use crate::containerd::arrivals::Arrivals;
use crate::network::cni::CniError;
use crate::proto::{Nic, SandboxFacts};
use crate::shim::start::StartError;
use crate::shim::{Shim, ShimError, ShimHome};

/// Requests that may wait for one session's task.
const QUEUE: usize = 8;
/// Without a request and without a watcher for so long, a session ends by itself.
pub(crate) const ABANDONED: Duration = Duration::from_secs(120);
/// From a stream's answer on the data port to the shim's on the hand-over.
const HAND_OVER: Duration = Duration::from_secs(20);

/// Why a session did not do as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// Not now.
    #[error(
        "session {session} is {stage}, so {asked} is out of turn; `dunlin cancel` the move and begin again"
    )]
    OutOfTurn {
        /// The session.
        session: String,
        /// Its stage.
        stage: &'static str,
        /// What was asked.
        asked: &'static str,
    },
    /// An Abort cut it short.
    #[error("session {0} was aborted")]
    Aborted(String),
    /// The task is gone.
    #[error("session {0} is over; begin a new move")]
    Over(String),
    /// A pod's network namespace could not be made.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// It was made, and is not what was asked for.
    #[error("{0}")]
    Network(String),
    /// The shim could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The shim refused.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// containerd's objects could not be made.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// A stream did not reach the shim.
    #[error("the stream {stream} did not reach the shim: {reason}")]
    Stream {
        /// Which.
        stream: Stream,
        /// Why.
        reason: String,
    },
}

/// How an Abort ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Aborted {
    /// The machine does not run here and cannot start any more.
    pub(crate) stopped: bool,
    /// Why not, or what was left behind.
    pub(crate) warnings: Vec<String>,
    /// It runs here, and nothing was touched.
    pub(crate) runs: bool,
}

/// What was made in containerd.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Created {
    /// Each init's pid, in the order of the containers.
    pub(crate) pids: Vec<u32>,
    /// What became of every NIC.
    pub(crate) nics: Vec<Nic>,
}

/// Which streams reached the shim, and the first that did not.
#[derive(Debug, Clone, Default)]
struct Streams {
    adopted: BTreeSet<Stream>,
    broken: Option<(Stream, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Fresh,
    Imported,
    /// Not all tasks could be made: it can only be aborted.
    HalfMade,
    Created,
    Prepared,
    Receiving,
    /// Asked to run, without an answer that it did or did not.
    Doubtful,
    Running,
    Aborted,
}

impl Stage {
    fn word(self) -> &'static str {
        match self {
            Stage::Fresh => "fresh",
            Stage::Imported => "imported",
            Stage::HalfMade => "half made",
            Stage::Created => "created",
            Stage::Prepared => "prepared",
            Stage::Receiving => "receiving",
            Stage::Doubtful => "asked to run",
            Stage::Running => "running",
            Stage::Aborted => "aborted",
        }
    }
}

type Reply<T> = oneshot::Sender<Result<T, SessionError>>;

enum Ask {
    Import(Any, Reply<()>),
    CreateTasks(Reply<Created>),
    Prepare(u32, Reply<()>),
    Transfer(Duration, Reply<()>),
    Run(Option<Any>, Reply<()>),
    Abort(oneshot::Sender<Aborted>),
    Cleanup(Reply<Vec<String>>),
    Adopt(Stream, TcpStream),
}

/// A session's handle; the task ends when it was told Cleanup or Abort, or was abandoned.
#[derive(Debug)]
pub(crate) struct Session {
    id: String,
    from: String,
    facts: SandboxFacts,
    token: Token,
    expected: BTreeSet<Stream>,
    admitted: Mutex<BTreeSet<Stream>>,
    asks: mpsc::Sender<Ask>,
    abort: CancellationToken,
    shim: watch::Receiver<Option<Shim>>,
    stage: watch::Receiver<&'static str>,
    streams: watch::Receiver<Streams>,
    watchers: watch::Sender<usize>,
}

/// A shim that is told to stop gets so long before it is ended. The source holds its own resume
/// back for 20 s.
const POLITE: Duration = Duration::from_secs(6);

/// containerd gets so long to forget the labels of what runs here.
const SETTLE: Duration = Duration::from_secs(10);

/// What a session is made of.
pub(crate) struct Beginning {
    pub(crate) id: String,
    pub(crate) from: String,
    pub(crate) facts: SandboxFacts,
    pub(crate) token: Token,
    pub(crate) expected: BTreeSet<Stream>,
    pub(crate) config: Arc<NodeConfig>,
    pub(crate) arrivals: Arrivals,
}

impl Session {
    /// Spawns the task. `over` runs once, when it has ended.
    pub(crate) fn spawn(beginning: Beginning, over: impl FnOnce(bool) + Send + 'static) -> Arc<Session> {
        let Beginning { id, from, facts, token, expected, config, arrivals } = beginning;
        let (asks, queue) = mpsc::channel(QUEUE);
        let abort = CancellationToken::new();
        let (shim_sender, shim) = watch::channel(None);
        let (stage_sender, stage) = watch::channel(Stage::Fresh.word());
        let (streams_sender, streams) = watch::channel(Streams::default());
        let (watchers, watching) = watch::channel(0);
        let home = ShimHome::new(&config.state_dir, &facts.namespace, &facts.id);
        let cwd = config.io_dir.join(&facts.namespace).join(format!("{}.start", facts.id));
        let owner = Owner {
            id: id.clone(),
            config,
            home,
            cwd,
            arrivals,
            stage: Stage::Fresh,
            started: false,
            shim: shim_sender,
            told: stage_sender,
            abort: abort.clone(),
            streams: streams_sender,
            facts: facts.clone(),
            created: Created::default(),
        };
        tokio::spawn(async move {
            over(Box::pin(owner.run(queue, watching)).await);
        });
        Arc::new(Session {
            id,
            from,
            facts,
            token,
            expected,
            admitted: Mutex::default(),
            asks,
            abort,
            shim,
            stage,
            streams,
            watchers,
        })
    }

    pub(crate) fn from(&self) -> &str {
        &self.from
    }
    pub(crate) fn facts(&self) -> &SandboxFacts {
        &self.facts
    }
    pub(crate) fn token(&self) -> &Token {
        &self.token
    }
    pub(crate) fn stage(&self) -> &'static str {
        *self.stage.borrow()
    }

    /// Books `stream`; each comes once.
    pub(crate) fn admit(&self, stream: Stream) -> Result<(), String> {
        if !self.expected.contains(&stream) {
            return Err(format!("session {} expects no stream {stream}", self.id));
        }
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        if !admitted.insert(stream) {
            return Err(format!("session {} has its stream {stream} already", self.id));
        }
        Ok(())
    }

    /// Hands an admitted stream to the shim.
    pub(crate) async fn adopt(&self, stream: Stream, socket: TcpStream) {
        // A session that ended meanwhile drops the socket, which tells the other side.
        let _ = self.asks.send(Ask::Adopt(stream, socket)).await;
    }

    /// Waits until the shim has `stream`.
    pub(crate) async fn await_stream(&self, stream: Stream) -> Result<(), SessionError> {
        let mut streams = self.streams.clone();
        let arrived =
            streams.wait_for(|streams| streams.adopted.contains(&stream) || streams.broken.is_some());
        let failed = |stream, reason| SessionError::Stream { stream, reason };
        match tokio::time::timeout(HAND_OVER, arrived).await {
            Ok(Ok(streams)) => match &streams.broken {
                Some((stream, reason)) => Err(failed(*stream, reason.clone())),
                None => Ok(()),
            },
            Ok(Err(_)) => Err(SessionError::Over(self.id.clone())),
            Err(_) => Err(failed(stream, format!("nothing within {} s", HAND_OVER.as_secs()))),
        }
    }

    pub(crate) async fn import(&self, config: Any) -> Result<(), SessionError> {
        self.ask(|reply| Ask::Import(config, reply)).await
    }
    pub(crate) async fn create_tasks(&self) -> Result<Created, SessionError> {
        self.ask(Ask::CreateTasks).await
    }
    pub(crate) async fn prepare(&self, downtime_limit_ms: u32) -> Result<(), SessionError> {
        self.ask(|reply| Ask::Prepare(downtime_limit_ms, reply)).await
    }
    pub(crate) async fn transfer(&self, timeout: Duration) -> Result<(), SessionError> {
        self.ask(|reply| Ask::Transfer(timeout, reply)).await
    }
    pub(crate) async fn run(&self, handoff: Option<Any>) -> Result<(), SessionError> {
        self.ask(|reply| Ask::Run(handoff, reply)).await
    }
    /// Answers what was not done though it runs.
    pub(crate) async fn cleanup(&self) -> Result<Vec<String>, SessionError> {
        self.ask(Ask::Cleanup).await
    }

    /// Removes everything made. A session whose task is gone is answered from what it left.
    pub(crate) async fn abort(&self) -> Option<Aborted> {
        self.abort.cancel();
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Abort(reply)).await.ok()?;
        answer.await.ok()
    }

    /// The shim, once imported, for a watcher; the guard keeps the session from being abandoned.
    pub(crate) fn watch(self: &Arc<Session>) -> Result<(Shim, Watching), SessionError> {
        let shim = self.shim.borrow().clone().ok_or_else(|| SessionError::OutOfTurn {
            session: self.id.clone(),
            stage: self.stage(),
            asked: "Watch",
        })?;
        self.watchers.send_modify(|count| *count += 1);
        Ok((shim, Watching(Arc::clone(self))))
    }

    async fn ask<T>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, SessionError> {
        let over = || SessionError::Over(self.id.clone());
        let (reply, answer) = oneshot::channel();
        self.asks.send(ask(reply)).await.map_err(|_| over())?;
        answer.await.map_err(|_| over())?
    }
}

/// Somebody watches the session.
#[derive(Debug)]
pub(crate) struct Watching(Arc<Session>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watchers.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests;
