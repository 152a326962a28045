//! A shim as the node sees it: a process found by its state directory, a ttrpc service to call.
//!
//! The node starts a shim only for an arriving sandbox and ends only the one it started.

pub(crate) mod call;
pub(crate) mod process;
pub(crate) mod start;

use std::path::{Path, PathBuf};

use self::process::Process;
pub(crate) use call::{Shim, ShimError};

/// `<state_dir>/<namespace>/<sandbox id>`: where a shim says how it is reached.
#[derive(Debug, Clone)]
pub(crate) struct ShimHome {
    path: PathBuf,
    namespace: String,
    sandbox: String,
}

impl ShimHome {
    /// Names only; nothing is read. Ids are checked by the caller.
    pub(crate) fn new(state_dir: &Path, namespace: &str, sandbox: &str) -> ShimHome {
        ShimHome {
            path: state_dir.join(namespace).join(sandbox),
            namespace: namespace.into(),
            sandbox: sandbox.into(),
        }
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The namespace that the shim serves.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The sandbox that the shim serves.
    pub(crate) fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// The shim's ttrpc address, if one was written.
    pub(crate) fn address(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.path.join("address")).ok()?;
        let line = text.lines().next()?.trim();
        (!line.is_empty()).then(|| line.to_owned())
    }

    /// The shim's pid, if one was written.
    pub(crate) fn pid(&self) -> Option<i32> {
        std::fs::read_to_string(self.path.join("shim.pid")).ok()?.trim().parse().ok().filter(|pid| *pid > 1)
    }

    /// The shim's process, while it lives.
    pub(crate) fn process(&self) -> Option<Process> {
        self.pid().and_then(Process::find).filter(|shim| shim.has_argument(&self.sandbox))
    }

    /// The socket at the shim's address, while somebody listens there.
    pub(crate) async fn listening(&self) -> Option<String> {
        let socket = self.address()?.trim_start_matches("unix://").to_owned();
        tokio::net::UnixStream::connect(&socket).await.ok().map(|_| socket)
    }

    /// Removes what leads others to a shim that is gone; its logs stay.
    pub(crate) fn forget(&self) {
        for name in ["address", "shim.pid", "shim.sock"] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
    }
}
