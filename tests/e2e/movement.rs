//! A container that moves: nothing lost, nothing twice, never two.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab, Run, count};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("movement::one_move_under_watch", one_move_under_watch),
    ("movement::five_round_trips_under_load", five_round_trips_under_load),
    ("movement::the_exit_code_is_told_on_the_destination", the_exit_code_is_told_on_the_destination),
    ("movement::the_task_api_works_on_the_destination", the_task_api_works_on_the_destination),
];

const SOON: Duration = Duration::from_secs(20);

/// Samples both containerds until told to end; gives the states seen, and fails on two running.
fn watch_states(lab: &Lab, id: &str, ended: &AtomicBool) -> Vec<String> {
    let observer = lab.observer();
    let mut seen: Vec<String> = Vec::new();
    while !ended.load(Ordering::Relaxed) {
        // The two answers are not of one moment: only running on a, then on b, then still
        // on a means that both ran at once.
        let first = observer.state(Host::A, id);
        let second = observer.state(Host::B, id);
        let third = observer.state(Host::A, id);
        let running = |state: &Option<String>| state.as_deref() == Some("RUNNING");
        assert!(!(running(&first) && running(&second) && running(&third)), "{id} ran on both hosts at once");
        let show = |state: Option<String>| state.unwrap_or_else(|| "-".to_owned());
        let pair = format!("a {} b {}", show(first), show(second));
        if seen.last() != Some(&pair) {
            seen.push(pair);
        }
        thread::sleep(Duration::from_millis(50));
    }
    seen
}

/// Moves `id` while both sides are watched; gives the move's run and the states seen.
fn watched_move(lab: &Lab, from: Host, id: &str) -> (Run, Vec<String>) {
    let ended = AtomicBool::new(false);
    let migrate = lab.command_on(from, &["dunlin", "migrate", id, "--to", from.other().name()]);
    thread::scope(|scope| {
        let watch = scope.spawn(|| watch_states(lab, id, &ended));
        let run = thread::Builder::new()
            .spawn_scoped(scope, || Run::new(migrate, Duration::from_secs(180)))
            .expect("a thread")
            .join();
        ended.store(true, Ordering::Relaxed);
        let seen = watch.join().expect("never running on both hosts");
        (run.expect("the move ends"), seen)
    })
}

fn one_move_under_watch(lab: &Lab) {
    let container = Container::start(lab, Host::A, "m-one", &["/bin/counter"]);
    container.await_lines(Host::A, 50, SOON);
    let (run, seen) = watched_move(lab, Host::A, "m-one");
    println!("    moved in {:.2} s; states: {}", run.took.as_secs_f64(), seen.join(" | "));
    run.ok();
    container.assert_only_on(Host::B);
    // Its shim, its machine and its disk: what a source must not keep is found where it is.
    let of_it = lab.left_of(Host::B, "default", "m-one");
    assert!(of_it.len() >= 3, "{of_it:#?}");
    container.await_lines(Host::B, 100, SOON);
    assert_whole(&container, Host::B);
    container.remove(Host::B);
}

/// The file inside counts 1, 2, 3, ... once each; the logs of both hosts together miss
/// nothing and repeat nothing.
pub(crate) fn assert_whole(container: &Container<'_>, host: Host) {
    let file = container.exec(host, "whole", &["cat", "/counter.log"]).ok();
    let file = count(&file);
    assert!(
        file.last > 0 && file.missing.is_empty() && file.repeated.is_empty() && file.damaged.is_empty(),
        "the file inside: {file:?}"
    );
    assert_eq!(file.pids.len(), 1, "the counter started more than once: {file:?}");
    let logs = count(&(container.log(Host::A) + &container.log(Host::B)));
    assert!(
        logs.missing.is_empty() && logs.repeated.is_empty() && logs.damaged.is_empty(),
        "the logs: {logs:?}"
    );
    assert!(
        logs.last >= file.last.saturating_sub(500),
        "the logs end at {}, the file at {}",
        logs.last,
        file.last
    );
    assert_eq!(logs.pids, file.pids, "{logs:?}");
}

fn five_round_trips_under_load(lab: &Lab) {
    let container = Container::start(lab, Host::A, "m-load", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    lab.ctr(Host::A, &["task", "exec", "-d", "--exec-id", "load", "m-load", "/bin/load", "4096"]).ok();
    let identity = container.identity(Host::A, "id-0");
    // The script forks now and then; itself it is the one whose parent is outside of the container.
    let find_load = "for p in /proc/[0-9]*; do read -r x <$p/comm; [ \"$x\" = load ] && \
        [ \"$(cut -d' ' -f4 $p/stat)\" = 0 ] && echo ${p#/proc/} && cut -d' ' -f22 $p/stat; done 2>/dev/null; true";
    let load = container.exec(Host::A, "load-0", &["sh", "-c", find_load]).ok();
    assert_eq!(load.lines().count(), 2, "the load runs: {load}");
    let mut host = Host::A;
    let mut times = Vec::new();
    for number in 1..=10 {
        let (run, _) = watched_move(lab, host, "m-load");
        times.push(run.took);
        run.ok();
        host = host.other();
        container.assert_only_on(host);
        container.await_lines(host, 20, SOON);
        assert_eq!(
            container.identity(host, &format!("id-{number}")),
            identity,
            "another process after move {number}"
        );
        let now = container.exec(host, &format!("load-{number}"), &["sh", "-c", find_load]).ok();
        assert_eq!(now, load, "the open exec is another after move {number}");
    }
    let seconds: Vec<String> = times.iter().map(|time| format!("{:.2}", time.as_secs_f64())).collect();
    println!("    ten moves took {} s", seconds.join(" "));
    let old = container.exec(host, "sum-1", &["md5sum", "/load.dat"]).ok();
    let since = Instant::now();
    while container.exec(host, &format!("sum-{}", since.elapsed().as_micros()), &["md5sum", "/load.dat"]).ok()
        == old
    {
        assert!(since.elapsed() < SOON, "the load does not write any more");
    }
    assert_whole(&container, host);
    container.remove(host);
}

fn the_exit_code_is_told_on_the_destination(lab: &Lab) {
    let container = Container::start(lab, Host::A, "m-exit", &["/bin/counter", "3000", "42"]);
    container.await_lines(Host::A, 20, SOON);
    lab.migrate(Host::A, "m-exit", "b").ok();
    assert!(container.counted(Host::B).last < 3000, "it ended before it was moved: this proves nothing");
    container.await_state(Host::B, "STOPPED", Duration::from_secs(180));
    let counted = count(&(container.log(Host::A) + &container.log(Host::B)));
    assert_eq!((counted.last, counted.missing.len()), (3000, 0), "{counted:?}");
    let removed = lab.ctr(Host::B, &["task", "rm", "m-exit"]);
    assert!(format!("{}{}{}", removed.code, removed.stdout, removed.stderr).contains("42"), "{removed:?}");
    lab.ctr(Host::B, &["containers", "rm", "m-exit"]).ok();
}

fn the_task_api_works_on_the_destination(lab: &Lab) {
    let container = Container::start(lab, Host::A, "m-api", &["/bin/counter"]);
    container.exec(Host::A, "write", &["sh", "-c", "echo kept >/kept; mkdir /d; echo deep >/d/f"]).ok();
    lab.migrate(Host::A, "m-api", "b").ok();
    container.assert_only_on(Host::B);
    assert_eq!(
        container.exec(Host::B, "read", &["cat", "/kept", "/d/f", "/etc/dunlin-demo"]).ok(),
        "kept\ndeep\nthis file came with the image\n"
    );
    assert_eq!(container.exec(Host::B, "code", &["sh", "-c", "exit 9"]).code, 9);
    lab.ctr(Host::B, &["task", "pause", "m-api"]).ok();
    container.await_state(Host::B, "PAUSED", SOON);
    lab.ctr(Host::B, &["task", "resume", "m-api"]).ok();
    container.await_lines(Host::B, 20, SOON);
    assert!(lab.ctr(Host::B, &["task", "metrics", "m-api"]).ok().contains("memory"));
    assert!(lab.ctr(Host::B, &["task", "ps", "m-api"]).ok().lines().count() >= 2);
    // A new container of the same name may be started where the old one left.
    container.remove(Host::B);
    lab.ctr(
        Host::A,
        &["run", "--rm", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, "m-api", "true"],
    )
    .ok();
}
