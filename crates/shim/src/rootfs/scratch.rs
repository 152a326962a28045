//! The writable layer: one sparse ext4 disk a container.
//!
//! Invariants:
//! * A file that was there before is never opened for writing, truncated or overwritten: two hosts may have been
//!   given the same directory.
//! * A file that was made for something that then failed goes with it ([`Blank`]).
//! * A file is removed only by the host that made it or took it over: that host's *ledger*, a directory of links on
//!   the host itself, says which those are, also when its shim is dead.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::RootfsError;
use super::store::run;

/// A file that was just made. Dropped without [`Blank::keep`] it is removed again.
#[derive(Debug)]
pub(crate) struct Blank {
    path: Option<PathBuf>,
}

impl Blank {
    /// It has its place; from now on it is somebody's.
    pub(crate) fn keep(mut self) -> PathBuf {
        self.path.take().unwrap_or_default()
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            remove_now(&path);
        }
    }
}

/// A file's name that no other host gives, for a container's copy on storage that several have.
pub(crate) fn unique_name(guest_id: &str) -> String {
    format!("{guest_id}-{}.raw", uuid::Uuid::new_v4().simple())
}

/// Whether a shim gives a container's scratch disk such a name.
pub(crate) fn is_name(name: &str, guest_id: &str) -> bool {
    let Some(rest) = name.strip_prefix(guest_id).and_then(|rest| rest.strip_suffix(".raw")) else {
        return false;
    };
    let hex = |digits: &str| digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    rest.is_empty() || rest.strip_prefix('-').is_some_and(hex)
}

/// Makes an empty file of the size, with nothing in it: a destination's disk, filled by the mirror.
pub(crate) async fn create_blank(path: &Path, bytes: u64) -> Result<Blank, RootfsError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => RootfsError::ScratchExists { path: path.to_owned() },
        _ => RootfsError::Scratch { path: path.to_owned(), source },
    };
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await.map_err(failed)?;
    }
    let file = tokio::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path).await;
    let file = file.map_err(failed)?;
    let blank = Blank { path: Some(path.to_owned()) };
    file.set_len(bytes).await.map_err(failed)?;
    Ok(blank)
}

/// Makes the disk with an empty ext4 in it.
///
/// No journal: a scratch disk never outlives its machine, so there is nothing to recover.
pub(crate) async fn create(mkfs: &Path, path: &Path, bytes: u64) -> Result<Blank, RootfsError> {
    let blank = create_blank(path, bytes).await?;
    let arguments: Vec<std::ffi::OsString> =
        ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]
            .into_iter()
            .map(Into::into)
            .chain([path.as_os_str().to_owned()])
            .collect();
    run(mkfs, "e2fsprogs", &arguments, path, Duration::from_secs(120)).await?;
    Ok(blank)
}

/// Removes the disk; one that is not there is no error.
pub(crate) async fn remove(path: &Path) {
    let path = path.to_owned();
    // Giving the blocks of a large file back takes a while.
    if let Err(error) = tokio::task::spawn_blocking(move || remove_now(&path)).await {
        tracing::warn!(%error, "removing a scratch disk");
    }
}

fn remove_now(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the scratch disk");
    }
}

/// Writes down that a file is this host's.
pub(crate) fn own(ledger: &Path, file: &Path) {
    let link = link(ledger, file);
    let linked = std::fs::create_dir_all(ledger).and_then(|()| std::os::unix::fs::symlink(file, &link));
    if let Err(error) = linked
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        tracing::warn!(file = %file.display(), %error, "it will stay there when this shim dies");
    }
}

/// It may be another host's from now on. An error: it stays this host's, and must not be lent.
pub(crate) fn disown(ledger: &Path, file: &Path) -> io::Result<()> {
    match std::fs::remove_file(link(ledger, file)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the files that a dead shim owned on shared storage.
pub(crate) fn clear_owned(ledger: &Path) {
    let Ok(links) = std::fs::read_dir(ledger) else { return };
    for link in links.flatten() {
        if let Ok(file) = std::fs::read_link(link.path()) {
            remove_now(&file);
            // Its directory was made for it; others' files keep it.
            if let Some(directory) = file.parent() {
                let _ = std::fs::remove_dir(directory);
            }
        }
        let _ = std::fs::remove_file(link.path());
    }
}

/// Of the whole path: files of one name may lie in several directories.
fn link(ledger: &Path, file: &Path) -> PathBuf {
    let hash = Sha256::digest(file.as_os_str().as_bytes());
    ledger.join(hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_is_there_is_refused_by_its_name_and_stays_as_it_is() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("ns/c.raw");
        std::fs::create_dir(at.path().join("ns")).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let blank = create_blank(&path, 1 << 20).await.unwrap_err().to_string();
        let made = create(Path::new("mkfs.ext4"), &path, 64 << 20).await.unwrap_err().to_string();
        for text in [blank, made] {
            assert!(text.contains(&path.display().to_string()) && text.contains("exists"), "{text}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        // A dangling link leads to a file that would be made elsewhere.
        std::os::unix::fs::symlink(at.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(create_blank(&path, 4096).await, Err(RootfsError::ScratchExists { .. })));
        assert!(!at.path().join("elsewhere").exists());
    }

    #[tokio::test]
    async fn what_is_not_kept_goes_and_a_failed_mkfs_leaves_nothing() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("c.raw");
        drop(create_blank(&path, 1 << 30).await.unwrap());
        assert!(!path.exists());
        create(Path::new("/bin/false"), &path, 1 << 20).await.unwrap_err();
        assert!(!path.exists());
        assert_eq!(create_blank(&path, 1 << 30).await.unwrap().keep(), path);
        use std::os::unix::fs::MetadataExt;
        let meta = path.metadata().unwrap();
        assert_eq!((meta.len(), meta.blocks()), (1 << 30, 0), "it is sparse");
    }

    #[test]
    fn only_names_that_a_shim_gives_are_taken_from_another_host() {
        assert!(is_name("c1.raw", "c1") && is_name(&unique_name("c1"), "c1"));
        for name in ["c2.raw", "c1", "c1.raw.raw", "c1-.raw", "c1-../../x.raw", "c1-zz.raw", "", "../c1.raw"]
        {
            assert!(!is_name(name, "c1"), "{name}");
        }
    }

    #[test]
    fn a_dead_owner_leaves_nothing_and_what_was_lent_stays() {
        let at = tempfile::tempdir().unwrap();
        let (ledger, shared) = (at.path().join("run/scratch"), at.path().join("shared"));
        std::fs::create_dir(&shared).unwrap();
        let elsewhere = at.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        let [mine, lent] = ["mine.raw", "lent.raw"].map(|name| shared.join(name));
        // Of the same name as another one.
        let other = elsewhere.join("lent.raw");
        for file in [&mine, &lent, &other] {
            std::fs::write(file, "x").unwrap();
            own(&ledger, file);
            own(&ledger, file);
        }
        disown(&ledger, &lent).unwrap();
        disown(&ledger, &lent).unwrap();
        clear_owned(&ledger);
        assert!(!mine.exists() && lent.exists() && !other.exists());
        clear_owned(&at.path().join("no ledger"));
    }
}
