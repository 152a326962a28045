//! Which kind of volume a mount is. Nothing here touches a file.
//!
//! | mount | becomes |
//! |---|---|
//! | bind of a file or directory, read-only, within the limits | a copy in the guest that follows this host |
//! | `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`, writable or not | a copy |
//! | `/dev/termination-log` | a copy that is written back |
//! | bind of kubelet's `kubernetes.io~empty-dir` | a directory of the pod in the guest |
//! | ext4 or erofs on a block device or in an image file | a disk, mounted in the guest |
//! | bind of a block device | a disk, given as a device |
//! | any other bind of a file or directory | a share, which keeps the pod on this host |

use super::error::VolumeError;
use super::facts::Facts;
use super::mount::Mount;
use super::walk::NotCopied;

/// Files of a pod that its host writes.
const POD_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
/// Where a container says why it ended.
const TERMINATION_LOG: &str = "/dev/termination-log";
/// kubelet's plugin for directories that live as long as their pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// The longest name of a directory in the guest.
const NAME_MAX: usize = 63;

/// What a mount becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Volume {
    /// Not of this host.
    Guests,
    /// Files in the guest.
    Copy(Direction),
    /// A directory that the pod's containers share by its name.
    EmptyDirectory { name: String, memory_bytes: Option<u64>, mode: u32, uid: u32, gid: u32 },
    /// A disk with a file system.
    Disk { filesystem: Filesystem, read_only: bool },
    /// A disk as it is.
    Device { read_only: bool },
    /// A directory or file of this host, which ties the pod to it.
    Share { why: NotCopied },
}

/// Which way a copy's content goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The guest follows the host.
    ToGuest,
    /// What the container leaves in it goes to the host when the container has ended.
    BackToHost,
}

/// A file system on a disk that the guest's kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filesystem {
    Ext4,
    Erofs,
}

impl Filesystem {
    /// As mount(2) calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Erofs => "erofs",
        }
    }

    fn named(kind: &str) -> Option<Filesystem> {
        [Filesystem::Ext4, Filesystem::Erofs].into_iter().find(|filesystem| filesystem.name() == kind)
    }
}

/// The kind of volume that a mount is, or why it can be none.
pub(crate) fn plan(mount: &Mount, source: &Facts) -> Result<Volume, VolumeError> {
    if !mount.names_a_source() {
        return Ok(Volume::Guests);
    }
    let named = || (mount.source.clone(), mount.destination.clone());
    if !mount.bind {
        let Some(filesystem) = Filesystem::named(&mount.kind) else {
            let (host, destination) = named();
            return Err(VolumeError::Filesystem { host, destination, kind: mount.kind.clone() });
        };
        return match source {
            Facts::Block | Facts::File { .. } => {
                let read_only = mount.read_only || filesystem == Filesystem::Erofs;
                Ok(Volume::Disk { filesystem, read_only })
            }
            Facts::Missing(reason) => Err(missing(mount, reason)),
            Facts::Directory(_) => Err(refused(mount, "a directory, and a disk is wanted")),
            Facts::Other(what) => Err(refused(mount, what)),
        };
    }
    let unfit = match source {
        Facts::Missing(reason) => return Err(missing(mount, reason)),
        Facts::Other(what) => return Err(refused(mount, what)),
        Facts::Block => return Ok(Volume::Device { read_only: mount.read_only }),
        Facts::File { unfit } => unfit,
        Facts::Directory(directory) => {
            if let Some(name) = empty_directory(&mount.source) {
                return Ok(Volume::EmptyDirectory {
                    name: name.to_owned(),
                    memory_bytes: directory.memory_bytes,
                    mode: directory.mode,
                    uid: directory.uid,
                    gid: directory.gid,
                });
            }
            &directory.unfit
        }
    };
    let pods_file = matches!(source, Facts::File { .. });
    match unfit {
        None if pods_file && mount.destination == TERMINATION_LOG => Ok(Volume::Copy(Direction::BackToHost)),
        None if mount.read_only || pods_file && POD_FILES.contains(&mount.destination.as_str()) => {
            Ok(Volume::Copy(Direction::ToGuest))
        }
        None => Ok(Volume::Share { why: NotCopied::Writable }),
        Some(why) => Ok(Volume::Share { why: why.clone() }),
    }
}

fn missing(mount: &Mount, reason: &str) -> VolumeError {
    VolumeError::Missing {
        host: mount.source.clone(),
        destination: mount.destination.clone(),
        reason: reason.to_owned(),
    }
}

fn refused(mount: &Mount, what: &'static str) -> VolumeError {
    VolumeError::Kind { host: mount.source.clone(), destination: mount.destination.clone(), what }
}

/// The volume's name, when a path is such a directory of kubelet's itself: `…/kubernetes.io~empty-dir/<name>`.
fn empty_directory(source: &str) -> Option<&str> {
    let (above, name) = source.trim_end_matches('/').rsplit_once('/')?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fits = !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(plain);
    (fits && above.rsplit('/').next() == Some(EMPTY_DIR)).then_some(name)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
