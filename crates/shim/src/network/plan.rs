//! Which interface of a namespace becomes which NIC, and whether a destination's will do. Pure.

use std::collections::{BTreeMap, BTreeSet};

use dunlin_bridge::message::{IpConfig, Neighbor, NetworkAdapter, Route as AdapterRoute};
use dunlin_net::{Interface, Route, Tap, mac_text, missing};
use dunlin_qemu::RootPort;
use dunlin_wire::tree::{SavedEndpoint, SavedRoute};

use super::error::NetworkError;

/// Root ports of every machine.
const PORTS: u8 = 4;

/// What a move does about addresses that differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contract {
    /// The guest keeps its addresses, which must be the destination's.
    Keep,
    /// The guest gets the destination's.
    Rebind,
}

impl Contract {
    /// On the container's spec, by the node of the destination.
    pub(crate) const ANNOTATION: &str = "dev.dunlin.network";

    /// None: the annotation says neither.
    pub(crate) fn read(annotation: Option<&str>) -> Option<Contract> {
        match annotation {
            None | Some("" | "keep") => Some(Contract::Keep),
            Some("rebind") => Some(Contract::Rebind),
            Some(_) => None,
        }
    }
}

/// The interfaces that a pod is to have: up, with an Ethernet address, and neither the loopback nor a tap, which is a
/// machine's already.
pub(crate) fn usable(interfaces: Vec<Interface>) -> Vec<Interface> {
    let tap = |one: &Interface| one.kind.as_deref() == Some(Tap::KIND);
    let usable = |one: &Interface| one.name != "lo" && one.up && one.mac != [0; 6] && !tap(one);
    interfaces.into_iter().filter(usable).collect()
}

/// A root port for each interface, from the first one up.
pub(crate) fn ports(interfaces: &[Interface], taken: &BTreeSet<u8>) -> Result<Vec<RootPort>, NetworkError> {
    let free = (0..PORTS).filter(|port| !taken.contains(port)).filter_map(|port| RootPort::new(port).ok());
    let free: Vec<RootPort> = free.collect();
    if interfaces.len() > free.len() {
        return Err(NetworkError::Ports {
            wanted: interfaces.len(),
            names: list(interfaces.iter().map(|one| &one.name)),
            free: free.len(),
            all: PORTS.into(),
        });
    }
    Ok(free.into_iter().take(interfaces.len()).collect())
}

/// What the guest is to have for an interface.
pub(crate) fn endpoint(interface: &Interface, port: RootPort) -> SavedEndpoint {
    SavedEndpoint {
        endpoint_id: format!("{}-{}", interface.name, interface.index),
        mac: mac_text(interface.mac),
        name: interface.name.clone(),
        root_port: port.index(),
        mtu: interface.mtu,
        addresses: interface.addresses.clone(),
        routes: interface
            .routes
            .iter()
            .map(|route| SavedRoute {
                destination: route.destination,
                gateway: route.gateway,
                source: route.source,
                metric: route.metric,
                on_link: route.on_link,
            })
            .collect(),
        neighbours: interface.neighbours.iter().map(|one| (one.address, mac_text(one.mac))).collect(),
    }
}

/// The destination's interface for each saved NIC: that of its name, else, one to one, the only one.
pub(crate) fn pairs(
    saved: &BTreeMap<String, SavedEndpoint>,
    interfaces: &[Interface],
    path: &str,
    contract: Contract,
) -> Result<BTreeMap<String, Interface>, NetworkError> {
    let mut pairs = BTreeMap::new();
    for (id, nic) in saved {
        let named = interfaces.iter().find(|one| one.name == nic.name);
        let only = || (saved.len() == 1 && interfaces.len() == 1).then(|| &interfaces[0]);
        let here = named.or_else(only).ok_or_else(|| NetworkError::NoInterface {
            name: nic.name.clone(),
            path: path.to_owned(),
            there: some(list(interfaces.iter().map(|one| &one.name))),
            addresses: some(list(&nic.addresses)),
        })?;
        if contract == Contract::Keep {
            check(nic, here, path)?;
        }
        pairs.insert(id.clone(), here.clone());
    }
    Ok(pairs)
}

fn route(saved: &SavedRoute) -> Route {
    let SavedRoute { destination, gateway, source, metric, on_link } = *saved;
    Route { destination, gateway, source, metric, on_link }
}

/// Keep: the same addresses, the guest's gateways, and room for its packets.
fn check(nic: &SavedEndpoint, here: &Interface, path: &str) -> Result<(), NetworkError> {
    let set = |addresses: &[_]| -> BTreeSet<_> { addresses.iter().copied().collect() };
    if set(&nic.addresses) != set(&here.addresses) {
        return Err(NetworkError::Addresses {
            name: nic.name.clone(),
            path: path.to_owned(),
            wanted: some(list(&nic.addresses)),
            there: some(list(&here.addresses)),
        });
    }
    // The guest keeps its own routes: where others lead out, what goes through a gateway gets nowhere.
    let routes: Vec<Route> = nic.routes.iter().map(route).collect();
    let missing = missing(&routes, &here.routes);
    if !missing.is_empty() {
        return Err(NetworkError::Routes {
            name: nic.name.clone(),
            path: path.to_owned(),
            wanted: list(missing),
            there: some(list(&here.routes)),
        });
    }
    if here.mtu < nic.mtu {
        return Err(NetworkError::Mtu {
            name: nic.name.clone(),
            path: path.to_owned(),
            wanted: nic.mtu,
            there: here.mtu,
        });
    }
    Ok(())
}

/// A rebound NIC: what it is to the guest stays, what it has becomes this host's.
pub(crate) fn rebound(nic: &SavedEndpoint, here: &Interface) -> SavedEndpoint {
    let port = nic.root_port;
    SavedEndpoint {
        mac: nic.mac.clone(),
        name: nic.name.clone(),
        root_port: port,
        ..endpoint(here, RootPort::new(port).unwrap_or_else(|_| unreachable!("it was checked at the import")))
    }
}

/// The settings of the bridge's Network request. `dunlin`: the guest knows our fields.
pub(crate) fn adapter(namespace: &str, id: &str, nic: &SavedEndpoint, dunlin: bool) -> NetworkAdapter {
    let text = |address: Option<std::net::IpAddr>| address.map(|one| one.to_string()).unwrap_or_default();
    NetworkAdapter {
        namespace_id: namespace.to_owned(),
        id: id.to_owned(),
        mac_address: nic.mac.clone(),
        ip_configs: nic
            .addresses
            .iter()
            .map(|address| IpConfig {
                ip_address: address.addr().to_string(),
                prefix_length: address.prefix_len(),
            })
            .collect(),
        routes: nic
            .routes
            .iter()
            .map(|route| AdapterRoute {
                next_hop: text(route.gateway),
                destination_prefix: route.destination.to_string(),
                metric: route.metric,
                dunlin_source: if dunlin { text(route.source) } else { String::new() },
                dunlin_on_link: dunlin && route.on_link,
            })
            .collect(),
        dunlin_name: if dunlin { nic.name.clone() } else { String::new() },
        dunlin_mtu: if dunlin { nic.mtu } else { 0 },
        dunlin_neighbors: nic
            .neighbours
            .iter()
            .filter(|_| dunlin)
            .map(|(address, mac)| Neighbor { ip_address: address.to_string(), mac_address: mac.clone() })
            .collect(),
        ..NetworkAdapter::default()
    }
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn some(text: String) -> String {
    if text.is_empty() { "none".to_owned() } else { text }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
