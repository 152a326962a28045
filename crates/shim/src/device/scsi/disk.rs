//! One disk of the machine and where it stands.
//!
//! | state    | attach   | eject   | detach   | save |
//! |----------|----------|---------|----------|------|
//! | Reserved | Attached | -       | Detached | =    |
//! | Attached | -        | Ejected | Detached | =    |
//! | Ejected  | -        | -       | Detached | -    |
//! | Detached | -        | -       | =        | -    |
//!
//! Reserved: its slot is taken, QEMU does not have it yet. Ejected: the guest has let go of it. A disk that could not
//! be attached is detached. Its use by the guest is its mount's own state, see [`super::mount`].

use std::path::PathBuf;

use dunlin_qemu::DiskSource;

use super::mount::Mount;
use crate::controller::Transitions;
use crate::rootfs::digest::is_sparse;

/// What is behind a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Read-only: the same bytes on every host.
    Image {
        /// As `rootfs::digest` tells.
        digest: String,
    },
    /// A container's writable layer, or a volume.
    Writable,
}

/// How the bytes of a writable disk get to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Storage {
    /// Only this host has them: they are mirrored.
    #[default]
    Local,
    /// Both hosts have the file: nothing is copied, see [`super::storage`].
    Shared,
}

/// Who removes a writable disk's file when the disk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeper {
    /// The shim: it made it.
    Shim,
    /// The shim made it, or will own it when the move to here succeeds; as long as a move may end on either host,
    /// neither removes it.
    Lent,
    /// A block device of this host's that an arriving volume is copied to: when the move fails, half a copy is on it.
    Device,
    /// Nobody here: it was there before.
    Host,
}

/// Where a disk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum State {
    #[default]
    Reserved,
    Attached,
    Ejected,
    Detached,
}

/// What changes a disk's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Attach,
    Eject,
    Detach,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] = &[
        ("Reserved", State::Reserved),
        ("Attached", State::Attached),
        ("Ejected", State::Ejected),
        ("Detached", State::Detached),
    ];
    const OPS: &'static [(&'static str, Op)] =
        &[("attach", Op::Attach), ("eject", Op::Eject), ("detach", Op::Detach), ("save", Op::Save)];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::Reserved, Op::Attach) => Some(State::Attached),
            (State::Attached, Op::Eject) => Some(State::Ejected),
            (_, Op::Detach) => Some(State::Detached),
            (State::Reserved | State::Attached, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) state: State,
    /// On this host. None: imported, and not yet known here.
    pub(crate) path: Option<PathBuf>,
    /// Of an imported disk: its file's name on the source, for a file in a directory of Dunlin's own.
    pub(crate) named: Option<String>,
    pub(crate) size_bytes: u64,
    pub(crate) content: Content,
    /// As mount(2) names it.
    pub(crate) filesystem: String,
    pub(crate) storage: Storage,
    /// Copied in this move although it is shared.
    pub(crate) copied: bool,
    pub(crate) keeper: Keeper,
    /// Of the whole disk; the only partition that Dunlin makes.
    pub(crate) mount: Mount,
}

impl Disk {
    /// A read-only EROFS image. `digest`: of its bytes, as `rootfs::digest` tells.
    pub(crate) fn image(path: PathBuf, size_bytes: u64, digest: String) -> Disk {
        Disk {
            state: State::Reserved,
            path: Some(path),
            named: None,
            size_bytes,
            content: Content::Image { digest },
            filesystem: "erofs".to_owned(),
            storage: Storage::Local,
            copied: false,
            keeper: Keeper::Host,
            mount: Mount::default(),
        }
    }

    /// A writable disk with an ext4 in it.
    pub(crate) fn writable(path: PathBuf, size_bytes: u64, storage: Storage, keeper: Keeper) -> Disk {
        Disk {
            content: Content::Writable,
            filesystem: "ext4".to_owned(),
            storage,
            keeper,
            ..Disk::image(path, size_bytes, String::new())
        }
    }

    /// With another file system than [`Disk::image`]'s or [`Disk::writable`]'s.
    pub(crate) fn with_filesystem(mut self, filesystem: &str) -> Disk {
        filesystem.clone_into(&mut self.filesystem);
        self
    }

    /// Its bytes go through a stream of their own in a move.
    pub(crate) fn is_mirrored(&self) -> bool {
        self.content == Content::Writable && !self.is_handed_over()
    }

    /// The other host opens the same file.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.content == Content::Writable && self.storage == Storage::Shared && !self.copied
    }

    /// What QEMU is to open. None: its file here is not known yet.
    ///
    /// A shared file goes around the page cache: the other host reads behind it.
    pub(crate) fn source(&self) -> Option<DiskSource> {
        let path = self.path.clone()?;
        Some(DiskSource { path, read_only: self.read_only(), direct: self.storage == Storage::Shared })
    }

    /// Of an image.
    pub(crate) fn digest(&self) -> Option<&str> {
        match &self.content {
            Content::Image { digest } => Some(digest),
            Content::Writable => None,
        }
    }

    pub(crate) fn read_only(&self) -> bool {
        matches!(self.content, Content::Image { .. })
    }

    /// Whether all containers with this content may use this one disk. The file of a whole root file system is one
    /// container's and goes with it.
    pub(crate) fn shareable(&self) -> bool {
        self.digest().is_some_and(|digest| !is_sparse(digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("disk.rs"));
    }
}
