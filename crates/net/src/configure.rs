//! Making an interface what it shall be, and moving it to another namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use nix::libc;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use crate::error::NetError;
use crate::interface::{Neighbour, Route, mac_text};
use crate::namespace::Namespace;
use crate::view;

/// What an interface shall have, and nothing else of these kinds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Wanted {
    /// Its name; None: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Largest packet, bytes; None: as it is. Below 1280 the kernel takes IPv6 off the interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Its addresses, the preferred one of each family first.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
    /// Its routes, without those that follow from the addresses. One to an address's own network takes the place of
    /// the one that the kernel makes.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    #[serde(default)]
    pub neighbours: Vec<Neighbour>,
}

/// Gives an interface exactly what is wanted, and switches it on. What it has already stays untouched, so that
/// connections over an address that stays do not notice. IPv6 addresses are usable at once (no duplicate detection).
/// A route whose gateway cannot be reached otherwise is set as if the gateway were on the link.
///
/// A route with next hops on other interfaces too stays: it is not this interface's alone.
///
/// Renaming takes the interface down for a moment. A failure leaves it with a part of what is wanted; a second call
/// goes on from there.
pub async fn apply(handle: &Handle, index: u32, wanted: &Wanted) -> Result<(), NetError> {
    let work = async {
        link(handle, index, wanted).await?;
        addresses(handle, index, &wanted.addresses).await?;
        routes(handle, index, wanted).await?;
        neighbours(handle, index, &wanted.neighbours).await
    };
    let limit = view::LIMIT;
    let late = |_| NetError::Late { action: format!("configure interface {index}"), limit };
    tokio::time::timeout(limit, work).await.map_err(late)?
}

/// Moves an interface into another namespace, where it is down, has no addresses, and may have another index.
/// Fails when there is one of its name.
pub async fn move_to(handle: &Handle, index: u32, namespace: &Namespace) -> Result<(), NetError> {
    into(handle, unspecified(index), index, namespace).await
}

/// As [`move_to`], under another name, which need not be free where it comes from.
pub async fn move_as(handle: &Handle, index: u32, namespace: &Namespace, name: &str) -> Result<(), NetError> {
    into(handle, unspecified(index).name(name.to_owned()), index, namespace).await
}

/// Switches an interface off.
pub async fn take_down(handle: &Handle, index: u32) -> Result<(), NetError> {
    change(handle, unspecified(index).down().build(), format!("switch interface {index} off")).await
}

fn unspecified(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

async fn into(
    handle: &Handle,
    message: LinkMessageBuilder<LinkUnspec>,
    index: u32,
    namespace: &Namespace,
) -> Result<(), NetError> {
    let message = message.setns_by_fd(namespace.as_fd().as_raw_fd()).build();
    change(handle, message, format!("move interface {index} to {namespace}")).await
}

async fn change(handle: &Handle, message: LinkMessage, action: String) -> Result<(), NetError> {
    handle.link().change(message).execute().await.map_err(NetError::asked(action))
}

async fn link(handle: &Handle, index: u32, wanted: &Wanted) -> Result<(), NetError> {
    let found: Vec<LinkMessage> = handle
        .link()
        .get()
        .match_index(index)
        .execute()
        .try_collect()
        .await
        .map_err(NetError::asked(format!("find interface {index}")))?;
    let attributes = || found.iter().flat_map(|link| &link.attributes);
    let up = found.iter().any(|link| link.header.flags.contains(LinkFlags::Up));
    let renamed = wanted.name.as_ref().filter(|wanted| {
        !attributes().any(|attribute| matches!(attribute, LinkAttribute::IfName(name) if name == *wanted))
    });
    if let Some(name) = renamed {
        if up {
            take_down(handle, index).await?;
        }
        let message = unspecified(index).name(name.clone()).build();
        change(handle, message, format!("rename interface {index} to {name}")).await?;
    }
    let resized = wanted.mtu.filter(|wanted| {
        !attributes().any(|attribute| matches!(attribute, LinkAttribute::Mtu(mtu) if mtu == wanted))
    });
    if let Some(mtu) = resized {
        let message = unspecified(index).mtu(mtu).build();
        change(handle, message, format!("set the MTU of interface {index} to {mtu}")).await?;
    }
    if !up || renamed.is_some() {
        change(handle, unspecified(index).up().build(), format!("switch interface {index} on")).await?;
    }
    Ok(())
}

async fn addresses(handle: &Handle, index: u32, wanted: &[IpNet]) -> Result<(), NetError> {
    let mine = async || -> Result<Vec<_>, NetError> {
        let found = view::addresses(handle).await?.into_iter().filter(|found| found.header.index == index);
        Ok(found.filter_map(|message| view::global(&message).map(|address| (address, message))).collect())
    };
    for (address, message) in mine().await? {
        if !wanted.contains(&address) {
            let done = handle.address().del(message).execute().await;
            let done = done.map_err(NetError::asked(format!("take {address} from interface {index}")));
            // With an address's first of its network the kernel may have taken the others.
            unless(done, &[libc::EADDRNOTAVAIL])?;
        }
    }
    let there: Vec<IpNet> = mine().await?.into_iter().map(|(address, _)| address).collect();
    // The kernel prefers the IPv4 address that came first, and the IPv6 address that came last.
    let (v4, v6): (Vec<_>, Vec<_>) = wanted.iter().partition(|address| address.addr().is_ipv4());
    for address in v4.into_iter().chain(v6.into_iter().rev()) {
        if there.contains(address) {
            continue;
        }
        let mut request = handle.address().add(index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            let message = request.message_mut();
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let done = request.execute().await;
        let done = done.map_err(NetError::asked(format!("give {address} to interface {index}")));
        unless(done, &[libc::EEXIST])?;
    }
    Ok(())
}

async fn routes(handle: &Handle, index: u32, wanted: &Wanted) -> Result<(), NetError> {
    let found = view::routes(handle).await?.into_iter().filter(|found| found.index == index);
    let mut there = Vec::new();
    for found in found {
        let replaced = wanted.routes.iter().any(|route| route.destination == found.route.destination);
        let kept = (found.follows_from(&wanted.addresses) && !replaced)
            || wanted.routes.iter().any(|route| route.same_place(&found.route));
        if kept {
            there.push(found.route);
        } else {
            let action = format!("take the route to {} from interface {index}", found.route.destination);
            let message = route_message(index, &found.route, found.protocol);
            let done = handle.route().del(message).execute().await.map_err(NetError::asked(action));
            // A route may go with another one that it needed.
            unless(done, &[libc::ESRCH])?;
        }
    }
    let mut missing: Vec<&Route> =
        wanted.routes.iter().filter(|route| !there.iter().any(|there| route.same_place(there))).collect();
    // What is on the link first, then the narrower networks, so that gateways can be reached.
    missing.sort_by_key(|route| (route.gateway.is_some(), 128 - route.destination.prefix_len().min(128)));
    for route in missing {
        add_route(handle, index, route).await?;
    }
    Ok(())
}

async fn add_route(handle: &Handle, index: u32, route: &Route) -> Result<(), NetError> {
    let Route { destination, gateway, .. } = route;
    let action = || match gateway {
        Some(gateway) => format!("route {destination} through {gateway} on interface {index}"),
        None => format!("route {destination} to interface {index}"),
    };
    let add = async |route: &Route| {
        let message = route_message(index, route, RouteProtocol::Static);
        let done = append_route(handle, message).await.map_err(NetError::asked(action()));
        // The very same one on the very same interface.
        unless(done, &[libc::EEXIST])
    };
    match add(route).await {
        Err(error)
            if gateway.is_some()
                && !route.on_link
                && matches!(error.errno(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL)) =>
        {
            // The first reason is the better one: it is about what was asked for.
            add(&Route { on_link: true, ..route.clone() }).await.map_err(|_| error)
        }
        done => done,
    }
}

/// Behind a route of the same destination and metric, where another interface has one: it is that one's own, and may be
/// on its way out. Taking "there is one" for success would leave this interface without its route.
async fn append_route(handle: &Handle, message: RouteMessage) -> Result<(), rtnetlink::Error> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(refusal) = answer.payload {
            return Err(rtnetlink::Error::NetlinkError(refusal));
        }
    }
    Ok(())
}

fn route_message(index: u32, route: &Route, protocol: RouteProtocol) -> RouteMessage {
    let mut message = match route.destination {
        IpNet::V4(net) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(net.network(), net.prefix_len()).build()
        }
        IpNet::V6(net) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(net.network(), net.prefix_len()).build()
        }
    };
    message.header.protocol = protocol;
    message.attributes.push(RouteAttribute::Oif(index));
    match (route.gateway, route.destination) {
        (Some(IpAddr::V6(gateway)), IpNet::V4(_)) => {
            message.attributes.push(RouteAttribute::Via(RouteVia::Inet6(gateway)));
        }
        (Some(gateway), _) => message.attributes.push(RouteAttribute::Gateway(gateway.into())),
        (None, IpNet::V4(_)) => message.header.scope = RouteScope::Link,
        (None, IpNet::V6(_)) => {}
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if route.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.on_link && route.gateway.is_some() {
        message.header.flags |= RouteFlags::Onlink;
    }
    message
}

async fn neighbours(handle: &Handle, index: u32, wanted: &[Neighbour]) -> Result<(), NetError> {
    let there = view::neighbours_of(handle, index).await?;
    for neighbour in there.iter().filter(|neighbour| !wanted.contains(neighbour)) {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = index;
        message.header.family = match neighbour.address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes.push(NeighbourAttribute::Destination(neighbour.address.into()));
        let action = format!("forget the neighbour {} of interface {index}", neighbour.address);
        let done = handle.neighbours().del(message).execute().await.map_err(NetError::asked(action));
        unless(done, &[libc::ENOENT])?;
    }
    for neighbour in wanted.iter().filter(|neighbour| !there.contains(neighbour)) {
        let Neighbour { address, mac } = neighbour;
        let action =
            format!("make {} the permanent neighbour {address} of interface {index}", mac_text(*mac));
        let request = handle.neighbours().add(index, *address).link_layer_address(mac).replace();
        request.execute().await.map_err(NetError::asked(action))?;
    }
    Ok(())
}

/// Takes a refusal for success when it only says that it is so already.
fn unless(done: Result<(), NetError>, errnos: &[i32]) -> Result<(), NetError> {
    match done {
        Err(error) if error.errno().is_some_and(|errno| errnos.contains(&errno)) => Ok(()),
        done => done,
    }
}
