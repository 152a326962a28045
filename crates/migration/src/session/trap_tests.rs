//! What befalls a session in every row of the table: ends of work of another session, the machine's exit.

use std::collections::BTreeSet;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{Epoch, GuestPid};

use StateId as S;

use super::table_tests::{cid, play, rows, sid};
use super::*;
use crate::notice::Progress;

/// Every end of work there is, well and badly.
fn ends() -> Vec<Completion> {
    let no = || Refusal::unknown("no");
    let fault = || TransferFault { state: PhaseState::SourceFailed, message: "late".into() };
    let saved = Saved { config: Any::default(), sandbox_state: None, disks: BTreeSet::new() };
    let imported = Imported { containers: BTreeSet::from([cid("web")]), disks: BTreeSet::new() };
    let (source, stream) = (cid("web"), Stream::Memory);
    vec![
        Completion::VmInitialized(Ok(())),
        Completion::VmInitialized(Err(no())),
        Completion::Saved(Ok(saved)),
        Completion::Saved(Err(no())),
        Completion::Imported(Ok(imported)),
        Completion::Imported(Err(no())),
        Completion::ContainerPatched { source: source.clone(), result: Ok(GuestPid(1)) },
        Completion::ContainerPatched { source, result: Err(no()) },
        Completion::VmCreated(Ok(())),
        Completion::VmCreated(Err(no())),
        Completion::SocketAdopted { stream, result: Ok(()) },
        Completion::SocketAdopted { stream, result: Err(no()) },
        Completion::TransferProgressed(Progress::default()),
        Completion::BlackoutStarted { already: std::time::Duration::ZERO },
        Completion::TransferCompleted { progress: Progress::default(), handoff: None },
        Completion::TransferFailed(fault()),
        Completion::TransferInDoubt(fault()),
        Completion::CancelDone(Ok(Cancelled::InTime)),
        Completion::CancelDone(Ok(Cancelled::AlreadyCompleted)),
        Completion::CancelDone(Err(no())),
        Completion::Resumed(Ok(())),
        Completion::Resumed(Err(no())),
        Completion::Stopped(Ok(())),
        Completion::Stopped(Err(no())),
    ]
}

/// Trap: a late end of work of one session overwrote the state of the next.
#[test]
fn an_end_of_another_epoch_changes_nothing_in_any_row() {
    for (name, _, bench) in rows() {
        for end in ends() {
            let mut session = Session::new(Limits::default());
            session.state = bench.session.state.clone();
            session.last_epoch = bench.session.last_epoch;
            let other = Epoch(session.last_epoch.0 + 7);
            let effects = session.step(bench.now, Event::Done(other, end.clone())).into_vec();
            assert_eq!(session.state, bench.session.state, "{name}: {end:?}");
            for effect in effects {
                let gives_up = match effect {
                    Effect::CloseSockets { epoch }
                    | Effect::AbortMigrated { epoch }
                    | Effect::StopVm { epoch, .. }
                    | Effect::Thaw { epoch } => epoch == other,
                    Effect::WakeAt(_) => true,
                    _ => false,
                };
                assert!(gives_up, "{name}: {end:?} leads to {effect:?}");
            }
        }
    }
}

/// The machine may exit at any time: no row is left that cannot be cleaned up, and none runs again.
#[test]
fn an_exit_of_the_machine_has_a_way_out_of_every_row() {
    for (name, before, mut bench) in rows() {
        let unfinished = !matches!(before, S::Idle | S::Finalized | S::Cancelling | S::Cancelled | S::Failed);
        let effects = bench.session.step(bench.now, Event::VmExited).into_vec();
        let source_complete =
            before == S::TransferCompleted && bench.session.active().unwrap().2 == Side::Source;
        let after = if unfinished && !source_complete { S::Failed } else { before };
        assert_eq!(bench.id(), after, "{name}");
        let waiting = effects.iter().filter(|effect| matches!(effect, Effect::Reply(_, Ok(_)))).count();
        assert_eq!(waiting, 0, "{name}: nobody who waited is told that all is well");
        if before == S::Cancelling {
            let _ = bench.done(Completion::CancelDone(Ok(Cancelled::InTime)));
        }
        if before != S::Idle {
            assert_eq!(bench.session.view().machine(), Some(Machine::Gone), "{name}");
            // What may run elsewhere is not put away here, before somebody says that it may be.
            let undecided = bench.session.left() && before != S::Finalized;
            for call in TaskCall::ALL {
                let put_away = matches!(call, TaskCall::Kill | TaskCall::Delete) && !undecided;
                let looks = matches!(
                    call,
                    TaskCall::State
                        | TaskCall::Wait
                        | TaskCall::CloseIo
                        | TaskCall::ResizePty
                        | TaskCall::Pids
                        | TaskCall::Stats
                        | TaskCall::Connect
                        | TaskCall::Shutdown
                );
                assert_eq!(bench.session.gate(call).is_ok(), put_away || looks, "{name}: {call:?}");
            }
        }
        if !matches!(bench.id(), S::Idle | S::Finalized) {
            let left = bench.session.left();
            let (_, effects) = bench.finalize(Action::Resume, true);
            let thaws = effects.iter().any(|effect| matches!(effect, Effect::Thaw { .. }));
            assert!(thaws || !left, "{name}: what was held back is told");
            assert!(play(&mut bench, effects).iter().all(|(_, reply)| reply.is_err()), "{name}");
            assert!(!bench.session.left(), "{name}");
            assert_eq!(bench.session.gate(TaskCall::Delete), Ok(()), "{name}");
            let (id, effects) = bench.finalize(Action::Stop, false);
            let replies = play(&mut bench, effects);
            assert_eq!(replies, [(id, Ok(Answer::Empty))], "{name}");
        }
        let (id, effects) = bench.call(Call::Cleanup { session: sid() });
        assert_eq!(play(&mut bench, effects), [(id, Ok(Answer::Empty))], "{name}");
        assert_eq!(bench.id(), S::Idle, "{name}");
    }
}

/// A source's machine may exit at any time: its tasks' ends are told unless they may go on elsewhere, and then dropped at
/// STOP, machine or not.
#[test]
fn ends_are_told_of_no_task_that_may_run_elsewhere() {
    for (name, before, mut bench) in rows() {
        if before == S::Idle || bench.session.active().unwrap().2 == Side::Destination {
            continue;
        }
        let (left, decided) = (bench.session.left(), before == S::Finalized);
        let thaws = |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Thaw { .. }));
        let mut thawed = thaws(&bench.session.step(bench.now, Event::VmExited).into_vec());
        if before == S::Cancelling {
            // Its own end tells first whether the transfer had completed.
            assert!(!thawed, "{name}");
            thawed = thaws(&bench.done(Completion::CancelDone(Err(Refusal::unknown("QEMU ended")))));
        }
        assert_eq!(thawed, !left && !decided, "{name}");
        if left && !decided {
            let (id, effects) = bench.finalize(Action::Stop, false);
            assert!(effects.iter().any(|effect| matches!(effect, Effect::StopVm { .. })), "{name}");
            assert_eq!(play(&mut bench, effects), [(id, Ok(Answer::Empty))], "{name}");
            assert!(!bench.session.left() || bench.id() == S::Finalized, "{name}");
        }
    }
}
