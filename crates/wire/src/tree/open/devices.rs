//! The machine's tables.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::super::{
    ALLOWED_NAMES_MAX, DEVICES_MAX, DiskAccess, DiskToken, MOUNT_OPTIONS_MAX, MOUNTS_MAX, MountStage,
    RESERVATIONS_MAX, SHARES_MAX, SavedDisk, SavedMount, SavedPlan9, SavedReservation, SavedScsi, SavedShare,
    SavedShareMount, SavedVpci, SavedVpciDevice, ShareMountStage, TreeError,
};
use super::shape::{
    absolute, contradiction, directory, file_name, known, label, limit, mount_path, shown, uuid,
};
use crate::Any;
use crate::envelope::open;
use crate::ids::{CONTROLLERS, Digest, ReservationId, Slot};
use crate::saved;

pub(super) fn scsi(any: &Any, place: &str) -> Result<SavedScsi, TreeError> {
    let message: saved::Scsi = open(any, place)?;
    let controllers = u8::try_from(message.num_controllers).ok().filter(|n| (1..=CONTROLLERS).contains(n));
    let controllers = controllers.ok_or_else(|| {
        let reason =
            format!("{} controllers, where a machine has 1 to {CONTROLLERS}", message.num_controllers);
        contradiction(&format!("{place}.num_controllers"), reason)
    })?;
    limit(&format!("{place}.reservations"), message.reservations.len(), RESERVATIONS_MAX)?;
    let directories = message.directories.into_iter().enumerate();
    let directories: Vec<String> = directories
        .map(|(at, path)| directory(path, &format!("{place}.directories[{at}]")))
        .collect::<Result<_, _>>()?;
    let mut disks = BTreeMap::new();
    for (number, disk) in message.disks {
        let at = format!("{place}.disks[{number}]");
        let slot = Slot::try_from(number).map_err(|error| error.of(&at))?;
        disks.insert(slot, self::disk(disk, &directories, &at)?);
    }
    let mut reservations = BTreeMap::new();
    for (at, reservation) in message.reservations.into_iter().enumerate() {
        let at = format!("{place}.reservations[{at}]");
        let slot = Slot::try_from(reservation.slot).map_err(|error| error.of(&format!("{at}.slot")))?;
        let saved = SavedReservation { slot, partition: reservation.partition };
        reserve(&mut reservations, &reservation.reservation_id, saved, place, &at)?;
    }
    Ok(SavedScsi { controllers, disks, reservations })
}

/// One entry of a table in which no id stands twice.
fn reserve<T>(
    table: &mut BTreeMap<ReservationId, T>,
    id: &[u8],
    of: T,
    place: &str,
    at: &str,
) -> Result<(), TreeError> {
    match table.entry(super::super::uuid::id(id, &format!("{at}.reservation_id"))?) {
        Entry::Vacant(free) => {
            free.insert(of);
            Ok(())
        }
        Entry::Occupied(taken) => Err(TreeError::Twice {
            place: at.to_owned(),
            what: "reservation",
            name: taken.key().to_string(),
            first: format!("{place}.reservations"),
        }),
    }
}

/// Where the source keeps a disk.
fn source_path(message: &saved::Disk, directories: &[String], place: &str) -> Result<String, TreeError> {
    let Some(at) = message.directory.checked_sub(1) else { return Ok(message.source_path.clone()) };
    match usize::try_from(at).ok().and_then(|at| directories.get(at)) {
        Some(directory) => Ok(format!("{directory}/{}", message.source_path)),
        None => {
            let reason = format!("{} is none of the {} directories", message.directory, directories.len());
            Err(contradiction(&format!("{place}.directory"), reason))
        }
    }
}

fn disk(message: saved::Disk, directories: &[String], place: &str) -> Result<SavedDisk, TreeError> {
    let source_path = source_path(&message, directories, place)?;
    let digest_at = format!("{place}.digest");
    let access = match (message.read_only, message.digest.is_empty()) {
        (true, true) => {
            let remedy =
                "a read-only disk is found by its digest: restart the pod, so that its layers get one";
            return Err(TreeError::Missing { place: digest_at, remedy });
        }
        (true, false) => DiskAccess::ReadOnly {
            digest: Digest::new(message.digest).map_err(|error| error.of(&digest_at))?,
        },
        (false, true) => match message.token.as_ref() {
            None => DiskAccess::Writable,
            Some(token) => DiskAccess::Shared { token: self::token(token, &format!("{place}.token"))? },
        },
        (false, false) => {
            return Err(contradiction(&digest_at, "a writable disk has no digest".to_owned()));
        }
    };
    if message.read_only && message.token.is_some() {
        let reason = "a read-only disk is found by its digest, not by a token".to_owned();
        return Err(contradiction(&format!("{place}.token"), reason));
    }
    limit(&format!("{place}.mounts"), message.mounts.len(), MOUNTS_MAX)?;
    let mut mounts = BTreeMap::new();
    for (partition, mount) in message.mounts {
        mounts.insert(partition, self::mount(mount, &format!("{place}.mounts[{partition}]"))?);
    }
    Ok(SavedDisk {
        source_path,
        size: message.size_bytes,
        access,
        stage: known(message.stage, place, "stage")?.into(),
        kind: known(message.kind, place, "kind")?.into(),
        mounts,
    })
}

fn token(message: &saved::Token, place: &str) -> Result<DiskToken, TreeError> {
    let wrong = |name: &str, found: usize, wanted: usize| {
        contradiction(&format!("{place}.{name}"), format!("has {found} bytes, where {wanted} are due"))
    };
    Ok(DiskToken {
        id: message
            .id
            .as_slice()
            .try_into()
            .map_err(|_| wrong("id", message.id.len(), DiskToken::ID_BYTES))?,
        value: message
            .value
            .as_slice()
            .try_into()
            .map_err(|_| wrong("value", message.value.len(), DiskToken::VALUE_BYTES))?,
    })
}

fn mount(message: saved::Mount, place: &str) -> Result<SavedMount, TreeError> {
    let stage = known(message.stage, place, "stage")?.into();
    let reserved = stage == MountStage::Reserved;
    limit(&format!("{place}.options"), message.options.len(), MOUNT_OPTIONS_MAX)?;
    if let Some(at) = message.options.iter().position(|option| option.is_empty() || option.contains('\0')) {
        return Err(contradiction(
            &format!("{place}.options[{at}]"),
            "is empty or holds a zero byte".to_owned(),
        ));
    }
    Ok(SavedMount {
        guest_path: mount_path(message.guest_path, reserved, &format!("{place}.guest_path"))?,
        read_only: message.read_only,
        filesystem: message.filesystem,
        stage,
        encrypted: message.encrypted,
        options: message.options,
        ensure_filesystem: message.ensure_filesystem,
        block_device: message.block_device,
        ref_count: message.ref_count,
    })
}

pub(super) fn plan9(any: &Any, place: &str) -> Result<SavedPlan9, TreeError> {
    let message: saved::Plan9 = open(any, place)?;
    limit(&format!("{place}.shares"), message.shares.len(), SHARES_MAX)?;
    limit(&format!("{place}.reservations"), message.reservations.len(), RESERVATIONS_MAX)?;
    let mut shares = BTreeMap::new();
    for (path, share) in message.shares {
        let at = format!("{place}.shares[{:?}]", shown(&path));
        shares.insert(absolute(path, &at)?, self::share(share, &at)?);
    }
    let mut reservations = BTreeMap::new();
    for (at, reservation) in message.reservations.into_iter().enumerate() {
        let at = format!("{place}.reservations[{at}]");
        reserve(&mut reservations, &reservation.reservation_id, reservation.host_path, place, &at)?;
    }
    Ok(SavedPlan9 {
        no_writable_file_shares: message.no_writable_file_shares,
        name_counter: message.name_counter,
        shares,
        reservations,
    })
}

fn share(message: saved::Share, place: &str) -> Result<SavedShare, TreeError> {
    // One spelling for each number: "+7" and "007" would make two names of one share.
    let number = message.name.parse::<u64>().ok().filter(|number| number.to_string() == message.name);
    if number.is_none() {
        let reason = format!("{:?} is not a plain decimal number", shown(&message.name));
        return Err(contradiction(&format!("{place}.name"), reason));
    }
    limit(&format!("{place}.allowed_names"), message.allowed_names.len(), ALLOWED_NAMES_MAX)?;
    let allowed = message.allowed_names.into_iter().enumerate();
    let mount_at = format!("{place}.mount");
    Ok(SavedShare {
        name: message.name,
        read_only: message.read_only,
        restrict: message.restrict,
        allowed_names: allowed
            .map(|(at, name)| file_name(name, &format!("{place}.allowed_names[{at}]")))
            .collect::<Result<_, _>>()?,
        stage: known(message.stage, place, "stage")?.into(),
        mount: message.mount.into_option().map(|mount| share_mount(mount, &mount_at)).transpose()?,
    })
}

fn share_mount(message: saved::ShareMount, place: &str) -> Result<SavedShareMount, TreeError> {
    let stage = known(message.stage, place, "stage")?.into();
    let reserved = stage == ShareMountStage::Reserved;
    Ok(SavedShareMount {
        read_only: message.read_only,
        stage,
        ref_count: message.ref_count,
        guest_path: mount_path(message.guest_path, reserved, &format!("{place}.guest_path"))?,
    })
}

pub(super) fn vpci(any: &Any, place: &str) -> Result<SavedVpci, TreeError> {
    let message: saved::Vpci = open(any, place)?;
    limit(&format!("{place}.devices"), message.devices.len(), DEVICES_MAX)?;
    let mut devices = BTreeMap::new();
    for (id, device) in message.devices {
        let at = format!("{place}.devices[{}]", shown(&id));
        let id = uuid(id, &at)?;
        let device = SavedVpciDevice {
            instance_id: label(device.instance_id, &format!("{at}.instance_id"))?,
            virtual_function_index: device.virtual_function_index,
            stage: known(device.stage, &at, "stage")?.into(),
            ref_count: device.ref_count,
        };
        devices.insert(id, device);
    }
    Ok(SavedVpci { devices })
}
