//! Disk images and block devices of this host: what is to be known of one before a machine gets it. Nothing is mounted here.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::VolumeError;
use super::mount::Mount;
use super::plan::Filesystem;
use crate::device::scsi::disk::{Disk, Keeper, Storage};

/// How a machine gets a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    /// None: as a device.
    pub(crate) filesystem: Option<Filesystem>,
    pub(crate) read_only: bool,
}

/// The disk that a mount names, for the machine's table. A read-only one is known by its digest, for which all of it is read.
pub(crate) async fn open(mount: &Mount, wanted: Use, shared: &[PathBuf]) -> Result<Disk, VolumeError> {
    let path = PathBuf::from(&mount.source);
    let read = at_leisure(mount, move || {
        let path = std::fs::canonicalize(path)?;
        let size_bytes = size(&path)?;
        let digest = if wanted.read_only { Some(digest(&path)?) } else { None };
        Ok((path, size_bytes, digest))
    });
    let (path, size_bytes, digest) = read.await?;
    let storage = Storage::of(&path, shared);
    let mut disk = match digest {
        Some(digest) => Disk::image(path, size_bytes, digest),
        None => Disk::writable(path, size_bytes, storage, Keeper::Host),
    };
    match wanted.filesystem {
        Some(filesystem) => disk = disk.with_filesystem(filesystem.name()),
        None => {
            disk = disk.with_filesystem("");
            disk.mount.block_device = true;
        }
    }
    Ok(disk)
}

/// Destination: the digest of a read-only disk here.
pub(crate) async fn digest_of(mount: &Mount) -> Result<String, VolumeError> {
    let path = PathBuf::from(&mount.source);
    at_leisure(mount, move || digest(&path)).await
}

pub(crate) async fn at_leisure<T: Send + 'static>(
    mount: &Mount,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, VolumeError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other).and_then(|done| done);
    let (host, destination) = (mount.source.clone(), mount.destination.clone());
    done.map_err(|source| VolumeError::Disk { host, destination, source })
}

/// Of a file, or of a device, which says nothing about itself to stat(2).
fn size(path: &Path) -> io::Result<u64> {
    File::open(path)?.seek(SeekFrom::End(0))
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mount(path: &Path) -> Mount {
        Mount::read(&json!({"destination": "/data", "type": "ext4", "source": path}))
    }

    #[tokio::test]
    async fn a_disk_is_known_by_its_size_and_a_read_only_one_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let ext4 = |read_only| Use { filesystem: Some(Filesystem::Ext4), read_only };
        let writable = open(&mount(&path), ext4(false), &[]).await.unwrap();
        assert_eq!((writable.size_bytes, writable.read_only(), writable.keeper), (4096, false, Keeper::Host));
        assert_eq!((writable.filesystem.as_str(), writable.storage), ("ext4", Storage::Local));
        let shared = open(&mount(&path), ext4(false), &[dir.path().to_owned()]).await.unwrap();
        assert_eq!(shared.storage, Storage::Shared);
        let image = open(&mount(&path), ext4(true), &[]).await.unwrap();
        let digest = "sha256:ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7";
        assert_eq!(image.content, crate::device::scsi::Content::Image { digest: digest.into() });
        assert_eq!(digest_of(&mount(&path)).await.unwrap(), digest);
        let device = open(&mount(&path), Use { filesystem: None, read_only: false }, &[]).await.unwrap();
        assert!(device.mount.block_device && device.filesystem.is_empty());
        let missing =
            open(&mount(&dir.path().join("absent")), ext4(false), &[]).await.unwrap_err().to_string();
        assert!(missing.contains("absent") && missing.contains("/data"), "{missing}");
    }
}
