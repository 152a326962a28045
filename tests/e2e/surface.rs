//! What containerd and `ctr` ask of any runtime.

use std::{
    fs,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab, Run, Terminal};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("surface::run_gives_output_and_exit_code", run_gives_output_and_exit_code),
    ("surface::the_rootfs_is_the_images_and_writable", the_rootfs_is_the_images_and_writable),
    (
        "surface::a_detached_container_lives_through_the_task_api",
        a_detached_container_lives_through_the_task_api,
    ),
    ("surface::exec_takes_stdin_and_gives_exit_codes", exec_takes_stdin_and_gives_exit_codes),
    ("surface::exec_on_a_terminal", exec_on_a_terminal),
    ("surface::much_output_arrives_whole", much_output_arrives_whole),
    (
        "surface::two_containers_share_an_image_and_nothing_else",
        two_containers_share_an_image_and_nothing_else,
    ),
    ("surface::a_killed_machine_is_an_exit", a_killed_machine_is_an_exit),
    ("surface::a_killed_shim_takes_all_with_it", a_killed_shim_takes_all_with_it),
    ("surface::a_restarted_containerd_finds_its_task", a_restarted_containerd_finds_its_task),
    ("surface::nothing_stays_when_containers_are_gone", nothing_stays_when_containers_are_gone),
];

const SOON: Duration = Duration::from_secs(15);

fn run_rm(lab: &Lab, id: &str, command: &[&str]) -> Run {
    let run = ["run", "--rm", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, id];
    lab.ctr(Host::A, &[&run, command].concat())
}

fn run_gives_output_and_exit_code(lab: &Lab) {
    let run = run_rm(lab, "s-run", &["sh", "-c", "echo to-out; echo to-err >&2; exit 7"]);
    assert_eq!((run.code, run.stdout.as_str()), (7, "to-out\n"), "stderr: {}", run.stderr);
    assert!(run.stderr.contains("to-err\n"), "{}", run.stderr);
    let run = run_rm(lab, "s-none", &["/bin/there-is-no-such-program"]);
    run.fails_naming(&["there-is-no-such-program"]);
    run_rm(lab, "s-true", &["true"]).ok();
}

fn the_rootfs_is_the_images_and_writable(lab: &Lab) {
    let script = "cat /etc/dunlin-demo && sha256sum </bin/busybox && stat -c '%a %u %Y' /bin/counter && \
        readlink /bin/sh && echo changed >/etc/dunlin-demo && cat /etc/dunlin-demo && \
        dd if=/dev/zero of=/big bs=1048576 count=20 2>/dev/null && sync && wc -c </big && rm /etc/group && \
        ls /etc && hostname >/dev/null && echo $PATH";
    let text = run_rm(lab, "s-rootfs", &["sh", "-c", script]).ok();
    let mut host_sum = std::process::Command::new("sha256sum");
    host_sum.arg("/bin/busybox");
    let sum = Run::new(host_sum, SOON).ok();
    let sum = sum.split(' ').next().expect("a digest");
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        "this file came with the image",
        &format!("{sum}  -"),
        "755 0 0",
        "busybox",
        "changed",
        "20971520",
        "dunlin-demo",
    ];
    assert_eq!(lines[..expected.len()], expected, "{text}");
    assert!(!lines.contains(&"group"), "a removed file of the image is still listed:\n{text}");
    assert_eq!(lines.last(), Some(&"/bin"), "{text}");
    // The writable layer is the container's own: the next one sees the image again.
    assert_eq!(run_rm(lab, "s-rootfs", &["cat", "/etc/dunlin-demo"]).ok(), "this file came with the image\n");
}

fn a_detached_container_lives_through_the_task_api(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-task", &["/bin/counter"]);
    container.await_state(Host::A, "RUNNING", SOON);
    container.await_lines(Host::A, 20, SOON);
    let listed = lab.ctr(Host::A, &["task", "ls"]).ok();
    assert!(listed.lines().any(|line| line.starts_with("s-task ") && line.contains("RUNNING")), "{listed}");
    let processes = lab.ctr(Host::A, &["task", "ps", "s-task"]).ok();
    assert!(processes.lines().count() >= 2, "{processes}");

    lab.ctr(Host::A, &["task", "pause", "s-task"]).ok();
    container.await_state(Host::A, "PAUSED", SOON);
    // What it printed before may still be on its way; a counter that is not paused prints a hundred
    // lines a second.
    let since = Instant::now();
    loop {
        let last = container.counted(Host::A).last;
        thread::sleep(Duration::from_secs(1));
        if container.counted(Host::A).last == last {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "a paused container counts on");
    }
    lab.ctr(Host::A, &["task", "resume", "s-task"]).ok();
    container.await_state(Host::A, "RUNNING", SOON);
    container.await_lines(Host::A, 20, SOON);

    let metrics = lab.ctr(Host::A, &["task", "metrics", "s-task"]).ok();
    let usage =
        metrics.lines().find(|line| line.contains("memory.usage") || line.contains("memory.usage_in_bytes"));
    let bytes =
        usage.and_then(|line| line.split_whitespace().last()).and_then(|word| word.parse::<u64>().ok());
    assert!(bytes.is_some_and(|bytes| bytes > 0), "no memory use in\n{metrics}");

    lab.ctr(Host::A, &["task", "kill", "-s", "SIGKILL", "s-task"]).ok();
    container.await_state(Host::A, "STOPPED", SOON);
    let counted = container.counted(Host::A);
    assert!(
        counted.missing.is_empty() && counted.repeated.is_empty() && counted.damaged.is_empty(),
        "{counted:?}"
    );
    let removed = lab.ctr(Host::A, &["task", "rm", "s-task"]);
    assert!(format!("{}{}{}", removed.code, removed.stdout, removed.stderr).contains("137"), "{removed:?}");
    assert_eq!(container.state(Host::A), None);
    lab.ctr(Host::A, &["containers", "rm", "s-task"]).ok();
}

fn exec_takes_stdin_and_gives_exit_codes(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-exec", &["/bin/counter"]);
    assert_eq!(container.exec(Host::A, "one", &["sh", "-c", "echo hello; exit 3"]).code, 3);
    assert_eq!(
        container.exec(Host::A, "two", &["cat", "/etc/dunlin-demo"]).ok(),
        "this file came with the image\n"
    );

    let mut child = lab.spawn_on(
        Host::A,
        &["ctr", "task", "exec", "--exec-id", "in", "s-exec", "sh", "-c", "cat; echo end"],
    );
    let mut stdin = child.stdin.take().expect("piped");
    let sent: String = (0..5000).map(|number| format!("line {number} of the input\n")).collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || stdin.write_all(copy.as_bytes()).expect("the exec reads"));
    let run = Run::finish(child, "ctr task exec cat", Duration::from_secs(60));
    writer.join().expect("written");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stdout == format!("{sent}end\n"),
        "{} bytes came back of {}",
        run.stdout.len(),
        sent.len() + 4
    );

    container
        .exec(Host::A, "none", &["/bin/there-is-no-such-program"])
        .fails_naming(&["there-is-no-such-program"]);
    assert_eq!(container.exec(Host::A, "killed", &["sh", "-c", "kill -9 $$"]).code, 137);
    container.await_lines(Host::A, 20, SOON);
    container.remove(Host::A);
}

fn exec_on_a_terminal(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-tty", &["/bin/counter"]);
    let exec = ["ctr", "task", "exec", "-t", "--exec-id", "tty", "s-tty", "sh"];
    let mut terminal = Terminal::start(lab.command_on(Host::A, &exec), 80, 24);
    terminal.without_echo();
    assert_eq!(terminal.ask("tty && echo a$((6 * 7))z"), "/dev/pts/0\r\na42z\r\n");
    terminal.press("exit 5\n");
    assert_eq!(terminal.ended(), 5);
    container.remove(Host::A);
}

fn much_output_arrives_whole(lab: &Lab) {
    let run = run_rm(lab, "s-much", &["sh", "-c", "seq 1 200000"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(run.stdout == expected, "{} bytes came of {}", run.stdout.len(), expected.len());
}

fn two_containers_share_an_image_and_nothing_else(lab: &Lab) {
    let one = Container::start(lab, Host::A, "s-one", &["/bin/counter"]);
    let two = Container::start(lab, Host::A, "s-two", &["/bin/counter"]);
    one.exec(Host::A, "w", &["sh", "-c", "echo one >/own"]).ok();
    two.exec(Host::A, "w", &["sh", "-c", "test ! -e /own && echo two >/own"]).ok();
    assert_eq!(one.exec(Host::A, "r", &["cat", "/own"]).ok(), "one\n");
    assert_eq!(two.exec(Host::A, "r", &["cat", "/own"]).ok(), "two\n");
    let layers = fs::read_dir(lab.host_dir(Host::A).join("data/layers/sha256")).expect("a layer cache");
    let images =
        layers.flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "erofs")).count();
    assert_eq!(images, 2, "the demo image has two layers, and each is kept once");
    one.remove(Host::A);
    two.await_lines(Host::A, 20, SOON);
    two.remove(Host::A);
}

fn a_killed_machine_is_an_exit(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-qemu", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    // Each thread has the children that it has started.
    let kill = "kill -9 $(cat /proc/$(cat /run/dunlin/default/s-qemu/shim.pid)/task/*/children)";
    lab.on(Host::A, &["sh", "-c", kill]).ok();
    container.await_state(Host::A, "STOPPED", SOON);
    let removed = lab.ctr(Host::A, &["task", "rm", "s-qemu"]);
    assert!(format!("{}{}", removed.stdout, removed.stderr).contains("137"), "{removed:?}");
    lab.ctr(Host::A, &["containers", "rm", "s-qemu"]).ok();
}

pub(crate) fn a_killed_shim_takes_all_with_it(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-shim", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    lab.on(Host::A, &["sh", "-c", "kill -9 $(cat /run/dunlin/default/s-shim/shim.pid)"]).ok();
    let since = Instant::now();
    while container.state(Host::A).is_some() {
        assert!(since.elapsed() < SOON, "containerd keeps the task of a dead shim");
        thread::sleep(Duration::from_millis(50));
    }
    // What the dead shim left is looked for by the last case of this file.
    lab.ctr(Host::A, &["containers", "rm", "s-shim"]).ok();
}

pub(crate) fn a_restarted_containerd_finds_its_task(lab: &Lab) {
    let container = Container::start(lab, Host::A, "s-again", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    lab.service(Host::A, "stop", "containerd");
    lab.service(Host::A, "start", "containerd");
    container.await_state(Host::A, "RUNNING", SOON);
    container.await_lines(Host::A, 20, SOON);
    assert_eq!(container.exec(Host::A, "after", &["echo", "after"]).ok(), "after\n");
    container.remove(Host::A);
}

pub(crate) fn nothing_stays_when_containers_are_gone(lab: &Lab) {
    let since = Instant::now();
    let strangers = || -> Vec<String> {
        lab.processes(Host::A)
            .into_iter()
            .filter(|line| {
                !(line.contains("dunlin lab host")
                    || line.starts_with("containerd ")
                    || line.contains("dunlin node"))
            })
            .collect()
    };
    while !strangers().is_empty() {
        assert!(since.elapsed() < SOON, "still running on host a: {:#?}", strangers());
        thread::sleep(Duration::from_millis(100));
    }
    let files = |dir: &str| -> Vec<String> {
        let run = lab.on(Host::A, &["find", dir, "-type", "f", "-o", "-type", "s", "-o", "-type", "p"]);
        run.stdout.lines().map(ToOwned::to_owned).collect()
    };
    assert!(
        files("/var/lib/dunlin/scratch").is_empty(),
        "scratch disks: {:#?}",
        files("/var/lib/dunlin/scratch")
    );
    assert!(files("/run/dunlin/default").is_empty(), "sandbox state: {:#?}", files("/run/dunlin/default"));
    let mounts = lab.on(Host::A, &["cat", "/proc/mounts"]).ok();
    let left: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains("io.containerd.runtime") || line.contains("/var/lib/dunlin/"))
        .collect();
    assert!(left.is_empty(), "mounts: {left:#?}");
}
