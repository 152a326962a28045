//! What ends a benchmark, one variant an action.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use dunlin_bridge::host::BridgeError;
use dunlin_link::host::LinkError;
use dunlin_qemu::qmp::QmpError;
use dunlin_qemu::version::BinaryMissing;
use dunlin_qemu::{InvalidField, QemuError, SpawnError};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A program or an image that the build makes.
    #[error("{} is missing; run `{remedy}` first", path.display())]
    Missing {
        /// What was looked for.
        path: PathBuf,
        /// What makes it.
        remedy: &'static str,
    },
    /// A file, a socket or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// The action.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// As it was called.
        command: String,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// A lab of someone else.
    #[error("a lab is up in {} already; end it with `dunlin lab down` and run this again", .0.display())]
    LabBusy(PathBuf),
    /// Nothing happened for too long.
    #[error("{what} did not happen within {} s", .within.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        within: Duration,
    },
    /// A program answered what cannot be read.
    #[error("{what} cannot be read: {reason}")]
    Unreadable {
        /// The answer.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU went another way than the one that was asked for.
    #[error("the bare migration ended in status {status}; QEMU's logs: {logs}")]
    MigrationEnded {
        /// QMP's status.
        status: String,
        /// What both QEMUs wrote.
        logs: String,
    },
    /// A slot or a document is wrong.
    #[error(transparent)]
    Document(#[from] InvalidField),
    /// QEMU is not installed.
    #[error(transparent)]
    NoQemu(#[from] BinaryMissing),
    /// QEMU did not start.
    #[error("QEMU did not start: {0}")]
    Spawn(#[from] SpawnError),
    /// QEMU refused something.
    #[error("QEMU: {}", with_source(.0))]
    Qemu(#[from] QemuError),
    /// QEMU refused a command.
    #[error("QEMU: {0}")]
    Qmp(#[from] QmpError),
    /// A tap or a namespace.
    #[error(transparent)]
    Net(#[from] dunlin_net::NetError),
    /// The link to the guest.
    #[error("the link to the guest: {0}")]
    Link(#[from] LinkError),
    /// The guest refused something.
    #[error("the guest: {0}")]
    Bridge(#[from] BridgeError),
    /// A figure of what is shipped is beyond its limit.
    #[error("{what}: {found}, where at most {limit} are allowed")]
    Exceeded {
        /// What was measured.
        what: &'static str,
        /// Figure and unit.
        found: String,
        /// The same of the limit.
        limit: String,
    },
    /// A signal.
    #[error("interrupted")]
    Interrupted,
}

fn with_source(error: &QemuError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

impl BenchError {
    /// Names the action of an I/O error.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::Io { what, source }
    }
}
