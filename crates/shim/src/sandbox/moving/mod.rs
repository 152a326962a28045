//! Carries out a migration session's effects.
//!
//! ```text
//!  service::migration --calls--> Mover --> driver: Session::step(now, event) -> effects
//!                                             ^                             |
//!                                             +-- completions -- tasks <----+
//! ```
//!
//! The driver task alone steps the session. Work runs in tasks that answer with a completion under
//! their effect's epoch; a late answer of an earlier session is the session's to ignore.

mod destination;
mod disk_stream;
mod driver;
pub(crate) mod notices;
pub(crate) mod options;
mod sending;
pub(crate) mod socket;
mod source;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dunlin_migration::refusal::{Code as RefusalCode, Refusal};
use dunlin_migration::session::{Answer, Call, Completion, Event, Limits, Session, Side, StateId, TaskCall};
use dunlin_wire::ids::{Epoch, SessionId};
use dunlin_wire::service::InitializeOptions;
use tokio::sync::{mpsc, oneshot};

use super::Sandbox;
use super::create::NewTask;
use super::error::{Code, SandboxError};
use super::exits::Gate;
use crate::hold::Hold;
use driver::Transfer;
pub(super) use driver::spawn;
use notices::{Hub, Subscription};

/// What comes with a call and is not the session's business.
#[derive(Debug)]
pub(crate) enum Request {
    None,
    Options(Option<InitializeOptions>),
    Patch(Box<NewTask>),
    /// Where this host's node serves images; empty: nowhere.
    Images(String),
    Socket(Result<OwnedFd, Refusal>),
    /// After which notice, and who waits for it.
    Subscribe(Option<u32>, oneshot::Sender<Subscription>),
}

type Reply = oneshot::Sender<Result<Answer, Refusal>>;

/// What reaches the driver.
#[derive(Debug)]
pub(crate) enum Input {
    Call(Call, Request, Reply),
    Event(Event),
}

/// The handle on the driver.
#[derive(Debug)]
pub(crate) struct Mover {
    inputs: mpsc::UnboundedSender<Input>,
    /// Stepped by the driver alone; read by whoever must know what a move allows.
    session: Mutex<Session>,
    hub: Hub,
}

impl Mover {
    pub(crate) fn new() -> (Mover, mpsc::UnboundedReceiver<Input>) {
        // Unbounded, but every input is a call that waits for its answer or the end of a task.
        let (inputs, receiver) = mpsc::unbounded_channel();
        (
            Mover { inputs, session: Mutex::new(Session::new(Limits::default())), hub: Hub::default() },
            receiver,
        )
    }

    /// Asks the session.
    pub(crate) async fn call(&self, call: Call, request: Request) -> Result<Answer, Refusal> {
        let (reply, answer) = oneshot::channel();
        let gone = || Refusal::unknown("the shim is shutting down; nothing was done");
        self.inputs.send(Input::Call(call, request, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Whether a Task call is possible at this point of a move.
    pub(crate) fn gate(&self, call: TaskCall) -> Result<(), SandboxError> {
        self.session().gate(call).map_err(SandboxError::from)
    }

    /// The move that there is: its session, where it stands, and which end this is.
    pub(crate) fn standing(&self) -> Option<(String, StateId, Side)> {
        let session = self.session();
        let (id, _, side) = session.active()?;
        Some((id.to_string(), session.view().id(), side))
    }

    /// Its tasks run on another host, or may: what becomes of the machine here is no end of theirs.
    pub(crate) fn left(&self) -> bool {
        self.session().left()
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The notices of `session` after the id `after`; without it from the latest on. Possible in each of its states.
    pub(crate) async fn subscribe(
        &self,
        session: SessionId,
        after: Option<u32>,
    ) -> Result<Subscription, Refusal> {
        let (sender, subscription) = oneshot::channel();
        self.call(Call::Notifications { session }, Request::Subscribe(after, sender)).await?;
        subscription
            .await
            .map_err(|_| Refusal::unknown("the shim is shutting down; nothing is told any more"))
    }

    pub(crate) fn machine_exited(&self, report: String) {
        tracing::debug!(report, "the session learns that QEMU ended");
        let _ = self.inputs.send(Input::Event(Event::VmExited));
    }

    fn done(&self, epoch: Epoch, completion: Completion) {
        let _ = self.inputs.send(Input::Event(Event::Done(epoch, completion)));
    }
}

impl From<Refusal> for SandboxError {
    fn from(refusal: Refusal) -> SandboxError {
        let code = match refusal.code {
            RefusalCode::Canceled => Code::Cancelled,
            RefusalCode::Unknown => Code::Unknown,
            RefusalCode::InvalidArgument => Code::InvalidArgument,
            RefusalCode::DeadlineExceeded => Code::DeadlineExceeded,
            RefusalCode::NotFound => Code::NotFound,
            RefusalCode::AlreadyExists => Code::AlreadyExists,
            RefusalCode::FailedPrecondition => Code::FailedPrecondition,
            RefusalCode::Unimplemented => Code::Unimplemented,
        };
        SandboxError::Migration { code, message: refusal.message }
    }
}

/// A sandbox's error as a session's refusal, class kept.
pub(crate) fn refusal(error: &SandboxError) -> Refusal {
    let code = match error.code() {
        Code::InvalidArgument => RefusalCode::InvalidArgument,
        Code::NotFound => RefusalCode::NotFound,
        Code::AlreadyExists => RefusalCode::AlreadyExists,
        Code::FailedPrecondition | Code::Unavailable => RefusalCode::FailedPrecondition,
        Code::DeadlineExceeded => RefusalCode::DeadlineExceeded,
        Code::Cancelled => RefusalCode::Canceled,
        Code::Unimplemented => RefusalCode::Unimplemented,
        Code::Unknown => RefusalCode::Unknown,
    };
    Refusal::new(code, error.to_string())
}

impl Sandbox {
    /// Task.Create with the migration annotation: the session says whether it is time.
    pub(crate) async fn patch(self: &Arc<Self>, task: NewTask, source: String) -> Result<u32, SandboxError> {
        let ids = || {
            Ok::<_, Refusal>(Call::PatchContainer {
                source: dunlin_wire::ids::ContainerId::new(source)?,
                container: dunlin_wire::ids::ContainerId::new(task.id.clone())?,
            })
        };
        match self.mover.call(ids()?, Request::Patch(Box::new(task))).await? {
            Answer::Patched(pid) => Ok(pid.0),
            Answer::Empty | Answer::Exported { .. } => Ok(0),
        }
    }

    /// Lets the streams and the API go on as before the move. Repeats do nothing.
    pub(crate) fn thaw(&self) {
        self.release_streams();
        self.inner().thaw();
        self.take_back_shared();
        self.free_ties();
        self.gate.send_if_modified(|gate| {
            let held = *gate == Gate::Held;
            if held {
                *gate = Gate::Open;
            }
            held
        });
    }
}

impl super::Inner {
    /// Every controller that was saved is free again.
    fn thaw(&mut self) {
        self.blackout = false;
        if self.scsi.hold == Hold::Source {
            self.scsi.resume();
        }
        for pod in self.pods.values_mut().filter(|pod| pod.hold == Hold::Source) {
            pod.hold = Hold::Free;
            // Nothing of a source's network is made anew.
            let _ = pod.network.resume();
        }
        for container in self.containers.values_mut().filter(|container| container.hold == Hold::Source) {
            container.hold = Hold::Free;
        }
    }
}
