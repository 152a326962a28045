//! Terminals that an interactive client holds: before a move, after it, and after the move back.

use std::{sync::mpsc, time::Duration};

use dunlin_tests::{Background, Code, Container, Containerd, Host, Lab, Status, Terminal};
use serde_json::{Value, json};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("terminals::held_terminals_go_along_and_back", held_terminals_go_along_and_back),
    ("terminals::sizes_and_limits_change_and_what_has_none_is_refused", sizes_and_limits),
];

const ID: &str = "t-held";
const EXEC: &str = "held";
const SOON: Duration = Duration::from_secs(30);
/// Lines that are printed over the first move.
const LINES: u32 = 80;

/// `ctr` on a pty of a host.
fn ctr(lab: &Lab, host: Host, arguments: &[&str], columns: u16, rows: u16) -> Terminal {
    Terminal::start(lab.command_on(host, &[&["ctr"], arguments].concat()), columns, rows)
}

/// An exec's terminal, by what containerd says of its streams: `ctr task attach` takes no exec's id.
fn attach_exec(lab: &Lab, containerd: &Containerd) -> Terminal {
    let process = containerd.process(ID, EXEC);
    assert!(process.terminal && process.stderr.is_empty(), "{process:?}");
    let here = |path: &str| lab.run_path(containerd.host, path);
    Terminal::attach(
        &format!("{EXEC} on host {}", containerd.host),
        &here(&process.stdin),
        &here(&process.stdout),
    )
}

/// containerd's figures of a task.
fn metrics(lab: &Lab, host: Host, id: &str) -> Value {
    let text = lab.ctr(host, &["task", "metrics", "--format", "json", id]).ok();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn held_terminals_go_along_and_back(lab: &Lab) {
    let background = Background::start();
    let on = [Host::A, Host::B].map(|host| Containerd::connect(lab, host, &background));
    let container = Container::adopt(lab, ID);
    let run = ["run", "-t", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, ID, "sh"];
    let mut init = ctr(lab, Host::A, &run, 80, 24);
    init.without_echo();
    init.await_size(80, 24);
    assert_eq!(init.ask("me=$$; tty; echo a$((6 * 7))z"), "/dev/pts/0\r\na42z\r\n");
    let exec = ["task", "exec", "-t", "--exec-id", EXEC, ID, "sh"];
    let mut exec = ctr(lab, Host::A, &exec, 100, 30);
    exec.without_echo();
    exec.await_size(100, 30);
    assert_eq!(exec.ask("word=kept; echo b$((6 * 7))y"), "b42y\r\n");

    on[0].update(ID, &json!({ "pids": { "limit": 77 } })).expect("a limit");
    // What is printed while the client changes is printed once.
    init.press(&format!("n=0; while [ $n -lt {LINES} ]; do n=$((n + 1)); echo line $n; sleep 0.1; done\n"));
    init.await_text("line 3\r\n");
    lab.migrate(Host::A, ID, "b").ok();
    let mut there = ctr(lab, Host::B, &["task", "attach", ID], 90, 40);
    there.await_text(&format!("line {LINES}\r\n{}", Terminal::PROMPT));
    let (before, after) = (init.shown(), there.shown());
    let begun = before.find("line 1\r\n").expect("the first line");
    let left = before.find("ctr: ").unwrap_or(before.len());
    let expected: String = (1..=LINES).map(|number| format!("line {number}\r\n")).collect();
    assert_eq!(format!("{}{after}", &before[begun..left]), format!("{expected}{}", Terminal::PROMPT));
    container.assert_only_on(Host::B);
    assert_eq!(metrics(lab, Host::B, ID)["pids"]["limit"], 77, "the limit has gone along");
    // Whoever held the source's terminals is told where they are.
    for mut client in [init, exec] {
        client.await_text("runs on another host now");
        assert_ne!(client.ended(), 0, "its container is not here any more");
    }

    let mut exec_there = attach_exec(lab, &on[1]);
    try_out(&mut there, &mut exec_there, &on[1]);

    lab.migrate(Host::B, ID, "a").ok();
    assert_ne!(there.ended(), 0, "the client that is left behind saw its container end well");
    let mut back = ctr(lab, Host::A, &["task", "attach", ID], 70, 20);
    back.ask("");
    let mut exec_back = attach_exec(lab, &on[0]);
    try_out(&mut back, &mut exec_back, &on[0]);

    let (sender, ended) = mpsc::sync_channel(1);
    on[0].wait(ID, EXEC, move |answer| drop(sender.send(answer)));
    exec_back.press("exit 7\n");
    let ended = ended.recv_timeout(SOON).expect("the exec's end").expect("an exit");
    assert_eq!(ended.code, 7);
    back.press("exit 5\n");
    assert_eq!(back.ended(), 5, "what the attached client says");
    // The client may have deleted the task already.
    lab.ctr(Host::A, &["task", "rm", ID]);
    lab.ctr(Host::A, &["containers", "rm", ID]).ok();
}

/// Input, echo, the window's size and Ctrl-C, on the init's terminal and the exec's; both are shells that were spoken
/// to before.
fn try_out(init: &mut Terminal, exec: &mut Terminal, containerd: &Containerd) {
    assert_eq!(init.ask("echo $me $$"), "1 1\r\n");
    assert_eq!(exec.ask("echo $word"), "kept\r\n");
    init.become_size(132, 43);
    containerd.resize(ID, EXEC, 101, 31).expect("an exec with a terminal");
    exec.await_size(101, 31);
    for terminal in [init, exec] {
        // The terminal's own echo, and then what the program makes of the line.
        terminal.press("stty echo; echo ready; cat; stty -echo; echo done\n");
        terminal.await_text("ready\r\n");
        terminal.press("over here\n");
        assert_eq!(terminal.await_text("over here\r\nover here\r\n"), "");
        terminal.press("\x04");
        terminal.await_text(&format!("done\r\n{}", Terminal::PROMPT));
        // Ctrl-C is a signal to the program in the foreground.
        let waits = "sh -c 'trap \"echo caught; exit 9\" INT; echo waiting; while :; do sleep 1; done'";
        terminal.press(&format!("{waits}; echo left with $?\n"));
        terminal.await_text("waiting\r\n");
        terminal.press("\x03");
        terminal.await_text(&format!("caught\r\nleft with 9\r\n{}", Terminal::PROMPT));
    }
}

/// Without a move: what containerd may change of a running task, asked of it and not of `ctr`, which knows few of them.
fn sizes_and_limits(lab: &Lab) {
    const ID: &str = "t-limits";
    let background = Background::start();
    let containerd = Containerd::connect(lab, Host::A, &background);
    let container = Container::start(lab, Host::A, ID, &["/bin/counter"]);
    let limits = || {
        let metrics = metrics(lab, Host::A, ID);
        let throttled = metrics["cpu"]["throttling"]["throttled_periods"].as_u64().unwrap_or(0);
        (metrics["memory"]["usage"]["limit"].as_u64(), metrics["pids"]["limit"].as_u64(), throttled)
    };
    let (memory, pids, throttled) = limits();
    assert!(
        memory > Some(1 << 40) && pids.unwrap_or(0) == 0 && throttled == 0,
        "{memory:?} {pids:?} {throttled}"
    );
    let wanted = json!({
        "memory": { "limit": 100 << 20 },
        "pids": { "limit": 60 },
        "cpu": { "shares": 512, "quota": 30_000, "period": 100_000 },
    });
    containerd.update(ID, &wanted).expect("limits that the guest has room for");
    let busy = "n=0; while [ $n -lt 30000 ]; do n=$((n + 1)); done";
    container.exec(Host::A, "busy", &["sh", "-c", busy]).ok();
    let (memory, pids, throttled) = limits();
    assert_eq!((memory, pids, throttled > 0), (Some(100 << 20), Some(60), true));
    containerd.update(ID, &json!({ "pids": { "limit": -1 } })).expect("one limit less");
    let (memory, pids, _) = limits();
    assert_eq!((memory, pids.unwrap_or(0)), (Some(100 << 20), 0), "what is not named stays");

    let refused = |what: &str, answer: Result<(), Status>, code: Code, word: &str| {
        let status = answer.expect_err(what);
        assert_eq!((status.code(), status.message().contains(word)), (code, true), "{what}: {status}");
    };
    let impossible = json!({ "cpu": { "quota": 1, "period": 100_000 } });
    refused("a quota below the kernel's", containerd.update(ID, &impossible), Code::Unknown, "cpu.max");
    // What the guest does not apply is not left out in silence, and nothing of such an update is applied.
    let elsewhere = json!({ "pids": { "limit": 9 }, "cpu": { "cpus": "1" } });
    refused("CPUs of the host", containerd.update(ID, &elsewhere), Code::Unimplemented, "cpu.cpus");
    assert_eq!(limits().1.unwrap_or(0), 0, "all or nothing");
    refused("no such task", containerd.update("nobody", &wanted), Code::NotFound, "nobody");
    refused("an init without a terminal", containerd.resize(ID, "", 80, 24), Code::InvalidArgument, ID);
    refused("no such exec", containerd.resize(ID, "nobody", 80, 24), Code::NotFound, "nobody");
    refused("no such task", containerd.resize("nobody", "", 80, 24), Code::NotFound, "nobody");

    let run = ["task", "exec", "-t", "--exec-id", "sized", ID, "sh"];
    let mut terminal = ctr(lab, Host::A, &run, 80, 24);
    terminal.without_echo();
    terminal.await_size(80, 24);
    // The program in the foreground hears of it.
    let hears = "sh -c 'trap \"echo resized; exit 4\" WINCH; echo waiting; while :; do sleep 1; done'";
    terminal.press(&format!("{hears}; echo left with $?\n"));
    terminal.await_text("waiting\r\n");
    containerd.resize(ID, "sized", 133, 47).expect("an exec with a terminal");
    terminal.await_text(&format!("resized\r\nleft with 4\r\n{}", Terminal::PROMPT));
    terminal.await_size(133, 47);
    terminal.press("exit 3\n");
    assert_eq!(terminal.ended(), 3);
    refused("an exec that has ended", containerd.resize(ID, "sized", 80, 24), Code::NotFound, "sized");
    container.remove(Host::A);
}
