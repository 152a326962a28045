//! Which calls of containerd's Task API may be carried out while a sandbox moves.

use super::{Machine, Side, StateId, View};
use crate::refusal::Refusal;

/// The calls of the Task API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TaskCall {
    /// A fresh container, or a migrated one with its annotation.
    Create,
    /// Start a created process.
    Start,
    /// A further process.
    Exec,
    /// Signal.
    Kill,
    /// Forget an ended process.
    Delete,
    /// Terminal size.
    ResizePty,
    /// End of stdin; at the pause it waits until it is known where that belongs.
    CloseIo,
    /// Limits.
    Update,
    /// Freeze the container.
    Pause,
    /// Thaw it.
    Resume,
    /// Status from the shim's memory.
    State,
    /// Until exit.
    Wait,
    /// Pids from the guest.
    Pids,
    /// Metrics from the guest.
    Stats,
    /// The shim's pid.
    Connect,
    /// End the shim when it is empty.
    Shutdown,
}

impl TaskCall {
    /// All of them.
    pub const ALL: [TaskCall; 16] = [
        TaskCall::Create,
        TaskCall::Start,
        TaskCall::Exec,
        TaskCall::Kill,
        TaskCall::Delete,
        TaskCall::ResizePty,
        TaskCall::CloseIo,
        TaskCall::Update,
        TaskCall::Pause,
        TaskCall::Resume,
        TaskCall::State,
        TaskCall::Wait,
        TaskCall::Pids,
        TaskCall::Stats,
        TaskCall::Connect,
        TaskCall::Shutdown,
    ];
}

/// Refuses what would change a sandbox that is not ours alone just now. Looking and waiting are always
/// allowed: containerd asks for the state of a task at any time and takes an error for its death.
/// A session never stands in the way of a sandbox that does not move; other states of the machine are
/// the shim's to judge.
pub fn gate(view: View<'_>, call: TaskCall) -> Result<(), Refusal> {
    let allowed = match call {
        TaskCall::State | TaskCall::Wait | TaskCall::CloseIo | TaskCall::Connect | TaskCall::Shutdown => true,
        // Of the guest, and nothing that was saved: it answers for as long as it runs here.
        TaskCall::Pids | TaskCall::Stats | TaskCall::ResizePty => !stands_still(view),
        TaskCall::Create => open(view) || view.id() == StateId::DestinationImported,
        // What is gone for good may be put away.
        TaskCall::Kill | TaskCall::Delete => open(view) || ended(view),
        TaskCall::Start | TaskCall::Exec | TaskCall::Update | TaskCall::Pause | TaskCall::Resume => {
            open(view)
        }
    };
    if allowed {
        return Ok(());
    }
    let (reason, way_out) = match (view.side(), ended(view)) {
        (_, true) => ("its virtual machine has ended", "delete it"),
        (Some(Side::Destination), _) => {
            ("the sandbox is arriving and does not run here yet", "call again when the move has ended")
        }
        (Some(Side::Source) | None, _) => {
            ("the sandbox is moving to another host", "call again when the move has ended, there or here")
        }
    };
    Err(Refusal::precondition(format!("{call:?}: {reason} (session state {}); {way_out}", view.id())))
}

/// A source's guest is paused, or its state complete elsewhere: it would not answer.
fn stands_still(view: View<'_>) -> bool {
    let paused = |of: &super::state::Move| of.blackout.is_some() || of.completed;
    view.side() == Some(Side::Source)
        && view.machine() == Some(Machine::Frozen)
        && view.state.of().is_some_and(paused)
}

fn open(view: View<'_>) -> bool {
    matches!(view.machine(), None | Some(Machine::Running))
}

fn ended(view: View<'_>) -> bool {
    match view.machine() {
        // Of a source that left, its tasks run elsewhere until somebody says that they do not.
        Some(Machine::Gone) => match view.state.of() {
            Some(of) if of.left() => view.id() == StateId::Finalized,
            Some(_) | None => true,
        },
        // Cancelled or failed before it had a machine: its containers are aborted.
        Some(Machine::Absent) => {
            matches!(view.id(), StateId::Cancelled | StateId::Failed | StateId::Finalized)
        }
        Some(Machine::Running | Machine::Frozen) | None => false,
    }
}
