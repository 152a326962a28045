//! What the table does not say.

use std::collections::BTreeSet;
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{Epoch, Slot};

use super::table_tests::{Bench, cid, play, sid};
use super::*;
use crate::notice::Progress;
use crate::refusal::Code;

fn has(effects: &[Effect], wanted: impl Fn(&Effect) -> bool) -> bool {
    effects.iter().any(wanted)
}

fn reply(effects: &[Effect]) -> &Result<Answer, Refusal> {
    let found = effects.iter().find_map(|effect| match effect {
        Effect::Reply(_, answer) => Some(answer),
        _ => None,
    });
    found.expect("a reply")
}

fn disk(n: u32) -> Stream {
    Stream::Disk(Slot::try_from(n).unwrap())
}

#[test]
fn a_failed_export_is_thawed_and_resumes() {
    let mut bench = Bench::new();
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    let _ = bench.done(Completion::VmInitialized(Ok(())));
    let effects = bench.done(Completion::Saved(Err(Refusal::precondition("an exec is open"))));
    assert!(has(&effects, |e| matches!(e, Effect::Thaw { .. })));
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::FailedPrecondition);
    assert_eq!(bench.id(), StateId::Failed);
    assert_eq!(bench.session.gate(TaskCall::Exec), Ok(()));
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    assert_eq!(bench.id(), StateId::Finalized);
}

#[test]
fn a_failed_initialise_leaves_idle_and_may_be_tried_again() {
    let mut bench = Bench::new();
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    let effects = bench.done(Completion::VmInitialized(Err(Refusal::unknown("blocked"))));
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::Unknown);
    assert_eq!(bench.id(), StateId::Idle);
    let (_, effects) = bench.call(Call::PrepareAndExport { session: sid() });
    assert!(has(&effects, |e| *e == Effect::InitializeSource { epoch: Epoch(2), call: CallId(2) }));
}

#[test]
fn a_completion_of_an_earlier_session_changes_nothing() {
    let mut bench = Bench::exported();
    bench.cancel_in_time();
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    let _ = bench.call(Call::Cleanup { session: sid() });
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    let before = bench.session.state.clone();
    let fault = TransferFault { state: PhaseState::SourceFailed, message: "late".into() };
    for late in [
        Completion::TransferFailed(fault),
        Completion::TransferCompleted { progress: Progress::default(), handoff: None },
        Completion::Stopped(Ok(())),
        Completion::CancelDone(Ok(Cancelled::InTime)),
    ] {
        let effects = bench.session.step(bench.now, Event::Done(Epoch(1), late));
        assert_eq!(effects.into_vec(), []);
    }
    assert_eq!(bench.session.state, before);
    let late = Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) };
    let effects = bench.session.step(bench.now, Event::Done(Epoch(1), late)).into_vec();
    assert_eq!(effects, [Effect::CloseSockets { epoch: Epoch(1) }]);
}

#[test]
fn a_late_failure_does_not_overrule_a_cancellation() {
    let mut bench = Bench::exported();
    let _ = bench.call(Call::Cancel { session: sid() });
    let fault = TransferFault { state: PhaseState::SourceFailed, message: "stream closed".into() };
    let _ = bench.done(Completion::TransferFailed(fault.clone()));
    assert_eq!(bench.id(), StateId::Cancelling);
    let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    let _ = bench.done(Completion::TransferFailed(fault));
    assert_eq!(bench.id(), StateId::Cancelled);
}

#[test]
fn a_completed_source_resumes_only_on_a_stopped_destination() {
    for raced_with_cancel in [false, true] {
        let mut bench = Bench::exported();
        bench.transfer_to_end();
        if raced_with_cancel {
            let (_, effects) = bench.call(Call::Cancel { session: sid() });
            let _ = play(&mut bench, effects);
            assert_eq!(bench.id(), StateId::Cancelled);
        }
        let (_, effects) = bench.finalize(Action::Resume, false);
        assert!(reply(&effects).as_ref().unwrap_err().message.contains("destination_stopped"));
        let (_, effects) = bench.finalize(Action::Resume, true);
        assert!(has(&effects, |e| matches!(e, Effect::ResumeSource { rebuild: true, .. })));
        let replies = play(&mut bench, effects);
        assert_eq!(replies[0].1, Ok(Answer::Empty));
        assert_eq!(bench.id(), StateId::Finalized);
    }
}

#[test]
fn a_transfer_that_completed_while_it_was_cancelled_still_needs_a_stopped_destination() {
    let mut bench = Bench::exported();
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    let _ = bench.call(Call::Cancel { session: sid() });
    let handoff = Some(Any { type_url: "h".into(), ..Any::default() });
    let completed = Completion::TransferCompleted { progress: Progress::default(), handoff: handoff.clone() };
    let effects = bench.done(completed);
    assert_eq!(bench.id(), StateId::Cancelling);
    // Whoever lets the destination run all the same has where the streams stood.
    assert!(has(&effects, |e| matches!(e, Effect::Notify { notice, .. }
        if matches!(&notice.detail, Detail::Complete { handoff: told, .. } if *told == handoff))));
    let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::FailedPrecondition);
}

/// A cancellation of which nobody knows how it ended: what was being sent may have arrived.
#[test]
fn a_cancellation_without_an_end_leaves_a_source_that_may_have_left() {
    let fault = || TransferFault { state: PhaseState::SourceFailed, message: "undone".into() };
    for (begun, undone) in [(false, false), (true, false), (true, true)] {
        for overdue in [true, false] {
            let case = format!("begun {begun}, undone {undone}, overdue {overdue}");
            let cancelling = || {
                let mut bench = Bench::exported();
                if begun {
                    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
                    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
                    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
                }
                let _ = bench.call(Call::Cancel { session: sid() });
                if undone {
                    let _ = bench.done(Completion::TransferFailed(fault()));
                }
                if overdue {
                    bench.now = bench.now.after(Limits::default().cancel);
                    let _ = bench.session.step(bench.now, Event::Tick);
                } else {
                    let _ = bench.done(Completion::CancelDone(Err(Refusal::unknown("no answer"))));
                }
                assert_eq!(bench.id(), StateId::Failed, "{case}");
                bench
            };
            let doubt = begun && !undone;
            let mut bench = cancelling();
            // An end that comes too late does not lift the doubt.
            let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
            let (_, effects) = bench.finalize(Action::Resume, false);
            let resumes = |effects: &[Effect]| has(effects, |e| matches!(e, Effect::ResumeSource { .. }));
            assert_eq!(resumes(&effects), !doubt, "{case}");
            if doubt {
                let refusal = reply(&effects).as_ref().unwrap_err();
                assert!(refusal.message.contains("destination_stopped"), "{case}: {refusal:?}");
                let (_, effects) = bench.finalize(Action::Resume, true);
                assert!(resumes(&effects), "{case}");
            }
            // Nor does its machine's end tell one of tasks that may run elsewhere.
            let mut bench = cancelling();
            let effects = bench.session.step(bench.now, Event::VmExited).into_vec();
            assert_eq!(has(&effects, |e| matches!(e, Effect::Thaw { .. })), !doubt, "{case}");
        }
    }
}

#[test]
fn a_running_destination_is_never_called_stopped() {
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    for call in [
        Call::Finalize { session: sid(), action: Action::Stop, destination_stopped: false, handoff: None },
        Call::Cancel { session: sid() },
    ] {
        let (_, effects) = bench.call(call);
        assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::FailedPrecondition);
    }
    let (_, effects) = bench.finalize(Action::Stop, false);
    assert!(reply(&effects).as_ref().unwrap_err().message.contains(ALREADY_RESUMED));
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert_eq!(*reply(&effects), Ok(Answer::Empty));
}

#[test]
fn a_stop_is_final_even_when_it_failed() {
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let _ = bench.finalize(Action::Stop, false);
    let _ = bench.done(Completion::Stopped(Err(Refusal::unknown("still there"))));
    assert_eq!(bench.id(), StateId::TransferCompleted);
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(reply(&effects).is_err());
    let (_, effects) = bench.finalize(Action::Stop, false);
    let _ = play(&mut bench, effects);
    assert_eq!(bench.id(), StateId::Finalized);
}

#[test]
fn the_handoff_goes_to_the_destination_s_run_each_attempt_its_own() {
    let handoff = |n| Some(Any { value: vec![n], ..Any::default() });
    let finalize = |action, destination_stopped, n| Call::Finalize {
        session: sid(),
        action,
        destination_stopped,
        handoff: handoff(n),
    };
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    for attempt in [1, 2] {
        let (_, effects) = bench.call(finalize(Action::Resume, false, attempt));
        let run = Effect::RunDestination { epoch: Epoch(1), handoff: handoff(attempt) };
        assert!(effects.contains(&run), "{effects:?}");
        let _ = bench.done(Completion::Resumed(Err(Refusal::unknown("no bridge"))));
    }
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(effects.contains(&Effect::RunDestination { epoch: Epoch(1), handoff: None }));
    let _ = play(&mut bench, effects);
    // It runs: another handoff comes too late to matter.
    let (_, effects) = bench.call(finalize(Action::Resume, false, 9));
    assert_eq!(effects, [Effect::Reply(CallId(bench.calls()), Ok(Answer::Empty))]);

    // A source and a STOP have no use for it.
    let mut bench = Bench::exported();
    bench.transfer_to_end();
    let (_, effects) = bench.call(finalize(Action::Resume, true, 1));
    assert!(effects.contains(&Effect::ResumeSource { epoch: Epoch(1), rebuild: true }));
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let (_, effects) = bench.call(finalize(Action::Stop, false, 1));
    assert!(effects.contains(&Effect::StopVm { epoch: Epoch(1), side: Side::Destination }));
}

#[test]
fn what_the_source_held_is_told_with_its_done_and_with_nothing_else() {
    let handoff = Any { value: vec![3], ..Any::default() };
    let mut bench = Bench::exported();
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    let completed =
        Completion::TransferCompleted { progress: Progress::default(), handoff: Some(handoff.clone()) };
    let effects = bench.done(completed.clone());
    let notices: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Notify { notice, .. } => Some((notice.phase, notice.detail.clone())),
            _ => None,
        })
        .collect();
    let complete = Detail::Complete { progress: Progress::default(), handoff: Some(handoff) };
    let offline = Detail::Progress(Progress::default());
    assert_eq!(notices, [(Phase::OfflineDone, offline), (Phase::Done, complete)]);
    // A second time, or when all is over, it is only remembered that the machine has left.
    assert_eq!(bench.done(completed.clone()), []);
    let mut bench = Bench::exported();
    bench.cancel_in_time();
    assert_eq!(bench.done(completed), []);
    assert!(bench.session.state.of().unwrap().completed);
}

#[test]
fn a_machine_that_may_have_left_is_fenced() {
    let fault = || TransferFault { state: PhaseState::SourceFailed, message: "no answer".into() };
    let mut bench = Bench::exported();
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    let effects = bench.done(Completion::TransferInDoubt(fault()));
    assert!(has(&effects, |e| matches!(e, Effect::Notify { notice, .. } if notice.phase == Phase::Failed)));
    // Even a cancellation that says "in time" afterwards does not lift it.
    let _ = bench.call(Call::Cancel { session: sid() });
    let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(reply(&effects).as_ref().unwrap_err().message.contains("destination_stopped"));
    let (_, effects) = bench.finalize(Action::Resume, true);
    assert!(has(&effects, |e| matches!(e, Effect::ResumeSource { .. })));
    // And in a session that is being cancelled.
    let mut bench = Bench::exported();
    let _ = bench.call(Call::Cancel { session: sid() });
    let _ = bench.done(Completion::TransferInDoubt(fault()));
    let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(reply(&effects).is_err());
}

#[test]
fn a_failed_resume_may_be_tried_again() {
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let _ = bench.finalize(Action::Resume, false);
    let effects = bench.done(Completion::Resumed(Err(Refusal::unknown("no bridge"))));
    assert!(reply(&effects).is_err());
    assert_eq!(bench.id(), StateId::TransferCompleted);
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    assert_eq!(bench.id(), StateId::Finalized);
    assert_eq!(bench.session.gate(TaskCall::Exec), Ok(()));
}

#[test]
fn a_stopped_or_cancelled_destination_aborts_its_containers() {
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let _ = bench.finalize(Action::Stop, false);
    let effects = bench.done(Completion::Stopped(Ok(())));
    assert!(has(&effects, |e| matches!(e, Effect::AbortMigrated { .. })));
    let mut bench = Bench::prepared();
    let _ = bench.call(Call::Cancel { session: sid() });
    let effects = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    assert!(has(&effects, |e| matches!(e, Effect::AbortMigrated { .. })));
    assert_eq!(bench.session.gate(TaskCall::Delete), Ok(()));
    assert!(bench.session.gate(TaskCall::Exec).is_err());
    let mut bench = Bench::imported();
    let (_, effects) = bench.call(Call::Cancel { session: sid() });
    assert!(has(&effects, |e| matches!(e, Effect::AbortMigrated { .. })));
    assert_eq!(bench.session.gate(TaskCall::Delete), Ok(()));
}

#[test]
fn a_cancelled_destination_that_had_completed_can_be_stopped() {
    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let (_, effects) = bench.call(Call::Cancel { session: sid() });
    let _ = play(&mut bench, effects);
    let (_, effects) = bench.call(Call::Cleanup { session: sid() });
    assert!(reply(&effects).is_err(), "its machine still exists");
    let (_, effects) = bench.finalize(Action::Stop, false);
    assert!(has(&effects, |e| matches!(e, Effect::StopVm { .. })));
    let _ = play(&mut bench, effects);
    assert_eq!(bench.id(), StateId::Cancelled);
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(reply(&effects).is_err());
    let (_, effects) = bench.call(Call::Cleanup { session: sid() });
    assert_eq!(*reply(&effects), Ok(Answer::Empty));
}

#[test]
fn transfer_begins_when_every_announced_stream_is_here() {
    let mut bench = Bench::new();
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    let _ = bench.done(Completion::VmInitialized(Ok(())));
    let disks = [0, 1].map(|n| Slot::try_from(n).unwrap()).into();
    let _ = bench.done(Completion::Saved(Ok(Saved { config: Any::default(), sandbox_state: None, disks })));
    let (_, effects) = bench.call(Call::AdoptSocket { session: sid(), stream: disk(9) });
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::InvalidArgument);
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    for stream in [disk(0), Stream::Memory] {
        let (_, effects) = bench.call(Call::AdoptSocket { session: sid(), stream });
        let _ = play(&mut bench, effects);
        assert_eq!(bench.id(), StateId::SocketWaiting, "{stream} leaves the state as it is");
    }
    let (_, effects) = bench.call(Call::AdoptSocket { session: sid(), stream: disk(0) });
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::AlreadyExists);
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: disk(1) });
    let effects = bench.done(Completion::SocketAdopted { stream: disk(1), result: Ok(()) });
    assert!(has(&effects, |e| matches!(e, Effect::StartTransfer { side: Side::Source, .. })));
}

#[test]
fn missing_streams_are_named_when_their_time_is_over() {
    let mut bench = Bench::exported();
    let (_, effects) = bench.call(Call::Transfer { session: sid(), timeout: Duration::from_secs(3) });
    let due = Moment(Duration::from_secs(3));
    assert!(has(&effects, |e| *e == Effect::WakeAt(due)));
    bench.now = due;
    let effects = bench.session.step(bench.now, Event::Tick).into_vec();
    assert_eq!(bench.id(), StateId::Failed);
    assert!(has(&effects, |e| matches!(e, Effect::Notify { notice, .. }
        if notice.state == PhaseState::SourceFailed && format!("{notice:?}").contains("memory"))));
}

#[test]
fn a_silent_peer_cannot_hold_a_paused_guest() {
    let mut bench = Bench::exported();
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    let _ = bench.done(Completion::BlackoutStarted { already: Duration::ZERO });
    bench.now = bench.now.after(Limits::default().blackout);
    let effects = bench.session.step(bench.now, Event::Tick).into_vec();
    assert!(has(&effects, |e| matches!(e, Effect::CancelTransfer { .. })));
    let _ = play(&mut bench, effects);
    assert_eq!(bench.id(), StateId::Cancelled);
}

#[test]
fn a_pause_is_counted_from_the_vmm_s_word_for_it() {
    let mut bench = Bench::exported();
    bench.now = bench.now.after(Duration::from_secs(9));
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    let told = |effects: &[Effect], phase: Phase, detail: Detail| {
        has(
            effects,
            |e| matches!(e, Effect::Notify { notice, .. } if notice.phase == phase && notice.detail == detail),
        )
    };
    let already = Duration::from_millis(40);
    let effects = bench.done(Completion::BlackoutStarted { already });
    assert!(told(&effects, Phase::BlackoutStarted, Detail::Blackout(already)), "{effects:?}");
    bench.now = bench.now.after(Duration::from_millis(100));
    bench.cancel_in_time();
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(has(&effects, |e| matches!(e, Effect::ResumeSource { .. })));
    let effects = bench.done(Completion::Resumed(Ok(())));
    let whole = Detail::Blackout(Duration::from_millis(140));
    assert!(told(&effects, Phase::BlackoutExited, whole), "{effects:?}");
}

#[test]
fn unpatched_containers_are_listed() {
    let mut bench = Bench::imported();
    let (_, effects) = bench.call(Call::PrepareSandbox { session: sid() });
    assert!(reply(&effects).as_ref().unwrap_err().message.contains("web"));
    let (_, effects) = bench.call(Call::PatchContainer { source: cid("db"), container: cid("x") });
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::NotFound);
    let mut bench = Bench::patched();
    let (_, effects) = bench.call(Call::PatchContainer { source: cid("web"), container: cid("x") });
    assert_eq!(reply(&effects).as_ref().unwrap_err().code, Code::FailedPrecondition);
}

#[test]
fn cancel_gives_every_waiting_call_back() {
    let mut bench = Bench::new();
    let (export, _) = bench.call(Call::PrepareAndExport { session: sid() });
    let (cancel, effects) = bench.call(Call::Cancel { session: sid() });
    let (second, _) = bench.call(Call::Cancel { session: sid() });
    let replies = play(&mut bench, effects);
    let codes: Vec<_> = replies.iter().map(|(id, r)| (*id, r.as_ref().err().map(|e| e.code))).collect();
    assert_eq!(codes, [(export, Some(Code::Canceled)), (cancel, None), (second, None)]);
}

#[test]
fn a_machine_that_exits_ends_the_move_or_is_no_longer_needed() {
    let mut bench = Bench::exported();
    let effects = bench.session.step(bench.now, Event::VmExited).into_vec();
    assert!(has(&effects, |e| matches!(e, Effect::Notify { notice, .. }
        if notice.state == PhaseState::GuestInitiatedCancellation)));
    let (_, effects) = bench.finalize(Action::Resume, false);
    assert!(reply(&effects).is_err());
    let (_, effects) = bench.finalize(Action::Stop, false);
    assert_eq!(*reply(&effects), Ok(Answer::Empty));

    let mut bench = Bench::exported();
    bench.transfer_to_end();
    let effects = bench.session.step(bench.now, Event::VmExited).into_vec();
    assert_eq!(effects, [], "the destination has it all");
    assert_eq!(bench.id(), StateId::TransferCompleted);

    let mut bench = Bench::prepared();
    bench.transfer_to_end();
    let _ = bench.finalize(Action::Resume, false);
    let effects = bench.session.step(bench.now, Event::VmExited).into_vec();
    assert!(reply(&effects).is_err());
    assert!(has(&effects, |e| matches!(e, Effect::AbortMigrated { .. })));
    let (_, effects) = bench.finalize(Action::Stop, false);
    assert_eq!(*reply(&effects), Ok(Answer::Empty));
}

#[test]
fn looking_and_waiting_are_allowed_before_the_pause() {
    let open = [
        TaskCall::State,
        TaskCall::Wait,
        TaskCall::CloseIo,
        TaskCall::ResizePty,
        TaskCall::Pids,
        TaskCall::Stats,
        TaskCall::Connect,
        TaskCall::Shutdown,
    ];
    for bench in [Bench::new(), Bench::exported(), Bench::imported(), Bench::prepared()] {
        for call in TaskCall::ALL {
            let allowed = bench.session.gate(call).is_ok();
            let expected = match bench.id() {
                StateId::Idle => true,
                StateId::DestinationImported => open.contains(&call) || call == TaskCall::Create,
                _ => open.contains(&call),
            };
            assert_eq!(allowed, expected, "{call:?} in {}", bench.id());
        }
    }
}

#[test]
fn the_set_of_sockets_is_closed_once_and_for_all_on_cleanup() {
    let mut bench = Bench::exported();
    bench.cancel_in_time();
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    let (_, effects) = bench.call(Call::Cleanup { session: sid() });
    let kinds: BTreeSet<bool> = effects.iter().map(|e| matches!(e, Effect::CloseSockets { .. })).collect();
    assert!(kinds.contains(&true));
    assert!(has(&effects, |e| matches!(e, Effect::EndNotifications { .. })));
    assert_eq!(bench.id(), StateId::Idle);
}

#[test]
fn the_guest_is_asked_until_it_stands_still() {
    let asked = [TaskCall::Pids, TaskCall::Stats, TaskCall::ResizePty];
    let mut bench = Bench::exported();
    let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
    let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    let _ = bench.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    for call in asked {
        assert_eq!(bench.session.gate(call), Ok(()), "{call:?} while memory goes");
    }
    assert!(bench.session.gate(TaskCall::Exec).is_err(), "what changes the sandbox waits from the export on");
    let _ = bench.done(Completion::BlackoutStarted { already: Duration::ZERO });
    for call in asked {
        let refusal = bench.session.gate(call).unwrap_err();
        assert!(refusal.message.contains("moving to another host"), "{refusal}");
    }
    // Never refused: an end of input is not asked for twice.
    assert_eq!(bench.session.gate(TaskCall::CloseIo), Ok(()));
    bench.cancel_in_time();
    let (_, effects) = bench.finalize(Action::Resume, false);
    let _ = play(&mut bench, effects);
    for call in asked {
        assert_eq!(bench.session.gate(call), Ok(()), "{call:?} after the way back");
    }
}
