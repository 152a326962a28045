//! Disks on storage that both hosts share: handed over, not copied; and refused when it is not the same storage.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use dunlin_tests::{Host, Lab, Oracle, Run, is_locked};

use crate::rollback::{SlowNetwork, in_transfer};

use super::{MIB, MOVE, SOON, disk_sent, migrate};

/// Both hosts' scratch disks below a directory that both say is shared; as before when dropped.
struct SharedStorage {
    directory: PathBuf,
    configs: Vec<(PathBuf, String)>,
}

impl SharedStorage {
    fn new(lab: &Lab, name: &str) -> SharedStorage {
        let directory = lab.dir().join(name);
        fs::create_dir_all(&directory).expect("a directory");
        let configs = Host::ALL.map(|host| {
            let path = lab.host_dir(host).join("etc/config.toml");
            let text = fs::read_to_string(&path).expect("the shim's configuration");
            let more = format!("shared = [{directory:?}]\nscratch_dir = {:?}\n", directory.join("scratch"));
            let changed = text.replacen("[disks]\n", &format!("[disks]\n{more}"), 1);
            assert_ne!(text, changed, "{} has no [disks]", path.display());
            fs::write(&path, changed).expect("writable");
            (path, text)
        });
        SharedStorage { directory, configs: configs.to_vec() }
    }

    /// All files below it, without their directories.
    fn files(&self) -> Vec<String> {
        fn below(directory: &Path, into: &mut Vec<String>) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => below(&path, into),
                    path => into.push(path.file_name().expect("a name").to_string_lossy().into_owned()),
                }
            }
        }
        let mut files = Vec::new();
        below(&self.directory, &mut files);
        files.sort();
        files
    }
}

impl Drop for SharedStorage {
    fn drop(&mut self) {
        for (path, text) in &self.configs {
            let _ = fs::write(path, text);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

pub(super) fn a_shared_disk_is_handed_over_and_back(lab: &Lab) {
    let storage = SharedStorage::new(lab, "storage");
    let oracle = Oracle::start(lab, "d-shared", 31, &[]);
    assert_eq!(storage.files(), ["d-shared.raw"]);
    let mut host = Host::A;
    for _ in 0..2 {
        let report = migrate(lab, host, "d-shared", &[]);
        host = host.other();
        assert_eq!(disk_sent(&report), 0, "a shared disk is not sent: {report}");
        oracle.await_more(64, SOON);
        oracle.container.assert_only_on(host);
        // One file, no token left; the host that it left did not remove it.
        assert_eq!(storage.files(), ["d-shared.raw"]);
    }
    // Turned back in several places: the locks come back with the disk.
    for delay in [200, 500, 900] {
        let mut command =
            lab.command_on(host, &["dunlin", "migrate", "d-shared", "--to", host.other().name()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("dunlin lab exec starts");
        thread::sleep(Duration::from_millis(delay));
        lab.on(host, &["dunlin", "cancel", "d-shared"]);
        let moved = Run::finish(child, "dunlin migrate", MOVE).code == 0;
        println!("    cancel after {delay} ms: {}", if moved { "too late" } else { "turned back" });
        if moved {
            host = host.other();
        }
        oracle.await_more(64, SOON);
        oracle.container.assert_only_on(host);
        assert_eq!(storage.files(), ["d-shared.raw"]);
    }
    // Copied when that is asked for, under a name of its own; the original goes with the source.
    let report = migrate(lab, host, "d-shared", &["--storage", "copy"]);
    host = host.other();
    assert!(disk_sent(&report) > 8 * MIB, "{report}");
    let files = storage.files();
    assert!(files.len() == 1 && files[0].starts_with("d-shared-"), "{files:?}");
    oracle.await_more(64, SOON);
    // And handed over under that name.
    assert_eq!(disk_sent(&migrate(lab, host, "d-shared", &[])), 0);
    host = host.other();
    oracle.await_more(64, SOON);
    println!("    {}", oracle.end(host));
    oracle.container.await_state(host, "STOPPED", SOON);
    lab.ctr(host, &["task", "rm", "d-shared"]);
    lab.ctr(host, &["containers", "rm", "d-shared"]).ok();
    assert_eq!(storage.files(), [""; 0], "the disk went with its container");
}

pub(super) fn a_shared_volume_is_handed_over_and_back(lab: &Lab) {
    let storage = SharedStorage::new(lab, "storage-3");
    let image = storage.directory.join("volume.img").display().to_string();
    lab.on(Host::A, &["sh", "-c", &format!("truncate -s 64M {image} && mkfs.ext4 -q -F {image}")]).ok();
    let mount = format!("type=ext4,src={image},dst=/data,options=rw");
    let oracle = Oracle::start_at(lab, "d-volume", 33, "/data/oracle.dat", &["--mount", &mount]);
    let stands_on = |host: Host| {
        oracle.await_more(64, SOON);
        oracle.container.assert_only_on(host);
        // The one file: not copied, not renamed where it left, no token beside it, and QEMU's lock is on it.
        assert_eq!(storage.files(), ["d-volume.raw", "volume.img"]);
        assert!(is_locked(Path::new(&image)), "nobody has a lock on it");
    };
    let mut host = Host::A;
    stands_on(host);
    for _ in 0..2 {
        let report = migrate(lab, host, "d-volume", &[]);
        host = host.other();
        assert_eq!(disk_sent(&report), 0, "a shared volume is not sent: {report}");
        stands_on(host);
    }
    // Turned back while the memory goes, when the destination has the disk and no lock on it.
    let slow = SlowNetwork::new();
    let child = in_transfer(lab, lab.command_on(host, &["dunlin", "migrate", "d-volume", "--to", "b"]));
    lab.on(host, &["dunlin", "cancel", "d-volume"]).ok();
    Run::finish(child, "dunlin migrate", MOVE).fails_naming(&["cancel"]);
    drop(slow);
    stands_on(host);
    // A copy would have to take the place of the original.
    let words = ["dunlin", "migrate", "d-volume", "--to", "b", "--storage", "copy"];
    Run::new(lab.command_on(host, &words), MOVE).fails_naming(&["/data", "volume.img", "exists"]);
    stands_on(host);
    assert_eq!(disk_sent(&migrate(lab, host, "d-volume", &[])), 0);
    host = host.other();
    stands_on(host);
    println!("    {}", oracle.end(host));
    oracle.container.await_state(host, "STOPPED", SOON);
    lab.ctr(host, &["task", "rm", "d-volume"]);
    lab.ctr(host, &["containers", "rm", "d-volume"]).ok();
    // The scratch disk went with its container; a volume is its owner's.
    assert_eq!(storage.files(), ["volume.img"]);
    assert!(!is_locked(Path::new(&image)));
    lab.on(host, &["e2fsck", "-fn", &image]).ok();
}

pub(super) fn another_storage_of_the_same_name_is_refused(lab: &Lab) {
    let storage = SharedStorage::new(lab, "storage-2");
    let oracle = Oracle::start(lab, "d-other", 32, &[]);
    let path = storage.directory.display().to_string();
    // Host b has something else mounted there, with a file of the same name.
    lab.on(Host::B, &["mount", "-t", "tmpfs", "-o", "size=64m", "other", &path]).ok();
    let make = format!(
        "mkdir -p {path}/scratch/default/d-other && echo x >{path}/scratch/default/d-other/d-other.raw"
    );
    lab.on(Host::B, &["sh", "-c", &make]).ok();
    let refused = lab.migrate(Host::A, "d-other", "b");
    refused.fails_naming(&["token", "d-other.raw", "--storage copy"]);
    oracle.await_more(64, SOON);
    assert_eq!(storage.files(), ["d-other.raw"], "no token is left");
    let report = migrate(lab, Host::A, "d-other", &["--storage", "copy"]);
    assert!(disk_sent(&report) > 8 * MIB, "{report}");
    oracle.await_more(64, SOON);
    println!("    {}", oracle.end(Host::B));
    drop(oracle);
    let _ = lab.command_on(Host::B, &["umount", "-l", &path]).output();
}
