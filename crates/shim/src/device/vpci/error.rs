//! Why a device of the host is not passed through, and why a pod with one does not move.

use dunlin_qemu::VfioError;
use thiserror::Error;

use crate::controller::NotNow;
use crate::vm::VmError;

/// A device could not be passed through or taken back.
#[derive(Debug, Error)]
pub(crate) enum VpciError {
    #[error(transparent)]
    Host(#[from] VfioError),
    #[error(
        "device {id} of type {kind:?} cannot be passed through; use idType `vpci-instance-id` with the PCI address of a device on this host"
    )]
    Kind { id: String, kind: String },
    #[error("device {id} is asked for twice by one container; name it once")]
    Twice { id: String },
    #[error(
        "device {id}: {what:?} is not the number of a virtual function; write it as <address>/<number>, 1 for the first"
    )]
    Index { id: String, what: String },
    #[error(
        "device {id} has no free root port: the machine has 4 for network cards and passed-through devices together; take one away first"
    )]
    NoPort { id: String },
    #[error(transparent)]
    NotNow(#[from] NotNow),
    #[error("device {0} is not known in this sandbox")]
    Unknown(String),
    #[error("passing device {id} through: {source}")]
    Machine { id: String, source: Box<VmError> },
}

/// What ties a sandbox to this host.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Tie {
    /// A device of a container.
    #[error(
        "container {container}: device {id} is passed through from this host and cannot leave it; run the container without it"
    )]
    Device { container: String, id: String },
    /// A device that is left over from a container.
    #[error(
        "device {id} of this host is still in the virtual machine, though no container uses it; delete the sandbox's containers and create them again"
    )]
    Left { id: String },
}
