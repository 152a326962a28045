//! The machine's tables: SCSI disks, Plan9 shares, passed-through PCI devices, and who uses them.

use std::collections::{BTreeMap, BTreeSet};

use super::{DiskKind, DiskStage, MountStage, ShareMountStage, ShareStage, VpciStage};
use crate::ids::{Digest, ReservationId, Slot};

/// The disks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SavedScsi {
    /// Controllers, 1 to 4.
    pub controllers: u8,
    /// What is plugged in.
    pub disks: BTreeMap<Slot, SavedDisk>,
    /// Who uses it.
    pub reservations: BTreeMap<ReservationId, SavedReservation>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedDisk {
    /// Where the source keeps it; for people, never opened.
    pub source_path: String,
    /// Size, bytes.
    pub size: u64,
    /// What may be done with it.
    pub access: DiskAccess,
    /// Where it is in its life.
    pub stage: DiskStage,
    /// What it is on the source.
    pub kind: DiskKind,
    /// By partition; 0 is the whole disk.
    pub mounts: BTreeMap<u64, SavedMount>,
}

/// What may be done with a disk, and so how it gets to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskAccess {
    /// Never changes: the destination must have the same bytes.
    ReadOnly {
        /// Of the image's bytes.
        digest: Digest,
    },
    /// Copied during the move.
    Writable,
    /// On storage that both hosts share: not copied, and never open for writing on both.
    Shared {
        /// Beside the disk's file.
        token: DiskToken,
    },
}

impl DiskAccess {
    /// Whether the guest may write to it.
    pub fn is_writable(&self) -> bool {
        !matches!(self, DiskAccess::ReadOnly { .. })
    }
}

/// How a destination proves that its own path leads to the source's file.
///
/// The source leaves the token in a file beside the disk's; the destination finds it by the name of *its* file, and
/// leaves the answer, which the source reads before anything is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskToken {
    /// In the names of the token and of the answer.
    pub id: [u8; DiskToken::ID_BYTES],
    /// Read there, never sent back.
    pub value: [u8; DiskToken::VALUE_BYTES],
}

impl DiskToken {
    /// Length of the id.
    pub const ID_BYTES: usize = 16;
    /// Length of the value.
    pub const VALUE_BYTES: usize = 32;
}

/// One mount in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMount {
    /// Where; absolute. Empty only while it is reserved.
    pub guest_path: String,
    /// Mounted read-only.
    pub read_only: bool,
    /// As in `erofs`.
    pub filesystem: String,
    /// Where it is in its life.
    pub stage: MountStage,
    /// Encrypted.
    pub encrypted: bool,
    /// As mount(8) takes them.
    pub options: Vec<String>,
    /// Make the file system where there is none.
    pub ensure_filesystem: bool,
    /// `guest_path` is the block device itself; nothing is mounted.
    pub block_device: bool,
    /// How many use it.
    pub ref_count: u32,
}

/// One use of a disk's partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedReservation {
    /// Which disk.
    pub slot: Slot,
    /// 0 is the whole disk.
    pub partition: u64,
}

/// The shares. The default, where nothing was ever shared, has no payload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SavedPlan9 {
    /// No share may be written to.
    pub no_writable_file_shares: bool,
    /// The next share's name: names are decimal numbers and are not used again.
    pub name_counter: u64,
    /// By path on the source's host, absolute; for people, never opened.
    pub shares: BTreeMap<String, SavedShare>,
    /// Who uses which, by its path on the source's host.
    pub reservations: BTreeMap<ReservationId, String>,
}

/// One share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedShare {
    /// A decimal number below the counter.
    pub name: String,
    /// Served read-only.
    pub read_only: bool,
    /// Only `allowed_names` are shown.
    pub restrict: bool,
    /// File names in the share's root.
    pub allowed_names: Vec<String>,
    /// Where it is in its life.
    pub stage: ShareStage,
    /// Its mount in the guest, once one was asked for.
    pub mount: Option<SavedShareMount>,
}

/// A share's mount in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedShareMount {
    /// Mounted read-only.
    pub read_only: bool,
    /// Where it is in its life.
    pub stage: ShareMountStage,
    /// How many use it.
    pub ref_count: u32,
    /// Where; absolute. Empty only while it is reserved.
    pub guest_path: String,
}

/// The passed-through PCI devices. The default, without any, has no payload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SavedVpci {
    /// By the guest's name of the device, a UUID.
    pub devices: BTreeMap<String, SavedVpciDevice>,
}

/// One passed-through device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedVpciDevice {
    /// The device on the source's host.
    pub instance_id: String,
    /// Which of its virtual functions.
    pub virtual_function_index: u32,
    /// Where it is in its life.
    pub stage: VpciStage,
    /// How many use it.
    pub ref_count: u32,
}

impl SavedScsi {
    /// Where a reserved partition is mounted. None: it is not, or nothing is known of it.
    pub fn mount_path(&self, reservation: &ReservationId) -> Option<&str> {
        let reservation = self.reservations.get(reservation)?;
        let mount = self.disks.get(&reservation.slot)?.mounts.get(&reservation.partition)?;
        Some(mount.guest_path.as_str()).filter(|path| !path.is_empty())
    }

    /// The slots of the disks whose contents are copied.
    pub fn mirrored_slots(&self) -> BTreeSet<Slot> {
        let disks = self.disks.iter();
        disks.filter(|(_, disk)| disk.access == DiskAccess::Writable).map(|(slot, _)| *slot).collect()
    }
}
