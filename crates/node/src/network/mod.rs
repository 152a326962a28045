//! The network namespaces of this host's pods: what is in them, whether the destination's fit, and making
//! and removing them where the host has nobody else to do so.
//!
//! ```text
//!   namespaces    which namespace a spec names, and what its interfaces are
//!   contract      both sides' interfaces -> what becomes of each NIC, or why it cannot be
//!   spec          destination: a spec that names this host's namespace and says what is wanted of it
//!   cni           destination: namespaces that this node makes itself, and removes when their pod has left
//!   holding       source: meanwhile the network is told again and again where the pod is
//! ```
//!
//! The shim compares again when it connects a machine to a namespace, and is the one that refuses in the
//! end; here it is told before anything is touched, and to the user.

pub(crate) mod cni;
pub(crate) mod contract;
pub(crate) mod holding;
pub(crate) mod namespaces;
pub(crate) mod spec;

use dunlin_wire::tree::{SavedEndpoint, SavedRoute};
use serde::{Deserialize, Serialize};

use crate::proto::{Interface, Route};

/// Annotation of a pod's own container: `rebind` gives its NICs the destination's addresses.
pub(crate) const NETWORK: &str = "dev.dunlin.network";
/// The value of [`NETWORK`] that asks for it.
pub(crate) const REBIND: &str = "rebind";
/// Annotation of a pod's own container that arrived with its addresses: its network cards as the guest has them, JSON
/// of [`GuestNic`]s. The interface beside the machine may have another MAC, an MTU that is larger, and more routes.
pub(crate) const NICS: &str = "dev.dunlin.network.nics";

/// A network card of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GuestNic {
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) mtu: u32,
    /// None: noted by a node that did not tell them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) routes: Option<Vec<GuestRoute>>,
}

/// A route that a guest was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GuestRoute {
    pub(crate) destination: String,
    /// Empty: it is on the link.
    #[serde(default)]
    pub(crate) gateway: String,
}

impl GuestNic {
    /// One of a shim's saved state.
    pub(crate) fn saved(endpoint: &SavedEndpoint) -> GuestNic {
        let route = |route: &SavedRoute| GuestRoute {
            destination: route.destination.to_string(),
            gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        };
        GuestNic {
            name: endpoint.name.clone(),
            mac: endpoint.mac.clone(),
            mtu: endpoint.mtu,
            routes: Some(endpoint.routes.iter().map(route).collect()),
        }
    }

    /// The card that stands for this interface.
    fn of(interface: &Interface) -> GuestNic {
        let route = |route: &Route| GuestRoute {
            destination: route.destination.clone(),
            gateway: route.gateway.clone(),
        };
        GuestNic {
            name: interface.name.clone(),
            mac: interface.mac.clone(),
            mtu: interface.mtu,
            routes: Some(interface.routes.iter().map(route).collect()),
        }
    }
}

/// Has `interfaces`, which are those beside the machine, say what the guest has: each meets the card of its name, or
/// the only one the only one.
pub(crate) fn as_the_guest_has_it(interfaces: &mut [Interface], nics: &[GuestNic]) {
    let both_alone = interfaces.len() == 1 && nics.len() == 1;
    for interface in interfaces {
        let named = nics.iter().find(|nic| nic.name == interface.name);
        if let Some(nic) = named.or(nics.first().filter(|_| both_alone)) {
            interface.mac.clone_from(&nic.mac);
            interface.mtu = nic.mtu;
            let route = |route: &GuestRoute| Route {
                destination: route.destination.clone(),
                gateway: route.gateway.clone(),
            };
            if let Some(routes) = &nic.routes {
                interface.routes = routes.iter().map(route).collect();
            }
        }
    }
}
