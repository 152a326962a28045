//! A whole root file system in an ext4 file: attached read-only, so all of it must be in its place before.
//!
//! The guest mounts it without its journal (nothing can be replayed on a read-only disk), and what is only in the journal
//! would be missing there. A copy that was made while its parent was still being unmounted has such a journal. An active
//! snapshot is mended as a writable mount would do it; a committed one is not this container's to write to.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::RootfsError;
use super::store::{blocking, run};

/// Replaying a journal; checking a file system that has none, and was not unmounted, takes longer.
const MEND_DEADLINE: Duration = Duration::from_secs(120);

// Of the superblock: fs/ext4/ext4.h.
const SUPERBLOCK: u64 = 1024;
const MAGIC: usize = 0x38;
const STATE: usize = 0x3a;
const INCOMPAT: usize = 0x60;
const VALID: u8 = 1;
const RECOVER: u8 = 4;

/// Sees to it that the file system is whole without its journal.
pub(super) async fn settle(file: &Path, writable: bool, e2fsck: &Path) -> Result<(), RootfsError> {
    if clean(file).await? {
        return Ok(());
    }
    let mut mending = String::new();
    if writable {
        tracing::info!(file = %file.display(), "not unmounted cleanly; its journal is replayed");
        let arguments = ["-p".into(), OsString::from(file)];
        // Its status is of no use: "mended" is no success to it. One that is mounted here it refuses.
        let ran = run(e2fsck, "e2fsprogs", &arguments, file, MEND_DEADLINE).await;
        if clean(file).await? {
            return Ok(());
        }
        match ran {
            Err(RootfsError::Build { message, .. }) => mending = format!(", and e2fsck -p failed: {message}"),
            Err(error) => return Err(error),
            Ok(()) => {}
        }
    }
    Err(RootfsError::Unclean { path: file.to_owned(), mending })
}

/// Whether nothing is left to replay and nobody has it mounted for writing.
async fn clean(file: &Path) -> Result<bool, RootfsError> {
    let path = file.to_owned();
    blocking(move || {
        let mut superblock = [0; 128];
        let read = File::open(&path).and_then(|file| file.read_exact_at(&mut superblock, SUPERBLOCK));
        match read {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(source) => return Err(RootfsError::Layer { path, source }),
            Ok(()) => {}
        }
        if superblock[MAGIC..MAGIC + 2] != 0xef53_u16.to_le_bytes() {
            return Err(RootfsError::NotExt4 { path });
        }
        Ok(superblock[STATE] & VALID != 0 && superblock[INCOMPAT] & RECOVER == 0)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext4(at: &Path, journal: bool) -> std::path::PathBuf {
        let path = at.join("root.ext4");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        // No checksums, so that a flag can be set by hand.
        let journal = if journal { "^metadata_csum" } else { "^metadata_csum,^has_journal" };
        let mut mkfs = std::process::Command::new("mkfs.ext4");
        let made = mkfs.args(["-q", "-F", "-O", journal]).arg(&path).status();
        assert!(made.unwrap().success());
        path
    }

    fn mark(path: &Path, at: usize, change: impl Fn(u8) -> u8) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, SUPERBLOCK + at as u64).unwrap();
        file.write_all_at(&[change(byte[0])], SUPERBLOCK + at as u64).unwrap();
    }

    /// As while it is mounted for writing: a journal to be replayed; without one, not valid.
    fn leave_mounted(path: &Path, journal: bool) {
        if journal {
            mark(path, INCOMPAT, |byte| byte | RECOVER);
        } else {
            mark(path, STATE, |byte| byte & !VALID);
        }
    }

    #[tokio::test]
    async fn a_clean_one_is_left_as_it_is() {
        let at = tempfile::tempdir().unwrap();
        let path = ext4(at.path(), true);
        let before = std::fs::read(&path).unwrap();
        for writable in [false, true] {
            settle(&path, writable, Path::new("/no/such/program")).await.unwrap();
        }
        assert!(before == std::fs::read(&path).unwrap());
    }

    #[tokio::test]
    async fn an_active_one_is_mended_and_a_committed_one_refused() {
        let at = tempfile::tempdir().unwrap();
        for journal in [true, false] {
            let path = ext4(at.path(), journal);
            leave_mounted(&path, journal);
            let before = std::fs::read(&path).unwrap();
            let refused = settle(&path, false, Path::new("e2fsck")).await.unwrap_err().to_string();
            assert!(refused.contains("root.ext4") && refused.contains("unmount"), "{refused}");
            assert!(before == std::fs::read(&path).unwrap(), "it was written to");
            settle(&path, true, Path::new("e2fsck")).await.unwrap();
            settle(&path, false, Path::new("/no/such/program")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_cannot_be_mended_is_told_with_the_reason() {
        let at = tempfile::tempdir().unwrap();
        let path = ext4(at.path(), true);
        leave_mounted(&path, true);
        let failed = at.path().join("e2fsck");
        std::os::unix::fs::symlink("/bin/false", &failed).unwrap();
        let refused = settle(&path, true, &failed).await.unwrap_err().to_string();
        assert!(
            refused.contains("root.ext4") && refused.contains("e2fsck -p failed: exit status: 1"),
            "{refused}"
        );
        let missing = settle(&path, true, Path::new("/no/such/program")).await.unwrap_err().to_string();
        assert!(missing.contains("/no/such/program") && missing.contains("e2fsprogs"), "{missing}");
        for length in [0, 1 << 20] {
            std::fs::write(&path, vec![0; length]).unwrap();
            assert!(matches!(settle(&path, true, &failed).await, Err(RootfsError::NotExt4 { .. })));
        }
    }
}
