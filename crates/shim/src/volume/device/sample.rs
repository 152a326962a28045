//! Looks at a device in places: all of a small one; of a large one its start, its end and many places between.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

/// Up to this size everything is read, bytes.
const WHOLE: u64 = 64 << 20;
/// At either end, where file systems and partition tables have theirs.
const END: u64 = 4 << 20;
/// Places between the ends, each of [`PLACE`] bytes: a disk with spindles takes 8 s for them.
const PLACES: u64 = 1024;
const PLACE: u64 = 16 << 10;
const BUFFER: usize = 1 << 20;

/// What was seen.
pub(super) struct Sample {
    pub(super) size_bytes: u64,
    /// SHA-256 over size and what was read, hexadecimal.
    pub(super) hash: String,
    /// The first byte that is not zero, of those that were read.
    pub(super) first_data: Option<u64>,
}

pub(super) fn take(mut device: &File) -> io::Result<Sample> {
    let size_bytes = device.seek(SeekFrom::End(0))?;
    let mut hash = Sha256::new();
    hash.update(size_bytes.to_le_bytes());
    let mut first_data = None;
    let mut buffer = vec![0; BUFFER];
    for (start, length) in ranges(size_bytes) {
        let mut offset = start;
        while offset < start + length {
            let wanted = usize::try_from(start + length - offset).map_or(BUFFER, |left| left.min(BUFFER));
            let read = &mut buffer[..wanted];
            device.read_exact_at(read, offset)?;
            hash.update(&*read);
            if first_data.is_none() {
                let at = read.iter().position(|byte| *byte != 0);
                first_data = at.map(|at| offset + at as u64);
            }
            offset += wanted as u64;
        }
    }
    let hash = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Sample { size_bytes, hash, first_data })
}

/// Start and length of what is read, in order.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= WHOLE {
        return vec![(0, size)];
    }
    let between = size - 2 * END - PLACE;
    let place = |number: u64| {
        let offset = u128::from(between) * u128::from(number) / u128::from(PLACES - 1);
        // A page's start: file systems begin things there.
        (END + u64::try_from(offset).unwrap_or(0) / 4096 * 4096, PLACE)
    };
    let mut ranges = vec![(0, END)];
    ranges.extend((0..PLACES).map(place));
    ranges.push((size - END, END));
    ranges
}

/// What is known by its first bytes: offset, bytes, and what has them there.
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

/// In words: for the refusal's sake, and not what tells an empty device from another.
pub(super) fn signature(device: &File) -> io::Result<Option<&'static str>> {
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
    use super::*;

    #[test]
    fn ranges_are_in_order_within_the_device_and_at_its_ends() {
        for size in [0, 512, WHOLE, WHOLE + 512, (1 << 30) + 4096, 3 << 40] {
            let ranges = ranges(size);
            assert_eq!(ranges[0].0, 0);
            let mut end = 0;
            for (start, length) in &ranges {
                assert!(*start >= end, "{size}: {start} after {end}");
                end = start + length;
                assert!(end <= size, "{size}: {end}");
            }
            assert_eq!(end, size, "up to the last byte");
        }
    }

    #[test]
    fn a_byte_anywhere_in_a_small_device_and_at_the_ends_of_a_large_one_is_seen() {
        for (size, at) in
            [(4096, 0), (4096, 4095), (WHOLE, WHOLE / 2 + 1), (WHOLE * 2, 5), (WHOLE * 2, WHOLE * 2 - 1)]
        {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            let empty = take(&file).unwrap();
            assert_eq!((empty.size_bytes, empty.first_data), (size, None));
            file.write_all_at(b"x", at).unwrap();
            let written = take(&file).unwrap();
            assert_eq!(written.first_data, Some(at));
            assert_ne!(written.hash, empty.hash);
        }
    }

    #[test]
    fn what_is_on_a_device_is_known_by_its_signature() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(signature(&file).unwrap(), None);
        for (offset, bytes, what) in SIGNATURES {
            file.set_len(0).unwrap();
            file.set_len(1 << 20).unwrap();
            assert_eq!(signature(&file).unwrap(), None);
            file.write_all_at(bytes, offset).unwrap();
            assert_eq!(signature(&file).unwrap(), Some(what));
        }
    }
}
