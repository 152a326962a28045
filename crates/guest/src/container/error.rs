//! What can go wrong with a container, and the code that tells the host.

use std::io;
use std::path::PathBuf;

use super::spec::SpecError;
use super::user::UserError;
use crate::cgroup::limits::LimitError;
use crate::network::NetworkError;
use crate::oci::client::OciError;
use crate::path::{ContainerId, PathError};
use crate::storage::StorageError;

/// A container request failed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No container of this id.
    #[error("container {0} does not exist in this guest; create it first")]
    Unknown(String),
    /// There is one already.
    #[error("container {0} exists already; delete its state first or choose another id")]
    Exists(ContainerId),
    /// Its creation has not ended.
    #[error("container {0} is still being created; try again when Create has been answered")]
    StillCreating(ContainerId),
    /// Its init has not been started, or has ended.
    #[error("container {0} is not running; only a running one can do this")]
    NotRunning(ContainerId),
    /// Its init was started before.
    #[error("the init process of container {0} was started before; give OciProcess to start another process")]
    AlreadyStarted(ContainerId),
    /// No process of this pid.
    #[error("process {pid} is not (or no longer) a process of {owner}; see ProcessList for those that are")]
    NoProcess {
        /// The container, or the utility VM.
        owner: String,
        /// The pid asked for.
        pid: u32,
    },
    /// The process has no terminal.
    #[error("process {0} has no terminal to resize")]
    NoTerminal(u32),
    /// The wait's time ran out.
    #[error("process {pid} is still running after {milliseconds} ms")]
    StillRunning {
        /// Who was waited for.
        pid: u32,
        /// For how long.
        milliseconds: u32,
    },
    /// A document is no JSON.
    #[error("{what} is not valid JSON: {source}")]
    Json {
        /// Which document.
        what: &'static str,
        /// Where it fails.
        source: serde_json::Error,
    },
    /// The sandbox of a workload is not here.
    #[error("pod {0} does not exist in this guest; create its sandbox container first")]
    NoPod(ContainerId),
    /// The sandbox of a workload has ended.
    #[error("the sandbox container of pod {0} has ended and its namespaces with it; create the pod anew")]
    PodEnded(ContainerId),
    /// The command of a process outside of containers is empty.
    #[error("the process has neither CommandArgs nor CommandLine; give one")]
    NoCommand,
    /// A hostname with other characters than it may have.
    #[error("hostname {0:?} is not up to 255 characters of [A-Za-z0-9_.-]; change it in the spec")]
    BadHostname(String),
    /// Freezing or thawing failed.
    #[error("cannot {action} container {id}: {source}; it runs on as before")]
    Freeze {
        /// "pause" or "resume".
        action: &'static str,
        /// The container.
        id: ContainerId,
        /// The reason.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action} {path}: {source}")]
    System {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The task that did the work is gone.
    #[error("the guest dropped the request while it was carried out; see its log")]
    Lost,
    /// A path or id was refused.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The spec cannot run here.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The user does not exist.
    #[error(transparent)]
    User(#[from] UserError),
    /// The container runtime failed.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// A limit was refused.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The pod did not get its NICs.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A mount could not be undone.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl ContainerError {
    pub(super) fn at<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> ContainerError {
        let path = path.into();
        move |source| ContainerError::System { action, path, source: source.into() }
    }

    /// The HRESULT that stands for it in an answer (guest bridge protocol, section 4).
    pub fn hresult(&self) -> u32 {
        match self {
            ContainerError::Unknown(_) => 0xC037_010E,
            ContainerError::Exists(_) => 0xC037_010F,
            ContainerError::NotRunning(_) => 0xC037_0110,
            ContainerError::StillCreating(_) => 0x8037_0105,
            ContainerError::NoProcess { .. } => 0x8007_0490,
            ContainerError::StillRunning { .. } => 0xC037_0109,
            ContainerError::Json { .. } => 0xC037_010D,
            ContainerError::Path(PathError::BadContainerId(_)) => 0x8007_0057,
            ContainerError::Network(error) => error.hresult(),
            ContainerError::AlreadyStarted(_)
            | ContainerError::NoTerminal(_)
            | ContainerError::NoPod(_)
            | ContainerError::PodEnded(_)
            | ContainerError::NoCommand
            | ContainerError::BadHostname(_)
            | ContainerError::Freeze { .. }
            | ContainerError::System { .. }
            | ContainerError::Lost
            | ContainerError::Path(PathError::OutsideHostRoots(_))
            | ContainerError::Spec(_)
            | ContainerError::User(_)
            | ContainerError::Oci(_)
            | ContainerError::Limit(_)
            | ContainerError::Storage(_) => 0x8000_4005,
        }
    }
}
