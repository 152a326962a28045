//! Carries out what the coordinator decides: each piece of work a task, each end an event.
//!
//! The coordinator holds every deadline and every decision; nothing here knows what a phase is
//! for, except that a final one is the last.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use dunlin_migration::Moment;
use dunlin_migration::coordinator::{
    Coordinator, Effect, Event, Failure, FailureKind, Outcome, Report, StepId, TooLate, Work,
};
use dunlin_migration::notice::{Detail, Progress};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

/// Notifications that may wait for the coordinator.
pub(crate) const EVENTS: usize = 256;
/// Cancels that may wait for it.
pub(crate) const CANCELS: usize = 4;

/// Who does the work: shims, nodes and containerd, or a test.
#[async_trait]
pub(crate) trait Carrier: Send + Sync + 'static {
    /// Does `work` once. May be dropped at any await; notifications go to `events`.
    async fn carry(&self, work: Work, events: &mpsc::Sender<Event>) -> Result<Outcome, Failure>;
}

/// Who is told.
pub(crate) trait Audience: Send {
    /// The move entered a phase, or its figures changed.
    fn report(&mut self, report: &Report);
    /// The source's shim read its counters.
    fn progress(&mut self, progress: &Progress);
}

/// A request to turn back, with the way to answer it.
pub(crate) type CancelRequest = oneshot::Sender<Result<(), TooLate>>;

/// Runs one move to its end and answers with its last report.
pub(crate) async fn drive(
    mut coordinator: Coordinator,
    carrier: Arc<dyn Carrier>,
    mut cancels: mpsc::Receiver<CancelRequest>,
    audience: &mut dyn Audience,
) -> Report {
    let begun = Instant::now();
    let (events, mut heard) = mpsc::channel(EVENTS);
    let mut work = Running::default();
    let mut wake: Option<Instant> = None;
    let mut asker: Option<CancelRequest> = None;
    let mut next = Event::Start;
    loop {
        if let Event::SourceNotification(notice) = &next
            && let Detail::Progress(progress) | Detail::Complete { progress, .. } = &notice.detail
        {
            audience.progress(progress);
        }
        let mut last = None;
        for effect in coordinator.step(Moment(begun.elapsed()), next) {
            match effect {
                Effect::Begin(step, what) => work.begin(step, what, &carrier, &events),
                Effect::Abandon(step) => work.abandon(step),
                Effect::Report(report) => {
                    audience.report(&report);
                    last = report.phase.is_final().then_some(report);
                }
                Effect::CancelAnswer(answer) => {
                    if let Some(asker) = asker.take() {
                        let _ = asker.send(answer);
                    }
                }
                Effect::WakeAt(moment) => wake = begun.checked_add(moment.0),
            }
        }
        if let Some(report) = last {
            return report;
        }
        next = loop {
            tokio::select! {
                // Ends before news: a phase's last notification and its end may arrive together.
                biased;
                ended = work.ended(), if !work.is_empty() => {
                    // Nothing when it was abandoned before.
                    if let Some(event) = ended {
                        break event;
                    }
                }
                Some(event) = heard.recv() => break event,
                Some(request) = cancels.recv() => {
                    asker = Some(request);
                    break Event::Cancel;
                }
                () = sleep_until(wake.unwrap_or(begun)), if wake.is_some() => {
                    wake = None;
                    break Event::Tick;
                }
            }
        };
    }
}

/// The pieces of work that run.
#[derive(Default)]
struct Running {
    tasks: JoinSet<Result<Outcome, Failure>>,
    steps: HashMap<Id, (StepId, &'static str)>,
    handles: HashMap<StepId, AbortHandle>,
}

impl Running {
    fn begin(&mut self, step: StepId, work: Work, carrier: &Arc<dyn Carrier>, events: &mpsc::Sender<Event>) {
        let name = work.name();
        tracing::debug!(step = step.0, work = name, "begin");
        let (carrier, events) = (Arc::clone(carrier), events.clone());
        let handle = self.tasks.spawn(async move { carrier.carry(work, &events).await });
        self.steps.insert(handle.id(), (step, name));
        self.handles.insert(step, handle);
    }

    fn abandon(&mut self, step: StepId) {
        if let Some(handle) = self.handles.remove(&step) {
            handle.abort();
        }
    }

    fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// The next end; `None` when it was one that nobody waits for.
    async fn ended(&mut self) -> Option<Event> {
        let ended = self.tasks.join_next_with_id().await?;
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let (step, name) = self.steps.remove(&id)?;
        self.handles.remove(&step)?;
        match ended {
            Ok((_, Ok(outcome))) => {
                tracing::debug!(step = step.0, work = name, "done");
                Some(Event::StepDone(step, outcome))
            }
            Ok((_, Err(failure))) => {
                tracing::info!(step = step.0, work = name, kind = ?failure.kind, reason = failure.message, "failed");
                Some(Event::StepFailed(step, failure))
            }
            // A panic: what it had done by then is not known.
            Err(error) => {
                let message =
                    format!("{error}; this is a defect of this program, please report it with the log");
                Some(Event::StepFailed(step, Failure::new(FailureKind::Silent, message)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
