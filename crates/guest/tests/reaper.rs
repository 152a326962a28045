//! The reaper and the helper protocol, as an ordinary process that adopts its orphans.

use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use dunlin_guest::oci::Request;
use dunlin_guest::oci::client::{Client, OciError, ProcessStdio};
use dunlin_guest::reaper::{Exit, Reaper};
use nix::errno::Errno;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// One for the whole test process, because it reaps every child of it.
fn reaper() -> Reaper {
    static REAPER: OnceLock<Reaper> = OnceLock::new();
    REAPER
        .get_or_init(|| {
            nix::sys::prctl::set_child_subreaper(true).unwrap();
            Reaper::start().unwrap()
        })
        .clone()
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

#[tokio::test]
async fn every_exit_is_told_however_fast() {
    let reaper = reaper();
    for round in 0..200u32 {
        let code = i32::try_from(round % 250).unwrap();
        let mut watched = reaper.spawn(&mut sh(&format!("exit {code}"))).unwrap();
        assert_eq!(timeout(LIMIT, watched.wait()).await.unwrap(), Exit::Code(code));
        assert_eq!(watched.clone().wait().await, Exit::Code(code), "told again");
    }
}

#[tokio::test]
async fn signals_reach_the_living_only() {
    let reaper = reaper();
    let mut watched = reaper.spawn(&mut sh("exec sleep 100")).unwrap();
    assert_eq!(watched.exited_at(), None);
    reaper.signal(&watched, libc::SIGTERM).unwrap();
    let exit = timeout(LIMIT, watched.wait()).await.unwrap();
    assert_eq!((exit, exit.shell_code(), exit.utility_code()), (Exit::Signal(15), 143, u32::MAX));
    assert!(watched.exited_at().unwrap().elapsed().unwrap() < LIMIT);
    assert_eq!(reaper.signal(&watched, libc::SIGTERM), Err(Errno::ESRCH));
}

#[tokio::test]
async fn orphans_are_reaped() {
    let reaper = reaper();
    let before = reaper.reaped_orphans();
    let mut parent = reaper.spawn(&mut sh("(sleep 0.2; exit 9) & exit 0")).unwrap();
    timeout(LIMIT, parent.wait()).await.unwrap();
    let end = Instant::now() + LIMIT;
    while reaper.reaped_orphans() == before {
        assert!(Instant::now() < end, "the orphan stays a zombie");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn commands_that_do_not_exist_fail_and_leave_nothing() {
    assert!(reaper().spawn(&mut Command::new("/no/such/program")).is_err());
}

fn client() -> Client {
    Client::new(env!("CARGO_BIN_EXE_dunlin-guest").into(), reaper())
}

#[tokio::test]
async fn a_refusal_comes_back_with_its_reason() {
    let error = tokio::task::spawn_blocking(|| client().call(&Request::Start { id: "nobody".into() }))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, OciError::Runtime(_)), "{error}");
}

/// Stands for the helper: answers with the pid of a child that ends at once, and holds on to it.
async fn fake_helper(dir: &std::path::Path, body: &str) -> Client {
    use std::os::unix::fs::PermissionsExt;
    let (text, path) = (dir.join("helper.txt"), dir.join("helper"));
    std::fs::write(&text, format!("#!/bin/bash\nread -r -u 3 request\n{body}\n")).unwrap();
    // Copied by another process: a fork of this one, made while the file is open for writing, would
    // make it "text file busy".
    let mut copy = Command::new("cp");
    let mut copied = reaper().spawn(copy.arg(&text).arg(&path)).unwrap();
    assert_eq!(timeout(LIMIT, copied.wait()).await.unwrap(), Exit::Code(0));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Client::new(path, reaper())
}

fn create() -> Request {
    Request::Create { id: "x".into(), bundle: "/nowhere".into(), console: None }
}

#[tokio::test]
async fn an_exit_before_the_handover_is_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    // A shell reaps its children itself; what it has become by the time of the exit does not.
    let script = r#"( sleep 0.2; exit 42 ) & pid=$!
        exec perl -e 'select undef, undef, undef, 0.6; open my $to, "+<&=", 3 or die;
            syswrite $to, "{\"process\":{\"pid\":$ARGV[0]}}\n"; sysread $to, my $end, 1' $pid"#;
    let client = fake_helper(dir.path(), script).await;
    let (mut watched, master) =
        tokio::task::spawn_blocking(move || client.start_process(&create(), ProcessStdio::default(), None))
            .await
            .unwrap()
            .unwrap();
    assert!(master.is_none());
    assert_eq!(timeout(LIMIT, watched.wait()).await.unwrap(), Exit::Code(42));
}

#[tokio::test]
async fn a_helper_that_dies_silently_is_noticed_though_its_socket_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    // The sleeper keeps a copy of the control socket, as a parked container init does.
    let client = fake_helper(dir.path(), "sleep 30 & echo $! >\"$0.pid\"; exit 1").await;
    let started = Instant::now();
    let error = tokio::task::spawn_blocking(move || {
        client.start_process(&create(), ProcessStdio::default(), None).map(drop)
    })
    .await
    .unwrap()
    .unwrap_err();
    assert!(matches!(error, OciError::NoAnswer(_)), "{error}");
    assert!(started.elapsed() < LIMIT);
    let pid: i32 = std::fs::read_to_string(dir.path().join("helper.pid")).unwrap().trim().parse().unwrap();
    // SAFETY: kill(2) takes no pointers; the pid is of the sleeper that this test has started.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

#[tokio::test]
async fn a_real_time_signal_is_an_end_too_and_hides_no_other() {
    let reaper = reaper();
    for signal in [libc::SIGRTMIN(), libc::SIGRTMAX()] {
        let mut watched = reaper.spawn(&mut sh("exec sleep 100")).unwrap();
        reaper.signal(&watched, signal).unwrap();
        assert_eq!(timeout(LIMIT, watched.wait()).await.unwrap(), Exit::Signal(signal));
    }
    let mut next = reaper.spawn(&mut sh("exit 5")).unwrap();
    assert_eq!(timeout(LIMIT, next.wait()).await.unwrap(), Exit::Code(5));
}
