//! Calls that admission let through.

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;

use super::admission::{Admission, MACHINE_EXITED, admit};
use super::state::{Arrival, Ending, Export, Move, Pending, Roster, State, Streams};
use super::{
    Action, Answer, Call, CallId, Effect, Machine, Out, Session, Side, StateId, notify, own_failure,
};
use crate::Moment;
use crate::notice::{Detail, Phase, PhaseState};
use crate::refusal::{Code, Refusal};

impl Session {
    pub(super) fn call(&mut self, now: Moment, id: CallId, call: Call, out: &mut Out) {
        match admit(self.view(), &call) {
            Err(refusal) => out.push(Effect::Reply(id, Err(refusal))),
            Ok(Admission::Repeat) => out.push(Effect::Reply(id, Ok(Answer::Empty))),
            Ok(Admission::Join) => {
                if let State::Cancelling { calls, .. } = &mut self.state {
                    calls.push(id);
                }
            }
            Ok(Admission::Begin) => self.begin(now, id, call, out),
        }
    }

    fn begin(&mut self, now: Moment, id: CallId, call: Call, out: &mut Out) {
        match call {
            Call::PrepareAndExport { session } => {
                // A decided one that was never cleaned up.
                self.forget(out);
                let of = self.open(session, Side::Source);
                out.push(Effect::InitializeSource { epoch: of.epoch, call: id });
                let pending = Pending { call: id, deadline: now.after(self.limits.export) };
                self.state = State::SourcePrepared { of, step: Export::Initializing, pending };
            }
            Call::Import { session, sandbox, config } => {
                let of = self.open(session, Side::Destination);
                out.push(Effect::Import { epoch: of.epoch, call: id, sandbox, config });
                let pending = Pending { call: id, deadline: now.after(self.limits.import) };
                let arrival = Arrival::Importing(pending);
                self.state = State::DestinationImported { of, arrival, roster: Roster::default() };
            }
            Call::PatchContainer { source, container } => {
                let deadline = now.after(self.limits.patch);
                if let State::DestinationImported { of, roster, .. } = &mut self.state {
                    roster.waiting.remove(&source);
                    let pending = Pending { call: id, deadline };
                    roster.patching.insert(source.clone(), (container.clone(), pending));
                    out.push(Effect::Patch { epoch: of.epoch, call: id, source, container });
                }
            }
            Call::PrepareSandbox { .. } => {
                let deadline = now.after(self.limits.create);
                if let State::DestinationImported { of, arrival, .. } = &mut self.state {
                    *arrival = Arrival::Creating(Pending { call: id, deadline });
                    // From here on there may be one, until it is seen gone.
                    of.machine = Machine::Frozen;
                    out.push(Effect::CreateDestinationVm { epoch: of.epoch, call: id });
                }
            }
            Call::AdoptSocket { stream, .. } => {
                let deadline = now.after(self.limits.adopt);
                if let Some(of) = self.state.of_mut() {
                    of.streams.coming.insert(stream, Pending { call: id, deadline });
                    out.push(Effect::AdoptSocket { epoch: of.epoch, call: id, stream });
                }
            }
            Call::Transfer { timeout, .. } => {
                out.push(Effect::Reply(id, Ok(Answer::Empty)));
                let limit = if timeout.is_zero() { self.limits.sockets } else { timeout };
                match self.take() {
                    State::SocketReady { of } => self.start_transfer(of, out),
                    State::SourceExported { of } | State::DestinationPrepared { of } => {
                        self.state = State::SocketWaiting { of, deadline: now.after(limit) };
                    }
                    other => self.state = other,
                }
            }
            Call::Finalize { action, destination_stopped, handoff, .. } => {
                if let Some(of) = self.state.of_mut() {
                    of.alone |= of.side == Side::Source && action == Action::Resume && destination_stopped;
                }
                self.finalize(now, id, action, handoff, out);
            }
            Call::Cancel { .. } => self.cancel(now, vec![id], out),
            Call::Cleanup { .. } => {
                self.forget(out);
                out.push(Effect::Reply(id, Ok(Answer::Empty)));
            }
            // Admission answers it by itself.
            Call::Notifications { .. } => out.push(Effect::Reply(id, Ok(Answer::Empty))),
        }
    }

    /// Ends the bookkeeping of a session, if there is one.
    fn forget(&mut self, out: &mut Out) {
        if let Some(of) = self.state.of() {
            out.push(Effect::CloseSockets { epoch: of.epoch });
            out.push(Effect::EndNotifications { epoch: of.epoch });
        }
        self.state = State::Idle;
    }

    fn open(&mut self, session: dunlin_wire::ids::SessionId, side: Side) -> Move {
        self.last_epoch = self.last_epoch.next();
        Move {
            session,
            epoch: self.last_epoch,
            side,
            machine: match side {
                Side::Source => Machine::Frozen,
                Side::Destination => Machine::Absent,
            },
            completed: false,
            sending: false,
            alone: false,
            stopping: false,
            blackout: None,
            streams: Streams::default(),
        }
    }

    pub(super) fn start_transfer(&mut self, mut of: Move, out: &mut Out) {
        of.sending = of.side == Side::Source;
        notify(&of, Phase::SetupDone, PhaseState::Success, Detail::None, out);
        out.push(Effect::StartTransfer { epoch: of.epoch, side: of.side });
        self.state = State::Transferring { of, deadline: None };
    }

    /// A socket came: which state follows is a matter of who else is here.
    pub(super) fn socket_here(&mut self, stream: Stream, out: &mut Out) {
        if let Some(of) = self.state.of_mut() {
            of.streams.here.insert(stream);
            if !of.streams.complete() {
                return;
            }
        }
        match self.take() {
            State::SourceExported { of } | State::DestinationPrepared { of } => {
                self.state = State::SocketReady { of };
            }
            State::SocketWaiting { of, .. } => self.start_transfer(of, out),
            other => self.state = other,
        }
    }

    fn finalize(&mut self, now: Moment, id: CallId, action: Action, handoff: Option<Any>, out: &mut Out) {
        let pending = Pending { call: id, deadline: now.after(self.limits.finalize) };
        let Some(of) = self.state.of_mut() else { return };
        match (action, of.side) {
            (Action::Stop, side) => {
                of.stopping = true;
                // What is left of a source that left is closed to its tasks, machine or not.
                if matches!(of.machine, Machine::Absent | Machine::Gone) && !of.left() {
                    out.push(Effect::Reply(id, Ok(Answer::Empty)));
                    self.ended(Action::Stop, out);
                    return;
                }
                out.push(Effect::StopVm { epoch: of.epoch, side });
            }
            (Action::Resume, Side::Source) if of.machine == Machine::Gone => {
                // Admitted for the word that comes with it: the tasks run nowhere, and have ended here.
                out.push(Effect::Thaw { epoch: of.epoch });
                out.push(Effect::Reply(id, Err(Refusal::precondition(MACHINE_EXITED))));
                return;
            }
            (Action::Resume, Side::Source) => {
                out.push(Effect::ResumeSource { epoch: of.epoch, rebuild: of.blackout.is_some() });
            }
            (Action::Resume, Side::Destination) => {
                out.push(Effect::RunDestination { epoch: of.epoch, handoff });
            }
        }
        self.state.set_ending(Some(Ending { pending, action }));
    }

    /// The decision has been carried out.
    pub(super) fn ended(&mut self, action: Action, out: &mut Out) {
        let was = self.state.id();
        match self.take() {
            State::TransferCompleted { of, .. } | State::Cancelled { of, .. } | State::Failed { of, .. } => {
                let stopped_arrival = action == Action::Stop && of.side == Side::Destination;
                if stopped_arrival {
                    out.push(Effect::AbortMigrated { epoch: of.epoch });
                }
                if stopped_arrival && was == StateId::Cancelled {
                    self.state = State::Cancelled { of, ending: None };
                } else {
                    self.state = State::Finalized { of, action };
                }
            }
            other => self.state = other,
        }
    }

    /// Every call that waits is given back, every stream on its way is given up.
    fn give_back(&mut self, refusal: &Refusal, out: &mut Out) {
        let mut waiting: Vec<CallId> = Vec::new();
        if let Some(of) = self.state.of_mut() {
            let coming = std::mem::take(&mut of.streams.coming);
            waiting.extend(coming.into_values().map(|pending| pending.call));
        }
        match &mut self.state {
            State::SourcePrepared { pending, .. } => waiting.push(pending.call),
            State::DestinationImported { arrival, roster, .. } => {
                if let Arrival::Importing(pending) | Arrival::Creating(pending) = arrival {
                    waiting.push(pending.call);
                }
                *arrival = Arrival::Settled;
                let patching = std::mem::take(&mut roster.patching);
                waiting.extend(patching.into_values().map(|(_, pending)| pending.call));
            }
            State::Cancelling { calls, .. } => waiting.append(calls),
            State::TransferCompleted { ending, .. }
            | State::Cancelled { ending, .. }
            | State::Failed { ending, .. } => {
                waiting.extend(ending.take().map(|ending| ending.pending.call));
            }
            State::Idle
            | State::SourceExported { .. }
            | State::DestinationPrepared { .. }
            | State::SocketWaiting { .. }
            | State::SocketReady { .. }
            | State::Transferring { .. }
            | State::Finalized { .. } => {}
        }
        for call in waiting {
            out.push(Effect::Reply(call, Err(refusal.clone())));
        }
    }

    pub(super) fn cancel(&mut self, now: Moment, calls: Vec<CallId>, out: &mut Out) {
        let refusal = Refusal::new(Code::Canceled, "the session was cancelled; begin a new one");
        self.give_back(&refusal, out);
        let at = self.state.id();
        let Some(of) = self.state.of().cloned() else { return };
        if at == StateId::DestinationImported && of.machine == Machine::Absent {
            out.push(Effect::AbortMigrated { epoch: of.epoch });
            notify(&of, Phase::Failed, PhaseState::Cancelled, Detail::None, out);
            self.state = State::Cancelled { of, ending: None };
            for call in calls {
                out.push(Effect::Reply(call, Ok(Answer::Empty)));
            }
            return;
        }
        out.push(Effect::CancelTransfer { epoch: of.epoch, side: of.side });
        self.state = State::Cancelling { of, calls, deadline: now.after(self.limits.cancel) };
    }

    /// The move cannot go on. Who waits gets `refusal`; subscribers get `state`.
    pub(super) fn fail(&mut self, refusal: &Refusal, state: Option<PhaseState>, out: &mut Out) {
        let preparing = self.state.id() == StateId::SourcePrepared;
        self.give_back(refusal, out);
        let Some(mut of) = self.state.of().cloned() else { return };
        if preparing && of.machine != Machine::Gone {
            // Nothing of the guest has moved: only its API was closed.
            out.push(Effect::Thaw { epoch: of.epoch });
            of.machine = Machine::Running;
        }
        if of.died_here() {
            out.push(Effect::Thaw { epoch: of.epoch });
        }
        out.push(Effect::CloseSockets { epoch: of.epoch });
        if of.side == Side::Destination && matches!(of.machine, Machine::Absent | Machine::Gone) {
            out.push(Effect::AbortMigrated { epoch: of.epoch });
        }
        let state = state.unwrap_or(own_failure(of.side));
        notify(&of, Phase::Failed, state, Detail::Cause(refusal.message.clone()), out);
        self.state = State::Failed { of, ending: None };
    }
}
