//! What a mount's source is on this host.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::mount::Mount;
use super::walk::{self, Limits, NotCopied, WalkError};

/// A source, looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Facts {
    /// It cannot be looked at, for this reason.
    Missing(String),
    /// A regular file; why it cannot be copied, if so.
    File {
        unfit: Option<NotCopied>,
    },
    Directory(Directory),
    /// A block device.
    Block,
    /// Something else, in words.
    Other(&'static str),
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Why it cannot be copied, if so.
    pub(crate) unfit: Option<NotCopied>,
    /// It is a tmpfs's root: of so many bytes at most, 0 when nothing is said of that.
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Looks at a mount's source, on a thread that may wait for disks.
pub(crate) async fn gather(mount: Mount, limits: Limits) -> (Mount, Facts) {
    let path = mount.source.clone();
    let looked = tokio::task::spawn_blocking(move || look(Path::new(&path), limits)).await;
    (mount, looked.unwrap_or_else(|error| Facts::Missing(error.to_string())))
}

/// Blocks.
pub(crate) fn look(path: &Path, limits: Limits) -> Facts {
    if !path.is_absolute() {
        return Facts::Missing("it is not an absolute path".to_owned());
    }
    // As mount(2) does, links are followed.
    let found = fs::canonicalize(path).and_then(|path| fs::metadata(&path).map(|meta| (path, meta)));
    let (path, meta) = match found {
        Ok(found) => found,
        Err(error) => return Facts::Missing(error.to_string()),
    };
    let kind = meta.file_type();
    if kind.is_block_device() {
        return Facts::Block;
    }
    if !kind.is_dir() && !kind.is_file() {
        return Facts::Other(walk::what(&meta));
    }
    let unfit = match walk::walk(&path, limits) {
        Ok(_) => None,
        Err(WalkError::Unfit(why)) => Some(why),
        // It may be in the midst of a change: whoever copies it looks again.
        Err(error) if error.vanished() => None,
        Err(error) => return Facts::Missing(error.to_string()),
    };
    if kind.is_file() {
        return Facts::File { unfit };
    }
    let (mode, uid, gid) = (meta.mode() & 0o7777, meta.uid(), meta.gid());
    Facts::Directory(Directory { unfit, memory_bytes: memory_bytes(&path, &meta), mode, uid, gid })
}

/// The size of the tmpfs that is mounted on a directory.
fn memory_bytes(path: &Path, meta: &fs::Metadata) -> Option<u64> {
    let above = fs::metadata(path.parent()?).ok()?;
    let stat = nix::sys::statfs::statfs(path).ok()?;
    if above.dev() == meta.dev() || stat.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
        return None;
    }
    #[allow(clippy::cast_sign_loss, reason = "a block has a size")]
    let block = stat.block_size() as u64;
    Some(stat.blocks().saturating_mul(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { file: 1024, mount: 2048 };

    #[test]
    fn sources_are_known_by_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "x").unwrap();
        fs::write(at("large"), vec![0; 1025]).unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        assert_eq!(look(&at("file"), LIMITS), Facts::File { unfit: None });
        assert_eq!(look(&at("link"), LIMITS), Facts::File { unfit: None }, "a mount follows it");
        assert!(matches!(look(&at("large"), LIMITS), Facts::File { unfit: Some(NotCopied::File { .. }) }));
        let Facts::Directory(found) = look(dir.path(), LIMITS) else { panic!("a directory") };
        assert!(matches!(found.unfit, Some(NotCopied::File { .. })));
        assert_eq!(
            (found.memory_bytes, found.mode),
            (None, fs::metadata(dir.path()).unwrap().mode() & 0o7777)
        );
        assert_eq!(look(Path::new("/dev/null"), LIMITS), Facts::Other("a character device"));
        assert!(matches!(look(&at("absent"), LIMITS), Facts::Missing(_)));
        assert!(matches!(look(Path::new("file"), LIMITS), Facts::Missing(_)));
    }
}
