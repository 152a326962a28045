//! What is written down of a device: in JSON, one file a device, for whoever looks at the host as well.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dunlin_wire::ids::ReservationId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Mark;

/// How a device's content came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// The volume moved to another host: what is here is old.
    Left,
    /// A move to here failed: what is here is half a copy.
    Half,
}

/// A device's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) device: PathBuf,
    /// The reservations of the volume's disk.
    pub(crate) volumes: Vec<ReservationId>,
    pub(crate) state: State,
    pub(crate) mark: Option<Mark>,
}

/// The records of this host.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    directory: PathBuf,
}

impl Records {
    pub(crate) fn new(data_dir: &Path) -> Records {
        Records { directory: data_dir.join("left") }
    }

    fn path(&self, device: &Path) -> PathBuf {
        let hash = Sha256::digest(device.as_os_str().as_bytes());
        let hex: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        self.directory.join(format!("{hex}.json"))
    }

    /// None: nothing is known of the device, or nothing that can be read.
    pub(crate) fn of(&self, device: &Path) -> Option<Record> {
        let text = std::fs::read(self.path(device)).ok()?;
        serde_json::from_slice::<Record>(&text).ok().filter(|record| record.device == device)
    }

    /// Notes that a device, which no machine has any more, holds what `volumes` left. Blocks.
    pub(crate) fn note(&self, device: &Path, volumes: Vec<ReservationId>, state: State) -> io::Result<()> {
        let mark = super::look(device)?.mark;
        let record = Record { device: device.to_owned(), volumes, state, mark };
        std::fs::create_dir_all(&self.directory)?;
        let path = self.path(device);
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, serde_json::to_vec_pretty(&record)?)?;
        std::fs::rename(temporary, path)
    }

    /// The device is a volume of this host's again. Nothing there is no error.
    pub(crate) fn forget(&self, device: &Path) -> io::Result<()> {
        match std::fs::remove_file(self.path(device)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_of_one_device_and_goes_with_it() {
        let at = tempfile::tempdir().unwrap();
        let records = Records::new(at.path());
        let (one, two) = (at.path().join("one"), at.path().join("two"));
        std::fs::write(&one, vec![0; 4096]).unwrap();
        let volume = ReservationId::new("00000000-0000-0000-0000-000000000001").unwrap();
        assert_eq!(records.of(&one), None);
        records.forget(&one).unwrap();
        records.note(&one, vec![volume], State::Left).unwrap();
        let record = records.of(&one).unwrap();
        assert_eq!((record.volumes, record.state), (vec![volume], State::Left));
        assert_eq!(records.of(&two), None);
        assert!(records.note(&two, Vec::new(), State::Half).is_err(), "there is no such device");
        records.forget(&one).unwrap();
        assert_eq!(records.of(&one), None);
        std::fs::write(records.path(&one), "{}").unwrap();
        assert_eq!(records.of(&one), None, "what cannot be read says nothing");
    }
}
