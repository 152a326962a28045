//! Two pods in one machine, with the specs that CRI writes.

use std::time::{Duration, Instant, SystemTime};

use dunlin_bridge::message::{
    CombinedLayers, ContainerConfig, GuestPid, Layer, Modification, Resource, SchemaVersion,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Host, LIMIT, Lines, disk, sh};

/// A container of a pod, on a scratch disk of its own: LUN `lun` of controller 2.
#[derive(Clone, Copy)]
struct Member {
    pod: &'static str,
    id: &'static str,
    lun: u8,
}

const SANDBOX: Member = Member { pod: "poda", id: "poda", lun: 0 };
const ONE: Member = Member { pod: "poda", id: "a1", lun: 1 };
const TWO: Member = Member { pod: "poda", id: "a2", lun: 2 };
const VIRTUAL: Member = Member { pod: "podv", id: "podv", lun: 3 };
const IN_VIRTUAL: Member = Member { pod: "podv", id: "v1", lun: 4 };

const COUNT: &str = "i=0; while true; do echo tick $i; i=$((i+1)); sleep 0.2; done";

impl Member {
    fn bundle(self) -> String {
        format!("/run/gcs/pods/{}/{}", self.pod, self.id)
    }

    fn scratch(self) -> String {
        format!("/run/mounts/scsi/2_{}_0/scratch/{}/{}", self.lun, self.pod, self.id)
    }

    fn layers(self) -> Resource {
        let layer = |lun| Layer { path: format!("/run/mounts/scsi/0_{lun}_0"), ..Default::default() };
        Resource::CombinedLayers(CombinedLayers {
            container_id: self.id.to_owned(),
            container_root_path: format!("{}/rootfs", self.bundle()),
            layers: vec![layer(1), layer(0)],
            scratch_path: self.scratch(),
        })
    }

    fn config(self, spec: Value) -> ContainerConfig {
        ContainerConfig {
            schema_version: SchemaVersion::V21,
            oci_bundle_path: self.bundle(),
            oci_specification: spec,
            scratch_dir_path: self.scratch(),
        }
    }

    async fn create(self, host: &mut Host, spec: Value) -> (GuestPid, Lines) {
        host.modify(Modification::add(disk(2, self.lun))).await;
        host.modify(Modification::add(self.layers())).await;
        host.bridge.create(self.id, &self.config(spec)).await.unwrap();
        host.start(self.id).await
    }

    /// Deletes it and its scratch disk.
    async fn delete(self, host: &Host) {
        host.modify(Modification::remove(self.layers())).await;
        host.bridge.delete_state(self.id).await.unwrap();
        host.take_away(2, self.lun).await;
    }

    async fn says(self, host: &mut Host, script: &str) -> String {
        let (code, text) = host.exec_to_end(self.id, sh(script), None).await;
        assert_eq!(code, 0, "{}: {script}: {text}", self.id);
        text
    }
}

fn mounts(more: &[Value]) -> Value {
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/dev/shm", "type": "bind", "source": "sandbox-tmp://shm", "options": ["rbind", "ro"]}),
        json!({"destination": "/etc/resolv.conf", "type": "bind", "options": ["rbind", "ro"],
            "source": "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/poda/resolv.conf"}),
    ];
    for mount in more {
        mounts.retain(|other| other["destination"] != mount["destination"]);
        mounts.push(mount.clone());
    }
    mounts.into()
}

fn linux(namespaces: &Value) -> Value {
    json!({
        "namespaces": namespaces,
        "cgroupsPath": "/kubepods/besteffort/pod1/x",
        "resources": {"cpu": {"shares": 2}, "devices": [{"allow": false, "access": "rwm"}]},
        "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/irq", "/proc/sys"],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
    })
}

fn sandbox(hostname: &str, annotations: Value) -> Value {
    let namespaces = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "network", "path": "/var/run/netns/cni-1"}]);
    let mut process = sh(COUNT);
    process["user"] = json!({"uid": 65535, "gid": 65535, "additionalGids": [65535]});
    process["noNewPrivileges"] = true.into();
    process["oomScoreAdj"] = (-998).into();
    let mut linux = linux(&namespaces);
    linux["sysctl"] =
        json!({"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"});
    json!({
        "ociVersion": "1.0.2-dev", "process": process, "root": {"path": "rootfs", "readonly": true},
        "hostname": hostname, "mounts": mounts(&[]), "annotations": annotations, "linux": linux,
    })
}

fn workload(script: &str, annotations: Value) -> Value {
    let namespaces = json!([{"type": "pid"}, {"type": "ipc", "path": "/proc/4711/ns/ipc"},
        {"type": "uts", "path": "/proc/4711/ns/uts"}, {"type": "mount"},
        {"type": "network", "path": "/proc/4711/ns/net"}, {"type": "cgroup"}]);
    let of_cri = |name: &str| {
        json!({"destination": format!("/etc/{name}"), "type": "bind", "options": ["rbind", "rprivate", "rw"],
            "source": format!("/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/poda/{name}")})
    };
    let shm = json!({"destination": "/dev/shm", "type": "bind", "source": "sandbox-tmp://shm",
        "options": ["rbind", "rprivate", "rw"]});
    json!({
        "ociVersion": "1.0.2-dev", "process": sh(script), "root": {"path": "rootfs"},
        "mounts": mounts(&[of_cri("hosts"), of_cri("hostname"), of_cri("resolv.conf"), shm]),
        "annotations": annotations, "linux": linux(&namespaces),
    })
}

fn annotations(kind: &str, sandbox: &str, virtual_pod: Option<&str>) -> Value {
    let mut notes = json!({
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": sandbox,
        "io.kubernetes.cri.sandbox-name": "web",
    });
    if let Some(pod) = virtual_pod {
        notes["io.microsoft.cri.virtual-pod-id"] = pod.into();
    }
    notes
}

/// Namespaces as the kernel names them: those a pod shares, and those it does not.
const SHARED: &str = "for n in net ipc uts; do readlink /proc/self/ns/$n; done";
const OWN: &str = "for n in pid mnt; do readlink /proc/self/ns/$n; done";
/// One line for each ext4 that is mounted anywhere, and for each SCSI device.
const FILESYSTEMS: &str = "ls /proc/fs/ext4 | wc -l; ls /sys/bus/scsi/devices | wc -l";

/// Reads what has come meanwhile, up to a line that was waited for: it counts on, and missed none.
async fn ticks_on(lines: &mut Lines) {
    let mut last = None;
    loop {
        let begin = Instant::now();
        let line = timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().expect("it has ended");
        let number: u64 = line.strip_prefix("tick ").unwrap().parse().unwrap();
        assert!(last.is_none_or(|last| last + 1 == number), "{number} after {last:?}");
        if last.replace(number).is_some() && begin.elapsed() > Duration::from_millis(50) {
            return;
        }
    }
}

async fn numbers(host: &mut Host, from: Member) -> (u32, u32) {
    let text = from.says(host, FILESYSTEMS).await;
    let mut lines = text.lines().map(|line| line.trim().parse().unwrap());
    (lines.next().unwrap(), lines.next().unwrap())
}

pub(super) async fn run(host: &mut Host) {
    println!("== a pod: its sandbox and two containers");
    host.modify(Modification::add(disk(0, 1))).await;
    let (pause_pid, mut pause) =
        SANDBOX.create(host, sandbox("web-0", annotations("sandbox", "poda", None))).await;
    let count = workload(COUNT, annotations("container", "poda", None));
    let (first, mut one) = ONE.create(host, count.clone()).await;
    let (_, mut two) = TWO.create(host, count.clone()).await;
    for member in [SANDBOX, ONE, TWO] {
        let text = member.says(host, "cat /etc/hostname /proc/sys/kernel/hostname /layer.txt").await;
        assert_eq!(text, "web-0\nweb-0\nshared layer\n", "{}", member.id);
        let hosts = member.says(host, "cat /etc/hosts").await;
        assert!(hosts.contains("127.0.0.1\tlocalhost") && hosts.contains("web-0"), "{hosts}");
        assert_eq!(member.says(host, "cat /etc/resolv.conf").await, "");
    }
    let namespaces = SANDBOX.says(host, SHARED).await;
    assert_eq!(namespaces.lines().count(), 3);
    assert_eq!(ONE.says(host, SHARED).await, namespaces);
    assert_eq!(TWO.says(host, SHARED).await, namespaces);
    assert_ne!(ONE.says(host, OWN).await, TWO.says(host, OWN).await);
    // What one writes into a file of the pod or its memory, the others read; the root is each one's own.
    ONE.says(
        host,
        "echo nameserver 192.0.2.1 > /etc/resolv.conf; echo mine > /root.txt; echo ours > /dev/shm/x",
    )
    .await;
    for member in [SANDBOX, TWO] {
        let text = member.says(host, "cat /etc/resolv.conf /dev/shm/x; [ ! -e /root.txt ]").await;
        assert_eq!(text, "nameserver 192.0.2.1\nours\n", "{}", member.id);
    }
    let mode = TWO.says(host, "ls -ld /dev/shm; readlink -f /dev/mqueue").await;
    assert!(mode.starts_with("drwxrwxrwt"), "{mode}");
    assert_eq!(SANDBOX.says(host, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await, "0\n");
    assert_eq!(host.exec_to_end(SANDBOX.id, sh("echo no > /new"), None).await.0, 1, "its root is read-only");

    println!("== a virtual pod beside it");
    let own = sandbox("virtual-0", annotations("container", "poda", Some("podv")));
    let (_, mut virtual_pause) = VIRTUAL.create(host, own).await;
    let (_, mut in_virtual) =
        IN_VIRTUAL.create(host, workload(COUNT, annotations("container", "poda", Some("podv")))).await;
    for member in [VIRTUAL, IN_VIRTUAL] {
        let text = member.says(host, "cat /etc/hostname /proc/sys/kernel/hostname; ls /dev/shm").await;
        assert_eq!(text, "virtual-0\nvirtual-0\n", "{}", member.id);
    }
    let others = VIRTUAL.says(host, SHARED).await;
    assert_eq!(IN_VIRTUAL.says(host, SHARED).await, others);
    for (ours, theirs) in namespaces.lines().zip(others.lines()) {
        assert_ne!(ours, theirs, "the pods share a namespace");
    }

    println!("== one container goes, the others stay");
    let (filesystems, devices) = numbers(host, TWO).await;
    let before = SystemTime::now();
    tokio::time::sleep(Duration::from_millis(50)).await;
    host.bridge.signal(ONE.id, first, Some(9)).await.unwrap();
    let exit = timeout(LIMIT, host.bridge.wait(ONE.id, first, None)).await.unwrap().unwrap();
    let at = exit.at.expect("our guest says when");
    // The guest's clock is within 5 ms of this one when it negotiates with an idle host, and drifts a little from then
    // on; a busy host tells it late.
    let slack = Duration::from_secs(5);
    assert!(at + slack > before && at < SystemTime::now() + slack, "{at:?}");
    assert_eq!(exit.code, 137);
    while one.next_line().await.unwrap().is_some() {}
    ONE.delete(host).await;
    assert_eq!(numbers(host, TWO).await, (filesystems - 1, devices - 1), "its disk is not let go");
    for lines in [&mut pause, &mut two, &mut virtual_pause, &mut in_virtual] {
        ticks_on(lines).await;
    }
    assert_eq!(TWO.says(host, "cat /dev/shm/x /layer.txt").await, "ours\nshared layer\n");

    println!("== a container that cannot be created leaves nothing behind");
    let of_no_pod = workload(COUNT, annotations("container", "no-such-pod", None));
    let mut without_program = count.clone();
    without_program["process"]["args"] = json!(["/no/such/program"]);
    let mut bad_mount = count.clone();
    bad_mount["mounts"][1]["options"] = json!(["size=everything"]);
    let mut bad_sandbox = sandbox("bad", annotations("sandbox", ONE.id, None));
    bad_sandbox["mounts"][1]["options"] = json!(["size=everything"]);
    for spec in [of_no_pod, without_program, bad_mount, bad_sandbox] {
        host.modify(Modification::add(disk(2, ONE.lun))).await;
        host.modify(Modification::add(ONE.layers())).await;
        let error = host.bridge.create(ONE.id, &ONE.config(spec)).await.unwrap_err();
        println!("create of nothing: {error}");
        assert_eq!(numbers(host, TWO).await, (filesystems, devices));
        host.modify(Modification::remove(ONE.layers())).await;
        host.take_away(2, ONE.lun).await;
        assert_eq!(numbers(host, TWO).await, (filesystems - 1, devices - 1), "after {error}");
    }

    println!("== another one comes");
    let (_, mut again) = ONE.create(host, count.clone()).await;
    assert_eq!(ONE.says(host, "cat /dev/shm/x; [ ! -e /root.txt ]").await, "ours\n");
    ticks_on(&mut again).await;

    println!("== the sandbox ends before its pod");
    ONE.delete(host).await;
    host.bridge.shutdown_forced(SANDBOX.id).await.unwrap();
    while pause.next_line().await.unwrap().is_some() {}
    timeout(LIMIT, host.bridge.wait(SANDBOX.id, pause_pid, None)).await.unwrap().unwrap();
    host.modify(Modification::add(disk(2, ONE.lun))).await;
    host.modify(Modification::add(ONE.layers())).await;
    let error = host.bridge.create(ONE.id, &ONE.config(count)).await.unwrap_err();
    host.modify(Modification::remove(ONE.layers())).await;
    assert!(error.to_string().contains("poda has ended"), "{error}");
    host.take_away(2, ONE.lun).await;
    ticks_on(&mut two).await;
    for member in [TWO, SANDBOX] {
        member.delete(host).await;
    }
    assert_eq!(numbers(host, IN_VIRTUAL).await, (filesystems - 3, devices - 3));
    ticks_on(&mut in_virtual).await;
    for member in [IN_VIRTUAL, VIRTUAL] {
        member.delete(host).await;
    }
    host.take_away(0, 1).await;
}
