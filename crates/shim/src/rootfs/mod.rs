//! From the mounts that containerd passes to disks that the guest can mount: each layer directory
//! becomes one read-only EROFS image, found again by its content, and the writable layer a sparse
//! ext4 disk. A snapshotter's own image files are attached as they are.

pub(crate) mod digest;
mod ext4;
pub(crate) mod fetch;
pub(crate) mod mounts;
pub(crate) mod scratch;
pub(crate) mod store;

use std::path::PathBuf;

use thiserror::Error;

/// The root file system cannot be turned into disks.
#[derive(Debug, Error)]
pub(crate) enum RootfsError {
    #[error(
        "the container has no root file system: containerd passed no mount; give the container an image or a snapshot"
    )]
    None,
    #[error(
        "cannot use a root file system mount of type {kind:?}; use a snapshotter whose mounts are overlay or bind, like overlayfs or native"
    )]
    Kind { kind: String },
    #[error(
        "the root file system {path} is an XFS, which the guest's kernel does not have; set fs_type = \"ext4\" and a scratch_file with an ext4 for the blockfile snapshotter, or use overlayfs, native or erofs"
    )]
    Xfs { path: PathBuf },
    #[error(
        "the root file system {path} is no file but a device, as of the devmapper snapshotter, and nothing tells whether a device's bytes are still those that were hashed; use the overlayfs, native, erofs or blockfile snapshotter"
    )]
    Device { path: PathBuf },
    #[error(
        "the root file system {path} is no ext4, although it is to be mounted as one; look at the snapshotter's scratch_file"
    )]
    NotExt4 { path: PathBuf },
    #[error(
        "the ext4 in {path} is mounted for writing or was not unmounted cleanly{mending}; unmount it, or remove the image and pull it again"
    )]
    Unclean { path: PathBuf, mending: String },
    #[error("the overlay mount has no lowerdir in its options")]
    NoLower,
    #[error("cannot read layer {path}: {source}")]
    Layer { path: PathBuf, source: std::io::Error },
    #[error("cannot use {path} as the image store: {source}; check data_dir in the configuration")]
    Store { path: PathBuf, source: std::io::Error },
    #[error("cannot run {program}: {source}; install the Debian package {package}")]
    Program { program: PathBuf, package: &'static str, source: std::io::Error },
    #[error("{program} failed on {path}: {message}")]
    Build { program: PathBuf, path: PathBuf, message: String },
    #[error("{program} took longer than {seconds} s on {path}")]
    Timeout { program: PathBuf, path: PathBuf, seconds: u64 },
    #[error("cannot have image {digest} from the source: {message}")]
    Fetch { digest: String, message: String },
    #[error("cannot create the scratch disk {path}: {source}")]
    Scratch { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} exists already, and a file that was there is never written to; if two hosts have been given this directory, name it in disks.shared of both or give each a disks.scratch_dir of its own; else remove the file"
    )]
    ScratchExists { path: PathBuf },
}
