//! A pod of two containers that an orchestrator made through CRI.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{
    Echo, Host, Lab, Pod, Run, count,
    cri::{Cri, api},
};

use crate::{
    Case,
    rollback::{SlowNetwork, in_transfer},
};

pub(crate) const CASES: &[Case] = &[
    ("cri::a_pod_moves_there_and_back_and_is_execd_into", a_pod_moves_there_and_back_and_is_execd_into),
    ("cri::a_move_that_turns_back_leaves_the_pod_to_cri", a_move_that_turns_back_leaves_the_pod_to_cri),
    ("cri::a_container_is_resized_there_and_here", a_container_is_resized_there_and_here),
    ("cri::a_pod_with_a_network_keeps_its_address", a_pod_with_a_network_keeps_its_address),
    ("cri::a_host_that_would_start_it_anew_is_refused", a_host_that_would_start_it_anew_is_refused),
];

const SOON: Duration = Duration::from_secs(20);
const MOVE: Duration = Duration::from_secs(180);
const NAMES: [&str; 2] = ["counter", "keeper"];

fn pod_of_two<'a>(lab: &'a Lab, name: &str) -> Pod<'a> {
    let pod = Pod::run(lab, Host::A, name);
    pod.start(Host::A, "counter", &["/bin/counter"]);
    pod.start(Host::A, "keeper", &["/bin/sh", "-c", "echo $GIVEN >/given; while :; do sleep 3600; done"]);
    pod.assert_only_on(Host::A, &NAMES);
    pod.await_lines(Host::A, false, "counter", 20, SOON);
    pod
}

/// Start times of both containers' first processes, in ticks of the machine that they run in: the same
/// two are the same processes.
fn identity(pod: &Pod<'_>, host: Host) -> Vec<String> {
    let of = |name| pod.exec(host, name, &["cut", "-d", " ", "-f", "1,2,22", "/proc/1/stat"]);
    NAMES.map(of).to_vec()
}

/// The same processes with the same files, now on host b.
fn move_to_b(pod: &Pod<'_>, before: &[String]) {
    let run = pod.migrate(Host::A);
    println!("    moved in {:.2} s", run.took.as_secs_f64());
    run.ok();
    pod.assert_only_on(Host::B, &NAMES);
    assert_eq!(pod.exec(Host::B, "keeper", &["cat", "/kept", "/given"]), "kept\nby CRI\n");
    assert_eq!(identity(pod, Host::B), before, "other processes than before");
    pod.await_lines(Host::B, true, "counter", 50, SOON);
}

/// The other containerds' case.
pub(crate) fn a_pod_moves_and_is_execd_into(lab: &Lab) {
    let pod = pod_of_two(lab, "moves");
    let before = identity(&pod, Host::A);
    pod.exec(Host::A, "keeper", &["sh", "-c", "echo kept >/kept"]);
    move_to_b(&pod, &before);
    let logs = [(Host::A, false), (Host::B, true)];
    let logs = count(&logs.map(|(host, moved)| pod.log(host, moved, "counter")).concat());
    assert!(
        logs.missing.is_empty() && logs.repeated.is_empty() && logs.damaged.is_empty(),
        "the logs: {logs:?}"
    );
    pod.remove(Host::B);
}

/// Events of CRI's namespace on a host, from now on.
struct Events<'a> {
    lab: &'a Lab,
    host: Host,
    file: PathBuf,
    pid: String,
}

impl Events<'_> {
    fn hear(lab: &Lab, host: Host) -> Events<'_> {
        let file = lab.host_dir(host).join("logs/events.log");
        let script = format!("ctr -n k8s.io events >{} 2>&1 & echo $!", file.display());
        let pid = lab.on(host, &["sh", "-c", &script]).ok().trim().to_owned();
        Events { lab, host, file, pid }
    }

    /// What was told until now.
    fn told(&self) -> String {
        fs::read_to_string(&self.file).expect("what was heard")
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        let _ = self.lab.command_on(self.host, &["kill", &self.pid]).output();
    }
}

fn a_pod_moves_there_and_back_and_is_execd_into(lab: &Lab) {
    let pod = pod_of_two(lab, "there-and-back");
    let before = identity(&pod, Host::A);
    pod.exec(Host::A, "keeper", &["sh", "-c", "echo kept >/kept"]);
    let events = Events::hear(lab, Host::A);

    move_to_b(&pod, &before);
    let told = events.told();
    assert!(told.contains("/tasks/delete"), "the events were not heard: {told}");
    assert!(!told.contains("/tasks/exit"), "an exit of what lives on: {told}");

    pod.migrate(Host::B).ok();
    pod.assert_only_on(Host::A, &NAMES);
    assert_eq!(pod.exec(Host::A, "keeper", &["cat", "/kept"]), "kept\n");
    assert_eq!(identity(&pod, Host::A), before, "other processes than before");
    pod.await_lines(Host::A, true, "counter", 50, SOON);

    let file = count(&pod.exec(Host::A, "counter", &["cat", "/counter.log"]));
    assert!(file.missing.is_empty() && file.repeated.is_empty() && file.damaged.is_empty(), "{file:?}");
    assert_eq!(file.pids.len(), 1, "the counter started more than once: {file:?}");
    let logs = [(Host::A, false), (Host::B, true), (Host::A, true)];
    let logs: String = logs.map(|(host, moved)| pod.log(host, moved, "counter")).concat();
    let logs = count(&logs);
    assert!(
        logs.missing.is_empty() && logs.repeated.is_empty() && logs.damaged.is_empty(),
        "the logs: {logs:?}"
    );
    pod.remove(Host::A);
}

fn a_move_that_turns_back_leaves_the_pod_to_cri(lab: &Lab) {
    let pod = pod_of_two(lab, "turns-back");
    let before = identity(&pod, Host::A);
    let id = pod.id(Host::A).expect("the pod is here");
    let migrate = || lab.command_on(Host::A, &["dunlin", "migrate", "-n", "k8s.io", &id, "--to", "b"]);
    let unharmed = || {
        pod.assert_only_on(Host::A, &NAMES);
        assert_eq!(pod.id(Host::A).as_ref(), Some(&id), "another pod than before");
        assert_eq!(identity(&pod, Host::A), before, "other processes than before");
        pod.await_lines(Host::A, false, "counter", 20, SOON);
    };

    // Given up while its disks' mirrors are being opened one after the other, and later: each time nothing stays in
    // the machine that the next move would meet.
    for moment in [0, 100, 300] {
        let slow = SlowNetwork::new();
        let child = in_transfer(lab, migrate());
        thread::sleep(Duration::from_millis(moment));
        assert!(pod.id(Host::B).is_some(), "CRI on host b has not made the pod");
        lab.on(Host::A, &["dunlin", "cancel", "-n", "k8s.io", &id]).ok();
        Run::finish(child, "dunlin migrate", MOVE).fails_naming(&["cancel"]);
        drop(slow);
        unharmed();
    }

    // What a node that dies cannot take back, its next life does.
    let slow = SlowNetwork::new();
    let child = in_transfer(lab, migrate());
    lab.service(Host::B, "kill", "node");
    Run::finish(child, "dunlin migrate", MOVE).fails();
    drop(slow);
    lab.service(Host::B, "start", "node");
    let since = Instant::now();
    while pod.id(Host::B).is_some() {
        assert!(since.elapsed() < Duration::from_secs(60), "the pod stays in CRI on host b");
        thread::sleep(Duration::from_millis(200));
    }
    unharmed();
    let log = count(&pod.log(Host::A, false, "counter"));
    assert!(log.missing.is_empty() && log.repeated.is_empty() && log.damaged.is_empty(), "{log:?}");
    pod.remove(Host::A);
}

fn a_container_is_resized_there_and_here(lab: &Lab) {
    const FILES: &str = "cd /sys/fs/cgroup$(cut -d : -f 3 /proc/self/cgroup); cat memory.max cpu.max";
    let pod = Pod::run(lab, Host::A, "resized");
    pod.start(Host::A, "keeper", &["/bin/sh", "-c", "while :; do sleep 3600; done"]);
    let limits = |host| pod.exec(host, "keeper", &["sh", "-c", FILES]);
    let resize = |host, mib: i64, cpu_quota| {
        let resources = api::LinuxContainerResources {
            memory_limit_in_bytes: mib << 20,
            cpu_quota,
            cpu_period: 100_000,
            ..Default::default()
        };
        Cri::of(lab, host).update(&pod.container(host, "keeper"), resources);
        let wanted = format!("{}\n{cpu_quota} 100000\n", mib << 20);
        assert_eq!(limits(host), wanted);
        wanted
    };
    assert!(limits(Host::A).starts_with("max\n"), "{}", limits(Host::A));
    let given = resize(Host::A, 64, 50_000);
    pod.migrate(Host::A).ok();
    assert_eq!(limits(Host::B), given, "after the move");
    resize(Host::B, 96, 80_000);
    pod.remove(Host::B);
}

fn a_pod_with_a_network_keeps_its_address(lab: &Lab) {
    // What CRI's network on both hosts gives its one pod.
    const ADDRESS: &str = "10.88.0.77";
    let asked = format!("{ADDRESS}:7000");
    let pod = Pod::run_on(lab, Host::A, "networked", api::NamespaceMode::Pod);
    pod.start(Host::A, "echo", &["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"]);
    let answers = || Echo::start(&asked).await_more(20);
    answers();
    let mac = pod.exec(Host::A, "echo", &["cat", "/sys/class/net/eth0/address"]);
    for host in Host::ALL {
        let said = pod.migrate_with(host, &[]).ok();
        let there = host.other();
        pod.assert_only_on(there, &["echo"]);
        let line = format!("({}) kept {ADDRESS}/16", mac.trim());
        assert!(said.contains(&line), "no line with `{line}`:\n{said}");
        assert_eq!(pod.exec(there, "echo", &["cat", "/sys/class/net/eth0/address"]), mac);
        answers();
    }
    // Asked to, it takes what CRI gives it there: the same here, but told to the user as lost connections.
    let said = pod.migrate_with(Host::A, &["--network", "rebind"]).ok();
    assert!(said.contains("LOST") && said.contains("rebound from 10.88.0.77/16"), "{said}");
    answers();
    pod.remove(Host::B);
}

fn a_host_that_would_start_it_anew_is_refused(lab: &Lab) {
    let pod = pod_of_two(lab, "anew");
    let before = identity(&pod, Host::A);
    let config = lab.host_dir(Host::B).join("etc/containerd.toml");
    let passing = fs::read_to_string(&config).expect("the lab's file");
    for setting in ["pod_annotations", "container_annotations"] {
        let deaf: String = passing
            .lines()
            .filter(|line| !line.starts_with(setting))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_ne!(deaf, passing);
        fs::write(&config, &deaf).expect("written");
        lab.service(Host::B, "stop", "containerd");
        lab.service(Host::B, "start", "containerd");
        let run = pod.migrate(Host::A);
        fs::write(&config, &passing).expect("written");
        run.fails_naming(&[setting, "dunlin"]);
        pod.assert_only_on(Host::A, &NAMES);
        assert_eq!(identity(&pod, Host::A), before, "other processes than before");
        pod.await_lines(Host::A, false, "counter", 20, SOON);
    }
    lab.service(Host::B, "stop", "containerd");
    lab.service(Host::B, "start", "containerd");
    pod.migrate(Host::A).ok();
    pod.assert_only_on(Host::B, &NAMES);
    assert_eq!(identity(&pod, Host::B), before, "other processes than before");
    pod.remove(Host::B);
}
