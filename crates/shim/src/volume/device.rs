//! Block devices of this host that a volume arrives on or has left.
//!
//! Other than a file a device cannot be made for an arrival or renamed behind it: what is on it is written over. So it is
//! only taken when nothing can be lost ([`judge`], pure):
//!
//! | what is there | may be written over |
//! |---|---|
//! | zeroes wherever it was looked ([`sample`]) | yes |
//! | what this very volume has left, or half of a copy of it, and nothing was written since | yes |
//! | anything, on a device in `volumes.overwrite` of this host's configuration | yes |
//! | anything else; a device that this host uses | no |
//!
//! That nothing was written is known by a [`Mark`]: the kernel's count of the sectors that were written to the device since
//! it appeared, together with a hash over the samples. It ends with a reboot, after which nobody knows.
//! The records lie in `<data_dir>/left`, one a device.

mod record;
mod sample;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use dunlin_wire::ids::ReservationId;
use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

pub(crate) use record::{Record, Records, State};
use sample::Sample;

/// A state of a device that no write to it leaves as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The kernel's id of its boot.
    boot: String,
    /// The kernel's number of this appearance of the device, unique in a boot.
    appearance: u64,
    /// 512 bytes each.
    sectors_written: u64,
    sectors_discarded: u64,
    /// Over the samples, hexadecimal.
    sample: String,
}

/// A device as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) size_bytes: u64,
    content: Content,
    /// None: the kernel does not count what is written to it.
    mark: Option<Mark>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Zeroes,
    /// Of a known kind, in words.
    Known(&'static str),
    /// At this byte at the earliest, of those that were looked at.
    Data(u64),
}

/// Whether `path` is a block device; its canonical name, by which it is recorded.
pub(crate) fn named(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    path.metadata().is_ok_and(|meta| meta.file_type().is_block_device()).then_some(path)
}

/// Blocks. An error of the kind `ResourceBusy`: it is mounted here, or part of something that is.
pub(crate) fn look(device: &Path) -> io::Result<Found> {
    let file = File::options().read(true).custom_flags(libc::O_EXCL).open(device)?;
    look_at(&file)
}

/// Blocks. Nothing of this host may write to it meanwhile.
fn look_at(file: &File) -> io::Result<Found> {
    // What is still in memory counts when it is written, which is now.
    file.sync_all()?;
    let Sample { size_bytes, hash, first_data } = sample::take(file)?;
    let content = match (sample::signature(file)?, first_data) {
        (Some(what), _) => Content::Known(what),
        (None, Some(offset)) => Content::Data(offset),
        (None, None) => Content::Zeroes,
    };
    let mark = counts(file).ok().flatten().map(|(boot, appearance, written, discarded)| Mark {
        boot,
        appearance,
        sectors_written: written,
        sectors_discarded: discarded,
        sample: hash,
    });
    Ok(Found { size_bytes, content, mark })
}

/// The boot's id, the device's appearance, sectors written and discarded. None: they are not counted.
fn counts(device: &File) -> io::Result<Option<(String, u64, u64, u64)>> {
    let number = device.metadata()?.rdev();
    let at = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    // A partition has these in its disk's directory.
    let of_disk = |name: &str| {
        let own = std::fs::read_to_string(at.join(name));
        own.or_else(|_| std::fs::read_to_string(at.canonicalize()?.join("..").join(name)))
    };
    if of_disk("queue/iostats")?.trim() != "1" {
        return Ok(None);
    }
    let appearance = of_disk("diskseq")?.trim().parse().map_err(io::Error::other)?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let stat = std::fs::read_to_string(at.join("stat"))?;
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // Documentation/block/stat.rst: write sectors are the 7th, discard sectors the 14th.
    Ok(fields.get(6).zip(fields.get(13)).map(|(written, discarded)| (boot, appearance, *written, *discarded)))
}

/// Whether a volume of `size_bytes`, known by any of `volumes`, may arrive on a device; or what would be lost.
pub(crate) fn judge(
    found: &Found,
    record: Option<&Record>,
    volumes: &[ReservationId],
    overwrite: bool,
) -> Result<(), String> {
    if overwrite || found.content == Content::Zeroes {
        return Ok(());
    }
    let there = match found.content {
        Content::Zeroes => "nothing".to_owned(),
        Content::Known(what) => what.to_owned(),
        Content::Data(offset) => format!("data (at byte {offset})"),
    };
    let Some(record) = record else { return Err(there) };
    let same = volumes.iter().any(|volume| record.volumes.contains(volume));
    let untouched = found.mark.is_some() && found.mark == record.mark;
    match (record.state, same, untouched) {
        (_, true, true) => Ok(()),
        (State::Left, false, true) => Err(format!("{there}, which another volume left when it moved away")),
        (State::Half, false, true) => Err(format!("{there}, half of a copy of another volume")),
        (State::Left, _, false) => {
            Err(format!("{there}; a volume left the device, but it is not known to be as it was left"))
        }
        (State::Half, _, false) => {
            Err(format!("{there}; a copy broke off here, but the device is not known to be as it was then"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(digit: char) -> ReservationId {
        ReservationId::new("00000000-0000-0000-0000-00000000000x".replace('x', &digit.to_string())).unwrap()
    }

    fn mark(written: u64) -> Mark {
        let (boot, sample) = ("b".to_owned(), "s".to_owned());
        Mark { boot, appearance: 3, sectors_written: written, sectors_discarded: 0, sample }
    }

    fn found(content: Content) -> Found {
        Found { size_bytes: 4096, content, mark: Some(mark(8)) }
    }

    fn record(state: State) -> Record {
        Record {
            device: "/dev/x".into(),
            volumes: vec![volume('1'), volume('2')],
            state,
            mark: Some(mark(8)),
        }
    }

    #[test]
    fn an_empty_device_is_free_and_data_is_not() {
        assert_eq!(judge(&found(Content::Zeroes), None, &[], false), Ok(()));
        for (content, said) in [(Content::Known("an XFS file system"), "XFS"), (Content::Data(77), "byte 77")]
        {
            let refused = judge(&found(content.clone()), None, &[volume('1')], false).unwrap_err();
            assert!(refused.contains(said), "{refused}");
            assert_eq!(judge(&found(content), None, &[], true), Ok(()), "the host's owner has said so");
        }
    }

    #[test]
    fn a_volume_comes_back_to_what_it_left_and_nobody_changed() {
        let there = found(Content::Known("an ext file system"));
        for state in [State::Left, State::Half] {
            assert_eq!(judge(&there, Some(&record(state)), &[volume('2')], false), Ok(()));
            // Another volume; written to; another boot; never counted; a shim that died over it.
            assert!(judge(&there, Some(&record(state)), &[volume('3')], false).is_err());
            let other_boot = Mark { boot: "c".to_owned(), ..mark(8) };
            let other_sample = Mark { sample: "t".to_owned(), ..mark(8) };
            for mark in [Some(mark(9)), Some(other_boot), Some(other_sample), None] {
                let now = Found { mark: mark.clone(), ..there.clone() };
                let refused = judge(&now, Some(&record(state)), &[volume('1')], false).unwrap_err();
                assert!(refused.contains("not known"), "{refused}");
                let without = Record { mark: None, ..record(state) };
                assert!(judge(&now, Some(&without), &[volume('1')], false).is_err(), "{mark:?}");
            }
        }
    }

    #[test]
    fn only_a_block_device_has_such_a_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null"), Path::new("/no/such")] {
            assert_eq!(named(path), None, "{}", path.display());
        }
        assert!(look(Path::new("/no/such")).is_err());
        // A file's writes are counted by nobody.
        file.as_file().set_len(1 << 20).unwrap();
        let found = look_at(file.as_file()).unwrap();
        assert_eq!(found, Found { size_bytes: 1 << 20, content: Content::Zeroes, mark: None });
    }
}
