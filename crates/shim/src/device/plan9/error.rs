//! Why a directory of the host is not shared, and why a pod with one does not move.

use std::path::PathBuf;

use dunlin_wire::tree::SHARES_MAX;
use thiserror::Error;

use crate::controller::NotNow;
use crate::vm::VmError;

/// A share could not be made or taken away.
#[derive(Debug, Error)]
pub(crate) enum Plan9Error {
    #[error(
        "the mount of {host} on {destination} is of this host, and the guest's kernel has no 9P client to reach it with; use an image built with KERNEL=generic, or leave the mount out"
    )]
    NoClient { host: String, destination: String },
    #[error(
        "the mount of {host} on {destination} is writable, and this sandbox has writable shares of the host turned off; mount it with `ro`"
    )]
    Writable { host: String, destination: String },
    #[error("the mount of {host} on {destination}: {source}; create it on this host, or leave the mount out")]
    Source { host: String, destination: String, source: std::io::Error },
    #[error(
        "the mount of {host} on {destination} is neither a directory nor a regular file; only those can be shared with a virtual machine, leave it out"
    )]
    Kind { host: String, destination: String },
    #[error("the mount of {host} on {destination}: {what}; give it an absolute source in UTF-8")]
    Malformed { host: String, destination: String, what: &'static str },
    #[error(
        "this sandbox has {SHARES_MAX} directories of the host already; share a directory above them instead"
    )]
    Full,
    #[error(transparent)]
    NotNow(#[from] NotNow),
    #[error("{0}: no directory of the host is shared under that name")]
    Unknown(String),
    #[error("cannot serve {path} to the guest: {source}")]
    Serve { path: PathBuf, source: std::io::Error },
    #[error("sharing {path} with the guest: {source}")]
    Machine { path: String, source: Box<VmError> },
}

/// What ties a sandbox to this host.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Tie {
    /// A mount of a container.
    #[error(
        "container {container}: the mount of {host} on {destination} is a directory of this host, which no other host can serve ({why}); run the container without it, or put the data on its own disk"
    )]
    Mount { container: String, host: String, destination: String, why: String },
    /// A share that is left over from a container.
    #[error(
        "{host} of this host is still shared with the virtual machine, though no container uses it; delete the sandbox's containers and create them again"
    )]
    Share { host: String },
}
