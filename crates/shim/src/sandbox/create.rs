//! Making a container: its place in a pod, the machine with the first one, its disks, its state in the guest.
//!
//! What was made is noted in the container as it is made, so that a failure half-way is undone by the same
//! [`teardown`](super::teardown) that ends a whole one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use dunlin_migration::session::TaskCall;
use dunlin_wire::tree::ContainerRole;
use protobuf::MessageField;
use serde_json::Value;

use super::error::SandboxError;
use super::volumes::Owner;
use super::{Inner, Machine, Sandbox, bundle, guest_spec};
use crate::config::Config;
use crate::container::{Container, DiskRef, INIT, Op, State};
use crate::controller::Transitions;
use crate::device::scsi::{self, Disk, Keeper, Storage};
use crate::device::vpci;
use crate::hold::Hold;
use crate::network::Network;
use crate::pod::{self, Pod, role};
use crate::process::Process;
use crate::process::io::Stdio;
use crate::rootfs::store::Image;
use crate::rootfs::{RootfsError, mounts, scratch};
use crate::vm::{Vm, guest, state};
use crate::volume;

/// containerd's Create, translated.
#[derive(Debug)]
pub(crate) struct NewTask {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio: Stdio,
    pub(crate) checkpoint: String,
}

/// A container that has its place.
pub(super) struct Placed {
    guest_id: String,
    guest_pod: String,
    role: ContainerRole,
}

impl Sandbox {
    /// Creates a container, or takes over one that a migration brought. Gives the init's pid, 0 before
    /// its start.
    pub(crate) async fn create(self: &Arc<Self>, task: NewTask) -> Result<u32, SandboxError> {
        task.stdio.check()?;
        if !task.checkpoint.is_empty() {
            let what = "creating a container from a checkpoint".to_owned();
            return Err(SandboxError::Unsupported { id: task.id, what });
        }
        let spec = bundle::spec(&task.bundle)?;
        let annotations = bundle::annotations_of(&spec);
        if let Some(source) = annotations.get(bundle::SOURCE_ANNOTATION) {
            return self.patch(task, source.clone()).await;
        }
        self.mover.gate(TaskCall::Create)?;
        let config = self.config.clone().with_annotations(&annotations)?;
        let placed = self.place_new(&task, &spec, &annotations)?;
        if self.inner().containers.len() == 1 {
            self.shares.heed(&annotations);
        }
        let id = task.id.clone();
        let event = TaskCreate {
            container_id: task.id.clone(),
            bundle: task.bundle.display().to_string(),
            rootfs: task.rootfs.clone(),
            io: MessageField::some(task_io(&task.stdio)),
            ..TaskCreate::default()
        };
        match self.make(task, spec, config, placed).await {
            Ok(()) => {
                self.publisher.publish(&event);
                Ok(0)
            }
            Err(error) => {
                if let Ok(container) = self.inner().container_mut(&id) {
                    // `Creating` may be deleted.
                    let _ = container.state.enter(Op::Delete, "");
                }
                self.tear_down(&id).await;
                Err(error)
            }
        }
    }

    /// Puts a container that is being created into the table, where it keeps others out.
    pub(super) fn place_new(
        &self,
        task: &NewTask,
        spec: &Value,
        annotations: &HashMap<String, String>,
    ) -> Result<Placed, SandboxError> {
        let invalid = |message: String| SandboxError::Invalid { id: task.id.clone(), message };
        let mut place = role::place(annotations, &task.id).map_err(invalid)?;
        let mut inner = self.inner();
        // A sandbox of the Sandbox API has no container of its own: to the guest each of its containers is a pod.
        if place.role == ContainerRole::Workload
            && place.pod == self.id
            && !inner.pods.contains_key(&place.pod)
            && self.api.holds_machine()
        {
            place = role::Place { role: ContainerRole::Standalone, pod: task.id.clone() };
        }
        if inner.containers.contains_key(&task.id) {
            return Err(SandboxError::ContainerExists { id: task.id.clone() });
        }
        let guest_id = inner.free_guest_id(&task.id);
        let guest_pod = match inner.pods.get(&place.pod) {
            Some(pod) if place.role == ContainerRole::Workload => {
                if pod.state != pod::State::Ready || pod.hold != Hold::Free {
                    return Err(SandboxError::PodNotReady {
                        id: task.id.clone(),
                        pod: place.pod.clone(),
                        state: pod.state.name(),
                    });
                }
                pod.guest_id.clone()
            }
            Some(_) => return Err(SandboxError::ContainerExists { id: place.pod }),
            None if place.role == ContainerRole::Workload => {
                return Err(SandboxError::NoPod { id: task.id.clone(), pod: place.pod });
            }
            None => {
                let mut network = Network::default();
                network.setup(&guest_id, self.namespace_of(spec))?;
                let pod = Pod {
                    id: place.pod.clone(),
                    guest_id: guest_id.clone(),
                    state: pod::State::Making,
                    hold: Hold::Free,
                    hostname: spec["hostname"].as_str().unwrap_or_default().to_owned(),
                    network,
                };
                inner.pods.insert(place.pod.clone(), pod);
                guest_id.clone()
            }
        };
        let init_process = spec.get("process").map(|process| process.to_string().into_bytes());
        let init = Process::new(INIT.to_owned(), task.bundle.clone(), task.stdio.clone(), init_process);
        let container = Container {
            id: task.id.clone(),
            guest_id: guest_id.clone(),
            pod: place.pod,
            role: place.role,
            bundle: task.bundle.clone(),
            state: State::Creating,
            hold: Hold::Free,
            paused: false,
            pausing: 0,
            layers: Vec::new(),
            scratch: None,
            layers_combined: false,
            rootfs_path: guest::rootfs_path(&guest_pod, &guest_id),
            in_guest: false,
            plan9_reservations: BTreeSet::new(),
            vpci_devices: BTreeSet::new(),
            copies: BTreeMap::new(),
            disk_volumes: BTreeMap::new(),
            processes: BTreeMap::from([(INIT.to_owned(), init)]),
            annotations: annotations.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
            resources: spec["linux"]["resources"].clone(),
        };
        inner.containers.insert(task.id.clone(), container);
        Ok(Placed { guest_id, guest_pod, role: place.role })
    }

    async fn make(
        self: &Arc<Self>,
        task: NewTask,
        spec: Value,
        config: Config,
        placed: Placed,
    ) -> Result<(), SandboxError> {
        let id = task.id.as_str();
        let Placed { guest_id, guest_pod, role } = placed;
        let rootfs_path = guest::rootfs_path(&guest_pod, &guest_id);
        let namespace = self.namespace_of(&spec);
        let devices = vpci::devices_of(&spec)?;
        self.devices.check(&devices).await?;
        let mut spec = guest_spec::for_guest(spec, role, &rootfs_path)
            .map_err(|message| SandboxError::Invalid { id: id.to_owned(), message })?;
        // What cannot be had is refused before a machine boots.
        let spec_mounts = spec["mounts"].as_array().map_or(&[][..], Vec::as_slice);
        let volumes = volume::survey(spec_mounts, self.config.volumes.limits()).await?;
        role::for_guest(&mut spec, role, &guest_pod);
        let layers = mounts::layers(&task.rootfs)?;
        let wires = match role {
            ContainerRole::Workload => None,
            ContainerRole::Sandbox | ContainerRole::Standalone => {
                self.connect_pod(&guest_pod, namespace).await?
            }
        };
        // The machine boots while the images are built.
        let (vm, images) = tokio::join!(self.machine(id, &config), self.images(&layers, &guest_id, &config));
        let vm = vm?;
        let (images, scratch_disk, scratch_bytes) = images?;

        for (image, layer) in images.into_iter().zip(&layers) {
            let disk = Disk::image(image.path, image.size_bytes, image.digest);
            let disk = disk.with_filesystem(layer.filesystem());
            let layer = self.plug(&vm, disk).await?;
            self.inner().container_mut(id)?.layers.push(layer);
        }
        let scratch_path = scratch_disk.keep();
        let storage = Storage::of(&scratch_path, &self.config.disks.shared);
        scratch::own(&self.directory.ledger(), &scratch_path);
        let scratch = Disk::writable(scratch_path, scratch_bytes, storage, Keeper::Shim);
        let scratch = self.plug(&vm, scratch).await?;
        let scratch_directory = guest::scratch_path(&scratch.guest_path, &guest_pod, &guest_id);
        let layers: Vec<String> = {
            let mut inner = self.inner();
            let container = inner.container_mut(id)?;
            container.scratch = Some(scratch);
            container.layers_combined = true;
            container.layers.iter().map(|layer| layer.guest_path.clone()).collect()
        };
        vm.combine_layers(&guest_id, &rootfs_path, layers.into_iter(), &scratch_directory).await?;
        if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
            let owner = Owner { id, guest_id: &guest_id, guest_pod: &guest_pod };
            self.make_volumes(&vm, &owner, mounts, volumes).await?;
        }
        let assigned = self.devices.assign(vm.as_ref(), id, &devices).await?;
        vpci::tell_ports(&mut spec, &assigned);
        self.inner().container_mut(id)?.vpci_devices.extend(assigned.into_iter().map(|device| device.id));
        if let Some(wires) = wires {
            self.introduce_nics(&vm, &guest_pod, &wires).await?;
        }
        self.inner().container_mut(id)?.in_guest = true;
        vm.create_container(&guest_pod, &guest_id, spec, &scratch_directory).await?;

        let mut inner = self.inner();
        let container = inner.container_mut(id)?;
        let what = container.what();
        container.state.enter(Op::Created, what)?;
        let pod = container.pod.clone();
        if role != ContainerRole::Workload
            && let Some(pod) = inner.pods.get_mut(&pod)
        {
            let what = pod.what();
            pod.state.enter(pod::Op::Ready, what)?;
        }
        Ok(())
    }

    /// The running machine; the first who asks boots it, the others wait.
    pub(super) async fn machine(
        self: &Arc<Self>,
        id: &str,
        config: &Config,
    ) -> Result<Arc<Vm>, SandboxError> {
        let _turn = self.booting.lock().await;
        let config = &self.machine_config(config)?;
        {
            let mut inner = self.inner();
            let alone = inner.containers.keys().all(|present| present == id);
            match &inner.machine {
                Machine::Absent => {}
                // What ran in it has ended; a sandbox that still has containers is not begun anew under them.
                Machine::Gone { .. } if alone => {}
                _ => return inner.vm(id),
            }
            inner.set_machine(state::Op::Boot, Machine::Starting)?;
        }
        match Vm::boot(config, &self.directory, &self.wires.all()).await {
            Ok(vm) => {
                let running = self.inner().set_machine(state::Op::Up, Machine::Running(Arc::clone(&vm)));
                if let Err(stopped) = running {
                    if let Err(error) = vm.stop().await {
                        tracing::error!(%error, "a machine that nobody wants");
                    }
                    return Err(stopped.into());
                }
                self.watch_machine(&vm);
                Ok(vm)
            }
            Err(error) => {
                let gone = Machine::Gone { reason: format!("it could not be made: {error}") };
                // It may have been stopped meanwhile, which comes to the same.
                let _ = self.inner().set_machine(state::Op::Failed, gone);
                Err(error.into())
            }
        }
    }

    /// The layer images and the empty scratch disk with its bytes.
    async fn images(
        &self,
        layers: &[mounts::Layer],
        guest_id: &str,
        config: &Config,
    ) -> Result<(Vec<Image>, scratch::Blank, u64), RootfsError> {
        let mut images = Vec::new();
        for layer in layers {
            images.push(self.store.image_of(layer).await?);
        }
        let path = self.scratch_path(guest_id);
        let bytes = config.disks.scratch_mib * 1024 * 1024;
        let made = scratch::create(&config.disks.mkfs_ext4, &path, bytes).await?;
        Ok((images, made, bytes))
    }

    /// Reserves a slot, attaches the disk when it is new there, and has the guest mount it.
    pub(super) async fn plug(&self, vm: &Arc<Vm>, disk: Disk) -> Result<DiskRef, SandboxError> {
        let _turn = self.plugging.lock().await;
        let source = disk.source();
        let (reservation, slot, new) = self.inner().scsi.reserve(disk.clone())?;
        let guest_path = scsi::mount_point(slot);
        if new && let Some(source) = source {
            let plugged = async {
                vm.attach_disk(slot, &source).await?;
                self.inner().scsi.attached(slot)?;
                vm.mount_disk(slot, &guest_path, &disk).await?;
                self.inner().scsi.mounted(slot, guest_path.clone())?;
                Ok::<_, SandboxError>(())
            };
            if let Err(error) = plugged.await {
                // Nobody else can have begun to use it.
                if let Err(left) = self.release_disk(Some(vm), &reservation).await {
                    tracing::warn!(%slot, error = %left, "a disk that could not be used stays attached");
                }
                return Err(error);
            }
        }
        Ok(DiskRef { reservation, guest_path })
    }

    /// Reports QEMU's own end, whenever it comes.
    pub(crate) fn watch_machine(self: &Arc<Self>, vm: &Arc<Vm>) {
        let sandbox = Arc::clone(self);
        let vm = Arc::clone(vm);
        tokio::spawn(async move {
            let report = vm.ended().await;
            sandbox.machine_exited(&vm, &report);
        });
    }
}

impl Inner {
    /// The guest keeps a container's first id for ever, so containerd's id of a new one may be taken there.
    fn free_guest_id(&self, id: &str) -> String {
        let taken = |wanted: &str| self.containers.values().any(|container| container.guest_id == wanted);
        let numbered = (2..).map(|number| format!("{id}-{number}"));
        std::iter::once(id.to_owned()).chain(numbered).find(|id| !taken(id)).unwrap_or_default()
    }
}

pub(crate) fn task_io(stdio: &Stdio) -> TaskIO {
    TaskIO {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        ..TaskIO::default()
    }
}
