//! A whole saved state, opened: plain structs whose fields and cross references have been checked.
//!
//! ```text
//!  migration ─┬─ vm ─┬─ scsi  { disks by slot, reservations by id }
//!             │      ├─ plan9 { shares by host path, reservations by id }
//!             │      └─ vpci  { devices by UUID }
//!             └─ pods ─┬─ network { endpoints by NIC id }
//!                      └─ containers { layers, scratch, others → tables of vm } ── processes by exec id
//! ```
//!
//! [`SavedTree::open`] takes everything or nothing. What it lets through holds: each layer, scratch
//! and other reservation names one of its table, and is held by one container; each reservation names
//! a disk or a share; no id, port, pid, address or path in the guest stands twice; each container has
//! its init process and a role that fits its pod; each read-only disk has its digest, and each scratch
//! disk is writable. The limits are the constants of this module.

mod check;
mod devices;
mod open;
mod options;
mod pods;
mod seal;
mod shape;
mod stages;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;

pub use self::devices::{
    DiskAccess, DiskToken, SavedDisk, SavedMount, SavedPlan9, SavedReservation, SavedScsi, SavedShare,
    SavedShareMount, SavedVpci, SavedVpciDevice,
};
pub use self::options::{Confidential, SandboxOptions};
pub use self::pods::{
    ProcessStage, SavedContainer, SavedEndpoint, SavedExit, SavedLayer, SavedNetwork, SavedPod, SavedProcess,
    SavedRoute,
};
pub use self::stages::{
    ContainerRole, ContainerStage, DiskKind, DiskStage, MountStage, NetworkStage, ShareMountStage,
    ShareStage, VmStage, VpciStage,
};
use crate::Any;
use crate::compat::{Compat, CompatError};
use crate::envelope::EnvelopeError;
use crate::ids::{IdError, Slot, StdioPort};

/// Longest directory that is said once for all that is in it, bytes: a path of Linux's.
const DIRECTORY_MAX: usize = 4096;
/// Most pods in one saved state.
pub const PODS_MAX: usize = 16;
/// Most containers in one pod.
pub const CONTAINERS_MAX: usize = 256;
/// Most processes in one container.
pub const PROCESSES_MAX: usize = 1024;
/// Most read-only layers of one container: the disks of a machine.
pub const LAYERS_MAX: usize = 256;
/// Most reservations of one table, and of one kind in one container.
pub const RESERVATIONS_MAX: usize = 1 << 14;
/// Most mounts of one disk: the partitions of a GPT, and the whole disk.
pub const MOUNTS_MAX: usize = 129;
/// Most options of one mount.
pub const MOUNT_OPTIONS_MAX: usize = 64;
/// Most Plan9 shares.
pub const SHARES_MAX: usize = 1024;
/// Most names that one share is restricted to.
pub const ALLOWED_NAMES_MAX: usize = 1024;
/// Most copies of a container, and most disk volumes.
pub const VOLUMES_MAX: usize = 256;
/// Most passed-through devices.
pub const DEVICES_MAX: usize = 64;
/// Most network cards of one pod.
pub const ENDPOINTS_MAX: usize = 32;
/// Most addresses of one network card.
pub const ADDRESSES_MAX: usize = 64;
/// Most routes of one network card.
pub const ROUTES_MAX: usize = 512;
/// Most permanent neighbours of one network card.
pub const NEIGHBOURS_MAX: usize = 1024;

/// A saved state is refused. Each names the place, the reason and the way out.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// An envelope.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// A field's shape.
    #[error(transparent)]
    Field(#[from] IdError),
    /// The VM's compatibility data.
    #[error("config.vm.compat_info is refused")]
    Compat(#[from] CompatError),
    /// Something that must be there is not.
    #[error("{place}: missing; {remedy}")]
    Missing {
        /// Where.
        place: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Something names what is not there.
    #[error("{place}: names {what} {name}, which the saved state does not hold; export again")]
    Dangling {
        /// Where.
        place: String,
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Something stands twice.
    #[error("{place}: {what} {name} already stands at {first}; export again")]
    Twice {
        /// Where the second one is.
        place: String,
        /// What kind of thing.
        what: &'static str,
        /// Which.
        name: String,
        /// Where the first one is.
        first: String,
    },
    /// A value that contradicts another.
    #[error("{place}: {reason}; {remedy}")]
    Contradiction {
        /// Where.
        place: String,
        /// What contradicts what.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// More of something than is allowed.
    #[error("{place}: {count} are more than the {limit} allowed; use fewer, or split the pod")]
    TooMany {
        /// Where.
        place: String,
        /// How many.
        count: usize,
        /// How many may be.
        limit: usize,
    },
}

/// A sandbox's saved state.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedTree {
    /// The machine.
    pub vm: SavedVm,
    /// Its pods; at least one.
    pub pods: Vec<SavedPod>,
}

/// The machine.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedVm {
    /// Its name, for people.
    pub vm_id: String,
    /// Where it is in its life.
    pub stage: VmStage,
    /// What its sandbox was made with.
    pub options: SandboxOptions,
    /// First stdio port that the destination may hand out.
    pub next_port: StdioPort,
    /// First bridge frame id that the destination may use.
    pub bridge_next_id: u64,
    /// Its agent does not resume standard streams.
    pub plain_streams: bool,
    /// What the destination must have in common.
    pub compat: Compat,
    /// `dunlin_qemu::Document` as JSON; opened by who builds machines.
    pub document: Vec<u8>,
    /// Its disks.
    pub scsi: SavedScsi,
    /// Its passed-through devices.
    pub vpci: SavedVpci,
    /// Its shares.
    pub plan9: SavedPlan9,
}

impl SavedTree {
    /// Opens and checks the whole tree.
    pub fn open(config: &Any) -> Result<SavedTree, TreeError> {
        let tree = open::migration(config)?;
        check::all(&tree)?;
        Ok(tree)
    }

    /// Seals the tree, when [`SavedTree::open`] takes what comes of it: what is exported can be imported.
    pub fn seal(self) -> Result<Any, TreeError> {
        check::all(&self)?;
        seal::migration(self)
    }

    /// The disks whose contents must be copied, in order: each needs a stream.
    pub fn mirrored_slots(&self) -> BTreeSet<Slot> {
        self.vm.scsi.mirrored_slots()
    }

    /// Every container, of every pod.
    pub fn containers(&self) -> impl Iterator<Item = (&SavedPod, &SavedContainer)> {
        self.pods.iter().flat_map(|pod| pod.containers.iter().map(move |container| (pod, container)))
    }

    /// The disk under a layer. None only for a layer of another tree.
    pub fn disk(&self, layer: &SavedLayer) -> Option<(Slot, &SavedDisk)> {
        let reservation = self.vm.scsi.reservations.get(&layer.reservation)?;
        Some((reservation.slot, self.vm.scsi.disks.get(&reservation.slot)?))
    }
}
