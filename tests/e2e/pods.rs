//! Two pods of three containers in one machine, all of them chatty, moved back and forth: every byte arrives
//! once and in its place, every exit is told once.

use std::{
    env, thread,
    time::{Duration, Instant, SystemTime},
};

use dunlin_tests::{Chatty, Host, Lab, Pods, Run, Work};

use crate::{
    Case,
    rollback::{SlowNetwork, move_in_transfer},
};

pub(crate) const CASES: &[Case] = &[
    ("pods::every_byte_and_every_exit_once", every_byte_and_every_exit_once),
    ("pods::a_reader_that_stands_still_loses_nothing", a_reader_that_stands_still_loses_nothing),
    ("pods::a_cancelled_move_costs_no_byte_and_no_exit", a_cancelled_move_costs_no_byte_and_no_exit),
];

const POD: &[(&str, &str)] =
    &[("io.kubernetes.cri.container-type", "sandbox"), ("io.kubernetes.cri.sandbox-id", "p1")];
const IN_POD: &[(&str, &str)] =
    &[("io.kubernetes.cri.container-type", "container"), ("io.kubernetes.cri.sandbox-id", "p1")];
const SECOND_POD: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "container"),
    ("io.kubernetes.cri.sandbox-id", "p1"),
    ("io.microsoft.cri.virtual-pod-id", "p2"),
];
/// Between two lines of 5 to 12 KiB: some 1.5 MiB/s in total where the machine has time for it.
const PAUSE: u32 = 100;
const SOON: Duration = Duration::from_secs(120);
const FEED: Duration = Duration::from_millis(150);

/// Moves in one run: there and back, as many times as the whole test run can bear.
fn moves() -> u32 {
    env::var("DUNLIN_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(20)
}

fn chatty(tag: &str, code: u32) -> Work {
    Work::Chatty(Chatty {
        tag: tag.to_owned(),
        errors: String::new(),
        code,
        pause_ms: PAUSE,
        lines: Chatty::ENDLESS,
        before: String::new(),
    })
}

/// Prints on standard error too.
fn complaining(tag: &str, code: u32) -> Work {
    match chatty(tag, code) {
        Work::Chatty(chatty) => Work::Chatty(Chatty { errors: format!("{tag}!"), ..chatty }),
        other => other,
    }
}

/// Ends by itself after so many lines, 100 ms apart.
fn short(tag: &str, code: u32, lines: u64) -> Work {
    match complaining(tag, code) {
        Work::Chatty(chatty) => Work::Chatty(Chatty { pause_ms: 100, lines, ..chatty }),
        other => other,
    }
}

fn on_a_terminal(tag: &str, code: u32) -> Work {
    match chatty(tag, code) {
        Work::Chatty(chatty) => Work::Terminal(Chatty { before: "stty -echo".to_owned(), ..chatty }),
        other => other,
    }
}

/// Prints as fast as it is read.
fn quick(tag: &str, code: u32) -> Work {
    match chatty(tag, code) {
        Work::Chatty(chatty) => Work::Chatty(Chatty { pause_ms: 5, ..chatty }),
        other => other,
    }
}

fn cat(tag: &str) -> Work {
    Work::Cat(tag.to_owned(), FEED)
}

/// p1 with p1a, p1b, and p2 with p2a, p2b in its machine: an init and two execs each.
fn two_pods(lab: &Lab) -> Pods<'_> {
    let mut pods = Pods::new(lab, Host::A);
    let inits = [
        ("p1", POD, complaining("p1", 10)),
        ("p1a", IN_POD, complaining("p1a", 11)),
        ("p1b", IN_POD, complaining("p1b", 12)),
        ("p2", SECOND_POD, complaining("p2", 13)),
        ("p2a", SECOND_POD, complaining("p2a", 14)),
        ("p2b", SECOND_POD, cat("p2b")),
    ];
    for (id, notes, work) in inits {
        pods.create(id, notes, work);
        pods.start(id, "");
    }
    let execs = [
        ("p1", "x", chatty("p1.x", 20)),
        ("p1", "y", chatty("p1.y", 21)),
        ("p1a", "x", complaining("p1a.x", 22)),
        ("p1a", "tty", on_a_terminal("p1a.tty", 23)),
        ("p1b", "cat", cat("p1b.cat")),
        ("p1b", "y", chatty("p1b.y", 25)),
        ("p2", "x", chatty("p2.x", 26)),
        ("p2", "y", chatty("p2.y", 27)),
        ("p2a", "x", complaining("p2a.x", 28)),
        ("p2a", "y", chatty("p2a.y", 29)),
        ("p2b", "x", chatty("p2b.x", 30)),
        ("p2b", "y", chatty("p2b.y", 31)),
    ];
    for (id, exec, work) in execs {
        pods.exec(id, exec, work);
    }
    pods
}

/// Ends what still runs, looks at everything that came, and deletes all, workloads first. Gives the bytes.
fn end_all(pods: &mut Pods<'_>) -> u64 {
    let names: Vec<(String, String)> =
        pods.processes().iter().map(|process| (process.container.clone(), process.exec.clone())).collect();
    // Execs first: the end of an init ends its container's others.
    let (inits, execs): (Vec<_>, Vec<_>) = names.into_iter().partition(|(_, exec)| exec.is_empty());
    let mut bytes = 0;
    for (id, exec) in execs.iter().chain(inits.iter().rev()) {
        if pods.exits.announced(id, exec).is_empty() {
            pods.end(id, exec);
        }
        bytes += pods.ended(id, exec);
    }
    for (id, exec) in &execs {
        pods.delete(id, exec);
    }
    for (id, _) in inits.iter().rev() {
        pods.delete(id, "");
    }
    bytes
}

fn every_byte_and_every_exit_once(lab: &Lab) {
    let mut pods = two_pods(lab);
    // One that waits for its start on some host, one that is over and not deleted.
    pods.create("p1c", IN_POD, short("p1c", 40, 3));
    pods.create("p2c", SECOND_POD, short("p2c", 41, 3));
    pods.start("p2c", "");
    pods.ended("p2c", "");
    pods.await_more(1, dunlin_tests::Process::goes_on);

    let (since, before) = (Instant::now(), printed(&pods));
    let (mut blackouts, mut totals) = (Vec::new(), Vec::new());
    for number in 1..=moves() {
        // Its end falls before, into or after the blackout, another time in each move.
        let timed = format!("t{number}");
        let lines = u64::from(1 + number * 7 % 24);
        pods.exec(if number % 2 == 0 { "p1a" } else { "p2b" }, &timed, short(&timed, 50 + number, lines));
        let (ends, brief) = (number % 3 == 2, format!("p2x{number}"));
        if ends {
            pods.create(&brief, SECOND_POD, short(&brief, 90, 2 + u64::from(number) * 5 % 20));
            pods.start(&brief, "");
        }
        let asked = ["p1", "p2a", "p2", "p1b"][usize::try_from(number).unwrap_or(0) % 4];
        let report = pods.migrate(asked);
        blackouts.push(report["blackout_ms"].as_u64().unwrap_or(0));
        totals.push(report["total_ms"].as_u64().unwrap_or(0));
        pods.await_more(20_000, dunlin_tests::Process::goes_on);
        if ends {
            pods.ended(&brief, "");
            pods.delete(&brief, "");
        }
    }
    let (rate, took) = (printed(&pods) - before, since.elapsed());
    println!(
        "    {} moves in {:.0} s, each {totals:?} ms, blackouts {blackouts:?} ms, {:.2} MiB/s of numbered output",
        moves(),
        took.as_secs_f64(),
        mib(rate) / took.as_secs_f64()
    );

    pods.start("p1c", "");
    pods.ended("p1c", "");
    let bytes = end_all(&mut pods);
    println!(
        "    {:.1} MiB, each byte in its place; exit times were up to {:?} early",
        mib(bytes),
        pods.clock_off
    );
}

/// The other containerds' case.
pub(crate) fn there_and_back_with_every_byte(lab: &Lab) {
    let mut pods = Pods::new(lab, Host::A);
    for (id, notes, work) in [
        ("p1", POD, complaining("p1", 10)),
        ("p1a", IN_POD, cat("p1a")),
        ("p2", SECOND_POD, complaining("p2", 11)),
    ] {
        pods.create(id, notes, work);
        pods.start(id, "");
    }
    pods.exec("p1", "tty", on_a_terminal("p1.tty", 12));
    pods.exec("p2", "x", quick("p2.x", 13));
    for number in 1..=2_u32 {
        let timed = format!("t{number}");
        pods.exec("p1a", &timed, short(&timed, 50 + number, 15));
        pods.migrate(if number == 1 { "p1" } else { "p2" });
        pods.await_more(20_000, dunlin_tests::Process::goes_on);
        pods.ended("p1a", &timed);
    }
    let bytes = end_all(&mut pods);
    println!("    {:.1} MiB, each byte in its place", mib(bytes));
}

fn a_reader_that_stands_still_loses_nothing(lab: &Lab) {
    let mut pods = Pods::new(lab, Host::A);
    pods.create("p1", POD, quick("p1", 10));
    pods.start("p1", "");
    pods.exec("p1", "x", quick("p1.x", 11));
    pods.exec("p1", "tty", on_a_terminal("p1.tty", 12));
    pods.exec("p1", "cat", cat("p1.cat"));
    let slow = ["", "tty", "cat"];
    for exec in slow {
        pods.process("p1", exec).pause_reading(true);
    }
    // Long enough to fill what lies between a quick writer and its reader.
    let stands = await_standstill(lab, &pods);
    for _ in 0..2 {
        pods.migrate("p1");
        thread::sleep(Duration::from_secs(2));
        // Whoever is read goes on beside those that are not.
        pods.await_more(100_000, |process| process.exec == "x");
    }
    assert_eq!(pods.process("p1", "").bytes(), stands, "it was not to be read");
    for exec in slow {
        pods.process("p1", exec).pause_reading(false);
    }
    pods.await_more(300_000, dunlin_tests::Process::goes_on);
    pods.migrate("p1");
    let bytes = end_all(&mut pods);
    println!("    {:.1} MiB, each byte in its place", mib(bytes));
}

/// Waits until p1's init, which prints and is not read, cannot print any more: what the kernel counts of its writes
/// stands. Gives what has been read of it.
fn await_standstill(lab: &Lab, pods: &Pods<'_>) -> u64 {
    let since = Instant::now();
    let mut last = String::new();
    for number in 0.. {
        let probe = format!("probe-{number}");
        let read = ["task", "exec", "--exec-id", &probe, "p1", "grep", "wchar", "/proc/1/io"];
        let written = lab.ctr(pods.at, &read).ok();
        if written == last {
            break;
        }
        assert!(since.elapsed() < SOON, "it still prints though nobody reads: {written}");
        last = written;
        thread::sleep(Duration::from_secs(1));
    }
    pods.process("p1", "").bytes()
}

fn a_cancelled_move_costs_no_byte_and_no_exit(lab: &Lab) {
    let mut pods = Pods::new(lab, Host::A);
    pods.create("p1", POD, complaining("p1", 10));
    pods.start("p1", "");
    pods.create("p1a", IN_POD, cat("p1a"));
    pods.start("p1a", "");
    pods.exec("p1", "tty", on_a_terminal("p1.tty", 12));
    pods.exec("p1a", "x", quick("p1a.x", 13));
    // Its exit is learnt while the move is under way, and told after it.
    pods.exec("p1", "t0", short("t0", 50, 30));
    {
        let (since, slow) = (SystemTime::now(), SlowNetwork::new());
        let child = move_in_transfer(lab, "p1");
        lab.on(Host::A, &["dunlin", "cancel", "p1"]).ok();
        let run = Run::finish(child, "dunlin migrate", SOON * 2);
        drop(slow);
        run.fails_naming(&["cancel"]);
        pods.turned_back(since);
    }
    // Wherever a cancel meets the move, the switchover included.
    let took = pods.migrate("p1")["total_ms"].as_u64().unwrap_or(1000);
    let mut moved = 0;
    for number in 1..=5_u64 {
        let timed = format!("t{number}");
        pods.exec("p1", &timed, short(&timed, 50, 1 + number * 3));
        let delay = Duration::from_millis(took * (3 + number) / 8);
        moved += u32::from(pods.migrate_and_cancel("p1a", delay));
        pods.await_more(10_000, dunlin_tests::Process::goes_on);
    }
    let bytes = end_all(&mut pods);
    println!("    {moved} of 5 cancels came too late; {:.1} MiB, each byte in its place", mib(bytes));
}

fn printed(pods: &Pods<'_>) -> u64 {
    pods.processes().iter().map(dunlin_tests::Process::bytes).sum()
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
