//! The way to the destination.

use super::{
    Cause, Coordinator, Deadlines, Ended, Event, FailureKind, Job, Out, Outcome, Phase, Record, State,
    Trouble, Work,
};
use crate::Moment;

/// A transfer under way.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) source_done: bool,
    pub(super) destination_done: bool,
    whole: Moment,
    stall: Moment,
    blackout: Option<Moment>,
}

impl Transfer {
    fn new(now: Moment, deadlines: &Deadlines) -> Transfer {
        Transfer {
            source_done: false,
            destination_done: false,
            whole: now.after(deadlines.transfer),
            stall: now.after(deadlines.stall),
            blackout: None,
        }
    }

    pub(super) fn alive(&mut self, now: Moment, deadlines: &Deadlines) {
        self.stall = now.after(deadlines.stall);
    }

    pub(super) fn blackout(&mut self, now: Moment, deadlines: &Deadlines) {
        self.blackout.get_or_insert(now.after(deadlines.blackout));
    }

    pub(super) fn deadline(&self) -> Moment {
        let first = self.whole.min(self.stall);
        self.blackout.map_or(first, |blackout| first.min(blackout))
    }

    pub(super) fn overdue(&self, now: Moment, deadlines: &Deadlines) -> Option<Cause> {
        if self.blackout.is_some_and(|deadline| deadline <= now) {
            Some(Cause::BlackoutOverdue { limit: deadlines.blackout })
        } else if self.whole <= now {
            Some(Cause::TransferOverdue { limit: deadlines.transfer })
        } else if self.stall <= now {
            Some(Cause::Stalled { limit: deadlines.stall })
        } else {
            None
        }
    }
}

impl Coordinator {
    pub(super) fn start(&mut self, now: Moment, out: &mut Out) {
        if matches!(self.state, State::Planned) {
            self.facts.started = now;
            self.enter(now, State::Preflight, out);
            self.begin(now, Work::Preflight, out);
        }
    }

    pub(super) fn commit_when_both_done(&mut self, now: Moment, out: &mut Out) {
        let State::Transfer(Transfer { source_done: true, destination_done: true, .. }) = &self.state else {
            return;
        };
        // An answer to a Transfer call that told its end meanwhile.
        self.abandon_all(out);
        self.enter(now, State::Commit, out);
        let handoff = self.facts.handoff.clone();
        self.begin(now, Work::Record(Record::Committed { handoff }), out);
    }

    pub(super) fn forward_ended(&mut self, now: Moment, job: Job, ended: Ended, out: &mut Out) {
        let outcome = match (ended, &self.state) {
            (Ok(outcome), _) => outcome,
            (Err(trouble), State::Commit) => {
                // It may be durable all the same: from now on as if it were, without ever running there.
                self.facts.cause = Some(trouble.cause);
                return self.take_back_commit(now, out);
            }
            (Err(trouble), State::Run) => return self.run_troubled(now, job, trouble, out),
            (Err(trouble), State::StopSource | State::CleanUp) => {
                return self.clean_up_troubled(now, job, trouble, out);
            }
            (Err(trouble), _) => return self.abort(now, trouble.cause, out),
        };
        match (&self.state, job.work) {
            (State::Preflight, Work::Preflight) => {
                self.facts.source_touched = true;
                self.enter(now, State::Export, out);
                self.begin(now, Work::SourceExport, out);
            }
            (State::Export, work @ Work::SourceExport) => match outcome {
                Outcome::Exported { config, disks } => {
                    self.facts.saved = Some((config.clone(), disks));
                    self.facts.destination_touched = true;
                    self.enter(now, State::Import, out);
                    self.begin(now, Work::DestinationImport { config }, out);
                }
                Outcome::Done => self.abort(now, Cause::WrongOutcome { work: work.name() }, out),
            },
            (State::Import, Work::DestinationImport { .. }) => {
                self.enter(now, State::CreateTasks, out);
                self.begin(now, Work::DestinationCreateTasks, out);
            }
            (State::CreateTasks, Work::DestinationCreateTasks) => {
                self.enter(now, State::Prepare, out);
                self.begin(now, Work::DestinationPrepare, out);
            }
            (State::Prepare, Work::DestinationPrepare) => {
                let disks = self.facts.saved.as_ref().map(|(_, disks)| disks.clone()).unwrap_or_default();
                self.enter(now, State::Connect, out);
                self.begin(now, Work::ConnectStreams { disks }, out);
            }
            (State::Connect, Work::ConnectStreams { .. }) => {
                let transfer = Transfer::new(now, &self.deadlines);
                self.enter(now, State::Transfer(transfer), out);
                // The receiver first: it is the one that must be there.
                self.begin(now, Work::DestinationTransfer, out);
                self.begin(now, Work::SourceTransfer, out);
            }
            (State::Commit, Work::Record(Record::Committed { handoff })) => {
                self.enter(now, State::Run, out);
                self.begin(now, Work::DestinationRun { handoff }, out);
            }
            (State::Run, Work::DestinationRun { .. }) => self.runs_there(now, out),
            (State::Run, Work::DestinationAbort) => self.confirmed_stopped(now, out),
            (State::StopSource, Work::SourceStop) => self.clean_up(now, out),
            (State::CleanUp, work) => self.cleaned(now, &work, out),
            // The answers to the Transfer calls: what counts is told by notification.
            (_, _) => {}
        }
    }

    /// The destination's guest was seen running.
    pub(super) fn runs_there(&mut self, now: Moment, out: &mut Out) {
        self.guest_runs(now);
        self.abandon_all(out);
        self.enter(now, State::StopSource, out);
        self.begin(now, Work::SourceStop, out);
    }

    /// Decided, and the destination does not run yet: again, unless it can be seen stopped.
    fn run_troubled(&mut self, now: Moment, job: Job, trouble: Trouble, out: &mut Out) {
        // It does, and the answer that said so was lost.
        if let (Work::DestinationAbort, FailureKind::Runs) = (&job.work, trouble.kind) {
            return self.runs_there(now, out);
        }
        self.facts.cause = Some(trouble.cause);
        let attempt = job.attempt;
        match (&job.work, trouble.kind) {
            // Without a session: an earlier abort, whose answer was lost, has cleaned up.
            (Work::DestinationAbort, FailureKind::Gone | FailureKind::NoSession) => {
                self.confirmed_stopped(now, out);
            }
            (Work::DestinationRun { .. }, FailureKind::Silent) => self.retry(now, job),
            // It answered that it cannot: then it must be certain that it does not.
            (Work::DestinationRun { .. }, _) => self.begin_attempt(now, Work::DestinationAbort, attempt, out),
            (_, _) => {
                let handoff = self.facts.handoff.clone();
                self.retry(now, Job { work: Work::DestinationRun { handoff }, ..job });
            }
        }
        if !self.phase().is_final() {
            out.push(super::Effect::Report(self.report(now)));
        }
    }

    fn clean_up(&mut self, now: Moment, out: &mut Out) {
        self.enter(now, State::CleanUp, out);
        self.begin(now, Work::SourceCleanup, out);
        self.begin(now, Work::DestinationCleanup, out);
    }

    fn cleaned(&mut self, now: Moment, work: &Work, out: &mut Out) {
        if *work == Work::SourceCleanup {
            self.begin(now, Work::SourceRemoveContainerdObjects, out);
        }
        if self.jobs.is_empty() {
            self.end(now, Phase::Done, out);
        }
    }

    fn clean_up_troubled(&mut self, now: Moment, job: Job, trouble: Trouble, out: &mut Out) {
        match trouble.kind {
            FailureKind::Gone | FailureKind::NoSession => {}
            FailureKind::Refused | FailureKind::Silent | FailureKind::Runs => {
                if job.attempt + 1 < self.deadlines.attempts {
                    return self.retry(now, job);
                }
                self.facts.leftovers.push(trouble.cause.to_string());
            }
        }
        match self.state {
            State::StopSource => self.clean_up(now, out),
            _ => self.cleaned(now, &job.work, out),
        }
    }
}

/// What a test or a replay needs: an event's name.
impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Event::Start => f.write_str("start"),
            Event::StepDone(step, _) => write!(f, "step {} done", step.0),
            Event::StepFailed(step, failure) => write!(f, "step {} failed: {}", step.0, failure.message),
            Event::SourceNotification(notice) => write!(f, "source told {:?}", notice.phase),
            Event::DestinationNotification(notice) => write!(f, "destination told {:?}", notice.phase),
            Event::PeerLost(message) => write!(f, "peer lost: {message}"),
            Event::Cancel => f.write_str("cancel"),
            Event::DestinationConfirmedStopped => f.write_str("destination confirmed stopped"),
            Event::Tick => f.write_str("tick"),
        }
    }
}
