//! How processes end, in ways that are not the usual ones.

use std::thread;
use std::time::{Duration, Instant};

use dunlin_tests::{Background, Container, Containerd, Host, Lab, Stdio};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("endings::a_real_time_signal_is_an_exit_like_any_other", a_real_time_signal_is_an_exit_like_any_other),
    ("endings::a_broken_pipe_ends_a_process", a_broken_pipe_ends_a_process),
    (
        "endings::a_killed_process_ends_though_nobody_reads_its_output",
        a_killed_process_ends_though_nobody_reads_its_output,
    ),
    ("endings::nothing_is_started_in_a_paused_container", nothing_is_started_in_a_paused_container),
];

/// Ten seconds are what the guest waits for a reader.
const STOPPED: Duration = Duration::from_secs(60);

/// nix has no such signal: once, its wait failed for ever, with every later exit.
fn a_real_time_signal_is_an_exit_like_any_other(lab: &Lab) {
    let container = Container::start(lab, Host::A, "e-signal", &["/bin/counter"]);
    let run = container.exec(Host::A, "realtime", &["sh", "-c", "kill -34 $$"]);
    assert_eq!(run.code, 128 + 34, "stderr: {}", run.stderr);
    assert_eq!(container.exec(Host::A, "after", &["sh", "-c", "exit 3"]).code, 3);
    container.remove(Host::A);
}

/// Rust ignores SIGPIPE, and what is ignored is inherited.
fn a_broken_pipe_ends_a_process(lab: &Lab) {
    let container = Container::start(lab, Host::A, "e-pipe", &["/bin/counter"]);
    let script = "sh -c 'kill -PIPE $$; echo ignored' 2>/dev/null; echo $?";
    assert_eq!(container.exec(Host::A, "pipe", &["sh", "-c", script]).ok(), "141\n");
    container.remove(Host::A);
}

fn a_killed_process_ends_though_nobody_reads_its_output(lab: &Lab) {
    const ID: &str = "e-unread";
    let background = Background::start();
    let containerd = Containerd::connect(lab, Host::A, &background);
    let template = containerd.template(lab);
    // Open on the shim's side alone, as when a client has left.
    let fifo = "/run/e-unread.out";
    let there = lab.run_path(Host::A, fifo);
    nix::unistd::mkfifo(&there, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a FIFO");
    let stdio = Stdio { stdout: fifo.to_owned(), ..Stdio::default() };
    let container = Container::adopt(lab, ID);
    containerd.create(&template, ID, &[], &["busybox".to_owned(), "yes".to_owned()], &stdio);
    containerd.start(ID, "");
    // Until every buffer on the way is full.
    thread::sleep(Duration::from_secs(3));
    let since = Instant::now();
    containerd.kill(ID, "", 9);
    container.await_state(Host::A, "STOPPED", STOPPED);
    println!("    told {:.1} s after the signal", since.elapsed().as_secs_f64());
    assert_eq!(containerd.delete(ID, "").code, 137);
    std::fs::remove_file(there).expect("the FIFO is there");
}

fn nothing_is_started_in_a_paused_container(lab: &Lab) {
    let container = Container::start(lab, Host::A, "e-paused", &["/bin/counter"]);
    lab.ctr(Host::A, &["task", "pause", "e-paused"]).ok();
    container.exec(Host::A, "frozen", &["true"]).fails_naming(&["paused"]);
    lab.ctr(Host::A, &["task", "resume", "e-paused"]).ok();
    assert_eq!(container.exec(Host::A, "thawed", &["sh", "-c", "exit 4"]).code, 4);
    container.remove(Host::A);
}
