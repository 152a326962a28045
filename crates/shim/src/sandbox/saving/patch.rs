//! The meeting of an imported container with the one that this host's containerd made for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dunlin_migration::refusal::{Code, Refusal};
use dunlin_wire::ids::{ContainerId, GuestPid, Slot};
use dunlin_wire::tree::{ContainerRole, SavedEndpoint};

use super::super::create::NewTask;
use super::super::{Inner, Sandbox, bundle};
use crate::boot::directory::StateDirectory;
use crate::container::{DiskRef, INIT};
use crate::controller::Transitions;
use crate::device::scsi::{Keeper, Storage, storage};
use crate::hold::Step;
use crate::network::plan::Contract;
use crate::process::io::Stdio;
use crate::process::{State, fifos};
use crate::rootfs::fetch::Node;
use crate::rootfs::store::Image;
use crate::rootfs::{RootfsError, mounts, scratch};
use crate::sandbox::moving::refusal;

/// What the destination's bundle says of a container.
pub(super) struct Here {
    pub(super) namespace: Option<String>,
    pub(super) nics: BTreeMap<String, SavedEndpoint>,
    pub(super) annotations: std::collections::HashMap<String, String>,
    pub(super) resources: serde_json::Value,
    pub(super) hostname: String,
}

impl Sandbox {
    /// Points an imported container at this host's bundle, stdio and disks. Gives the init's pid.
    pub(in crate::sandbox) async fn patch_container(
        self: &Arc<Self>,
        task: NewTask,
        source: &ContainerId,
    ) -> Result<GuestPid, Refusal> {
        let spec = bundle::spec(&task.bundle).map_err(|error| refusal(&error))?;
        let mut here = Here {
            namespace: self.namespace_of(&spec),
            nics: BTreeMap::new(),
            annotations: bundle::annotations_of(&spec),
            resources: spec["linux"]["resources"].clone(),
            hostname: spec["hostname"].as_str().unwrap_or_default().to_owned(),
        };
        let (layers, scratch_slot, guest_id, copies, disk_volumes, pid) = {
            let inner = self.inner();
            inner.check_patch(&task.id, source.as_str())?;
            let container = inner.container(source.as_str()).map_err(|error| refusal(&error))?;
            let slot = |disk: &DiskRef| {
                inner.scsi.slot(&disk.reservation).map_err(|error| Refusal::invalid(error.to_string()))
            };
            let layers = container.layers.iter().map(slot).collect::<Result<Vec<_>, _>>()?;
            let scratch = container.scratch.as_ref().map(slot).transpose()?;
            let pid = container.init().map_or(0, crate::process::Process::pid);
            (
                layers,
                scratch,
                container.guest_id.clone(),
                container.copies.clone(),
                container.disk_volumes.clone(),
                pid,
            )
        };
        let copies = self.copies_here(&spec, &guest_id, &copies).await?;
        let placed = async {
            self.place_disk_volumes(&spec, &disk_volumes).await?;
            self.place_layers(&task, source, &layers).await?;
            if let Some(slot) = scratch_slot {
                let path = self.arriving_scratch(slot, &guest_id);
                self.place_writable(slot, &path, Keeper::Shim).await?;
            }
            Ok(())
        };
        if let Err(refusal) = placed.await {
            self.unplace_disks(source).await;
            return Err(refusal);
        }
        let annotation = here.annotations.get(Contract::ANNOTATION).cloned();
        let connected = self.connect_imported(source.as_str(), here.namespace.clone(), annotation.as_deref());
        here.nics = match connected.await {
            Ok(nics) => nics,
            Err(refusal) => {
                self.unplace_disks(source).await;
                return Err(refusal);
            }
        };
        let fifos = self.directory.io().join(&guest_id);
        let id = task.id.clone();
        let patched = self.inner().patch(task, source.as_str(), &fifos, here);
        let sandbox_renamed = match patched {
            Ok(renamed) => renamed,
            Err(refusal) => {
                self.wires.leave(&guest_id);
                return Err(refusal);
            }
        };
        for (place, source) in copies {
            self.copies.place(&place, source);
        }
        if sandbox_renamed && id != self.id {
            self.leave_alias(&id)?;
        }
        Ok(GuestPid(pid))
    }

    /// What was made for a container that cannot arrive goes again.
    async fn unplace_disks(&self, source: &ContainerId) {
        let files: Vec<PathBuf> = {
            let mut inner = self.inner();
            let Ok(container) = inner.container(source.as_str()) else { return };
            let scratch = container.scratch.iter().map(|disk| disk.reservation);
            let disks: Vec<_> = scratch.chain(container.disk_volumes.values().cloned()).collect();
            disks.iter().filter_map(|id| inner.scsi.unplace(id)).collect()
        };
        for file in files {
            scratch::remove(&file).await;
            if let Err(error) = scratch::disown(&self.directory.ledger(), &file) {
                tracing::warn!(file = %file.display(), %error, "it stays in the ledger");
            }
        }
    }

    /// Where an imported scratch disk is to be here.
    ///
    /// A copy that arrives on shared storage gets a name that no other host gives; one that is handed over keeps the
    /// name that it has, when it is a name that a shim gives.
    fn arriving_scratch(&self, slot: Slot, guest_id: &str) -> PathBuf {
        let (handed_over, named) = {
            let inner = self.inner();
            let named = inner.scsi.disk(slot).and_then(|disk| disk.named.clone());
            (inner.scsi.tokens().contains_key(&slot), named)
        };
        let path = self.scratch_path(guest_id);
        if handed_over {
            let ours = |name: &String| scratch::is_name(name, guest_id);
            return named.filter(ours).map_or_else(|| path.clone(), |name| path.with_file_name(name));
        }
        let root = path.ancestors().skip(3).find(|root| root.exists());
        match root.map(|root| Storage::of(root, &self.config.disks.shared)) {
            Some(Storage::Shared) => path.with_file_name(scratch::unique_name(guest_id)),
            Some(Storage::Local) | None => path,
        }
    }

    /// The file of a writable disk here: a blank one that is made, for a mirror; or the one that both hosts share,
    /// checked to be it.
    ///
    /// `keeper`: of a file that this host will own once the move has succeeded.
    pub(in crate::sandbox) async fn place_writable(
        &self,
        slot: Slot,
        path: &Path,
        keeper: Keeper,
    ) -> Result<(), Refusal> {
        let (size_bytes, token) = {
            let inner = self.inner();
            let Some(disk) = inner.scsi.disk(slot) else {
                return Err(Refusal::invalid(format!("vm.scsi.disks[{slot}]: it was not imported")));
            };
            // An earlier try got as far as this.
            if disk.path.is_some() {
                return Ok(());
            }
            (disk.size_bytes, inner.scsi.tokens().get(&slot).copied())
        };
        let mut blank = None;
        let keeper = match token {
            None => {
                let made = scratch::create_blank(path, size_bytes).await;
                blank = Some(made.map_err(|error| refusal(&error.into()))?);
                keeper
            }
            Some(token) => {
                let shared = &self.config.disks.shared;
                storage::answer(path, &token, size_bytes, shared)
                    .map_err(|error| Refusal::precondition(format!("disk {slot}: {error}")))?;
                if keeper == Keeper::Shim { Keeper::Lent } else { keeper }
            }
        };
        let storage = Storage::of(path, &self.config.disks.shared);
        let placed = self.inner().scsi.place_writable(slot, path.to_owned(), storage, keeper);
        placed.map_err(|error| Refusal::invalid(error.to_string()))?;
        if let Some(made) = blank {
            scratch::own(&self.directory.ledger(), &made.keep());
        }
        Ok(())
    }

    /// Every layer must be the same bytes here.
    async fn place_layers(
        &self,
        task: &NewTask,
        source: &ContainerId,
        slots: &[Slot],
    ) -> Result<(), Refusal> {
        let here = mounts::layers(&task.rootfs).map_err(|error| refusal(&error.into()))?;
        if here.len() != slots.len() {
            return Err(Refusal::invalid(format!(
                "container {source}: its root file system has {} layers on the source and {} here; use the same image and snapshotter",
                slots.len(),
                here.len()
            )));
        }
        for (layer, slot) in here.iter().zip(slots) {
            self.place_layer(source, layer, *slot).await?;
        }
        Ok(())
    }

    /// In this order: the store has the digest; the local layer gives it; the source has it.
    async fn place_layer(
        &self,
        source: &ContainerId,
        layer: &mounts::Layer,
        slot: Slot,
    ) -> Result<(), Refusal> {
        let failed = |error: RootfsError| refusal(&error.into());
        let wanted = {
            let inner = self.inner();
            let disk = inner.scsi.disk(slot);
            disk.and_then(|disk| Some((disk.digest()?.to_owned(), disk.size_bytes)))
        };
        let Some((digest, size_bytes)) = wanted else {
            let reason = format!("container {source}: its layer is on disk {slot}, which is no image");
            return Err(Refusal::invalid(reason));
        };
        let found = self.store.find(&digest).await.map_err(failed)?;
        let image = match found {
            Some(image) => image,
            None => self.store.image_of(layer).await.map_err(failed)?,
        };
        let image = if image.digest == digest {
            image
        } else {
            match self.fetch_image(&digest, size_bytes).await {
                None => image,
                Some(Ok(fetched)) => fetched,
                Some(Err(error)) => {
                    let here = &image.digest;
                    let reason = format!(
                        "container {source}: disk {slot}: the image here is {here}, the source's is {digest}, and {error}"
                    );
                    return Err(Refusal::precondition(reason));
                }
            }
        };
        self.inner()
            .scsi
            .place_image(slot, image.path, &image.digest)
            .map_err(|error| Refusal::precondition(format!("container {source}: {error}")))
    }

    /// Reads an image from the source. None: nobody offered to bring any.
    pub(in crate::sandbox) async fn fetch_image(
        &self,
        digest: &str,
        size_bytes: u64,
    ) -> Option<Result<Image, RootfsError>> {
        let images = self.inner().imported.as_ref().and_then(|imported| imported.images.clone())?;
        tracing::info!(digest, "an image is read from the source");
        let fetched = async {
            let node = Node::connect(&images.socket, images.session)
                .await
                .map_err(|message| RootfsError::Fetch { digest: digest.to_owned(), message })?;
            self.store.fetch(digest, size_bytes, &node).await
        };
        Some(fetched.await)
    }

    /// The sandbox has another id in this host's containerd than the shim: containers that come later are led here
    /// by it.
    fn leave_alias(&self, id: &str) -> Result<(), Refusal> {
        let alias = StateDirectory::new(&self.config.state_dir, &self.namespace, id);
        let path = alias.path();
        match std::os::unix::fs::symlink(self.directory.path(), path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Refusal::unknown(format!(
                "cannot link {} to the shim's directory: {error}",
                path.display()
            ))),
        }
    }
}

impl Inner {
    /// Whether this container may be patched under this id. Changes nothing.
    fn check_patch(&self, id: &str, source: &str) -> Result<(), Refusal> {
        let Some(container) = self.containers.get(source) else {
            return Err(Refusal::new(Code::NotFound, format!("container {source} was not imported")));
        };
        let mut hold = container.hold;
        hold.enter(Step::Patch, container.what())
            .map_err(|error| Refusal::precondition(error.to_string()))?;
        if id != source && self.containers.contains_key(id) {
            return Err(Refusal::invalid(format!("container {id}: the id is taken in this sandbox")));
        }
        Ok(())
    }

    /// True: the sandbox of a pod has another id here than it had on the source.
    pub(super) fn patch(
        &mut self,
        task: NewTask,
        source: &str,
        io: &std::path::Path,
        here: Here,
    ) -> Result<bool, Refusal> {
        self.check_patch(&task.id, source)?;
        let Some(mut container) = self.containers.remove(source) else {
            return Err(Refusal::new(Code::NotFound, format!("container {source} was not imported")));
        };
        let mut failed = None;
        for (number, (exec_id, process)) in container.processes.iter_mut().enumerate() {
            process.bundle.clone_from(&task.bundle);
            let terminal = process.stdio.terminal;
            if exec_id == INIT {
                process.stdio = Stdio { terminal, ..task.stdio.clone() };
            } else if process.state() != State::Terminated {
                // Nobody on this host has asked for it yet: its streams wait in FIFOs of the shim's own.
                match fifos::make(io, &number.to_string(), process.ports, terminal) {
                    Ok(stdio) => process.stdio = stdio,
                    Err((path, error)) => failed = Some((path, error)),
                }
            }
        }
        if let Some((path, error)) = failed {
            self.containers.insert(source.to_owned(), container);
            return Err(Refusal::unknown(format!("cannot make {}: {error}", path.display())));
        }
        let renamed = container.role == ContainerRole::Sandbox && container.id != task.id;
        let what = container.what();
        // Checked above, under the same lock.
        container.hold.enter(Step::Patch, what).map_err(|error| Refusal::precondition(error.to_string()))?;
        container.id.clone_from(&task.id);
        container.bundle.clone_from(&task.bundle);
        container.annotations = here.annotations.into_iter().collect();
        container.resources = here.resources;
        let (role, pod) = (container.role, container.pod.clone());
        self.containers.insert(task.id.clone(), container);
        if role != ContainerRole::Workload {
            self.patch_pod(&pod, &task.id, here.namespace, here.nics, here.hostname)?;
        }
        Ok(renamed)
    }

    fn patch_pod(
        &mut self,
        old: &str,
        new: &str,
        namespace: Option<String>,
        nics: BTreeMap<String, SavedEndpoint>,
        hostname: String,
    ) -> Result<(), Refusal> {
        let Some(mut pod) = self.pods.remove(old) else { return Ok(()) };
        new.clone_into(&mut pod.id);
        pod.hostname = hostname;
        let what = pod.what();
        let patched = pod.hold.enter(Step::Patch, what).and_then(|()| pod.network.patch(namespace, nics));
        for container in self.containers.values_mut().filter(|container| container.pod == old) {
            new.clone_into(&mut container.pod);
        }
        self.pods.insert(new.to_owned(), pod);
        patched.map_err(|error| Refusal::precondition(error.to_string()))
    }
}
