//! A sandbox without a machine, whose controllers go through the transitions that containerd's calls lead them through,
//! and its way to another host.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dunlin_migration::refusal::Refusal;
use dunlin_qemu::{Document, MacAddress, Nic, RootPort};
use dunlin_wire::Any;
use dunlin_wire::compat::{COMPAT_VERSION, Compat, LinkKind, QemuVersion};
use dunlin_wire::ids::{Digest, StdioPort};
use dunlin_wire::sandbox_state::PodState;
use dunlin_wire::tree::{
    ContainerRole, DiskToken, SandboxOptions, SavedEndpoint, SavedTree, SavedVm, VmStage,
};
use serde_json::{Value, json};

use super::super::patch::Here;
use super::super::{ARCHITECTURE, export, import, state};
use crate::boot::directory::StateDirectory;
use crate::config::Config;
use crate::container::{DiskRef, INIT, Op, State};
use crate::controller::Transitions;
use crate::device::scsi::{Content, Disk, Keeper, Storage, mount_point};
use crate::pod::{self, role};
use crate::process::io::{Ports, Stdio};
use crate::process::streams::Streams;
use crate::process::{self, Exit, Process};
use crate::sandbox::create::NewTask;
use crate::sandbox::{Inner, Sandbox};
use crate::service::events::Publisher;
use crate::volume::copy;

const NAMESPACE: &str = "k8s.io";
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
const FIRST_PORT: u32 = 0x4000_0001;
/// Of all pods together: there is a root port for each.
const NICS: u8 = 4;

/// A container to be.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// By number.
    pub(super) layers: Vec<u8>,
    /// On shared storage; none: no writable layer.
    pub(super) scratch: Option<bool>,
    /// Disk volumes, read-only ones by number.
    pub(super) volumes: Vec<Option<u8>>,
    pub(super) copies: usize,
    pub(super) stdio: Stdio,
    /// Its OCI process.
    pub(super) process: Value,
    /// The guest has made it.
    pub(super) made: bool,
}

/// Where a container is to be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Sandbox { network: bool },
    Standalone { network: bool },
    Workload { pod: &'a str },
}

/// Saved: sealed, and beside it what is told of the configuration.
#[derive(Debug)]
pub(super) struct Exported {
    pub(super) config: Any,
    pub(super) state: Vec<PodState>,
}

pub(super) struct World {
    pub(super) sandbox: Arc<Sandbox>,
    /// Where FIFOs are made.
    io: PathBuf,
    ports: u32,
    /// Pids and waits.
    numbers: u32,
    nics: u8,
}

/// Of containerd's FIFOs of a process, those that are wanted.
pub(super) fn stdio(name: &str, wanted: [bool; 3], terminal: bool) -> Stdio {
    let fifo = |at: usize, stream: &str| match wanted[at] && !(terminal && stream == "stderr") {
        true => format!("/run/containerd/fifo/{name}-{stream}"),
        false => String::new(),
    };
    Stdio { stdin: fifo(0, "stdin"), stdout: fifo(1, "stdout"), stderr: fifo(2, "stderr"), terminal }
}

fn digest(kind: char, number: u8) -> String {
    format!("sha256:{}{number:03}", kind.to_string().repeat(61))
}

impl World {
    /// In a runtime. `at`: for its files, of which only FIFOs are made.
    pub(super) fn new(at: &Path, id: &str) -> World {
        let config = Config { state_dir: at.join("run"), ..Config::default() };
        let directory = StateDirectory::new(&config.state_dir, NAMESPACE, id);
        let publisher = Publisher::spawn(NAMESPACE.to_owned(), at.join("nobody").display().to_string());
        let sandbox = Sandbox::new(NAMESPACE.to_owned(), id.to_owned(), config, directory, publisher);
        World { sandbox, io: at.join("io"), ports: FIRST_PORT, numbers: 100, nics: 0 }
    }

    fn ports(&mut self, stdio: &Stdio) -> Ports {
        ports(stdio, || {
            self.ports += 1;
            self.ports - 1
        })
    }

    /// As Create.
    pub(super) fn create(&mut self, id: &str, place: Place<'_>, shape: &Shape) {
        let (annotations, network) = match place {
            Place::Sandbox { network } => (vec![(role::CONTAINER_TYPE, "sandbox")], network),
            Place::Standalone { network } => (Vec::new(), network),
            Place::Workload { pod } => {
                (vec![(role::CONTAINER_TYPE, "container"), (role::SANDBOX_ID, pod)], false)
            }
        };
        let annotations: HashMap<String, String> =
            annotations.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let mut spec = json!({
            "process": shape.process,
            "hostname": format!("{:.20}-host", id),
            "linux": {"resources": {"memory": {"limit": 1 << 20}}},
        });
        if network {
            spec["linux"]["namespaces"] = json!([{"type": "network", "path": format!("/run/netns/{id}")}]);
        }
        let task = self.task(id, shape.stdio.clone());
        self.sandbox.place_new(&task, &spec, &annotations).unwrap();
        let scratch_path = self.sandbox.scratch_path(id);
        let mut inner = self.sandbox.inner();
        if network && self.nics < NICS {
            let nic = nic(self.nics);
            self.nics += 1;
            inner.pods.get_mut(id).unwrap().network.connected([nic].into());
        }
        for layer in &shape.layers {
            let path = self.sandbox.config.data_dir.join(format!("images/{}.erofs", digest('a', *layer)));
            let disk = Disk::image(path, 1 << 20, digest('a', *layer));
            let layer = plug(&mut inner, disk);
            inner.container_mut(id).unwrap().layers.extend(layer);
        }
        if let Some(shared) = shape.scratch {
            let storage = if shared { Storage::Shared } else { Storage::Local };
            let scratch = plug(&mut inner, Disk::writable(scratch_path, 1 << 30, storage, Keeper::Shim));
            let container = inner.container_mut(id).unwrap();
            container.scratch = scratch;
            container.layers_combined = true;
        }
        for (number, volume) in shape.volumes.iter().enumerate() {
            let path = PathBuf::from(format!("/srv/{id}/{number}.raw"));
            let disk = match volume {
                Some(same) => Disk::image(path, 4096, digest('b', *same)).with_filesystem("ext4"),
                None => Disk::writable(path, 8192, Storage::Local, Keeper::Host),
            };
            if let Some(disk) = plug(&mut inner, disk) {
                let volumes = &mut inner.container_mut(id).unwrap().disk_volumes;
                volumes.insert(format!("/data/{number}"), disk.reservation);
            }
        }
        let container = inner.container_mut(id).unwrap();
        for number in 0..shape.copies {
            container.copies.insert(format!("/etc/file-{number}"), copy::place(id, number));
        }
        if !shape.made {
            return;
        }
        container.in_guest = true;
        container.state.enter(Op::Created, id).unwrap();
        let (role, pod) = (container.role, container.pod.clone());
        if role != ContainerRole::Workload {
            inner.pods.get_mut(&pod).unwrap().state.enter(pod::Op::Ready, id).unwrap();
        }
    }

    fn task(&self, id: &str, stdio: Stdio) -> NewTask {
        let bundle = PathBuf::from(format!("{BUNDLES}/{id}"));
        NewTask { id: id.to_owned(), bundle, rootfs: Vec::new(), stdio, checkpoint: String::new() }
    }

    /// As Start. False: it cannot be started now.
    pub(super) fn start(&mut self, id: &str, exec_id: &str) -> bool {
        let stdio = {
            let mut inner = self.sandbox.inner();
            let container = inner.container(id).unwrap();
            let wanted = if exec_id == INIT { State::Created } else { State::Running };
            let ready = container.state == wanted && !container.paused;
            let process = inner.process_mut(id, exec_id).unwrap();
            if !ready || process.begin().is_err() {
                return false;
            }
            process.stdio.clone()
        };
        let ports = self.ports(&stdio);
        self.numbers += 1;
        let mut inner = self.sandbox.inner();
        let process = inner.process_mut(id, exec_id).unwrap();
        process.started(self.numbers, ports, Streams::default()).unwrap();
        process.wait_call_id = self.numbers.into();
        if exec_id == INIT {
            inner.container_mut(id).unwrap().state.enter(Op::Started, id).unwrap();
        }
        true
    }

    /// As Exec. False: nothing can be added to it.
    pub(super) fn exec(&mut self, id: &str, exec_id: &str, stdio: Stdio, spec: Value) -> bool {
        let mut inner = self.sandbox.inner();
        let container = inner.container_mut(id).unwrap();
        if container.state != State::Running || container.processes.contains_key(exec_id) {
            return false;
        }
        let process = Process::new(
            exec_id.to_owned(),
            container.bundle.clone(),
            stdio,
            Some(spec.to_string().into_bytes()),
        );
        container.processes.insert(exec_id.to_owned(), process);
        true
    }

    /// An end that the guest tells, or a kill before the start.
    pub(super) fn exit(&self, id: &str, exec_id: &str, exit: Exit) {
        self.sandbox.report_exit(id, exec_id, exit);
    }

    /// A disk is plugged in and out again: its slot is free.
    pub(super) fn plug_and_unplug(&self) {
        let mut inner = self.sandbox.inner();
        let disk = Disk::writable("/gone".into(), 4096, Storage::Local, Keeper::Host);
        let Some(disk) = plug(&mut inner, disk) else { return };
        let slot = inner.scsi.slot(&disk.reservation).unwrap();
        inner.scsi.release(&disk.reservation).unwrap();
        inner.scsi.ejected(slot);
        inner.scsi.removed(slot);
    }

    /// Every process: container, exec id.
    pub(super) fn processes(&self) -> Vec<(String, String)> {
        let inner = self.sandbox.inner();
        let of = |container: &crate::container::Container| {
            let id = container.id.clone();
            container.processes.keys().map(move |exec| (id.clone(), exec.clone())).collect::<Vec<_>>()
        };
        inner.containers.values().flat_map(of).collect()
    }

    /// Something is half-way.
    pub(super) fn is_busy(&self) -> bool {
        let inner = self.sandbox.inner();
        let starting = |container: &crate::container::Container| {
            container.processes.values().any(|process| process.state() == process::State::Starting)
        };
        inner.containers.values().any(|container| container.state == State::Creating || starting(container))
    }

    pub(super) fn document(&self) -> Document {
        let mut document = Document::new(uuid::Uuid::from_u128(7), 2, 512);
        let inner = self.sandbox.inner();
        let nics = inner.pods.values().flat_map(|pod| pod.network.endpoints().values());
        document.nics = nics
            .map(|nic| Nic {
                mac: MacAddress::new([2, 0, 0, 0, 0, nic.root_port]),
                root_port: RootPort::new(nic.root_port).unwrap(),
            })
            .collect();
        document
    }

    /// As PrepareAndExportSandbox, of a machine that is up.
    pub(super) fn export(&self) -> Result<Exported, Refusal> {
        let document = self.document();
        let mut inner = self.sandbox.inner();
        export::check_all(&inner)?;
        let tokens = inner.scsi.disks().filter(|(_, disk)| disk.is_handed_over());
        let token = |slot: u8| DiskToken { id: [slot; 16], value: [slot; 32] };
        let tokens = tokens.map(|(slot, _)| (slot, token(slot.lun()))).collect();
        inner.scsi.set_tokens(tokens);
        let next = Cell::new(self.ports);
        let set_aside = |stdio: &Stdio| ports(stdio, || next.replace(next.get() + 1));
        let saved = export::controllers(&inner, &self.sandbox.shares, &self.sandbox.devices, &set_aside)?;
        let vm = SavedVm {
            vm_id: document.uuid.to_string(),
            stage: VmStage::Running,
            options: options(),
            next_port: StdioPort(next.get()),
            bridge_next_id: 1 << 20,
            plain_streams: false,
            compat: compat(&document),
            document: serde_json::to_vec(&document).unwrap(),
            scsi: saved.scsi,
            vpci: saved.vpci,
            plan9: saved.plan9,
        };
        let tree = SavedTree { vm, pods: saved.pods };
        let config = tree.seal().map_err(|error| Refusal::unknown(error.to_string()))?;
        let state = inner.pods.values().map(|pod| state::pod(&inner, pod)).collect::<Result<_, _>>()?;
        export::freeze_all(&mut inner)?;
        Ok(Exported { config, state })
    }

    /// As ImportSandbox, on a host like the source's.
    pub(super) fn import(&self, config: &Any) -> Result<(), Refusal> {
        let tree = SavedTree::open(config).map_err(|error| Refusal::invalid(error.to_string()))?;
        let document = import::document(&tree)?;
        let taken = import::controllers(tree, &document)?;
        taken.place(&mut self.sandbox.inner(), &self.sandbox.shares, &self.sandbox.devices)
    }

    /// As Create of each container that was imported from `source`, under the same name, and then the machine's first run.
    pub(super) fn arrive(&mut self, source: &World) {
        let from = source.sandbox.inner();
        let mut inner = self.sandbox.inner();
        for (slot, disk) in from.scsi.disks() {
            let path = disk.path.clone().unwrap();
            match &disk.content {
                Content::Image { digest } => inner.scsi.place_image(slot, path, digest).unwrap(),
                Content::Writable => {
                    inner.scsi.place_writable(slot, path, disk.storage, disk.keeper).unwrap();
                }
            }
        }
        for container in from.containers.values() {
            let pod = &from.pods[&container.pod];
            let here = Here {
                namespace: Some("/run/netns/here".to_owned()),
                nics: pod.network.endpoints().clone(),
                annotations: container.annotations.clone().into_iter().collect(),
                resources: container.resources.clone(),
                hostname: pod.hostname.clone(),
            };
            let stdio = container.init().unwrap().stdio.clone();
            let io = self.io.join(&container.guest_id);
            inner.patch(self.task(&container.id, stdio), &container.id, &io, here).unwrap();
        }
        let rebound: BTreeMap<_, _> = inner.free_arrived().into_iter().collect();
        assert!(rebound.values().all(BTreeMap::is_empty), "{rebound:?}");
        drop(inner);
        self.sandbox.free_ties();
        self.ports = source.ports;
    }

    /// Nobody's part in a move is any but this.
    pub(super) fn holds(&self) -> BTreeSet<String> {
        let inner = self.sandbox.inner();
        let pods = inner.pods.values().flat_map(|pod| [pod.hold, pod.network.hold]);
        let containers = inner.containers.values().map(|container| container.hold);
        let all = pods.chain(containers).chain([inner.scsi.hold]);
        all.map(|hold| hold.name().to_owned()).collect()
    }
}

fn ports(stdio: &Stdio, mut next: impl FnMut() -> u32) -> Ports {
    let mut port = |path: &String| (!path.is_empty()).then(&mut next);
    Ports { stdin: port(&stdio.stdin), stdout: port(&stdio.stdout), stderr: port(&stdio.stderr) }
}

/// As `Sandbox::plug`. None: no slot is free.
fn plug(inner: &mut Inner, disk: Disk) -> Option<DiskRef> {
    let (reservation, slot, new) = inner.scsi.reserve(disk).ok()?;
    let guest_path = mount_point(slot);
    if new {
        inner.scsi.attached(slot).unwrap();
        inner.scsi.mounted(slot, guest_path.clone()).unwrap();
    }
    Some(DiskRef { reservation, guest_path })
}

fn nic(number: u8) -> (String, SavedEndpoint) {
    let endpoint = SavedEndpoint {
        endpoint_id: "eth0".to_owned(),
        mac: MacAddress::new([2, 0, 0, 0, 0, number]).to_string(),
        name: "eth0".to_owned(),
        root_port: number,
        mtu: 1500,
        addresses: vec!["10.1.2.3/24".parse().unwrap()],
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    (uuid::Uuid::from_u128(number.into()).to_string(), endpoint)
}

fn options() -> SandboxOptions {
    SandboxOptions {
        no_writable_file_shares: false,
        scratch_encryption: false,
        policy_based_routing: false,
        architecture: ARCHITECTURE.to_owned(),
        fully_physically_backed: false,
        confidential: None,
    }
}

fn compat(document: &Document) -> Compat {
    Compat {
        version: COMPAT_VERSION,
        dunlin: env!("CARGO_PKG_VERSION").to_owned(),
        qemu: QemuVersion { major: 7, minor: 2, micro: 22, text: "Debian 1:7.2+dfsg-7".to_owned() },
        machine: document.machine.clone(),
        cpu: document.cpu.clone(),
        accelerator: "tcg".to_owned(),
        link: LinkKind::VirtioSerial,
        kernel: Digest::new(digest('c', 0)).unwrap(),
        initramfs: Digest::new(digest('d', 0)).unwrap(),
        memory_mib: document.memory_mib,
        vcpus: document.vcpus,
        vm_uuid: document.uuid.to_string(),
    }
}
