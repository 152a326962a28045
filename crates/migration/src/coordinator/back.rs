//! The way back to the source.

use super::{Cause, Coordinator, Effect, Ended, FailureKind, Job, Out, Phase, State, TooLate, Trouble, Work};
use crate::Moment;

/// A move that is being undone.
#[derive(Debug)]
pub(super) struct Undo {
    destination: DestinationLeg,
    source: SourceLeg,
    hold: Hold,
}

/// What must be known of the destination before the source resumes.
#[derive(Debug, Clone, Copy)]
enum Hold {
    /// It was never told to run, nor is there a record that would let it be told: its word is welcome, but
    /// awaited only until then.
    NeverRan(Moment),
    /// A record may exist: only the certainty that it is stopped.
    MustConfirm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DestinationLeg {
    /// Nothing is there, or all of it was seen gone.
    Clear,
    Aborting,
    /// It did not confirm in time and had never been told to run.
    GivenUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceLeg {
    Cancelling,
    /// Ready to resume as soon as the destination allows it.
    Waiting,
    Resuming,
    CleaningUp,
    /// Runs as before, with every API back.
    Settled,
}

impl Undo {
    pub(super) fn deadline(&self) -> Option<Moment> {
        match (self.hold, self.destination) {
            (Hold::NeverRan(until), DestinationLeg::Aborting) => Some(until),
            (Hold::NeverRan(_), DestinationLeg::Clear | DestinationLeg::GivenUp) | (Hold::MustConfirm, _) => {
                None
            }
        }
    }
}

impl Coordinator {
    pub(super) fn cancel_answer(&self) -> Result<(), TooLate> {
        match self.phase() {
            Phase::Planned
            | Phase::Preflight
            | Phase::Export
            | Phase::Import
            | Phase::CreateTasks
            | Phase::Prepare
            | Phase::Connect
            | Phase::Transfer
            | Phase::Aborting
            | Phase::RolledBack => Ok(()),
            phase @ (Phase::Commit
            | Phase::Run
            | Phase::StopSource
            | Phase::CleanUp
            | Phase::Done
            | Phase::Failed) => Err(TooLate { phase }),
        }
    }

    pub(super) fn cancel(&mut self, now: Moment, out: &mut Out) {
        let answer = self.cancel_answer();
        out.push(Effect::CancelAnswer(answer));
        if answer.is_ok() && !matches!(self.state, State::Aborting(_)) {
            self.abort(now, Cause::Cancelled { phase: self.phase() }, out);
        }
    }

    pub(super) fn peer_lost(&mut self, now: Moment, message: String, out: &mut Out) {
        let cause = Cause::PeerLost { message };
        match &mut self.state {
            State::Preflight
            | State::Export
            | State::Import
            | State::CreateTasks
            | State::Prepare
            | State::Connect
            | State::Transfer(_) => {
                self.abort(now, cause, out);
                self.give_up_destination(now, out);
            }
            State::Aborting(_) => self.give_up_destination(now, out),
            // Decided: it is asked again until it answers.
            State::Commit | State::Run => {
                self.facts.cause = Some(cause);
                out.push(Effect::Report(self.report(now)));
            }
            State::Planned | State::StopSource | State::CleanUp | State::Ended(_) => {}
        }
    }

    /// Before the decision: undo everything that was begun.
    pub(super) fn abort(&mut self, now: Moment, cause: Cause, out: &mut Out) {
        self.facts.cause = Some(cause);
        self.abandon_all(out);
        let undo = Undo {
            destination: match self.facts.destination_touched {
                true => DestinationLeg::Aborting,
                false => DestinationLeg::Clear,
            },
            source: match self.facts.source_touched {
                true => SourceLeg::Cancelling,
                false => SourceLeg::Settled,
            },
            hold: Hold::NeverRan(now.after(self.deadlines.abort)),
        };
        self.enter(now, State::Aborting(undo), out);
        // Both at once: a cancelled source goes on by itself, and must not wait for a silent peer.
        if self.facts.source_touched {
            self.begin(now, Work::SourceCancel, out);
        }
        if self.facts.destination_touched {
            self.begin(now, Work::DestinationAbort, out);
        }
        self.undo_on(now, out);
    }

    /// The record may or may not exist, and the destination was never told to run.
    pub(super) fn take_back_commit(&mut self, now: Moment, out: &mut Out) {
        self.abandon_all(out);
        let undo = Undo {
            destination: DestinationLeg::Aborting,
            source: SourceLeg::Waiting,
            hold: Hold::MustConfirm,
        };
        self.enter(now, State::Aborting(undo), out);
        self.begin(now, Work::DestinationAbort, out);
    }

    /// The destination's guest does not run and never will.
    pub(super) fn confirmed_stopped(&mut self, now: Moment, out: &mut Out) {
        match &mut self.state {
            State::Run => {
                self.abandon_all(out);
                let undo = Undo {
                    destination: DestinationLeg::Clear,
                    source: SourceLeg::Waiting,
                    hold: Hold::MustConfirm,
                };
                self.enter(now, State::Aborting(undo), out);
                self.undo_on(now, out);
            }
            State::Aborting(undo) => {
                undo.destination = DestinationLeg::Clear;
                self.drop_destination_jobs(out);
                self.undo_on(now, out);
            }
            // Seen running, not decided, or over: not for an outsider to say.
            State::Planned
            | State::Preflight
            | State::Export
            | State::Import
            | State::CreateTasks
            | State::Prepare
            | State::Connect
            | State::Transfer(_)
            | State::Commit
            | State::StopSource
            | State::CleanUp
            | State::Ended(_) => {}
        }
    }

    pub(super) fn undo_overdue(&mut self, now: Moment, out: &mut Out) {
        if let State::Aborting(Undo { hold: Hold::NeverRan(until), .. }) = &self.state
            && *until <= now
        {
            self.give_up_destination(now, out);
        }
    }

    fn give_up_destination(&mut self, now: Moment, out: &mut Out) {
        let State::Aborting(undo) = &mut self.state else { return };
        if let (Hold::NeverRan(_), DestinationLeg::Aborting) = (undo.hold, undo.destination) {
            undo.destination = DestinationLeg::GivenUp;
            self.drop_destination_jobs(out);
            self.facts.leftovers.push(
                "the destination did not confirm its abort; it was never told to run; remove the arriving \
                 sandbox there when it is back"
                    .to_owned(),
            );
            self.undo_on(now, out);
        }
    }

    fn drop_destination_jobs(&mut self, out: &mut Out) {
        self.jobs.retain(|job| {
            if job.work != Work::DestinationAbort {
                return true;
            }
            if let super::Status::Running(step, _) = job.status {
                out.push(Effect::Abandon(step));
            }
            false
        });
    }

    pub(super) fn undo_ended(&mut self, now: Moment, job: Job, ended: Ended, out: &mut Out) {
        match job.work {
            Work::DestinationAbort => self.abort_ended(now, job, ended, out),
            Work::SourceCancel => self.cancel_ended(now, job, ended),
            Work::SourceResume { .. } => self.resume_ended(now, job, ended, out),
            Work::SourceCleanup => self.source_cleaned(now, job, ended),
            // Nothing else is begun on the way back.
            Work::Preflight
            | Work::SourceExport
            | Work::DestinationImport { .. }
            | Work::DestinationCreateTasks
            | Work::DestinationPrepare
            | Work::ConnectStreams { .. }
            | Work::SourceTransfer
            | Work::DestinationTransfer
            | Work::Record(_)
            | Work::DestinationRun { .. }
            | Work::SourceStop
            | Work::SourceRemoveContainerdObjects
            | Work::DestinationCleanup => {}
        }
        self.undo_on(now, out);
    }

    fn set_source(&mut self, leg: SourceLeg) {
        if let State::Aborting(undo) = &mut self.state {
            undo.source = leg;
        }
    }

    fn abort_ended(&mut self, now: Moment, job: Job, ended: Ended, out: &mut Out) {
        let State::Aborting(undo) = &mut self.state else { return };
        match (ended.map_err(|trouble| trouble.kind), undo.hold) {
            // Without a session: an earlier abort, whose answer was lost, has cleaned up.
            (Ok(_) | Err(FailureKind::Gone | FailureKind::NoSession), _) => {
                undo.destination = DestinationLeg::Clear;
            }
            // Somebody else told it to run: then this side must not.
            (Err(FailureKind::Runs), Hold::MustConfirm) => self.runs_there(now, out),
            (Err(FailureKind::Runs), Hold::NeverRan(_)) => {
                self.facts.leftovers.push(
                    "the destination's guest runs although this move never told it to; stop one of the two by hand"
                        .to_owned(),
                );
                self.end(now, Phase::Failed, out);
            }
            (Err(FailureKind::Refused | FailureKind::Silent), Hold::NeverRan(_) | Hold::MustConfirm) => {
                self.retry(now, job)
            }
        }
    }

    fn cancel_ended(&mut self, now: Moment, job: Job, ended: Ended) {
        match ended.map_err(|trouble| trouble.kind) {
            Ok(_) => self.set_source(SourceLeg::Waiting),
            // An export without an answer may still be on its way to the shim: look again.
            Err(FailureKind::NoSession) if !self.facts.export_answered && job.attempt < 3 => {
                self.retry(now, job);
            }
            // The export never took hold: the source is as it was.
            Err(FailureKind::NoSession) => self.set_source(SourceLeg::Settled),
            // The resume will tell what can be done.
            Err(FailureKind::Gone) => self.set_source(SourceLeg::Waiting),
            Err(FailureKind::Refused | FailureKind::Silent | FailureKind::Runs) => {
                if job.attempt + 1 < self.deadlines.resume_attempts {
                    self.retry(now, job);
                } else {
                    self.set_source(SourceLeg::Waiting);
                }
            }
        }
    }

    fn resume_ended(&mut self, now: Moment, job: Job, ended: Ended, out: &mut Out) {
        match ended {
            Ok(_) => {
                self.guest_runs(now);
                self.set_source(SourceLeg::CleaningUp);
                self.begin(now, Work::SourceCleanup, out);
            }
            // Resumed and cleaned up already, by an attempt whose answer was lost.
            Err(Trouble { kind: FailureKind::NoSession, .. }) => {
                self.guest_runs(now);
                self.set_source(SourceLeg::Settled);
            }
            Err(trouble) => {
                let gone = trouble.kind == FailureKind::Gone;
                if !gone && job.attempt + 1 < self.deadlines.resume_attempts {
                    return self.retry(now, job);
                }
                self.facts.leftovers.push(format!(
                    "the source could not be resumed ({}); its paused machine, if any, is kept: look at its \
                     shim.log, then resume or stop it by hand",
                    trouble.cause
                ));
                self.end(now, Phase::Failed, out);
            }
        }
    }

    fn source_cleaned(&mut self, now: Moment, job: Job, ended: Ended) {
        match ended {
            Err(trouble)
                if !matches!(trouble.kind, FailureKind::NoSession | FailureKind::Gone)
                    && job.attempt + 1 < self.deadlines.attempts =>
            {
                self.retry(now, job);
            }
            Err(trouble) if !matches!(trouble.kind, FailureKind::NoSession | FailureKind::Gone) => {
                self.facts.leftovers.push(trouble.cause.to_string());
                self.set_source(SourceLeg::Settled);
            }
            Ok(_) | Err(_) => self.set_source(SourceLeg::Settled),
        }
    }

    /// Goes as far as what is known allows.
    fn undo_on(&mut self, now: Moment, out: &mut Out) {
        let State::Aborting(undo) = &mut self.state else { return };
        if undo.source == SourceLeg::Waiting && undo.destination != DestinationLeg::Aborting {
            undo.source = SourceLeg::Resuming;
            // True in each case that leads here: the destination was seen stopped, or it was never told to
            // run and this move, which alone could, never will.
            self.begin(now, Work::SourceResume { destination_stopped: true }, out);
            return;
        }
        if undo.source == SourceLeg::Settled && undo.destination != DestinationLeg::Aborting {
            self.end(now, Phase::RolledBack, out);
        }
    }
}
