//! Mounting disks where the host says, and taking them away.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::disk::DiskAddress;
use super::filesystem::Filesystem;
use super::{StorageError, layers};
use crate::path::host_path;

/// Layers of mounts on one directory that a removal takes away.
const STACKED_MOUNTS: usize = 5;

/// A disk that the host wants mounted, in the request's terms.
#[derive(Clone, Debug, Default)]
pub struct DiskMount {
    /// Where; empty means that the disk is only waited for.
    pub mount_path: String,
    /// Controller, 0..=3.
    pub controller: u32,
    /// LUN, 0..=63.
    pub lun: u32,
    /// Partition, 0 for the whole disk.
    pub partition: u64,
    /// Mount read-only.
    pub read_only: bool,
    /// `MS_*` propagation words; other options are ignored.
    pub options: Vec<String>,
    /// Only link the device node to the path.
    pub block_device: bool,
    /// Name of the file system; empty to find out.
    pub filesystem: String,
    /// The disk is to be encrypted.
    pub encrypted: bool,
    /// The disk is to be formatted when it has another file system.
    pub ensure_filesystem: bool,
}

/// Waits for the disk and mounts it. Blocks.
pub fn add(request: &DiskMount) -> Result<(), StorageError> {
    let address = DiskAddress::new(request.controller, request.lun)?;
    if request.encrypted {
        return Err(StorageError::Unsupported("an encrypted disk"));
    }
    let target = match request.mount_path.as_str() {
        "" => None,
        path => Some(host_path(path)?),
    };
    let named = match request.filesystem.as_str() {
        "" => None,
        name => Some(Filesystem::parse(name)?),
    };
    let node = address.wait_for_node(request.partition)?;
    let Some(target) = target else { return Ok(()) };
    if request.block_device {
        return link(&node, &target);
    }
    let filesystem = match named {
        Some(named) if request.ensure_filesystem => {
            // Formatting takes a mkfs, which this guest does not have: the host formats.
            if Filesystem::probe(&node)? != named {
                return Err(StorageError::Unsupported("formatting a disk in the guest"));
            }
            named
        }
        Some(named) => named,
        None => Filesystem::probe(&node)?,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&target)
        .map_err(StorageError::at("create the directory", &target))?;
    let read_only = request.read_only || filesystem == Filesystem::Erofs;
    let data = match (filesystem, read_only) {
        (Filesystem::Ext4, true) => "noload",
        // Without noinit_itable ext4 writes zeroes to its whole inode tables in the background, and a
        // migration would carry them; without discard the blocks of deleted files stay on the host, and it would
        // carry those.
        (Filesystem::Ext4, false) => "noinit_itable,discard",
        (Filesystem::Erofs, _) => "",
    };
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    if let Err(errno) = mount(Some(&node), &target, Some(filesystem.name()), flags, Some(data)) {
        let _ = fs::remove_dir(&target);
        return Err(StorageError::at("mount the disk on", target)(errno));
    }
    for flag in request.options.iter().filter_map(|word| propagation(word)) {
        mount(None::<&str>, &target, None::<&str>, flag, None::<&str>)
            .map_err(StorageError::at("set the propagation of", &target))?;
    }
    Ok(())
}

/// Unmounts the disk and deletes its directory (or link). Gone already is done already.
pub fn remove(request: &DiskMount) -> Result<(), StorageError> {
    DiskAddress::new(request.controller, request.lun)?;
    if request.mount_path.is_empty() {
        return Ok(());
    }
    let target = host_path(&request.mount_path)?;
    if target.is_symlink() {
        return fs::remove_file(&target).map_err(StorageError::at("delete the link", target));
    }
    take_away(&target)
}

/// What is cached goes to the disk before the last mount that this namespace knows of does: one that another namespace
/// still has, as a container's does that is about to end, keeps the unmount from writing, and the disk goes next.
fn take_away(target: &Path) -> Result<(), StorageError> {
    let written = fs::File::open(target).and_then(|at| Ok(nix::unistd::syncfs(&at)?));
    match written {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!(target = %target.display(), %error, "what was written to a disk is not all on it");
        }
        _ => {}
    }
    unmount_all(target)?;
    remove_dir(target)
}

/// Unmounts everything that is mounted on this directory itself, up to five deep.
pub fn unmount_all(target: &Path) -> Result<(), StorageError> {
    for _ in 0..STACKED_MOUNTS {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point any more, or not there at all.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(StorageError::at("unmount", target)(errno)),
        }
    }
    Ok(())
}

/// Deletes an empty directory; gone already is done already.
pub fn remove_dir(target: &Path) -> Result<(), StorageError> {
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StorageError::at("delete the directory", target)(error))
        }
        _ => Ok(()),
    }
}

fn link(node: &Path, target: &Path) -> Result<(), StorageError> {
    if let Some(parent) = target.parent() {
        layers::create_dir(parent)?;
    }
    symlink(node, target).map_err(StorageError::at("link the disk to", target))
}

fn propagation(word: &str) -> Option<MsFlags> {
    let (word, recursive) = match word {
        "rprivate" | "rshared" | "rslave" | "runbindable" => (&word[1..], MsFlags::MS_REC),
        _ => (word, MsFlags::empty()),
    };
    let flag = match word {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_checked_before_anything_is_waited_for() {
        let ask = |change: fn(&mut DiskMount)| {
            let mut request = DiskMount { mount_path: "/run/mounts/x".into(), ..DiskMount::default() };
            change(&mut request);
            add(&request).unwrap_err()
        };
        assert!(matches!(ask(|r| r.controller = 4), StorageError::NoController(4)));
        assert!(matches!(ask(|r| r.lun = 64), StorageError::NoLun(64)));
        assert!(matches!(ask(|r| r.mount_path = "/etc".into()), StorageError::Path(_)));
        assert!(matches!(ask(|r| r.filesystem = "xfs".into()), StorageError::UnsupportedFilesystem(_)));
        assert!(matches!(ask(|r| r.encrypted = true), StorageError::Unsupported(_)));
    }

    #[test]
    fn what_was_written_is_on_the_disk_though_another_mount_of_it_stays() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: this needs root, to mount");
            return;
        }
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            let output = std::process::Command::new(program).args(arguments).output().unwrap();
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let place = tempfile::tempdir().unwrap();
        let (disk, target, other) =
            (place.path().join("disk"), place.path().join("target"), place.path().join("other"));
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        run("mkfs.ext4", &["-q".as_ref(), disk.as_os_str()]);
        fs::create_dir(&target).unwrap();
        fs::create_dir(&other).unwrap();
        run("mount", &["-o".as_ref(), "loop".as_ref(), disk.as_os_str(), target.as_os_str()]);
        mount(Some(&target), &other, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let words = b"written by a container, and not synced by it";
        fs::write(target.join("file"), words).unwrap();
        let on_disk = || fs::read(&disk).unwrap().windows(words.len()).any(|bytes| bytes == words);
        let before = on_disk();
        let taken = take_away(&target);
        let after = on_disk();
        umount2(&other, MntFlags::empty()).unwrap();
        taken.unwrap();
        assert!(!target.exists());
        assert_eq!((before, after), (false, true));
    }

    #[test]
    fn only_propagation_words_count() {
        assert_eq!(propagation("rshared"), Some(MsFlags::MS_SHARED | MsFlags::MS_REC));
        assert_eq!(propagation("private"), Some(MsFlags::MS_PRIVATE));
        assert_eq!(propagation("ro"), None);
        assert_eq!(propagation("rw"), None);
    }
}
