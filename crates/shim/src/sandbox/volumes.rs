//! A container's mounts become what they were planned to be: made at its creation, pointed at this host's paths when it
//! arrives, taken away with it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dunlin_bridge::message::{FilesStep, PodDirectory};
use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::{Side, StateId};
use dunlin_wire::ids::{ReservationId, Slot};
use serde_json::Value;

use super::Sandbox;
use super::error::SandboxError;
use crate::device::plan9::Machine as _;
use crate::device::scsi::{Keeper, MirroredUse, Storage};
use crate::rootfs::scratch;
use crate::vm::{Vm, guest};
use crate::volume::copy::{self, Source};
use crate::volume::device::{self, Records, State};
use crate::volume::disk::{self, Use};
use crate::volume::left;
use crate::volume::mount::point_at;
use crate::volume::{Guest, Mount, Planned, Volume, VolumeError, survey};

/// Whose volumes.
pub(super) struct Owner<'a> {
    /// containerd's id.
    pub(super) id: &'a str,
    pub(super) guest_id: &'a str,
    pub(super) guest_pod: &'a str,
}

impl Sandbox {
    /// Makes the volumes of a container that is being created, and points its mounts at them. What was made is noted in the
    /// container as it is made.
    pub(super) async fn make_volumes(
        &self,
        vm: &Arc<Vm>,
        owner: &Owner<'_>,
        mounts: &mut [Value],
        planned: Vec<Planned>,
    ) -> Result<(), SandboxError> {
        let mut whys = BTreeMap::new();
        for planned in &planned {
            let Volume::Share { why } = &planned.volume else { continue };
            let (host, destination) = (planned.mount.source.clone(), planned.mount.destination.clone());
            if !vm.has_9p() {
                return Err(VolumeError::NotShareable { host, destination, why: why.clone() }.into());
            }
            whys.insert(destination, why.to_string());
        }
        for Planned { number, mount, volume } in planned {
            let Some(value) = mounts.get_mut(number) else { continue };
            match volume {
                Volume::Copy(direction) => {
                    let place = copy::place(owner.guest_id, number);
                    self.note_copy(owner.id, &mount.destination, &place)?;
                    let source = Source {
                        container: owner.guest_id.to_owned(),
                        destination: mount.destination,
                        path: PathBuf::from(mount.source),
                        direction,
                    };
                    self.copies.make(vm.as_ref(), &place, source).await?;
                    point_at(value, &copy::tree(&place));
                }
                Volume::EmptyDirectory { name, memory_bytes, mode, uid, gid } => {
                    let place = empty_directory(owner.guest_pod, &name, memory_bytes.is_some());
                    let step = FilesStep::Directory(PodDirectory { mode, uid, gid, memory_bytes });
                    if !vm.takes_files() {
                        return Err(VolumeError::OldGuest.into());
                    }
                    vm.files(&place, step).await?;
                    point_at(value, &place);
                }
                Volume::Disk { filesystem, read_only } => {
                    let wanted = Use { filesystem: Some(filesystem), read_only };
                    point_at(value, &self.make_disk(vm, owner, &mount, wanted).await?);
                }
                Volume::Device { read_only } => {
                    let wanted = Use { filesystem: None, read_only };
                    point_at(value, &self.make_disk(vm, owner, &mount, wanted).await?);
                }
                Volume::Share { .. } | Volume::Guests => {}
            }
        }
        let shares = self.shares.share_mounts(vm.as_ref(), owner.id, mounts, &whys).await?;
        self.inner().container_mut(owner.id)?.plan9_reservations.extend(shares);
        self.copies.follow(vm);
        Ok(())
    }

    /// Gives the disk's place in the guest.
    async fn make_disk(
        &self,
        vm: &Arc<Vm>,
        owner: &Owner<'_>,
        mount: &Mount,
        wanted: Use,
    ) -> Result<String, SandboxError> {
        let disk = disk::open(mount, wanted, &self.config.disks.shared).await?;
        let plugged = self.plug(vm, disk).await?;
        let mut inner = self.inner();
        let volumes = &mut inner.container_mut(owner.id)?.disk_volumes;
        match volumes.insert(mount.destination.clone(), plugged.reservation) {
            None => Ok(plugged.guest_path),
            Some(_) => Err(twice(owner.id, &mount.destination)),
        }
    }

    fn note_copy(&self, id: &str, destination: &str, place: &str) -> Result<(), SandboxError> {
        let mut inner = self.inner();
        let copies = &mut inner.container_mut(id)?.copies;
        if copies.insert(destination.to_owned(), place.to_owned()).is_some() {
            return Err(twice(id, destination));
        }
        Ok(())
    }

    /// Destination: the sources on this host of a container's copies, by their places in the guest. Refused by name when
    /// one cannot be a copy here.
    pub(super) async fn copies_here(
        &self,
        spec: &Value,
        guest_id: &str,
        copies: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, Source)>, Refusal> {
        let of_copies = |mount: &&Value| {
            mount["destination"].as_str().is_some_and(|destination| copies.contains_key(destination))
        };
        let mounts: Vec<Value> =
            spec["mounts"].as_array().into_iter().flatten().filter(of_copies).cloned().collect();
        let planned = survey(&mounts, self.config.volumes.limits()).await.map_err(precondition)?;
        let mut here = Vec::new();
        for (destination, place) in copies {
            let Some(planned) = planned.iter().find(|planned| planned.mount.destination == *destination)
            else {
                let destination = destination.clone();
                return Err(precondition(VolumeError::Another {
                    destination,
                    there: "copy of a host's files",
                }));
            };
            let direction = match &planned.volume {
                Volume::Copy(direction) => *direction,
                Volume::Share { why } => {
                    let (host, destination) = (planned.mount.source.clone(), destination.clone());
                    return Err(precondition(VolumeError::NotCopied { host, destination, why: why.clone() }));
                }
                Volume::Guests
                | Volume::EmptyDirectory { .. }
                | Volume::Disk { .. }
                | Volume::Device { .. } => {
                    let destination = destination.clone();
                    return Err(precondition(VolumeError::Another {
                        destination,
                        there: "copy of a host's files",
                    }));
                }
            };
            let source = Source {
                container: guest_id.to_owned(),
                destination: destination.clone(),
                path: PathBuf::from(&planned.mount.source),
                direction,
            };
            here.push((place.clone(), source));
        }
        Ok(here)
    }

    /// Destination: gives a container's disk volumes their places on this host. Refused by name when one cannot be had here:
    /// nothing that was there before is written over.
    pub(super) async fn place_disk_volumes(
        &self,
        spec: &Value,
        volumes: &BTreeMap<String, ReservationId>,
    ) -> Result<(), Refusal> {
        for (destination, reservation) in volumes {
            let mount = spec["mounts"].as_array().into_iter().flatten().map(Mount::read);
            let mount = mount.into_iter().find(|mount| mount.destination == *destination);
            let Some(mount) = mount.filter(Mount::names_a_source) else {
                let destination = destination.clone();
                return Err(precondition(VolumeError::Another { destination, there: "disk" }));
            };
            let (slot, placed, size_bytes, read_only, token) = {
                let inner = self.inner();
                let slot =
                    inner.scsi.slot(reservation).map_err(|error| Refusal::invalid(error.to_string()))?;
                let Some(disk) = inner.scsi.disk(slot) else {
                    return Err(Refusal::invalid(format!("vm.scsi.disks[{slot}]: it was not imported")));
                };
                let token = inner.scsi.tokens().contains_key(&slot);
                (slot, disk.path.clone(), disk.size_bytes, disk.read_only(), token)
            };
            // An earlier try got as far as this, or another container has it too, which shares the disk.
            if let Some(placed) = placed {
                let names =
                    |path: &Path| placed == path || path.canonicalize().is_ok_and(|path| placed == path);
                if !read_only && !names(Path::new(&mount.source)) {
                    let (there, here) = (placed.display().to_string(), mount.source);
                    let destination = destination.clone();
                    return Err(precondition(VolumeError::TwoPlaces { destination, here, there }));
                }
                continue;
            }
            let (host, path) = (mount.source.clone(), PathBuf::from(&mount.source));
            let destination = destination.clone();
            if read_only {
                self.place_read_only(&mount, slot, size_bytes).await?;
            } else if let Some(device) = device::named(&path).filter(|_| !token) {
                self.place_device(&mount, slot, size_bytes, device).await?;
            } else {
                // A file that is made is the shim's until the move has succeeded: it goes again with a move that fails.
                let keeper = if token { Keeper::Host } else { Keeper::Shim };
                self.place_writable(slot, &path, keeper).await.map_err(|error| {
                    let reason = error.to_string();
                    precondition(VolumeError::NoPlace { host, destination, reason })
                })?;
            }
        }
        Ok(())
    }

    /// A block device that may be written over.
    async fn place_device(
        &self,
        mount: &Mount,
        slot: Slot,
        size_bytes: u64,
        device: PathBuf,
    ) -> Result<(), Refusal> {
        let (host, destination) = (mount.source.clone(), mount.destination.clone());
        let path = device.clone();
        let found = match disk::at_leisure(mount, move || device::look(&path)).await {
            Err(VolumeError::Disk { source, .. }) if source.kind() == ErrorKind::ResourceBusy => {
                return Err(precondition(VolumeError::DeviceInUse { host, destination }));
            }
            found => found.map_err(precondition)?,
        };
        if found.size_bytes != size_bytes {
            let (here, there) = (found.size_bytes, size_bytes);
            return Err(precondition(VolumeError::DeviceSize { host, destination, here, there }));
        }
        let listed = &self.config.volumes.overwrite;
        let overwrite = listed.iter().any(|listed| device::named(listed).as_ref() == Some(&device));
        let volumes = self.inner().scsi.uses_of(slot);
        device::judge(&found, self.left_devices().of(&device).as_ref(), &volumes, overwrite)
            .map_err(|what| precondition(VolumeError::DeviceTaken { host, destination, what }))?;
        let storage = Storage::of(&device, &self.config.disks.shared);
        let placed = self.inner().scsi.place_writable(slot, device, storage, Keeper::Device);
        placed.map_err(|error| Refusal::invalid(error.to_string()))
    }

    fn left_devices(&self) -> Records {
        Records::new(&self.config.data_dir)
    }

    /// In this order: this host's file has the digest; the store has it; the source has it.
    async fn place_read_only(&self, mount: &Mount, slot: Slot, size_bytes: u64) -> Result<(), Refusal> {
        let wanted = self
            .inner()
            .scsi
            .disk(slot)
            .and_then(|disk| disk.digest().map(str::to_owned))
            .unwrap_or_default();
        let other = |reason: String| {
            let (host, destination) = (mount.source.clone(), mount.destination.clone());
            precondition(VolumeError::OtherImage { host, destination, reason })
        };
        let place = |path: PathBuf, digest: &str| {
            self.inner().scsi.place_image(slot, path, digest).map_err(|error| other(error.to_string()))
        };
        let here = disk::digest_of(mount).await;
        if here.as_ref().is_ok_and(|digest| *digest == wanted) {
            return place(PathBuf::from(&mount.source), &wanted);
        }
        let known = self.store.find(&wanted).await.map_err(|error| other(error.to_string()))?;
        let image = match known {
            Some(image) => Some(Ok(image)),
            None => self.fetch_image(&wanted, size_bytes).await,
        };
        match (image, here) {
            (Some(Ok(image)), _) => place(image.path, &image.digest),
            (Some(Err(error)), Ok(here)) => {
                Err(other(format!("its digest is {here} here and {wanted} on the source, and {error}")))
            }
            (Some(Err(error)), Err(missing)) => Err(other(format!("{missing}, and {error}"))),
            (None, Ok(here)) => place(PathBuf::from(&mount.source), &here),
            (None, Err(missing)) => Err(precondition(missing)),
        }
    }
}

impl Sandbox {
    /// Destination, before the machine runs: files that were made for volumes are not this shim's to remove any more.
    pub(super) fn give_volumes_to_host(&self) -> Result<(), Refusal> {
        let files: Vec<PathBuf> = {
            let inner = self.inner();
            let volumes = inner.containers.values().flat_map(|container| container.disk_volumes.values());
            inner.scsi.own_files(volumes)
        };
        for file in files {
            scratch::disown(&self.directory.ledger(), &file).map_err(|error| {
                let file = file.display();
                Refusal::unknown(format!("{file} cannot be taken off this shim's list: {error}; try again"))
            })?;
        }
        for volume in self.mirrored_volumes() {
            if volume.keeper != Keeper::Device {
                continue;
            }
            // What a record says of it is over; one that stays speaks of a state that is no more.
            if let Err(error) = self.left_devices().forget(&volume.path) {
                tracing::warn!(device = %volume.path.display(), %error, "an old record of it stays");
            }
        }
        Ok(())
    }

    /// Source, after its end: what its volumes were is no more the volumes, and says so. Only when the move was complete:
    /// the content may be nowhere else.
    pub(super) async fn leave_volumes(&self) {
        if !matches!(self.mover.standing(), Some((_, StateId::TransferCompleted, Side::Source))) {
            return;
        }
        for MirroredUse { volumes, path, .. } in self.mirrored_volumes() {
            if let Some(device) = device::named(&path) {
                self.note_device(device, volumes, State::Left).await;
                continue;
            }
            let Some(volume) = volumes.into_iter().next() else { continue };
            let file = path.clone();
            match tokio::task::spawn_blocking(move || left::set_aside(&path, &volume)).await {
                Ok(Ok(aside)) => {
                    tracing::info!(file = %file.display(), aside = %aside.display(), "a volume moved away");
                }
                Ok(Err(error)) => {
                    tracing::warn!(file = %file.display(), %error, "it keeps its name, and is in the volume's way back");
                }
                Err(error) => tracing::error!(file = %file.display(), %error, "setting it aside"),
            }
        }
    }

    /// Destination, once the machine runs: what its volumes left here earlier goes, behind the machine's back.
    pub(super) fn clear_left_volumes(&self) {
        for MirroredUse { volumes, path, .. } in self.mirrored_volumes() {
            if device::named(&path).is_some() {
                continue;
            }
            tokio::task::spawn_blocking(move || {
                for volume in volumes {
                    match left::clear(&path, &volume) {
                        Ok(changed) => changed.iter().for_each(|path| {
                            tracing::warn!(path = %path.display(), "it was changed since the volume left it, and stays");
                        }),
                        Err(error) => tracing::warn!(file = %path.display(), %error, "what the volume left stays"),
                    }
                }
            });
        }
    }

    /// Destination, after a failed move and the machine's end: devices that half a copy is on say so.
    pub(super) async fn note_half_devices(&self, devices: Vec<MirroredUse>) {
        for MirroredUse { volumes, path, .. } in devices {
            self.note_device(path, volumes, State::Half).await;
        }
    }

    async fn note_device(&self, device: PathBuf, volumes: Vec<ReservationId>, state: State) {
        let records = self.left_devices();
        let noted = {
            let device = device.clone();
            tokio::task::spawn_blocking(move || records.note(&device, volumes, state)).await
        };
        match noted.unwrap_or_else(|panic| Err(panic.into())) {
            Ok(()) => tracing::info!(device = %device.display(), ?state, "what is on the device is noted"),
            Err(error) => {
                tracing::warn!(device = %device.display(), %error, "a volume that comes will be refused there");
            }
        }
    }

    /// Volumes whose bytes a move copies, with their files here.
    fn mirrored_volumes(&self) -> Vec<MirroredUse> {
        let inner = self.inner();
        let volumes = inner.containers.values().flat_map(|container| container.disk_volumes.values());
        inner.scsi.mirrored_of(volumes)
    }
}

fn precondition(error: VolumeError) -> Refusal {
    Refusal::precondition(error.to_string())
}

fn twice(id: &str, destination: &str) -> SandboxError {
    let message = format!("two mounts are on {destination}; leave out the one below");
    SandboxError::Invalid { id: id.to_owned(), message }
}

/// Where a directory of a pod lies in the guest: by its name, so that every container of the pod finds the same one, also
/// after a move.
fn empty_directory(pod: &str, name: &str, in_memory: bool) -> String {
    if in_memory {
        return format!("/run/mounts/empty-dir/{pod}/{name}");
    }
    // The bundle of the pod's first container lies on its scratch disk.
    format!("{}/empty-dir/{name}", guest::bundle_path(pod, pod))
}
