//! The sandbox's directory below `state_dir`: its names, and finding another sandbox's address.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use crate::config::Config;
use crate::rootfs::scratch;

/// `sun_path` holds 108 bytes with the closing zero.
const SOCKET_PATH_MAX: usize = 107;
const REMOVE_TRIES: u32 = 5;
const REMOVE_PAUSE: Duration = Duration::from_millis(50);

/// `<state_dir>/<namespace>/<sandbox id>`.
#[derive(Debug, Clone)]
pub(crate) struct StateDirectory {
    path: PathBuf,
}

/// The directory cannot be used.
#[derive(Debug, Error)]
pub(crate) enum DirectoryError {
    #[error(
        "socket path {path} has {length} bytes, the kernel takes {SOCKET_PATH_MAX}: shorten state_dir in the configuration"
    )]
    TooLong { path: PathBuf, length: usize },
    #[error("cannot create {path}: {source}; check state_dir in the configuration")]
    Create { path: PathBuf, source: std::io::Error },
}

impl StateDirectory {
    pub(crate) fn new(state_dir: &Path, namespace: &str, sandbox: &str) -> StateDirectory {
        StateDirectory { path: state_dir.join(namespace).join(sandbox) }
    }

    /// Makes the directory, readable by root alone.
    pub(crate) fn create(&self) -> Result<(), DirectoryError> {
        use std::os::unix::fs::DirBuilderExt;
        let longest = self.qmp_socket();
        let length = longest.as_os_str().len().max(self.shim_socket().as_os_str().len());
        if length > SOCKET_PATH_MAX {
            return Err(DirectoryError::TooLong { path: longest, length });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(|source| DirectoryError::Create { path: self.path.clone(), source })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
    pub(crate) fn shim_socket(&self) -> PathBuf {
        self.path.join("shim.sock")
    }
    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }
    pub(crate) fn link_socket(&self) -> PathBuf {
        self.path.join("link.sock")
    }
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }
    /// FIFOs of the shim's own.
    pub(crate) fn io(&self) -> PathBuf {
        self.path.join("io")
    }
    pub(crate) fn shim_log(&self) -> PathBuf {
        self.path.join("shim.log")
    }
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }
    pub(crate) fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }
    pub(crate) fn guest_log(&self) -> PathBuf {
        self.path.join("guest.log")
    }
    /// The scratch files that are this host's; see [`scratch::own`].
    pub(crate) fn ledger(&self) -> PathBuf {
        self.path.join("scratch")
    }
    /// One line: the shim's ttrpc address. Orchestrators find the shim by it.
    pub(crate) fn address_file(&self) -> PathBuf {
        self.path.join("address")
    }
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.path.join("shim.pid")
    }

    /// The ttrpc address of the shim that serves here, when one said so.
    pub(crate) fn address(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.address_file()).ok()?;
        let line = text.lines().next()?.trim();
        (!line.is_empty()).then(|| line.to_owned())
    }
}

/// Where a sandbox's scratch disks lie: `<data_dir>/scratch/<namespace>/<sandbox id>`, or the same below
/// `disks.scratch_dir`.
pub(crate) fn scratch_directory(config: &Config, namespace: &str, sandbox: &str) -> PathBuf {
    let root = config.disks.scratch_dir.clone().unwrap_or_else(|| config.data_dir.join("scratch"));
    root.join(namespace).join(sandbox)
}

/// Removes what a sandbox has there and the ledger calls this host's. Another host, or somebody, may have files in a
/// directory of the same name: a destination that was refused because of one must not take it away.
pub(crate) fn clear_scratch(config: &Config, state: &StateDirectory, namespace: &str, sandbox: &str) {
    scratch::clear_owned(&state.ledger());
    // Empty, or not ours to empty.
    let _ = std::fs::remove_dir(scratch_directory(config, namespace, sandbox));
}

/// Removes a directory with all in it, also one that is changed meanwhile. What cannot be removed is said on standard
/// error, which containerd puts into its log.
pub(crate) fn remove_tree(directory: &Path) {
    let mut tries = 1..=REMOVE_TRIES;
    while let Err(error) = std::fs::remove_dir_all(directory) {
        if error.kind() == ErrorKind::NotFound {
            return;
        }
        // A program of the shim's may be about to end and make a file yet, or another `delete` be at it too.
        if tries.next().is_none() {
            eprintln!("{} stays: {error}; remove it by hand", directory.display());
            return;
        }
        std::thread::sleep(REMOVE_PAUSE);
    }
}
