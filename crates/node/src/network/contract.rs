//! Both sides' interfaces, and what becomes of each NIC. Pure.
//!
//! | asked | the destination's interface | the NIC |
//! |---|---|---|
//! | keep | has the same addresses, the guest's routes, and an MTU that is not smaller | is kept |
//! | keep | has others, lacks a route, leads there by another gateway, or has a smaller MTU | is a mismatch |
//! | rebind | is there | is rebound |
//! | either | is not there | is a mismatch |
//!
//! The guest keeps its own routes, so more of them on the destination are no obstacle, and who answers for a gateway
//! (its MAC) may be somebody else. What counts as a route's absence: `dunlin_net::missing`.
//!
//! A NIC meets the interface of its name; where each side has just one, these two meet whatever their names.

use std::collections::BTreeSet;

use dunlin_net::Route;

use crate::proto::{Interface, Mismatch, NetworkMode, Nic, PodNetwork};

/// Connections survive.
pub(crate) const KEPT: &str = "kept";
/// The NIC gets the destination's addresses.
pub(crate) const REBOUND: &str = "rebound";
/// The namespace is made in the course of the move, and compared then.
pub(crate) const EXPECTED: &str = "expected";

/// What becomes of the NICs of one pod, in their order, and what stands in the way. `there` are the
/// destination's interfaces in `place`, its namespace in words.
pub(crate) fn settle(
    pod: &PodNetwork,
    there: &[Interface],
    mode: NetworkMode,
    place: &str,
) -> (Vec<Nic>, Vec<Mismatch>) {
    let (mut nics, mut mismatches) = (Vec::new(), Vec::new());
    for here in &pod.interfaces {
        let found = match (pod.interfaces.as_slice(), there) {
            ([_], [only]) => Some(only),
            _ => there.iter().find(|interface| interface.name == here.name),
        };
        let mismatch = |field: &str, source: String, destination: String, way_out: String| Mismatch {
            field: format!("network {}{field}", here.name),
            source,
            destination,
            way_out,
            container: pod.pod.clone(),
        };
        let Some(found) = found else {
            let names: Vec<&str> = there.iter().map(|interface| interface.name.as_str()).collect();
            let has = if names.is_empty() {
                "no interface".to_owned()
            } else {
                format!("only {}", names.join(", "))
            };
            mismatches.push(mismatch(
                "",
                listed(&here.addresses),
                format!("{place} has {has}"),
                format!("give it an interface `{}` there", here.name),
            ));
            continue;
        };
        if mode == NetworkMode::Rebind {
            nics.push(nic(pod, here, REBOUND, Some(found)));
            continue;
        }
        if !same(&here.addresses, &found.addresses) {
            mismatches.push(mismatch(
                " addresses",
                listed(&here.addresses),
                format!("{} ({place})", listed(&found.addresses)),
                "give it the same addresses there, name the namespace that has them with --netns, or take the other \
                 ones with --network rebind, which breaks its connections"
                    .to_owned(),
            ));
        }
        let (own, theirs) = (routes(here), routes(found));
        let missing = dunlin_net::missing(&own, &theirs);
        if !missing.is_empty() {
            let missing: Vec<String> = missing.into_iter().map(ToString::to_string).collect();
            mismatches.push(mismatch(
                " routes",
                missing.join(", "),
                format!("{} ({place})", in_words(&theirs)),
                "give it the same gateways there, name the namespace that has them with --netns, or take the other ones \
                 with --network rebind, which breaks its connections"
                    .to_owned(),
            ));
        }
        if found.mtu < here.mtu {
            mismatches.push(mismatch(
                " MTU",
                here.mtu.to_string(),
                format!("{} ({place})", found.mtu),
                "give it at least the same MTU there, or --network rebind".to_owned(),
            ));
        }
        nics.push(nic(pod, here, KEPT, Some(found)));
    }
    (nics, mismatches)
}

/// The NICs of a pod whose namespace does not exist yet.
pub(crate) fn expected(pod: &PodNetwork, mode: NetworkMode) -> Vec<Nic> {
    let fate = if mode == NetworkMode::Rebind { REBOUND } else { EXPECTED };
    pod.interfaces.iter().map(|interface| nic(pod, interface, fate, None)).collect()
}

fn nic(pod: &PodNetwork, interface: &Interface, fate: &str, there: Option<&Interface>) -> Nic {
    let words = |interface: &Interface| routes(interface).iter().map(ToString::to_string).collect();
    Nic {
        pod: pod.pod.clone(),
        name: interface.name.clone(),
        mac: interface.mac.clone(),
        fate: fate.to_owned(),
        addresses: interface.addresses.clone(),
        destination_addresses: there.map(|there| there.addresses.clone()).unwrap_or_default(),
        routes: words(interface),
        destination_routes: there.map(words).unwrap_or_default(),
        mtu: interface.mtu,
        destination_mtu: there.map(|there| there.mtu).unwrap_or_default(),
    }
}

/// Those that can be read; what a peer sends otherwise is compared with nothing.
fn routes(interface: &Interface) -> Vec<Route> {
    let route = |route: &crate::proto::Route| {
        let gateway = match route.gateway.as_str() {
            "" => None,
            gateway => Some(gateway.parse().ok()?),
        };
        let destination = route.destination.parse().ok()?;
        Some(Route { destination, gateway, source: None, metric: 0, on_link: false })
    };
    interface.routes.iter().filter_map(route).collect()
}

fn in_words(routes: &[Route]) -> String {
    let words: Vec<String> = routes.iter().map(ToString::to_string).collect();
    if words.is_empty() { "no routes".to_owned() } else { words.join(", ") }
}

/// In whatever order.
fn same(one: &[String], other: &[String]) -> bool {
    let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<String>>();
    set(one) == set(other)
}

/// For people: `10.1.2.3/24 fd00::3/64`.
pub(crate) fn listed(addresses: &[String]) -> String {
    if addresses.is_empty() { "no addresses".to_owned() } else { addresses.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, mtu: u32, addresses: &[&str]) -> Interface {
        let addresses = addresses.iter().map(ToString::to_string).collect();
        Interface { name: name.into(), mac: "02:00:00:00:00:01".into(), mtu, addresses, routes: Vec::new() }
    }

    fn pod(interfaces: Vec<Interface>) -> PodNetwork {
        PodNetwork {
            pod: "web".into(),
            namespace: "/run/netns/web".into(),
            interfaces,
            ..PodNetwork::default()
        }
    }

    fn settled(here: Vec<Interface>, there: &[Interface], mode: NetworkMode) -> (Vec<Nic>, Vec<Mismatch>) {
        settle(&pod(here), there, mode, "/run/netns/web")
    }

    #[test]
    fn the_same_addresses_in_any_order_are_kept() {
        let here = interface("eth0", 1400, &["10.1.2.3/24", "fd00::3/64"]);
        let there = interface("eth0", 1500, &["fd00::3/64", "10.1.2.3/24"]);
        let (nics, mismatches) = settled(vec![here.clone()], std::slice::from_ref(&there), NetworkMode::Keep);
        assert_eq!(mismatches, []);
        assert_eq!((nics[0].fate.as_str(), nics[0].addresses.len()), (KEPT, 2));
        // The only ones of both sides meet.
        let other = Interface { name: "net0".into(), ..there };
        assert_eq!(settled(vec![here], &[other], NetworkMode::Keep).1, []);
    }

    #[test]
    fn other_addresses_are_a_mismatch_that_names_both_and_the_way_out_unless_rebind() {
        let here = interface("eth0", 1500, &["10.1.2.3/24"]);
        let there = interface("eth0", 1500, &["10.9.9.9/24"]);
        let (_, found) = settled(vec![here.clone()], std::slice::from_ref(&there), NetworkMode::Keep);
        let [mismatch] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((mismatch.field.as_str(), mismatch.container.as_str()), ("network eth0 addresses", "web"));
        assert_eq!(mismatch.source, "10.1.2.3/24");
        assert!(
            mismatch.destination.contains("10.9.9.9/24") && mismatch.way_out.contains("--network rebind")
        );
        // A prefix length is part of an address.
        let narrower = interface("eth0", 1500, &["10.1.2.3/25"]);
        assert_eq!(settled(vec![here.clone()], &[narrower], NetworkMode::Keep).1.len(), 1);
        let (nics, found) = settled(vec![here], &[there], NetworkMode::Rebind);
        assert_eq!(found, []);
        assert_eq!(
            (nics[0].fate.as_str(), &nics[0].destination_addresses),
            (REBOUND, &vec!["10.9.9.9/24".to_owned()])
        );
    }

    #[test]
    fn another_gateway_or_none_is_a_mismatch_and_more_routes_are_not() {
        let by = |destination: &str, gateway: &str| crate::proto::Route {
            destination: destination.into(),
            gateway: gateway.into(),
        };
        let with = |routes: Vec<crate::proto::Route>| Interface {
            routes,
            ..interface("eth0", 1500, &["10.1.2.3/24"])
        };
        let own = || with(vec![by("0.0.0.0/0", "10.1.2.1"), by("169.254.1.1/32", "")]);
        let keep = |there: Interface| settled(vec![own()], &[there], NetworkMode::Keep);
        let mut more = own();
        more.routes.insert(0, by("10.9.0.0/16", "10.1.2.9"));
        let (nics, found) = keep(more);
        assert_eq!(found, []);
        assert_eq!(nics[0].routes, ["default by 10.1.2.1", "169.254.1.1/32 on the link"]);
        assert_eq!((nics[0].destination_routes.len(), nics[0].mtu, nics[0].destination_mtu), (3, 1500, 1500));
        let (_, found) = keep(with(vec![by("0.0.0.0/0", "10.1.2.254"), by("169.254.1.1/32", "")]));
        let [mismatch] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(
            (mismatch.field.as_str(), mismatch.source.as_str()),
            ("network eth0 routes", "default by 10.1.2.1")
        );
        assert!(
            mismatch.destination.starts_with("default by 10.1.2.254, ")
                && mismatch.way_out.contains("rebind")
        );
        let (_, found) = keep(with(Vec::new()));
        assert!(found[0].destination.starts_with("no routes ("), "{found:?}");
        // A rebound one takes what is there, and an older node tells no routes of its own.
        assert_eq!(settled(vec![own()], &[with(Vec::new())], NetworkMode::Rebind).1, []);
        assert_eq!(settled(vec![with(Vec::new())], &[own()], NetworkMode::Keep).1, []);
    }

    #[test]
    fn a_smaller_mtu_is_a_mismatch_and_so_is_an_interface_that_is_not_there() {
        let two = || vec![interface("eth0", 9000, &["10.1.2.3/24"]), interface("eth1", 1500, &[])];
        let there = [interface("eth0", 1500, &["10.1.2.3/24"])];
        let fields = |mode| {
            let (_, found) = settled(two(), &there, mode);
            found.into_iter().map(|mismatch| mismatch.field).collect::<Vec<_>>()
        };
        assert_eq!(fields(NetworkMode::Keep), ["network eth0 MTU", "network eth1"]);
        assert_eq!(fields(NetworkMode::Rebind), ["network eth1"]);
        let (_, found) = settled(two(), &there, NetworkMode::Keep);
        assert!(found[1].destination.contains("only eth0"), "{found:?}");
    }
}
