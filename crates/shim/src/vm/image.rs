//! The guest image that this host boots: the files of the configuration and their digests, which
//! a destination compares with its own.

use std::path::PathBuf;

use thiserror::Error;

use crate::config::Guest;
use crate::rootfs::digest::hash_file;

/// `sha256:<hex>` of both files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestImage {
    pub(crate) kernel_digest: String,
    pub(crate) initramfs_digest: String,
}

/// The image cannot be used.
#[derive(Debug, Error)]
pub(crate) enum ImageError {
    #[error(
        "guest.{key}: cannot read {path}: {source}; build the guest image or name another file in the configuration"
    )]
    Missing { key: &'static str, path: PathBuf, source: std::io::Error },
    #[error("guest image: {0}")]
    Hash(String),
}

/// Both files are there.
pub(crate) fn check(guest: &Guest) -> Result<(), ImageError> {
    for (key, path) in [("kernel", &guest.kernel), ("initramfs", &guest.initramfs)] {
        std::fs::File::open(path).map_err(|source| ImageError::Missing {
            key,
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Hashes both files.
pub(crate) async fn read(guest: &Guest) -> Result<GuestImage, ImageError> {
    check(guest)?;
    let (kernel, initramfs) = (guest.kernel.clone(), guest.initramfs.clone());
    let hashed = tokio::task::spawn_blocking(move || {
        let hash = |path: &PathBuf| hash_file(path).map_err(|error| ImageError::Hash(error.to_string()));
        Ok(GuestImage { kernel_digest: hash(&kernel)?, initramfs_digest: hash(&initramfs)? })
    });
    hashed.await.map_err(|error| ImageError::Hash(error.to_string()))?
}
