//! Storage that both hosts share: which file lies on it, and how a destination proves that its path leads to the
//! source's file.
//!
//! ```text
//!  source, at export        writes  <dir>/.<file>.dunlin-<id>          the token's value
//!  destination, at patch    reads it beside *its* file, writes  <dir>/.<file>.dunlin-<id>.answer
//!  source, before anything is sent:  reads the answer, removes both
//! ```
//!
//! Both names hold the disk's own: a destination that means another file of the same directory finds no token.
//! The answer is a hash over the token, so that nobody answers who has not read it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dunlin_wire::tree::DiskToken;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::Storage;

/// A token or an answer, bytes; a file that is longer is neither.
const LENGTH: usize = DiskToken::VALUE_BYTES;

/// A disk cannot be handed over through shared storage.
#[derive(Debug, Error)]
pub(crate) enum StorageError {
    #[error("cannot resolve {path}: {source}; check that the shared storage is mounted on this host")]
    Resolve { path: PathBuf, source: io::Error },
    #[error(
        "{path} is not below a directory in this host's disks.shared; add the shared directory there, or move with --storage copy"
    )]
    NotShared { path: PathBuf },
    #[error("cannot write {path}: {source}; check the shared storage, or move with --storage copy")]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "the source's token is not beside {path} on this host ({source}): it is not the source's file; mount the same storage there on both hosts, or move with --storage copy"
    )]
    NoToken { path: PathBuf, source: io::Error },
    #[error(
        "the token beside {path} is not the source's; mount the same storage there on both hosts, or move with --storage copy"
    )]
    OtherToken { path: PathBuf },
    #[error("{path} has {found} bytes here and {expected} on the source: it is not the same file")]
    OtherSize { path: PathBuf, found: u64, expected: u64 },
    #[error(
        "the destination did not answer beside {path} ({source}): what it sees there is not this file; mount the same storage on both hosts, or move with --storage copy"
    )]
    NoAnswer { path: PathBuf, source: io::Error },
}

impl Storage {
    /// Of a writable disk at `path`, which exists: shared when it lies below one of the `shared` directories.
    pub(crate) fn of(path: &Path, shared: &[PathBuf]) -> Storage {
        let Ok(path) = path.canonicalize() else { return Storage::Local };
        let holds = |directory: &PathBuf| directory.canonicalize().is_ok_and(|dir| path.starts_with(dir));
        if shared.iter().any(holds) { Storage::Shared } else { Storage::Local }
    }
}

/// Source: leaves a token beside a shared disk.
pub(crate) fn leave(path: &Path) -> Result<DiskToken, StorageError> {
    let token = DiskToken { id: uuid::Uuid::new_v4().into_bytes(), value: random_value() };
    let file = token_file(&resolved(path)?, &token);
    write_new(&file, &token.value).map_err(|source| StorageError::Write { path: file, source })?;
    Ok(token)
}

/// Destination: finds the source's token beside its own path and answers. `size_bytes`: the source's.
pub(crate) fn answer(
    path: &Path,
    token: &DiskToken,
    size_bytes: u64,
    shared: &[PathBuf],
) -> Result<(), StorageError> {
    let path = &resolved(path)?;
    if Storage::of(path, shared) == Storage::Local {
        return Err(StorageError::NotShared { path: path.clone() });
    }
    let found = read(&token_file(path, token))
        .map_err(|source| StorageError::NoToken { path: path.clone(), source })?;
    if found != token.value {
        return Err(StorageError::OtherToken { path: path.clone() });
    }
    let failed = |source| StorageError::Resolve { path: path.clone(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size != size_bytes {
        return Err(StorageError::OtherSize { path: path.clone(), found: size, expected: size_bytes });
    }
    let file = answer_file(path, token);
    match write_new(&file, &hashed(token)) {
        // A patch may be repeated; what stands there is for the source to judge.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(StorageError::Write { path: file, source }),
        Ok(()) => Ok(()),
    }
}

/// Source: whether the destination has answered. Without it the source must not go on.
pub(crate) fn answered(path: &Path, token: &DiskToken) -> Result<(), StorageError> {
    let path = resolved(path)?;
    match read(&answer_file(&path, token)) {
        Ok(found) if found == hashed(token) => Ok(()),
        Ok(_) => {
            let source = io::Error::new(io::ErrorKind::InvalidData, "its answer is to another token");
            Err(StorageError::NoAnswer { path, source })
        }
        Err(source) => Err(StorageError::NoAnswer { path, source }),
    }
}

/// Source: removes a token and its answer. Nothing there is no error.
pub(crate) fn clear(path: &Path, token: &DiskToken) {
    let Ok(path) = resolved(path) else { return };
    for file in [token_file(&path, token), answer_file(&path, token)] {
        if let Err(error) = fs::remove_file(&file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %file.display(), %error, "a token stays on the shared storage");
        }
    }
}

fn resolved(path: &Path) -> Result<PathBuf, StorageError> {
    path.canonicalize().map_err(|source| StorageError::Resolve { path: path.to_owned(), source })
}

fn token_file(path: &Path, token: &DiskToken) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".dunlin-{}", uuid::Uuid::from_bytes(token.id).simple()));
    path.with_file_name(name)
}

fn answer_file(path: &Path, token: &DiskToken) -> PathBuf {
    let mut file = token_file(path, token).into_os_string();
    file.push(".answer");
    file.into()
}

fn hashed(token: &DiskToken) -> [u8; LENGTH] {
    let mut hasher = Sha256::new();
    hasher.update(b"dunlin: this host reads the same file\0");
    hasher.update(token.id);
    hasher.update(token.value);
    hasher.finalize().into()
}

fn random_value() -> [u8; LENGTH] {
    let mut value = [0; LENGTH];
    for half in value.chunks_mut(16) {
        half.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    value
}

/// Complete on the storage when it returns: the other host is asked at once.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half of it would be no token.
        let _ = fs::remove_file(path);
    }
    written
}

fn read(path: &Path) -> io::Result<[u8; LENGTH]> {
    let mut bytes = Vec::with_capacity(LENGTH + 1);
    fs::File::open(path)?.take(LENGTH as u64 + 1).read_to_end(&mut bytes)?;
    bytes.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it has another length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(directory: &Path, name: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, [0; 512]).unwrap();
        path
    }

    #[test]
    fn a_disk_is_shared_below_a_shared_directory_whatever_its_path_is_called() {
        let at = tempfile::tempdir().unwrap();
        let (shared, own) = (at.path().join("shared"), at.path().join("own"));
        for directory in [&shared, &own] {
            fs::create_dir(directory).unwrap();
        }
        let here = disk(&shared, "a");
        let link = own.join("a");
        std::os::unix::fs::symlink(&here, &link).unwrap();
        let directories = [at.path().join("not there"), shared.clone()];
        assert_eq!(Storage::of(&here, &directories), Storage::Shared);
        assert_eq!(Storage::of(&link, &directories), Storage::Shared);
        assert_eq!(Storage::of(&disk(&own, "b"), &directories), Storage::Local);
        assert_eq!(Storage::of(&at.path().join("shared-not/x"), &directories), Storage::Local);
    }

    #[test]
    fn a_token_is_answered_once_read_and_both_go() {
        let at = tempfile::tempdir().unwrap();
        let path = disk(at.path(), "a.raw");
        let shared = [at.path().to_owned()];
        let token = leave(&path).unwrap();
        assert!(matches!(answered(&path, &token), Err(StorageError::NoAnswer { .. })));
        answer(&path, &token, 512, &shared).unwrap();
        answer(&path, &token, 512, &shared).unwrap();
        answered(&path, &token).unwrap();
        clear(&path, &token);
        clear(&path, &token);
        assert_eq!(fs::read_dir(at.path()).unwrap().count(), 1, "only the disk is left");
    }

    #[test]
    fn another_file_another_token_and_another_directory_are_refused() {
        let at = tempfile::tempdir().unwrap();
        let other_host = tempfile::tempdir().unwrap();
        let path = disk(at.path(), "a.raw");
        let shared = [at.path().to_owned(), other_host.path().to_owned()];
        let token = leave(&path).unwrap();
        let neighbour = disk(at.path(), "b.raw");
        assert!(matches!(answer(&neighbour, &token, 512, &shared), Err(StorageError::NoToken { .. })));
        let copy = disk(other_host.path(), "a.raw");
        let refused = answer(&copy, &token, 512, &shared).unwrap_err().to_string();
        assert!(refused.contains("--storage copy") && refused.contains("a.raw"), "{refused}");
        assert!(matches!(answer(&path, &token, 512, &[]), Err(StorageError::NotShared { .. })));
        assert!(matches!(answer(&path, &token, 4096, &shared), Err(StorageError::OtherSize { .. })));
        let forged = DiskToken { value: [1; 32], ..token };
        assert!(matches!(answer(&path, &forged, 512, &shared), Err(StorageError::OtherToken { .. })));
        assert!(
            matches!(answered(&path, &token), Err(StorageError::NoAnswer { .. })),
            "nothing was answered"
        );
        fs::write(answer_file(&path, &token), [7; 32]).unwrap();
        assert!(matches!(answered(&path, &token), Err(StorageError::NoAnswer { .. })), "no answer to this");
    }
}
