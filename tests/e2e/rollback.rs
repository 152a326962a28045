//! Moves that turn back, and moves that meet.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab, Run};

use crate::{Case, refusals::assert_unharmed};

pub(crate) const CASES: &[Case] = &[
    ("rollback::a_cancelled_move_leaves_the_source_as_it_was", a_cancelled_move_leaves_the_source_as_it_was),
    ("rollback::a_second_move_is_refused_while_one_runs", a_second_move_is_refused_while_one_runs),
    ("rollback::a_destination_node_that_dies_costs_nothing", a_destination_node_that_dies_costs_nothing),
    ("rollback::an_interrupted_command_line_costs_nothing", an_interrupted_command_line_costs_nothing),
];

const SOON: Duration = Duration::from_secs(20);
const MOVE: Duration = Duration::from_secs(180);

/// The way to host b is slow until dropped, so that a transfer can be met in its middle.
pub(crate) struct SlowNetwork;

impl SlowNetwork {
    /// 16 Mbit/s: 256 MiB of a light guest take several seconds.
    pub(crate) fn new() -> SlowNetwork {
        SlowNetwork::tc(&[
            "qdisc", "add", "dev", "lab-b", "root", "tbf", "rate", "16mbit", "burst", "64kb", "latency",
            "200ms",
        ])
        .ok();
        SlowNetwork
    }

    fn tc(arguments: &[&str]) -> Run {
        let mut command = Command::new("tc");
        command.args(["-n", "dunlin-net"]).args(arguments);
        Run::new(command, SOON)
    }
}

impl Drop for SlowNetwork {
    fn drop(&mut self) {
        let mut command = Command::new("tc");
        command.args(["-n", "dunlin-net", "qdisc", "del", "dev", "lab-b", "root"]);
        let _ = command.output();
    }
}

/// Starts a move and waits until its memory is on the way.
pub(crate) fn move_in_transfer(lab: &Lab, id: &str) -> std::process::Child {
    in_transfer(lab, lab.command_on(Host::A, &["dunlin", "migrate", id, "--to", "b"]))
}

/// Starts a move from host a with `command` and waits until its memory is on the way.
pub(crate) fn in_transfer(lab: &Lab, mut command: Command) -> std::process::Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("dunlin lab exec starts");
    let since = Instant::now();
    loop {
        let status = lab.on(Host::A, &["dunlin", "status"]).ok();
        if status.to_lowercase().contains("transfer") {
            return child;
        }
        if let Some(status) = child.try_wait().expect("waited for") {
            let run = Run::finish(child, "dunlin migrate", MOVE);
            panic!("the move ended ({status}) before it was seen in transfer:\n{}{}", run.stdout, run.stderr);
        }
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "the move was not in transfer after 60 s:\n{status}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn a_cancelled_move_leaves_the_source_as_it_was(lab: &Lab) {
    let container = Container::start(lab, Host::A, "b-cancel", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let identity = container.identity(Host::A, "id-0");
    for round in 0..2 {
        let slow = SlowNetwork::new();
        let child = move_in_transfer(lab, "b-cancel");
        lab.on(Host::A, &["dunlin", "cancel", "b-cancel"]).ok();
        let run = Run::finish(child, "dunlin migrate", MOVE);
        drop(slow);
        run.fails_naming(&["cancel"]);
        assert_unharmed(lab, &container, &format!("after-{round}"));
        assert_eq!(container.identity(Host::A, &format!("id-a{round}")), identity);
    }
    // A roll-back has no seam: the same host goes on where it was.
    let log = container.counted(Host::A);
    assert!(log.missing.is_empty() && log.repeated.is_empty() && log.damaged.is_empty(), "{log:?}");
    lab.migrate(Host::A, "b-cancel", "b").ok();
    container.assert_only_on(Host::B);
    container.await_lines(Host::B, 20, SOON);
    assert_eq!(container.identity(Host::B, "id-b"), identity);
    let logs = dunlin_tests::count(&(container.log(Host::A) + &container.log(Host::B)));
    assert!(logs.missing.is_empty() && logs.damaged.is_empty(), "{logs:?}");
    assert!(logs.repeated.is_empty(), "repeats: {logs:?}");
    container.remove(Host::B);
}

fn a_second_move_is_refused_while_one_runs(lab: &Lab) {
    let container = Container::start(lab, Host::A, "b-second", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, "b-second");
    let second = lab.migrate(Host::A, "b-second", "b");
    drop(slow);
    second.fails_naming(&["container `b-second` is moving already, in session ", "dunlin cancel b-second"]);
    Run::finish(child, "dunlin migrate", MOVE).ok();
    container.assert_only_on(Host::B);
    container.await_lines(Host::B, 20, SOON);
    container.remove(Host::B);
}

fn a_destination_node_that_dies_costs_nothing(lab: &Lab) {
    let container = Container::start(lab, Host::A, "b-dies", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, "b-dies");
    lab.service(Host::B, "kill", "node");
    let run = Run::finish(child, "dunlin migrate", MOVE);
    drop(slow);
    lab.service(Host::B, "start", "node");
    run.fails_naming(&["node b"]);
    container.await_state(Host::A, "RUNNING", SOON);
    container.await_lines(Host::A, 30, SOON);
    assert_eq!(container.exec(Host::A, "after", &["echo", "here"]).ok(), "here\n");
    assert_ne!(container.state(Host::B).as_deref(), Some("RUNNING"), "it runs on both");
}

fn an_interrupted_command_line_costs_nothing(lab: &Lab) {
    // The daemon moves, the command line only watches: whichever way it goes, one copy runs.
    let container = Container::start(lab, Host::A, "b-ctrl-c", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let slow = SlowNetwork::new();
    let mut child = move_in_transfer(lab, "b-ctrl-c");
    child.kill().expect("killed");
    child.wait().expect("ended");
    drop(slow);
    let since = Instant::now();
    let host = loop {
        let states = Host::ALL.map(|host| container.state(host));
        match states.each_ref().map(|state| state.as_deref() == Some("RUNNING")) {
            [true, false] if states[1].is_none() && since.elapsed() > Duration::from_secs(5) => {
                break Host::A;
            }
            [false, true] if states[0].is_none() => break Host::B,
            _ => {}
        }
        assert!(since.elapsed() < Duration::from_secs(90), "neither here nor there: {states:?}");
        thread::sleep(Duration::from_millis(100));
    };
    container.assert_only_on(host);
    container.await_lines(host, 20, SOON);
    container.remove(host);
}
