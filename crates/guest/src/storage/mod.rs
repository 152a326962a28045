//! Disks by controller and LUN, their mounts, the layers that make a root file system, files and directories of the
//! host, and devices that are passed through.

pub mod copies;
pub mod disk;
pub mod filesystem;
pub mod layers;
pub mod mounts;
pub mod pci;
pub mod share;

use std::io;
use std::path::PathBuf;

/// A storage request failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// There are controllers 0 to 3 only.
    #[error("SCSI controller {0} does not exist; the guest has controllers 0 to 3")]
    NoController(u32),
    /// A controller has LUNs 0 to 63 only.
    #[error("LUN {0} does not exist; a controller has LUNs 0 to 63")]
    NoLun(u32),
    /// The disk did not show up in time.
    #[error(
        "disk {controller}:{lun} (partition {partition}) did not appear within {seconds} s; attach it to the machine first"
    )]
    DiskMissing {
        /// Controller, 0..=3.
        controller: u32,
        /// LUN, 0..=63.
        lun: u32,
        /// Partition, 0 for the whole disk.
        partition: u64,
        /// Time waited.
        seconds: u64,
    },
    /// No known file system on it, and none was named.
    #[error("no ext4 or erofs on {0}; format it, or name its file system in the request")]
    UnknownFilesystem(PathBuf),
    /// A file system was named that the guest does not mount.
    #[error("file system {0:?} is not supported; use ext4 or erofs")]
    UnsupportedFilesystem(String),
    /// The kernel cannot mount directories of the host.
    #[error(
        "this guest's kernel has no 9P client; use an image built with KERNEL=generic, or leave the mount out"
    )]
    No9p,
    /// Ports are not negative.
    #[error("port {0} of a share is no port; the host's server names the one it listens on")]
    BadPort(i32),
    /// The name cannot stand in a list of mount options.
    #[error("share name {0:?} is not 1 to 64 characters of [A-Za-z0-9_.-]; choose another name")]
    BadShareName(String),
    /// Something is mounted there.
    #[error("a share is mounted on {0} already; remove it first")]
    ShareMounted(PathBuf),
    /// The host's server was not reached.
    #[error(
        "cannot reach the share's server on port {port} of the host: {source}; it has to listen before the share is added"
    )]
    ShareServer {
        /// The host's port.
        port: u32,
        /// Why not.
        source: io::Error,
    },
    /// A device was named in a way that only other hosts use.
    #[error(
        "device {0} comes without its root port, by which this guest finds devices; name it as `RootPort`"
    )]
    NoRootPort(String),
    /// There are root ports 0 to 3 only.
    #[error("root port {0} does not exist; the machine has ports 0 to 3")]
    BadRootPort(u8),
    /// The device did not show up in time.
    #[error(
        "the device {id} did not appear behind root port {port} within {seconds} s; plug it into the machine first"
    )]
    DeviceMissing {
        /// The host's name of it.
        id: String,
        /// Root port, 0..=3.
        port: u8,
        /// Time waited.
        seconds: u64,
    },
    /// Files of the host go to places of their own.
    #[error(
        "{0} is no place for files of the host; copies are below /run/mounts/copies, shared directories in an empty-dir"
    )]
    NotForFiles(PathBuf),
    /// There is no such copy.
    #[error("there is no copy of host files at {0}; make it first")]
    NoCopy(PathBuf),
    /// A part of a file's content that does not fit.
    #[error("a part of a file's content was refused: {0}; stage the content again from its beginning")]
    BadPart(&'static str),
    /// A list of files was refused.
    #[error(transparent)]
    List(#[from] copies::list::ListError),
    /// An option that the guest cannot honour.
    #[error("{0} is not supported by this guest; leave it out of the request")]
    Unsupported(&'static str),
    /// A path was refused.
    #[error(transparent)]
    Path(#[from] crate::path::PathError),
    /// A system call on a path failed.
    #[error("cannot {action} {path}: {source}")]
    System {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl StorageError {
    fn at<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> StorageError {
        let path = path.into();
        move |source| StorageError::System { action, path, source: source.into() }
    }
}
