use serde_json::json;

use super::super::facts::Directory;
use super::*;

fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> Mount {
    Mount::read(&json!({"destination": destination, "type": kind, "source": source, "options": options}))
}

fn bind(destination: &str, option: &str) -> Mount {
    mount("bind", "/srv/x", destination, &["rbind", option])
}

const FILE: Facts = Facts::File { unfit: None };

fn directory(unfit: Option<NotCopied>) -> Facts {
    Facts::Directory(Directory { unfit, memory_bytes: None, mode: 0o755, uid: 1, gid: 2 })
}

const LARGE: NotCopied = NotCopied::Total { limit: 16 << 20 };

#[test]
fn small_and_read_only_is_a_copy() {
    let follows = Volume::Copy(Direction::ToGuest);
    assert_eq!(plan(&bind("/data", "ro"), &FILE).unwrap(), follows);
    assert_eq!(plan(&bind("/data", "ro"), &directory(None)).unwrap(), follows);
    // The type of a bind mount may be anything.
    assert_eq!(plan(&mount("none", "/srv/x", "/data", &["bind", "ro"]), &FILE).unwrap(), follows);
}

#[test]
fn what_is_not_copied_is_shared_and_says_why() {
    let shared = |why| Volume::Share { why };
    assert_eq!(plan(&bind("/data", "rw"), &directory(None)).unwrap(), shared(NotCopied::Writable));
    assert_eq!(plan(&bind("/data", "rw"), &FILE).unwrap(), shared(NotCopied::Writable));
    assert_eq!(plan(&bind("/data", "ro"), &directory(Some(LARGE))).unwrap(), shared(LARGE));
    let socket = NotCopied::Kind { path: "/srv/x/s".into(), what: "a socket" };
    assert_eq!(plan(&bind("/data", "ro"), &directory(Some(socket.clone()))).unwrap(), shared(socket));
}

#[test]
fn files_of_the_pod_are_copies_whoever_may_write_them() {
    for destination in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
        for option in ["ro", "rw"] {
            let planned = plan(&bind(destination, option), &FILE).unwrap();
            assert_eq!(planned, Volume::Copy(Direction::ToGuest), "{destination} {option}");
        }
        // What is no file there is no file of the pod.
        let planned = plan(&bind(destination, "rw"), &directory(None)).unwrap();
        assert_eq!(planned, Volume::Share { why: NotCopied::Writable });
    }
    let log = plan(&bind("/dev/termination-log", "rw"), &FILE).unwrap();
    assert_eq!(log, Volume::Copy(Direction::BackToHost));
    let large = Facts::File { unfit: Some(LARGE) };
    assert_eq!(plan(&bind("/etc/hosts", "rw"), &large).unwrap(), Volume::Share { why: LARGE });
}

#[test]
fn empty_directories_are_the_pods() {
    let source = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache-1";
    let facts = |memory_bytes| {
        let unfit = Some(LARGE);
        Facts::Directory(Directory { unfit, memory_bytes, mode: 0o2777, uid: 0, gid: 7 })
    };
    for (memory_bytes, option) in [(None, "rw"), (Some(1 << 20), "ro")] {
        let planned =
            plan(&mount("bind", source, "/cache", &["rbind", option]), &facts(memory_bytes)).unwrap();
        let wanted =
            Volume::EmptyDirectory { name: "cache-1".into(), memory_bytes, mode: 0o2777, uid: 0, gid: 7 };
        assert_eq!(planned, wanted);
    }
    for elsewhere in [
        format!("{source}/sub"),
        "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir".into(),
        "/kubernetes.io~empty-dir/..".into(),
        "/kubernetes.io~empty-dir/A_b".into(),
    ] {
        let planned = plan(&mount("bind", &elsewhere, "/cache", &["rbind", "rw"]), &directory(None)).unwrap();
        assert_eq!(planned, Volume::Share { why: NotCopied::Writable }, "{elsewhere}");
    }
}

#[test]
fn disks() {
    let on = |kind: &str, option: &str, facts: &Facts| {
        plan(&mount(kind, "/srv/x", "/data", &[option, "noatime"]), facts)
    };
    let disk = |filesystem, read_only| Volume::Disk { filesystem, read_only };
    assert_eq!(on("ext4", "rw", &FILE).unwrap(), disk(Filesystem::Ext4, false));
    let large = Facts::File { unfit: Some(LARGE) };
    assert_eq!(on("ext4", "ro", &large).unwrap(), disk(Filesystem::Ext4, true));
    assert_eq!(on("ext4", "rw", &Facts::Block).unwrap(), disk(Filesystem::Ext4, false));
    assert_eq!(on("erofs", "rw", &FILE).unwrap(), disk(Filesystem::Erofs, true));
    assert_eq!(plan(&bind("/dev/xvda", "rw"), &Facts::Block).unwrap(), Volume::Device { read_only: false });
    assert_eq!(plan(&bind("/dev/xvda", "ro"), &Facts::Block).unwrap(), Volume::Device { read_only: true });
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |mount: &Mount, facts: &Facts| {
        let text = plan(mount, facts).unwrap_err().to_string();
        assert!(text.contains(&mount.source) && text.contains(&mount.destination), "{text}");
        text
    };
    let missing = Facts::Missing("No such file or directory".into());
    assert!(refused(&bind("/data", "ro"), &missing).contains("create it"));
    assert!(refused(&mount("ext4", "/srv/x", "/data", &[]), &missing).contains("create it"));
    assert!(refused(&mount("nfs", "srv:/x", "/data", &[]), &FILE).contains("\"nfs\""));
    assert!(refused(&mount("xfs", "/srv/x", "/data", &[]), &FILE).contains("\"xfs\""));
    assert!(refused(&bind("/data", "rw"), &Facts::Other("a socket")).contains("a socket"));
    assert!(refused(&mount("ext4", "/srv/x", "/data", &[]), &directory(None)).contains("a directory"));
}

#[test]
fn what_is_not_of_this_host_is_let_be() {
    for (kind, source) in
        [("proc", "proc"), ("tmpfs", "tmpfs"), ("bind", "sandbox://x"), ("cgroup", "cgroup")]
    {
        assert_eq!(plan(&mount(kind, source, "/x", &[]), &Facts::Other("")).unwrap(), Volume::Guests);
    }
}
