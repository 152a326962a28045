//! Single decisions; whole moves are in `tests/simulation`.

use super::*;
use crate::notice::PhaseState;

struct Bench {
    coordinator: Coordinator,
    now: Moment,
    open: Vec<(StepId, Work)>,
    last: Vec<Effect>,
}

fn handoff() -> Any {
    Any { type_url: "handoff".into(), value: vec![7], ..Any::default() }
}

fn record() -> Work {
    Work::Record(Record::Committed { handoff: Some(handoff()) })
}

fn run() -> Work {
    Work::DestinationRun { handoff: Some(handoff()) }
}

fn slot() -> Slot {
    Slot::try_from(3).unwrap()
}

impl Bench {
    fn new() -> Bench {
        let coordinator = Coordinator::new(Deadlines::default());
        Bench { coordinator, now: Moment::default(), open: Vec::new(), last: Vec::new() }
    }

    fn tell(&mut self, event: Event) -> &mut Bench {
        self.last = self.coordinator.step(self.now, event).into_vec();
        for effect in &self.last {
            match effect {
                Effect::Begin(step, work) => self.open.push((*step, work.clone())),
                Effect::Abandon(step) => self.open.retain(|(id, _)| id != step),
                _ => {}
            }
        }
        self
    }

    fn working(&self) -> Vec<&Work> {
        self.open.iter().map(|(_, work)| work).collect()
    }

    fn take(&mut self, work: &Work) -> StepId {
        let at = self.open.iter().position(|(_, open)| open == work);
        let at = at.unwrap_or_else(|| panic!("{work:?} is not open: {:?}", self.open));
        self.open.remove(at).0
    }

    fn done(&mut self, work: &Work) -> &mut Bench {
        let step = self.take(work);
        let outcome = match work {
            Work::SourceExport => Outcome::Exported { config: Any::default(), disks: vec![slot()] },
            _ => Outcome::Done,
        };
        self.tell(Event::StepDone(step, outcome))
    }

    fn failed(&mut self, work: &Work, kind: FailureKind) -> &mut Bench {
        let step = self.take(work);
        self.tell(Event::StepFailed(step, Failure::new(kind, "because")))
    }

    fn wait(&mut self, wait: Duration) -> &mut Bench {
        self.now = self.now.after(wait);
        self.tell(Event::Tick)
    }

    fn told(&mut self, side: fn(Notice) -> Event, phase: Told) -> &mut Bench {
        self.tell(side(Notice::plain(phase, PhaseState::Success)))
    }

    fn source_done(&mut self) -> &mut Bench {
        let detail = Detail::Complete { progress: Progress::default(), handoff: Some(handoff()) };
        let notice = Notice { phase: Told::Done, state: PhaseState::Success, detail };
        self.tell(Event::SourceNotification(notice))
    }

    /// Up to the transfer.
    fn transferring() -> Bench {
        let mut bench = Bench::new();
        bench.tell(Event::Start).done(&Work::Preflight).done(&Work::SourceExport);
        bench.done(&Work::DestinationImport { config: Any::default() });
        bench.done(&Work::DestinationCreateTasks).done(&Work::DestinationPrepare);
        bench.done(&Work::ConnectStreams { disks: vec![slot()] });
        bench
    }

    fn committing() -> Bench {
        let mut bench = Bench::transferring();
        // Already 25 ms ago: before that the guest's pause is not this node's to see.
        bench.now = bench.now.after(Duration::from_secs(1));
        let detail = Detail::Blackout(Duration::from_millis(25));
        let notice = Notice { phase: Told::BlackoutStarted, state: PhaseState::Success, detail };
        bench.tell(Event::SourceNotification(notice));
        bench.now = bench.now.after(Duration::from_millis(70));
        bench.told(Event::DestinationNotification, Told::Done).source_done();
        bench
    }

    fn running() -> Bench {
        let mut bench = Bench::committing();
        bench.done(&record());
        bench
    }

    fn report(&self) -> Report {
        self.coordinator.report(self.now)
    }
}

#[test]
fn nothing_runs_there_before_the_record_is_durable() {
    let mut bench = Bench::committing();
    assert_eq!(bench.working(), [&record()]);
    bench.done(&record());
    assert_eq!(bench.working(), [&run()]);
}

#[test]
fn the_handoff_is_in_the_record_and_in_every_attempt_to_run() {
    let mut bench = Bench::committing();
    // Told again, by a shim that repeats itself or another that lies: the first word stands.
    let detail = Detail::Complete { progress: Progress::default(), handoff: Some(Any::default()) };
    let again = Notice { phase: Told::Done, state: PhaseState::Success, detail };
    bench.tell(Event::SourceNotification(again)).done(&record());
    bench.failed(&run(), FailureKind::Silent).wait(Duration::from_secs(5));
    bench.failed(&run(), FailureKind::Refused);
    bench.failed(&Work::DestinationAbort, FailureKind::Silent).wait(Duration::from_secs(5));
    assert_eq!(bench.working(), [&run()]);

    // A source of another make has none: the move goes on without.
    let mut bench = Bench::transferring();
    bench.told(Event::DestinationNotification, Told::Done).told(Event::SourceNotification, Told::Done);
    bench.done(&Work::Record(Record::Committed { handoff: None }));
    assert_eq!(bench.working(), [&Work::DestinationRun { handoff: None }]);
}

#[test]
fn a_move_ends_with_a_report() {
    let mut bench = Bench::running();
    bench.now = bench.now.after(Duration::from_millis(30));
    bench.done(&run()).done(&Work::SourceStop);
    bench.done(&Work::DestinationCleanup).done(&Work::SourceCleanup);
    bench.done(&Work::SourceRemoveContainerdObjects);
    let report = bench.report();
    assert_eq!(report.phase, Phase::Done);
    assert_eq!(report.blackout, Some(Duration::from_millis(125)));
    assert_eq!((report.cause, report.leftovers), (None, Vec::new()));
    assert!(bench.open.is_empty());
}

#[test]
fn both_sides_must_be_done() {
    let mut bench = Bench::transferring();
    bench.told(Event::SourceNotification, Told::Done).told(Event::SourceNotification, Told::Done);
    assert_eq!(bench.coordinator.phase(), Phase::Transfer);
    bench.told(Event::DestinationNotification, Told::Done);
    assert_eq!(bench.coordinator.phase(), Phase::Commit);
}

#[test]
fn cancel_is_taken_before_the_decision_and_refused_after_it() {
    let mut bench = Bench::transferring();
    bench.tell(Event::Cancel);
    assert!(bench.last.contains(&Effect::CancelAnswer(Ok(()))));
    assert_eq!(bench.working(), [&Work::SourceCancel, &Work::DestinationAbort]);
    for mut bench in [Bench::committing(), Bench::running()] {
        let phase = bench.coordinator.phase();
        bench.tell(Event::Cancel);
        assert_eq!(bench.last[0], Effect::CancelAnswer(Err(TooLate { phase })));
        assert_eq!(bench.coordinator.phase(), phase);
    }
    let mut bench = Bench::new();
    bench.tell(Event::Start).tell(Event::Cancel);
    assert_eq!(bench.coordinator.phase(), Phase::RolledBack, "nothing was touched");
}

#[test]
fn the_way_back_from_every_phase_undoes_what_was_begun() {
    let resume = Work::SourceResume { destination_stopped: true };
    let mut export = Bench::new();
    export.tell(Event::Start).done(&Work::Preflight).failed(&Work::SourceExport, FailureKind::Refused);
    assert_eq!(export.working(), [&Work::SourceCancel]);
    export.failed(&Work::SourceCancel, FailureKind::NoSession);
    assert_eq!(export.coordinator.phase(), Phase::RolledBack);

    let mut import = Bench::new();
    import.tell(Event::Start).done(&Work::Preflight).done(&Work::SourceExport);
    import.failed(&Work::DestinationImport { config: Any::default() }, FailureKind::Refused);
    assert_eq!(import.working(), [&Work::SourceCancel, &Work::DestinationAbort]);
    import.done(&Work::SourceCancel);
    assert_eq!(
        import.working(),
        [&Work::DestinationAbort],
        "held back until the destination is seen stopped"
    );
    import.done(&Work::DestinationAbort);
    assert_eq!(import.working(), [&resume]);
    import.done(&resume).done(&Work::SourceCleanup);
    assert_eq!(import.coordinator.phase(), Phase::RolledBack);
    assert!(matches!(import.report().cause, Some(Cause::StepFailed { .. })));
}

#[test]
fn a_silent_destination_holds_the_source_back_only_so_long() {
    let mut bench = Bench::transferring();
    bench.tell(Event::Cancel).done(&Work::SourceCancel);
    bench.wait(Deadlines::default().abort);
    assert_eq!(bench.working(), [&Work::SourceResume { destination_stopped: true }]);
    assert_eq!(bench.report().leftovers.len(), 1);
    let mut bench = Bench::transferring();
    bench.tell(Event::PeerLost("gone".into())).done(&Work::SourceCancel);
    assert_eq!(bench.working(), [&Work::SourceResume { destination_stopped: true }], "at once");
}

#[test]
fn after_the_decision_silence_is_asked_again_for_ever() {
    let mut bench = Bench::running();
    for _ in 0..200 {
        bench.failed(&run(), FailureKind::Silent);
        assert_eq!(bench.working(), [] as [&Work; 0]);
        bench.wait(Deadlines::default().backoff_max);
        assert_eq!(bench.working(), [&run()]);
    }
    bench.tell(Event::PeerLost("gone".into()));
    assert_eq!(bench.working(), [&run()]);
    bench.tell(Event::DestinationConfirmedStopped);
    assert_eq!(bench.working(), [&Work::SourceResume { destination_stopped: true }]);
}

#[test]
fn a_destination_that_cannot_run_is_seen_stopped_before_the_source_resumes() {
    let mut bench = Bench::running();
    bench.failed(&run(), FailureKind::Refused);
    assert_eq!(bench.working(), [&Work::DestinationAbort]);
    bench.failed(&Work::DestinationAbort, FailureKind::Silent).wait(Duration::from_secs(5));
    assert_eq!(bench.working(), [&run()], "nothing was confirmed");
    bench.failed(&run(), FailureKind::Gone).done(&Work::DestinationAbort);
    assert_eq!(bench.working(), [&Work::SourceResume { destination_stopped: true }]);
}

#[test]
fn a_destination_that_already_runs_is_believed_though_it_forgot_the_session() {
    let mut bench = Bench::running();
    bench.failed(&run(), FailureKind::NoSession);
    bench.failed(&Work::DestinationAbort, FailureKind::Runs);
    assert_eq!(bench.working(), [&Work::SourceStop]);
}

#[test]
fn a_record_in_doubt_needs_a_stopped_destination() {
    let mut bench = Bench::committing();
    bench.failed(&record(), FailureKind::Refused);
    for _ in 0..50 {
        assert_eq!(bench.working(), [&Work::DestinationAbort]);
        bench.failed(&Work::DestinationAbort, FailureKind::Silent).wait(Duration::from_secs(5));
    }
    bench.done(&Work::DestinationAbort);
    assert_eq!(bench.working(), [&Work::SourceResume { destination_stopped: true }]);
}

#[test]
fn the_transfer_has_three_clocks() {
    let deadlines = Deadlines::default();
    let answered = || {
        let mut bench = Bench::transferring();
        bench.done(&Work::DestinationTransfer).done(&Work::SourceTransfer);
        bench
    };
    let mut stalled = answered();
    stalled.wait(deadlines.stall);
    assert_eq!(stalled.report().cause, Some(Cause::Stalled { limit: deadlines.stall }));

    let mut paused = answered();
    paused.told(Event::SourceNotification, Told::BlackoutStarted).wait(deadlines.blackout);
    assert_eq!(paused.report().cause, Some(Cause::BlackoutOverdue { limit: deadlines.blackout }));

    let in_progress = |memory_sent| {
        let detail = Detail::Progress(Progress { memory_sent, ..Progress::default() });
        let state = PhaseState::Success;
        Event::SourceNotification(Notice { phase: Told::TransferInProgress, state, detail })
    };
    // A shim that lives and sends nothing: a peer takes no more.
    let mut stuck = answered();
    for _ in 0..3 {
        stuck.tell(in_progress(1)).wait(deadlines.stall / 2);
    }
    assert_eq!(stuck.report().cause, Some(Cause::Stalled { limit: deadlines.stall }));

    let (mut endless, mut sent) = (answered(), 0);
    while endless.coordinator.phase() == Phase::Transfer {
        sent += 1;
        endless.tell(in_progress(sent)).wait(deadlines.stall / 2);
    }
    assert_eq!(endless.report().cause, Some(Cause::TransferOverdue { limit: deadlines.transfer }));
}

#[test]
fn a_late_end_of_abandoned_work_is_ignored() {
    let mut bench = Bench::transferring();
    let late = bench.take(&Work::SourceTransfer);
    bench.tell(Event::Cancel);
    let phase = bench.coordinator.phase();
    bench.tell(Event::StepFailed(late, Failure::new(FailureKind::Refused, "late")));
    assert_eq!(bench.last, []);
    assert_eq!(bench.coordinator.phase(), phase);
}

#[test]
fn what_cannot_be_cleaned_up_is_left_over_and_the_move_is_done() {
    let mut bench = Bench::running();
    bench.done(&run()).done(&Work::SourceStop).done(&Work::SourceCleanup);
    bench.done(&Work::SourceRemoveContainerdObjects);
    for _ in 1..Deadlines::default().attempts {
        bench.failed(&Work::DestinationCleanup, FailureKind::Silent).wait(Duration::from_secs(5));
    }
    bench.failed(&Work::DestinationCleanup, FailureKind::Silent);
    let report = bench.report();
    assert_eq!(report.phase, Phase::Done);
    assert_eq!(report.leftovers.len(), 1);
}

#[test]
fn a_wrong_outcome_turns_back() {
    let mut bench = Bench::new();
    bench.tell(Event::Start).done(&Work::Preflight);
    let step = bench.take(&Work::SourceExport);
    bench.tell(Event::StepDone(step, Outcome::Done));
    assert_eq!(bench.report().cause, Some(Cause::WrongOutcome { work: "export on the source" }));
}
