//! Which file system is on a disk.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use super::StorageError;

/// File systems that the guest mounts from disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// Writable scratch disks, and read-only ones.
    Ext4,
    /// Read-only layers.
    Erofs,
}

impl Filesystem {
    /// By the name that mount(2) uses.
    pub fn parse(name: &str) -> Result<Filesystem, StorageError> {
        match name {
            "ext4" => Ok(Filesystem::Ext4),
            "erofs" => Ok(Filesystem::Erofs),
            other => Err(StorageError::UnsupportedFilesystem(other.to_owned())),
        }
    }

    /// The name that mount(2) uses.
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Erofs => "erofs",
        }
    }

    /// Reads the superblock's magic number.
    pub fn probe(device: &Path) -> Result<Filesystem, StorageError> {
        let found = File::open(device).and_then(probe).map_err(StorageError::at("read", device))?;
        found.ok_or_else(|| StorageError::UnknownFilesystem(device.to_owned()))
    }
}

/// Both superblocks begin at byte 1024: erofs has its magic at their start, ext4 56 bytes in.
fn probe(mut disk: impl Read + Seek) -> io::Result<Option<Filesystem>> {
    let mut block = [0u8; 64];
    disk.seek(SeekFrom::Start(1024))?;
    match disk.read_exact(&mut block) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        done => done?,
    }
    Ok(if block[..4] == 0xE0F5_E1E2u32.to_le_bytes() {
        Some(Filesystem::Erofs)
    } else if block[56..58] == 0xEF53u16.to_le_bytes() {
        Some(Filesystem::Ext4)
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn knows_both_by_their_magic() {
        let mut image = vec![0u8; 4096];
        assert_eq!(probe(Cursor::new(&image)).unwrap(), None);
        image[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
        assert_eq!(probe(Cursor::new(&image)).unwrap(), Some(Filesystem::Erofs));
        image[1024..1028].fill(0);
        image[1080..1082].copy_from_slice(&[0x53, 0xEF]);
        assert_eq!(probe(Cursor::new(&image)).unwrap(), Some(Filesystem::Ext4));
        assert_eq!(probe(Cursor::new(&image[..1060])).unwrap(), None);
    }
}
