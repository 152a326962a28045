//! What becomes of the mounts of a container's spec that are neither the kernel's nor the guest's.
//!
//! ```text
//! spec ── mount ──> one mount, read        facts ──> what its source is on this host
//!                        └────── plan ──────┘        which kind of volume it is, or why it cannot be   (pure)
//!          copy   files in the guest that follow this host's     (Copies: one a sandbox)
//!          disk   what is known of a disk image or a block device before it is given to a machine
//!          device block devices that a volume arrives on or has left
//!          left   what a volume that moved away leaves behind, as a file
//! ```
//!
//! Directories that stay on this host are [`crate::device::plan9`]'s; disks in the machine are [`crate::device::scsi`]'s.
//! The sandbox puts them together (`sandbox::volumes`).

pub(crate) mod copy;
pub(crate) mod device;
pub(crate) mod disk;
mod error;
pub(crate) mod facts;
pub(crate) mod left;
pub(crate) mod mount;
pub(crate) mod plan;
mod walk;

pub(crate) use copy::{Copies, Guest};
pub(crate) use error::VolumeError;
pub(crate) use mount::Mount;
pub(crate) use plan::Volume;
use plan::plan;
pub(crate) use walk::Limits;

/// Has facts gathered where waiting for disks does no harm, and plans. Gives each mount of a spec that is a volume, by its
/// number in the list.
pub(crate) async fn survey(
    mounts: &[serde_json::Value],
    limits: Limits,
) -> Result<Vec<Planned>, VolumeError> {
    let mut planned = Vec::new();
    for (number, value) in mounts.iter().enumerate() {
        let mount = Mount::read(value);
        if !mount.names_a_source() {
            continue;
        }
        let (mount, facts) = facts::gather(mount, limits).await;
        match plan(&mount, &facts)? {
            Volume::Guests => {}
            volume => planned.push(Planned { number, mount, volume }),
        }
    }
    Ok(planned)
}

/// A mount and what it becomes.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// In the spec's list.
    pub(crate) number: usize,
    pub(crate) mount: Mount,
    pub(crate) volume: Volume,
}
