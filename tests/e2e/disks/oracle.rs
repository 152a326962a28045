//! Moves under a writer that reads back, with moves that are cancelled anywhere in between.

use std::{
    env, fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Host, Lab, Oracle, Run, scratch_image};

use super::{MOVE, SOON};

const POD: [&str; 4] = [
    "--annotation",
    "io.kubernetes.cri.container-type=sandbox",
    "--annotation",
    "io.kubernetes.cri.sandbox-id=d-pod",
];
const IN_POD: [&str; 4] = [
    "--annotation",
    "io.kubernetes.cri.container-type=container",
    "--annotation",
    "io.kubernetes.cri.sandbox-id=d-pod",
];

/// Beyond the moves that were asked for, until a cancel was in time.
const MORE_MOVES: u32 = 8;
/// And beyond those, with a cancel that is asked for over and over from the beginning of the move.
const INSISTING: u32 = 6;

/// Moves that succeed in one run.
fn moves() -> u32 {
    env::var("DUNLIN_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(20)
}

/// Begins a move.
fn begin(lab: &Lab, from: Host, id: &str) -> Child {
    let mut command = lab.command_on(from, &["dunlin", "migrate", id, "--to", from.other().name()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("dunlin lab exec starts")
}

/// Waits for the end of a move that somebody asked to cancel. True: it moved all the same.
fn moved_all_the_same(child: Child) -> bool {
    let run = Run::finish(child, "dunlin migrate", MOVE);
    if run.code != 0 {
        run.fails_naming(&["cancel"]);
        return false;
    }
    true
}

/// Begins a move and asks to cancel it after `delay`. True: it moved all the same.
fn cancelled_after(lab: &Lab, from: Host, id: &str, delay: Duration) -> bool {
    let child = begin(lab, from, id);
    thread::sleep(delay);
    // Too early or too late is an answer too.
    lab.on(from, &["dunlin", "cancel", id]);
    moved_all_the_same(child)
}

/// Begins a move and asks to cancel it until that is taken or the move has ended. True: it moved all
/// the same.
fn cancelled_at_last(lab: &Lab, from: Host, id: &str) -> bool {
    let mut child = begin(lab, from, id);
    // Refused for as long as there is no move yet.
    while lab.on(from, &["dunlin", "cancel", id]).code != 0 {
        if child.try_wait().expect("waited for").is_some() {
            break;
        }
    }
    moved_all_the_same(child)
}

pub(super) fn no_block_is_wrong_over_moves_and_cancels(lab: &Lab) {
    let pod = super::counter(lab, "d-pod", &POD);
    let oracle = Oracle::start(lab, "d-oracle", 20261, &IN_POD);
    let (mut host, mut moved, mut cancelled, mut times) = (Host::A, 0, 0, Vec::new());
    let mut random = 0x2545_F491_u64;
    // Cancels fall anywhere in a move, as long as moves here have taken; one that was too late halves it.
    let mut within = Duration::from_millis(1500);
    let since = Instant::now();
    while moved < moves() || (cancelled == 0 && moved < moves() + MORE_MOVES) {
        if moved % 2 == 1 || moves() == 1 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let delay = within.mul_f64(((random >> 33) % 1000) as f64 / 1000.0);
            if cancelled_after(lab, host, "d-pod", delay) {
                moved += 1;
                host = host.other();
                within /= 2;
                println!("    too late to cancel after {delay:?}");
            } else {
                cancelled += 1;
                println!("    cancelled after {delay:?}");
            }
            // The source goes on, or the destination does.
            oracle.await_more(64, SOON);
        }
        let begun = Instant::now();
        lab.migrate(host, "d-pod", host.other().name()).ok();
        times.push(begun.elapsed());
        within = within.min(begun.elapsed());
        host = host.other();
        moved += 1;
        oracle.await_more(64, SOON);
        oracle.container.assert_only_on(host);
    }
    for _ in 0..INSISTING {
        if cancelled > 0 {
            break;
        }
        if cancelled_at_last(lab, host, "d-pod") {
            moved += 1;
            host = host.other();
            println!("    too late to cancel");
        } else {
            cancelled += 1;
            println!("    cancelled at last");
        }
        oracle.await_more(64, SOON);
        oracle.container.assert_only_on(host);
    }
    let longest = times.iter().max().copied().unwrap_or_default();
    // Kept under another name: the shim removes the disk when the container goes.
    let image = scratch_image(lab, host, "d-pod", "d-oracle");
    let kept = lab.dir().join("d-oracle.raw");
    let _ = fs::remove_file(&kept);
    fs::hard_link(&image, &kept).expect("one file system");
    let words = oracle.end(host);
    println!(
        "    {moved} moves (longest {longest:?}), {cancelled} cancelled, in {:.0} s; {words}",
        since.elapsed().as_secs_f64()
    );
    oracle.container.await_state(host, "STOPPED", SOON);
    // With the pod's other container the machine stays: the guest unmounts, which is an orderly end.
    lab.ctr(host, &["task", "rm", "d-oracle"]);
    lab.ctr(host, &["containers", "rm", "d-oracle"]).ok();
    assert!(!image.exists(), "the disk went with its container");
    let mut fsck = Command::new("e2fsck");
    fsck.arg("-fn").arg(&kept);
    let clean = Run::new(fsck, SOON).ok();
    println!("    e2fsck: {}", clean.lines().last().unwrap_or_default());
    let _ = fs::remove_file(kept);
    assert!(cancelled > 0, "no move was cancelled: this proves half of it only");
    pod.remove(host);
}
