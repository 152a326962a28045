//! Taking a container out: of a machine that runs on with others, or with the machine itself when it is the last.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::events::task::TaskDelete;
use dunlin_migration::session::TaskCall;
use dunlin_wire::ids::ReservationId;
use protobuf::MessageField;

use super::error::{Code, SandboxError};
use super::{Inner, Machine, Sandbox, exits};
use crate::container::{self, INIT};
use crate::controller::Transitions;
use crate::device::scsi::{Keeper, MirroredUse, Released, Scsi, disk, mount};
use crate::process::{Exit, State};
use crate::rootfs::scratch;
use crate::service::status::timestamp;
use crate::vm::Vm;

impl Sandbox {
    /// Removes an ended (or never started) process; with the init, the container.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
    ) -> Result<(u32, Exit), SandboxError> {
        self.mover.gate(TaskCall::Delete)?;
        if exec_id != INIT {
            return self.delete_exec(id, exec_id);
        }
        let (pid, exit) = {
            let mut inner = self.inner();
            let container = inner.container_mut(id)?;
            let what = container.what();
            let process = container
                .init()
                .ok_or_else(|| SandboxError::NoProcess { id: id.to_owned(), exec_id: String::new() })?;
            let pid = process.pid();
            let exit = match (process.ended(), container.state) {
                (Some(exit), _) => exit,
                // What it ends with is told where it runs now.
                (None, container::State::Away) => Exit { code: 0, at: SystemTime::now() },
                (None, _) => exits::killed(),
            };
            // A container that waits for its move has the state of the source's; here nothing of it runs.
            if container.hold.arriving() {
                container.state = container::State::Deleting;
            } else {
                container.state.enter(container::Op::Delete, what)?;
            }
            (pid, exit)
        };
        self.tear_down(id).await;
        self.publisher.publish(&TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..TaskDelete::default()
        });
        Ok((pid, exit))
    }

    fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), SandboxError> {
        let mut inner = self.inner();
        let away = inner.container(id)?.state == container::State::Away;
        let process = inner.process_mut(id, exec_id)?;
        let pid = process.pid();
        let exit = match (process.state(), process.ended()) {
            (_, Some(exit)) => exit,
            (State::Created, None) => exits::killed(),
            _ if away => Exit { code: 0, at: SystemTime::now() },
            (state, None) => {
                return Err(SandboxError::State { id: id.to_owned(), action: "delete", state: state.name() });
            }
        };
        inner.container_mut(id)?.processes.remove(exec_id);
        Ok((pid, exit))
    }

    /// Takes a container out of everything. It is in the state `Deleting`; whatever fails is logged, and the rest
    /// is done all the same.
    pub(super) async fn tear_down(self: &Arc<Self>, id: &str) {
        // A machine that the Sandbox API started outlives its last container.
        let last = !self.api.holds_machine() && self.inner().containers.keys().all(|present| present == id);
        let (shares, devices) = self.inner().ties_of(id);
        let files = self.inner().own_files_of(id);
        let half = self.inner().half_devices_of(id);
        let has_disks = self.inner().container(id).is_ok_and(|container| !container.disk_volumes.is_empty());
        // What is on a volume outlives the machine: the guest is to close its file system.
        if !last || has_disks {
            self.take_out_of_guest(id).await;
        }
        if last {
            // Its disks and its state in the guest go with the machine.
            if let Err(error) = self.stop_machine("its last container was deleted").await {
                tracing::error!(id, %error, "the container is deleted all the same");
            }
        }
        let running = self.inner().running_machine();
        let shares = match &running {
            Some(vm) => self.shares.release(vm.as_ref(), &shares).await,
            None => self.shares.forget(&shares),
        };
        if let Err(error) = shares {
            tracing::warn!(id, %error, "a directory of this host stays shared");
        }
        let devices = match &running {
            Some(vm) => self.devices.release(vm.as_ref(), id, &devices).await,
            None => self.devices.forget(id, &devices),
        };
        if let Err(error) = devices {
            tracing::warn!(id, %error, "a device of this host stays in the machine");
        }
        let (removed, pods) = {
            let mut inner = self.inner();
            let removed = inner.containers.remove(id);
            let pods = inner.drop_empty_pods();
            if last {
                inner.scsi = Scsi::default();
            }
            (removed, pods)
        };
        self.disconnect_pods(running.as_ref(), &pods).await;
        if let Some(container) = removed {
            self.copies.forget(&container.guest_id);
        }
        self.note_half_devices(half).await;
        for file in files {
            scratch::remove(&file).await;
            if let Err(error) = scratch::disown(&self.directory.ledger(), &file) {
                tracing::warn!(file = %file.display(), %error, "it stays in the ledger");
            }
        }
    }

    /// In the order that the guest needs: root file system, state, disks.
    async fn take_out_of_guest(&self, id: &str) {
        let (vm, guest_id, rootfs, combined, in_guest, copies, disks) = {
            let inner = self.inner();
            let Ok(container) = inner.container(id) else { return };
            let vm = inner.running_machine();
            let disks: Vec<ReservationId> = container
                .scratch
                .iter()
                .chain(&container.layers)
                .map(|disk| &disk.reservation)
                .chain(container.disk_volumes.values())
                .cloned()
                .collect();
            let guest_id = container.guest_id.clone();
            let rootfs = container.rootfs_path.clone();
            let copies: Vec<String> = container.copies.values().cloned().collect();
            (vm, guest_id, rootfs, container.layers_combined, container.in_guest, copies, disks)
        };
        let gone = async {
            if let Some(vm) = &vm {
                if combined {
                    let separated = vm.separate_layers(&guest_id, &rootfs).await.map_err(Into::into);
                    heard(id, "the root file system stays in the guest", separated)?;
                }
                if in_guest {
                    let deleted = vm.delete_container(&guest_id).await.map_err(Into::into);
                    heard(id, "the container's state stays in the guest", deleted)?;
                }
                let removed = self.copies.remove(vm.as_ref(), &guest_id, copies).await.map_err(Into::into);
                heard(id, "copies of this host's files stay in the guest", removed)?;
            }
            for reservation in disks {
                let released = self.release_disk(vm.as_ref(), &reservation).await;
                heard(id, "a disk stays in the machine", released)?;
            }
            Ok::<(), Silent>(())
        };
        if let Err(Silent) = gone.await {
            tracing::error!(id, "the guest does not answer: what it has of the container stays in it");
        }
    }

    /// One user less of a disk; with the last it leaves the guest and QEMU.
    pub(super) async fn release_disk(
        &self,
        vm: Option<&Arc<Vm>>,
        reservation: &ReservationId,
    ) -> Result<(), SandboxError> {
        let released = self.inner().scsi.release(reservation)?;
        let Released::Last { slot, disk } = released else { return Ok(()) };
        if let Some(vm) = vm
            && disk.state != disk::State::Reserved
        {
            if disk.mount.guest_path.is_empty() {
                debug_assert_ne!(disk.mount.state, mount::State::Mounted, "a mount has its place");
            } else {
                vm.unmount_disk(slot, &disk.mount.guest_path).await?;
            }
            vm.eject_disk(slot).await?;
            self.inner().scsi.ejected(slot);
            vm.detach_disk(slot).await?;
        }
        self.inner().scsi.removed(slot);
        Ok(())
    }
}

/// The guest has let a call's whole time pass: it would let the next one's pass too.
struct Silent;

/// A failed step of a deletion is logged, and the next one taken.
fn heard(id: &str, what: &'static str, step: Result<(), SandboxError>) -> Result<(), Silent> {
    let Err(error) = step else { return Ok(()) };
    tracing::warn!(id, %error, "{what}");
    if error.code() == Code::DeadlineExceeded { Err(Silent) } else { Ok(()) }
}

impl Inner {
    /// The files that go with a container.
    fn own_files_of(&self, id: &str) -> Vec<std::path::PathBuf> {
        let Ok(container) = self.container(id) else { return Vec::new() };
        let scratch = container.scratch.iter().map(|disk| &disk.reservation);
        self.scsi.own_files(scratch.chain(container.disk_volumes.values()))
    }

    /// The devices that a volume of a container was to arrive on; what has arrived is the host's.
    fn half_devices_of(&self, id: &str) -> Vec<MirroredUse> {
        let Ok(container) = self.container(id) else { return Vec::new() };
        let mut devices = self.scsi.mirrored_of(container.disk_volumes.values());
        devices.retain(|volume| volume.keeper == Keeper::Device);
        devices
    }

    /// What ties a container to this host: directories and devices.
    fn ties_of(&self, id: &str) -> (Vec<ReservationId>, Vec<String>) {
        let Ok(container) = self.container(id) else { return (Vec::new(), Vec::new()) };
        let shares = container.plan9_reservations.iter().cloned().collect();
        (shares, container.vpci_devices.iter().cloned().collect())
    }

    fn running_machine(&self) -> Option<Arc<Vm>> {
        match &self.machine {
            Machine::Running(vm) => Some(Arc::clone(vm)),
            _ => None,
        }
    }

    /// A pod goes with its last container. Gives the guest's ids of those that went.
    #[must_use]
    pub(super) fn drop_empty_pods(&mut self) -> Vec<String> {
        let containers = &self.containers;
        let mut gone = Vec::new();
        self.pods.retain(|_, pod| {
            let used = containers.values().any(|container| container.pod == pod.id);
            if !used {
                pod.network.teardown();
                gone.push(pod.guest_id.clone());
            }
            used
        });
        gone
    }
}
