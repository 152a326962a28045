//! One tree in which every field says something. Its bytes are in `tests/golden`: it does not change.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;

use super::super::*;
use crate::compat::{LinkKind, QemuVersion};
use crate::ids::{ContainerId, Digest, ExecId, GuestPid, ReservationId, SandboxId};

pub(super) const SHARED: &str = "/srv/data";
pub(super) const DEVICE: &str = "d0000000-0000-4000-8000-000000000001";
pub(super) const NIC: &str = "a0000000-0000-4000-8000-000000000001";

pub(super) fn reservation(n: u32) -> ReservationId {
    ReservationId::new(format!("0a1b2c3d-4e5f-4000-8000-{n:012x}")).unwrap()
}

pub(super) fn slot(n: u32) -> Slot {
    Slot::try_from(n).unwrap()
}

pub(super) fn digest(c: char) -> Digest {
    Digest::new(format!("sha256:{}", c.to_string().repeat(64))).unwrap()
}

pub(super) fn prefix(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(super) fn compat() -> Compat {
    Compat {
        version: 1,
        dunlin: "0.1.0".into(),
        qemu: QemuVersion { major: 7, minor: 2, micro: 22, text: "Debian".into() },
        machine: "pc-q35-7.2".into(),
        cpu: "Nehalem-v1".into(),
        accelerator: "tcg".into(),
        link: LinkKind::VirtioSerial,
        kernel: digest('a'),
        initramfs: digest('b'),
        memory_mib: 512,
        vcpus: 2,
        vm_uuid: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0".into(),
    }
}

pub(super) fn mount(guest_path: &str, read_only: bool) -> SavedMount {
    SavedMount {
        guest_path: guest_path.into(),
        read_only,
        filesystem: if read_only { "erofs" } else { "ext4" }.into(),
        stage: MountStage::Mounted,
        encrypted: false,
        options: Vec::new(),
        ensure_filesystem: false,
        block_device: false,
        ref_count: 1,
    }
}

pub(super) fn disk(source_path: &str, access: DiskAccess, mounts: BTreeMap<u64, SavedMount>) -> SavedDisk {
    SavedDisk {
        source_path: source_path.into(),
        size: 1 << 30,
        access,
        stage: DiskStage::Attached,
        kind: DiskKind::VirtualDisk,
        mounts,
    }
}

pub(super) fn token(byte: u8) -> DiskToken {
    DiskToken { id: [byte; DiskToken::ID_BYTES], value: [byte + 1; DiskToken::VALUE_BYTES] }
}

pub(super) fn process(pid: u32, first_port: u32) -> SavedProcess {
    SavedProcess {
        stage: ProcessStage::Running(GuestPid(pid)),
        bundle: "/run/b".into(),
        oci_process: br#"{"args":["sh"]}"#.to_vec(),
        io_retry_timeout: None,
        stdin: None,
        stdout: Some(StdioPort(first_port)),
        stderr: Some(StdioPort(first_port + 1)),
        stdin_closed: false,
        terminal: false,
        wait_call_id: u64::from(pid),
    }
}

/// A workload that holds nothing.
pub(super) fn container(name: &str, pid: u32) -> SavedContainer {
    SavedContainer {
        container_id: ContainerId::new(name).unwrap(),
        guest_container_id: ContainerId::new(name).unwrap(),
        role: ContainerRole::Workload,
        stage: ContainerStage::Running,
        paused: false,
        io_retry_timeout: None,
        layers: Vec::new(),
        scratch: None,
        layers_combined: true,
        rootfs_path: format!("/run/{name}/rootfs"),
        scsi_reservations: BTreeSet::new(),
        plan9_reservations: BTreeSet::new(),
        vpci_devices: BTreeSet::new(),
        copies: BTreeMap::new(),
        disk_volumes: BTreeMap::new(),
        init: SavedProcess { bundle: format!("/run/bundles/{name}"), ..process(pid, 0x4000_0000 + pid * 8) },
        execs: BTreeMap::new(),
    }
}

fn scsi() -> SavedScsi {
    let image = || DiskAccess::ReadOnly { digest: digest('c') };
    let data = SavedMount {
        encrypted: true,
        options: vec!["noatime".into(), "data=ordered".into()],
        ensure_filesystem: true,
        ref_count: 2,
        ..mount("/run/data", false)
    };
    let raw = SavedMount { block_device: true, filesystem: String::new(), ..mount("/dev/shared", false) };
    let data = SavedDisk {
        kind: DiskKind::PassThrough,
        ..disk("/dev/vg/data", DiskAccess::Writable, [(1, data), (2, raw)].into())
    };
    let one = |path| [(0, mount(path, false))].into();
    let uses = [(1, 0, 0), (2, 0, 0), (3, 1, 0), (4, 64, 0), (5, 65, 1), (6, 65, 2), (7, 0, 0)];
    SavedScsi {
        controllers: 4,
        disks: BTreeMap::from([
            (
                slot(0),
                disk("/l", image(), [(0, SavedMount { ref_count: 3, ..mount("/run/l", true) })].into()),
            ),
            (slot(1), disk("/s1", DiskAccess::Writable, one("/run/s1"))),
            (slot(64), disk("/srv/s2", DiskAccess::Shared { token: token(6) }, one("/run/s2"))),
            (slot(65), data),
        ]),
        reservations: uses
            .map(|(id, at, partition)| (reservation(id), SavedReservation { slot: slot(at), partition }))
            .into(),
    }
}

fn plan9() -> SavedPlan9 {
    let share = SavedShare {
        name: "7".into(),
        read_only: true,
        restrict: true,
        allowed_names: vec!["hosts".into(), "resolv.conf".into()],
        stage: ShareStage::Added,
        mount: Some(SavedShareMount {
            read_only: true,
            stage: ShareMountStage::Mounted,
            ref_count: 2,
            guest_path: "/run/share".into(),
        }),
    };
    let reserved = SavedShare {
        name: "8".into(),
        restrict: false,
        allowed_names: Vec::new(),
        stage: ShareStage::Reserved,
        mount: None,
        ..share.clone()
    };
    SavedPlan9 {
        no_writable_file_shares: true,
        name_counter: 9,
        shares: [(SHARED.to_owned(), share), ("/srv/other".to_owned(), reserved)].into(),
        reservations: [(reservation(20), SHARED.to_owned()), (reservation(21), SHARED.to_owned())].into(),
    }
}

fn network() -> SavedNetwork {
    let endpoint = SavedEndpoint {
        endpoint_id: "veth-17".into(),
        mac: "52:54:00:12:ab:01".into(),
        name: "eth0".into(),
        root_port: 1,
        mtu: 1400,
        addresses: ["10.1.2.3/24", "fd00::3/64"].map(prefix).into(),
        routes: vec![
            SavedRoute {
                destination: prefix("0.0.0.0/0"),
                gateway: Some([10, 1, 2, 1].into()),
                source: Some([10, 1, 2, 3].into()),
                metric: 100,
                on_link: true,
            },
            SavedRoute {
                destination: prefix("fd01::/48"),
                gateway: None,
                source: None,
                metric: 1024,
                on_link: false,
            },
        ],
        neighbours: vec![([10, 1, 2, 1].into(), "52:54:00:12:ab:ff".into())],
    };
    SavedNetwork {
        namespace_id: "ns-1".into(),
        policy_based_routing: true,
        namespace_supported: true,
        stage: NetworkStage::Configured,
        endpoints: [(NIC.to_owned(), endpoint)].into(),
    }
}

/// A pod with a sandbox container and a workload that holds one of everything, and a container on its own.
pub(super) fn full() -> SavedTree {
    let layer = |id, path: &str| SavedLayer { reservation: reservation(id), guest_path: path.into() };
    let sandbox = SavedContainer {
        role: ContainerRole::Sandbox,
        guest_container_id: ContainerId::new("pod-in-guest").unwrap(),
        layers: vec![layer(1, "/run/l")],
        ..container("pod", 10)
    };
    let exit = SavedExit { code: 137, at_seconds: 1_700_000_000, at_nanos: 999_999_999 };
    let ended = SavedProcess {
        stage: ProcessStage::Terminated(Some(GuestPid(21)), exit),
        bundle: "/run/another".into(),
        wait_call_id: 0,
        ..process(21, 0x4000_0110)
    };
    let shell = SavedProcess {
        bundle: "/run/bundles/web".into(),
        terminal: true,
        stdin: Some(StdioPort(0x4000_0120)),
        stderr: None,
        stdin_closed: true,
        io_retry_timeout: Some(Duration::new(1, 500_000_000)),
        ..process(22, 0x4000_0121)
    };
    let web = SavedContainer {
        stage: ContainerStage::Running,
        paused: true,
        io_retry_timeout: Some(Duration::from_secs(60)),
        layers: vec![layer(2, "/run/l")],
        // Elsewhere than the disk.
        scratch: Some(layer(3, "/run/s1/upper")),
        scsi_reservations: [reservation(5), reservation(6)].into(),
        plan9_reservations: [reservation(20)].into(),
        vpci_devices: [DEVICE.to_owned()].into(),
        copies: [
            ("/etc/app".into(), "/run/mounts/copies/web/0".into()),
            ("/etc/hosts".into(), "/run/mounts/copies/web/1".into()),
        ]
        .into(),
        disk_volumes: [("/data".into(), reservation(5))].into(),
        execs: [(ExecId::new("logs").unwrap(), ended), (ExecId::new("sh").unwrap(), shell)].into(),
        ..container("web", 20)
    };
    let alone = SavedContainer {
        role: ContainerRole::Standalone,
        stage: ContainerStage::Created,
        layers: vec![layer(7, "/run/l")],
        scratch: Some(layer(4, "/run/s2")),
        layers_combined: false,
        init: SavedProcess { stage: ProcessStage::Created(GuestPid(30)), ..process(30, 0x4000_0130) },
        ..container("alone", 30)
    };
    let device = SavedVpciDevice {
        instance_id: "0000:03:00.0".into(),
        virtual_function_index: 2,
        stage: VpciStage::Ready,
        ref_count: 1,
    };
    SavedTree {
        vm: SavedVm {
            vm_id: "pod@vm".into(),
            stage: VmStage::Running,
            options: SandboxOptions {
                no_writable_file_shares: true,
                scratch_encryption: true,
                policy_based_routing: true,
                architecture: "amd64".into(),
                fully_physically_backed: true,
                confidential: Some(Confidential {
                    security_policy: "cG9saWN5".into(),
                    security_policy_enforcer: "rego".into(),
                    reference_info_file: "reference.cose".into(),
                }),
            },
            next_port: StdioPort(0x4000_0200),
            bridge_next_id: 500,
            plain_streams: true,
            compat: compat(),
            document: br#"{"machine":"pc-q35-7.2"}"#.to_vec(),
            scsi: scsi(),
            vpci: SavedVpci { devices: [(DEVICE.to_owned(), device)].into() },
            plan9: plan9(),
        },
        pods: vec![
            SavedPod {
                pod_id: SandboxId::new("pod").unwrap(),
                guest_pod_id: SandboxId::new("pod-in-guest").unwrap(),
                network: Some(network()),
                containers: vec![sandbox, web],
            },
            SavedPod {
                pod_id: SandboxId::new("alone").unwrap(),
                guest_pod_id: SandboxId::new("alone").unwrap(),
                network: None,
                containers: vec![alone],
            },
        ],
    }
}
