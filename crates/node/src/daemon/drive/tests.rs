//! The executor with hands that only remember: every work that can fail is failed in turn.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dunlin_migration::coordinator::{Deadlines, Phase};
use dunlin_migration::notice::{self, Notice, PhaseState};
use dunlin_wire::Any;

use super::*;

/// What the hands do with a work, by its name; everything else ends well.
#[derive(Clone)]
enum Twist {
    /// As many times, with this kind.
    Fail(FailureKind, u32),
    Hang,
    Panic,
}

struct Hands {
    twists: Mutex<HashMap<&'static str, Twist>>,
    did: Mutex<Vec<&'static str>>,
    /// The transfer's first half only: no DONE.
    stuck: bool,
}

impl Hands {
    fn new(twists: &[(&'static str, Twist)]) -> Arc<Hands> {
        Arc::new(Hands {
            twists: Mutex::new(twists.iter().cloned().collect()),
            did: Mutex::default(),
            stuck: false,
        })
    }

    fn stuck() -> Arc<Hands> {
        Arc::new(Hands { twists: Mutex::default(), did: Mutex::default(), stuck: true })
    }

    fn did(&self) -> Vec<&'static str> {
        self.did.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn twist(&self, name: &'static str) -> Option<Twist> {
        let mut twists = self.twists.lock().unwrap_or_else(PoisonError::into_inner);
        match twists.get_mut(name)? {
            Twist::Fail(_, 0) => None,
            Twist::Fail(kind, times) => {
                *times -= 1;
                Some(Twist::Fail(*kind, 1))
            }
            other => Some(other.clone()),
        }
    }
}

#[async_trait]
impl Carrier for Hands {
    async fn carry(&self, work: Work, events: &mpsc::Sender<Event>) -> Result<Outcome, Failure> {
        let name = work.name();
        self.did.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        match self.twist(name) {
            Some(Twist::Fail(kind, _)) => return Err(Failure::new(kind, "as the test wants")),
            Some(Twist::Hang) => std::future::pending().await,
            Some(Twist::Panic) => panic!("as the test wants"),
            None => {}
        }
        match work {
            Work::SourceExport => {
                return Ok(Outcome::Exported { config: Any::default(), disks: Vec::new() });
            }
            Work::SourceTransfer => {
                let progress =
                    Progress { memory_total: 100, memory_sent: 40, passes: 1, ..Progress::default() };
                let told = Notice {
                    phase: notice::Phase::TransferInProgress,
                    state: PhaseState::Success,
                    detail: Detail::Progress(progress),
                };
                events.send(Event::SourceNotification(told)).await.unwrap();
                if !self.stuck {
                    for phase in [notice::Phase::BlackoutStarted, notice::Phase::Done] {
                        let told = Notice::plain(phase, PhaseState::Success);
                        events.send(Event::SourceNotification(told)).await.unwrap();
                    }
                }
            }
            Work::DestinationTransfer if !self.stuck => {
                let told = Notice::plain(notice::Phase::Done, PhaseState::Success);
                events.send(Event::DestinationNotification(told)).await.unwrap();
            }
            _ => {}
        }
        Ok(Outcome::Done)
    }
}

#[derive(Default)]
struct Heard {
    phases: Vec<Phase>,
    readings: Vec<Progress>,
    reached: Option<(Phase, oneshot::Sender<()>)>,
}

impl Audience for Heard {
    fn report(&mut self, report: &Report) {
        if self.phases.last() != Some(&report.phase) {
            self.phases.push(report.phase);
        }
        if self.reached.as_ref().is_some_and(|(phase, _)| *phase == report.phase)
            && let Some((_, reached)) = self.reached.take()
        {
            let _ = reached.send(());
        }
    }
    fn progress(&mut self, progress: &Progress) {
        self.readings.push(*progress);
    }
}

async fn moved(hands: &Arc<Hands>) -> (Report, Heard) {
    let (_cancel, cancels) = mpsc::channel(1);
    let mut heard = Heard::default();
    let carrier = Arc::clone(hands) as Arc<dyn Carrier>;
    let moving = drive(Coordinator::new(Deadlines::default()), carrier, cancels, &mut heard);
    let report = tokio::time::timeout(Duration::from_secs(24 * 3600), moving).await.expect("every wait ends");
    (report, heard)
}

#[tokio::test(start_paused = true)]
async fn a_move_goes_through_every_phase_in_order() {
    let hands = Hands::new(&[]);
    let (report, heard) = moved(&hands).await;
    assert_eq!(report.phase, Phase::Done, "{report:?}");
    assert_eq!(
        heard.phases.iter().filter(|phase| **phase != Phase::Planned).copied().collect::<Vec<_>>(),
        [
            Phase::Preflight,
            Phase::Export,
            Phase::Import,
            Phase::CreateTasks,
            Phase::Prepare,
            Phase::Connect,
            Phase::Transfer,
            Phase::Commit,
            Phase::Run,
            Phase::StopSource,
            Phase::CleanUp,
            Phase::Done
        ]
    );
    assert_eq!(heard.readings.len(), 1);
    let did = hands.did();
    let at = |name| did.iter().position(|done| *done == name).unwrap_or_else(|| panic!("{name} in {did:?}"));
    assert!(at("record the decision") < at("run on the destination"));
    assert!(at("run on the destination") < at("stop the source"));
    assert!(at("stop the source") < at("remove the source's containers"));
    assert!(!did.contains(&"resume the source"));
}

#[tokio::test(start_paused = true)]
async fn every_work_before_the_decision_that_fails_hangs_or_panics_leads_back() {
    for name in [
        "preflight",
        "export on the source",
        "import on the destination",
        "create the destination's tasks",
        "prepare the destination's machine",
        "connect the streams",
        "begin the destination's transfer",
        "begin the source's transfer",
    ] {
        for twist in [
            Twist::Fail(FailureKind::Refused, 1),
            Twist::Fail(FailureKind::Silent, 1),
            Twist::Hang,
            Twist::Panic,
        ] {
            let hands = Hands::new(&[(name, twist)]);
            let (report, _) = moved(&hands).await;
            assert_eq!(report.phase, Phase::RolledBack, "{name}: {report:?}");
            assert!(report.cause.is_some(), "{name}");
            let did = hands.did();
            assert!(!did.contains(&"run on the destination"), "{name}: {did:?}");
            if name != "preflight" {
                assert!(did.contains(&"resume the source"), "{name}: {did:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_destination_after_the_decision_is_asked_again_and_never_given_up() {
    let hands = Hands::new(&[("run on the destination", Twist::Fail(FailureKind::Silent, 3))]);
    let (report, _) = moved(&hands).await;
    assert_eq!(report.phase, Phase::Done, "{report:?}");
    let did = hands.did();
    assert_eq!(did.iter().filter(|name| **name == "run on the destination").count(), 4);
    assert!(!did.contains(&"resume the source"));
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_cannot_run_is_aborted_before_the_source_resumes() {
    let hands = Hands::new(&[("run on the destination", Twist::Fail(FailureKind::Refused, 1))]);
    let (report, _) = moved(&hands).await;
    assert_eq!(report.phase, Phase::RolledBack, "{report:?}");
    let did = hands.did();
    let at = |name| did.iter().position(|done| *done == name).unwrap_or_else(|| panic!("{name} in {did:?}"));
    assert!(at("abort on the destination") < at("resume the source"));
    assert!(!did.contains(&"stop the source"));
}

#[tokio::test(start_paused = true)]
async fn cancel_within_a_transfer_is_answered_and_leads_back() {
    let hands = Hands::stuck();
    let (cancel, cancels) = mpsc::channel(1);
    let (reached, transferring) = oneshot::channel();
    let mut heard = Heard { reached: Some((Phase::Transfer, reached)), ..Heard::default() };
    let carrier = Arc::clone(&hands) as Arc<dyn Carrier>;
    let canceller = tokio::spawn(async move {
        transferring.await.unwrap();
        let (reply, answer) = oneshot::channel();
        cancel.send(reply).await.unwrap();
        answer.await.unwrap()
    });
    let report = drive(Coordinator::new(Deadlines::default()), carrier, cancels, &mut heard).await;
    assert_eq!(canceller.await.unwrap(), Ok(()));
    assert_eq!(report.phase, Phase::RolledBack, "{report:?}");
    assert!(hands.did().contains(&"abort on the destination"));
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_stalls_ends_by_its_deadline() {
    let (report, heard) = moved(&Hands::stuck()).await;
    assert_eq!(report.phase, Phase::RolledBack, "{report:?}");
    assert!(report.total >= Deadlines::default().stall);
    assert!(heard.phases.contains(&Phase::Aborting));
}
