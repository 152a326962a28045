//! May this be asked now? The table of the service, in one place; its cells are in `table_tests`.
//!
//! Differences from the service's other implementation, each deliberate:
//!
//! Session
//! * An empty session id is refused everywhere, and so is any id without a session, except by Cleanup.
//! * Notifications are possible from a session's begin to its Cleanup, in every state.
//! * PrepareAndExport ends a session that RESUME has decided, as its Cleanup would: an orchestrator that died before it
//!   must not keep the machine here for ever.
//! * An end of work carries the epoch of its session; a late one changes nothing in the next session, and what it made
//!   is given up.
//!
//! Containers and sockets
//! * An annotated Create for a container that was not imported is NotFound, for an id that is taken AlreadyExists.
//! * There is a socket for each writable disk and one for memory: only the last of them makes SocketReady, a second one for
//!   the same stream is AlreadyExists in every state that knows the first, one for an unknown disk is InvalidArgument.
//!
//! Finalize
//! * A source whose transfer completed, or may have, resumes only with `destination_stopped`.
//! * A destination whose transfer did not complete never resumes, neither from Cancelled nor from Failed.
//! * Again with the *other* action it is refused: an "ok" there would let a caller believe
//!   that a running guest is stopped. Once STOP was asked for, RESUME is refused for good.
//! * RESUME of a machine that is gone is refused; STOP of one is done at once.
//! * A source's tasks end with its machine, unless its transfer completed: then whether they have ended is told by STOP
//!   (they run elsewhere) or by RESUME with `destination_stopped` (they ended here), which is refused all the same.
//! * It may be repeated after a failure, and what already runs is done; while one is carried out, a second is refused.
//! * STOP of a cancelled destination whose machine still exists stops it.
//! * STOP, Cancel or failure of a destination ends its containers with 137.
//! * A handoff is taken by RESUME of a destination, each attempt its own; elsewhere it is ignored.
//!
//! Cancel and Cleanup
//! * Cancel after Finalize is refused: it would drag a decided session back.
//! * Cancel while one is carried out waits for its end instead of answering too early; at most [`CANCEL_WAITERS`] do.
//! * A pause of the guest that lasts longer than [`super::Limits::blackout`] cancels by itself.
//! * Cleanup of a cancelled destination whose machine still exists is refused.
//!
//! Task API (see [`super::gate`])
//! * State and Wait are always answered; Kill and Delete are possible again as soon as the machine runs or has ended, not
//!   only after Cleanup.

use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{ContainerId, SessionId};

use super::state::{Arrival, Roster, State};
use super::{Action, Call, Machine, Side, StateId};
use crate::refusal::{Code, Refusal};

/// In the message of a FinalizeSandbox that is refused because this side's guest was already told to
/// run, and did: what a coordinator looks for to tell "it runs" from any other "no".
pub const ALREADY_RESUMED: &str = "this side was already resumed";
/// In the message of a Cancel that came after the transfer had completed.
pub const ALREADY_COMPLETED: &str = "the transfer had already completed";

pub(super) const MACHINE_EXITED: &str =
    "FinalizeSandbox(RESUME): the virtual machine has exited; FinalizeSandbox(STOP), then Cleanup";
const EXPORT: &str = "PrepareAndExportSandbox";

/// Most Cancel calls that wait for one cancellation.
pub const CANCEL_WAITERS: usize = 16;

/// What admission looks at: a session's state without its history.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(super) state: &'a State,
}

/// How an admitted call goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Carry it out.
    Begin,
    /// It is done already: answer "ok".
    Repeat,
    /// It waits for the end of what is being done.
    Join,
}

impl View<'_> {
    /// Number and name of the state.
    pub fn id(&self) -> StateId {
        self.state.id()
    }

    /// Which end of the move; none without a session.
    pub fn side(&self) -> Option<Side> {
        self.state.of().map(|of| of.side)
    }

    /// What is known of the machine; none without a session.
    pub fn machine(&self) -> Option<Machine> {
        self.state.of().map(|of| of.machine)
    }
}

/// Answers what `call` may do in the state of `view`, or why it may not. Changes nothing.
pub fn admit(view: View<'_>, call: &Call) -> Result<Admission, Refusal> {
    match call {
        Call::PrepareAndExport { session } => begin(view, session, EXPORT),
        Call::Import { session, .. } => begin(view, session, "ImportSandbox"),
        Call::PatchContainer { source, container } => patch(view, source, container),
        Call::PrepareSandbox { session } => {
            check_session(view, session)?;
            prepare(view)
        }
        Call::AdoptSocket { session, stream } => {
            check_session(view, session)?;
            adopt(view, *stream)
        }
        Call::Transfer { session, .. } => {
            check_session(view, session)?;
            transfer(view)
        }
        Call::Finalize { session, action, destination_stopped, .. } => {
            check_session(view, session)?;
            finalize(view, *action, *destination_stopped)
        }
        Call::Cancel { session } => {
            check_session(view, session)?;
            cancel(view)
        }
        Call::Cleanup { session } => match view.id() {
            StateId::Idle => Ok(Admission::Repeat),
            _ => {
                check_session(view, session)?;
                cleanup(view)
            }
        },
        Call::Notifications { session } => check_session(view, session).map(|()| Admission::Repeat),
    }
}

fn wrong_state(view: View<'_>, call: &str, way_out: &str) -> Refusal {
    Refusal::precondition(format!("{call}: not in state {}; {way_out}", view.id()))
}

fn check_session(view: View<'_>, given: &SessionId) -> Result<(), Refusal> {
    match view.state.of() {
        Some(of) if of.session == *given => Ok(()),
        Some(of) => Err(Refusal::invalid(format!(
            "session_id: {given} is not the active session {}; name that one, or start over after its Cleanup",
            of.session
        ))),
        None => Err(Refusal::invalid(format!(
            "session_id: {given} is unknown, there is no session here; begin with PrepareAndExportSandbox or ImportSandbox"
        ))),
    }
}

/// Whether a session that nobody cleaned up gives way: the machine runs here for good, and is asked to move on.
fn leaves(state: &State, call: &str) -> bool {
    call == EXPORT && matches!(state, State::Finalized { action: Action::Resume, .. })
}

fn begin(view: View<'_>, given: &SessionId, call: &str) -> Result<Admission, Refusal> {
    match view.state.of() {
        None => Ok(Admission::Begin),
        Some(_) if leaves(view.state, call) => Ok(Admission::Begin),
        Some(of) => Err(Refusal::precondition(format!(
            "{call}: session {} is in state {}, so {given} cannot begin; finalize and clean up that one first",
            of.session,
            view.id()
        ))),
    }
}

fn patch(view: View<'_>, source: &ContainerId, container: &ContainerId) -> Result<Admission, Refusal> {
    let State::DestinationImported { arrival, roster, .. } = view.state else {
        let way_out = "an annotated container is created between ImportSandbox and PrepareSandbox";
        return Err(wrong_state(view, "Task.Create of a migrated container", way_out));
    };
    if *arrival != Arrival::Settled {
        return Err(busy("Task.Create of a migrated container", arrival));
    }
    let Roster { waiting, patching, patched } = roster;
    if patching.contains_key(source) || patched.contains_key(source) {
        return Err(Refusal::precondition(format!(
            "container {source} of the source already has a container here; create each once"
        )));
    }
    if !waiting.contains(source) {
        return Err(Refusal::new(
            Code::NotFound,
            format!(
                "container {source} was not in the imported sandbox; waiting are: {}",
                roster.unpatched()
            ),
        ));
    }
    if patching.values().map(|(id, _)| id).chain(patched.values()).any(|id| id == container) {
        return Err(Refusal::new(
            Code::AlreadyExists,
            format!("container {container} already stands for another container of the source; use a new id"),
        ));
    }
    Ok(Admission::Begin)
}

fn busy(call: &str, arrival: &Arrival) -> Refusal {
    let what = match arrival {
        Arrival::Importing(_) => "ImportSandbox",
        Arrival::Settled => "nothing",
        Arrival::Creating(_) => "PrepareSandbox",
    };
    Refusal::precondition(format!(
        "{call}: {what} is still being carried out; call again when it has answered"
    ))
}

fn prepare(view: View<'_>) -> Result<Admission, Refusal> {
    let State::DestinationImported { arrival, roster, .. } = view.state else {
        return Err(wrong_state(view, "PrepareSandbox", "it follows ImportSandbox, once"));
    };
    if *arrival != Arrival::Settled {
        return Err(busy("PrepareSandbox", arrival));
    }
    if !roster.waiting.is_empty() || !roster.patching.is_empty() {
        return Err(Refusal::precondition(format!(
            "PrepareSandbox: containers without a container on this host: {}; create each with the annotation \
             io.microsoft.migration.source-container-id",
            roster.unpatched()
        )));
    }
    Ok(Admission::Begin)
}

fn adopt(view: View<'_>, stream: Stream) -> Result<Admission, Refusal> {
    let taken = || {
        Err(Refusal::new(
            Code::AlreadyExists,
            format!("socket for {stream}: this session has one; begin a new session to connect anew"),
        ))
    };
    let Some(of) = view.state.of() else {
        return Err(wrong_state(view, "CreateDuplicateSocket", "begin a session first"));
    };
    if of.streams.here.contains(&stream) || of.streams.coming.contains_key(&stream) {
        return taken();
    }
    match view.id() {
        StateId::SourceExported | StateId::DestinationPrepared | StateId::SocketWaiting => {
            if stream != Stream::Memory && !of.streams.expected.contains(&stream) {
                let expected: Vec<String> = of.streams.expected.iter().map(Stream::to_string).collect();
                return Err(Refusal::invalid(format!(
                    "socket for {stream}: the sandbox has no such writable disk; it has: {}",
                    expected.join(", ")
                )));
            }
            Ok(Admission::Begin)
        }
        StateId::SocketReady | StateId::Transferring | StateId::TransferCompleted => taken(),
        StateId::Idle
        | StateId::SourcePrepared
        | StateId::DestinationImported
        | StateId::Finalized
        | StateId::Cancelled
        | StateId::Cancelling
        | StateId::Failed => {
            let way_out = "sockets come after PrepareAndExportSandbox or PrepareSandbox";
            Err(wrong_state(view, "CreateDuplicateSocket", way_out))
        }
    }
}

fn transfer(view: View<'_>) -> Result<Admission, Refusal> {
    match view.id() {
        StateId::SourceExported | StateId::DestinationPrepared | StateId::SocketReady => Ok(Admission::Begin),
        StateId::SocketWaiting | StateId::Transferring | StateId::TransferCompleted => Ok(Admission::Repeat),
        StateId::Idle
        | StateId::SourcePrepared
        | StateId::DestinationImported
        | StateId::Finalized
        | StateId::Cancelled
        | StateId::Cancelling
        | StateId::Failed => {
            let way_out = "it follows PrepareAndExportSandbox or PrepareSandbox";
            Err(wrong_state(view, "TransferSandbox", way_out))
        }
    }
}

fn finalize(view: View<'_>, action: Action, destination_stopped: bool) -> Result<Admission, Refusal> {
    let Some(of) = view.state.of() else {
        return Err(wrong_state(view, "FinalizeSandbox", "begin a session first"));
    };
    match view.state {
        State::Finalized { action: done, .. } if *done == action => return Ok(Admission::Repeat),
        State::Finalized { action: done, .. } => {
            return Err(Refusal::precondition(match done {
                Action::Stop => {
                    "FinalizeSandbox: this side was already stopped; nothing is left to resume".to_owned()
                }
                Action::Resume => {
                    format!("FinalizeSandbox: {ALREADY_RESUMED}; stop its containers through containerd")
                }
            }));
        }
        State::TransferCompleted { ending, .. }
        | State::Cancelled { ending, .. }
        | State::Failed { ending, .. } => {
            if ending.is_some() {
                return Err(Refusal::precondition(
                    "FinalizeSandbox: one is still being carried out; call again when it has answered",
                ));
            }
        }
        State::Idle
        | State::SourcePrepared { .. }
        | State::SourceExported { .. }
        | State::DestinationImported { .. }
        | State::DestinationPrepared { .. }
        | State::SocketWaiting { .. }
        | State::SocketReady { .. }
        | State::Transferring { .. }
        | State::Cancelling { .. } => {
            let way_out = "let the transfer complete, or Cancel first";
            return Err(wrong_state(view, "FinalizeSandbox", way_out));
        }
    }
    if action == Action::Stop {
        // Cancelled in time, a destination has nothing left to stop and stays where it is.
        let cancelled = view.id() == StateId::Cancelled && of.side == Side::Destination;
        let nothing = matches!(of.machine, Machine::Absent | Machine::Gone);
        return Ok(if cancelled && nothing { Admission::Repeat } else { Admission::Begin });
    }
    if of.stopping {
        return Err(Refusal::precondition(
            "FinalizeSandbox(RESUME): STOP was asked for and may still take effect; repeat STOP",
        ));
    }
    if of.machine == Machine::Gone {
        // Who vouches for the destination says with it where the tasks have ended.
        return match of.side == Side::Source && destination_stopped {
            true => Ok(Admission::Begin),
            false => Err(Refusal::precondition(MACHINE_EXITED)),
        };
    }
    match of.side {
        Side::Source if of.completed && !destination_stopped => Err(Refusal::precondition(
            "FinalizeSandbox(RESUME): the transfer completed, so the destination may run; stop the destination, \
             then call again with destination_stopped",
        )),
        Side::Destination if !of.completed => Err(Refusal::precondition(
            "FinalizeSandbox(RESUME): the transfer to this host did not complete; resume the source instead",
        )),
        Side::Source | Side::Destination => Ok(Admission::Begin),
    }
}

fn cancel(view: View<'_>) -> Result<Admission, Refusal> {
    match view.state {
        State::Idle => Err(wrong_state(view, "Cancel", "begin a session first")),
        State::Finalized { .. } => {
            Err(wrong_state(view, "Cancel", "the session is decided; only Cleanup follows"))
        }
        State::Cancelling { calls, .. } if calls.len() < CANCEL_WAITERS => Ok(Admission::Join),
        State::Cancelling { .. } => {
            Err(wrong_state(view, "Cancel", "too many calls wait for it already; wait for one of them"))
        }
        State::TransferCompleted { ending: Some(_), .. }
        | State::Failed { ending: Some(_), .. }
        | State::Cancelled { ending: Some(_), .. } => {
            Err(Refusal::precondition("Cancel: FinalizeSandbox is being carried out; wait for its answer"))
        }
        State::Cancelled { ending: None, .. } => Ok(Admission::Repeat),
        State::SourcePrepared { .. }
        | State::SourceExported { .. }
        | State::DestinationImported { .. }
        | State::DestinationPrepared { .. }
        | State::SocketWaiting { .. }
        | State::SocketReady { .. }
        | State::Transferring { .. }
        | State::TransferCompleted { ending: None, .. }
        | State::Failed { ending: None, .. } => Ok(Admission::Begin),
    }
}

fn cleanup(view: View<'_>) -> Result<Admission, Refusal> {
    let (way_out, allowed) = match view.state {
        State::Idle => ("", true),
        State::Finalized { .. } => ("", true),
        State::Cancelled { of, ending: None } if of.side == Side::Destination => {
            let nothing = matches!(of.machine, Machine::Absent | Machine::Gone);
            ("its machine still exists: FinalizeSandbox(STOP) first", nothing)
        }
        State::Cancelled { .. } | State::TransferCompleted { .. } | State::Failed { .. } => {
            ("FinalizeSandbox decides which side runs; call it first", false)
        }
        State::SourcePrepared { .. }
        | State::SourceExported { .. }
        | State::DestinationImported { .. }
        | State::DestinationPrepared { .. }
        | State::SocketWaiting { .. }
        | State::SocketReady { .. }
        | State::Transferring { .. }
        | State::Cancelling { .. } => ("the move is under way: Cancel or complete it first", false),
    };
    if allowed { Ok(Admission::Begin) } else { Err(wrong_state(view, "Cleanup", way_out)) }
}
