//! Files of the host in the guest, and directories that a pod's containers share.
//!
//! ```text
//! /run/mounts/copies/<container>/<n>          a tmpfs of bounded size, one a mount
//!                                   /tree     what containers see: a directory, or a single file
//!                                   /stage    contents on their way
//! <pod's bundle>/empty-dir/<name>             a directory on the pod's scratch disk
//! /run/mounts/empty-dir/<pod>/<name>          one in memory, a tmpfs
//! ```
//!
//! What is shown was checked as a whole before ([`list`]) and appears in an order that nobody sees half of ([`show`]).
//! What a copy shows is remembered here, in PID 1: it goes along in a move, and the next host is told what differs.

pub mod list;
mod show;

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dunlin_bridge::message::{
    Base64, ENTRIES_MAX, FileEntry, FilePart, FilesAnswer, FilesRoom, FilesStep, PodDirectory, READ_MAX,
    STAGE_MAX,
};
use nix::mount::{MsFlags, mount};

use super::StorageError;
use super::layers::create_dir;
use super::mounts::{remove_dir, unmount_all};
use crate::path::{ContainerId, host_path};
use show::Place;

/// Below it each copy has its place.
const COPIES: &str = "/run/mounts/copies";
/// Below it, by pod, are shared directories that lie in memory.
const MEMORY_DIRECTORIES: &str = "/run/mounts/empty-dir";
/// A shared directory that does not lie in memory is in a directory of this name.
const DIRECTORIES: &str = "empty-dir";
/// A tmpfs takes a page at least for each file.
const PAGE: u64 = 4096;

/// The copies there are. Clones are handles.
#[derive(Clone, Default)]
pub struct Copies {
    table: Arc<Mutex<HashMap<PathBuf, Arc<Mutex<Copy>>>>>,
}

/// One copy.
struct Copy {
    room: FilesRoom,
    /// As it was told last.
    shown: Vec<FileEntry>,
}

impl Copies {
    /// Does a step. Blocks.
    pub fn step(&self, place: &str, step: FilesStep) -> Result<FilesAnswer, StorageError> {
        let path = host_path(place)?;
        match step {
            FilesStep::Make(room) => self.make(&path, room).map(|()| FilesAnswer::default()),
            FilesStep::Compare(list) => {
                let copy = self.find(&path)?;
                let copy = lock(&copy);
                list::check(&list.entries, copy.room)?;
                let shown = copy.shown == list.entries;
                let lacking = show::lacking(&path.join("stage"), &copy.shown, &list.entries);
                Ok(FilesAnswer { shown, lacking, ..FilesAnswer::default() })
            }
            FilesStep::Stage(part) => {
                let copy = self.find(&path)?;
                let _one_at_a_time = lock(&copy);
                stage(&path.join("stage"), &part).map(|()| FilesAnswer::default())
            }
            FilesStep::Show(list) => {
                let copy = self.find(&path)?;
                let mut copy = lock(&copy);
                list::check(&list.entries, copy.room)?;
                show_in(&path, &mut copy, list.entries).map(|()| FilesAnswer::default())
            }
            FilesStep::Read(at) => {
                let copy = self.find(&path)?;
                let _one_at_a_time = lock(&copy);
                let data = read(&path.join("tree"), at.offset)?;
                Ok(FilesAnswer { data: Base64(data), ..FilesAnswer::default() })
            }
            FilesStep::Directory(directory) => {
                make_directory(&path, directory).map(|()| FilesAnswer::default())
            }
            FilesStep::Remove => self.remove(&path).map(|()| FilesAnswer::default()),
        }
    }

    fn make(&self, path: &Path, room: FilesRoom) -> Result<(), StorageError> {
        if !path.starts_with(COPIES) || path == Path::new(COPIES) {
            return Err(StorageError::NotForFiles(path.to_owned()));
        }
        let entries = room.entries.min(u32::try_from(ENTRIES_MAX).unwrap_or(u32::MAX));
        let mut table = lock(&self.table);
        if table.contains_key(path) {
            return Ok(());
        }
        make_dir_private(path)?;
        // What is shown, what is staged, and what is made ready of it.
        let bytes = 3 * room.bytes.saturating_add(u64::from(entries) * PAGE).saturating_add(64 * PAGE);
        let options = format!("mode=0700,size={bytes},nr_inodes={}", 3 * entries + 64);
        mount(Some("copy"), path, Some("tmpfs"), MsFlags::MS_NODEV, Some(options.as_str()))
            .map_err(StorageError::at("mount a tmpfs on", path))?;
        make_dir_private(&path.join("stage"))?;
        let copy = Copy { room: FilesRoom { entries, ..room }, shown: Vec::new() };
        table.insert(path.to_owned(), Arc::new(Mutex::new(copy)));
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        let parents = [COPIES, MEMORY_DIRECTORIES];
        if !parents.iter().any(|parent| path.starts_with(parent) && path != Path::new(parent)) {
            return Err(StorageError::NotForFiles(path.to_owned()));
        }
        unmount_all(path)?;
        remove_dir(path)?;
        lock(&self.table).remove(path);
        // The container's, or the pod's, when it was the last.
        if let Some(parent) = path.parent().filter(|parent| !parents.iter().any(|p| *parent == Path::new(p)))
        {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    fn find(&self, path: &Path) -> Result<Arc<Mutex<Copy>>, StorageError> {
        lock(&self.table).get(path).cloned().ok_or_else(|| StorageError::NoCopy(path.to_owned()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A copy that a panic left half-way is told anew by the host: what it shows is known when it was whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn show_in(path: &Path, copy: &mut Copy, entries: Vec<FileEntry>) -> Result<(), StorageError> {
    let (tree, stage) = (path.join("tree"), path.join("stage"));
    let done = show::show(&Place { tree: &tree, stage: &stage }, &copy.shown, &entries);
    if done.is_ok() {
        copy.shown = entries;
    }
    // Nothing of this round is of use to the next.
    clear(&stage);
    done
}

fn stage(stage: &Path, part: &FilePart) -> Result<(), StorageError> {
    if !list::is_digest(&part.digest) {
        return Err(StorageError::BadPart("its digest is none"));
    }
    if part.data.0.len() > STAGE_MAX {
        return Err(StorageError::BadPart("it is longer than parts may be"));
    }
    let path = stage.join(&part.digest);
    let staged = (|| {
        let mut options = File::options();
        options.write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.truncate(part.offset == 0).open(&path)?;
        if file.metadata()?.len() != part.offset {
            return Ok(false);
        }
        file.write_all_at(&part.data.0, part.offset).map(|()| true)
    })();
    match staged {
        Ok(true) => Ok(()),
        Ok(false) => Err(StorageError::BadPart("it does not begin where the last one ended")),
        Err(error) => Err(StorageError::at("write", path)(error)),
    }
}

fn read(path: &Path, offset: u64) -> Result<Vec<u8>, StorageError> {
    let read = (|| {
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a single file"));
        }
        let mut data = vec![0; READ_MAX];
        let read = file.read_at(&mut data, offset)?;
        data.truncate(read);
        Ok(data)
    })();
    read.map_err(StorageError::at("read", path))
}

fn make_directory(path: &Path, directory: PodDirectory) -> Result<(), StorageError> {
    let in_memory = path.starts_with(MEMORY_DIRECTORIES);
    let of_a_pod = path.starts_with("/run/gcs/pods")
        && path.parent().and_then(Path::file_name).is_some_and(|name| name == DIRECTORIES);
    if in_memory != directory.memory_bytes.is_some()
        || !in_memory && !of_a_pod
        || directory.mode > 0o7777
        || path == Path::new(MEMORY_DIRECTORIES)
    {
        return Err(StorageError::NotForFiles(path.to_owned()));
    }
    // Whoever comes second shares it as it is.
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Ok(());
    }
    create_dir(path)?;
    let made = (|| {
        if let Some(bytes) = directory.memory_bytes {
            let options = format!("mode=0755,size={bytes}");
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
            let options = if bytes == 0 { "mode=0755" } else { options.as_str() };
            mount(Some("empty-dir"), path, Some("tmpfs"), flags, Some(options))
                .map_err(StorageError::at("mount a tmpfs on", path))?;
        }
        lchown(path, Some(directory.uid), Some(directory.gid))
            .map_err(StorageError::at("set the owner of", path))?;
        fs::set_permissions(path, Permissions::from_mode(directory.mode))
            .map_err(StorageError::at("set the mode of", path))
    })();
    if made.is_err() {
        // Half of one must not be taken for a whole one.
        let _ = unmount_all(path);
        let _ = fs::remove_dir(path);
    }
    made
}

/// A pod has ended: its directories in memory go. Whatever fails is logged.
pub fn remove_directories(pod: &ContainerId) {
    let of_pod = Path::new(MEMORY_DIRECTORIES).join(pod.as_str());
    for directory in fs::read_dir(&of_pod).into_iter().flatten().filter_map(Result::ok) {
        let path = directory.path();
        if let Err(error) = unmount_all(&path).and_then(|()| remove_dir(&path)) {
            tracing::warn!(path = %path.display(), %error, "a directory of a pod stays in memory");
        }
    }
    let _ = fs::remove_dir(of_pod);
}

/// Containers reach it by the mounts that they are given, and only by those.
fn make_dir_private(path: &Path) -> Result<(), StorageError> {
    create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o700))
        .map_err(StorageError::at("set the mode of", path))
}

fn clear(stage: &Path) {
    for entry in fs::read_dir(stage).into_iter().flatten().filter_map(Result::ok) {
        let _ = fs::remove_file(entry.path());
    }
}

#[cfg(test)]
mod tests;
