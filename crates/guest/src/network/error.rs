//! What can go wrong with a pod's network, and the code that tells the host.

use std::io;
use std::path::PathBuf;

use dunlin_net::{NetError, mac_text};

use super::NamespaceKey;
use crate::path::ContainerId;

/// A network request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A field of the settings cannot be used.
    #[error("{field} of the network adapter: {reason}")]
    Settings {
        /// The field's name on the wire.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// The adapter is known already.
    #[error("network adapter {0} was added before; send Update to change it, or Remove it first")]
    Exists(String),
    /// Two adapters of one address cannot be told apart.
    #[error("network adapter {id} has the MAC {mac}, as {other} has; give each NIC its own", mac = mac_text(*mac))]
    SameMac {
        /// The new one.
        id: String,
        /// The one that was there.
        other: String,
        /// Their address.
        mac: [u8; 6],
    },
    /// No NIC of this address came.
    #[error(
        "no NIC with the MAC {mac} appeared within {seconds} s; attach it to the machine first", mac = mac_text(*mac)
    )]
    Missing {
        /// The address looked for.
        mac: [u8; 6],
        /// Time waited.
        seconds: u64,
    },
    /// Nothing was ever added to this namespace.
    #[error("network namespace {0} is not known to this guest; add an adapter to it first")]
    UnknownNamespace(NamespaceKey),
    /// The namespace has no such adapter.
    #[error("network namespace {namespace} has no adapter {id}; add it first")]
    UnknownAdapter {
        /// Where it was looked for.
        namespace: NamespaceKey,
        /// The id asked for.
        id: String,
    },
    /// Two sandboxes of one namespace.
    #[error("network namespace {namespace} belongs to container {container}; delete its state first")]
    Taken {
        /// The namespace.
        namespace: NamespaceKey,
        /// Whose it is.
        container: ContainerId,
    },
    /// The kernel refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A file could not be written.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl NetworkError {
    /// The HRESULT that stands for it in an answer (guest bridge protocol, section 4).
    pub fn hresult(&self) -> u32 {
        match self {
            NetworkError::UnknownNamespace(_) | NetworkError::UnknownAdapter { .. } => 0x8007_0490,
            NetworkError::Settings { .. }
            | NetworkError::Exists(_)
            | NetworkError::SameMac { .. }
            | NetworkError::Missing { .. }
            | NetworkError::Taken { .. }
            | NetworkError::Net(_)
            | NetworkError::Write { .. } => 0x8000_4005,
        }
    }

    pub(super) fn settings(field: &'static str, reason: impl Into<String>) -> NetworkError {
        NetworkError::Settings { field, reason: reason.into() }
    }
}
