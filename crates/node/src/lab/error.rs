//! What can go wrong in the lab, one variant a failed action.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

use super::HostName;

/// Why the lab could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabError {
    /// Namespaces and mounts need root.
    #[error("the lab makes network namespaces and mounts and needs root; run it with sudo")]
    NotRoot,
    /// A program the lab starts is missing.
    #[error("`{program}` is not installed or not in PATH; install it ({package})")]
    MissingProgram { program: String, package: &'static str },
    /// The lab is up with another containerd than was asked for.
    #[error(
        "the lab in {} is up with {}; end it first with `dunlin lab down`", dir.display(),
        present.as_ref().map_or_else(|| "the installed containerd".to_owned(), |path| format!("the containerd of {}", path.display()))
    )]
    OtherContainerd { dir: PathBuf, present: Option<PathBuf> },
    /// The directory that was named has no containerd.
    #[error(
        "{} has neither containerd and ctr nor usr/bin/containerd and usr/bin/ctr; name the directory of the programs, or a root that a package was unpacked into", .0.display()
    )]
    NoContainerd(PathBuf),
    /// containerd did not tell its version.
    #[error("`{command}` does not tell a version: {output}")]
    NoVersion { command: String, output: String },
    /// A file that the build makes is missing.
    #[error("{what} {} is missing; run `{remedy}` first", path.display())]
    MissingFile { what: &'static str, path: PathBuf, remedy: &'static str },
    /// Another lab holds the names `dunlin-a`, `dunlin-b`, `dunlin-client`, `dunlin-net`.
    #[error("another lab is up in {}; end it with `dunlin lab down --dir {}`", .0.display(), .0.display())]
    OtherLab(PathBuf),
    /// The lab is not up.
    #[error("lab host {0} is not running; start the lab with `dunlin lab up`")]
    HostDown(HostName),
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    /// A system call on a namespace or mount failed.
    #[error("cannot {action} ({subject}): {source}{}", permission_hint(*source))]
    Namespace { action: &'static str, subject: String, source: nix::Error },
    /// A program could not be started.
    #[error("cannot start `{command}`: {source}")]
    Spawn { command: String, source: io::Error },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}): {output}")]
    Command { command: String, status: ExitStatus, output: String },
    /// A lab host ended or reported failure while coming up.
    #[error("lab host {host} did not come up: {reason}; its logs are in {}", logs.display())]
    HostFailed { host: HostName, reason: String, logs: PathBuf },
    /// Something did not happen in time.
    #[error("{what} did not happen within {:.1} s; see `dunlin lab logs`", .deadline.as_secs_f64())]
    Deadline { what: String, deadline: Duration },
    /// A key or certificate could not be made.
    #[error("cannot make the certificate of {subject}: {source}")]
    Certificate { subject: String, source: rcgen::Error },
    /// The lab's own record is unreadable.
    #[error("{} is not a lab record: {reason}; remove it with `dunlin lab down`", path.display())]
    Record { path: PathBuf, reason: String },
    /// A pod network that cannot be made as asked.
    #[error("pod network {name}: {reason}")]
    PodNetwork { name: String, reason: String },
    /// A lab host refused a control request.
    #[error("lab host {host} refused `{request}`: {reason}")]
    Refused { host: HostName, request: String, reason: String },
}

/// Attaches the action and the path to an I/O error.
pub(crate) trait FileContext<T> {
    /// `cannot <action> <path>: <error>`.
    fn file(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, LabError>;
}

impl<T> FileContext<T> for io::Result<T> {
    fn file(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, LabError> {
        self.map_err(|source| LabError::File { action, path: path.into(), source })
    }
}

/// Attaches the action and its subject to a system call's error.
pub(crate) trait NamespaceContext<T> {
    /// `cannot <action> (<subject>): <error>`.
    fn namespace(self, action: &'static str, subject: impl Into<String>) -> Result<T, LabError>;
}

impl<T> NamespaceContext<T> for nix::Result<T> {
    fn namespace(self, action: &'static str, subject: impl Into<String>) -> Result<T, LabError> {
        self.map_err(|source| LabError::Namespace { action, subject: subject.into(), source })
    }
}

/// Root in a container usually lacks what the lab needs.
fn permission_hint(error: nix::Error) -> &'static str {
    if error == nix::Error::EPERM {
        "; in a container, the lab needs CAP_SYS_ADMIN (docker run --privileged)"
    } else {
        ""
    }
}
