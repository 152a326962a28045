//! End-to-end: real QEMU, real containerd, two hosts on one machine, everything through
//! the programs that are shipped.
//!
//! A harness of its own, because all cases share one lab, one after the other, and the lab
//! must go also when a case fails or the run is interrupted. `DUNLIN_E2E=1` (set by `make
//! test`) makes a missing prerequisite a failure instead of a skip. Arguments choose
//! cases by part of their name; `--list` names them.

mod cri;
mod disks;
mod endings;
mod movement;
mod network;
mod pods;
mod records;
mod refusals;
mod rollback;
mod sandbox;
mod session;
mod shares;
mod stock;
mod surface;
mod terminals;
mod traces;
mod versions;
mod volumes;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::Instant,
};

use dunlin_tests::{Lab, Programs, Traces};

type Case = (&'static str, fn(&Lab));

/// Cases that need the lab, in this order.
const CASES: &[&[Case]] = &[
    surface::CASES,
    endings::CASES,
    movement::CASES,
    refusals::CASES,
    rollback::CASES,
    session::CASES,
    terminals::CASES,
    sandbox::CASES,
    stock::CASES,
    shares::CASES,
    volumes::CASES,
    disks::CASES,
    cri::CASES,
    network::CASES,
    pods::CASES,
    versions::CASES,
];

fn main() -> ExitCode {
    let wanted: Vec<String> = env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let cases: Vec<Case> =
        CASES.iter().flat_map(|group| group.iter()).copied().filter(|(name, _)| chosen(name)).collect();
    if env::args().any(|word| word == "--list") {
        for name in traces::NAMES
            .iter()
            .copied()
            .chain(cases.iter().copied().chain(versions::all()).map(|(name, _)| name))
        {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let programs = match prerequisites() {
        Ok(programs) => programs,
        Err(reason) if env::var_os("DUNLIN_E2E").is_some() => {
            eprintln!("end-to-end tests cannot run: {reason}");
            return ExitCode::FAILURE;
        }
        Err(reason) => {
            println!("end-to-end tests skipped: {reason} (`make test` runs them)");
            return ExitCode::SUCCESS;
        }
    };
    let dir = PathBuf::from("/var/tmp/dunlin-e2e");
    down_when_interrupted(&programs, &dir);
    let _ = std::fs::remove_dir_all(programs.target_dir.join("e2e-logs"));

    let mut failed = Vec::new();
    // What an earlier run left is not this run's fault.
    traces::clear(&programs, &dir);
    if chosen(traces::KILLED_UP) {
        note(&mut failed, traces::KILLED_UP, || traces::a_killed_up_is_cleared(&programs, &dir), || None);
    }
    if chosen(traces::NOT_ROOT) {
        note(&mut failed, traces::NOT_ROOT, || traces::root_is_asked_for(&programs), || None);
    }
    let before = Traces::now();
    let down = chosen(traces::DOWN).then_some(&before);
    if !cases.is_empty() || down.is_some() {
        with_lab(&mut failed, &programs, &dir, None, &cases, down);
    }
    for (series, root) in programs.containerds() {
        let cases: Vec<Case> =
            versions::of(series).iter().copied().filter(|(name, _)| chosen(name)).collect();
        match root {
            _ if cases.is_empty() => {}
            Ok(root) => with_lab(&mut failed, &programs, &dir, Some(&root), &cases, None),
            Err(reason) => println!("!!! containerd {series} is SKIPPED: {reason}"),
        }
    }
    if failed.is_empty() {
        println!("end-to-end: all passed");
        return ExitCode::SUCCESS;
    }
    println!("end-to-end: {} failed: {}", failed.len(), failed.join(", "));
    ExitCode::FAILURE
}

/// Runs cases in one lab; at last, when asked for, that its end leaves nothing beyond what was `before`.
fn with_lab(
    failed: &mut Vec<&'static str>,
    programs: &Programs,
    dir: &Path,
    containerd: Option<&Path>,
    cases: &[Case],
    before: Option<&Traces>,
) {
    let since = Instant::now();
    let Ok(lab) = catch_unwind(|| Lab::up_with(programs, dir, containerd)) else {
        eprintln!("the lab did not come up");
        failed.push("lab up");
        traces::clear(programs, dir);
        return;
    };
    let version = containerd.map_or_else(String::new, |root| format!(" with {}", root.display()));
    println!("lab up{version} in {:.1} s", since.elapsed().as_secs_f64());
    for (name, case) in cases {
        note(failed, name, || case(&lab), || Some(lab.keep_logs(name)));
    }
    if let Some(before) = before {
        let down = || traces::down_leaves_nothing(&lab, before);
        note(failed, traces::DOWN, down, || Some(lab.keep_logs("down")));
    }
}

fn prerequisites() -> Result<Programs, String> {
    // SAFETY: geteuid only reads.
    if unsafe { libc::geteuid() } != 0 {
        return Err("they need root".to_owned());
    }
    Programs::find()
}

/// Runs one case and says how it went; a panic is its failure.
fn note(
    failed: &mut Vec<&'static str>,
    name: &'static str,
    case: impl FnOnce(),
    keep_logs: impl FnOnce() -> Option<PathBuf>,
) {
    let since = Instant::now();
    let passed = catch_unwind(AssertUnwindSafe(case)).is_ok();
    let (word, took) = (if passed { "ok" } else { "FAILED" }, since.elapsed().as_secs_f64());
    println!("case {name} ... {word} ({took:.1} s)");
    if !passed {
        failed.push(name);
        if let Some(kept) = keep_logs() {
            println!("    logs: {}", kept.display());
        }
    }
}

/// Ctrl-C or a CI's SIGTERM takes the lab down before this process ends.
fn down_when_interrupted(programs: &Programs, dir: &Path) {
    let (mut down, runtime) = (
        programs.dunlin(),
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"),
    );
    down.args(["lab", "--dir"]).arg(dir).arg("down").stdout(Stdio::null());
    thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut terminate = signal(SignalKind::terminate()).expect("a signal handler");
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        });
        let _ = Command::status(&mut down);
        std::process::exit(130);
    });
}
