//! Source: the images of the moves that leave.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use dunlin_wire::tree::{DiskAccess, SavedTree};

use super::CHUNK;
use super::piece::Piece;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// No such move.
    #[error("no move with session {0} leaves this host; begin a new one")]
    Unknown(String),
    /// Another node's move.
    #[error("session {session} goes to node {to}, not to {caller}")]
    NotYours {
        /// The session.
        session: String,
        /// Where it goes.
        to: String,
        /// Who asks.
        caller: String,
    },
    /// No disk of what moves.
    #[error("session {session} has no read-only disk with the digest {digest}")]
    NoImage {
        /// The session.
        session: String,
        /// As asked.
        digest: String,
    },
    /// The file.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The image.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
}

#[derive(Debug)]
struct Export {
    to: String,
    files: BTreeMap<String, PathBuf>,
}

/// What can be read by whom.
#[derive(Debug, Clone, Default)]
pub(crate) struct Exports {
    table: Arc<Mutex<HashMap<String, Export>>>,
}

/// A move's images, which can be read as long as this lives.
#[derive(Debug)]
pub(crate) struct Exported {
    exports: Exports,
    session: String,
}

impl Drop for Exported {
    fn drop(&mut self) {
        self.exports.table.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.session);
    }
}

impl Exports {
    /// Lets node `to` read the images of what its shim has just exported. Their paths are this host's own.
    pub(crate) fn open(&self, session: &str, to: &str, tree: &SavedTree) -> Exported {
        let files = tree.vm.scsi.disks.values().filter_map(|disk| match &disk.access {
            DiskAccess::ReadOnly { digest } => Some((digest.to_string(), PathBuf::from(&disk.source_path))),
            DiskAccess::Writable | DiskAccess::Shared { .. } => None,
        });
        let export = Export { to: to.into(), files: files.collect() };
        self.table.lock().unwrap_or_else(PoisonError::into_inner).insert(session.into(), export);
        Exported { exports: self.clone(), session: session.into() }
    }

    /// Whether the move leaves from here.
    pub(crate) fn holds(&self, session: &str) -> bool {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).contains_key(session)
    }

    /// What stands in an image from `offset` on, with up to `length` bytes of data. Blocks while the disk is read.
    /// `sparse`: zeros are told and not given.
    pub(crate) fn read(
        &self,
        session: &str,
        caller: &str,
        digest: &str,
        offset: u64,
        length: u32,
        sparse: bool,
    ) -> Result<Piece, ExportError> {
        let path = {
            let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            let export = table.get(session).ok_or_else(|| ExportError::Unknown(session.into()))?;
            if export.to != caller {
                let (session, to) = (session.into(), export.to.clone());
                return Err(ExportError::NotYours { session, to, caller: caller.into() });
            }
            let missing = || ExportError::NoImage { session: session.into(), digest: digest.into() };
            export.files.get(digest).cloned().ok_or_else(missing)?
        };
        let failed = |source| ExportError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        Piece::read(&file, offset, length.min(CHUNK), sparse).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_images_of_a_move_and_only_for_its_destination() {
        let at = tempfile::tempdir().unwrap();
        let file = at.path().join("image");
        std::fs::write(&file, vec![7; 3 << 20]).unwrap();
        let exports = Exports::default();
        let files = BTreeMap::from([("sha256:aa".to_owned(), file.clone())]);
        exports.table.lock().unwrap().insert("s".into(), Export { to: "b".into(), files });
        let open = Exported { exports: exports.clone(), session: "s".into() };
        let read = |caller, digest, offset, length| exports.read("s", caller, digest, offset, length, false);
        let piece = read("b", "sha256:aa", (3 << 20) - 10, CHUNK).unwrap();
        assert_eq!((piece.data, piece.size_bytes), (vec![7; 10], 3 << 20));
        assert_eq!(read("b", "sha256:aa", 0, u32::MAX).unwrap().data.len(), 1 << 20, "an answer is bounded");
        assert_eq!(read("b", "sha256:aa", 4 << 20, 10).unwrap().data.len(), 0);
        assert!(matches!(read("c", "sha256:aa", 0, 1), Err(ExportError::NotYours { .. })));
        assert!(matches!(read("b", "sha256:bb", 0, 1), Err(ExportError::NoImage { .. })));
        std::fs::remove_file(&file).unwrap();
        assert!(read("b", "sha256:aa", 0, 1).unwrap_err().to_string().contains("image"));
        drop(open);
        assert!(matches!(read("b", "sha256:aa", 0, 1), Err(ExportError::Unknown(_))));
    }
}
