//! Why a pod's network could not be had.

use std::collections::BTreeMap;

use dunlin_net::NetError;
use dunlin_wire::tree::SavedEndpoint;
use thiserror::Error;

/// A pod does not get its NICs here; nothing of them is left.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(
        "the pod's network namespace has {wanted} interfaces ({names}) and the virtual machine has {free} of its {all} \
         ports free; use fewer interfaces, or fewer pods in one sandbox"
    )]
    Ports { wanted: usize, names: String, free: usize, all: usize },
    #[error("the network namespace {path} is that of pod {pod} of the same sandbox; give each pod its own")]
    Shared { path: String, pod: String },
    #[error(
        "the pod has {count} network interfaces ({names}) and no network namespace on this host; \
         name one in the container's spec (--netns POD=PATH)"
    )]
    NoNamespace { count: usize, names: String },
    #[error(
        "network interface {name}: the network namespace {path} has no such interface that is up, but {there}; \
         make one of that name there, with the addresses {addresses}"
    )]
    NoInterface { name: String, path: String, there: String, addresses: String },
    #[error(
        "network interface {name}: the pod has the addresses {wanted}, and the network namespace {path} has {there}; \
         give it the same ones, or move with --network rebind, which breaks its connections"
    )]
    Addresses { name: String, path: String, wanted: String, there: String },
    #[error(
        "network interface {name}: the pod goes out by the routes {wanted}, and the network namespace {path} has \
         {there}; give it the same gateways, or move with --network rebind, which breaks its connections"
    )]
    Routes { name: String, path: String, wanted: String, there: String },
    #[error(
        "network interface {name}: the pod's packets have up to {wanted} bytes, and {there} are let through in the \
         network namespace {path}; raise its MTU, or move with --network rebind"
    )]
    Mtu { name: String, path: String, wanted: u32, there: u32 },
    #[error("network interface {name}: {field}: {reason}")]
    Saved { name: String, field: &'static str, reason: String },
}

impl NetworkError {
    /// NICs without a namespace for them.
    pub(crate) fn no_namespace(nics: &BTreeMap<String, SavedEndpoint>) -> NetworkError {
        let names: Vec<&str> = nics.values().map(|nic| nic.name.as_str()).collect();
        NetworkError::NoNamespace { count: nics.len(), names: names.join(", ") }
    }
}
