//! Disk images and block devices of this host: what is to be known of one before a machine gets it. Nothing is mounted here.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
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

/// Destination: whether a mount's source is a block device here, which a mirror may be written to: it is as long as the
/// source's, and nothing is known to be on it.
pub(crate) async fn is_free_device(mount: &Mount, size_bytes: u64) -> Result<bool, VolumeError> {
    let path = PathBuf::from(&mount.source);
    let (host, destination) = (mount.source.clone(), mount.destination.clone());
    let looked = at_leisure(mount, move || {
        let is_device = |meta: &Metadata| meta.file_type().is_block_device();
        if !std::fs::metadata(&path).is_ok_and(|meta| is_device(&meta)) {
            return Ok(None);
        }
        Ok(Some((size(&path)?, signature(&File::open(&path)?)?)))
    });
    match looked.await? {
        None => Ok(false),
        Some((here, _)) if here != size_bytes => {
            Err(VolumeError::DeviceSize { host, destination, here, there: size_bytes })
        }
        Some((_, Some(what))) => Err(VolumeError::DeviceInUse { host, destination, what }),
        Some((_, None)) => Ok(true),
    }
}

async fn at_leisure<T: Send + 'static>(
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

/// What marks a device as in use: offset, bytes, and what has them there.
const SIGNATURES: [(u64, &[u8], &str); 20] = [
    (0, b"XFSB", "an XFS file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"\xfc\x4e\x2b\xa9", "a RAID member"),
    (3, b"NTFS    ", "an NTFS file system"),
    (54, b"FAT1", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (510, b"\x55\xaa", "a partition table"),
    (512, b"EFI PART", "a partition table"),
    (512, b"LABELONE", "an LVM volume"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS image"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (1080, b"\x53\xef", "an ext file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (4096, b"EFI PART", "a partition table"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID member"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
    (32769, b"CD001", "an ISO 9660 image"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
];

fn signature(device: &File) -> io::Result<Option<&'static str>> {
    for (offset, bytes, what) in SIGNATURES {
        let mut found = vec![0; bytes.len()];
        match device.read_exact_at(&mut found, offset) {
            Ok(()) if found == bytes => return Ok(Some(what)),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
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
        assert!(!is_free_device(&mount(&path), 4096).await.unwrap(), "a file is no device");
    }

    #[test]
    fn what_is_on_a_device_is_known_by_its_signature() {
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(signature(&file).unwrap(), None);
        for (offset, bytes, what) in SIGNATURES {
            file.set_len(0).unwrap();
            file.set_len(1 << 20).unwrap();
            assert_eq!(signature(&file).unwrap(), None);
            file.write_all_at(bytes, offset).unwrap();
            assert_eq!(signature(&file).unwrap(), Some(what));
        }
        file.seek(SeekFrom::Start(0)).unwrap();
    }
}
