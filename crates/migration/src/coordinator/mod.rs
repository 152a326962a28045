//! One whole move, on the source's node.
//!
//! ```text
//!  Planned → Preflight → Export → Import → CreateTasks → Prepare → Connect → Transfer
//!                                     │ (anything wrong, or Cancel)             │ both DONE
//!                                     v                                         v
//!                  RolledBack ← Aborting ←──── not recorded for certain ──── Commit
//!                      Failed ←    ^                                            │ recorded
//!                                  └─── the destination is confirmed stopped ── Run
//!                                                                               │ it runs
//!                                       Done ← CleanUp ← StopSource ←───────────┘
//! ```
//!
//! What holds in every order of events:
//! * `DestinationRun` is begun only after `Record(Committed)` ended well.
//! * `SourceResume` is begun only when no `DestinationRun` ever was and no record may exist, or when the
//!   destination is confirmed stopped.
//! * `SourceStop` is begun only after the destination was seen running.
//! * Before the decision every wait ends by itself; after it, the only wait without an end is the one for a
//!   destination that neither runs nor can be confirmed stopped, and
//!   [`Event::DestinationConfirmedStopped`] ends that one.
//!
//! Work that its deadline overtook is abandoned and begun anew under another [`StepId`]; the shims take
//! repeats for what they are.

mod back;
mod deadlines;
mod forward;
mod messages;

#[cfg(test)]
mod tests;

use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::ids::Slot;

pub use deadlines::Deadlines;
pub use messages::{
    Cause, Effect, Event, Failure, FailureKind, Outcome, Phase, Record, Report, StepId, TooLate, Work,
};

use crate::notice::{Detail, Notice, Phase as Told, Progress};
use crate::{Effects, Moment};
use back::Undo;
use forward::Transfer;

pub(crate) type Out = Effects<Effect>;

/// One move from its first check to its clean-up.
#[derive(Debug)]
pub struct Coordinator {
    deadlines: Deadlines,
    state: State,
    jobs: Vec<Job>,
    last_step: u64,
    armed: Option<Moment>,
    facts: Facts,
}

#[derive(Debug)]
enum State {
    Planned,
    Preflight,
    Export,
    Import,
    CreateTasks,
    Prepare,
    Connect,
    Transfer(Transfer),
    Commit,
    Run,
    StopSource,
    CleanUp,
    Aborting(Undo),
    Ended(Phase),
}

/// A piece of work until it is settled.
#[derive(Debug)]
struct Job {
    work: Work,
    /// Counts from 0.
    attempt: u32,
    status: Status,
}

#[derive(Debug, Clone, Copy)]
enum Status {
    Running(StepId, Moment),
    Pausing(Moment),
}

/// How a piece of work ended.
type Ended = Result<Outcome, Trouble>;

#[derive(Debug, Clone)]
struct Trouble {
    kind: FailureKind,
    cause: Cause,
}

#[derive(Debug, Default)]
struct Facts {
    started: Moment,
    saved: Option<(Any, Vec<Slot>)>,
    /// What the source's DONE carried; the destination gets it with each attempt to run.
    handoff: Option<Any>,
    source_touched: bool,
    /// The export was answered, with yes or no: it cannot take hold later.
    export_answered: bool,
    destination_touched: bool,
    blackout_since: Option<Moment>,
    blackout: Option<Duration>,
    progress: Progress,
    cause: Option<Cause>,
    leftovers: Vec<String>,
}

impl Coordinator {
    /// Planned; nothing happens before [`Event::Start`].
    pub fn new(deadlines: Deadlines) -> Coordinator {
        Coordinator {
            deadlines,
            state: State::Planned,
            jobs: Vec::new(),
            last_step: 0,
            armed: None,
            facts: Facts::default(),
        }
    }

    /// Where the move is.
    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Planned => Phase::Planned,
            State::Preflight => Phase::Preflight,
            State::Export => Phase::Export,
            State::Import => Phase::Import,
            State::CreateTasks => Phase::CreateTasks,
            State::Prepare => Phase::Prepare,
            State::Connect => Phase::Connect,
            State::Transfer(_) => Phase::Transfer,
            State::Commit => Phase::Commit,
            State::Run => Phase::Run,
            State::StopSource => Phase::StopSource,
            State::CleanUp => Phase::CleanUp,
            State::Aborting(_) => Phase::Aborting,
            State::Ended(phase) => *phase,
        }
    }

    /// How the move stands at `now`.
    pub fn report(&self, now: Moment) -> Report {
        Report {
            phase: self.phase(),
            total: now.since(self.facts.started),
            blackout: self.facts.blackout,
            memory_bytes: self.facts.progress.memory_sent,
            memory_remaining: self.facts.progress.memory_remaining,
            disk_bytes: self.facts.progress.disk_sent,
            passes: self.facts.progress.passes,
            cause: self.facts.cause.clone(),
            leftovers: self.facts.leftovers.clone(),
        }
    }

    /// What happened at `now`; what to do about it.
    pub fn step(&mut self, now: Moment, event: Event) -> Effects<Effect> {
        let mut out = Effects::none();
        if self.phase().is_final() {
            if event == Event::Cancel {
                out.push(Effect::CancelAnswer(self.cancel_answer()));
            }
            return out;
        }
        match event {
            Event::Start => self.start(now, &mut out),
            Event::StepDone(step, outcome) => self.step_ended(now, step, Ok(outcome), &mut out),
            Event::StepFailed(step, failure) => self.step_ended(now, step, Err(failure), &mut out),
            Event::SourceNotification(notice) => self.source_told(now, &notice, &mut out),
            Event::DestinationNotification(notice) => self.destination_told(now, &notice, &mut out),
            Event::PeerLost(message) => self.peer_lost(now, message, &mut out),
            Event::Cancel => self.cancel(now, &mut out),
            Event::DestinationConfirmedStopped => self.confirmed_stopped(now, &mut out),
            Event::Tick => {
                self.armed = None;
                self.tick(now, &mut out);
            }
        }
        let deadline = self.next_deadline();
        if deadline != self.armed {
            self.armed = deadline;
            if let Some(moment) = deadline {
                out.push(Effect::WakeAt(moment));
            }
        }
        out
    }

    // Work

    fn begin(&mut self, now: Moment, work: Work, out: &mut Out) {
        self.begin_attempt(now, work, 0, out);
    }

    fn begin_attempt(&mut self, now: Moment, work: Work, attempt: u32, out: &mut Out) {
        self.last_step += 1;
        let step = StepId(self.last_step);
        let deadline = now.after(self.limit(&work));
        out.push(Effect::Begin(step, work.clone()));
        self.jobs.push(Job { work, attempt, status: Status::Running(step, deadline) });
    }

    /// The same work again after a pause that grows.
    fn retry(&mut self, now: Moment, job: Job) {
        let until = now.after(self.deadlines.pause(job.attempt));
        let attempt = job.attempt.saturating_add(1);
        self.jobs.push(Job { attempt, status: Status::Pausing(until), ..job });
    }

    fn abandon_all(&mut self, out: &mut Out) {
        for job in self.jobs.drain(..) {
            if let Status::Running(step, _) = job.status {
                out.push(Effect::Abandon(step));
            }
        }
    }

    fn step_ended(&mut self, now: Moment, step: StepId, result: Result<Outcome, Failure>, out: &mut Out) {
        let running = |job: &Job| matches!(job.status, Status::Running(id, _) if id == step);
        let Some(at) = self.jobs.iter().position(running) else {
            return;
        };
        let job = self.jobs.swap_remove(at);
        let work = job.work.name();
        if job.work == Work::SourceExport {
            self.facts.export_answered =
                !matches!(&result, Err(failure) if failure.kind == FailureKind::Silent);
        }
        let ended = result.map_err(|failure| Trouble {
            kind: failure.kind,
            cause: Cause::StepFailed { work, kind: failure.kind, message: failure.message },
        });
        self.job_ended(now, job, ended, out);
    }

    fn tick(&mut self, now: Moment, out: &mut Out) {
        let due = |job: &Job| match job.status {
            Status::Running(_, deadline) => deadline <= now,
            Status::Pausing(until) => until <= now,
        };
        while let Some(at) = self.jobs.iter().position(due) {
            let job = self.jobs.swap_remove(at);
            match job.status {
                Status::Pausing(_) => self.begin_attempt(now, job.work, job.attempt, out),
                Status::Running(step, _) => {
                    out.push(Effect::Abandon(step));
                    let cause = Cause::StepOverdue { work: job.work.name(), limit: self.limit(&job.work) };
                    let trouble = Trouble { kind: FailureKind::Silent, cause };
                    self.job_ended(now, job, Err(trouble), out);
                }
            }
            if self.phase().is_final() {
                return;
            }
        }
        self.phase_overdue(now, out);
    }

    fn job_ended(&mut self, now: Moment, job: Job, ended: Ended, out: &mut Out) {
        match &self.state {
            State::Aborting(_) => self.undo_ended(now, job, ended, out),
            State::Planned
            | State::Preflight
            | State::Export
            | State::Import
            | State::CreateTasks
            | State::Prepare
            | State::Connect
            | State::Transfer(_)
            | State::Commit
            | State::Run
            | State::StopSource
            | State::CleanUp => self.forward_ended(now, job, ended, out),
            State::Ended(_) => {}
        }
    }

    fn next_deadline(&self) -> Option<Moment> {
        if self.phase().is_final() {
            return None;
        }
        let jobs = self.jobs.iter().map(|job| match job.status {
            Status::Running(_, deadline) => deadline,
            Status::Pausing(until) => until,
        });
        jobs.chain(self.phase_deadline()).min()
    }

    fn phase_deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Transfer(transfer) => Some(transfer.deadline()),
            State::Aborting(undo) => undo.deadline(),
            State::Planned
            | State::Preflight
            | State::Export
            | State::Import
            | State::CreateTasks
            | State::Prepare
            | State::Connect
            | State::Commit
            | State::Run
            | State::StopSource
            | State::CleanUp
            | State::Ended(_) => None,
        }
    }

    fn phase_overdue(&mut self, now: Moment, out: &mut Out) {
        let cause = match &self.state {
            State::Transfer(transfer) => transfer.overdue(now, &self.deadlines),
            State::Aborting(_) => {
                self.undo_overdue(now, out);
                None
            }
            State::Planned
            | State::Preflight
            | State::Export
            | State::Import
            | State::CreateTasks
            | State::Prepare
            | State::Connect
            | State::Commit
            | State::Run
            | State::StopSource
            | State::CleanUp
            | State::Ended(_) => None,
        };
        if let Some(cause) = cause {
            self.abort(now, cause, out);
        }
    }

    fn limit(&self, work: &Work) -> Duration {
        let deadlines = &self.deadlines;
        match work {
            Work::Preflight => deadlines.preflight,
            Work::SourceExport => deadlines.export,
            Work::DestinationImport { .. } => deadlines.import,
            Work::DestinationCreateTasks => deadlines.create_tasks,
            Work::DestinationPrepare => deadlines.prepare,
            Work::ConnectStreams { .. } => deadlines.connect,
            Work::SourceTransfer | Work::DestinationTransfer => deadlines.begin_transfer,
            Work::Record(_) => deadlines.commit,
            Work::DestinationRun { .. } => deadlines.run,
            Work::SourceStop => deadlines.stop_source,
            Work::SourceRemoveContainerdObjects | Work::SourceCleanup | Work::DestinationCleanup => {
                deadlines.clean_up
            }
            Work::DestinationAbort | Work::SourceCancel | Work::SourceResume { .. } => deadlines.undo,
        }
    }

    // What is told

    fn source_told(&mut self, now: Moment, notice: &Notice, out: &mut Out) {
        // A shim tells its figures whether or not anything gets through.
        let mut news = notice.phase != Told::TransferInProgress;
        if let Detail::Progress(progress) | Detail::Complete { progress, .. } = &notice.detail {
            news |= self.facts.progress != *progress;
            self.facts.progress = *progress;
        }
        let State::Transfer(transfer) = &mut self.state else { return };
        if news {
            transfer.alive(now, &self.deadlines);
        }
        match notice.phase {
            Told::BlackoutStarted => {
                let already = match notice.detail {
                    Detail::Blackout(already) => already,
                    // A source of another make does not say.
                    Detail::None | Detail::Progress(_) | Detail::Complete { .. } | Detail::Cause(_) => {
                        Duration::ZERO
                    }
                };
                self.facts.blackout_since.get_or_insert(now.before(already));
                transfer.blackout(now, &self.deadlines);
            }
            Told::Done => {
                transfer.source_done = true;
                if let Detail::Complete { handoff: Some(handoff), .. } = &notice.detail {
                    self.facts.handoff.get_or_insert_with(|| handoff.clone());
                }
                self.commit_when_both_done(now, out);
            }
            Told::Failed => {
                let message = failure_text(notice);
                self.abort(now, Cause::SourceFailed { message }, out);
            }
            Told::TransferInProgress => out.push(Effect::Report(self.report(now))),
            Told::SetupDone | Told::OfflineDone | Told::BlackoutExited | Told::RecoveryDone => {}
        }
    }

    fn destination_told(&mut self, now: Moment, notice: &Notice, out: &mut Out) {
        let State::Transfer(transfer) = &mut self.state else { return };
        match notice.phase {
            Told::Done => {
                transfer.destination_done = true;
                self.commit_when_both_done(now, out);
            }
            Told::Failed => {
                let message = failure_text(notice);
                self.abort(now, Cause::DestinationFailed { message }, out);
            }
            Told::SetupDone
            | Told::TransferInProgress
            | Told::BlackoutStarted
            | Told::OfflineDone
            | Told::BlackoutExited
            | Told::RecoveryDone => {}
        }
    }

    fn enter(&mut self, now: Moment, state: State, out: &mut Out) {
        self.state = state;
        out.push(Effect::Report(self.report(now)));
    }

    fn end(&mut self, now: Moment, phase: Phase, out: &mut Out) {
        self.abandon_all(out);
        self.enter(now, State::Ended(phase), out);
    }

    fn guest_runs(&mut self, now: Moment) {
        if let Some(since) = self.facts.blackout_since {
            self.facts.blackout.get_or_insert(now.since(since));
        }
    }
}

fn failure_text(notice: &Notice) -> String {
    match &notice.detail {
        Detail::Cause(message) => message.clone(),
        Detail::None | Detail::Progress(_) | Detail::Complete { .. } | Detail::Blackout(_) => {
            format!("{:?}, without a cause in words; look at that host's shim.log", notice.state)
        }
    }
}
