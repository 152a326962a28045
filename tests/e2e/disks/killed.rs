//! Either QEMU killed while a disk is being copied: one good disk, and the truth told about it.

use std::{
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Background, Containerd, Exits, Host, Lab, Oracle, Run, allocated, scratch_image};

use super::{MIB, MOVE, SOON};
use crate::rollback::{SlowNetwork, move_in_transfer};

/// Ends a host's QEMU by its id.
#[track_caller]
pub(crate) fn kill_qemu(lab: &Lab, host: Host) {
    let found = lab.on(host, &["pidof", "qemu-system-x86_64"]).ok();
    let [pid] = found.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("one QEMU on host {host}, not {found:?}");
    };
    lab.on(host, &["kill", "-KILL", pid]).ok();
}

/// An oracle with more on its disk than the slow network carries in a while.
fn with_ballast<'a>(lab: &'a Lab, id: &str, seed: u32) -> Oracle<'a> {
    let oracle = Oracle::start(lab, id, seed, &[]);
    let write = "dd if=/dev/urandom of=/ballast bs=1M count=24 2>/dev/null; sync";
    oracle.container.exec(Host::A, "ballast", &["sh", "-c", write]).ok();
    oracle
}

/// Waits until the copy on host b has grown: the mirror is in flight.
fn await_mirror(lab: &Lab, id: &str) {
    let (copy, since) = (scratch_image(lab, Host::B, id, id), Instant::now());
    while !copy.exists() || allocated(&copy) < 4 * MIB {
        assert!(since.elapsed() < SOON, "nothing comes to {}", copy.display());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until the copy on host b is removed.
#[track_caller]
fn await_no_copy(lab: &Lab, id: &str) {
    let (copy, since) = (scratch_image(lab, Host::B, id, id), Instant::now());
    while copy.exists() {
        assert!(since.elapsed() < SOON, "the half copy is left");
        thread::sleep(Duration::from_millis(50));
    }
}

pub(super) fn a_destination_killed_in_the_mirror_costs_nothing(lab: &Lab) {
    let oracle = with_ballast(lab, "d-kill-b", 7);
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, "d-kill-b");
    await_mirror(lab, "d-kill-b");
    kill_qemu(lab, Host::B);
    let run = Run::finish(child, "dunlin migrate", MOVE);
    drop(slow);
    let told = run.fails_naming(&["qemu"]);
    println!(
        "    told: {}",
        told.lines().rfind(|line| line.to_lowercase().contains("qemu")).unwrap_or_default()
    );
    oracle.await_more(64, SOON);
    oracle.container.assert_only_on(Host::A);
    await_no_copy(lab, "d-kill-b");
    // And again, to the end this time.
    lab.migrate(Host::A, "d-kill-b", "b").ok();
    oracle.await_more(64, SOON);
    println!("    {}", oracle.end(Host::B));
}

pub(super) fn a_source_killed_in_the_mirror_keeps_its_disk(lab: &Lab) {
    let oracle = with_ballast(lab, "d-kill-a", 8);
    let (background, exits) = (Background::start(), Exits::default());
    for host in Host::ALL {
        exits.listen(&Containerd::connect(lab, host, &background));
    }
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, "d-kill-a");
    await_mirror(lab, "d-kill-a");
    kill_qemu(lab, Host::A);
    let run = Run::finish(child, "dunlin migrate", MOVE);
    drop(slow);
    run.fails();
    oracle.container.await_state(Host::A, "STOPPED", SOON);
    // Host b may have told before that what it was to get has ended.
    let told = exits.await_one_of(Host::A, "d-kill-a", "", SOON);
    assert_eq!(told.ended.code, 137, "{told:?}");
    // What was made on the destination goes; the task there never ran.
    let since = Instant::now();
    while oracle.container.state(Host::B).is_some() {
        assert!(since.elapsed() < SOON, "a task stays on host b");
        thread::sleep(Duration::from_millis(100));
    }
    await_no_copy(lab, "d-kill-a");
    let image = scratch_image(lab, Host::A, "d-kill-a", "d-kill-a");
    println!("    the source's disk: {}", oracle.check_image(&image, "d-kill-a"));
    thread::sleep(Duration::from_secs(1));
    let on_a = exits.announced("d-kill-a", "").into_iter().filter(|exit| exit.host == Host::A).count();
    assert_eq!(on_a, 1, "{:?}", exits.all_announced());
}
