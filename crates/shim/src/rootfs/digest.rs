//! What an image is named by.
//!
//! | digest | of | images |
//! |---|---|---|
//! | `sha256:<hex>` | all bytes | EROFS |
//! | `sparse-sha256:<hex>` | the length, and every block of 4 KiB that is not all zeros, with its number | a whole ext4 |
//!
//! A file system of 10 GiB with 100 MiB in it costs 100 MiB to hash the second way, whether its zeros are holes or were
//! written. Both say the same of two files: equal digests, equal bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};

use super::RootfsError;

const WHOLE: &str = "sha256:";
const SPARSE: &str = "sparse-sha256:";
/// What is left out as a whole when it is zero, bytes. Part of the digest.
const BLOCK: usize = 4096;
/// First of what is hashed in the sparse way.
const LABEL: &[u8] = b"dunlin sparse image 1\n";

/// Of which bytes a digest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// `sha256:`
    Whole,
    /// `sparse-sha256:`
    Sparse,
}

impl Scheme {
    /// The scheme of a digest and its 64 hex digits. None: it is no digest.
    pub(crate) fn of(digest: &str) -> Option<(Scheme, &str)> {
        let (scheme, hex) = match digest.strip_prefix(WHOLE) {
            Some(hex) => (Scheme::Whole, hex),
            None => (Scheme::Sparse, digest.strip_prefix(SPARSE)?),
        };
        let valid = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        valid.then_some((scheme, hex))
    }

    /// Where a store has the image of a digest, below its root.
    pub(crate) fn place(self, hex: &str) -> PathBuf {
        match self {
            Scheme::Whole => Path::new("sha256").join(format!("{hex}.erofs")),
            Scheme::Sparse => Path::new("sparse-sha256").join(format!("{hex}.ext4")),
        }
    }

    /// A file's digest.
    pub(crate) fn hash(self, path: &Path) -> Result<String, RootfsError> {
        let hashed = File::open(path).and_then(|mut file| match self {
            Scheme::Whole => Ok(format!("{WHOLE}{}", hex(&whole(&mut file)?))),
            Scheme::Sparse => Ok(format!("{SPARSE}{}", hex(&sparse(&file)?))),
        });
        hashed.map_err(|source| RootfsError::Store { path: path.to_owned(), source })
    }
}

/// Whether an image is known by its blocks that are not zeros, as the files of whole root file systems are.
pub(crate) fn is_sparse(digest: &str) -> bool {
    digest.starts_with(SPARSE)
}

/// `sha256:<hex>` of all of a file's bytes.
pub(crate) fn hash_file(path: &Path) -> Result<String, RootfsError> {
    Scheme::Whole.hash(path)
}

fn whole(file: &mut File) -> io::Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hasher.finalize().to_vec());
        }
        hasher.update(&buffer[..read]);
    }
}

fn sparse(file: &File) -> io::Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    hasher.update(LABEL);
    hasher.update(file.metadata()?.len().to_le_bytes());
    let block = BLOCK as u64;
    let mut buffer = vec![0; 256 * BLOCK];
    let mut number = 0;
    while let Some(data) = next_data(file, number * block)? {
        number = data / block;
        let read = read_full_at(file, &mut buffer, number * block)?;
        if read == 0 {
            break;
        }
        // The last block of a file may be short: the length is in the digest already.
        let end = read.next_multiple_of(BLOCK);
        buffer[read..end].fill(0);
        for bytes in buffer[..end].chunks_exact(BLOCK) {
            if bytes != [0; BLOCK] {
                hasher.update(number.to_le_bytes());
                hasher.update(bytes);
            }
            number += 1;
        }
    }
    Ok(hasher.finalize().to_vec())
}

/// Where the first data at or behind an offset are; None: only a hole follows.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match lseek(file, i64::try_from(offset).map_err(io::Error::other)?, Whence::SeekData) {
        Ok(found) => Ok(Some(u64::try_from(found).unwrap_or(offset))),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Fewer bytes than the buffer has only at the file's end.
fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_digest_says_its_scheme_and_its_place() {
        let digits = "0123456789abcdef".repeat(4);
        let of = |text: &str| Scheme::of(&format!("{text}{digits}")).map(|(scheme, hex)| scheme.place(hex));
        assert_eq!(of("sha256:"), Some(format!("sha256/{digits}.erofs").into()));
        assert_eq!(of("sparse-sha256:"), Some(format!("sparse-sha256/{digits}.ext4").into()));
        assert_eq!((of(""), of("md5:"), of("sha256:../")), (None, None, None));
        assert_eq!(Scheme::of("sparse-sha256:zz"), None);
    }

    #[test]
    fn holes_and_written_zeros_are_the_same_bytes() {
        let at = tempfile::tempdir().unwrap();
        let [holes, written] = ["holes", "written"].map(|name| at.path().join(name));
        // Data at a block's edge, inside of one, and in the short last one.
        let mut bytes = vec![0; (1 << 20) * 3 + 100];
        for place in [0, 4095, 1 << 20, (2 << 20) + 5000, (3 << 20) + 99] {
            bytes[place] = 7;
        }
        std::fs::write(&written, &bytes).unwrap();
        let file = File::create(&holes).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (place, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            file.write_all_at(&[*byte], place as u64).unwrap();
        }
        assert!(holes.metadata().unwrap().blocks() < written.metadata().unwrap().blocks(), "it has holes");
        let digest = Scheme::Sparse.hash(&holes).unwrap();
        assert_eq!(digest, Scheme::Sparse.hash(&written).unwrap());
        // The definition, done another way.
        let mut hasher = Sha256::new();
        hasher.update(LABEL);
        hasher.update((bytes.len() as u64).to_le_bytes());
        for (number, block) in bytes.chunks(BLOCK).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0)) {
            hasher.update((number as u64).to_le_bytes());
            hasher.update([block, &vec![0; BLOCK - block.len()]].concat());
        }
        assert_eq!(digest, format!("sparse-sha256:{}", hex(&hasher.finalize())));
    }

    #[test]
    fn other_bytes_another_place_or_another_length_are_another_digest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hash = |length: u64, place: u64, byte: u8| {
            file.as_file().set_len(0).unwrap();
            file.as_file().set_len(length).unwrap();
            file.as_file().write_all_at(&[byte], place).unwrap();
            Scheme::Sparse.hash(file.path()).unwrap()
        };
        let digests = [
            hash(1 << 20, 8192, 1),
            hash(1 << 20, 8192, 2),
            hash(1 << 20, 12288, 1),
            hash(1 << 20, 8193, 1),
            hash((1 << 20) + 1, 8192, 1),
            hash(1 << 20, 8192, 0),
        ];
        let different: std::collections::BTreeSet<_> = digests.iter().collect();
        assert_eq!(different.len(), digests.len());
    }

    #[test]
    fn a_file_of_holes_costs_next_to_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        file.as_file().write_all_at(b"x", 1 << 39).unwrap();
        let since = Instant::now();
        Scheme::Sparse.hash(file.path()).unwrap();
        // A terabyte that is read takes minutes.
        assert!(since.elapsed().as_secs() < 10, "{:?}", since.elapsed());
    }
}
