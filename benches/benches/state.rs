//! What saving and importing a sandbox's state costs, by the number of its containers. Needs no lab.
//!
//! `cargo bench -p dunlin-benches --bench state -- --rounds 51`
//!
//! A pod as the CRI makes it, ids of 64 digits: each container has an init and an exec with an OCI process of
//! about 1 KiB, two shared layers, and a scratch disk while the machine has slots for them.
//! Saving is checks, sealing and the proof that it opens; importing is opening and the same checks.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use dunlin_benches::figures::median;
use dunlin_benches::programs;
use dunlin_wire::compat::{COMPAT_VERSION, Compat, LinkKind, QemuVersion};
use dunlin_wire::ids::{
    ContainerId, Digest, ExecId, GuestPid, IdError, ReservationId, SandboxId, Slot, StdioPort,
};
use dunlin_wire::tree::{
    ContainerRole, ContainerStage, DiskAccess, DiskKind, DiskStage, MountStage, NetworkStage, ProcessStage,
    SandboxOptions, SavedContainer, SavedDisk, SavedEndpoint, SavedLayer, SavedMount, SavedNetwork,
    SavedPlan9, SavedPod, SavedProcess, SavedReservation, SavedScsi, SavedTree, SavedVm, SavedVpci, VmStage,
};

/// How many containers; the limits hold for the last.
const SIZES: [usize; 4] = [32, 64, 128, 256];
/// Save and import of the last, milliseconds.
const TIME_LIMIT: f64 = 10.0;
/// Bytes of a container besides its OCI process objects.
const BYTES_LIMIT: usize = 1024;
/// Layer images, shared by all containers.
const LAYERS: u32 = 2;
/// First id of each kind, so that none stands twice.
const FIRST_PORT: u32 = 0x4000_0001;
const FIRST_PID: u32 = 100;

/// Time and size of a saved state.
#[derive(Debug, Parser)]
struct Arguments {
    /// How often each is saved and imported.
    #[arg(long, env = "DUNLIN_BENCH_ROUNDS", default_value_t = 51, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure(arguments.rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("state: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Medians of one size.
struct Figure {
    containers: usize,
    save: f64,
    import: f64,
    /// The round that other work on the machine disturbed least, both together.
    best: f64,
    /// Sealed, with the OCI process objects.
    bytes: usize,
    /// The OCI process objects.
    spec: usize,
}

fn measure(rounds: u32) -> Result<(), Box<dyn std::error::Error>> {
    let mut figures = Vec::new();
    println!("Saved state, 2 processes a container, medians of {rounds} rounds, ms");
    println!(
        "{:>10}  {:>8}  {:>8}  {:>8}  {:>8}  {:>14}  {:>8}",
        "containers", "save", "import", "both", "best", "us a container", "KiB"
    );
    for containers in SIZES {
        let figure = measure_one(containers, rounds)?;
        let both = figure.save + figure.import;
        println!(
            "{containers:>10}  {:>8.2}  {:>8.2}  {both:>8.2}  {:>8.2}  {:>14.1}  {:>8}",
            figure.save,
            figure.import,
            figure.best,
            both * 1000.0 / as_f64(containers),
            figure.bytes / 1024,
        );
        figures.push(figure);
    }
    let (Some(first), Some(last)) = (figures.first(), figures.last()) else { return Ok(()) };
    let (small, large) = (first.save + first.import, last.save + last.import);
    println!(
        "\n{} containers against {}: {:.1} times the containers, {:.1} times the time",
        last.containers,
        first.containers,
        as_f64(last.containers) / as_f64(first.containers),
        large / small
    );
    // What one more container adds; the machine and the pod themselves are in every size alike.
    let added = (last.bytes - last.spec) - (first.bytes - first.spec);
    let each = added / (last.containers - first.containers);
    println!("a container besides its OCI process objects: {each} bytes");
    println!("limit, {TIME_LIMIT} ms for {} containers: {}", last.containers, verdict(large <= TIME_LIMIT));
    println!("limit, {BYTES_LIMIT} bytes a container: {}", verdict(each <= BYTES_LIMIT));
    println!("\nmachine's load over the last minute: {}", programs::load());
    Ok(())
}

fn verdict(kept: bool) -> &'static str {
    if kept { "kept" } else { "EXCEEDED" }
}

fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

fn measure_one(containers: usize, rounds: u32) -> Result<Figure, Box<dyn std::error::Error>> {
    let tree = tree(containers)?;
    let mut saves = Vec::new();
    let mut imports = Vec::new();
    let (mut best, mut bytes) = (f64::INFINITY, 0);
    for _ in 0..rounds {
        let begun = Instant::now();
        let sealed = black_box(&tree).seal()?;
        saves.push(milliseconds(begun.elapsed()));
        let begun = Instant::now();
        let opened = SavedTree::open(black_box(&sealed))?;
        imports.push(milliseconds(begun.elapsed()));
        best = best.min(saves[saves.len() - 1] + imports[imports.len() - 1]);
        if opened != tree {
            return Err("what was imported is not what was saved".into());
        }
        bytes = sealed.value.len();
    }
    let processes = tree.containers().flat_map(|(_, container)| container.processes());
    let spec = processes.map(|(_, process)| process.oci_process.len()).sum();
    Ok(Figure { containers, save: median(&saves), import: median(&imports), best, bytes, spec })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// 64 hex digits, as containerd's CRI plugin makes them.
fn long_id(kind: u32, number: u32) -> String {
    format!("{kind:08x}{number:08x}").repeat(4)
}

fn reservation(number: u32) -> Result<ReservationId, IdError> {
    ReservationId::new(format!("5f3c9a1e-{:04x}-4b7d-9c2e-{number:012x}", number & 0xffff))
}

/// One pod with this many containers.
fn tree(count: usize) -> Result<SavedTree, IdError> {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let mut scsi = SavedScsi { controllers: 4, disks: BTreeMap::new(), reservations: BTreeMap::new() };
    for layer in 0..LAYERS {
        let digest = Digest::new(format!("sha256:{}", long_id(9, layer)))?;
        let path = format!("/var/lib/dunlin/images/{}.erofs", digest.hex());
        let slot = Slot::try_from(layer)?;
        scsi.disks.insert(slot, disk(slot, path, DiskAccess::ReadOnly { digest }, "erofs"));
    }
    let pod = long_id(1, 0);
    let containers = (0..count).map(|number| container(number, &pod, &mut scsi)).collect::<Result<_, _>>()?;
    let endpoint = SavedEndpoint {
        endpoint_id: "eth0".into(),
        mac: "52:54:00:12:34:56".into(),
        name: "eth0".into(),
        root_port: 0,
        mtu: 1500,
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    let network = SavedNetwork {
        namespace_id: "2ad4d0f2-7d5c-4d8e-8d55-bd5ae15b7d0e".into(),
        policy_based_routing: false,
        namespace_supported: true,
        stage: NetworkStage::Configured,
        endpoints: [("a7c7e9f4-6d53-4fd6-92d2-6c58cf0f9c55".to_owned(), endpoint)].into(),
    };
    let pod = SavedPod {
        pod_id: SandboxId::new(pod.as_str())?,
        guest_pod_id: SandboxId::new(pod)?,
        network: Some(network),
        containers,
    };
    Ok(SavedTree { vm: machine(scsi)?, pods: vec![pod] })
}

fn machine(scsi: SavedScsi) -> Result<SavedVm, IdError> {
    let compat = Compat {
        version: COMPAT_VERSION,
        dunlin: "0.1.0".into(),
        qemu: QemuVersion { major: 7, minor: 2, micro: 22, text: "Debian 1:7.2+dfsg-7".into() },
        machine: "pc-q35-7.2".into(),
        cpu: "Nehalem-v1".into(),
        accelerator: "tcg".into(),
        link: LinkKind::VirtioSerial,
        kernel: Digest::new(format!("sha256:{}", long_id(7, 0)))?,
        initramfs: Digest::new(format!("sha256:{}", long_id(8, 0)))?,
        memory_mib: 512,
        vcpus: 2,
        vm_uuid: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0".into(),
    };
    Ok(SavedVm {
        vm_id: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0".into(),
        stage: VmStage::Running,
        options: SandboxOptions {
            no_writable_file_shares: false,
            scratch_encryption: false,
            policy_based_routing: false,
            architecture: "amd64".into(),
            fully_physically_backed: false,
            confidential: None,
        },
        next_port: StdioPort(u32::MAX),
        bridge_next_id: 1 << 20,
        compat,
        document: br#"{"machine":"pc-q35-7.2","cpu":"Nehalem-v1"}"#.to_vec(),
        scsi,
        vpci: SavedVpci::default(),
        plan9: SavedPlan9::default(),
    })
}

fn disk(slot: Slot, source_path: String, access: DiskAccess, filesystem: &str) -> SavedDisk {
    let writable = access == DiskAccess::Writable;
    let mount = SavedMount {
        guest_path: mount_point(slot),
        read_only: !writable,
        filesystem: filesystem.to_owned(),
        stage: MountStage::Mounted,
        encrypted: false,
        options: Vec::new(),
        ensure_filesystem: false,
        block_device: false,
        ref_count: 1,
    };
    SavedDisk {
        source_path,
        size: 1 << 30,
        access,
        stage: DiskStage::Attached,
        kind: DiskKind::VirtualDisk,
        mounts: [(0, mount)].into(),
    }
}

fn mount_point(slot: Slot) -> String {
    format!("/run/mounts/scsi/{}_{}_0", slot.controller(), slot.lun())
}

fn container(number: u32, pod: &str, scsi: &mut SavedScsi) -> Result<SavedContainer, IdError> {
    let sandbox = number == 0;
    let id = if sandbox { pod.to_owned() } else { long_id(2, number) };
    let mut reserve = |slot: Slot, use_of: u32| {
        let id = reservation(number * (LAYERS + 1) + use_of)?;
        scsi.reservations.insert(id.clone(), SavedReservation { slot, partition: 0 });
        Ok::<_, IdError>(SavedLayer { reservation: id, guest_path: mount_point(slot) })
    };
    let layers = (0..LAYERS).map(|layer| reserve(Slot::try_from(layer)?, layer)).collect::<Result<_, _>>()?;
    // The layers take slots too: the last containers have a read-only root.
    let scratch = match Slot::try_from(LAYERS + number) {
        Ok(slot) => {
            let layer = reserve(slot, LAYERS)?;
            let path = format!("/var/lib/dunlin/scratch/k8s.io/{pod}/{id}.raw");
            scsi.disks.insert(slot, disk(slot, path, DiskAccess::Writable, "ext4"));
            Some(layer)
        }
        Err(_) => None,
    };
    let exec = ExecId::new(long_id(3, number))?;
    Ok(SavedContainer {
        container_id: ContainerId::new(id.as_str())?,
        guest_container_id: ContainerId::new(id.as_str())?,
        role: if sandbox { ContainerRole::Sandbox } else { ContainerRole::Workload },
        stage: ContainerStage::Running,
        paused: false,
        io_retry_timeout: Some(Duration::from_secs(60)),
        layers,
        scratch,
        layers_combined: true,
        rootfs_path: format!("/run/gcs/pods/{pod}/{id}/rootfs"),
        scsi_reservations: BTreeSet::new(),
        plan9_reservations: BTreeSet::new(),
        vpci_devices: BTreeSet::new(),
        copies: [("/etc/hosts".to_owned(), format!("/run/mounts/copies/{id}/0"))].into(),
        disk_volumes: BTreeMap::new(),
        init: process(&id, 2 * number),
        execs: [(exec, process(&id, 2 * number + 1))].into(),
    })
}

fn process(container: &str, number: u32) -> SavedProcess {
    let port = FIRST_PORT + 3 * number;
    SavedProcess {
        stage: ProcessStage::Running(GuestPid(FIRST_PID + number)),
        bundle: format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{container}"),
        oci_process: OCI_PROCESS.into(),
        io_retry_timeout: Some(Duration::from_secs(60)),
        stdin: Some(StdioPort(port)),
        stdout: Some(StdioPort(port + 1)),
        stderr: Some(StdioPort(port + 2)),
        stdin_closed: false,
        terminal: false,
        wait_call_id: u64::from(1 + number),
    }
}

/// As containerd makes it for a container without options.
const OCI_PROCESS: &str = r#"{"user":{"uid":0,"gid":0,"additionalGids":[0,1,2,3,4,6,10,11,20,26,27]},"args":["/bin/sh","-c","while true; do date; sleep 1; done"],"env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","HOSTNAME=web-0","KUBERNETES_SERVICE_PORT=443","KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443"],"cwd":"/","capabilities":{"bounding":["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"],"effective":["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FSETID","CAP_FOWNER","CAP_MKNOD","CAP_NET_RAW","CAP_SETGID","CAP_SETUID","CAP_SETFCAP","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_KILL","CAP_AUDIT_WRITE"]},"rlimits":[{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}],"noNewPrivileges":true}"#;
