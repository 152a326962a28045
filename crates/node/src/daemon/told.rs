//! A move as those who watch it are told: phases, readings, and how it ended.

use std::time::Duration;

use dunlin_migration::coordinator::{Cause, FailureKind, Phase, Report};
use dunlin_migration::notice::Progress;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use super::drive::Audience;
use crate::proto::move_event::Event as Told;
use crate::proto::{self, MoveEvent, Whereabouts};

/// Events that a slow watcher may be behind; then it misses readings, never the end.
pub(crate) const TOLD: usize = 256;

/// Turns the coordinator's reports into events.
pub(crate) struct Teller {
    begun: Instant,
    events: broadcast::Sender<MoveEvent>,
    phase: watch::Sender<&'static str>,
    /// The phase before the way back began: a failure names it.
    furthest: &'static str,
    reading: Option<(Instant, u64)>,
}

impl Teller {
    pub(crate) fn new(events: broadcast::Sender<MoveEvent>, phase: watch::Sender<&'static str>) -> Teller {
        Teller { begun: Instant::now(), events, phase, furthest: "", reading: None }
    }

    /// The phase in which a move that failed did so.
    pub(crate) fn furthest(&self) -> &'static str {
        self.furthest
    }

    fn tell(&self, event: Told) {
        // Nobody may be watching.
        let _ = self.events.send(MoveEvent { event: Some(event) });
    }
}

impl Audience for Teller {
    fn report(&mut self, report: &Report) {
        let word = phase_word(report.phase);
        if *self.phase.borrow() == word {
            return;
        }
        self.phase.send_replace(word);
        if !matches!(report.phase, Phase::Aborting) && !report.phase.is_final() {
            self.furthest = word;
        }
        tracing::info!(phase = word, elapsed_ms = millis(report.total), "move");
        if !report.phase.is_final() && report.phase != Phase::Planned {
            self.tell(Told::Phase(proto::PhaseEntered {
                phase: word.into(),
                elapsed_ms: millis(report.total),
            }));
        }
    }

    fn progress(&mut self, progress: &Progress) {
        let now = Instant::now();
        let sent = progress.memory_sent.saturating_add(progress.disk_sent);
        let rate = match self.reading {
            Some((then, before)) => per_second(sent.saturating_sub(before), now - then),
            None => per_second(sent, now - self.begun),
        };
        self.reading = Some((now, sent));
        self.tell(Told::Progress(proto::Progress {
            elapsed_ms: millis(now - self.begun),
            memory_total_bytes: progress.memory_total,
            memory_remaining_bytes: progress.memory_remaining,
            memory_sent_bytes: progress.memory_sent,
            memory_passes: progress.passes,
            disk_total_bytes: progress.disk_total,
            disk_sent_bytes: progress.disk_sent,
            bytes_per_second: rate,
        }));
    }
}

/// Who moved what, for the last event.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) session: String,
    pub(crate) namespace: String,
    /// As it was asked for.
    pub(crate) container: String,
    pub(crate) sandbox: String,
    /// All that move, in their order.
    pub(crate) containers: Vec<String>,
    /// What of the sandbox does not, in words.
    pub(crate) stays: Vec<String>,
    pub(crate) from: String,
    pub(crate) to: String,
}

/// What the nodes learned on the way, beside the coordinator's report.
#[derive(Debug, Default)]
pub(crate) struct Asides {
    pub(crate) warnings: Vec<String>,
    pub(crate) nics: Vec<proto::Nic>,
    /// Of images that the destination had to read from the source.
    pub(crate) fetched_bytes: u64,
}

/// The last event of a move.
pub(crate) fn ending(names: &Names, report: &Report, furthest: &str, asides: Asides) -> MoveEvent {
    let mut warnings = asides.warnings;
    warnings.extend(report.leftovers.iter().cloned());
    let event = if report.phase == Phase::Done {
        warnings.extend(names.stays.iter().cloned());
        Told::Report(proto::Report {
            session: names.session.clone(),
            namespace: names.namespace.clone(),
            container: names.container.clone(),
            from: names.from.clone(),
            to: names.to.clone(),
            total_ms: millis(report.total),
            blackout_ms: report.blackout.map_or(0, millis),
            memory_sent_bytes: report.memory_bytes,
            memory_passes: report.passes,
            disk_sent_bytes: report.disk_bytes,
            warnings,
            sandbox: names.sandbox.clone(),
            containers: names.containers.clone(),
            nics: asides.nics,
            fetched_bytes: asides.fetched_bytes,
        })
    } else {
        let whereabouts =
            if report.phase == Phase::RolledBack { Whereabouts::Source } else { Whereabouts::Unknown };
        let cause = report.cause.as_ref().map_or_else(|| "no cause was told".to_owned(), words);
        Told::Failure(proto::Failure {
            session: names.session.clone(),
            phase: furthest.into(),
            message: cause,
            whereabouts: whereabouts.into(),
            warnings,
        })
    };
    MoveEvent { event: Some(event) }
}

/// A refusal says by itself who refused what; for anything else the work's name is needed.
fn words(cause: &Cause) -> String {
    match cause {
        Cause::StepFailed { kind: FailureKind::Refused, message, .. } => message.clone(),
        other => other.to_string(),
    }
}

/// A phase as it is printed.
pub(crate) fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Planned => "planned",
        Phase::Preflight => "preflight",
        Phase::Export => "export",
        Phase::Import => "import",
        Phase::CreateTasks => "create-tasks",
        Phase::Prepare => "prepare",
        Phase::Connect => "connect",
        Phase::Transfer => "transfer",
        Phase::Commit => "commit",
        Phase::Run => "run",
        Phase::StopSource => "stop-source",
        Phase::CleanUp => "clean-up",
        Phase::Done => "done",
        Phase::Aborting => "rolling-back",
        Phase::RolledBack => "rolled-back",
        Phase::Failed => "failed",
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes per second; zero when no time has passed.
fn per_second(bytes: u64, time: Duration) -> u64 {
    let rate = u128::from(bytes).saturating_mul(1_000_000).checked_div(time.as_micros());
    u64::try_from(rate.unwrap_or(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            session: "s".into(),
            namespace: "default".into(),
            container: "web".into(),
            sandbox: "pod".into(),
            containers: vec!["pod".into(), "web".into()],
            stays: vec!["container `old` stays".into()],
            from: "a".into(),
            to: "b".into(),
        }
    }

    fn report(phase: Phase, cause: Option<Cause>) -> Report {
        Report {
            phase,
            total: Duration::from_secs(1),
            blackout: None,
            memory_bytes: 0,
            memory_remaining: 0,
            disk_bytes: 0,
            passes: 0,
            cause,
            leftovers: vec!["a snapshot".into()],
        }
    }

    #[test]
    fn a_move_that_is_done_lists_what_moved_and_what_stays() {
        let warnings = vec!["on b: x".into()];
        let asides = Asides { warnings, fetched_bytes: 7, ..Asides::default() };
        let event = ending(&names(), &report(Phase::Done, None), "run", asides);
        let Some(Told::Report(told)) = event.event else { panic!("no report: {event:?}") };
        assert_eq!((told.container.as_str(), told.sandbox.as_str()), ("web", "pod"));
        assert_eq!(told.containers, ["pod", "web"]);
        assert_eq!(told.fetched_bytes, 7);
        assert_eq!(told.warnings, ["on b: x", "a snapshot", "container `old` stays"]);
    }

    #[test]
    fn a_refusal_is_told_in_its_own_words_and_whole() {
        let reason =
            "container web: /data is shared from the host (plan9);\n  remove the mount and try again";
        let cause = |kind| Cause::StepFailed { work: "export on the source", kind, message: reason.into() };
        let told = |kind| {
            let report = report(Phase::RolledBack, Some(cause(kind)));
            let event = ending(&names(), &report, "export", Asides::default());
            let Some(Told::Failure(failure)) = event.event else { panic!("no failure: {event:?}") };
            assert_eq!(failure.warnings, ["a snapshot"]);
            assert_eq!(failure.phase, "export");
            failure.message
        };
        assert_eq!(told(FailureKind::Refused), reason);
        assert_eq!(told(FailureKind::Silent), format!("export on the source: {reason}"));
    }

    #[test]
    fn rates_survive_the_extremes() {
        assert_eq!(per_second(1000, Duration::from_millis(500)), 2000);
        assert_eq!(per_second(1000, Duration::ZERO), 0);
        assert_eq!(per_second(u64::MAX, Duration::from_micros(1)), u64::MAX);
    }
}
