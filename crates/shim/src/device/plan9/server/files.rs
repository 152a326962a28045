//! The host's files as a share sees them, each held by a descriptor of its own.
//!
//! A share cannot be left: every step goes from one directory's descriptor to one name in it, the name is
//! never `..`, and a symbolic link is a file like any other, which only the guest follows. Devices,
//! sockets and FIFOs can be seen and not opened: the guest's kernel has its own behind their names.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, readlinkat, renameat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mkdirat, mknodat, utimensat,
};
use nix::sys::statfs::{Statfs, fstatfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, truncate, unlinkat};

use super::message::{Change, Name, Qid, Time};

/// Flags of an open that pass on to the host: access mode, O_TRUNC, O_APPEND, O_DSYNC and O_SYNC. The protocol's
/// numbers are those of Linux on x86.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_TRUNC | libc::O_APPEND | libc::O_DSYNC | libc::O_SYNC;
/// Permission and set-id bits.
const MODE_BITS: u32 = 0o7777;
/// Descriptors beyond which a higher limit is of no use here.
const ENOUGH_DESCRIPTORS: u64 = 65_536;
/// Room for one read of a directory.
const DIRECTORY_READ: usize = 16 * 1024;

/// Who creates a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A file, directory or link of the share, not opened for reading or writing.
#[derive(Debug)]
pub(super) struct Node(OwnedFd);

/// An entry of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) inode: u64,
    /// Where to read on after this entry.
    pub(super) next: u64,
    /// `DT_*`.
    pub(super) kind: u8,
    pub(super) name: OsString,
}

impl Node {
    /// The directory at the root of a share.
    pub(super) fn root(path: &Path) -> Result<Node, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(path, flags, Mode::empty()).map(Node)
    }

    /// The file behind an open descriptor.
    fn of(file: &File) -> Result<Node, Errno> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map(Node)
    }

    /// What was just made under that name; something else took its place: refused.
    fn made(&self, name: Name<'_>, kind: SFlag) -> Result<Node, Errno> {
        let node = self.child(name)?;
        if file_type(&node.stat()?) == kind { Ok(node) } else { Err(Errno::ESTALE) }
    }

    /// The file of that name in this directory; a symbolic link is not followed.
    pub(super) fn child(&self, name: Name<'_>) -> Result<Node, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&self.0, name.as_os_str(), flags, Mode::empty()).map(Node)
    }

    pub(super) fn stat(&self) -> Result<FileStat, Errno> {
        fstat(&self.0)
    }

    pub(super) fn statfs(&self) -> Result<Statfs, Errno> {
        fstatfs(&self.0)
    }

    /// Opens a regular file, or a directory for reading.
    pub(super) fn open(&self, flags: i32) -> Result<File, Errno> {
        let kind = file_type(&self.stat()?);
        let wanted = OFlag::from_bits_truncate(flags & OPEN_FLAGS) | OFlag::O_CLOEXEC;
        let fd = if kind == SFlag::S_IFDIR {
            openat(&self.0, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?
        } else if kind == SFlag::S_IFREG {
            open(&self.proc_path(), wanted, Mode::empty())?
        } else {
            return Err(Errno::ENXIO);
        };
        Ok(File::from(fd))
    }

    /// Creates a regular file, or opens the one that is there unless `flags` has O_EXCL.
    pub(super) fn create(
        &self,
        name: Name<'_>,
        flags: i32,
        mode: u32,
        owner: Owner,
    ) -> Result<(Node, File), Errno> {
        // Exclusive in any case: what is there already is opened by the rules of `open`.
        let exclusive = OFlag::O_CREAT
            | OFlag::O_EXCL
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC
            | OFlag::from_bits_truncate(flags & OPEN_FLAGS);
        match openat(&self.0, name.as_os_str(), exclusive, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                let node = Node::of(&file)?;
                node.give(owner, Some(mode))?;
                Ok((node, file))
            }
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let node = self.child(name)?;
                let file = node.open(flags)?;
                Ok((node, file))
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn make_dir(&self, name: Name<'_>, mode: u32, owner: Owner) -> Result<Node, Errno> {
        mkdirat(&self.0, name.as_os_str(), Mode::empty())?;
        let node = self.made(name, SFlag::S_IFDIR)?;
        node.give(owner, Some(mode))?;
        Ok(node)
    }

    /// FIFOs and sockets. A device that the guest could make here would be the host's.
    pub(super) fn make_node(&self, name: Name<'_>, mode: u32, owner: Owner) -> Result<Node, Errno> {
        let kind = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFREG {
            return self.create(name, libc::O_EXCL, mode, owner).map(|(node, _)| node);
        }
        if kind != SFlag::S_IFIFO && kind != SFlag::S_IFSOCK {
            return Err(Errno::EPERM);
        }
        mknodat(&self.0, name.as_os_str(), kind, Mode::empty(), 0)?;
        let node = self.made(name, kind)?;
        node.give(owner, Some(mode))?;
        Ok(node)
    }

    pub(super) fn symlink(&self, name: Name<'_>, target: &Path, owner: Owner) -> Result<Node, Errno> {
        symlinkat(target, &self.0, name.as_os_str())?;
        let node = self.made(name, SFlag::S_IFLNK)?;
        node.give(owner, None)?;
        Ok(node)
    }

    pub(super) fn link(&self, name: Name<'_>, file: &Node) -> Result<(), Errno> {
        if file_type(&file.stat()?) == SFlag::S_IFDIR {
            return Err(Errno::EPERM);
        }
        let from = file.proc_path();
        linkat(AT_FDCWD, &from, &self.0, name.as_os_str(), AtFlags::AT_SYMLINK_FOLLOW)
    }

    pub(super) fn unlink(&self, name: Name<'_>, directory: bool) -> Result<(), Errno> {
        let how = if directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
        unlinkat(&self.0, name.as_os_str(), how)
    }

    pub(super) fn rename(&self, name: Name<'_>, to: &Node, new_name: Name<'_>) -> Result<(), Errno> {
        renameat(&self.0, name.as_os_str(), &to.0, new_name.as_os_str())
    }

    pub(super) fn read_link(&self) -> Result<OsString, Errno> {
        if file_type(&self.stat()?) != SFlag::S_IFLNK {
            return Err(Errno::EINVAL);
        }
        readlinkat(&self.0, "")
    }

    /// The size first: a change of owner or mode may take away what the size needs.
    pub(super) fn set(&self, change: Change) -> Result<(), Errno> {
        let kind = file_type(&self.stat()?);
        let path = self.proc_path();
        if let Some(size) = change.size {
            match kind {
                SFlag::S_IFREG => truncate(&path, i64::try_from(size).map_err(|_| Errno::EFBIG)?)?,
                SFlag::S_IFDIR => return Err(Errno::EISDIR),
                _ => return Err(Errno::EINVAL),
            }
        }
        if change.uid.is_some() || change.gid.is_some() {
            self.chown(change.uid, change.gid)?;
        }
        if let Some(mode) = change.mode {
            if kind == SFlag::S_IFLNK {
                return Err(Errno::EOPNOTSUPP);
            }
            chmod(&path, mode)?;
        }
        if change.accessed.is_some() || change.modified.is_some() {
            let (accessed, modified) = (time(change.accessed), time(change.modified));
            utimensat(AT_FDCWD, &path, &accessed, &modified, UtimensatFlags::FollowSymlink)?;
        }
        Ok(())
    }

    fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        fchownat(&self.0, "", uid, gid, AtFlags::AT_EMPTY_PATH)
    }

    /// A new file belongs to who made it in the guest. The owner first: setting it takes set-id bits away.
    fn give(&self, owner: Owner, mode: Option<u32>) -> Result<(), Errno> {
        self.chown(Some(owner.uid), Some(owner.gid))?;
        match mode {
            Some(mode) => chmod(&self.proc_path(), mode),
            None => Ok(()),
        }
    }

    /// A path that leads to this very file, whatever happens to its name.
    fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn chmod(path: &Path, mode: u32) -> Result<(), Errno> {
    fchmodat(AT_FDCWD, path, Mode::from_bits_truncate(mode & MODE_BITS), FchmodatFlags::FollowSymlink)
}

fn time(time: Option<Time>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(Time::Now) => TimeSpec::UTIME_NOW,
        Some(Time::At { seconds, nanos }) => TimeSpec::new(seconds, nanos),
    }
}

pub(super) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// The client's idea of which file this is. `root_device`: the file system of the share's root; files of others that
/// are mounted below it must not look like its own.
pub(super) fn qid(stat: &FileStat, root_device: u64) -> Qid {
    let kind = match file_type(stat) {
        SFlag::S_IFDIR => Qid::DIRECTORY,
        SFlag::S_IFLNK => Qid::SYMLINK,
        _ => Qid::FILE,
    };
    let changed = stat.st_mtime.cast_unsigned()
        ^ (stat.st_mtime_nsec.cast_unsigned())
        ^ (stat.st_size.cast_unsigned() << 8);
    let path = path_number(stat.st_ino, stat.st_dev, root_device);
    Qid { kind, version: u32::try_from(changed & u64::from(u32::MAX)).unwrap_or(0), path }
}

/// A number for an inode that differs also between file systems.
pub(super) fn path_number(inode: u64, device: u64, root_device: u64) -> u64 {
    if device == root_device { inode } else { inode ^ device.rotate_left(40) }
}

/// Entries of an opened directory from `offset` on, as many as one call of the system gives.
pub(super) fn read_dir(directory: &File, offset: u64) -> Result<Vec<Entry>, Errno> {
    let fd = directory.as_raw_fd();
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    nix::unistd::lseek(directory.as_fd(), offset, nix::unistd::Whence::SeekSet)?;
    let mut buffer = vec![0u8; DIRECTORY_READ];
    // SAFETY: the buffer is as long as the call is told, and outlives it.
    let read = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
    let read = usize::try_from(Errno::result(read)?).unwrap_or(0);
    Ok(entries(&buffer[..read]))
}

/// `linux_dirent64`: inode[8] next[8] length[2] kind[1] name, zero-terminated.
fn entries(mut bytes: &[u8]) -> Vec<Entry> {
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(0);
    let mut entries = Vec::new();
    while bytes.len() > 19 {
        let length = usize::from(u16::from_ne_bytes([bytes[16], bytes[17]]));
        if length < 20 || length > bytes.len() {
            break;
        }
        let name = bytes[19..length].split(|byte| *byte == 0).next().unwrap_or_default();
        entries.push(Entry {
            inode: number(&bytes[..8]),
            next: number(&bytes[8..16]),
            kind: bytes[18],
            name: std::ffi::OsStr::from_bytes(name).to_owned(),
        });
        bytes = &bytes[length..];
    }
    entries
}

/// Lets the process have many descriptors, as far as its limit can be raised: each file that a guest
/// looks at is one. Gives the number.
pub(super) fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives the calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return 0;
        }
        let wanted = limit.rlim_cur.max(limit.rlim_max.min(ENOUGH_DESCRIPTORS));
        let raised = libc::rlimit { rlim_cur: wanted, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 { wanted } else { limit.rlim_cur }
    }
}
