//! Moves that turn back, and moves that meet.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Background, Container, Containerd, Exits, Host, Lab, Run, count};

use crate::{Case, disks::kill_qemu, refusals::assert_unharmed};

pub(crate) const CASES: &[Case] = &[
    ("rollback::a_cancelled_move_leaves_the_source_as_it_was", a_cancelled_move_leaves_the_source_as_it_was),
    ("rollback::a_second_move_is_refused_while_one_runs", a_second_move_is_refused_while_one_runs),
    ("rollback::a_destination_node_that_dies_costs_nothing", a_destination_node_that_dies_costs_nothing),
    (
        "rollback::a_source_machine_that_dies_complete_ends_no_task",
        a_source_machine_that_dies_complete_ends_no_task,
    ),
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

/// A process of a host that stands still until dropped.
struct Frozen<'a> {
    lab: &'a Lab,
    pid: String,
}

impl<'a> Frozen<'a> {
    /// Host a's node: whatever it moves goes on without it, and it decides nothing.
    fn node(lab: &'a Lab) -> Frozen<'a> {
        let found = lab.on(Host::A, &["pgrep", "-f", "^[^ ]*dunlin node"]).ok();
        let [pid] = found.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("one node on host a, not {found:?}");
        };
        lab.on(Host::A, &["kill", "-STOP", pid]).ok();
        Frozen { lab, pid: pid.to_owned() }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = self.lab.on(Host::A, &["kill", "-CONT", &self.pid]);
    }
}

/// All of its state has come over, and the destination is told to run after this.
fn a_source_machine_that_dies_complete_ends_no_task(lab: &Lab) {
    const ID: &str = "b-complete";
    /// Much longer than a move's pause, much less than a peer's patience.
    const STANDS: Duration = Duration::from_millis(1200);
    let (background, exits) = (Background::start(), Exits::default());
    let [_, on_b] = Host::ALL.map(|host| {
        let containerd = Containerd::connect(lab, host, &background);
        exits.listen(&containerd);
        containerd
    });
    let container = Container::start(lab, Host::A, ID, &["/bin/counter"]);
    container.await_lines(Host::A, 50, SOON);
    let before = container.identity(Host::A, "who-a");

    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, ID);
    let node = Frozen::node(lab);
    drop(slow);
    let (begin, mut since, mut seen) = (Instant::now(), Instant::now(), container.log(Host::A).len());
    while since.elapsed() < STANDS {
        assert!(begin.elapsed() < SOON, "the machine does not leave");
        let now = container.log(Host::A).len();
        if now != seen {
            (since, seen) = (Instant::now(), now);
        }
        thread::sleep(Duration::from_millis(20));
    }
    kill_qemu(lab, Host::A);
    thread::sleep(Duration::from_millis(200));
    drop(node);
    let run = Run::finish(child, "dunlin migrate", MOVE);
    println!("    {}", run.stdout.lines().last().unwrap_or_default());
    run.ok();
    container.assert_only_on(Host::B);
    assert_eq!(container.identity(Host::B, "who-b"), before, "another process than before");
    container.await_lines(Host::B, 50, SOON);
    let both = count(&(container.log(Host::A) + &container.log(Host::B)));
    assert!(both.missing.is_empty() && both.repeated.is_empty() && both.damaged.is_empty(), "{both:?}");
    assert_eq!(exits.announced(ID, "").len(), 0, "{:?}", exits.all_announced());
    on_b.kill(ID, "", 9);
    assert_eq!(exits.await_one(ID, "", SOON).host, Host::B);
    assert_eq!(on_b.delete(ID, "").code, 137);
    assert_eq!(exits.announced(ID, "").len(), 1, "{:?}", exits.all_announced());
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
