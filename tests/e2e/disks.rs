//! What a container writes, on whichever host it runs: no block wrong, none too many on the wire, none kept that was
//! given back, and one good disk whatever is killed.

mod blockfile;
mod images;
mod killed;
mod oracle;
mod shared;

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab, Run, allocated, scratch_image};

use crate::Case;
pub(crate) use blockfile::a_blockfile_is_attached_as_it_is;
pub(crate) use images::erofs_layers_are_attached_as_they_are;
pub(crate) use killed::kill_qemu;

pub(crate) const CASES: &[Case] = &[
    ("disks::a_full_scratch_is_no_space_left", a_full_scratch_is_no_space_left),
    ("disks::a_full_host_is_an_io_error", a_full_host_is_an_io_error),
    ("disks::a_file_that_is_there_is_never_written_to", a_file_that_is_there_is_never_written_to),
    ("disks::a_sparse_disk_stays_sparse", a_sparse_disk_stays_sparse),
    ("disks::no_block_is_wrong_over_moves_and_cancels", oracle::no_block_is_wrong_over_moves_and_cancels),
    (
        "disks::a_destination_killed_in_the_mirror_costs_nothing",
        killed::a_destination_killed_in_the_mirror_costs_nothing,
    ),
    (
        "disks::a_source_killed_in_the_mirror_keeps_its_disk",
        killed::a_source_killed_in_the_mirror_keeps_its_disk,
    ),
    ("disks::a_shared_disk_is_handed_over_and_back", shared::a_shared_disk_is_handed_over_and_back),
    ("disks::a_shared_volume_is_handed_over_and_back", shared::a_shared_volume_is_handed_over_and_back),
    (
        "disks::another_storage_of_the_same_name_is_refused",
        shared::another_storage_of_the_same_name_is_refused,
    ),
    (
        "disks::an_image_of_other_bytes_is_read_from_the_source",
        images::an_image_of_other_bytes_is_read_from_the_source,
    ),
];

const SOON: Duration = Duration::from_secs(30);
const MOVE: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

/// `ctr run` of the counter on host a, with more options.
fn counter<'a>(lab: &'a Lab, id: &str, options: &[&str]) -> Container<'a> {
    let container = Container::adopt(lab, id);
    let log = container.log_path(Host::A);
    fs::create_dir_all(log.parent().expect("a log has a directory")).expect("a directory for logs");
    let _ = fs::remove_file(&log);
    let uri = format!("file://{}", log.display());
    let mut run = vec!["run", "-d", "--log-uri", &uri];
    run.extend(Container::RUN);
    run.extend(options);
    run.extend([Container::IMAGE, id, "/bin/counter"]);
    lab.ctr(Host::A, &run).ok();
    container.await_lines(Host::A, 10, SOON);
    container
}

/// A move with options; gives its report.
#[track_caller]
fn migrate(lab: &Lab, from: Host, id: &str, options: &[&str]) -> serde_json::Value {
    let report = lab.dir().join(format!("{id}.json"));
    let to = from.other().name();
    let mut command = lab.command_on(from, &["dunlin", "migrate", id, "--to", to, "--report"]);
    command.arg(&report).args(options);
    Run::new(command, MOVE).ok();
    let text = fs::read_to_string(&report).expect("a move that succeeds writes its report");
    let _ = fs::remove_file(report);
    serde_json::from_str(&text).expect("the report is JSON")
}

fn disk_sent(report: &serde_json::Value) -> u64 {
    report["disk_sent_bytes"].as_u64().unwrap_or_else(|| panic!("no disk_sent_bytes in {report}"))
}

#[track_caller]
fn sh(container: &Container<'_>, host: Host, exec: &str, script: &str) -> String {
    container.exec(host, exec, &["sh", "-c", script]).ok()
}

fn a_full_scratch_is_no_space_left(lab: &Lab) {
    let container = counter(lab, "d-small", &["--annotation", "dev.dunlin.scratch.mib=32"]);
    let kib: u64 = sh(&container, Host::A, "size", "df -k / | tail -n 1")
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("df tells the size");
    assert!((20 * 1024..=32 * 1024).contains(&kib), "{kib} KiB, where 32 MiB were asked for");
    let fill = ["dd", "if=/dev/zero", "of=/fill", "bs=1M", "count=64"];
    container.exec(Host::A, "fill", &fill).fails_naming(&["no space left"]);
    // Not a machine that stands still: the container goes on, and what it gives back it can use again.
    sh(
        &container,
        Host::A,
        "again",
        "rm /fill && dd if=/dev/zero of=/less bs=1M count=8 2>/dev/null && sync",
    );
    let report = migrate(lab, Host::A, "d-small", &[]);
    println!("    a disk of 32 MiB moved with {} KiB", disk_sent(&report) / 1024);
    container.exec(Host::B, "fill-b", &fill).fails_naming(&["no space left"]);
    container.await_state(Host::B, "RUNNING", SOON);
    lab.ctr(
        Host::A,
        &[
            "run",
            "--rm",
            "--annotation",
            "dev.dunlin.scratch.mib=x",
            "--runtime",
            "io.containerd.dunlin.v2",
            Container::IMAGE,
            "d-wrong",
            "true",
        ],
    )
    .fails_naming(&["dev.dunlin.scratch.mib", "MiB"]);
    container.remove(Host::B);
}

/// A small file system on a host's directory, gone when dropped.
struct SmallHost<'a> {
    lab: &'a Lab,
    path: String,
}

impl<'a> SmallHost<'a> {
    fn new(lab: &'a Lab, path: &str, mib: u64) -> SmallHost<'a> {
        lab.on(Host::A, &["mkdir", "-p", path]).ok();
        lab.on(Host::A, &["mount", "-t", "tmpfs", "-o", &format!("size={mib}m"), "small", path]).ok();
        SmallHost { lab, path: path.to_owned() }
    }
}

impl Drop for SmallHost<'_> {
    fn drop(&mut self) {
        let _ = self.lab.command_on(Host::A, &["umount", "-l", &self.path]).output();
    }
}

fn a_full_host_is_an_io_error(lab: &Lab) {
    let host = SmallHost::new(lab, "/var/lib/dunlin/scratch/default/d-host", 48);
    let container = counter(lab, "d-host", &[]);
    // The guest's disk has a gigabyte, the host has not.
    let fill = "dd if=/dev/urandom of=/fill bs=1M count=96 conv=fsync";
    let text = container.exec(Host::A, "fill", &["sh", "-c", fill]).fails_naming(&["input/output error"]);
    println!("    in the container: {}", text.lines().find(|line| line.contains("rror")).unwrap_or_default());
    container.await_state(Host::A, "RUNNING", SOON);
    assert_eq!(sh(&container, Host::A, "alive", "echo alive"), "alive\n", "the machine runs on");
    // What is in memory needs no disk: the counter still counts there.
    assert_eq!(sh(&container, Host::A, "shm", "echo kept >/dev/shm/x && cat /dev/shm/x"), "kept\n");
    container.remove(Host::A);
    drop(host);
}

fn a_file_that_is_there_is_never_written_to(lab: &Lab) {
    let container = counter(lab, "d-there", &[]);
    let there = scratch_image(lab, Host::B, "d-there", "d-there");
    fs::create_dir_all(there.parent().expect("a directory")).expect("it can be made");
    fs::write(&there, "somebody else's\n").expect("writable");
    let text = lab.migrate(Host::A, "d-there", "b").fails_naming(&["d-there.raw", "exists", "disks.shared"]);
    assert!(text.contains("/var/lib/dunlin/scratch/default/d-there"), "{text}");
    assert_eq!(fs::read_to_string(&there).expect("it is still there"), "somebody else's\n");
    container.await_lines(Host::A, 20, SOON);
    fs::remove_file(&there).expect("removed");
    migrate(lab, Host::A, "d-there", &[]);
    container.await_lines(Host::B, 20, SOON);
    container.remove(Host::B);
    assert!(!there.exists(), "the disk went with its container");
}

/// Waits until a file takes less than `most` bytes; gives what it takes.
#[track_caller]
fn await_less(path: &Path, most: u64) -> u64 {
    let since = Instant::now();
    loop {
        let now = allocated(path);
        if now < most {
            return now;
        }
        assert!(
            since.elapsed() < SOON,
            "{} takes {} MiB, not less than {}",
            path.display(),
            now / MIB,
            most / MIB
        );
        thread::sleep(Duration::from_millis(100));
    }
}

fn a_sparse_disk_stays_sparse(lab: &Lab) {
    let container = counter(lab, "d-sparse", &["--annotation", "dev.dunlin.scratch.mib=4096"]);
    let [on_a, on_b] = Host::ALL.map(|host| scratch_image(lab, host, "d-sparse", "d-sparse"));
    assert_eq!(fs::metadata(&on_a).expect("the disk").len(), 4096 * MIB);
    let write = "dd if=/dev/urandom of=/keep bs=1M count=100 2>/dev/null; \
                 dd if=/dev/urandom of=/give bs=1M count=100 2>/dev/null; sync; md5sum </keep";
    let sum = sh(&container, Host::A, "write", write);
    let before = allocated(&on_a);
    assert!((200 * MIB..230 * MIB).contains(&before), "{} MiB on the host", before / MIB);
    let report = migrate(lab, Host::A, "d-sparse", &[]);
    let sent = disk_sent(&report);
    let after = allocated(&on_b);
    println!(
        "    4096 MiB with 200 written: {:.1} MiB sent, {:.1} MiB on a, {:.1} MiB on b",
        sent as f64 / MIB as f64,
        before as f64 / MIB as f64,
        after as f64 / MIB as f64
    );
    assert!((200 * MIB..230 * MIB).contains(&sent), "{} MiB were sent", sent / MIB);
    assert!(after < 230 * MIB, "{} MiB on the destination", after / MIB);
    // Given back by the container, given back by the host, here and, once moved back, there.
    sh(&container, Host::B, "give", "rm /give; sync");
    let given = await_less(&on_b, after - 95 * MIB);
    sh(&container, Host::B, "zeroes", "dd if=/dev/zero of=/zeroes bs=1M count=60 2>/dev/null; sync");
    let zeroes = allocated(&on_b);
    assert!(zeroes < given + 5 * MIB, "zeroes take {} MiB on the host", (zeroes - given) / MIB);
    let report = migrate(lab, Host::B, "d-sparse", &[]);
    println!(
        "    100 MiB given back: {:.1} MiB on b; back on a {:.1} MiB, {:.1} MiB sent",
        given as f64 / MIB as f64,
        allocated(&on_a) as f64 / MIB as f64,
        disk_sent(&report) as f64 / MIB as f64
    );
    assert!(disk_sent(&report) < 125 * MIB && allocated(&on_a) < 125 * MIB);
    assert_eq!(sh(&container, Host::A, "sum", "md5sum </keep"), sum);
    sh(&container, Host::A, "rest", "rm /keep; sync");
    println!("    and the rest: {:.1} MiB on a", await_less(&on_a, 25 * MIB) as f64 / MIB as f64);
    container.remove(Host::A);
}
