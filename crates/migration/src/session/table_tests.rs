//! The service's table, cell by cell.

use std::collections::BTreeSet;
use std::time::Duration;

use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{ContainerId, GuestPid, SandboxId, SessionId};

use super::*;
use crate::notice::Progress;
use crate::refusal::Code;

pub(super) struct Bench {
    pub(super) session: Session,
    next_call: u64,
    pub(super) now: Moment,
}

pub(super) fn sid() -> SessionId {
    SessionId::new("move-1").unwrap()
}

pub(super) fn cid(text: &str) -> ContainerId {
    ContainerId::new(text).unwrap()
}

impl Bench {
    pub(super) fn new() -> Bench {
        Bench { session: Session::new(Limits::default()), next_call: 0, now: Moment::default() }
    }

    pub(super) fn call(&mut self, call: Call) -> (CallId, Vec<Effect>) {
        self.next_call += 1;
        let id = CallId(self.next_call);
        (id, self.session.step(self.now, Event::Call(id, call)).into_vec())
    }

    pub(super) fn done(&mut self, completion: Completion) -> Vec<Effect> {
        let epoch = self.session.last_epoch;
        self.session.step(self.now, Event::Done(epoch, completion)).into_vec()
    }

    pub(super) fn calls(&self) -> u64 {
        self.next_call
    }

    pub(super) fn id(&self) -> StateId {
        self.session.view().id()
    }

    fn socket(&mut self) {
        let _ = self.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
        let _ = self.done(Completion::SocketAdopted { stream: Stream::Memory, result: Ok(()) });
    }

    fn transfer(&mut self) {
        let _ = self.call(Call::Transfer { session: sid(), timeout: Duration::ZERO });
    }

    pub(super) fn transfer_to_end(&mut self) {
        self.socket();
        self.transfer();
        let _ = self.done(Completion::TransferCompleted { progress: Progress::default(), handoff: None });
    }

    pub(super) fn cancel_in_time(&mut self) {
        let _ = self.call(Call::Cancel { session: sid() });
        let _ = self.done(Completion::CancelDone(Ok(Cancelled::InTime)));
    }

    pub(super) fn finalize(&mut self, action: Action, destination_stopped: bool) -> (CallId, Vec<Effect>) {
        self.call(Call::Finalize { session: sid(), action, destination_stopped, handoff: None })
    }

    pub(super) fn exported() -> Bench {
        let mut bench = Bench::new();
        let _ = bench.call(Call::PrepareAndExport { session: sid() });
        let _ = bench.done(Completion::VmInitialized(Ok(())));
        let saved = Saved { config: Any::default(), sandbox_state: None, disks: BTreeSet::new() };
        let _ = bench.done(Completion::Saved(Ok(saved)));
        bench
    }

    pub(super) fn imported() -> Bench {
        let mut bench = Bench::new();
        let _ = bench.call(import());
        let containers = BTreeSet::from([cid("web")]);
        let _ = bench.done(Completion::Imported(Ok(Imported { containers, disks: BTreeSet::new() })));
        bench
    }

    pub(super) fn patched() -> Bench {
        let mut bench = Bench::imported();
        let _ = bench.call(Call::PatchContainer { source: cid("web"), container: cid("web-b") });
        let _ = bench.done(Completion::ContainerPatched { source: cid("web"), result: Ok(GuestPid(7)) });
        bench
    }

    pub(super) fn prepared() -> Bench {
        let mut bench = Bench::patched();
        let _ = bench.call(Call::PrepareSandbox { session: sid() });
        let _ = bench.done(Completion::VmCreated(Ok(())));
        bench
    }
}

fn import() -> Call {
    Call::Import { session: sid(), sandbox: SandboxId::new("pod-b").unwrap(), config: Any::default() }
}

/// The rows of the table. Where both sides share a row, both are tried.
pub(super) fn rows() -> Vec<(&'static str, StateId, Bench)> {
    let mut rows = Vec::new();
    let mut row = |name, id, bench: Bench| {
        assert_eq!(bench.id(), id, "{name}");
        rows.push((name, id, bench));
    };
    row("Idle", StateId::Idle, Bench::new());
    let mut bench = Bench::new();
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    row("SourcePrepared", StateId::SourcePrepared, bench);
    row("SourceExported", StateId::SourceExported, Bench::exported());
    row("DestinationImported", StateId::DestinationImported, Bench::imported());
    row("DestinationPrepared", StateId::DestinationPrepared, Bench::prepared());
    for (side, make) in [("source", Bench::exported as fn() -> Bench), ("destination", Bench::prepared)] {
        let named = |state: &str| -> &'static str { Box::leak(format!("{state}, {side}").into_boxed_str()) };
        let mut bench = make();
        bench.transfer();
        row(named("SocketWaiting"), StateId::SocketWaiting, bench);
        let mut bench = make();
        bench.socket();
        row(named("SocketReady"), StateId::SocketReady, bench);
        let mut bench = make();
        bench.socket();
        bench.transfer();
        row(named("Transferring"), StateId::Transferring, bench);
        let mut bench = make();
        bench.transfer_to_end();
        row(named("TransferCompleted"), StateId::TransferCompleted, bench);
        let mut bench = make();
        bench.transfer_to_end();
        let _ = bench.finalize(Action::Stop, false);
        let _ = bench.done(Completion::Stopped(Ok(())));
        row(named("Finalized"), StateId::Finalized, bench);
        let mut bench = make();
        bench.transfer_to_end();
        let (_, effects) = bench.finalize(Action::Resume, true);
        let _ = play(&mut bench, effects);
        row(named("Finalized, runs"), StateId::Finalized, bench);
        let mut bench = make();
        bench.transfer_to_end();
        let _ = bench.finalize(Action::Resume, true);
        row(named("Finalizing"), StateId::TransferCompleted, bench);
        let mut bench = make();
        bench.cancel_in_time();
        row(named("Cancelled"), StateId::Cancelled, bench);
        let mut bench = make();
        bench.transfer_to_end();
        let (_, effects) = bench.call(Call::Cancel { session: sid() });
        let _ = play(&mut bench, effects);
        row(named("Cancelled too late"), StateId::Cancelled, bench);
        let mut bench = make();
        let _ = bench.call(Call::Cancel { session: sid() });
        row(named("Cancelling"), StateId::Cancelling, bench);
        let mut bench = make();
        let fault = Refusal::precondition("not connected");
        let _ = bench.call(Call::AdoptSocket { session: sid(), stream: Stream::Memory });
        let _ = bench.done(Completion::SocketAdopted { stream: Stream::Memory, result: Err(fault) });
        row(named("Failed"), StateId::Failed, bench);
    }
    let mut bench = Bench::exported();
    bench.socket();
    bench.transfer();
    let fault = TransferFault { state: PhaseState::SourceFailed, message: "no answer to the cancel".into() };
    let _ = bench.done(Completion::TransferInDoubt(fault));
    row("Failed in doubt, source", StateId::Failed, bench);
    let mut bench = Bench::new();
    let _ = bench.call(Call::PrepareAndExport { session: sid() });
    let _ = bench.done(Completion::VmInitialized(Ok(())));
    let _ = bench.done(Completion::Saved(Err(Refusal::precondition("a device is passed through"))));
    row("Failed export", StateId::Failed, bench);
    let mut bench = Bench::new();
    let _ = bench.call(import());
    row("Importing", StateId::DestinationImported, bench);
    row("DestinationImported, patched", StateId::DestinationImported, Bench::patched());
    let mut bench = Bench::patched();
    let _ = bench.call(Call::PrepareSandbox { session: sid() });
    row("Preparing", StateId::DestinationImported, bench);
    rows
}

/// What a cell says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cell {
    /// Refused with this class; nothing changes.
    No(Code),
    /// Answered "ok" at once; nothing changes.
    Noop,
    /// Carried out, and in the end the session is here.
    To(StateId),
    /// Answered with an error, and the session is here all the same: the transfer was complete already.
    Late(StateId),
    /// Waits for what is being done; nothing changes.
    Joins,
}

use Cell::{Joins, Late, No, Noop, To};
use Code::{AlreadyExists as AE, FailedPrecondition as FP, InvalidArgument as IA};
use StateId as S;

/// Columns: Prepare+Export, Import, Create, PrepareSandbox, DupSocket, Transfer, Finalize(STOP),
/// Finalize(RESUME), the same with destination_stopped, Cancel, Cleanup, Notifications. `mended` marks a
/// cell that deliberately differs from the service's other implementation.
fn table(row: &str) -> [Cell; 12] {
    let fp = No(FP);
    match row {
        "Idle" => [
            To(S::SourceExported),
            To(S::DestinationImported),
            fp,
            No(IA),
            No(IA),
            No(IA),
            No(IA),
            No(IA),
            No(IA),
            No(IA),
            Noop,
            No(IA),
        ],
        "SourcePrepared" => [fp, fp, fp, fp, fp, fp, fp, fp, fp, To(S::Cancelled), fp, Noop],
        "SourceExported" | "DestinationPrepared" => {
            [fp, fp, fp, fp, To(S::SocketReady), To(S::SocketWaiting), fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        // PrepareSandbox: refused while a container waits.
        "DestinationImported" => {
            [fp, fp, To(S::DestinationImported), fp, fp, fp, fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        "DestinationImported, patched" => {
            [fp, fp, fp, To(S::DestinationPrepared), fp, fp, fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        "Importing" | "Preparing" => [fp, fp, fp, fp, fp, fp, fp, fp, fp, To(S::Cancelled), fp, Noop],
        "SocketWaiting, source" | "SocketWaiting, destination" => {
            [fp, fp, fp, fp, To(S::Transferring), Noop, fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        "SocketReady, source" | "SocketReady, destination" => {
            [fp, fp, fp, fp, No(AE), To(S::Transferring), fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        "Transferring, source" | "Transferring, destination" => {
            [fp, fp, fp, fp, No(AE), Noop, fp, fp, fp, To(S::Cancelled), fp, Noop]
        }
        // mended: RESUME of a source needs destination_stopped.
        "TransferCompleted, source" => [
            fp,
            fp,
            fp,
            fp,
            No(AE),
            Noop,
            To(S::Finalized),
            fp,
            To(S::Finalized),
            Late(S::Cancelled),
            fp,
            Noop,
        ],
        "TransferCompleted, destination" => [
            fp,
            fp,
            fp,
            fp,
            No(AE),
            Noop,
            To(S::Finalized),
            To(S::Finalized),
            To(S::Finalized),
            Late(S::Cancelled),
            fp,
            Noop,
        ],
        // mended: one Finalize at a time, and no Cancel under it.
        "Finalizing, source" | "Finalizing, destination" => {
            [fp, fp, fp, fp, No(AE), Noop, fp, fp, fp, fp, fp, Noop]
        }
        // mended: the other action and Cancel are refused.
        "Finalized, source" | "Finalized, destination" => {
            [fp, fp, fp, fp, No(AE), fp, Noop, fp, fp, fp, To(S::Idle), Noop]
        }
        "Finalized, runs, source" | "Finalized, runs, destination" => {
            // What runs here for good may leave, cleaned up or not.
            let leaves = To(S::SourceExported);
            [leaves, fp, fp, fp, No(AE), fp, fp, Noop, Noop, fp, To(S::Idle), Noop]
        }
        "Cancelled, source" => {
            [fp, fp, fp, fp, fp, fp, To(S::Finalized), To(S::Finalized), To(S::Finalized), Noop, fp, Noop]
        }
        "Cancelled too late, source" => {
            [fp, fp, fp, fp, No(AE), fp, To(S::Finalized), fp, To(S::Finalized), Noop, fp, Noop]
        }
        // mended: RESUME of what never completed is refused.
        "Cancelled, destination" => [fp, fp, fp, fp, fp, fp, Noop, fp, fp, Noop, To(S::Idle), Noop],
        // mended: its machine exists, so STOP stops it and Cleanup waits for that.
        "Cancelled too late, destination" => {
            [fp, fp, fp, fp, No(AE), fp, To(S::Cancelled), To(S::Finalized), To(S::Finalized), Noop, fp, Noop]
        }
        // mended: Cancel waits for the end.
        "Cancelling, source" | "Cancelling, destination" => {
            [fp, fp, fp, fp, fp, fp, fp, fp, fp, Joins, fp, Noop]
        }
        "Failed, source" | "Failed export" => [
            fp,
            fp,
            fp,
            fp,
            fp,
            fp,
            To(S::Finalized),
            To(S::Finalized),
            To(S::Finalized),
            To(S::Cancelled),
            fp,
            Noop,
        ],
        // mended: the machine may have left.
        "Failed in doubt, source" => {
            [fp, fp, fp, fp, No(AE), fp, To(S::Finalized), fp, To(S::Finalized), Late(S::Cancelled), fp, Noop]
        }
        // mended: RESUME of what never completed is refused.
        "Failed, destination" => {
            [fp, fp, fp, fp, fp, fp, To(S::Finalized), fp, fp, To(S::Cancelled), fp, Noop]
        }
        other => panic!("no row {other}"),
    }
}

fn columns() -> [Call; 12] {
    let session = sid;
    let finalize = |action, destination_stopped| Call::Finalize {
        session: sid(),
        action,
        destination_stopped,
        handoff: None,
    };
    [
        Call::PrepareAndExport { session: session() },
        import(),
        Call::PatchContainer { source: cid("web"), container: cid("web-b") },
        Call::PrepareSandbox { session: session() },
        Call::AdoptSocket { session: session(), stream: Stream::Memory },
        Call::Transfer { session: session(), timeout: Duration::ZERO },
        finalize(Action::Stop, false),
        finalize(Action::Resume, false),
        finalize(Action::Resume, true),
        Call::Cancel { session: session() },
        Call::Cleanup { session: session() },
        Call::Notifications { session: session() },
    ]
}

/// Carries work out well, as a shim would.
pub(super) fn play(bench: &mut Bench, effects: Vec<Effect>) -> Vec<(CallId, Result<Answer, Refusal>)> {
    let mut replies = Vec::new();
    let mut queue: std::collections::VecDeque<Effect> = effects.into();
    while let Some(effect) = queue.pop_front() {
        let completion = match effect {
            Effect::Reply(call, answer) => {
                replies.push((call, answer));
                continue;
            }
            Effect::InitializeSource { .. } => Completion::VmInitialized(Ok(())),
            Effect::Save { .. } => Completion::Saved(Ok(Saved {
                config: Any::default(),
                sandbox_state: None,
                disks: BTreeSet::new(),
            })),
            Effect::Import { .. } => Completion::Imported(Ok(Imported::default())),
            Effect::Patch { source, .. } => Completion::ContainerPatched { source, result: Ok(GuestPid(7)) },
            Effect::CreateDestinationVm { .. } => Completion::VmCreated(Ok(())),
            Effect::AdoptSocket { stream, .. } => Completion::SocketAdopted { stream, result: Ok(()) },
            Effect::CancelTransfer { .. } => {
                let completed = bench.session.state.of().is_some_and(|of| of.completed);
                Completion::CancelDone(Ok(match completed {
                    true => Cancelled::AlreadyCompleted,
                    false => Cancelled::InTime,
                }))
            }
            Effect::ResumeSource { .. } | Effect::RunDestination { .. } => Completion::Resumed(Ok(())),
            Effect::StopVm { .. } => Completion::Stopped(Ok(())),
            // Ends when it likes.
            Effect::StartTransfer { .. } => continue,
            Effect::AbortMigrated { .. }
            | Effect::CloseSockets { .. }
            | Effect::Thaw { .. }
            | Effect::Notify { .. }
            | Effect::EndNotifications { .. }
            | Effect::WakeAt(_) => continue,
        };
        queue.extend(bench.done(completion));
    }
    replies
}

#[test]
fn every_cell() {
    let names: Vec<_> = rows().iter().map(|row| row.0).collect();
    let mut tried = 0;
    for (at, name) in names.iter().enumerate() {
        for (column, expected) in table(name).into_iter().enumerate() {
            let (_, before, mut bench) = rows().swap_remove(at);
            // swap_remove moves the last row into the gap; the one taken is still row `at`.
            let call = columns()[column].clone();
            let frozen = bench.session.state.clone();
            let (id, effects) = bench.call(call.clone());
            let replies = if expected == Joins { Vec::new() } else { play(&mut bench, effects) };
            let reply = replies.into_iter().find(|(of, _)| *of == id).map(|(_, answer)| answer);
            let place = format!("{name} x {call:?}: {reply:?}");
            match expected {
                No(code) => {
                    assert_eq!(reply.map(|answer| answer.unwrap_err().code), Some(code), "{place}");
                    assert_eq!(bench.session.state, frozen, "{place}");
                }
                Noop => {
                    assert_eq!(reply, Some(Ok(Answer::Empty)), "{place}");
                    assert_eq!(bench.session.state, frozen, "{place}");
                }
                To(state) => {
                    assert_eq!(reply.map(|answer| answer.is_ok()), Some(true), "{place}");
                    assert_eq!(bench.id(), state, "{place}");
                }
                Late(state) => {
                    let message = reply.unwrap().unwrap_err().message;
                    assert!(message.contains(ALREADY_COMPLETED), "{place}");
                    assert_eq!(bench.id(), state, "{place}");
                }
                Joins => {
                    assert_eq!(reply, None, "{place}");
                    assert_eq!(bench.id(), before, "{place}");
                }
            }
            tried += 1;
        }
    }
    assert_eq!(tried, 32 * 12);
}

#[test]
fn every_state_of_the_service_has_its_number_and_a_row() {
    let seen: BTreeSet<u8> = rows().iter().map(|(_, id, _)| id.number()).collect();
    assert_eq!(seen, (0..=12).collect());
    assert_eq!(StateId::ALL.map(StateId::number), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
}

#[test]
fn another_session_is_refused_in_every_row() {
    for (name, before, mut bench) in rows() {
        for mut call in columns() {
            match &mut call {
                Call::PrepareSandbox { session }
                | Call::AdoptSocket { session, .. }
                | Call::Transfer { session, .. }
                | Call::Finalize { session, .. }
                | Call::Cancel { session }
                | Call::Cleanup { session }
                | Call::Notifications { session } => *session = SessionId::new("other").unwrap(),
                _ => continue,
            }
            let idle_cleanup = before == S::Idle && matches!(call, Call::Cleanup { .. });
            let (id, effects) = bench.call(call.clone());
            let reply = play(&mut bench, effects).into_iter().find(|(of, _)| *of == id).unwrap().1;
            match idle_cleanup {
                true => assert_eq!(reply, Ok(Answer::Empty)),
                false => assert_eq!(reply.unwrap_err().code, IA, "{name} x {call:?}"),
            }
            assert_eq!(bench.id(), before);
        }
    }
}
