//! One shim's side of a move.
//!
//! ```text
//!  source       Idle → SourcePrepared → SourceExported ┐
//!                                                      ├→ SocketWaiting ┐
//!  destination  Idle → DestinationImported → …Prepared ┘   SocketReady  ┴→ Transferring → TransferCompleted
//!
//!  any of these → Cancelling → Cancelled ┐
//!  any of these → Failed ────────────────┼→ Finalized → Idle
//!  TransferCompleted ────────────────────┘
//! ```
//!
//! The shim gives [`Session::step`] every call, every end of work and every tick, and carries out the
//! [`Effect`]s. Work carries the session's [`Epoch`]; the end of work of an earlier session
//! changes nothing in the present one.
//!
//! What no order of calls brings about: a source that runs after its transfer completed without
//! somebody's word that the destination is stopped; a source that calls its tasks ended without that word; a destination
//! that runs before its own transfer completed, or after a STOP; a wait without a deadline.

mod admission;
mod calls;
mod completions;
mod gate;
mod messages;
mod overdue;
mod state;

#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trap_tests;

use std::time::Duration;

use dunlin_wire::ids::{Epoch, SessionId};

pub use admission::{ALREADY_COMPLETED, ALREADY_RESUMED, Admission, CANCEL_WAITERS, View, admit};
pub use gate::{TaskCall, gate};
pub use messages::{
    Action, Answer, Call, CallId, Cancelled, Completion, Effect, Event, Imported, Saved, TransferFault,
};
pub use state::{Machine, Side, StateId};

use crate::notice::{Detail, Notice, Phase, PhaseState};
use crate::refusal::Refusal;
use crate::{Effects, Moment};
use state::{Move, State};

/// How long a session waits for each kind of work before it gives the call back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// For the sockets, when Transfer names no time.
    pub sockets: Duration,
    /// Initialise and save, each.
    pub export: Duration,
    /// Import.
    pub import: Duration,
    /// Each container's patch.
    pub patch: Duration,
    /// The receiving machine.
    pub create: Duration,
    /// Taking a socket over.
    pub adopt: Duration,
    /// Source: from the guest's pause to the transfer's end; then it is cancelled and the guest goes on here.
    pub blackout: Duration,
    /// Cancelling.
    pub cancel: Duration,
    /// Resume or stop.
    pub finalize: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        let seconds = Duration::from_secs;
        Limits {
            sockets: seconds(600),
            export: seconds(50),
            import: seconds(50),
            patch: seconds(600),
            create: seconds(50),
            adopt: seconds(10),
            blackout: seconds(60),
            cancel: seconds(30),
            finalize: seconds(140),
        }
    }
}

/// One shim's side of one move after another.
#[derive(Debug)]
pub struct Session {
    state: State,
    last_epoch: Epoch,
    limits: Limits,
    armed: Option<Moment>,
}

pub(crate) type Out = Effects<Effect>;

impl Session {
    /// Idle.
    pub fn new(limits: Limits) -> Session {
        Session { state: State::Idle, last_epoch: Epoch(0), limits, armed: None }
    }

    /// What happened at `now`; what to do about it.
    pub fn step(&mut self, now: Moment, event: Event) -> Effects<Effect> {
        let mut out = Effects::none();
        match event {
            Event::Call(id, call) => self.call(now, id, call, &mut out),
            Event::Done(epoch, completion) => self.done(now, epoch, completion, &mut out),
            Event::VmExited => self.vm_exited(&mut out),
            Event::Tick => {
                self.armed = None;
                self.overdue(now, &mut out);
            }
        }
        let deadline = self.state.deadline();
        if deadline != self.armed {
            self.armed = deadline;
            if let Some(moment) = deadline {
                out.push(Effect::WakeAt(moment));
            }
        }
        out
    }

    /// For [`admit`] and [`gate`].
    pub fn view(&self) -> View<'_> {
        View { state: &self.state }
    }

    /// May this Task call be carried out now?
    pub fn gate(&self, call: TaskCall) -> Result<(), Refusal> {
        gate(self.view(), call)
    }

    /// Its tasks run on another host, or may: what becomes of the machine here is no end of theirs.
    pub fn left(&self) -> bool {
        self.state.of().is_some_and(state::Move::left)
    }

    /// The active session.
    pub fn active(&self) -> Option<(&SessionId, Epoch, Side)> {
        self.state.of().map(|of| (&of.session, of.epoch, of.side))
    }

    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Idle)
    }
}

fn notify(of: &Move, phase: Phase, state: PhaseState, detail: Detail, out: &mut Out) {
    out.push(Effect::Notify { epoch: of.epoch, notice: Notice { phase, state, detail } });
}

fn own_failure(side: Side) -> PhaseState {
    match side {
        Side::Source => PhaseState::SourceFailed,
        Side::Destination => PhaseState::DestinationFailed,
    }
}
