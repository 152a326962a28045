//! Namespaces that this node makes itself, where the host has nobody else to do so: `[cni]` in its configuration.
//!
//! ```text
//!   conf      the network's configuration, as its administrator wrote it
//!   plugin    one call of one plugin
//!   made      a namespace from ADD to DEL, and the memory of it, which outlives the node
//! ```
//!
//! Invariant: only what is in the memory is ever deleted. A namespace that somebody else made stays.

mod conf;
pub(crate) mod made;
mod plugin;

use std::path::PathBuf;
use std::time::Duration;

use dunlin_net::NetError;

use crate::config::CniConfig;
use crate::proto::{Interface, PodNetwork};
use conf::Network;

/// Why a namespace was not made, or not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CniError {
    /// No configuration of that name.
    #[error("cni.network: there is no network `{network}` among the configurations in {}; {known}", dir.display())]
    Unknown {
        /// As configured.
        network: String,
        /// `cni.conf_dir`.
        dir: PathBuf,
        /// What there is, in words.
        known: String,
    },
    /// A configuration that cannot be read.
    #[error("the network configuration {} cannot be used: {reason}", path.display())]
    Conf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A plugin that is not installed.
    #[error("network plugin `{plugin}` is not in {} (cni.bin_dir); install it there", dir.display())]
    NoPlugin {
        /// Its type.
        plugin: String,
        /// Where it should be.
        dir: PathBuf,
    },
    /// A plugin refused, in its own words.
    #[error("network plugin `{plugin}` refused {command}: {reason}")]
    Refused {
        /// Its type.
        plugin: String,
        /// ADD or DEL.
        command: &'static str,
        /// What it printed.
        reason: String,
    },
    /// No answer in time; it was killed.
    #[error("network plugin `{plugin}` did not end {command} within {} s", limit.as_secs())]
    Late {
        /// Its type.
        plugin: String,
        /// ADD or DEL.
        command: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// A file or mount.
    #[error("cannot {action} {}: {reason}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The namespace itself.
    #[error("network namespace {}: {source}", path.display())]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: NetError,
    },
    /// An interface that none of the configured networks is for.
    #[error(
        "no network for interface `{interface}` of pod `{pod}`: `cni.network` is {other}'s; name one in `cni.interfaces`, or make \
         the namespace {} by hand before the move",
        path.display()
    )]
    NoNetwork {
        /// The pod.
        pod: String,
        /// Inside.
        interface: String,
        /// The one that has `cni.network`.
        other: String,
        /// The pod's namespace.
        path: PathBuf,
    },
}

/// The network of each of a pod's interfaces, in their order: the one that `cni.interfaces` names for it, else
/// `cni.network`, which makes one of them.
pub(crate) fn networks(config: &CniConfig, pod: &PodNetwork) -> Result<Vec<Network>, CniError> {
    let mut first = None;
    let mut found = Vec::new();
    for Interface { name, .. } in &pod.interfaces {
        let network = match (config.interfaces.get(name), &first) {
            (Some(network), _) => network,
            (None, None) => {
                first = Some(name);
                &config.network
            }
            (None, Some(other)) => {
                return Err(CniError::NoNetwork {
                    pod: pod.pod.clone(),
                    interface: name.clone(),
                    other: (*other).clone(),
                    path: pod.destination.clone().into(),
                });
            }
        };
        found.push(Network::find(&config.conf_dir, network)?);
    }
    Ok(found)
}
