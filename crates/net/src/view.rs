//! What the interfaces of a namespace are. Reads only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteType, RouteVia,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::error::NetError;
use crate::interface::{Interface, Neighbour, Route};

/// How long the kernel may take for all that one call asks.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);

/// The interfaces of the handle's namespace, `eth0` first, then by name; `lo` is among them.
///
/// Left out of the routes: other tables than the main one, routes by type of service, and from a route with several
/// next hops all but its first on each interface. What a route says of MTU or window is not kept.
pub async fn interfaces(handle: &Handle) -> Result<Vec<Interface>, NetError> {
    let reading = async {
        let links: Vec<LinkMessage> = handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(NetError::asked("list the interfaces"))?;
        let addresses = addresses(handle).await?;
        let routes = routes(handle).await?;
        let neighbours = neighbours(handle).await?;
        let mut found: Vec<Interface> = links
            .iter()
            .map(|link| assemble(link, &addresses, &routes, &neighbours))
            .filter(|interface| !interface.name.is_empty())
            .collect();
        found.sort_by(|a, b| (a.name != "eth0", &a.name).cmp(&(b.name != "eth0", &b.name)));
        Ok(found)
    };
    let late = |_| NetError::Late { action: "list the interfaces".to_owned(), limit: LIMIT };
    tokio::time::timeout(LIMIT, reading).await.map_err(late)?
}

/// An interface by itself, which is quicker to read than all that is on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Such as `eth0`.
    pub name: String,
    /// The kernel's number for it, of this namespace only.
    pub index: u32,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Whether it was switched on.
    pub up: bool,
}

/// The interface of this Ethernet address. Of several, such as a NIC and a VLAN on it, the one that is hardware, else
/// the one that was there first.
pub async fn find_by_mac(handle: &Handle, mac: [u8; 6]) -> Result<Option<Link>, NetError> {
    let late = |_| NetError::Late { action: "list the interfaces".to_owned(), limit: LIMIT };
    let links = tokio::time::timeout(LIMIT, handle.link().get().execute().try_collect::<Vec<_>>()).await;
    let links = links.map_err(late)?.map_err(NetError::asked("list the interfaces"))?;
    let found = links.iter().map(|link| assemble(link, &[], &[], &[])).filter(|link| link.mac == mac);
    let first = found.min_by_key(|link| (link.kind.is_some(), link.index));
    Ok(first.map(|Interface { name, index, mtu, up, .. }| Link { name, index, mtu, up }))
}

fn assemble(
    link: &LinkMessage,
    addresses: &[AddressMessage],
    routes: &[FoundRoute],
    neighbours: &[NeighbourMessage],
) -> Interface {
    let index = link.header.index;
    let mut interface = Interface {
        name: String::new(),
        index,
        mac: [0; 6],
        mtu: 0,
        kind: None,
        up: link.header.flags.contains(LinkFlags::Up),
        addresses: addresses.iter().filter(|found| found.header.index == index).filter_map(global).collect(),
        routes: Vec::new(),
        neighbours: neighbours
            .iter()
            .filter(|found| found.header.ifindex == index)
            .filter_map(permanent)
            .collect(),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(bytes) => interface.mac = mac(bytes).unwrap_or_default(),
            LinkAttribute::LinkInfo(parts) => {
                interface.kind = parts.iter().find_map(|part| match part {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    interface.addresses.sort_by_key(|address| matches!(address, IpNet::V6(_)));
    let found = routes.iter().filter(|route| route.index == index);
    let mine: Vec<&FoundRoute> = found.collect();
    let follows = |route: &FoundRoute| {
        // Where a second route leads to the same place, both are named, so that either can be told from its absence.
        let alone =
            mine.iter().filter(|other| other.route.destination == route.route.destination).count() == 1;
        route.follows_from(&interface.addresses) && (alone || route.of_own_kind())
    };
    let routes = mine.iter().filter(|route| !follows(route)).map(|route| route.route.clone()).collect();
    interface.routes = routes;
    interface.neighbours.sort();
    interface.neighbours.dedup();
    interface
}

fn mac(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok()
}

/// All addresses of the namespace.
pub(crate) async fn addresses(handle: &Handle) -> Result<Vec<AddressMessage>, NetError> {
    let found = handle.address().get().execute().try_collect().await;
    found.map_err(NetError::asked("list the addresses"))
}

/// The address and prefix of one that is of more than this machine or link.
pub(crate) fn global(message: &AddressMessage) -> Option<IpNet> {
    let mut own = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link the other one is the peer's.
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => own = own.or(Some(*address)),
            _ => {}
        }
    }
    let own = own?;
    let reaches_far = match (own, message.header.scope) {
        (_, AddressScope::Host | AddressScope::Nowhere) => false,
        (IpAddr::V6(address), scope) => {
            scope != AddressScope::Link && !address.is_unicast_link_local() && !address.is_loopback()
        }
        (IpAddr::V4(address), _) => !address.is_loopback(),
    };
    if !reaches_far {
        return None;
    }
    IpNet::new(own, message.header.prefix_len).ok()
}

async fn neighbours(handle: &Handle) -> Result<Vec<NeighbourMessage>, NetError> {
    let found = handle.neighbours().get().execute().try_collect().await;
    found.map_err(NetError::asked("list the neighbours"))
}

/// The permanent neighbours of one interface.
pub(crate) async fn neighbours_of(handle: &Handle, index: u32) -> Result<Vec<Neighbour>, NetError> {
    let found = neighbours(handle).await?;
    Ok(found.iter().filter(|found| found.header.ifindex == index).filter_map(permanent).collect())
}

fn permanent(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut hardware = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => address = Some((*found).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some((*found).into());
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => hardware = mac(bytes),
            _ => {}
        }
    }
    Some(Neighbour { address: address?, mac: hardware? })
}

/// A unicast route of the main table.
#[derive(Debug, Clone)]
pub(crate) struct FoundRoute {
    pub(crate) index: u32,
    pub(crate) protocol: RouteProtocol,
    pub(crate) route: Route,
}

impl FoundRoute {
    /// Whether the kernel makes it of itself for an interface with these addresses.
    pub(crate) fn follows_from(&self, addresses: &[IpNet]) -> bool {
        self.protocol == RouteProtocol::Kernel
            && self.route.gateway.is_none()
            && (self.of_own_kind()
                || addresses.iter().any(|address| address.trunc() == self.route.destination))
    }

    /// Link-local and multicast, which every interface has, and what leads to the machine itself.
    fn of_own_kind(&self) -> bool {
        match self.route.destination {
            IpNet::V6(net) => {
                (net.addr().is_unicast_link_local() && net.prefix_len() >= 10) || net.addr().is_multicast()
            }
            IpNet::V4(net) => net.addr().is_loopback(),
        }
    }
}

/// The unicast routes of the main table.
pub(crate) async fn routes(handle: &Handle) -> Result<Vec<FoundRoute>, NetError> {
    let mut found = Vec::new();
    for query in
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
    {
        let answers = handle.route().get(query).execute().try_collect::<Vec<RouteMessage>>().await;
        let answers = answers.map_err(NetError::asked("list the routes"))?;
        found.extend(answers.iter().flat_map(parse_route));
    }
    Ok(found)
}

fn parse_route(message: &RouteMessage) -> Vec<FoundRoute> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return Vec::new(),
    };
    let (mut source, mut metric) = (None, 0);
    let mut hop = Hop { on_link: header.flags.contains(RouteFlags::Onlink), ..Hop::default() };
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(found) => match ip(found) {
                Some(found) => destination = found,
                None => return Vec::new(),
            },
            RouteAttribute::PrefSource(found) => source = ip(found),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::MultiPath(several) => {
                hops.extend(several.iter().map(|one| {
                    let mut hop = Hop {
                        index: one.interface_index,
                        on_link: one.flags.contains(RouteNextHopFlags::Onlink),
                        gateway: None,
                    };
                    one.attributes.iter().for_each(|attribute| hop.take(attribute));
                    hop
                }));
            }
            other => hop.take(other),
        }
    }
    let passed_over = table != u32::from(RouteHeader::RT_TABLE_MAIN)
        || header.kind != RouteType::Unicast
        || header.tos != 0
        || header.source_prefix_length != 0
        || header.flags.contains(RouteFlags::Cloned);
    let Ok(destination) = IpNet::new(destination, header.destination_prefix_length) else {
        return Vec::new();
    };
    if passed_over {
        return Vec::new();
    }
    if hops.is_empty() {
        hops.push(hop);
    }
    let mut found: Vec<FoundRoute> = Vec::new();
    for Hop { index, gateway, on_link } in hops {
        if index != 0 && !found.iter().any(|route| route.index == index) {
            let route = Route { destination: destination.trunc(), gateway, source, metric, on_link };
            found.push(FoundRoute { index, protocol: header.protocol, route });
        }
    }
    found
}

#[derive(Default)]
struct Hop {
    index: u32,
    gateway: Option<IpAddr>,
    on_link: bool,
}

impl Hop {
    fn take(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Oif(index) => self.index = *index,
            RouteAttribute::Gateway(found) => self.gateway = ip(found),
            RouteAttribute::Via(RouteVia::Inet(found)) => self.gateway = Some((*found).into()),
            RouteAttribute::Via(RouteVia::Inet6(found)) => self.gateway = Some((*found).into()),
            _ => {}
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
