//! The disk table's payload, both ways.

use std::collections::BTreeMap;

use dunlin_migration::refusal::Refusal;
use dunlin_wire::ids::{Digest, Slot};
use dunlin_wire::tree::{
    DiskAccess, DiskKind, DiskStage, MountStage, SavedDisk, SavedMount, SavedReservation, SavedScsi,
};

use crate::device::scsi::disk::{self, Content, Disk, Keeper, Storage};
use crate::device::scsi::mount::{self, Mount};
use crate::device::scsi::{CONTROLLERS, Scsi};

/// All four controllers exist, also the empty ones.
pub(super) fn save(scsi: &Scsi) -> Result<SavedScsi, Refusal> {
    let mut users: BTreeMap<Slot, u32> = BTreeMap::new();
    for slot in scsi.reservations().values() {
        *users.entry(*slot).or_default() += 1;
    }
    let mut disks = BTreeMap::new();
    for (slot, disk) in scsi.disks() {
        let access = match &disk.content {
            Content::Image { digest } => DiskAccess::ReadOnly { digest: Digest::new(digest.clone())? },
            Content::Writable => match scsi.tokens().get(&slot) {
                Some(token) => DiskAccess::Shared { token: *token },
                None => DiskAccess::Writable,
            },
        };
        let mount = SavedMount {
            guest_path: disk.mount.guest_path.clone(),
            read_only: disk.read_only(),
            filesystem: disk.filesystem.clone(),
            stage: match disk.mount.state {
                mount::State::Reserved => MountStage::Reserved,
                mount::State::Mounted => MountStage::Mounted,
                mount::State::Unmounted => MountStage::Unmounted,
            },
            encrypted: false,
            options: disk.mount.options.clone(),
            ensure_filesystem: false,
            block_device: disk.mount.block_device,
            ref_count: users.get(&slot).copied().unwrap_or(0),
        };
        let saved = SavedDisk {
            source_path: disk.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            size: disk.size_bytes,
            access,
            stage: match disk.state {
                disk::State::Reserved => DiskStage::Reserved,
                disk::State::Attached => DiskStage::Attached,
                disk::State::Ejected => DiskStage::Ejected,
                disk::State::Detached => DiskStage::Detached,
            },
            kind: kind(disk),
            mounts: BTreeMap::from([(0, mount)]),
        };
        disks.insert(slot, saved);
    }
    let reservations = scsi
        .reservations()
        .iter()
        .map(|(id, slot)| (*id, SavedReservation { slot: *slot, partition: 0 }))
        .collect();
    Ok(SavedScsi { controllers: CONTROLLERS, disks, reservations })
}

fn kind(disk: &Disk) -> DiskKind {
    use std::os::unix::fs::FileTypeExt;
    let meta = disk.path.as_ref().and_then(|path| std::fs::metadata(path).ok());
    if meta.is_some_and(|meta| meta.file_type().is_block_device()) {
        DiskKind::PassThrough
    } else {
        DiskKind::VirtualDisk
    }
}

/// The table, inert: its disks have no files here yet.
pub(super) fn import(saved: &SavedScsi) -> Result<Scsi, Refusal> {
    let mut disks = BTreeMap::new();
    let mut tokens = BTreeMap::new();
    for (slot, disk) in &saved.disks {
        let content = match &disk.access {
            DiskAccess::ReadOnly { digest } => Content::Image { digest: digest.to_string() },
            DiskAccess::Writable => Content::Writable,
            DiskAccess::Shared { token } => {
                tokens.insert(*slot, *token);
                Content::Writable
            }
        };
        if let Some((partition, _)) = disk.mounts.iter().find(|(partition, _)| **partition != 0) {
            return Err(Refusal::invalid(format!(
                "vm.scsi.disks[{slot}].mounts[{partition}]: only whole disks are used here; export again with the same Dunlin version"
            )));
        }
        let mount = disk.mounts.get(&0).map(|mount| Mount {
            state: match mount.stage {
                MountStage::Reserved => mount::State::Reserved,
                MountStage::Mounted => mount::State::Mounted,
                MountStage::Unmounted => mount::State::Unmounted,
            },
            guest_path: mount.guest_path.clone(),
            block_device: mount.block_device,
            options: mount.options.clone(),
        });
        let disk = Disk {
            state: match disk.stage {
                DiskStage::Reserved => disk::State::Reserved,
                DiskStage::Attached => disk::State::Attached,
                DiskStage::Ejected => disk::State::Ejected,
                DiskStage::Detached => disk::State::Detached,
            },
            path: None,
            named: disk.source_path.rsplit('/').next().map(str::to_owned),
            size_bytes: disk.size,
            content,
            filesystem: disk.mounts.get(&0).map(|mount| mount.filesystem.clone()).unwrap_or_default(),
            storage: if tokens.contains_key(slot) { Storage::Shared } else { Storage::Local },
            copied: false,
            // Until it has a file here.
            keeper: Keeper::Host,
            mount: mount.unwrap_or_default(),
        };
        disks.insert(*slot, disk);
    }
    let reservations = saved.reservations.iter().map(|(id, of)| (*id, of.slot)).collect();
    Ok(Scsi::imported(disks, reservations, tokens))
}
