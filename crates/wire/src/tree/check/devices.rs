//! The machine's tables.

use std::collections::BTreeMap;

use super::super::shape::{self, absolute, file_name, label, limit, mount_path, no_controllers, shown, uuid};
use super::super::{
    ALLOWED_NAMES_MAX, DEVICES_MAX, MOUNT_OPTIONS_MAX, MOUNTS_MAX, MountStage, RESERVATIONS_MAX, SHARES_MAX,
    SavedMount, SavedPlan9, SavedShare, SavedTree, ShareMountStage, TreeError,
};
use super::{Claims, Names, contradiction, dangling};
use crate::envelope::Place;
use crate::ids::CONTROLLERS;

pub(super) fn scsi<'a>(tree: &'a SavedTree, names: &mut Names<'a>) -> Result<(), TreeError> {
    let scsi = &tree.vm.scsi;
    const PLACE: &str = "config.vm.scsi";
    if !(1..=CONTROLLERS).contains(&scsi.controllers) {
        return Err(no_controllers(&PLACE, scsi.controllers.into()));
    }
    limit(&format_args!("{PLACE}.reservations"), scsi.reservations.len(), RESERVATIONS_MAX)?;
    for (slot, disk) in &scsi.disks {
        let place = format_args!("config.vm.scsi.disks[{slot}]");
        if slot.controller() >= scsi.controllers {
            let reason = format!("is on controller {} of {}", slot.controller(), scsi.controllers);
            return Err(contradiction(&place, reason));
        }
        limit(&format_args!("{place}.mounts"), disk.mounts.len(), MOUNTS_MAX)?;
        for (partition, mount) in &disk.mounts {
            self::mount(mount, &format_args!("{place}.mounts[{partition}]"))?;
            if mount.stage != MountStage::Unmounted && !mount.guest_path.is_empty() {
                let at = format_args!("{place}.mounts[{partition}].guest_path");
                names.guest_paths.claim("guest path", &mount.guest_path, &at)?;
            }
        }
    }
    let mut uses = BTreeMap::new();
    for (id, reservation) in &scsi.reservations {
        let place = |id| format!("config.vm.scsi.reservations[{id}]");
        let Some(disk) = scsi.disks.get(&reservation.slot) else {
            return Err(dangling(&place(id), "disk", reservation.slot.to_string()));
        };
        // A read-only image may be shared; a second user of a writable one would destroy it.
        if disk.access.is_writable() {
            let key = (reservation.slot, reservation.partition);
            if let Some(first) = uses.insert(key, id) {
                return Err(TreeError::Twice {
                    place: place(id),
                    what: "the reservation",
                    name: format!("of disk {} partition {}", key.0, key.1),
                    first: place(first),
                });
            }
        }
    }
    Ok(())
}

fn mount(mount: &SavedMount, place: Place<'_>) -> Result<(), TreeError> {
    limit(&format_args!("{place}.options"), mount.options.len(), MOUNT_OPTIONS_MAX)?;
    if let Some(at) = mount.options.iter().position(|option| option.is_empty() || option.contains('\0')) {
        let reason = "is empty or holds a zero byte".to_owned();
        return Err(shape::contradiction(&format_args!("{place}.options[{at}]"), reason));
    }
    mount_path(&mount.guest_path, mount.stage == MountStage::Reserved, &format_args!("{place}.guest_path"))
}

pub(super) fn plan9<'a>(tree: &'a SavedTree, names: &mut Names<'a>) -> Result<(), TreeError> {
    const PLACE: &str = "config.vm.plan9";
    let plan9 = &tree.vm.plan9;
    if *plan9 == SavedPlan9::default() {
        return Ok(());
    }
    limit(&format_args!("{PLACE}.shares"), plan9.shares.len(), SHARES_MAX)?;
    limit(&format_args!("{PLACE}.reservations"), plan9.reservations.len(), RESERVATIONS_MAX)?;
    if plan9.no_writable_file_shares != tree.vm.options.no_writable_file_shares {
        let reason = format!(
            "is {}, and config.vm.options says {}",
            plan9.no_writable_file_shares, tree.vm.options.no_writable_file_shares
        );
        return Err(contradiction(&format_args!("{PLACE}.no_writable_file_shares"), reason));
    }
    let mut shares = Claims::new(names.told);
    for (path, share) in &plan9.shares {
        let place = format_args!("{PLACE}.shares[{:?}]", shown(path));
        absolute(path, &place)?;
        self::share(share, &place)?;
        shares.claim("share name", share.name.as_str(), &place)?;
        if share.name.parse().is_ok_and(|name: u64| name >= plan9.name_counter) {
            let reason =
                format!("share name {} is not below the next free one, {}", share.name, plan9.name_counter);
            return Err(contradiction(&format_args!("{place}.name"), reason));
        }
        if plan9.no_writable_file_shares && !share.read_only {
            let reason = "is writable, where no share may be".to_owned();
            return Err(contradiction(&format_args!("{place}.read_only"), reason));
        }
        if let Some(mount) = &share.mount
            && mount.stage != ShareMountStage::Unmounted
            && !mount.guest_path.is_empty()
        {
            let at = format_args!("{place}.mount.guest_path");
            names.guest_paths.claim("guest path", &mount.guest_path, &at)?;
        }
    }
    for (id, path) in &plan9.reservations {
        if !plan9.shares.contains_key(path) {
            return Err(dangling(&format_args!("{PLACE}.reservations[{id}]"), "share", path));
        }
    }
    Ok(())
}

fn share(share: &SavedShare, place: Place<'_>) -> Result<(), TreeError> {
    // One spelling for each number: "+7" and "007" would make two names of one share.
    if share.name.parse::<u64>().ok().is_none_or(|number| number.to_string() != share.name) {
        let reason = format!("{:?} is not a plain decimal number", shown(&share.name));
        return Err(shape::contradiction(&format_args!("{place}.name"), reason));
    }
    limit(&format_args!("{place}.allowed_names"), share.allowed_names.len(), ALLOWED_NAMES_MAX)?;
    for (at, name) in share.allowed_names.iter().enumerate() {
        file_name(name, &format_args!("{place}.allowed_names[{at}]"))?;
    }
    let Some(mount) = &share.mount else { return Ok(()) };
    let reserved = mount.stage == ShareMountStage::Reserved;
    mount_path(&mount.guest_path, reserved, &format_args!("{place}.mount.guest_path"))
}

pub(super) fn vpci(tree: &SavedTree) -> Result<(), TreeError> {
    limit(&"config.vm.vpci.devices", tree.vm.vpci.devices.len(), DEVICES_MAX)?;
    let mut functions = BTreeMap::new();
    for (id, device) in &tree.vm.vpci.devices {
        let place = format_args!("config.vm.vpci.devices[{}]", shown(id));
        uuid(id, &place)?;
        label(&device.instance_id, &format_args!("{place}.instance_id"))?;
        let key = (device.instance_id.as_str(), device.virtual_function_index);
        if let Some(first) = functions.insert(key, id) {
            return Err(TreeError::Twice {
                place: format!("config.vm.vpci.devices[{id}]"),
                what: "device",
                name: format!("{} function {}", key.0, key.1),
                first: format!("config.vm.vpci.devices[{first}]"),
            });
        }
    }
    Ok(())
}
