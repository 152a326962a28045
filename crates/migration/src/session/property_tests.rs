//! What no order of calls, ends of work and ticks brings about, whoever calls.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{Epoch, GuestPid, SandboxId};
use proptest::prelude::*;

use super::table_tests::{cid, sid};
use super::*;
use crate::notice::Progress;

#[derive(Debug, Clone)]
enum Act {
    Call(Call),
    /// With the present epoch, or the one before.
    Done(Completion, bool),
    VmExited,
    Wait(u64),
}

fn acts() -> impl Strategy<Value = Act> {
    let fault = || Refusal::unknown("it did not work");
    let end = move |ok: bool| if ok { Ok(()) } else { Err(fault()) };
    let calls = vec![
        Call::PrepareAndExport { session: sid() },
        Call::Import { session: sid(), sandbox: SandboxId::new("b").unwrap(), config: Any::default() },
        Call::PatchContainer { source: cid("web"), container: cid("b") },
        Call::PrepareSandbox { session: sid() },
        Call::AdoptSocket { session: sid(), stream: Stream::Memory },
        Call::Transfer { session: sid(), timeout: Duration::ZERO },
        Call::Finalize { session: sid(), action: Action::Stop, destination_stopped: false, handoff: None },
        Call::Finalize { session: sid(), action: Action::Resume, destination_stopped: false, handoff: None },
        Call::Finalize { session: sid(), action: Action::Resume, destination_stopped: true, handoff: None },
        Call::Cancel { session: sid() },
        Call::Cleanup { session: sid() },
        Call::Notifications { session: sid() },
    ];
    let mut ends = Vec::new();
    for ok in [true, true, false] {
        let saved = Saved { config: Any::default(), sandbox_state: None, disks: BTreeSet::new() };
        let containers = BTreeSet::from([cid("web")]);
        let imported = Imported { containers, disks: BTreeSet::new() };
        let fault = TransferFault { state: PhaseState::SourceFailed, message: "broken".into() };
        ends.extend([
            Completion::VmInitialized(end(ok)),
            Completion::Saved(end(ok).map(|()| saved)),
            Completion::Imported(end(ok).map(|()| imported)),
            Completion::ContainerPatched { source: cid("web"), result: end(ok).map(|()| GuestPid(1)) },
            Completion::VmCreated(end(ok)),
            Completion::SocketAdopted { stream: Stream::Memory, result: end(ok) },
            Completion::BlackoutStarted { already: Duration::ZERO },
            Completion::TransferInDoubt(fault.clone()),
            Completion::CancelDone(end(ok).map(|()| Cancelled::InTime)),
            Completion::CancelDone(Ok(Cancelled::AlreadyCompleted)),
            Completion::Resumed(end(ok)),
            Completion::Stopped(end(ok)),
        ]);
        ends.push(match ok {
            true => Completion::TransferCompleted { progress: Progress::default(), handoff: None },
            false => Completion::TransferFailed(fault),
        });
    }
    prop_oneof![
        6 => proptest::sample::select(calls).prop_map(Act::Call),
        8 => (proptest::sample::select(ends), proptest::bool::weighted(0.05))
            .prop_map(|(end, late)| Act::Done(end, late)),
        1 => Just(Act::VmExited),
        1 => (0u64..700).prop_map(Act::Wait),
    ]
}

/// What makes a source send, in order: few random ones come so far.
fn sending() -> Vec<Act> {
    let saved = Saved { config: Any::default(), sandbox_state: None, disks: BTreeSet::new() };
    let adopted = Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) };
    vec![
        Act::Call(Call::PrepareAndExport { session: sid() }),
        Act::Done(Completion::VmInitialized(Ok(())), false),
        Act::Done(Completion::Saved(Ok(saved)), false),
        Act::Call(Call::AdoptSocket { session: sid(), stream: Stream::Memory }),
        Act::Done(adopted, false),
        Act::Call(Call::Transfer { session: sid(), timeout: Duration::ZERO }),
    ]
}

/// Whether a source's machine may be elsewhere, from what was asked of it and what it told alone.
#[derive(Debug, Default)]
struct Whereabouts {
    epoch: Option<Epoch>,
    sending: bool,
    cancelling: bool,
    left: bool,
}

impl Whereabouts {
    fn told(&mut self, epoch: Epoch, end: &Completion) {
        if Some(epoch) != self.epoch {
            return;
        }
        match end {
            Completion::TransferCompleted { .. } | Completion::TransferInDoubt(_) => {
                self.left |= self.sending;
            }
            Completion::TransferFailed(_) => self.sending = false,
            // Nobody's answer when nobody asked.
            Completion::CancelDone(how) if std::mem::take(&mut self.cancelling) => match how {
                Ok(Cancelled::AlreadyCompleted) => self.left |= self.sending,
                Ok(Cancelled::InTime) => self.sending = false,
                Err(_) => {}
            },
            _ => {}
        }
    }

    fn asked(&mut self, effect: &Effect) {
        match effect {
            Effect::StartTransfer { epoch, side } => {
                let sending = *side == Side::Source;
                *self = Whereabouts { epoch: Some(*epoch), sending, ..Whereabouts::default() };
            }
            Effect::CancelTransfer { .. } => self.cancelling = true,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]
    #[test]
    fn no_order_of_events_makes_a_twin_or_a_wait_without_end(
        acts in proptest::collection::vec(acts(), 0..120),
        sends in any::<bool>(),
    ) {
        let mut session = Session::new(Limits::default());
        let mut now = Moment::default();
        let mut waiting: BTreeMap<CallId, Call> = BTreeMap::new();
        let mut wake = None;
        let mut next = 0;
        let mut source = Whereabouts::default();
        let begin = if sends { sending() } else { Vec::new() };
        for act in begin.into_iter().chain(acts) {
            let completed = session.state.of().is_some_and(|of| of.completed);
            let stopping = session.state.of().is_some_and(|of| of.stopping);
            let mut vouched = false;
            let event = match act {
                Act::Call(call) => {
                    next += 1;
                    vouched = matches!(call, Call::Finalize { destination_stopped: true, .. });
                    waiting.insert(CallId(next), call.clone());
                    Event::Call(CallId(next), call)
                }
                Act::Done(end, late) => {
                    let epoch = session.last_epoch.0.saturating_sub(u64::from(late));
                    source.told(Epoch(epoch), &end);
                    Event::Done(Epoch(epoch), end)
                }
                Act::VmExited => Event::VmExited,
                Act::Wait(seconds) => {
                    now = now.after(Duration::from_secs(seconds));
                    Event::Tick
                }
            };
            for effect in session.step(now, event) {
                source.asked(&effect);
                match effect {
                    Effect::Reply(call, _) => prop_assert!(waiting.remove(&call).is_some(), "answered twice"),
                    Effect::ResumeSource { epoch, .. } if Some(epoch) == source.epoch && !vouched => {
                        prop_assert!(!source.sending && !source.left && !stopping, "a twin: {source:?}");
                    }
                    Effect::ResumeSource { .. } => prop_assert!((!completed || vouched) && !stopping),
                    Effect::RunDestination { .. } => prop_assert!(completed && !stopping),
                    Effect::WakeAt(moment) => wake = Some(moment),
                    _ => {}
                }
            }
        }
        // No work ends any more: ticks alone must give every call back.
        for _ in 0..20 {
            let Some(moment) = wake.take() else { break };
            now = now.max(moment);
            for effect in session.step(now, Event::Tick) {
                match effect {
                    Effect::Reply(call, _) => prop_assert!(waiting.remove(&call).is_some(), "answered twice"),
                    Effect::WakeAt(moment) => wake = Some(moment),
                    _ => {}
                }
            }
        }
        prop_assert!(waiting.is_empty(), "without an answer in {}: {waiting:?}", session.view().id());
    }
}
