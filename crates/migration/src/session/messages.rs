//! What a session is told and what it answers.

use std::collections::BTreeSet;
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{ContainerId, Epoch, GuestPid, SandboxId, SessionId, Slot};
use dunlin_wire::service;

use super::Side;
use crate::Moment;
use crate::notice::{Notice, PhaseState, Progress};
use crate::refusal::Refusal;

/// Names one call until its [`Effect::Reply`]. The shim keeps under it what a session has no
/// use for: init options, the OCI spec, the socket itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// Which side runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// This side does not.
    Stop,
    /// This side does.
    Resume,
}

impl Action {
    /// Reads the service's number; UNSPECIFIED and unknown ones are refused.
    pub fn from_wire(number: i32) -> Result<Action, Refusal> {
        if number == service::FinalizeAction::FINALIZE_ACTION_STOP as i32 {
            Ok(Action::Stop)
        } else if number == service::FinalizeAction::FINALIZE_ACTION_RESUME as i32 {
            Ok(Action::Resume)
        } else {
            Err(Refusal::invalid(format!(
                "action: {number} is neither STOP nor RESUME; say which side runs on"
            )))
        }
    }
}

/// One call of the service, or containerd's Task.Create with the migration annotation.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// Source: freeze, save, answer with [`Answer::Exported`].
    PrepareAndExport {
        /// Begins this session.
        session: SessionId,
    },
    /// Destination: take in, inert.
    Import {
        /// Begins this session.
        session: SessionId,
        /// The sandbox's id on this host.
        sandbox: SandboxId,
        /// What the source exported.
        config: Any,
    },
    /// Destination: an imported container gets its container of this host's containerd; answered with [`Answer::Patched`].
    PatchContainer {
        /// Its id on the source (the annotation).
        source: ContainerId,
        /// Its id on this host.
        container: ContainerId,
    },
    /// Destination: make the machine that receives.
    PrepareSandbox {
        /// Of this session.
        session: SessionId,
    },
    /// A connected socket for one stream.
    AdoptSocket {
        /// Of this session.
        session: SessionId,
        /// What it carries.
        stream: Stream,
    },
    /// Begin to move; answered at once.
    Transfer {
        /// Of this session.
        session: SessionId,
        /// Bounds the wait for the sockets; zero: [`super::Limits::sockets`].
        timeout: Duration,
    },
    /// Decide.
    Finalize {
        /// Of this session.
        session: SessionId,
        /// Which way.
        action: Action,
        /// The caller vouches that the destination is stopped and cannot run.
        destination_stopped: bool,
        /// RESUME of a destination: what the source's DONE carried, unopened. Elsewhere it is ignored.
        handoff: Option<Any>,
    },
    /// Stop moving.
    Cancel {
        /// Of this session.
        session: SessionId,
    },
    /// Forget the session.
    Cleanup {
        /// Of this session; any when there is none.
        session: SessionId,
    },
    /// May this caller subscribe?
    Notifications {
        /// Of this session.
        session: SessionId,
    },
}

/// What went in on the source.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// The sealed `migration` payload.
    pub config: Any,
    /// The sandbox's configuration, for whoever makes it anew elsewhere; passed on unopened.
    pub sandbox_state: Option<Any>,
    /// Its writable disks: each needs a stream.
    pub disks: BTreeSet<Slot>,
}

/// What came in on the destination.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Imported {
    /// Containers that wait for their patch, by their ids on the source.
    pub containers: BTreeSet<ContainerId>,
    /// Writable disks: each needs a stream.
    pub disks: BTreeSet<Slot>,
}

/// Why a transfer ended without completing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferFault {
    /// What subscribers are told; never [`PhaseState::Success`].
    pub state: PhaseState,
    /// Thing, reason, way out.
    pub message: String,
}

/// How a piece of work ended. Each is told once, with the epoch of its effect.
#[derive(Debug, Clone, PartialEq)]
pub enum Completion {
    /// Of [`Effect::InitializeSource`].
    VmInitialized(Result<(), Refusal>),
    /// Of [`Effect::Save`].
    Saved(Result<Saved, Refusal>),
    /// Of [`Effect::Import`].
    Imported(Result<Imported, Refusal>),
    /// Of [`Effect::Patch`].
    ContainerPatched {
        /// Its id on the source.
        source: ContainerId,
        /// The init's pid in the guest.
        result: Result<GuestPid, Refusal>,
    },
    /// Of [`Effect::CreateDestinationVm`].
    VmCreated(Result<(), Refusal>),
    /// Of [`Effect::AdoptSocket`].
    SocketAdopted {
        /// Which.
        stream: Stream,
        /// A socket that is not connected is [`crate::refusal::Code::FailedPrecondition`].
        result: Result<(), Refusal>,
    },
    /// Any number of times after [`Effect::StartTransfer`].
    TransferProgressed(Progress),
    /// Source: the guest is paused for the switchover.
    BlackoutStarted {
        /// For so long already, by the VMM's own word.
        already: Duration,
    },
    /// Of [`Effect::StartTransfer`].
    TransferCompleted {
        /// The last reading.
        progress: Progress,
        /// Source: where the standard streams stood at the pause, unopened.
        handoff: Option<Any>,
    },
    /// Of [`Effect::StartTransfer`]. The machine is still here, or gone for good.
    TransferFailed(TransferFault),
    /// Of [`Effect::StartTransfer`] on a source: it failed and could not be undone for certain, so the machine may have
    /// left all the same.
    TransferInDoubt(TransferFault),
    /// Of [`Effect::CancelTransfer`].
    CancelDone(Result<Cancelled, Refusal>),
    /// Of [`Effect::ResumeSource`] and [`Effect::RunDestination`].
    Resumed(Result<(), Refusal>),
    /// Of [`Effect::StopVm`]. Ok: the VMM's process is gone.
    Stopped(Result<(), Refusal>),
}

/// What a cancellation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// In time. On a destination the receiving VMM's process is gone.
    InTime,
    /// The transfer had already completed; nothing was undone.
    AlreadyCompleted,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A call arrived.
    Call(CallId, Call),
    /// A piece of work ended.
    Done(Epoch, Completion),
    /// The VMM's process exited, whatever the reason.
    VmExited,
    /// The moment of the last [`Effect::WakeAt`] is here.
    Tick,
}

/// A call's good answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// An empty response.
    Empty,
    /// To PrepareAndExport.
    Exported {
        /// [`Saved::config`].
        config: Any,
        /// [`Saved::sandbox_state`].
        sandbox_state: Option<Any>,
    },
    /// To PatchContainer.
    Patched(GuestPid),
}

/// What the shim does now. Work that ends in a [`Completion`] runs as a task; the rest is done
/// in place. Effects of one step are begun in their order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Answer this call.
    Reply(CallId, Result<Answer, Refusal>),
    /// Check that the machine can move, freeze the sandbox's configuration.
    InitializeSource {
        /// For the completion.
        epoch: Epoch,
        /// Where the init options are.
        call: CallId,
    },
    /// Save every controller. Validates all before it freezes any.
    Save {
        /// For the completion.
        epoch: Epoch,
    },
    /// Open and check the whole tree, all or nothing; reserve nothing of the host.
    Import {
        /// For the completion.
        epoch: Epoch,
        /// Whose request it is.
        call: CallId,
        /// The sandbox's id on this host.
        sandbox: SandboxId,
        /// The envelope.
        config: Any,
    },
    /// Point one imported container at this host's paths and ids.
    Patch {
        /// For the completion.
        epoch: Epoch,
        /// Where the request is.
        call: CallId,
        /// Its id on the source.
        source: ContainerId,
        /// Its id on this host.
        container: ContainerId,
    },
    /// Make the machine that receives, paused.
    CreateDestinationVm {
        /// For the completion.
        epoch: Epoch,
        /// Where the init options are.
        call: CallId,
    },
    /// Take the socket over.
    AdoptSocket {
        /// For the completion.
        epoch: Epoch,
        /// Where the request is.
        call: CallId,
        /// What it carries.
        stream: Stream,
    },
    /// Move: every stream is here.
    StartTransfer {
        /// For the completions.
        epoch: Epoch,
        /// Sends or receives.
        side: Side,
    },
    /// Stop moving. Also when nothing moves yet: then it is [`Cancelled::InTime`] at once. On a
    /// destination whose transfer is not complete the VMM is killed.
    CancelTransfer {
        /// For the completion.
        epoch: Epoch,
        /// Which side.
        side: Side,
    },
    /// Let the source's guest and its API go on. May come again after a failure: what is done stays done.
    ResumeSource {
        /// For the completion.
        epoch: Epoch,
        /// The guest was paused: its bridge and its streams must be accepted anew.
        rebuild: bool,
    },
    /// Let the destination's guest run. May come again after a failure.
    RunDestination {
        /// For the completion.
        epoch: Epoch,
        /// As given to this call.
        handoff: Option<Any>,
    },
    /// End the VMM and see it gone.
    StopVm {
        /// For the completion.
        epoch: Epoch,
        /// Which side.
        side: Side,
    },
    /// Destination: whatever was imported never runs here: containers exit with 137, their
    /// waiters wake. Repeats do nothing.
    AbortMigrated {
        /// Whose import.
        epoch: Epoch,
    },
    /// Close this epoch's sockets. Repeats do nothing.
    CloseSockets {
        /// Whose sockets.
        epoch: Epoch,
    },
    /// Source: undo the freeze of InitializeSource and Save; exits are reported again, those of a machine that is gone too.
    /// Repeats do nothing.
    Thaw {
        /// Whose freeze.
        epoch: Epoch,
    },
    /// Tell the subscribers.
    Notify {
        /// Of this session.
        epoch: Epoch,
        /// What.
        notice: Notice,
    },
    /// End the subscribers' streams cleanly and forget the latest notice.
    EndNotifications {
        /// Of this session.
        epoch: Epoch,
    },
    /// Send [`Event::Tick`] then. Replaces the one before.
    WakeAt(Moment),
}
