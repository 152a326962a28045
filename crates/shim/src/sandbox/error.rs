//! Why the sandbox did not do what was asked.

use thiserror::Error;

use super::api::ApiError;
use crate::config::ConfigError;
use crate::container::limits::LimitError;
use crate::controller::NotNow;
use crate::device::plan9::Plan9Error;
use crate::device::scsi::ScsiError;
use crate::device::vpci::VpciError;
use crate::network::error::NetworkError;
use crate::process::io::IoError;
use crate::rootfs::RootfsError;
use crate::vm::VmError;
use crate::volume::VolumeError;

/// The classes that containerd tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    DeadlineExceeded,
    Cancelled,
    Unimplemented,
    Unavailable,
    Unknown,
}

/// A request that was not carried out; the container is as it was.
#[derive(Debug, Error)]
pub(crate) enum SandboxError {
    #[error("task {id}: not found in this shim")]
    NoContainer { id: String },
    #[error("task {id}: process {exec_id:?} not found")]
    NoProcess { id: String, exec_id: String },
    #[error("task {id} exists already in this shim")]
    ContainerExists { id: String },
    #[error("task {id}: its pod {pod} is not in this shim; create the pod's sandbox container first")]
    NoPod { id: String, pod: String },
    #[error(
        "task {id}: its pod {pod} is {state} or takes part in a move; new containers join only a ready pod"
    )]
    PodNotReady { id: String, pod: String, state: &'static str },
    #[error("task {id}: process {exec_id:?} exists already")]
    ProcessExists { id: String, exec_id: String },
    #[error("task {id}: cannot {action} while it is {state}")]
    State { id: String, action: &'static str, state: &'static str },
    #[error("task {id}: {message}")]
    Invalid { id: String, message: String },
    #[error("task {id}: {what} is not supported")]
    Unsupported { id: String, what: String },
    #[error("task {id}: {source}")]
    Limit { id: String, source: LimitError },
    #[error("task {id}: process {exec_id:?} has ended already")]
    ProcessGone { id: String, exec_id: String },
    #[error("task {id} runs on another host now: session {session} moved it; ask that host's containerd")]
    MovedAway { id: String, session: String },
    #[error("the sandbox's virtual machine is not running: {reason}")]
    NoMachine { reason: String },
    #[error(transparent)]
    NotNow(#[from] NotNow),
    #[error(transparent)]
    Scsi(#[from] ScsiError),
    #[error(transparent)]
    Share(#[from] Plan9Error),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Device(#[from] VpciError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Io(#[from] IoError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("bundle {path}: {message}")]
    Bundle { path: String, message: String },
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("migration: {message}")]
    Migration { code: Code, message: String },
}

impl SandboxError {
    pub(crate) fn code(&self) -> Code {
        match self {
            SandboxError::NoContainer { .. }
            | SandboxError::NoProcess { .. }
            | SandboxError::NoPod { .. }
            | SandboxError::ProcessGone { .. } => Code::NotFound,
            SandboxError::ContainerExists { .. } | SandboxError::ProcessExists { .. } => Code::AlreadyExists,
            SandboxError::State { .. }
            | SandboxError::NotNow(_)
            | SandboxError::PodNotReady { .. }
            | SandboxError::MovedAway { .. }
            | SandboxError::NoMachine { .. }
            | SandboxError::Share(_)
            | SandboxError::Volume(_)
            | SandboxError::Device(_)
            | SandboxError::Network(_)
            | SandboxError::Scsi(_) => Code::FailedPrecondition,
            SandboxError::Invalid { .. } | SandboxError::Config(_) | SandboxError::Bundle { .. } => {
                Code::InvalidArgument
            }
            SandboxError::Unsupported { .. }
            | SandboxError::Limit { source: LimitError::NotApplied { .. }, .. } => Code::Unimplemented,
            SandboxError::Limit { .. } => Code::InvalidArgument,
            SandboxError::Vm(error) => error.code(),
            SandboxError::Rootfs(_) | SandboxError::Io(_) => Code::Unknown,
            SandboxError::Api(error) => error.code(),
            SandboxError::Migration { code, .. } => *code,
        }
    }
}
