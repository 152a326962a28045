//! Moves under a writer that reads back, with moves that are cancelled anywhere in between.

use std::{
    env, fs,
    path::{Path, PathBuf},
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

/// Beyond the moves that were asked for, until enough cancels were in time.
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

/// On each host its own.
const DIRECTORY: &str = "/run/e2e-oracle";
/// What each oracle has to have written at least, a move, for this to prove anything.
const WRITES_A_MOVE: u64 = 64;

/// Makes the volume's image on host a.
fn make_volume(lab: &Lab) -> PathBuf {
    let make = format!("truncate -s 64M {DIRECTORY}/volume.img && mkfs.ext4 -q -F {DIRECTORY}/volume.img");
    for host in Host::ALL {
        lab.on(host, &["rm", "-rf", DIRECTORY]).ok();
        lab.on(host, &["mkdir", DIRECTORY]).ok();
    }
    lab.on(Host::A, &["sh", "-c", &make]).ok();
    PathBuf::from(DIRECTORY).join("volume.img")
}

/// Has an oracle end, and checks that it wrote enough. Gives its last words.
fn end(oracle: &Oracle<'_>, host: Host, least: u64) -> String {
    let words = oracle.end(host);
    let written = words.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
    assert!(written >= Some(least), "{}: {words}, where {least} writes are wanted", oracle.container.id);
    words
}

#[track_caller]
fn fsck(image: &Path) -> String {
    let mut fsck = Command::new("e2fsck");
    fsck.arg("-fn").arg(image);
    let clean = Run::new(fsck, SOON).ok();
    assert!(!clean.contains("recover"), "{clean}");
    clean.lines().last().unwrap_or_default().to_owned()
}

pub(super) fn no_block_is_wrong_over_moves_and_cancels(lab: &Lab) {
    let volume = make_volume(lab);
    let mount = format!("type=ext4,src={},dst=/data,options=rw", volume.display());
    let pod = super::counter(lab, "d-pod", &POD);
    let in_volume = [&IN_POD[..], &["--mount", &mount]].concat();
    let oracles = [
        Oracle::start(lab, "d-oracle", 20261, &IN_POD),
        Oracle::start_at(lab, "d-volume", 20262, "/data/oracle.dat", &in_volume),
    ];
    let wanted = moves().div_ceil(2);
    let (mut host, mut moved, mut cancelled, mut times) = (Host::A, 0, 0, Vec::new());
    let mut random = 0x2545_F491_u64;
    // Cancels fall anywhere in a move, as long as moves here have taken; one that was too late halves it.
    let mut within = Duration::from_millis(1500);
    let since = Instant::now();
    for attempt in 0_u32.. {
        if moved >= moves() && cancelled >= wanted {
            break;
        }
        assert!(moved < moves() + MORE_MOVES + INSISTING, "{cancelled} of {moved} moves could be cancelled");
        let to_cancel = cancelled < wanted && (attempt % 2 == 1 || moved >= moves());
        let begun = Instant::now();
        let went = if !to_cancel {
            lab.migrate(host, "d-pod", host.other().name()).ok();
            times.push(begun.elapsed());
            within = within.min(begun.elapsed());
            true
        } else if moved < moves() + MORE_MOVES {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let delay = within.mul_f64(((random >> 33) % 1000) as f64 / 1000.0);
            let went = cancelled_after(lab, host, "d-pod", delay);
            println!("    {} after {delay:?}", if went { "too late to cancel" } else { "cancelled" });
            if went {
                within /= 2;
            }
            went
        } else {
            cancelled_at_last(lab, host, "d-pod")
        };
        if went {
            moved += 1;
            host = host.other();
        } else {
            cancelled += 1;
        }
        // The source goes on, or the destination does.
        for oracle in &oracles {
            oracle.await_more(64, SOON);
            oracle.container.assert_only_on(host);
        }
    }
    let longest = times.iter().max().copied().unwrap_or_default();
    println!(
        "    {moved} moves (longest {longest:?}), {cancelled} cancelled, in {:.0} s",
        since.elapsed().as_secs_f64()
    );
    assert!(cancelled >= wanted, "{cancelled} moves were cancelled, and {wanted} are wanted");
    // Kept under another name: the shim removes the disk when the container goes.
    let image = scratch_image(lab, host, "d-pod", "d-oracle");
    let kept = lab.dir().join("d-oracle.raw");
    let _ = fs::remove_file(&kept);
    fs::hard_link(&image, &kept).expect("one file system");
    for (oracle, disk) in oracles.iter().zip(["scratch", "volume"]) {
        println!("    {disk}: {}", end(oracle, host, u64::from(moved + cancelled) * WRITES_A_MOVE));
        oracle.container.await_state(host, "STOPPED", SOON);
        // With the pod's other container the machine stays: the guest unmounts, which is an orderly end.
        lab.ctr(host, &["task", "rm", &oracle.container.id]);
        lab.ctr(host, &["containers", "rm", &oracle.container.id]).ok();
    }
    assert!(!image.exists(), "the disk went with its container");
    let volume_here = lab.run_path(host, &volume.display().to_string());
    println!("    e2fsck: {}; {}", fsck(&kept), fsck(&volume_here));
    // As the other host sees it, the volume is gone.
    assert!(!lab.run_path(host.other(), &volume.display().to_string()).exists(), "two of the same name");
    let _ = fs::remove_file(kept);
    pod.remove(host);
    for host in Host::ALL {
        lab.on(host, &["rm", "-rf", DIRECTORY]).ok();
    }
}
