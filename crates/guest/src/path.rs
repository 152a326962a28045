//! Which container ids and paths a host may name.
//!
//! The host decides what is mounted where, but only below the two directories that are meant for
//! it; everything else of the guest's file system belongs to the guest.

use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Directories below which the host may place mounts, bundles and scratch directories.
pub const HOST_ROOTS: [&str; 2] = ["/run/gcs", "/run/mounts"];

/// A request named something that the guest does not accept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// The container id has characters, or a length, that cannot name a directory or a cgroup.
    #[error(
        "container id {0:?} is not 1 to 128 characters of [A-Za-z0-9_.-] that begin with a letter or digit; choose another id"
    )]
    BadContainerId(String),
    /// The path leaves the directories meant for the host.
    #[error(
        "path {0:?} is not an absolute path without `.` and `..` below /run/gcs or /run/mounts; the guest mounts nowhere else"
    )]
    OutsideHostRoots(String),
}

/// A container's or pod's id in the guest: safe as one path component and as a cgroup's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(String);

impl ContainerId {
    /// Accepts 1 to 128 characters of `[A-Za-z0-9_.-]` that begin with a letter or a digit.
    pub fn parse(text: &str) -> Result<ContainerId, PathError> {
        let fits = (1..=128).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if fits { Ok(ContainerId(text.to_owned())) } else { Err(PathError::BadContainerId(text.to_owned())) }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Accepts an absolute path, free of `.` and `..`, strictly below one of [`HOST_ROOTS`].
pub fn host_path(text: &str) -> Result<PathBuf, PathError> {
    let refuse = || PathError::OutsideHostRoots(text.to_owned());
    let path = Path::new(text);
    if text.contains(['\0', '\n']) || !plain(path) {
        return Err(refuse());
    }
    let below = HOST_ROOTS.iter().any(|root| path.starts_with(root) && path != Path::new(root));
    if below { Ok(path.components().collect()) } else { Err(refuse()) }
}

/// Whether a path is absolute and has neither `.` nor `..` in it.
pub fn plain(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && !text.windows(3).any(|part| part == b"/./")
        && !text.ends_with(b"/.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_names() {
        for good in ["a", "web-1", "0123abc.def_g", &"x".repeat(128)] {
            assert_eq!(ContainerId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "a\n", "../x", &"x".repeat(129)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn paths_below_the_host_roots_only() {
        for good in ["/run/gcs/pods/a/a", "/run/mounts/scsi/0_0_0", "/run/gcs/c/x/"] {
            assert!(host_path(good).is_ok(), "{good:?} was refused");
        }
        for bad in [
            "",
            "/",
            "/run",
            "/run/gcs",
            "/run/gcs/",
            "/run/gcsx/a",
            "run/gcs/a",
            "/run/gcs/../x",
            "/run/gcs/./x",
            "/run/gcs/x/.",
            "/run/mounts/a/..",
            "/etc/passwd",
            "/run/gcs/a\nb",
        ] {
            assert!(host_path(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(host_path("/run/gcs//a///b/").unwrap(), Path::new("/run/gcs/a/b"));
    }
}
