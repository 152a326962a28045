//! Within the machine's tables.

use std::collections::BTreeMap;

use super::super::{MountStage, SavedPlan9, SavedTree, ShareMountStage, TreeError};
use super::{Claims, Names, below, contradiction, dangling};

pub(super) fn scsi<'a>(tree: &'a SavedTree, names: &mut Names<'a>) -> Result<(), TreeError> {
    let scsi = &tree.vm.scsi;
    for (slot, disk) in &scsi.disks {
        let place = format!("config.vm.scsi.disks[{slot}]");
        if slot.controller() >= scsi.controllers {
            let reason = format!("is on controller {} of {}", slot.controller(), scsi.controllers);
            return Err(contradiction(&place, reason));
        }
        for (partition, mount) in &disk.mounts {
            if mount.stage != MountStage::Unmounted && !mount.guest_path.is_empty() {
                let at = below(&place, format_args!(".mounts[{partition}].guest_path"));
                names.guest_paths.claim("guest path", &mount.guest_path, &at)?;
            }
        }
    }
    let mut uses = BTreeMap::new();
    for (id, reservation) in &scsi.reservations {
        let place = |id| format!("config.vm.scsi.reservations[{id}]");
        let Some(disk) = scsi.disks.get(&reservation.slot) else {
            return Err(dangling(place(id), "disk", &reservation.slot.to_string()));
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

pub(super) fn plan9<'a>(tree: &'a SavedTree, names: &mut Names<'a>) -> Result<(), TreeError> {
    const PLACE: &str = "config.vm.plan9";
    let plan9 = &tree.vm.plan9;
    if *plan9 == SavedPlan9::default() {
        return Ok(());
    }
    if plan9.no_writable_file_shares != tree.vm.options.no_writable_file_shares {
        let reason = format!(
            "is {}, and config.vm.options says {}",
            plan9.no_writable_file_shares, tree.vm.options.no_writable_file_shares
        );
        return Err(contradiction(&format!("{PLACE}.no_writable_file_shares"), reason));
    }
    let mut shares = Claims::default();
    for (path, share) in &plan9.shares {
        let place = below(PLACE, format_args!(".shares[{path:?}]"));
        shares.claim("share name", share.name.as_str(), &place)?;
        if share.name.parse().is_ok_and(|name: u64| name >= plan9.name_counter) {
            let reason =
                format!("share name {} is not below the next free one, {}", share.name, plan9.name_counter);
            return Err(contradiction(&format!("{place}.name"), reason));
        }
        if plan9.no_writable_file_shares && !share.read_only {
            let reason = "is writable, where no share may be".to_owned();
            return Err(contradiction(&format!("{place}.read_only"), reason));
        }
        if let Some(mount) = &share.mount
            && mount.stage != ShareMountStage::Unmounted
            && !mount.guest_path.is_empty()
        {
            let at = below(&place, format_args!(".mount.guest_path"));
            names.guest_paths.claim("guest path", &mount.guest_path, &at)?;
        }
    }
    for (id, path) in &plan9.reservations {
        if !plan9.shares.contains_key(path) {
            return Err(dangling(format!("{PLACE}.reservations[{id}]"), "share", path));
        }
    }
    Ok(())
}

pub(super) fn vpci(tree: &SavedTree) -> Result<(), TreeError> {
    let mut functions = BTreeMap::new();
    for (id, device) in &tree.vm.vpci.devices {
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
