//! Where a session stands: the thirteen states of the service and what each one knows.

use std::collections::{BTreeMap, BTreeSet};

use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{ContainerId, Epoch, SessionId};

use super::{Action, CallId};
use crate::Moment;

/// Which end of the move this shim is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Its guest ran before the move.
    Source,
    /// Its guest may run after the move.
    Destination,
}

/// The service's states by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum StateId {
    /// No session.
    Idle = 0,
    /// Freezing and saving.
    SourcePrepared = 1,
    /// Saved state handed out.
    SourceExported = 2,
    /// Saved state taken in, inert.
    DestinationImported = 3,
    /// The receiving machine exists.
    DestinationPrepared = 4,
    /// Transfer asked for, streams missing.
    SocketWaiting = 5,
    /// All streams here, transfer not asked for.
    SocketReady = 6,
    /// Moving.
    Transferring = 7,
    /// This side's part of the transfer is complete.
    TransferCompleted = 8,
    /// Decided: runs on, or stopped.
    Finalized = 9,
    /// Moved no more.
    Cancelled = 10,
    /// On the way there.
    Cancelling = 11,
    /// Something failed; only a Finalize leads on.
    Failed = 12,
}

impl StateId {
    /// All of them, by number.
    pub const ALL: [StateId; 13] = [
        StateId::Idle,
        StateId::SourcePrepared,
        StateId::SourceExported,
        StateId::DestinationImported,
        StateId::DestinationPrepared,
        StateId::SocketWaiting,
        StateId::SocketReady,
        StateId::Transferring,
        StateId::TransferCompleted,
        StateId::Finalized,
        StateId::Cancelled,
        StateId::Cancelling,
        StateId::Failed,
    ];

    /// The service's number for it.
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl std::fmt::Display for StateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// What is known of this shim's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Machine {
    /// Not made yet (a destination before PrepareSandbox).
    Absent,
    /// There, and the move's: its API is closed.
    Frozen,
    /// There, and its API is open.
    Running,
    /// Was there and never comes back.
    Gone,
}

/// What every state but Idle knows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Move {
    pub(super) session: SessionId,
    pub(super) epoch: Epoch,
    pub(super) side: Side,
    pub(super) machine: Machine,
    /// This side's transfer was complete at some time. Never unset: a source for which it holds
    /// may have a twin.
    pub(super) completed: bool,
    /// A source's transfer was begun, and was not seen to fail or to be undone: it may complete at any time.
    pub(super) sending: bool,
    /// A source was told that it has none: the destination is stopped, and cannot run. Never unset.
    pub(super) alone: bool,
    /// A STOP was asked for. Never unset: a late stop must not meet a guest that runs again.
    pub(super) stopping: bool,
    /// Since when the guest is paused, as seen from here.
    pub(super) blackout: Option<Moment>,
    pub(super) streams: Streams,
}

impl Move {
    /// Nobody knows how its transfer ended: of a source, it is taken for complete.
    pub(super) fn doubt(&mut self, now: Moment) {
        if self.sending {
            self.completed = true;
            self.blackout.get_or_insert(now);
        }
    }

    /// Its tasks run elsewhere, or may: whether their end here is one is not known here.
    pub(super) fn left(&self) -> bool {
        self.side == Side::Source && self.completed && !self.alone
    }

    /// A source whose machine is gone, and with it, for certain, its tasks.
    pub(super) fn died_here(&self) -> bool {
        self.side == Side::Source && self.machine == Machine::Gone && !self.left()
    }
}

/// A call that is answered later, and until when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pending {
    pub(super) call: CallId,
    pub(super) deadline: Moment,
}

/// A Finalize that is being carried out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ending {
    pub(super) pending: Pending,
    pub(super) action: Action,
}

/// The connections that the transfer needs, and which of them are here.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Streams {
    pub(super) expected: BTreeSet<Stream>,
    pub(super) here: BTreeSet<Stream>,
    pub(super) coming: BTreeMap<Stream, Pending>,
}

impl Streams {
    pub(super) fn complete(&self) -> bool {
        self.here.contains(&Stream::Memory) && self.expected.is_subset(&self.here)
    }

    pub(super) fn missing(&self) -> String {
        let missing: Vec<String> = self.expected.difference(&self.here).map(Stream::to_string).collect();
        missing.join(", ")
    }
}

/// The imported containers: which still have no container of the destination's containerd.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Roster {
    pub(super) waiting: BTreeSet<ContainerId>,
    pub(super) patching: BTreeMap<ContainerId, (ContainerId, Pending)>,
    /// Source's id to destination's id.
    pub(super) patched: BTreeMap<ContainerId, ContainerId>,
}

impl Roster {
    /// Source ids without a container yet, sorted.
    pub(super) fn unpatched(&self) -> String {
        let ids: BTreeSet<&str> =
            self.waiting.iter().chain(self.patching.keys()).map(ContainerId::as_str).collect();
        ids.into_iter().collect::<Vec<_>>().join(", ")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Export {
    Initializing,
    Saving,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Arrival {
    Importing(Pending),
    Settled,
    Creating(Pending),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum State {
    Idle,
    SourcePrepared { of: Move, step: Export, pending: Pending },
    SourceExported { of: Move },
    DestinationImported { of: Move, arrival: Arrival, roster: Roster },
    DestinationPrepared { of: Move },
    SocketWaiting { of: Move, deadline: Moment },
    SocketReady { of: Move },
    Transferring { of: Move, deadline: Option<Moment> },
    TransferCompleted { of: Move, ending: Option<Ending> },
    Finalized { of: Move, action: Action },
    Cancelled { of: Move, ending: Option<Ending> },
    Cancelling { of: Move, calls: Vec<CallId>, deadline: Moment },
    Failed { of: Move, ending: Option<Ending> },
}

impl State {
    pub(super) fn id(&self) -> StateId {
        match self {
            State::Idle => StateId::Idle,
            State::SourcePrepared { .. } => StateId::SourcePrepared,
            State::SourceExported { .. } => StateId::SourceExported,
            State::DestinationImported { .. } => StateId::DestinationImported,
            State::DestinationPrepared { .. } => StateId::DestinationPrepared,
            State::SocketWaiting { .. } => StateId::SocketWaiting,
            State::SocketReady { .. } => StateId::SocketReady,
            State::Transferring { .. } => StateId::Transferring,
            State::TransferCompleted { .. } => StateId::TransferCompleted,
            State::Finalized { .. } => StateId::Finalized,
            State::Cancelled { .. } => StateId::Cancelled,
            State::Cancelling { .. } => StateId::Cancelling,
            State::Failed { .. } => StateId::Failed,
        }
    }

    pub(super) fn of(&self) -> Option<&Move> {
        match self {
            State::Idle => None,
            State::SourcePrepared { of, .. }
            | State::SourceExported { of }
            | State::DestinationImported { of, .. }
            | State::DestinationPrepared { of }
            | State::SocketWaiting { of, .. }
            | State::SocketReady { of }
            | State::Transferring { of, .. }
            | State::TransferCompleted { of, .. }
            | State::Finalized { of, .. }
            | State::Cancelled { of, .. }
            | State::Cancelling { of, .. }
            | State::Failed { of, .. } => Some(of),
        }
    }

    pub(super) fn of_mut(&mut self) -> Option<&mut Move> {
        match self {
            State::Idle => None,
            State::SourcePrepared { of, .. }
            | State::SourceExported { of }
            | State::DestinationImported { of, .. }
            | State::DestinationPrepared { of }
            | State::SocketWaiting { of, .. }
            | State::SocketReady { of }
            | State::Transferring { of, .. }
            | State::TransferCompleted { of, .. }
            | State::Finalized { of, .. }
            | State::Cancelled { of, .. }
            | State::Cancelling { of, .. }
            | State::Failed { of, .. } => Some(of),
        }
    }

    /// The Finalize being carried out, if any.
    pub(super) fn ending(&self) -> Option<Ending> {
        match self {
            State::TransferCompleted { ending, .. }
            | State::Cancelled { ending, .. }
            | State::Failed { ending, .. } => *ending,
            State::Idle
            | State::SourcePrepared { .. }
            | State::SourceExported { .. }
            | State::DestinationImported { .. }
            | State::DestinationPrepared { .. }
            | State::SocketWaiting { .. }
            | State::SocketReady { .. }
            | State::Transferring { .. }
            | State::Finalized { .. }
            | State::Cancelling { .. } => None,
        }
    }

    pub(super) fn set_ending(&mut self, next: Option<Ending>) {
        match self {
            State::TransferCompleted { ending, .. }
            | State::Cancelled { ending, .. }
            | State::Failed { ending, .. } => *ending = next,
            State::Idle
            | State::SourcePrepared { .. }
            | State::SourceExported { .. }
            | State::DestinationImported { .. }
            | State::DestinationPrepared { .. }
            | State::SocketWaiting { .. }
            | State::SocketReady { .. }
            | State::Transferring { .. }
            | State::Finalized { .. }
            | State::Cancelling { .. } => {}
        }
    }

    /// The next moment at which something is overdue.
    pub(super) fn deadline(&self) -> Option<Moment> {
        let own = match self {
            State::Idle
            | State::SourceExported { .. }
            | State::DestinationPrepared { .. }
            | State::SocketReady { .. }
            | State::Finalized { .. } => None,
            State::SourcePrepared { pending, .. } => Some(pending.deadline),
            State::DestinationImported { arrival, roster, .. } => {
                let arrival = match arrival {
                    Arrival::Importing(pending) | Arrival::Creating(pending) => Some(pending.deadline),
                    Arrival::Settled => None,
                };
                let patch = roster.patching.values().map(|(_, pending)| pending.deadline);
                arrival.into_iter().chain(patch).min()
            }
            State::SocketWaiting { deadline, .. } | State::Cancelling { deadline, .. } => Some(*deadline),
            State::Transferring { deadline, .. } => *deadline,
            State::TransferCompleted { ending, .. }
            | State::Cancelled { ending, .. }
            | State::Failed { ending, .. } => ending.map(|ending| ending.pending.deadline),
        };
        let coming = self.of().into_iter().flat_map(|of| of.streams.coming.values());
        own.into_iter().chain(coming.map(|pending| pending.deadline)).min()
    }
}
