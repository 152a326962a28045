//! containerd's blockfile snapshotter: every container has a whole ext4 of its own, which is attached as it is.

use std::{fs, path::PathBuf, process::Command};

use dunlin_tests::{Container, Host, Lab, Run, allocated};

use super::{MIB, SOON, counter, images::fetched, migrate, sh};

/// Of the snapshotter's empty file system, MiB. Most of it is zeros.
const SIZE_MIB: u64 = 128;

/// Configures the snapshotter on a host, for the rest of the lab's life, and has it unpack the image.
fn enable(lab: &Lab, host: Host) {
    let scratch = lab.host_dir(host).join("blockfile.ext4");
    let file = fs::File::create(&scratch).expect("a file");
    file.set_len(SIZE_MIB * MIB).expect("sparse");
    // Each host's has a UUID of its own, so that no two hosts have the same bytes.
    let path = scratch.display().to_string();
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", &path]);
    Run::new(mkfs, SOON).ok();
    let config = lab.host_dir(host).join("etc/containerd.toml");
    let text = fs::read_to_string(&config).expect("containerd's configuration");
    let table = format!(
        "\n[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nscratch_file = {path:?}\nfs_type = \"ext4\"\n"
    );
    fs::write(&config, text + &table).expect("writable");
    lab.service(host, "stop", "containerd");
    lab.service(host, "start", "containerd");
    let create = ["containers", "create", "--snapshotter", "blockfile", Container::IMAGE, "d-unpack"];
    lab.ctr(host, &create).ok();
    lab.ctr(host, &["containers", "rm", "d-unpack"]).ok();
}

/// What a host's store has of such images.
fn stored(lab: &Lab, host: Host) -> Vec<PathBuf> {
    let store = fs::read_dir(lab.host_dir(host).join("data/layers/sparse-sha256")).into_iter().flatten();
    let images = store.flatten().map(|entry| entry.path());
    images.filter(|path| path.extension().is_some_and(|end| end == "ext4")).collect()
}

pub(crate) fn a_blockfile_is_attached_as_it_is(lab: &Lab) {
    for host in Host::ALL {
        enable(lab, host);
    }
    let container = counter(lab, "d-block", &["--snapshotter", "blockfile"]);
    let open = "for p in $(pidof qemu-system-x86_64); do ls -l /proc/$p/fd; done";
    let open = lab.on(Host::A, &["sh", "-c", open]).ok();
    assert!(open.contains("snapshotter.v1.blockfile/snapshots/"), "QEMU has the file open: {open}");
    let look = "cat /etc/dunlin-demo /etc/mine; ls -d /lost+found; ls /bin";
    sh(&container, Host::A, "write", "echo mine >/etc/mine && rm /bin/hostname");
    let files = sh(&container, Host::A, "look", look);
    assert!(files.starts_with("this file came with the image\nmine\n/lost+found\n"), "{files}");
    assert!(files.contains("counter") && !files.contains("hostname"), "{files}");

    let report = migrate(lab, Host::A, "d-block", &[]);
    container.await_lines(Host::B, 20, SOON);
    assert_eq!(sh(&container, Host::B, "look-b", look), files);
    let stored_on_b = stored(lab, Host::B);
    assert_eq!((stored_on_b.len(), stored(lab, Host::A).len()), (1, 0), "b fetched it, a has its own");
    let (came, taken) = (fetched(&report), allocated(&stored_on_b[0]));
    println!(
        "    an ext4 of {SIZE_MIB} MiB: {} KiB were read from the source, {} KiB are taken here",
        came / 1024,
        taken / 1024
    );
    assert_eq!(fs::metadata(&stored_on_b[0]).expect("it is there").len(), SIZE_MIB * MIB);
    assert!(came > 0 && came < 32 * MIB && taken < 32 * MIB, "zeros neither came nor take room");
    let snapshots = lab.ctr(Host::A, &["snapshots", "--snapshotter", "blockfile", "ls"]).ok();
    assert!(snapshots.contains("sha256:") && !snapshots.contains("d-block"), "{snapshots}");

    // Back home the snapshotter copies the same parent again: nothing has to come.
    assert_eq!(fetched(&migrate(lab, Host::B, "d-block", &[])), 0);
    container.await_lines(Host::A, 20, SOON);
    assert_eq!(sh(&container, Host::A, "look-a", look), files);
    container.remove(Host::A);
    assert!(stored(lab, Host::A).is_empty());
}
