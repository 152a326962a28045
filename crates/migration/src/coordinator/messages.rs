//! What the coordinator is told and what it answers.

use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::ids::Slot;

use crate::Moment;
use crate::notice::Notice;

/// Names one piece of work until it ends. Work that its deadline overtook is forgotten: a late
/// end of it is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// Where the move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not begun.
    Planned,
    /// Both hosts are asked whether the move can be made.
    Preflight,
    /// Source: freeze and save.
    Export,
    /// Destination: take in.
    Import,
    /// Destination: containerd's objects, each patched.
    CreateTasks,
    /// Destination: the machine that receives.
    Prepare,
    /// The streams between the shims.
    Connect,
    /// Disks and memory.
    Transfer,
    /// The decision is being recorded; from here on there is no cancelling.
    Commit,
    /// Destination: run.
    Run,
    /// Source: tear down.
    StopSource,
    /// Both: forget the session; the source's containerd objects go.
    CleanUp,
    /// The pod runs on the destination.
    Done,
    /// On the way back to the source.
    Aborting,
    /// The pod runs on the source as before.
    RolledBack,
    /// Neither could be brought about: the report's cause says what is left to do.
    Failed,
}

impl Phase {
    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Done | Phase::RolledBack | Phase::Failed)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// One piece of work. The executor runs each as a task of its own and tells its end with
/// [`Event::StepDone`] or [`Event::StepFailed`]; all are safe to repeat.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Compare the hosts. Changes nothing.
    Preflight,
    /// Source shim: PrepareAndExportSandbox. Ends in [`Outcome::Exported`].
    SourceExport,
    /// Destination: start a shim, ImportSandbox.
    DestinationImport {
        /// What the source exported, unopened.
        config: Any,
    },
    /// Destination: snapshot, container and Task.Create for each container.
    DestinationCreateTasks,
    /// Destination shim: PrepareSandbox.
    DestinationPrepare,
    /// Subscribe to both shims' notifications, then dial one stream for each disk and, last, memory,
    /// and hand both ends over.
    ConnectStreams {
        /// The writable disks.
        disks: Vec<Slot>,
    },
    /// Source shim: TransferSandbox. Ends when the call is answered.
    SourceTransfer,
    /// Destination shim: TransferSandbox. Ends when the call is answered.
    DestinationTransfer,
    /// Make this record durable. Nothing that depends on it is begun before it ends well.
    Record(Record),
    /// Destination shim: FinalizeSandbox(RESUME). Ends well only when the guest runs.
    DestinationRun {
        /// To pass on: what the source's DONE carried.
        handoff: Option<Any>,
    },
    /// Source shim: FinalizeSandbox(STOP).
    SourceStop,
    /// Source: remove containers and tasks, without a false exit; the shim ends.
    SourceRemoveContainerdObjects,
    /// Source shim: Cleanup.
    SourceCleanup,
    /// Destination shim: Cleanup.
    DestinationCleanup,
    /// Destination: Cancel, FinalizeSandbox(STOP), remove its containerd objects, Cleanup, end the shim. Ends
    /// well only when it is certain that this move's guest does not run there and never will. When the
    /// guest already runs, it must end in [`FailureKind::Runs`] and remove nothing.
    DestinationAbort,
    /// Source shim: Cancel. "Already complete" is a good end.
    SourceCancel,
    /// Source shim: FinalizeSandbox(RESUME).
    SourceResume {
        /// To pass on. True only when the destination cannot run.
        destination_stopped: bool,
    },
}

impl Work {
    /// A name for people and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Work::Preflight => "preflight",
            Work::SourceExport => "export on the source",
            Work::DestinationImport { .. } => "import on the destination",
            Work::DestinationCreateTasks => "create the destination's tasks",
            Work::DestinationPrepare => "prepare the destination's machine",
            Work::ConnectStreams { .. } => "connect the streams",
            Work::SourceTransfer => "begin the source's transfer",
            Work::DestinationTransfer => "begin the destination's transfer",
            Work::Record(_) => "record the decision",
            Work::DestinationRun { .. } => "run on the destination",
            Work::SourceStop => "stop the source",
            Work::SourceRemoveContainerdObjects => "remove the source's containers",
            Work::SourceCleanup => "clean up the source",
            Work::DestinationCleanup => "clean up the destination",
            Work::DestinationAbort => "abort on the destination",
            Work::SourceCancel => "cancel on the source",
            Work::SourceResume { .. } => "resume the source",
        }
    }
}

/// What is made durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The one point of no return: from here on the destination may run, and the source only when the
    /// destination is confirmed stopped.
    Committed {
        /// For [`Work::DestinationRun`], by whoever goes on from the record: nobody else has it.
        handoff: Option<Any>,
    },
}

/// How a piece of work ended well.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Nothing to tell.
    Done,
    /// Of [`Work::SourceExport`].
    Exported {
        /// The sealed `migration` payload.
        config: Any,
        /// Its disks that are copied: `SavedTree::mirrored_slots`.
        disks: Vec<Slot>,
    },
}

/// What a failed piece of work allows one to conclude.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// Answered with "no", or failed here: it was not done.
    Refused,
    /// The shim is there, has no such session and runs no guest: nothing of this move is in it. Of a
    /// destination whose guest runs without a session, say [`FailureKind::Runs`].
    NoSession,
    /// No answer: it may have been done, or be done later.
    Silent,
    /// It is certain that the machine it was about does not exist any more.
    Gone,
    /// Of [`Work::DestinationAbort`]: the guest already runs on the destination.
    Runs,
}

/// A piece of work failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What may be concluded.
    pub kind: FailureKind,
    /// Thing, reason, way out.
    pub message: String,
}

impl Failure {
    /// A failure with its kind.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into() }
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Begin. Repeats do nothing.
    Start,
    /// A piece of work ended well.
    StepDone(StepId, Outcome),
    /// A piece of work failed.
    StepFailed(StepId, Failure),
    /// The source's shim told something.
    SourceNotification(Notice),
    /// The destination's shim told something.
    DestinationNotification(Notice),
    /// The destination's node cannot be reached.
    PeerLost(String),
    /// A person or a signal wants the move undone. Answered with [`Effect::CancelAnswer`].
    Cancel,
    /// Somebody who knows (an operator, a fence) says that the destination's guest does not run and
    /// never will.
    DestinationConfirmedStopped,
    /// The moment of the last [`Effect::WakeAt`] is here.
    Tick,
}

/// Why a Cancel is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancel: the move is decided (phase {phase}); let it end, then move the pod back")]
pub struct TooLate {
    /// Where the move is.
    pub phase: Phase,
}

/// What the executor does now, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Run as a task; tell its end.
    Begin(StepId, Work),
    /// Its deadline has passed or it is needed no more: the task may be dropped. Its end is not waited for.
    Abandon(StepId),
    /// Show this; the last one has a final phase, after which there are no more effects.
    Report(Report),
    /// Answer to the last [`Event::Cancel`]. Ok: it is being undone.
    CancelAnswer(Result<(), TooLate>),
    /// Send [`Event::Tick`] then. Replaces the one before.
    WakeAt(Moment),
}

/// Why a move did not end on the destination, or was troubled on its way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Asked for.
    #[error("cancelled in phase {phase}")]
    Cancelled {
        /// Where the move was.
        phase: Phase,
    },
    /// A piece of work failed.
    #[error("{work}: {message}")]
    StepFailed {
        /// [`Work::name`].
        work: &'static str,
        /// What may be concluded.
        kind: FailureKind,
        /// Thing, reason, way out.
        message: String,
    },
    /// A piece of work did not end in time.
    #[error("{work}: no end within {limit:?}; look at that host's log, then try again")]
    StepOverdue {
        /// [`Work::name`].
        work: &'static str,
        /// Its deadline.
        limit: Duration,
    },
    /// The source's shim told of a failure.
    #[error("transfer failed on the source: {message}")]
    SourceFailed {
        /// As told.
        message: String,
    },
    /// The destination's shim told of a failure.
    #[error("transfer failed on the destination: {message}")]
    DestinationFailed {
        /// As told.
        message: String,
    },
    /// Nothing moved for too long.
    #[error("transfer: no progress for {limit:?}; look at the network between the hosts, then try again")]
    Stalled {
        /// [`super::Deadlines::stall`].
        limit: Duration,
    },
    /// It took too long as a whole.
    #[error("transfer: not complete within {limit:?}; allow more time, or move when the guest writes less")]
    TransferOverdue {
        /// [`super::Deadlines::transfer`].
        limit: Duration,
    },
    /// The guest was paused for too long.
    #[error("transfer: the guest was paused for more than {limit:?} and goes on at the source; try again")]
    BlackoutOverdue {
        /// [`super::Deadlines::blackout`].
        limit: Duration,
    },
    /// The destination's node is away.
    #[error("destination lost: {message}")]
    PeerLost {
        /// As told.
        message: String,
    },
    /// The executor answered with an outcome that is not the work's.
    #[error("{work}: ended with an outcome of other work; this is a defect of this program")]
    WrongOutcome {
        /// [`Work::name`].
        work: &'static str,
    },
}

/// How the move stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Where it is.
    pub phase: Phase,
    /// Since its start.
    pub total: Duration,
    /// Upper bound of the guest's pause: what the source's BLACKOUT_STARTED says that it has lasted already, and on this
    /// node's clock from hearing that to the end of the work that made a guest run again. No two hosts' clocks are compared.
    pub blackout: Option<Duration>,
    /// Guest memory sent, repeats included, bytes.
    pub memory_bytes: u64,
    /// Guest memory still to send, bytes.
    pub memory_remaining: u64,
    /// Disk contents sent, bytes.
    pub disk_bytes: u64,
    /// Passes over guest memory.
    pub passes: u64,
    /// Why it turned back, or the last trouble.
    pub cause: Option<Cause>,
    /// What could not be cleaned up, and how to.
    pub leftovers: Vec<String>,
}
