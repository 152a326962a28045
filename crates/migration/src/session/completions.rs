//! Ends of work, and of the machine.

use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{Epoch, Slot};

use super::state::{Arrival, Export, State};
use super::{
    ALREADY_COMPLETED, Action, Answer, Cancelled, Completion, Effect, Imported, Machine, Out, Saved, Session,
    Side, StateId, notify,
};
use crate::Moment;
use crate::notice::{Detail, Phase, PhaseState};
use crate::refusal::{Code, Refusal};

impl Session {
    pub(super) fn done(&mut self, now: Moment, epoch: Epoch, completion: Completion, out: &mut Out) {
        if self.state.of().map(|of| of.epoch) != Some(epoch) {
            return Self::late(epoch, completion, out);
        }
        match completion {
            Completion::VmInitialized(result) => self.initialized(now, result, out),
            Completion::Saved(result) => self.saved(result, out),
            Completion::Imported(result) => self.imported(result, out),
            Completion::ContainerPatched { source, result } => {
                if let State::DestinationImported { roster, .. } = &mut self.state
                    && let Some((container, pending)) = roster.patching.remove(&source)
                {
                    if result.is_ok() {
                        roster.patched.insert(source, container);
                    } else {
                        roster.waiting.insert(source);
                    }
                    out.push(Effect::Reply(pending.call, result.map(Answer::Patched)));
                }
            }
            Completion::VmCreated(result) => self.vm_created(result, out),
            Completion::SocketAdopted { stream, result } => self.adopted(stream, result, out),
            Completion::TransferProgressed(progress) => {
                if let State::Transferring { of, .. } = &self.state {
                    let detail = Detail::Progress(progress);
                    notify(of, Phase::TransferInProgress, PhaseState::Success, detail, out);
                }
            }
            Completion::BlackoutStarted { already } => {
                let since = now.before(already);
                let limit = since.after(self.limits.blackout);
                if let Some(of) = self.state.of_mut() {
                    of.blackout.get_or_insert(since);
                }
                if let State::Transferring { of, deadline: deadline @ None } = &mut self.state {
                    *deadline = Some(limit);
                    let detail = Detail::Blackout(already);
                    notify(of, Phase::BlackoutStarted, PhaseState::Success, detail, out);
                }
            }
            Completion::TransferCompleted { progress, handoff } => {
                if let Some(of) = self.state.of_mut() {
                    of.completed = true;
                    of.blackout.get_or_insert(now);
                }
                // While it is being cancelled as well: the destination may be told to run yet, and needs the handoff.
                if let State::Transferring { of, .. } | State::Cancelling { of, .. } = &self.state {
                    if of.side == Side::Source {
                        let detail = Detail::Progress(progress);
                        notify(of, Phase::OfflineDone, PhaseState::Success, detail, out);
                    }
                    let detail = Detail::Complete { progress, handoff };
                    notify(of, Phase::Done, PhaseState::Success, detail, out);
                }
                match self.take() {
                    State::Transferring { of, .. } => {
                        self.state = State::TransferCompleted { of, ending: None };
                    }
                    other => self.state = other,
                }
            }
            Completion::TransferFailed(fault) => {
                if let Some(of) = self.state.of_mut() {
                    of.sending = false;
                }
                if self.state.id() == StateId::Transferring {
                    self.fail(&Refusal::unknown(fault.message), Some(fault.state), out);
                }
            }
            Completion::TransferInDoubt(fault) => {
                if let Some(of) = self.state.of_mut() {
                    of.completed = true;
                    of.blackout.get_or_insert(now);
                }
                if self.state.id() == StateId::Transferring {
                    self.fail(&Refusal::unknown(fault.message), Some(fault.state), out);
                }
            }
            Completion::CancelDone(result) => self.cancel_done(now, result, out),
            Completion::Resumed(result) => self.resumed(now, result, out),
            Completion::Stopped(result) => self.stopped(result, out),
        }
    }

    /// The end of work of a session that is gone: what it made is given up.
    fn late(epoch: Epoch, completion: Completion, out: &mut Out) {
        match completion {
            Completion::SocketAdopted { result: Ok(()), .. } => out.push(Effect::CloseSockets { epoch }),
            Completion::Imported(Ok(_)) | Completion::ContainerPatched { result: Ok(_), .. } => {
                out.push(Effect::AbortMigrated { epoch });
            }
            Completion::VmCreated(Ok(())) => {
                out.push(Effect::StopVm { epoch, side: Side::Destination });
                out.push(Effect::AbortMigrated { epoch });
            }
            Completion::VmInitialized(Ok(())) | Completion::Saved(Ok(_)) => {
                out.push(Effect::Thaw { epoch });
            }
            Completion::VmInitialized(Err(_))
            | Completion::Saved(Err(_))
            | Completion::Imported(Err(_))
            | Completion::ContainerPatched { result: Err(_), .. }
            | Completion::VmCreated(Err(_))
            | Completion::SocketAdopted { result: Err(_), .. }
            | Completion::TransferProgressed(_)
            | Completion::BlackoutStarted { .. }
            | Completion::TransferCompleted { .. }
            | Completion::TransferFailed(_)
            | Completion::TransferInDoubt(_)
            | Completion::CancelDone(_)
            | Completion::Resumed(_)
            | Completion::Stopped(_) => {}
        }
    }

    fn initialized(&mut self, now: Moment, result: Result<(), Refusal>, out: &mut Out) {
        match self.take() {
            State::SourcePrepared { of, step: Export::Initializing, mut pending } => match result {
                Ok(()) => {
                    pending.deadline = now.after(self.limits.export);
                    out.push(Effect::Save { epoch: of.epoch });
                    self.state = State::SourcePrepared { of, step: Export::Saving, pending };
                }
                Err(refusal) => {
                    // Nothing was begun: still Idle, and the caller may try again.
                    out.push(Effect::Thaw { epoch: of.epoch });
                    out.push(Effect::EndNotifications { epoch: of.epoch });
                    out.push(Effect::Reply(pending.call, Err(refusal)));
                }
            },
            other => {
                self.state = other;
                self.rethaw(out);
            }
        }
    }

    /// A freeze that ended after the source had been given back to its user.
    fn rethaw(&self, out: &mut Out) {
        if let Some(of) = self.state.of()
            && of.side == Side::Source
            && (of.machine == Machine::Running || of.died_here())
        {
            out.push(Effect::Thaw { epoch: of.epoch });
        }
    }

    fn saved(&mut self, result: Result<Saved, Refusal>, out: &mut Out) {
        match (self.take(), result) {
            (State::SourcePrepared { mut of, step: Export::Saving, pending }, Ok(saved)) => {
                of.streams.expected = streams(saved.disks);
                let answer = Answer::Exported { config: saved.config, sandbox_state: saved.sandbox_state };
                out.push(Effect::Reply(pending.call, Ok(answer)));
                self.state = State::SourceExported { of };
            }
            (state @ State::SourcePrepared { step: Export::Saving, .. }, Err(refusal)) => {
                self.state = state;
                self.fail(&refusal, None, out);
            }
            (other, _) => {
                self.state = other;
                self.rethaw(out);
            }
        }
    }

    fn imported(&mut self, result: Result<Imported, Refusal>, out: &mut Out) {
        match (self.take(), result) {
            (
                State::DestinationImported { mut of, arrival: Arrival::Importing(pending), mut roster },
                Ok(imported),
            ) => {
                of.streams.expected = streams(imported.disks);
                roster.waiting = imported.containers;
                out.push(Effect::Reply(pending.call, Ok(Answer::Empty)));
                self.state = State::DestinationImported { of, arrival: Arrival::Settled, roster };
            }
            (State::DestinationImported { of, arrival: Arrival::Importing(pending), .. }, Err(refusal)) => {
                out.push(Effect::EndNotifications { epoch: of.epoch });
                out.push(Effect::Reply(pending.call, Err(refusal)));
            }
            (other, result) => {
                if let (Some(of), Ok(_)) = (other.of(), result) {
                    out.push(Effect::AbortMigrated { epoch: of.epoch });
                }
                self.state = other;
            }
        }
    }

    fn vm_created(&mut self, result: Result<(), Refusal>, out: &mut Out) {
        match self.take() {
            State::DestinationImported { mut of, arrival: Arrival::Creating(pending), roster } => {
                match result {
                    Ok(()) => {
                        out.push(Effect::Reply(pending.call, Ok(Answer::Empty)));
                        self.state = State::DestinationPrepared { of };
                    }
                    Err(refusal) => {
                        of.machine = Machine::Absent;
                        out.push(Effect::Reply(pending.call, Err(refusal)));
                        self.state = State::DestinationImported { of, arrival: Arrival::Settled, roster };
                    }
                }
            }
            mut other => {
                // Cancelled or overdue while it was being made.
                if let Some(of) = other.of_mut()
                    && result.is_ok()
                    && of.side == Side::Destination
                {
                    of.machine = Machine::Frozen;
                    of.stopping = true;
                    out.push(Effect::StopVm { epoch: of.epoch, side: Side::Destination });
                    out.push(Effect::AbortMigrated { epoch: of.epoch });
                }
                self.state = other;
            }
        }
    }

    fn adopted(&mut self, stream: Stream, result: Result<(), Refusal>, out: &mut Out) {
        let Some(of) = self.state.of_mut() else { return };
        let Some(pending) = of.streams.coming.remove(&stream) else {
            // Given up meanwhile: the session does not transfer any more.
            if result.is_ok() {
                out.push(Effect::CloseSockets { epoch: of.epoch });
            }
            return;
        };
        match result {
            Ok(()) => {
                out.push(Effect::Reply(pending.call, Ok(Answer::Empty)));
                self.socket_here(stream, out);
            }
            Err(refusal) => {
                out.push(Effect::Reply(pending.call, Err(refusal.clone())));
                self.fail(&refusal, None, out);
            }
        }
    }

    fn cancel_done(&mut self, now: Moment, result: Result<Cancelled, Refusal>, out: &mut Out) {
        let (mut of, calls) = match self.take() {
            State::Cancelling { of, calls, .. } => (of, calls),
            other => {
                self.state = other;
                return;
            }
        };
        let answer = match &result {
            Ok(Cancelled::InTime) => Ok(Answer::Empty),
            Ok(Cancelled::AlreadyCompleted) => Err(Refusal::precondition(format!(
                "Cancel: {ALREADY_COMPLETED}; FinalizeSandbox decides which side runs"
            ))),
            Err(refusal) => Err(refusal.clone()),
        };
        for call in calls {
            out.push(Effect::Reply(call, answer.clone()));
        }
        match result {
            Ok(Cancelled::InTime) => {
                of.sending = false;
                if of.side == Side::Destination {
                    of.machine = match of.machine {
                        Machine::Absent => Machine::Absent,
                        Machine::Frozen | Machine::Running | Machine::Gone => Machine::Gone,
                    };
                    out.push(Effect::AbortMigrated { epoch: of.epoch });
                }
                if of.died_here() {
                    out.push(Effect::Thaw { epoch: of.epoch });
                }
                out.push(Effect::CloseSockets { epoch: of.epoch });
                notify(&of, Phase::Failed, PhaseState::Cancelled, Detail::None, out);
                self.state = State::Cancelled { of, ending: None };
            }
            Ok(Cancelled::AlreadyCompleted) => {
                of.completed = true;
                self.state = State::Cancelled { of, ending: None };
            }
            Err(refusal) => {
                of.doubt(now);
                out.push(Effect::CloseSockets { epoch: of.epoch });
                self.state = State::Cancelled { of, ending: None };
                self.fail(&refusal, None, out);
            }
        }
    }

    fn resumed(&mut self, now: Moment, result: Result<(), Refusal>, out: &mut Out) {
        let ending = self.state.ending();
        if let (Ok(()), Some(of)) = (&result, self.state.of_mut())
            && of.machine != Machine::Gone
        {
            of.machine = Machine::Running;
        }
        if ending.is_some_and(|ending| ending.action == Action::Stop) {
            // The end of a RESUME that was overdue; the STOP under way has the last word.
            return;
        }
        self.state.set_ending(None);
        match result {
            Ok(()) => {
                if self.state.of().is_none_or(|of| of.machine != Machine::Running || of.stopping) {
                    if let Some(ending) = ending {
                        let refusal = Refusal::precondition(
                            "FinalizeSandbox(RESUME): the virtual machine ended meanwhile; FinalizeSandbox(STOP)",
                        );
                        out.push(Effect::Reply(ending.pending.call, Err(refusal)));
                    }
                    return;
                }
                if let Some(of) = self.state.of()
                    && matches!(
                        self.state.id(),
                        StateId::TransferCompleted | StateId::Cancelled | StateId::Failed
                    )
                    && let Some(since) = of.blackout
                {
                    let detail = Detail::Blackout(now.since(since));
                    notify(of, Phase::BlackoutExited, PhaseState::Success, detail, out);
                }
                self.ended(Action::Resume, out);
                if let Some(ending) = ending {
                    out.push(Effect::Reply(ending.pending.call, Ok(Answer::Empty)));
                }
            }
            Err(refusal) => {
                if let Some(ending) = ending {
                    out.push(Effect::Reply(ending.pending.call, Err(refusal)));
                }
            }
        }
    }

    fn stopped(&mut self, result: Result<(), Refusal>, out: &mut Out) {
        let ending = self.state.ending().filter(|ending| ending.action == Action::Stop);
        if ending.is_some() {
            self.state.set_ending(None);
        }
        match result {
            Ok(()) => {
                let Some(of) = self.state.of_mut() else { return };
                of.machine = Machine::Gone;
                let destination = of.side == Side::Destination;
                if let Some(ending) = ending {
                    out.push(Effect::Reply(ending.pending.call, Ok(Answer::Empty)));
                    self.ended(Action::Stop, out);
                } else if destination && let Some(of) = self.state.of() {
                    out.push(Effect::AbortMigrated { epoch: of.epoch });
                }
            }
            Err(refusal) => {
                if let Some(ending) = ending {
                    out.push(Effect::Reply(ending.pending.call, Err(refusal)));
                }
            }
        }
    }

    pub(super) fn vm_exited(&mut self, out: &mut Out) {
        let at = self.state.id();
        let ending = self.state.ending();
        let Some(of) = self.state.of_mut() else { return };
        let side = of.side;
        let had_run = of.machine == Machine::Running;
        of.machine = Machine::Gone;
        let exited = Refusal::new(
            Code::FailedPrecondition,
            "the virtual machine exited during the move; look at qemu.log of this sandbox",
        );
        let state = match side {
            Side::Source => PhaseState::GuestInitiatedCancellation,
            Side::Destination => PhaseState::DestinationFailed,
        };
        match at {
            // A stop or a cancellation under way is told by its own end.
            StateId::Idle | StateId::Finalized | StateId::Cancelling => {}
            StateId::TransferCompleted | StateId::Cancelled | StateId::Failed => {
                match ending {
                    Some(ending) if ending.action == Action::Stop => return,
                    Some(ending) => {
                        self.state.set_ending(None);
                        out.push(Effect::Reply(ending.pending.call, Err(exited.clone())));
                    }
                    None => {}
                }
                if side == Side::Destination && !had_run {
                    if at == StateId::TransferCompleted {
                        self.fail(&exited, Some(state), out);
                    } else if let Some(of) = self.state.of() {
                        out.push(Effect::AbortMigrated { epoch: of.epoch });
                    }
                }
                // A source whose transfer completed has nothing more to give: the move goes on without it, and says
                // what has become of its tasks.
                if let Some(of) = self.state.of().filter(|of| of.died_here()) {
                    out.push(Effect::Thaw { epoch: of.epoch });
                }
            }
            StateId::SourcePrepared
            | StateId::SourceExported
            | StateId::DestinationImported
            | StateId::DestinationPrepared
            | StateId::SocketWaiting
            | StateId::SocketReady
            | StateId::Transferring => self.fail(&exited, Some(state), out),
        }
    }
}

fn streams(disks: std::collections::BTreeSet<Slot>) -> std::collections::BTreeSet<Stream> {
    disks.into_iter().map(Stream::Disk).collect()
}
