//! The image store: `<data_dir>/layers/sha256/<hex>.erofs` and `sparse-sha256/<hex>.ext4`, one file per content, and
//! an index from a layer directory's fingerprint to that content.
//!
//! Invariants:
//! * An image is served only while its file is the one that was hashed: its identity (inode, size,
//!   times) is in the index, and a file that differs is hashed again and rebuilt when its bytes are wrong.
//! * A directory that changed has another fingerprint: a change of content moves some inode's ctime,
//!   which no program can set back.
//! * The same tree gives the same bytes on every host with the same mkfs.erofs: times are zero, the
//!   UUID is fixed. File times in the image read as 1970; that is the price of comparing digests.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::digest::{Scheme, hash_file, hex};
use super::mounts::Layer;
use super::{RootfsError, ext4};

/// Every image's file-system UUID: part of its bytes, so the same for all.
const UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Part of the index key: images made in another way are other images.
const RECIPE: &str = "erofs -T0 v1";
const BUILD_DEADLINE: Duration = Duration::from_secs(600);

/// A read-only disk image with known content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    /// As [`super::digest`] tells.
    pub(crate) digest: String,
    pub(crate) size_bytes: u64,
}

/// The store of a host; shared by all of its shims through locks on files.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
    mkfs: PathBuf,
    e2fsck: PathBuf,
}

/// One line of the index.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Entry {
    digest: String,
    identity: Identity,
}

/// What tells that a file is still the file that was hashed.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified_nanos: i128,
    changed_nanos: i128,
}

impl Identity {
    fn of(meta: &Metadata) -> Identity {
        let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Identity {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified_nanos: nanos(meta.mtime(), meta.mtime_nsec()),
            changed_nanos: nanos(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Store {
    /// `mkfs`: makes EROFS images; `e2fsck`: mends the journal of an ext4.
    pub(crate) fn new(data_dir: &Path, mkfs: PathBuf, e2fsck: PathBuf) -> Store {
        Store { root: data_dir.join("layers"), mkfs, e2fsck }
    }

    /// The image of a layer: found, or built, or the snapshotter's own.
    pub(crate) async fn image_of(&self, layer: &Layer) -> Result<Image, RootfsError> {
        match layer {
            Layer::Directory(directory) => self.image(directory).await,
            Layer::Image(file) => self.image_file(file).await,
            Layer::Ext4 { file, writable } => self.ext4_file(file, *writable).await,
        }
    }

    /// A container's own ext4 file, served from where it is. It is hashed here once in its life, so nothing is noted.
    async fn ext4_file(&self, file: &Path, writable: bool) -> Result<Image, RootfsError> {
        ext4::settle(file, writable, &self.e2fsck).await?;
        let file = file.to_owned();
        blocking(move || {
            let digest = Scheme::Sparse.hash(&file)?;
            let meta = std::fs::metadata(&file);
            let size_bytes = meta.map_err(|source| RootfsError::Layer { path: file.clone(), source })?.size();
            Ok(Image { path: file, digest, size_bytes })
        })
        .await
    }

    /// Somebody else's image file, served from where it is; hashed once, as long as it stays the same file.
    async fn image_file(&self, file: &Path) -> Result<Image, RootfsError> {
        self.make_directories().await?;
        let (file, root) = (file.to_owned(), self.root.clone());
        blocking(move || {
            let failed = |source| RootfsError::Layer { path: file.clone(), source };
            let index = root.join("index").join(format!("file-{}", fingerprint(&file)?));
            let meta = std::fs::metadata(&file).map_err(failed)?;
            let identity = Identity::of(&meta);
            let known = std::fs::read(&index).ok();
            let known = known.and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
            if let Some(entry) = known.filter(|entry| entry.identity == identity) {
                return Ok(Image { path: file, digest: entry.digest, size_bytes: meta.size() });
            }
            let digest = hash_file(&file)?;
            let image = Image { path: file.clone(), digest, size_bytes: meta.size() };
            // Not noted when it was written to meanwhile: what was hashed is then no file's.
            if Identity::of(&std::fs::metadata(&file).map_err(failed)?) == identity {
                write_entry(&index, &image)?;
            }
            Ok(image)
        })
        .await
    }

    /// The image of a layer directory: found, or built.
    pub(crate) async fn image(&self, directory: &Path) -> Result<Image, RootfsError> {
        let key = {
            let directory = directory.to_owned();
            blocking(move || fingerprint(&directory)).await?
        };
        self.make_directories().await?;
        let index = self.root.join("index").join(&key);
        // Two shims that want the same layer at once build it once.
        let _lock = self.lock(&index).await?;
        if let Some(image) = self.look_up(&index).await? {
            return Ok(image);
        }
        let image = self.build(directory, &key).await?;
        write_entry(&index, &image)?;
        tracing::info!(layer = %directory.display(), digest = image.digest, bytes = image.size_bytes, "image built");
        Ok(image)
    }

    /// The image with this digest, if it is here: its file is the one that was hashed, or is hashed now.
    pub(crate) async fn find(&self, digest: &str) -> Result<Option<Image>, RootfsError> {
        let Some(path) = self.content_path(digest) else { return Ok(None) };
        if !path.exists() {
            return Ok(None);
        }
        let _lock = self.lock(&path).await?;
        self.find_locked(digest).await
    }

    pub(super) async fn find_locked(&self, digest: &str) -> Result<Option<Image>, RootfsError> {
        let Some((scheme, path)) = self.content(digest) else { return Ok(None) };
        let digest = digest.to_owned();
        blocking(move || {
            let Ok(meta) = std::fs::metadata(&path) else { return Ok(None) };
            let image = Image { path, digest, size_bytes: meta.size() };
            let known = std::fs::read(record(&image.path)).ok();
            let known = known.and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
            if known.is_some_and(|entry| entry.identity == Identity::of(&meta)) {
                return Ok(Some(image));
            }
            if scheme.hash(&image.path)? != image.digest {
                tracing::warn!(image = %image.path.display(), "image was altered; it is not used");
                return Ok(None);
            }
            remember(&image)?;
            Ok(Some(image))
        })
        .await
    }

    pub(super) async fn make_directories(&self) -> Result<(), RootfsError> {
        for part in ["sha256", "sparse-sha256", "index"] {
            let path = self.root.join(part);
            tokio::fs::create_dir_all(&path).await.map_err(|source| RootfsError::Store { path, source })?;
        }
        Ok(())
    }

    pub(super) async fn lock(&self, index: &Path) -> Result<File, RootfsError> {
        let path = index.with_extension("lock");
        blocking(move || {
            let failed = |source| RootfsError::Store { path: path.clone(), source };
            let file =
                File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            // SAFETY: `flock` on a descriptor that `file` owns.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
                return Err(failed(std::io::Error::last_os_error()));
            }
            Ok(file)
        })
        .await
    }

    async fn look_up(&self, index: &Path) -> Result<Option<Image>, RootfsError> {
        let Ok(text) = tokio::fs::read(index).await else { return Ok(None) };
        let Ok(entry) = serde_json::from_slice::<Entry>(&text) else { return Ok(None) };
        let Some(path) = self.content_path(&entry.digest) else { return Ok(None) };
        let Ok(meta) = tokio::fs::metadata(&path).await else { return Ok(None) };
        let image = Image { path: path.clone(), digest: entry.digest, size_bytes: meta.size() };
        if Identity::of(&meta) == entry.identity {
            return Ok(Some(image));
        }
        // Another inode or other times: copied back, or touched by somebody. Its bytes decide.
        let digest = {
            let path = path.clone();
            blocking(move || hash_file(&path)).await?
        };
        if digest == image.digest {
            write_entry(index, &image)?;
            return Ok(Some(image));
        }
        tracing::warn!(image = %path.display(), found = digest, "image was altered; building it again");
        Ok(None)
    }

    async fn build(&self, directory: &Path, key: &str) -> Result<Image, RootfsError> {
        let temporary = self.root.join("index").join(format!("{key}.building"));
        let _ = tokio::fs::remove_file(&temporary).await;
        let arguments: Vec<OsString> = ["-T0", "-U", UUID, "--quiet"]
            .into_iter()
            .map(OsString::from)
            .chain([temporary.as_os_str().to_owned(), directory.as_os_str().to_owned()])
            .collect();
        run(&self.mkfs, "erofs-utils", &arguments, directory, BUILD_DEADLINE).await?;
        let digest = {
            let temporary = temporary.clone();
            blocking(move || hash_file(&temporary)).await?
        };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RootfsError::Store { path, source }
        };
        let path = self.content_path(&digest).unwrap_or_else(|| temporary.clone());
        let permissions = std::fs::Permissions::from_mode(0o444);
        std::fs::set_permissions(&temporary, permissions).map_err(failed(&temporary))?;
        // A rename, also over an altered file of that name: machines that have it open keep theirs.
        tokio::fs::rename(&temporary, &path).await.map_err(failed(&path))?;
        let size_bytes = tokio::fs::metadata(&path).await.map_err(failed(&path))?.size();
        Ok(Image { path, digest, size_bytes })
    }

    /// What the digest is of, and where its image is, or would be.
    pub(super) fn content(&self, digest: &str) -> Option<(Scheme, PathBuf)> {
        let (scheme, hex) = Scheme::of(digest)?;
        Some((scheme, self.root.join(scheme.place(hex))))
    }

    fn content_path(&self, digest: &str) -> Option<PathBuf> {
        self.content(digest).map(|(_, path)| path)
    }
}

/// Beside an image: which file it was that had the digest.
fn record(image: &Path) -> PathBuf {
    image.with_extension("verified")
}

/// Notes that an image's file, as it is now, has its digest.
pub(super) fn remember(image: &Image) -> Result<(), RootfsError> {
    write_entry(&record(&image.path), image)
}

fn write_entry(index: &Path, image: &Image) -> Result<(), RootfsError> {
    let failed = |source| RootfsError::Store { path: index.to_owned(), source };
    let meta = std::fs::metadata(&image.path).map_err(failed)?;
    let entry = Entry { digest: image.digest.clone(), identity: Identity::of(&meta) };
    let text = serde_json::to_vec(&entry).map_err(|error| failed(error.into()))?;
    let temporary = index.with_extension("new");
    std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, index)).map_err(failed)
}

/// A hash over every inode's identity and times below a directory; contents are not read.
fn fingerprint(directory: &Path) -> Result<String, RootfsError> {
    let mut hasher = Sha256::new();
    hasher.update(RECIPE);
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let failed = |source| RootfsError::Layer { path: path.clone(), source };
        let meta = path.symlink_metadata().map_err(failed)?;
        let relative = path.strip_prefix(directory).unwrap_or(&path).as_os_str().as_bytes();
        hasher.update(relative.len().to_le_bytes());
        hasher.update(relative);
        for number in [meta.dev(), meta.ino(), meta.size(), meta.rdev(), meta.nlink()] {
            hasher.update(number.to_le_bytes());
        }
        for number in [meta.mode(), meta.uid(), meta.gid()] {
            hasher.update(number.to_le_bytes());
        }
        for number in [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()] {
            hasher.update(number.to_le_bytes());
        }
        if meta.is_dir() {
            let mut children = std::fs::read_dir(&path)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
                .map_err(failed)?;
            children.sort_unstable();
            pending.extend(children.into_iter().rev());
        }
    }
    Ok(hex(&hasher.finalize()))
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RootfsError> + Send + 'static,
) -> Result<T, RootfsError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Runs a program to its end; its standard error is the error's text.
pub(super) async fn run(
    program: &Path,
    package: &'static str,
    arguments: &[OsString],
    subject: &Path,
    deadline: Duration,
) -> Result<(), RootfsError> {
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(deadline, output)
        .await
        .map_err(|_| RootfsError::Timeout {
            program: program.to_owned(),
            path: subject.to_owned(),
            seconds: deadline.as_secs(),
        })?
        .map_err(|source| RootfsError::Program { program: program.to_owned(), package, source })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let message = match text.trim() {
        "" => output.status.to_string(),
        text => format!("{}: {text}", output.status),
    };
    Err(RootfsError::Build { program: program.to_owned(), path: subject.to_owned(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> tempfile::TempDir {
        let layer = tempfile::tempdir().unwrap();
        std::fs::create_dir(layer.path().join("bin")).unwrap();
        std::fs::write(layer.path().join("bin/sh"), "#!").unwrap();
        std::os::unix::fs::symlink("sh", layer.path().join("bin/ash")).unwrap();
        layer
    }

    fn store(data: &Path) -> Store {
        Store::new(data, "mkfs.erofs".into(), "e2fsck".into())
    }

    #[tokio::test]
    async fn two_copies_of_a_tree_are_one_image_and_the_second_look_up_builds_nothing() {
        let data = tempfile::tempdir().unwrap();
        let (one, two) = (layer(), layer());
        let first = store(data.path()).image(one.path()).await.unwrap();
        let second = store(data.path()).image(two.path()).await.unwrap();
        assert_eq!(first.digest, second.digest);
        assert_eq!(hash_file(&first.path).unwrap(), first.digest);
        let no_builder = Store::new(data.path(), "/no/such/program".into(), "e2fsck".into());
        assert_eq!(no_builder.image(one.path()).await.unwrap().digest, first.digest);
    }

    #[tokio::test]
    async fn a_changed_layer_is_another_image() {
        let data = tempfile::tempdir().unwrap();
        let layer = layer();
        let before = store(data.path()).image(layer.path()).await.unwrap();
        // Same size: only content and times differ.
        std::fs::write(layer.path().join("bin/sh"), "!#").unwrap();
        let after = store(data.path()).image(layer.path()).await.unwrap();
        assert_ne!(before.digest, after.digest);
    }

    #[tokio::test]
    async fn an_altered_image_is_never_served() {
        let data = tempfile::tempdir().unwrap();
        let layer = layer();
        let image = store(data.path()).image(layer.path()).await.unwrap();
        let mut bytes = std::fs::read(&image.path).unwrap();
        bytes[2000] ^= 1;
        std::fs::remove_file(&image.path).unwrap();
        std::fs::write(&image.path, bytes).unwrap();
        let again = store(data.path()).image(layer.path()).await.unwrap();
        assert_eq!(again, image);
        assert_eq!(hash_file(&again.path).unwrap(), image.digest);
    }

    #[tokio::test]
    async fn a_snapshotters_image_is_served_from_where_it_is() {
        let data = tempfile::tempdir().unwrap();
        let file = data.path().join("layer.erofs");
        std::fs::write(&file, "one").unwrap();
        let store = store(&data.path().join("store"));
        let layer = Layer::Image(file.clone());
        let image = store.image_of(&layer).await.unwrap();
        assert_eq!((&image.path, &image.digest), (&file, &hash_file(&file).unwrap()));
        assert_eq!(store.image_of(&layer).await.unwrap(), image);
        std::fs::write(&file, "two").unwrap();
        let changed = store.image_of(&layer).await.unwrap();
        assert_ne!(changed.digest, image.digest);
        assert_eq!(changed.digest, hash_file(&file).unwrap());
    }

    #[tokio::test]
    async fn a_missing_program_is_named_with_its_package() {
        let data = tempfile::tempdir().unwrap();
        let layer = layer();
        let store = Store::new(data.path(), "/no/such/mkfs".into(), "e2fsck".into());
        let error = store.image(layer.path()).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/no/such/mkfs") && text.contains("erofs-utils"), "{text}");
    }
}
