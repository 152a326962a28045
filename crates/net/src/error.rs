//! What can go wrong with a namespace or an interface.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A namespace could not be used, or an interface not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The file cannot be opened.
    #[error("cannot open the network namespace {path}: {source}; is it still there, and is this root?", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file can be opened and is something else.
    #[error("{path} is no network namespace but {found}; name a file like /run/netns/NAME or /proc/PID/ns/net", path = path.display())]
    NoNamespace {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// The thread for the work in a namespace could not be started, or could not enter it.
    #[error("cannot enter the network namespace {namespace}: {source}; that needs CAP_SYS_ADMIN")]
    Enter {
        /// As [`crate::Namespace`] prints itself.
        namespace: String,
        /// The system's reason.
        source: io::Error,
    },
    /// What ran inside the namespace panicked.
    #[error("the work in the network namespace {namespace} panicked; see the log for where")]
    Panicked {
        /// As [`crate::Namespace`] prints itself.
        namespace: String,
    },
    /// No netlink socket.
    #[error("cannot talk to the kernel about the network: {0}")]
    Socket(io::Error),
    /// The kernel refused.
    #[error("cannot {action}: {reason}")]
    Kernel {
        /// What was asked for, with its object.
        action: String,
        /// The kernel's reason.
        reason: String,
        /// The kernel's error number; None when the answer was not one.
        errno: Option<i32>,
    },
    /// A tap could not be made.
    #[error(
        "cannot make the tap {name} in the network namespace {namespace}: {source}{}",
        tap_remedy(source)
    )]
    Tap {
        /// Its name.
        name: String,
        /// As [`crate::Namespace`] prints itself.
        namespace: String,
        /// The system's reason.
        source: io::Error,
    },
    /// An interface could not be read or changed.
    #[error("interface {name}: cannot {action}: {source}; is it still there?")]
    Device {
        /// Its name.
        name: String,
        /// What was asked of it.
        action: String,
        /// The system's reason.
        source: io::Error,
    },
    /// Somebody else filters what comes in on an interface.
    #[error(
        "interface {interface} has {what} that is not Dunlin's, so its frames cannot be redirected; \
         remove it (tc qdisc del dev NAME ingress)"
    )]
    Foreign {
        /// Its number.
        interface: u32,
        /// What was found.
        what: String,
    },
    /// The kernel did not answer.
    #[error("the kernel did not {action} within {limit:?}; is the host overloaded?")]
    Late {
        /// What was asked for.
        action: String,
        /// How long it was waited for.
        limit: Duration,
    },
}

impl NetError {
    /// The kernel's error number, if that is what it is about.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetError::Kernel { errno, .. } => *errno,
            NetError::Open { source, .. }
            | NetError::Enter { source, .. }
            | NetError::Tap { source, .. }
            | NetError::Device { source, .. }
            | NetError::Socket(source) => source.raw_os_error(),
            NetError::NoNamespace { .. }
            | NetError::Panicked { .. }
            | NetError::Foreign { .. }
            | NetError::Late { .. } => None,
        }
    }

    /// Names what the kernel was asked for.
    pub(crate) fn asked(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetError {
        let action = action.into();
        move |error| match error {
            rtnetlink::Error::NetlinkError(message) => NetError::Kernel {
                action,
                reason: message.to_io().to_string(),
                errno: message.to_io().raw_os_error(),
            },
            other => NetError::Kernel { action, reason: other.to_string(), errno: None },
        }
    }
}

/// What can be done about a tap that could not be made.
fn tap_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(nix::libc::EBUSY) => {
            "; another virtual machine is connected there: give each pod a namespace of its own"
        }
        Some(nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::ENXIO) => "; the kernel needs its tun module",
        _ => "",
    }
}
