//! From what a copy shows to what it shall show, in an order that never lets a half of it be seen.
//!
//! ```text
//! contents made ready in the stage ─> directories ─> files renamed in ─> links renamed in ─> removals ─> directories' modes
//! ```
//!
//! Whoever reads through a link (as through kubelet's `..data`) sees the old directory or the whole new one. A copy that
//! is a single file is another case: a container has the file itself mounted, so it is written in place, all at once.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use dunlin_bridge::message::{FileEntry, FileKind};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use sha2::{Digest, Sha256};

use super::super::StorageError;

/// Where a copy's parts lie.
pub(super) struct Place<'a> {
    /// What containers see.
    pub(super) tree: &'a Path,
    /// What nobody sees.
    pub(super) stage: &'a Path,
}

impl Place<'_> {
    fn at(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.tree.to_owned() } else { self.tree.join(path) }
    }
}

/// Numbers of the entries whose content is neither shown nor staged, each content once.
pub(super) fn lacking(stage: &Path, shown: &[FileEntry], wanted: &[FileEntry]) -> Vec<u32> {
    let mut there: HashSet<&str> = contents(shown).map(|(_, digest, _)| digest).collect();
    let mut lacking = Vec::new();
    for (number, (_, digest, size)) in wanted.iter().enumerate().filter_map(|(n, e)| Some((n, content(e)?))) {
        let staged = || fs::metadata(stage.join(digest)).is_ok_and(|meta| meta.len() == size);
        if there.insert(digest) && !staged() {
            lacking.extend(u32::try_from(number));
        }
    }
    lacking
}

/// Makes the tree what is wanted. `shown`: what it is now.
pub(super) fn show(place: &Place<'_>, shown: &[FileEntry], wanted: &[FileEntry]) -> Result<(), StorageError> {
    let old: HashMap<&str, &FileEntry> = shown.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    let new: HashSet<&str> = wanted.iter().map(|entry| entry.path.as_str()).collect();
    let ready = make_ready(place, shown, wanted, &old)?;

    // What was a directory and is none any more stands in the way of a rename.
    for entry in wanted {
        let was = old.get(entry.path.as_str()).map(|old| old.kind == FileKind::Directory);
        if was.is_some_and(|was| was != (entry.kind == FileKind::Directory)) {
            remove(&place.at(&entry.path))?;
        }
    }
    for entry in wanted.iter().filter(|entry| entry.kind == FileKind::Directory) {
        let path = place.at(&entry.path);
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(StorageError::at("create the directory", path))?,
        }
    }
    for (number, entry) in wanted.iter().enumerate() {
        let path = place.at(&entry.path);
        match (&entry.kind, ready.get(&number)) {
            (FileKind::File { .. }, Some(content)) if entry.path.is_empty() && path.is_file() => {
                rewrite(content, &path)?;
                dress(&path, entry)?;
            }
            (FileKind::File { .. }, Some(content)) => {
                dress(content, entry)?;
                fs::rename(content, &path).map_err(StorageError::at("put the content of", path))?;
            }
            (FileKind::File { .. }, None) => dress(&path, entry)?,
            (FileKind::Directory | FileKind::Link { .. }, _) => {}
        }
    }
    for entry in wanted {
        let FileKind::Link { target } = &entry.kind else { continue };
        let path = place.at(&entry.path);
        if old.get(entry.path.as_str()) == Some(&entry) {
            continue;
        }
        let fresh = place.stage.join("link");
        let _ = fs::remove_file(&fresh);
        symlink(target, &fresh).map_err(StorageError::at("make the link", &path))?;
        own(&fresh, entry)?;
        times(&fresh, entry)?;
        fs::rename(&fresh, &path).map_err(StorageError::at("put the link", path))?;
    }
    // The deepest first, so that directories are empty by then.
    for entry in shown.iter().rev().filter(|entry| !new.contains(entry.path.as_str())) {
        remove(&place.at(&entry.path))?;
    }
    for entry in wanted.iter().rev().filter(|entry| entry.kind == FileKind::Directory) {
        dress(&place.at(&entry.path), entry)?;
    }
    Ok(())
}

/// Every content that is not shown at its path already, as a file in the stage: by the entry's number.
fn make_ready(
    place: &Place<'_>,
    shown: &[FileEntry],
    wanted: &[FileEntry],
    old: &HashMap<&str, &FileEntry>,
) -> Result<HashMap<usize, PathBuf>, StorageError> {
    let mut sources: HashMap<&str, PathBuf> =
        contents(shown).map(|(path, digest, _)| (digest, place.at(path))).collect();
    let mut ready = HashMap::new();
    for (number, entry) in wanted.iter().enumerate() {
        let Some((path, digest, size)) = content(entry) else { continue };
        let before = old.get(path).and_then(|old| content(old));
        if before.is_some_and(|(_, before, _)| before == digest) {
            continue;
        }
        let fresh = place.stage.join(format!("new-{number}"));
        let staged = place.stage.join(digest);
        let source = sources.get(digest).cloned().unwrap_or(staged);
        let copied = copy_checked(&source, &fresh, digest, size);
        copied.map_err(StorageError::at("make ready the content of", place.at(path)))?;
        sources.entry(digest).or_insert_with(|| fresh.clone());
        // One copy of each at a time: the room is for two of everything.
        let _ = fs::remove_file(place.stage.join(digest));
        ready.insert(number, fresh);
    }
    // A ready file that others were to be copied from must be there until all are; from here on it may be renamed.
    Ok(ready)
}

/// Copies a content that must be what its digest says.
fn copy_checked(source: &Path, target: &Path, digest: &str, size: u64) -> io::Result<()> {
    let mut from = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(source)?;
    let _ = fs::remove_file(target);
    let mut to = File::options().write(true).create_new(true).mode(0o600).open(target)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut copied = 0u64;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        io::Write::write_all(&mut to, &buffer[..read])?;
        copied += read as u64;
    }
    if copied != size || hex(&hash.finalize()) != digest {
        let _ = fs::remove_file(target);
        let reason = format!("it is not the {size} bytes with the digest {digest}; stage it again");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The content of a file that a container has open or mounted: one write, then the length.
fn rewrite(content: &Path, path: &Path) -> Result<(), StorageError> {
    let written = fs::read(content).and_then(|bytes| {
        let file = File::options().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        file.write_all_at(&bytes, 0)?;
        file.set_len(bytes.len() as u64)?;
        fs::remove_file(content)
    });
    written.map_err(StorageError::at("write the content of", path))
}

/// Owner, mode and time; the owner first, since a change of it takes bits away.
fn dress(path: &Path, entry: &FileEntry) -> Result<(), StorageError> {
    own(path, entry)?;
    fs::set_permissions(path, Permissions::from_mode(entry.mode))
        .map_err(StorageError::at("set the mode of", path))?;
    times(path, entry)
}

fn own(path: &Path, entry: &FileEntry) -> Result<(), StorageError> {
    lchown(path, Some(entry.uid), Some(entry.gid)).map_err(StorageError::at("set the owner of", path))
}

fn times(path: &Path, entry: &FileEntry) -> Result<(), StorageError> {
    let time = TimeSpec::new(entry.mtime, entry.mtime_nanos.into());
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)
        .map_err(StorageError::at("set the time of", path))
}

/// Whatever is there; nothing is done already.
fn remove(path: &Path) -> Result<(), StorageError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        // What was above it may be a file by now.
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(StorageError::at("delete", path)(error))
        }
        _ => Ok(()),
    }
}

/// Path, digest and size of a file.
fn content(entry: &FileEntry) -> Option<(&str, &str, u64)> {
    match &entry.kind {
        FileKind::File { size, digest } => Some((&entry.path, digest, *size)),
        FileKind::Directory | FileKind::Link { .. } => None,
    }
}

fn contents(entries: &[FileEntry]) -> impl Iterator<Item = (&str, &str, u64)> {
    entries.iter().filter_map(content)
}
