//! The machine's tables.

use super::super::{
    DIRECTORY_MAX, DiskAccess, SavedDisk, SavedMount, SavedPlan9, SavedScsi, SavedShare, SavedShareMount,
    SavedVpci,
};
use crate::Any;
use crate::envelope::{EnvelopeError, try_seal};
use crate::saved;

pub(super) fn scsi(scsi: &SavedScsi) -> Result<Any, EnvelopeError> {
    let mut message = saved::Scsi::new();
    message.num_controllers = scsi.controllers.into();
    for (slot, one) in &scsi.disks {
        message.disks.insert(slot.number(), disk(one, &mut message.directories));
    }
    for (id, reservation) in &scsi.reservations {
        let mut one = saved::Reservation::new();
        one.reservation_id = id.to_bytes();
        one.slot = reservation.slot.number();
        one.partition = reservation.partition;
        message.reservations.push(one);
    }
    try_seal(message, &"config.vm.scsi")
}

fn disk(disk: &SavedDisk, directories: &mut Vec<String>) -> saved::Disk {
    let mut message = saved::Disk::new();
    (message.directory, message.source_path) = place(&disk.source_path, directories);
    message.size_bytes = disk.size;
    match &disk.access {
        DiskAccess::ReadOnly { digest } => {
            message.read_only = true;
            message.digest = digest.to_string();
        }
        DiskAccess::Writable => {}
        DiskAccess::Shared { token } => {
            let mut sealed = saved::Token::new();
            sealed.id = token.id.to_vec();
            sealed.value = token.value.to_vec();
            message.token = Some(sealed).into();
        }
    }
    message.stage = saved::DiskStage::from(disk.stage).into();
    message.kind = saved::DiskKind::from(disk.kind).into();
    message.mounts = disk.mounts.iter().map(|(partition, one)| (*partition, mount(one))).collect();
    message
}

/// A path as its directory's place among `directories` and the rest; 0 and all of it without one.
fn place(path: &str, directories: &mut Vec<String>) -> (u32, String) {
    let split = path.rsplit_once('/').filter(|(directory, _)| (1..=DIRECTORY_MAX).contains(&directory.len()));
    let Some((directory, name)) = split else { return (0, path.to_owned()) };
    let at = directories.iter().position(|known| known == directory).unwrap_or_else(|| {
        directories.push(directory.to_owned());
        directories.len() - 1
    });
    // A machine has fewer disks than that.
    (u32::try_from(at + 1).unwrap_or(0), name.to_owned())
}

fn mount(mount: &SavedMount) -> saved::Mount {
    let mut message = saved::Mount::new();
    message.guest_path.clone_from(&mount.guest_path);
    message.read_only = mount.read_only;
    message.filesystem.clone_from(&mount.filesystem);
    message.stage = saved::MountStage::from(mount.stage).into();
    message.encrypted = mount.encrypted;
    message.options.clone_from(&mount.options);
    message.ensure_filesystem = mount.ensure_filesystem;
    message.block_device = mount.block_device;
    message.ref_count = mount.ref_count;
    message
}

pub(super) fn plan9(plan9: &SavedPlan9) -> Result<Any, EnvelopeError> {
    let mut message = saved::Plan9::new();
    message.no_writable_file_shares = plan9.no_writable_file_shares;
    message.name_counter = plan9.name_counter;
    message.shares = plan9.shares.iter().map(|(path, one)| (path.clone(), share(one))).collect();
    for (id, path) in &plan9.reservations {
        let mut one = saved::ShareReservation::new();
        one.reservation_id = id.to_bytes();
        one.host_path.clone_from(path);
        message.reservations.push(one);
    }
    try_seal(message, &"config.vm.plan9")
}

fn share(share: &SavedShare) -> saved::Share {
    let mut message = saved::Share::new();
    message.name.clone_from(&share.name);
    message.read_only = share.read_only;
    message.restrict = share.restrict;
    message.allowed_names.clone_from(&share.allowed_names);
    message.stage = saved::ShareStage::from(share.stage).into();
    message.mount = share.mount.as_ref().map(share_mount).into();
    message
}

fn share_mount(mount: &SavedShareMount) -> saved::ShareMount {
    let mut message = saved::ShareMount::new();
    message.read_only = mount.read_only;
    message.stage = saved::ShareMountStage::from(mount.stage).into();
    message.ref_count = mount.ref_count;
    message.guest_path.clone_from(&mount.guest_path);
    message
}

pub(super) fn vpci(vpci: &SavedVpci) -> Result<Any, EnvelopeError> {
    let mut message = saved::Vpci::new();
    for (id, device) in &vpci.devices {
        let mut one = saved::VpciDevice::new();
        one.instance_id.clone_from(&device.instance_id);
        one.virtual_function_index = device.virtual_function_index;
        one.stage = saved::VpciStage::from(device.stage).into();
        one.ref_count = device.ref_count;
        message.devices.insert(id.clone(), one);
    }
    try_seal(message, &"config.vm.vpci")
}
