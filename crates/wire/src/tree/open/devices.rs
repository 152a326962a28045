//! The machine's tables.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::super::shape::{contradiction, directory, known, no_controllers, shown};
use super::super::{
    DiskAccess, DiskToken, SavedDisk, SavedMount, SavedPlan9, SavedReservation, SavedScsi, SavedShare,
    SavedShareMount, SavedVpci, SavedVpciDevice, TreeError,
};
use crate::Any;
use crate::envelope::{Place, open};
use crate::ids::{Digest, ReservationId, Slot};
use crate::saved;

pub(super) fn scsi(any: &Any, place: Place<'_>) -> Result<SavedScsi, TreeError> {
    let message: saved::Scsi = open(any, place)?;
    let controllers = u8::try_from(message.num_controllers);
    let controllers = controllers.map_err(|_| no_controllers(place, message.num_controllers))?;
    let directories = message.directories.into_iter().enumerate();
    let directories: Vec<String> = directories
        .map(|(at, path)| directory(path, &format_args!("{place}.directories[{at}]")))
        .collect::<Result<_, _>>()?;
    let mut disks = BTreeMap::new();
    for (number, disk) in message.disks {
        let at = format_args!("{place}.disks[{number}]");
        let slot = Slot::try_from(number).map_err(|error| error.of(at))?;
        disks.insert(slot, self::disk(disk, &directories, &at)?);
    }
    let mut reservations = BTreeMap::new();
    for (at, reservation) in message.reservations.into_iter().enumerate() {
        let at = format_args!("{place}.reservations[{at}]");
        let slot = Slot::try_from(reservation.slot).map_err(|error| error.of(format_args!("{at}.slot")))?;
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
    place: Place<'_>,
    at: Place<'_>,
) -> Result<(), TreeError> {
    let id = ReservationId::from_bytes(id).map_err(|error| error.of(format_args!("{at}.reservation_id")))?;
    match table.entry(id) {
        Entry::Vacant(free) => {
            free.insert(of);
            Ok(())
        }
        Entry::Occupied(taken) => Err(TreeError::Twice {
            place: at.to_string(),
            what: "reservation",
            name: taken.key().to_string(),
            first: format!("{place}.reservations"),
        }),
    }
}

/// Where the source keeps a disk.
fn source_path(message: &saved::Disk, directories: &[String], place: Place<'_>) -> Result<String, TreeError> {
    let Some(at) = message.directory.checked_sub(1) else { return Ok(message.source_path.clone()) };
    match usize::try_from(at).ok().and_then(|at| directories.get(at)) {
        Some(directory) => Ok(format!("{directory}/{}", message.source_path)),
        None => {
            let reason = format!("{} is none of the {} directories", message.directory, directories.len());
            Err(contradiction(&format_args!("{place}.directory"), reason))
        }
    }
}

fn disk(message: saved::Disk, directories: &[String], place: Place<'_>) -> Result<SavedDisk, TreeError> {
    let source_path = source_path(&message, directories, place)?;
    let digest_at = format_args!("{place}.digest");
    let access = match (message.read_only, message.digest.is_empty()) {
        (true, true) => {
            let remedy =
                "a read-only disk is found by its digest: restart the pod, so that its layers get one";
            return Err(TreeError::Missing { place: digest_at.to_string(), remedy });
        }
        (true, false) => {
            DiskAccess::ReadOnly { digest: Digest::new(message.digest).map_err(|error| error.of(digest_at))? }
        }
        (false, true) => match message.token.as_ref() {
            None => DiskAccess::Writable,
            Some(token) => DiskAccess::Shared { token: self::token(token, &format_args!("{place}.token"))? },
        },
        (false, false) => {
            return Err(contradiction(&digest_at, "a writable disk has no digest".to_owned()));
        }
    };
    if message.read_only && message.token.is_some() {
        let reason = "a read-only disk is found by its digest, not by a token".to_owned();
        return Err(contradiction(&format_args!("{place}.token"), reason));
    }
    let mut mounts = BTreeMap::new();
    for (partition, mount) in message.mounts {
        mounts.insert(partition, self::mount(mount, &format_args!("{place}.mounts[{partition}]"))?);
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

fn token(message: &saved::Token, place: Place<'_>) -> Result<DiskToken, TreeError> {
    let wrong = |name: &str, found: usize, wanted: usize| {
        contradiction(&format_args!("{place}.{name}"), format!("has {found} bytes, where {wanted} are due"))
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

fn mount(message: saved::Mount, place: Place<'_>) -> Result<SavedMount, TreeError> {
    Ok(SavedMount {
        guest_path: message.guest_path,
        read_only: message.read_only,
        filesystem: message.filesystem,
        stage: known(message.stage, place, "stage")?.into(),
        encrypted: message.encrypted,
        options: message.options,
        ensure_filesystem: message.ensure_filesystem,
        block_device: message.block_device,
        ref_count: message.ref_count,
    })
}

pub(super) fn plan9(any: &Any, place: Place<'_>) -> Result<SavedPlan9, TreeError> {
    let message: saved::Plan9 = open(any, place)?;
    let mut shares = BTreeMap::new();
    for (path, share) in message.shares {
        let at = format_args!("{place}.shares[{:?}]", shown(&path));
        let share = self::share(share, &at)?;
        shares.insert(path.clone(), share);
    }
    let mut reservations = BTreeMap::new();
    for (at, reservation) in message.reservations.into_iter().enumerate() {
        let at = format_args!("{place}.reservations[{at}]");
        reserve(&mut reservations, &reservation.reservation_id, reservation.host_path, place, &at)?;
    }
    Ok(SavedPlan9 {
        no_writable_file_shares: message.no_writable_file_shares,
        name_counter: message.name_counter,
        shares,
        reservations,
    })
}

fn share(message: saved::Share, place: Place<'_>) -> Result<SavedShare, TreeError> {
    let mount_at = format_args!("{place}.mount");
    Ok(SavedShare {
        name: message.name,
        read_only: message.read_only,
        restrict: message.restrict,
        allowed_names: message.allowed_names,
        stage: known(message.stage, place, "stage")?.into(),
        mount: message.mount.into_option().map(|mount| share_mount(mount, &mount_at)).transpose()?,
    })
}

fn share_mount(message: saved::ShareMount, place: Place<'_>) -> Result<SavedShareMount, TreeError> {
    Ok(SavedShareMount {
        read_only: message.read_only,
        stage: known(message.stage, place, "stage")?.into(),
        ref_count: message.ref_count,
        guest_path: message.guest_path,
    })
}

pub(super) fn vpci(any: &Any, place: Place<'_>) -> Result<SavedVpci, TreeError> {
    let message: saved::Vpci = open(any, place)?;
    let mut devices = BTreeMap::new();
    for (id, device) in message.devices {
        let at = format_args!("{place}.devices[{}]", shown(&id));
        let device = SavedVpciDevice {
            instance_id: device.instance_id,
            virtual_function_index: device.virtual_function_index,
            stage: known(device.stage, &at, "stage")?.into(),
            ref_count: device.ref_count,
        };
        devices.insert(id.clone(), device);
    }
    Ok(SavedVpci { devices })
}
