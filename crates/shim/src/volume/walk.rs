//! What lies below a path of this host, as far as it can be copied.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use dunlin_bridge::message::ENTRIES_MAX;
use thiserror::Error;

/// What is copied at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes of one file.
    pub(crate) file: u64,
    /// Bytes of all files of a mount.
    pub(crate) mount: u64,
}

/// Why something is not copied.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum NotCopied {
    #[error("it is writable, and only read-only mounts are copied")]
    Writable,
    #[error("its file {path} has {} KiB, and files up to {} KiB are copied (volumes.max_file_kib)", .bytes.div_ceil(1024), .limit / 1024)]
    File { path: String, bytes: u64, limit: u64 },
    #[error("its files have more than {} MiB, the most that is copied of a mount (volumes.max_mount_mib)", .limit >> 20)]
    Total { limit: u64 },
    #[error("it has more than {ENTRIES_MAX} files and directories, the most that are copied of a mount")]
    Entries,
    #[error("{path} in it is {what}, which cannot be copied")]
    Kind { path: String, what: &'static str },
    #[error("the name of {path} in it is not UTF-8")]
    Name { path: String },
    #[error("it lies on a file system that the kernel makes up")]
    Kernel,
}

/// Why a walk ended early.
#[derive(Debug, Error)]
pub(crate) enum WalkError {
    #[error(transparent)]
    Unfit(#[from] NotCopied),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl WalkError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> WalkError {
        move |source| WalkError::Io { path: path.to_owned(), source }
    }

    /// Something went while it was looked at.
    pub(super) fn vanished(&self) -> bool {
        matches!(self, WalkError::Io { source, .. } if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory))
    }
}

/// Something that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Relative; empty for the root.
    pub(super) path: String,
    pub(super) kind: Kind,
    pub(super) stamp: Stamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
    Link { target: String },
}

/// What changes when a thing changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(meta: &Metadata) -> Stamp {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: if meta.is_file() { meta.size() } else { 0 },
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// All below `root`, the root first, each thing after its directory. Links are not followed, but the root has been.
pub(super) fn walk(root: &Path, limits: Limits) -> Result<Vec<Found>, WalkError> {
    let meta = fs::symlink_metadata(root).map_err(WalkError::at(root))?;
    if kernel_file_system(root)? {
        return Err(NotCopied::Kernel.into());
    }
    let mut walk = Walk { limits, bytes: 0, found: Vec::new() };
    walk.take(root, String::new(), &meta)?;
    Ok(walk.found)
}

struct Walk {
    limits: Limits,
    bytes: u64,
    found: Vec<Found>,
}

impl Walk {
    fn take(&mut self, path: &Path, relative: String, meta: &Metadata) -> Result<(), WalkError> {
        if self.found.len() >= ENTRIES_MAX {
            return Err(NotCopied::Entries.into());
        }
        let shown = || path.display().to_string();
        let kind = meta.file_type();
        let kind = if kind.is_dir() {
            Kind::Directory
        } else if kind.is_file() {
            if meta.size() > self.limits.file {
                let (bytes, limit) = (meta.size(), self.limits.file);
                return Err(NotCopied::File { path: shown(), bytes, limit }.into());
            }
            self.bytes += meta.size();
            if self.bytes > self.limits.mount {
                return Err(NotCopied::Total { limit: self.limits.mount }.into());
            }
            Kind::File
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(WalkError::at(path))?;
            let target = target.into_os_string().into_string();
            Kind::Link { target: target.map_err(|_| NotCopied::Name { path: shown() })? }
        } else {
            return Err(NotCopied::Kind { path: shown(), what: what(meta) }.into());
        };
        let directory = kind == Kind::Directory;
        self.found.push(Found { path: relative.clone(), kind, stamp: Stamp::of(meta) });
        if !directory {
            return Ok(());
        }
        let mut entries = Vec::new();
        for entry in fs::read_dir(path).map_err(WalkError::at(path))? {
            entries.push(entry.map_err(WalkError::at(path))?.file_name());
            if self.found.len() + entries.len() > ENTRIES_MAX {
                return Err(NotCopied::Entries.into());
            }
        }
        entries.sort();
        for name in entries {
            let below = path.join(&name);
            let meta = fs::symlink_metadata(&below).map_err(WalkError::at(&below))?;
            let Some(name) = name.to_str() else {
                return Err(NotCopied::Name { path: below.display().to_string() }.into());
            };
            let name = if relative.is_empty() { name.to_owned() } else { format!("{relative}/{name}") };
            self.take(&below, name, &meta)?;
        }
        Ok(())
    }
}

/// For people.
pub(super) fn what(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "no file, directory or link"
    }
}

/// Files of such a system have no content that stays: sizes are made up, and nobody is told of changes.
fn kernel_file_system(path: &Path) -> Result<bool, WalkError> {
    // From linux/magic.h: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, devpts.
    const MAGIC: [i64; 8] =
        [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x6462_6720, 0x7472_6163, 0x7363_6673, 0x1cd1];
    let stat = nix::sys::statfs::statfs(path)
        .map_err(|errno| WalkError::Io { path: path.to_owned(), source: errno.into() })?;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
    let magic = stat.filesystem_type().0 as i64;
    Ok(MAGIC.contains(&magic))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { file: 1024, mount: 2048 };

    #[test]
    fn a_tree_comes_in_order_with_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir(root.join("..1")).unwrap();
        fs::write(root.join("..1/key"), "x").unwrap();
        std::os::unix::fs::symlink("..1", root.join("..data")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("away")).unwrap();
        let found = walk(root, LIMITS).unwrap();
        let paths: Vec<&str> = found.iter().map(|found| found.path.as_str()).collect();
        assert_eq!(paths, ["", "..1", "..1/key", "..data", "away"]);
        assert_eq!(found[4].kind, Kind::Link { target: "/etc".into() }, "it is not followed");
    }

    fn unfit(root: &Path) -> NotCopied {
        match walk(root, LIMITS).unwrap_err() {
            WalkError::Unfit(why) => why,
            WalkError::Io { path, source } => panic!("{}: {source}", path.display()),
        }
    }

    #[test]
    fn limits_name_what_is_over_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("a"), vec![0; 1024]).unwrap();
        fs::write(root.join("b"), vec![0; 1024]).unwrap();
        walk(root, LIMITS).unwrap();
        fs::write(root.join("c"), "x").unwrap();
        assert_eq!(unfit(root), NotCopied::Total { limit: 2048 });
        fs::write(root.join("a"), vec![0; 1025]).unwrap();
        let text = unfit(root).to_string();
        assert!(text.contains("/a has 2 KiB") && text.contains("up to 1 KiB"), "{text}");
        for number in 0..=ENTRIES_MAX {
            fs::write(root.join(format!("n{number}")), "").unwrap();
        }
        fs::remove_file(root.join("a")).unwrap();
        assert_eq!(unfit(root), NotCopied::Entries);
    }

    #[test]
    fn what_has_no_content_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(unfit(dir.path()).to_string().contains("/s in it is a socket"));
        assert_eq!(unfit(Path::new("/proc/self")), NotCopied::Kernel);
        assert!(walk(&dir.path().join("absent"), LIMITS).unwrap_err().vanished());
    }
}
