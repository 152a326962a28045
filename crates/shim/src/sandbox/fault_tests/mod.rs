//! A sandbox whose guest or machine fails in the middle of a call: each call ends, in bounded time and with an error
//! that names what was asked; each exit is told once; and what is left can be deleted. And an end that is none of
//! these: its last words are there before it is told.

mod rig;

use std::future::Future;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use dunlin_bridge::message::Request;
use dunlin_testkit::{Fault, Script};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Sandbox;
use super::error::{Code, SandboxError};
use crate::process::io::Stdio;
use rig::{Rig, SANDBOX, SOON, WORKLOAD};

/// What a guest has for one answer.
const ANSWER: Duration = dunlin_bridge::host::CALL_DEADLINE;

/// A call of containerd's, under way.
type Call<T> = JoinHandle<Result<T, SandboxError>>;

impl Rig {
    /// Makes a call whose answer from the guest stays away; gives it when the guest has done what it was asked.
    async fn held<T, F>(&self, request: Request, call: impl FnOnce(Arc<Sandbox>) -> F) -> Call<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, SandboxError>> + Send + 'static,
    {
        self.faults.set(request, Fault::Held);
        let call = tokio::spawn(call(Arc::clone(&self.sandbox)));
        timeout(SOON, self.faults.met()).await.expect("the guest is asked");
        call
    }
}

async fn ended<T>(call: Call<T>) -> Result<T, SandboxError> {
    timeout(SOON, call).await.expect("the call ends").expect("it does not panic")
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(answer: Result<T, SandboxError>, code: Code, words: &[&str]) {
    let error = answer.expect_err("a guest that fails");
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
}

fn killed(ids: &[&str]) -> Vec<(String, u32)> {
    let mut exits: Vec<_> = ids.iter().map(|id| ((*id).to_owned(), 137)).collect();
    exits.sort();
    exits
}

#[tokio::test]
async fn a_machine_that_dies_while_a_container_is_created_leaves_nothing_of_it() {
    let Some(rig) = Rig::new().await else { return };
    rig.faults.set(Request::Create, Fault::Held);
    let create = async {
        rig.faults.met().await;
        rig.qemu.kill();
    };
    let (created, ()) = timeout(SOON, async { tokio::join!(rig.create(SANDBOX), create) }).await.unwrap();
    assert_refused(created, Code::Unavailable, &["creating the container"]);
    assert!(matches!(rig.sandbox.state(SANDBOX, ""), Err(SandboxError::NoContainer { .. })));
    // It can be tried again, with a machine of its own.
    rig.faults.clear();
    rig.create(SANDBOX).await.unwrap();
    rig.sandbox.start(SANDBOX, "").await.unwrap();
    rig.qemu.kill();
    assert_eq!(rig.exits(1).await, killed(&[SANDBOX]));
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn a_machine_that_dies_while_an_init_is_started_is_its_end() {
    let Some(rig) = Rig::new().await else { return };
    rig.create(SANDBOX).await.unwrap();
    let start = rig.held(Request::ExecuteProcess, |sandbox| async move { sandbox.start(SANDBOX, "").await });
    let start = start.await;
    rig.qemu.kill();
    assert_refused(ended(start).await, Code::Unavailable, &["starting the process"]);
    assert_eq!(rig.exits(1).await, killed(&[SANDBOX]));
    assert_eq!(rig.sandbox.wait(SANDBOX, "").await.unwrap().code, 137);
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn a_machine_that_dies_while_an_exec_is_started_ends_everything_once() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.exec("e1");
    let start =
        rig.held(Request::ExecuteProcess, |sandbox| async move { sandbox.start(WORKLOAD, "e1").await });
    let start = start.await;
    rig.qemu.kill();
    assert_refused(ended(start).await, Code::Unavailable, &["starting the process"]);
    assert_eq!(rig.exits(3).await, killed(&["e1", SANDBOX, WORKLOAD]));
    assert_eq!(rig.sandbox.delete(WORKLOAD, "e1").await.unwrap().1.code, 137);
    rig.delete_all(&[WORKLOAD, SANDBOX]).await;
}

#[tokio::test]
async fn a_machine_that_dies_while_a_signal_is_sent_ends_everything_once() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    let kill = rig
        .held(Request::SignalProcess, |sandbox| async move { sandbox.kill(WORKLOAD, "", 15, false).await })
        .await;
    rig.qemu.kill();
    assert_refused(ended(kill).await, Code::Unavailable, &["sending a signal"]);
    // What the signal did may have been told before the end of all.
    let exits = rig.exits(2).await;
    assert_eq!(exits.len(), 2, "{exits:?}");
    assert!(matches!(exits[1].1, 137 | 143), "{exits:?}");
    assert_refused(rig.sandbox.kill(WORKLOAD, "", 15, false).await, Code::NotFound, &[WORKLOAD, "ended"]);
    timeout(SOON, rig.sandbox.delete(WORKLOAD, "")).await.unwrap().unwrap();
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn a_machine_that_dies_while_a_container_is_deleted_lets_it_go() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.sandbox.kill(WORKLOAD, "", 9, false).await.unwrap();
    assert_eq!(rig.exits(1).await, killed(&[WORKLOAD]));
    let delete = rig
        .held(Request::DeleteContainerState, |sandbox| async move { sandbox.delete(WORKLOAD, "").await })
        .await;
    rig.qemu.kill();
    assert_eq!(ended(delete).await.unwrap().1.code, 137);
    assert_eq!(rig.exits(2).await, killed(&[SANDBOX, WORKLOAD]));
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn what_is_killed_while_it_starts_late_does_not_run_on() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.exec("e1");
    let start =
        rig.held(Request::ExecuteProcess, |sandbox| async move { sandbox.start(WORKLOAD, "e1").await }).await;
    // containerd's patience is at its end.
    rig.sandbox.kill(WORKLOAD, "e1", 9, false).await.unwrap();
    assert_eq!(rig.exits(1).await, killed(&["e1"]));
    assert_eq!(rig.sandbox.delete(WORKLOAD, "e1").await.unwrap().1.code, 137);
    rig.faults.clear();
    let late = ended(start).await.unwrap_err();
    assert!(late.to_string().contains("e1"), "{late}");
    let signals = |journal: &[String]| journal.iter().filter(|line| *line == "signal work").count();
    assert_eq!(
        signals(&rig.qemu.journal()),
        1,
        "the process that nobody wants any more: {:?}",
        rig.qemu.journal()
    );
    rig.qemu.kill();
    assert_eq!(rig.exits(3).await, killed(&["e1", SANDBOX, WORKLOAD]));
    rig.delete_all(&[WORKLOAD, SANDBOX]).await;
}

/// What is saved in between would say that a container runs which the guest has frozen, or the other way round.
#[tokio::test]
async fn nothing_is_saved_while_a_pause_or_a_resume_is_under_way() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.sandbox.may_be_saved().unwrap();
    for paused in [true, false] {
        let request = if paused { Request::PauseContainer } else { Request::ResumeContainer };
        let call = rig.held(request, move |sandbox| async move {
            if paused { sandbox.pause(WORKLOAD).await } else { sandbox.resume(WORKLOAD).await }
        });
        let call = call.await;
        let refusal = rig.sandbox.may_be_saved().unwrap_err();
        assert!(refusal.message.contains(WORKLOAD) && refusal.message.contains("under way"), "{refusal:?}");
        rig.faults.clear();
        ended(call).await.unwrap();
        assert_eq!(rig.sandbox.inner().container(WORKLOAD).unwrap().paused, paused);
        rig.sandbox.may_be_saved().unwrap();
    }
    rig.qemu.kill();
    assert_eq!(rig.exits(2).await, killed(&[SANDBOX, WORKLOAD]));
    rig.delete_all(&[WORKLOAD, SANDBOX]).await;
}

#[tokio::test]
async fn a_guest_that_never_answers_is_waited_for_so_long_and_no_longer() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.exec("e1");
    let sandbox = &rig.sandbox;
    for request in [
        Request::Create,
        Request::ExecuteProcess,
        Request::SignalProcess,
        Request::GetProperties,
        Request::ModifySettings,
        Request::PauseContainer,
        Request::DeleteContainerState,
    ] {
        rig.faults.set(request, Fault::Held);
    }
    tokio::time::pause();
    let since = tokio::time::Instant::now();
    assert_refused(sandbox.start(WORKLOAD, "e1").await, Code::DeadlineExceeded, &["starting the process"]);
    assert_refused(sandbox.pids(WORKLOAD).await, Code::DeadlineExceeded, &["listing processes"]);
    assert_refused(sandbox.update(WORKLOAD, b"{}").await, Code::DeadlineExceeded, &["changing the limits"]);
    assert_refused(sandbox.pause(WORKLOAD).await, Code::DeadlineExceeded, &["pausing the container"]);
    assert_refused(sandbox.kill(WORKLOAD, "", 1, false).await, Code::DeadlineExceeded, &["sending a signal"]);
    assert!(since.elapsed() < 5 * ANSWER + SOON, "{:?}", since.elapsed());
    assert_eq!(rig.exits(1).await, [(WORKLOAD.to_owned(), 129)]);
    // One of two is deleted: the guest would be asked for several things, and has the time of one.
    let since = tokio::time::Instant::now();
    assert_eq!(sandbox.delete(WORKLOAD, "").await.unwrap().1.code, 129);
    assert!(since.elapsed() < ANSWER + SOON, "{:?}", since.elapsed());
    tokio::time::resume();
    rig.qemu.kill();
    assert_eq!(rig.exits(2).await, [(SANDBOX.to_owned(), 137), (WORKLOAD.to_owned(), 129)]);
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn a_guest_that_does_not_even_hear_sigkill_ends_with_its_machine() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.faults.set(Request::WaitForProcess, Fault::Held);
    rig.faults.set(Request::SignalProcess, Fault::Held);
    tokio::time::pause();
    rig.sandbox.kill(WORKLOAD, "", 9, false).await.unwrap();
    tokio::time::resume();
    assert_eq!(rig.exits(2).await, killed(&[SANDBOX, WORKLOAD]));
    rig.delete_all(&[WORKLOAD, SANDBOX]).await;
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_named_and_one_under_another_id_is_none() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    let sandbox = &rig.sandbox;
    rig.faults.set(Request::GetProperties, Fault::NoJson);
    assert_refused(sandbox.pids(WORKLOAD).await, Code::Unavailable, &["listing processes", "cannot be read"]);
    assert_eq!(sandbox.pids(WORKLOAD).await.unwrap().len(), 1);
    rig.exec("e1");
    rig.faults.set(Request::ExecuteProcess, Fault::OtherId);
    tokio::time::pause();
    assert_refused(sandbox.start(WORKLOAD, "e1").await, Code::DeadlineExceeded, &["starting the process"]);
    tokio::time::resume();
    rig.faults.clear();
    rig.qemu.kill();
    assert_eq!(rig.exits(3).await, killed(&["e1", SANDBOX, WORKLOAD]));
    rig.delete_all(&[WORKLOAD, SANDBOX]).await;
}

#[tokio::test]
async fn a_connection_that_carries_nonsense_is_dropped_and_the_next_one_goes_on() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    let sandbox = &rig.sandbox;
    for (number, fault) in [Fault::OtherKind, Fault::Oversized].into_iter().enumerate() {
        let exec = format!("e{number}");
        rig.exec(&exec);
        rig.faults.set(Request::ExecuteProcess, fault);
        let pid = timeout(SOON, sandbox.start(WORKLOAD, &exec)).await.expect("it is asked again").unwrap();
        assert_eq!(sandbox.state(WORKLOAD, &exec).unwrap().pid, pid);
    }
    // Each was started once, though it was asked for twice.
    let started = rig.qemu.journal().iter().filter(|line| *line == "execute work").count();
    assert_eq!(started, 3, "{:?}", rig.qemu.journal());
    sandbox.kill(WORKLOAD, "", 9, true).await.unwrap();
    assert_eq!(rig.exits(3).await, killed(&["e0", "e1", WORKLOAD]));
    rig.delete_all(&[WORKLOAD]).await;
    sandbox.kill(SANDBOX, "", 9, false).await.unwrap();
    rig.exits(4).await;
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn a_wait_whose_answer_cannot_be_read_is_an_exit_of_its_own_and_told_once() {
    let Some(rig) = Rig::with_a_running_pod().await else { return };
    rig.faults.set(Request::WaitForProcess, Fault::NoJson);
    rig.sandbox.kill(WORKLOAD, "", 9, false).await.unwrap();
    assert_eq!(rig.exits(1).await, [(WORKLOAD.to_owned(), 255)]);
    assert_eq!(rig.sandbox.wait(WORKLOAD, "").await.unwrap().code, 255);
    timeout(SOON, rig.sandbox.delete(WORKLOAD, "")).await.unwrap().unwrap();
    rig.qemu.kill();
    assert_eq!(rig.exits(2).await, [(SANDBOX.to_owned(), 137), (WORKLOAD.to_owned(), 255)]);
    rig.delete_all(&[SANDBOX]).await;
}

/// A guest without our extensions has sent the answer once, and it went down with its connection.
#[tokio::test]
async fn an_exit_whose_answer_was_lost_is_asked_for_again_where_the_guest_does_not_repeat_it() {
    let Some(rig) = Rig::new().await else { return };
    rig.faults.be_plain();
    rig.run_pod().await;
    rig.faults.set(Request::WaitForProcess, Fault::Oversized);
    rig.sandbox.kill(WORKLOAD, "", 9, false).await.unwrap();
    assert_eq!(rig.exits(1).await, killed(&[WORKLOAD]));
    assert_eq!(rig.sandbox.wait(WORKLOAD, "").await.unwrap().code, 137);
    timeout(SOON, rig.sandbox.delete(WORKLOAD, "")).await.unwrap().unwrap();
    rig.sandbox.kill(SANDBOX, "", 9, false).await.unwrap();
    assert_eq!(rig.exits(2).await, killed(&[SANDBOX, WORKLOAD]), "each once");
    rig.delete_all(&[SANDBOX]).await;
}

#[tokio::test]
async fn the_last_output_is_handed_on_before_the_exit_is_told_and_a_delete_takes_none_of_it() {
    const LINES: u64 = 4000;
    let Some(rig) = Rig::with_inits(Script::count(LINES, Duration::ZERO, 3)).await else { return };
    let fifo = rig.path("stdout");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // A client that is there, and slow.
    let mut client = std::fs::File::options();
    let mut client = client.read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
    let stdio = Stdio { stdout: fifo.display().to_string(), ..Stdio::default() };
    rig.create_with(SANDBOX, stdio).await.unwrap();
    rig.sandbox.start(SANDBOX, "").await.unwrap();
    assert_eq!(rig.sandbox.wait(SANDBOX, "").await.unwrap().code, 3);
    assert_eq!(rig.sandbox.delete(SANDBOX, "").await.unwrap().1.code, 3);
    let mut text = Vec::new();
    // Non-blocking: until nobody writes to it any more.
    while client.read_to_end(&mut text).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let expected: String = (0..LINES).map(|line| format!("{line}\n")).collect();
    assert!(text == expected.as_bytes(), "{} bytes of {}", text.len(), expected.len());
}
