//! The sandbox's saved state: out on a source, in on a destination, and the meeting of an imported
//! container with the one that this host's containerd made for it.
//!
//! Saving validates everything first and freezes second: a refused export leaves nothing frozen.

mod export;
mod import;
mod patch;
mod scsi;
mod shared;
mod state;
#[cfg(test)]
mod tests;
mod tree;

use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::{Imported as ImportedSet, Saved};
use dunlin_qemu::accel::Accelerator;
use dunlin_qemu::{Channel, Document};
use dunlin_wire::Any;
use dunlin_wire::compat::{self, COMPAT_VERSION, Compat, LinkKind, QemuVersion, Severity};
use dunlin_wire::ids::{Digest, SandboxId, StdioPort};
use dunlin_wire::sandbox_state::SandboxState;
use dunlin_wire::tree::{SandboxOptions, SavedTree, SavedVm, VmStage};

use super::moving::refusal;
use super::{Inner, Machine, Sandbox, bundle};
use crate::vm::{self, Received, Vm, channel, image};

/// Of every machine that Dunlin makes, as containerd writes it.
const ARCHITECTURE: &str = "amd64";

/// Frame ids between what the source has used and what the destination begins with: answers to the
/// source's last requests may still come.
const BRIDGE_ID_GAP: u64 = 1 << 16;

/// What a destination keeps of the import until its machine runs.
#[derive(Debug)]
pub(crate) struct Imported {
    pub(crate) machine: Received,
    /// None: nobody offered to bring images.
    pub(crate) images: Option<ImagesAt>,
}

/// Where images that this host makes differently can be read.
#[derive(Debug, Clone)]
pub(crate) struct ImagesAt {
    /// This host's node.
    pub(crate) socket: std::path::PathBuf,
    /// Of the move.
    pub(crate) session: String,
}

/// What must be alike on both hosts.
pub(crate) async fn compat_of(vm: &Vm, qemu: &std::path::Path) -> Result<Compat, Refusal> {
    let version =
        dunlin_qemu::version::version(qemu).await.map_err(|error| Refusal::unknown(error.to_string()))?;
    compat_from(&vm.document, version, vm.accelerator, &vm.image)
}

impl Sandbox {
    /// Saves every controller and freezes the tables; a refusal leaves nothing frozen.
    pub(super) async fn save(&self) -> Result<Saved, Refusal> {
        let saved = self.save_all().await;
        if saved.is_err() {
            self.free_ties();
            self.clear_tokens();
        }
        saved
    }

    /// The tables of host directories and devices may change again, and copies follow their sources.
    pub(super) fn free_ties(&self) {
        self.copies.resume();
        for (table, resumed) in [("directories", self.shares.resume()), ("devices", self.devices.resume())] {
            if let Err(error) = resumed {
                tracing::error!(table, %error, "a table of this host's stays as it is");
            }
        }
    }

    async fn save_all(&self) -> Result<Saved, Refusal> {
        let vm = self.inner().vm(&self.id).map_err(|error| refusal(&error))?;
        let compat = compat_of(&vm, &self.config.vm.qemu).await?;
        self.check_ties()?;
        self.leave_tokens()?;
        self.copies.freeze().await.map_err(|error| Refusal::precondition(error.to_string()))?;
        let mut inner = self.inner();
        // Everything is asked first: a refused export leaves nothing frozen.
        export::check_all(&inner)?;
        check_plugged(&inner, &vm)?;
        // Before the next free port is told.
        let saved = export::controllers(&inner, &self.shares, &self.devices, &|stdio| vm.set_aside(stdio))?;
        let document = serde_json::to_vec(&vm.present_document())
            .map_err(|error| Refusal::unknown(format!("vm.document: {error}")))?;
        let options = SandboxOptions {
            no_writable_file_shares: self.shares.read_only(),
            scratch_encryption: false,
            policy_based_routing: false,
            architecture: ARCHITECTURE.to_owned(),
            fully_physically_backed: false,
            confidential: None,
        };
        let machine = SavedVm {
            vm_id: vm.document.uuid.to_string(),
            stage: VmStage::Running,
            options: options.clone(),
            next_port: StdioPort(vm.next_port()),
            bridge_next_id: vm.bridge.next_id() + BRIDGE_ID_GAP,
            plain_streams: !vm.resumable(),
            compat,
            document,
            scsi: saved.scsi,
            vpci: saved.vpci,
            plan9: saved.plan9,
        };
        let tree = SavedTree { vm: machine, pods: saved.pods };
        // Sealing asks what an import would.
        let config = tree.seal().map_err(|error| Refusal::unknown(error.to_string()))?;
        let sandbox_state = self.sandbox_state(&inner, &vm, options)?;
        export::freeze_all(&mut inner)?;
        inner.narrow_streams();
        // Of an arrival that is long over.
        inner.losses.clear();
        Ok(Saved {
            config,
            disks: inner.scsi.mirrored().into_iter().collect(),
            sandbox_state: Some(sandbox_state),
        })
    }

    /// Whether every controller can be saved now, without a machine that is asked.
    #[cfg(test)]
    pub(super) fn may_be_saved(&self) -> Result<(), Refusal> {
        export::check_all(&self.inner())
    }

    /// Refused by its name while something ties the sandbox to this host. Changes nothing.
    pub(super) fn check_ties(&self) -> Result<(), Refusal> {
        self.shares.check_migratable().map_err(|tie| Refusal::precondition(tie.to_string()))?;
        self.devices.check_migratable().map_err(|tie| Refusal::precondition(tie.to_string()))
    }

    fn sandbox_state(&self, inner: &Inner, vm: &Vm, options: SandboxOptions) -> Result<Any, Refusal> {
        let pods = inner.pods.values().map(|pod| state::pod(inner, pod)).collect::<Result<Vec<_>, _>>()?;
        // CRI may have renamed it on the way here; the guest has not.
        let own = inner.pods.values().find(|pod| pod.guest_id == self.id);
        let own = own.and_then(|pod| inner.containers.get(&pod.id));
        let annotations = match own {
            Some(container) => container.annotations.clone(),
            None => self.api.annotations(),
        };
        let state = SandboxState {
            namespace: self.namespace.clone(),
            sandbox_id: SandboxId::new(self.id.clone())?,
            runtime: bundle::RUNTIME.to_owned(),
            options,
            annotations,
            memory_mib: vm.document.memory_mib,
            vcpus: vm.document.vcpus,
            machine: vm.document.machine.clone(),
            cpu: vm.document.cpu.clone(),
            scratch_mib: self.config.disks.scratch_mib,
            pods,
        };
        state.seal().map_err(|error| Refusal::unknown(format!("sandbox_state: {error}")))
    }

    /// Takes a saved sandbox in, all or nothing.
    pub(super) async fn import(
        &self,
        config: &Any,
        images: Option<ImagesAt>,
    ) -> Result<ImportedSet, Refusal> {
        let tree = SavedTree::open(config).map_err(|error| Refusal::invalid(error.to_string()))?;
        let document = import::document(&tree)?;
        self.check_compat(&tree.vm.compat, &document).await?;
        let taken = import::controllers(tree, &document)?;
        let set = taken.set();
        let machine = taken.machine(document);
        let mut inner = self.inner();
        if !inner.containers.is_empty() {
            return Err(Refusal::precondition(
                "this shim has a sandbox already; import into a shim that was just started",
            ));
        }
        inner
            .set_machine(vm::state::Op::Import, Machine::Imported)
            .map_err(|error| Refusal::precondition(error.to_string()))?;
        taken.place(&mut inner, &self.shares, &self.devices)?;
        inner.imported = Some(Imported { machine, images });
        Ok(set)
    }

    async fn check_compat(&self, source: &Compat, document: &Document) -> Result<(), Refusal> {
        let qemu = &self.config.vm.qemu;
        let unknown = |error: String| Refusal::precondition(error);
        let version =
            dunlin_qemu::version::version(qemu).await.map_err(|error| unknown(error.to_string()))?;
        let image = image::read(&self.config.guest).await.map_err(|error| unknown(error.to_string()))?;
        let accelerator = Vm::accelerator(&self.config).await.map_err(|error| unknown(error.to_string()))?;
        if !dunlin_qemu::version::machine_supported(qemu, &document.machine)
            .await
            .map_err(|error| unknown(error.to_string()))?
        {
            return Err(Refusal::precondition(format!(
                "vm.document.machine: {} is not known to this host's QEMU {}; install the source's QEMU version here",
                document.machine, version.text
            )));
        }
        let mut here = compat_from(document, version, accelerator, &image)?;
        // Every host has virtio-serial; vsock is there or not.
        if document.channel == Channel::Vsock && !channel::has_vsock() {
            here.link = LinkKind::VirtioSerial;
        }
        let mismatches = compat::check(source, &here);
        for mismatch in &mismatches {
            tracing::warn!(%mismatch, "the hosts differ");
        }
        let refused: Vec<String> = mismatches
            .iter()
            .filter(|mismatch| mismatch.severity == Severity::Refuse)
            .map(ToString::to_string)
            .collect();
        if refused.is_empty() { Ok(()) } else { Err(Refusal::precondition(refused.join("; "))) }
    }
}

/// A NIC that the guest did not let go of is nobody's.
fn check_plugged(inner: &Inner, vm: &Vm) -> Result<(), Refusal> {
    let of_pods: usize = inner.pods.values().map(|pod| pod.network.endpoints().len()).sum();
    let plugged = vm.present_document().nics.len();
    if of_pods == plugged {
        return Ok(());
    }
    Err(Refusal::precondition(format!(
        "the machine has {plugged} network cards and its pods have {of_pods}: one that its guest has not let go of is in the \
         way; end the sandbox to be rid of it"
    )))
}

fn compat_from(
    document: &Document,
    version: dunlin_qemu::version::QemuVersion,
    accelerator: Accelerator,
    image: &image::GuestImage,
) -> Result<Compat, Refusal> {
    let version =
        QemuVersion { major: version.major, minor: version.minor, micro: version.micro, text: version.text };
    Ok(Compat {
        version: COMPAT_VERSION,
        dunlin: env!("CARGO_PKG_VERSION").to_owned(),
        qemu: version,
        machine: document.machine.clone(),
        cpu: document.cpu.clone(),
        accelerator: match accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
        .to_owned(),
        link: match document.channel {
            Channel::VirtioSerial => LinkKind::VirtioSerial,
            Channel::Vsock => LinkKind::Vsock,
        },
        kernel: Digest::new(image.kernel_digest.clone())?,
        initramfs: Digest::new(image.initramfs_digest.clone())?,
        memory_mib: document.memory_mib,
        vcpus: document.vcpus,
        vm_uuid: document.uuid.to_string(),
    })
}
