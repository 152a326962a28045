//! A part of an image as it goes to another host: data, and how many zeros stand before them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Zeros that are written and no hole have to be read to be seen: at most so many bytes for one answer.
const LOOKED_AT: u64 = 64 << 20;
/// Zeros are left out in pages, bytes.
const PAGE: usize = 4096;

/// From an offset on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// So many bytes are zeros.
    pub(crate) zeros: u64,
    /// What stands behind them; empty at the image's end, or when zeros are all that was looked at.
    pub(crate) data: Vec<u8>,
    /// Of the whole image.
    pub(crate) size_bytes: u64,
}

impl Piece {
    /// `length`: most of the data, bytes. Not `sparse`: zeros are data.
    pub(crate) fn read(file: &File, offset: u64, length: u32, sparse: bool) -> io::Result<Piece> {
        // Its metadata says nothing of a block device's size.
        let size_bytes = (&*file).seek(SeekFrom::End(0))?;
        let mut at = offset;
        let mut looked_at = 0;
        while at < size_bytes && length > 0 && looked_at < LOOKED_AT {
            if sparse {
                at = data_from(file, at)?.unwrap_or(size_bytes).min(size_bytes);
            }
            let wanted = (size_bytes - at).min(length.into());
            let mut data = vec![0; usize::try_from(wanted).map_err(io::Error::other)?];
            file.read_exact_at(&mut data, at)?;
            let (before, end) = if sparse { without_zeros(&data) } else { (0, data.len()) };
            at += before as u64;
            if before < end {
                data.truncate(end);
                data.drain(..before);
                return Ok(Piece { zeros: at - offset, data, size_bytes });
            }
            looked_at += wanted;
        }
        Ok(Piece { zeros: at.saturating_sub(offset), data: Vec::new(), size_bytes })
    }
}

/// Where the data begin and end in what was read; both at its end when all of it is zeros.
fn without_zeros(data: &[u8]) -> (usize, usize) {
    let filled = |page: &&[u8]| **page != [0; PAGE][..page.len()];
    let before: usize = data.chunks(PAGE).take_while(|page| !filled(page)).map(<[u8]>::len).sum();
    let pages = data.chunks(PAGE).rev();
    let behind: usize = pages.take_while(|page| !filled(page)).map(<[u8]>::len).sum();
    if before == data.len() { (before, before) } else { (before, data.len() - behind) }
}

/// Where the first data at or behind an offset are; None: only a hole follows.
fn data_from(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match lseek(file, i64::try_from(offset).map_err(io::Error::other)?, Whence::SeekData) {
        Ok(found) => Ok(Some(u64::try_from(found).unwrap_or(offset))),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u32 = 1 << 20;

    /// Reads all of it, as a destination does; what came as data, and all bytes.
    fn all(file: &File, sparse: bool) -> (u64, Vec<u8>) {
        let (mut data, mut bytes) = (0, Vec::new());
        loop {
            let piece = Piece::read(file, bytes.len() as u64, CHUNK, sparse).unwrap();
            assert!(piece.data.len() <= CHUNK as usize);
            data += piece.data.len() as u64;
            bytes.resize(bytes.len() + usize::try_from(piece.zeros).unwrap(), 0);
            bytes.extend(piece.data);
            if bytes.len() as u64 >= piece.size_bytes {
                return (data, bytes);
            }
        }
    }

    #[test]
    fn zeros_are_told_and_not_given_whether_they_were_written_or_not() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; (8 << 20) + 10];
        for place in [5000, 3 << 20, (3 << 20) + 9000, (8 << 20) + 9] {
            bytes[place] = 1;
        }
        file.write_all_at(&bytes, 0).unwrap();
        let holes = tempfile::tempfile().unwrap();
        holes.set_len(bytes.len() as u64).unwrap();
        for (place, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            holes.write_all_at(&[*byte], place as u64).unwrap();
        }
        for file in [&file, &holes] {
            let (data, found) = all(file, true);
            assert!(found == bytes);
            // The page of the first, three with the next two, the short one at the end.
            assert!(data <= 4 * 4096 + 10, "{data} bytes were given");
            let (data, found) = all(file, false);
            assert!(found == bytes && data == bytes.len() as u64);
        }
    }

    #[test]
    fn an_answer_ends_though_the_zeros_do_not() {
        let file = tempfile::tempfile().unwrap();
        let written = LOOKED_AT + (2 << 20);
        for offset in (0..written).step_by(CHUNK as usize) {
            file.write_all_at(&[0; CHUNK as usize], offset).unwrap();
        }
        let first = Piece::read(&file, 0, CHUNK, true).unwrap();
        assert_eq!(first, Piece { zeros: LOOKED_AT, data: Vec::new(), size_bytes: written });
        let rest = Piece::read(&file, LOOKED_AT, CHUNK, true).unwrap();
        assert_eq!(rest.zeros, 2 << 20);
        // A hole costs nothing, however long.
        file.set_len(1 << 40).unwrap();
        file.set_len(0).unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(Piece::read(&file, 10, CHUNK, true).unwrap().zeros, (1 << 40) - 10);
    }

    #[test]
    fn behind_the_end_is_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"abc", 0).unwrap();
        for sparse in [false, true] {
            let at = |offset| Piece::read(&file, offset, CHUNK, sparse).unwrap();
            assert_eq!(at(1), Piece { zeros: 0, data: b"bc".to_vec(), size_bytes: 3 });
            assert_eq!(at(3), Piece { zeros: 0, data: Vec::new(), size_bytes: 3 });
            assert_eq!(at(u64::MAX), Piece { zeros: 0, data: Vec::new(), size_bytes: 3 });
            assert_eq!(Piece::read(&file, 0, 0, sparse).unwrap().data.len(), 0, "nothing was asked for");
        }
    }
}
