//! The sandbox's SCSI disks: which disk is at which controller and LUN, and who uses it.
//!
//! Slots never move: the guest knows a disk by controller and LUN, and both hosts number them alike.
//! A read-only image, unless its file goes with one of its users, or a writable file has one slot however many containers
//! use it. A disk's states are [`disk`]'s, its mount's
//! are [`mount`]'s, the table's part in a move is its [`Hold`]: only a free table changes.
//!
//! Invariants: a reservation's slot has a disk; a slot has a disk as long as somebody uses it or it is being taken out.

pub(crate) mod disk;
pub(crate) mod mount;
pub(crate) mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dunlin_qemu::DiskSource;
use dunlin_wire::ids::{ReservationId, Slot};
use dunlin_wire::tree::DiskToken;
use thiserror::Error;

use crate::controller::{NotNow, Transitions};
use crate::hold::{Hold, Step};
pub(crate) use disk::{Content, Disk, Keeper, Storage};

/// SCSI controllers of every machine.
pub(crate) const CONTROLLERS: u8 = 4;

/// The disk table was asked for what it cannot do.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ScsiError {
    #[error("all {0} disk slots of the virtual machine are taken; use an image with fewer layers")]
    Full(usize),
    #[error("the disks cannot change while the sandbox is being migrated; retry when the move has ended")]
    Frozen,
    #[error("disk reservation {0} is not known")]
    Unknown(String),
    #[error(
        "disk {slot}: the image here is {found}, the source's is {expected}; give this host the same layer content (remove and pull the image again) and the same erofs-utils version"
    )]
    Digest { slot: Slot, expected: String, found: String },
    #[error(
        "{path} is disk {slot} of this machine already, {how}; mount it the same way in every container, or take it from one of them"
    )]
    InUse { path: PathBuf, slot: Slot, how: &'static str },
    #[error("disk {0} is not a {1} disk")]
    Kind(Slot, &'static str),
    #[error("disk {0} has no file on this host yet; create every container first")]
    NoFile(Slot),
    #[error(transparent)]
    NotNow(#[from] NotNow),
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Scsi {
    disks: BTreeMap<Slot, Disk>,
    reservations: BTreeMap<ReservationId, Slot>,
    /// Of the shared disks of a move that is under way; see [`storage`].
    tokens: BTreeMap<Slot, DiskToken>,
    pub(crate) hold: Hold,
}

/// Where a disk appears in the guest once it is mounted.
pub(crate) fn mount_point(slot: Slot) -> String {
    format!("/run/mounts/scsi/{}_{}_0", slot.controller(), slot.lun())
}

/// A mirrored disk and who uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MirroredUse {
    /// The same on both hosts, in order.
    pub(crate) volumes: Vec<ReservationId>,
    /// On this host.
    pub(crate) path: PathBuf,
    pub(crate) keeper: Keeper,
}

/// What becomes of a disk when one of its users lets go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Released {
    /// Others use it.
    Kept,
    /// Nobody does: the guest unmounts it, QEMU lets go, then [`Scsi::removed`].
    Last { slot: Slot, disk: Box<Disk> },
}

impl Scsi {
    /// Takes a slot for a disk, or shares the one that holds the same image.
    /// True: the disk is new and is to be attached and mounted.
    pub(crate) fn reserve(&mut self, disk: Disk) -> Result<(ReservationId, Slot, bool), ScsiError> {
        if self.hold != Hold::Free {
            return Err(ScsiError::Frozen);
        }
        let (slot, new) = match self.shared_with(&disk)? {
            Some(slot) => (slot, false),
            None => {
                let free = Slot::all().find(|slot| !self.disks.contains_key(slot));
                let slot = free.ok_or(ScsiError::Full(Slot::all().count()))?;
                self.disks.insert(slot, disk);
                (slot, true)
            }
        };
        let id = ReservationId::random();
        self.reservations.insert(id, slot);
        Ok((id, slot, new))
    }

    /// The slot that has the same image, or the same writable file, which two containers may mount.
    fn shared_with(&self, disk: &Disk) -> Result<Option<Slot>, ScsiError> {
        let mut shared = None;
        for (slot, present) in &self.disks {
            let mounted = present.mount.state == mount::State::Mounted;
            let one_way = present.filesystem == disk.filesystem
                && present.mount.block_device == disk.mount.block_device;
            if disk.read_only() && present.content == disk.content {
                if disk.shareable() && mounted && one_way && shared.is_none() {
                    shared = Some(*slot);
                }
                continue;
            }
            // What is written to changes under everybody who has the file.
            let written = !disk.read_only() || !present.read_only();
            let (true, Some(path)) = (written && present.path == disk.path, &disk.path) else { continue };
            let how = match (present.read_only(), disk.read_only()) {
                (true, _) => "read-only",
                (_, true) => "writable",
                _ if !one_way => "as another file system or as a device",
                // Its state is one of going, for nobody else is making disks meanwhile.
                _ if !mounted => "and is just being taken out",
                _ => {
                    shared = Some(*slot);
                    continue;
                }
            };
            return Err(ScsiError::InUse { path: path.clone(), slot: *slot, how });
        }
        Ok(shared)
    }

    fn disk_mut(&mut self, slot: Slot) -> Result<&mut Disk, ScsiError> {
        self.disks.get_mut(&slot).ok_or(ScsiError::Kind(slot, "known"))
    }

    /// QEMU has it.
    pub(crate) fn attached(&mut self, slot: Slot) -> Result<(), ScsiError> {
        Ok(self.disk_mut(slot)?.state.enter(disk::Op::Attach, format!("disk {slot}"))?)
    }

    /// The guest has it mounted.
    pub(crate) fn mounted(&mut self, slot: Slot, guest_path: String) -> Result<(), ScsiError> {
        let mount = &mut self.disk_mut(slot)?.mount;
        mount.state.enter(mount::Op::Mount, format!("the mount of disk {slot}"))?;
        mount.guest_path = guest_path;
        Ok(())
    }

    /// The guest has unmounted it and let go of it.
    pub(crate) fn ejected(&mut self, slot: Slot) {
        if let Ok(disk) = self.disk_mut(slot) {
            // On the way out every state is a good one to leave.
            let _ = disk.mount.state.enter(mount::Op::Unmount, "");
            let _ = disk.state.enter(disk::Op::Eject, "");
        }
    }

    /// One user less. The last one's disk stays in the table until it is out of the machine.
    pub(crate) fn release(&mut self, id: &ReservationId) -> Result<Released, ScsiError> {
        let slot = self.slot(id)?;
        self.reservations.remove(id);
        if self.reservations.values().any(|used| *used == slot) {
            return Ok(Released::Kept);
        }
        let disk = self.disk_mut(slot)?;
        // Nobody may begin to share it now.
        let _ = disk.mount.state.enter(mount::Op::Unmount, "");
        let disk = Box::new(disk.clone());
        Ok(Released::Last { slot, disk })
    }

    /// The machine does not have it any more.
    pub(crate) fn removed(&mut self, slot: Slot) {
        self.disks.remove(&slot);
    }

    pub(crate) fn slot(&self, id: &ReservationId) -> Result<Slot, ScsiError> {
        self.reservations.get(id).copied().ok_or_else(|| ScsiError::Unknown(id.to_string()))
    }

    pub(crate) fn disks(&self) -> impl Iterator<Item = (Slot, &Disk)> {
        self.disks.iter().map(|(slot, disk)| (*slot, disk))
    }

    pub(crate) fn reservations(&self) -> &BTreeMap<ReservationId, Slot> {
        &self.reservations
    }

    /// Whether the table could be saved now. Changes nothing.
    pub(crate) fn check_save(&self) -> Result<(), ScsiError> {
        for (slot, disk) in &self.disks {
            let (mut state, mut mount) = (disk.state, disk.mount.state);
            state.enter(disk::Op::Save, format!("disk {slot}"))?;
            mount.enter(mount::Op::Save, format!("the mount of disk {slot}"))?;
        }
        let mut hold = self.hold;
        Ok(hold.enter(Step::Save, "the disk table")?)
    }

    /// No change of the table until [`Scsi::resume`]. Both may be repeated.
    pub(crate) fn freeze(&mut self) -> Result<(), ScsiError> {
        Ok(self.hold.enter(Step::Save, "the disk table")?)
    }

    pub(crate) fn resume(&mut self) {
        // Of an import it is patched by its containers, disk by disk.
        self.hold = Hold::Free;
    }

    /// Destination: an imported image is this file here. Refused when its content is another.
    pub(crate) fn place_image(&mut self, slot: Slot, path: PathBuf, found: &str) -> Result<(), ScsiError> {
        let disk = self.disk_mut(slot)?;
        match &disk.content {
            Content::Image { digest } if digest == found => {
                disk.path = Some(path);
                Ok(())
            }
            Content::Image { digest } => {
                Err(ScsiError::Digest { slot, expected: digest.clone(), found: found.to_owned() })
            }
            Content::Writable => Err(ScsiError::Kind(slot, "read-only")),
        }
    }

    /// Destination: an imported writable disk is this file here: a blank one that was just made, or the shared one.
    pub(crate) fn place_writable(
        &mut self,
        slot: Slot,
        path: PathBuf,
        storage: Storage,
        keeper: Keeper,
    ) -> Result<(), ScsiError> {
        let handed_over = self.tokens.contains_key(&slot);
        match self.disks.get_mut(&slot) {
            Some(disk) if !disk.read_only() => {
                disk.path = Some(path);
                disk.storage = storage;
                // A copy that arrives on shared storage is the next move's to hand over.
                disk.copied = !handed_over;
                disk.keeper = keeper;
                Ok(())
            }
            _ => Err(ScsiError::Kind(slot, "writable")),
        }
    }

    /// A disk that an import has given a file here has none again. Gives the file, when it was made for the import.
    /// Not while another container has it too, which may have arrived.
    pub(crate) fn unplace(&mut self, id: &ReservationId) -> Option<PathBuf> {
        let of_others =
            |slot: &Slot| self.reservations.iter().any(|(other, used)| used == slot && other != id);
        if self.reservations.get(id).is_some_and(of_others) {
            return None;
        }
        let disk = self.reservations.get(id).and_then(|slot| self.disks.get_mut(slot))?;
        let path = disk.path.take_if(|_| self.hold == Hold::Imported && disk.content == Content::Writable)?;
        (std::mem::replace(&mut disk.keeper, Keeper::Host) == Keeper::Shim).then_some(path)
    }

    /// A file that was made for a move is the host's once the move has succeeded: a volume outlives its machine.
    pub(crate) fn leave_to_host(&mut self, id: &ReservationId) {
        if let Some(disk) = self.reservations.get(id).and_then(|slot| self.disks.get_mut(slot)) {
            disk.keeper = Keeper::Host;
        }
    }

    /// Of these uses of disks those whose bytes are copied in a move, each disk once.
    pub(crate) fn mirrored_of<'a>(&self, uses: impl Iterator<Item = &'a ReservationId>) -> Vec<MirroredUse> {
        let slots: BTreeSet<Slot> = uses.filter_map(|id| self.reservations.get(id).copied()).collect();
        let mirrored = slots.into_iter().filter_map(|slot| {
            let disk = self.disks.get(&slot).filter(|disk| disk.is_mirrored())?;
            Some(MirroredUse { volumes: self.uses_of(slot), path: disk.path.clone()?, keeper: disk.keeper })
        });
        mirrored.collect()
    }

    /// In order.
    pub(crate) fn uses_of(&self, slot: Slot) -> Vec<ReservationId> {
        self.reservations.iter().filter(|(_, used)| **used == slot).map(|(id, _)| *id).collect()
    }

    pub(crate) fn disk(&self, slot: Slot) -> Option<&Disk> {
        self.disks.get(&slot)
    }

    /// Every disk as QEMU is to open it; refused while one has no file on this host.
    pub(crate) fn placed(&self) -> Result<Vec<(Slot, DiskSource)>, ScsiError> {
        self.disks().map(|(slot, disk)| Ok((slot, disk.source().ok_or(ScsiError::NoFile(slot))?))).collect()
    }

    /// The disks whose bytes are copied in a move: each needs a stream.
    pub(crate) fn mirrored(&self) -> Vec<Slot> {
        self.disks().filter(|(_, disk)| disk.is_mirrored()).map(|(slot, _)| slot).collect()
    }

    /// The tokens of the shared disks: on a source those it left, on a destination those it is to find.
    pub(crate) fn tokens(&self) -> &BTreeMap<Slot, DiskToken> {
        &self.tokens
    }

    pub(crate) fn set_tokens(&mut self, tokens: BTreeMap<Slot, DiskToken>) {
        self.tokens = tokens;
    }

    /// The files that go with these uses of disks: the shim made them, and no other host has them.
    pub(crate) fn own_files<'a>(&self, uses: impl Iterator<Item = &'a ReservationId>) -> Vec<PathBuf> {
        uses.filter_map(|id| {
            let disk = self.disks.get(self.reservations.get(id)?)?;
            (disk.content == Content::Writable && disk.keeper == Keeper::Shim).then(|| disk.path.clone())?
        })
        .collect()
    }

    /// Whether the shared disks are copied all the same in the next move.
    pub(crate) fn copy_shared(&mut self, copy: bool) {
        for disk in self.disks.values_mut() {
            disk.copied = copy;
        }
    }

    /// Before a transfer: the shared files may be the other host's at its end. Gives those that were this shim's.
    pub(crate) fn lend(&mut self) -> Vec<PathBuf> {
        self.hand(Keeper::Shim, Keeper::Lent)
    }

    /// The move is decided, and the shared files are this host's. Gives those that are this shim's.
    pub(crate) fn take_back(&mut self) -> Vec<PathBuf> {
        self.hand(Keeper::Lent, Keeper::Shim)
    }

    fn hand(&mut self, from: Keeper, to: Keeper) -> Vec<PathBuf> {
        let shared = self.disks.values_mut().filter(|disk| disk.is_handed_over());
        let changed = shared.filter(|disk| disk.keeper == from).filter_map(|disk| {
            disk.keeper = to;
            disk.path.clone()
        });
        changed.collect()
    }

    /// A table from a payload; its disks have no files here yet.
    pub(crate) fn imported(
        disks: BTreeMap<Slot, Disk>,
        reservations: BTreeMap<ReservationId, Slot>,
        tokens: BTreeMap<Slot, DiskToken>,
    ) -> Scsi {
        Scsi { disks, reservations, tokens, hold: Hold::Imported }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(digest: &str) -> Disk {
        Disk::image("/i".into(), 4096, digest.into())
    }

    fn scratch() -> Disk {
        let path = format!("/s/{}", uuid::Uuid::new_v4());
        Disk::writable(path.into(), 8192, Storage::Local, Keeper::Shim)
    }

    fn volume() -> Disk {
        Disk::writable("/v".into(), 8192, Storage::Local, Keeper::Host)
    }

    fn plugged(scsi: &mut Scsi, disk: Disk) -> (ReservationId, Slot) {
        let (id, slot, new) = scsi.reserve(disk).unwrap();
        if new {
            scsi.attached(slot).unwrap();
            scsi.mounted(slot, mount_point(slot)).unwrap();
        }
        (id, slot)
    }

    #[test]
    fn an_image_has_one_slot_however_often_it_is_used() {
        let mut scsi = Scsi::default();
        let (one, slot) = plugged(&mut scsi, image("sha256:a"));
        let (two, same, again) = scsi.reserve(image("sha256:a")).unwrap();
        assert!(!again && slot == same && one != two);
        assert_eq!((scsi.slot(&one).unwrap(), scsi.slot(&two).unwrap()), (slot, slot));
        assert_eq!(scsi.release(&one).unwrap(), Released::Kept);
        assert!(matches!(scsi.release(&two).unwrap(), Released::Last { slot: last, .. } if last == slot));
        // On its way out it is shared with nobody, and its slot is not free yet.
        let (_, other, new) = scsi.reserve(image("sha256:a")).unwrap();
        assert!(new && other != slot);
        scsi.removed(slot);
        let (_, third, _) = scsi.reserve(scratch()).unwrap();
        assert_eq!(third, slot);
    }

    #[test]
    fn an_image_that_is_not_mounted_yet_is_not_shared() {
        let mut scsi = Scsi::default();
        let (_, first, _) = scsi.reserve(image("sha256:a")).unwrap();
        let (_, second, new) = scsi.reserve(image("sha256:a")).unwrap();
        assert!(new && first != second);
    }

    #[test]
    fn an_image_whose_file_is_one_containers_is_not_shared() {
        let mut scsi = Scsi::default();
        let (_, first) = plugged(&mut scsi, image("sparse-sha256:a"));
        let (_, second) = plugged(&mut scsi, image("sparse-sha256:a"));
        assert_eq!((first.number(), second.number()), (0, 1));
    }

    #[test]
    fn scratch_disks_are_never_shared_and_take_the_lowest_free_slot() {
        let mut scsi = Scsi::default();
        let (_, a, _) = scsi.reserve(scratch()).unwrap();
        let (_, b, _) = scsi.reserve(scratch()).unwrap();
        assert_eq!((a.number(), b.number()), (0, 1));
        assert_eq!(scsi.mirrored(), [a, b]);
    }

    #[test]
    fn a_writable_file_has_one_slot_and_is_used_in_one_way() {
        let mut scsi = Scsi::default();
        let (one, slot) = plugged(&mut scsi, volume());
        let (two, same) = plugged(&mut scsi, volume());
        assert_eq!(slot, same);
        let mut volumes = vec![one, two];
        volumes.sort();
        let (path, keeper) = (PathBuf::from("/v"), Keeper::Host);
        assert_eq!(scsi.mirrored_of([&two, &one].into_iter()), [MirroredUse { volumes, path, keeper }]);
        for other in [
            volume().with_filesystem(""),
            Disk::image("/v".into(), 8192, "sha256:a".into()).with_filesystem("ext4"),
        ] {
            let refused = scsi.reserve(other).unwrap_err().to_string();
            assert!(refused.contains("/v") && refused.contains("the same way"), "{refused}");
        }
        assert_eq!(scsi.release(&one).unwrap(), Released::Kept);
        assert!(matches!(scsi.release(&two).unwrap(), Released::Last { .. }));
        assert!(matches!(scsi.reserve(volume()), Err(ScsiError::InUse { .. })), "it is not out yet");
        scsi.removed(slot);
        plugged(&mut scsi, Disk::image("/v".into(), 8192, "sha256:a".into()));
        let refused = scsi.reserve(volume()).unwrap_err().to_string();
        assert!(refused.contains("read-only"), "{refused}");
    }

    #[test]
    fn what_another_container_has_keeps_its_file() {
        let mut scsi = Scsi::default();
        let (one, _) = plugged(&mut scsi, volume());
        let (two, slot) = plugged(&mut scsi, volume());
        let table = |disks: &Scsi| disks.disks().map(|(slot, disk)| (slot, disk.clone())).collect();
        let mut arrived = Scsi::imported(table(&scsi), scsi.reservations().clone(), BTreeMap::new());
        arrived.place_writable(slot, "/w".into(), Storage::Local, Keeper::Shim).unwrap();
        assert_eq!(arrived.unplace(&two), None);
        assert_eq!(arrived.own_files([&one].into_iter()), [PathBuf::from("/w")]);
    }

    #[test]
    fn a_frozen_table_does_not_change() {
        let mut scsi = Scsi::default();
        scsi.freeze().unwrap();
        scsi.freeze().unwrap();
        assert_eq!(scsi.reserve(scratch()).unwrap_err(), ScsiError::Frozen);
        scsi.resume();
        assert!(scsi.reserve(scratch()).is_ok());
    }

    #[test]
    fn a_disk_on_its_way_out_is_not_saved() {
        let mut scsi = Scsi::default();
        let (id, _) = plugged(&mut scsi, scratch());
        scsi.check_save().unwrap();
        scsi.release(&id).unwrap();
        assert!(scsi.check_save().unwrap_err().to_string().contains("disk 0"), "it names the disk");
        assert_eq!(scsi.hold, Hold::Free);
    }

    #[test]
    fn another_content_is_refused_with_both_digests() {
        let mut scsi = Scsi::default();
        let (_, slot, _) = scsi.reserve(image("sha256:aa")).unwrap();
        let error = scsi.place_image(slot, "/x".into(), "sha256:bb").unwrap_err().to_string();
        assert!(error.contains("sha256:aa") && error.contains("sha256:bb"), "{error}");
        assert!(scsi.place_writable(slot, "/x".into(), Storage::Local, Keeper::Shim).is_err());
    }
}
