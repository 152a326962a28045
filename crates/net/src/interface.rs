//! An interface with all that a guest needs to be it.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A network interface as its namespace's kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Such as `eth0`.
    pub name: String,
    /// The kernel's number for it, of this namespace only.
    pub index: u32,
    /// Ethernet address; all zero for one that has none of six bytes.
    pub mac: [u8; 6],
    /// Largest packet, bytes, without the Ethernet header.
    pub mtu: u32,
    /// The kernel's name for its kind, such as `veth`; None for hardware, virtio included.
    pub kind: Option<String>,
    /// Whether it was switched on; it may be without carrier all the same.
    pub up: bool,
    /// Its IPv4 addresses, then its IPv6 ones, each in the order in which the kernel prefers them. Without those that
    /// mean the machine itself (`host`) and without IPv6 link-local ones, which every interface makes for itself.
    pub addresses: Vec<IpNet>,
    /// Its unicast routes of the main table, without those that follow from `addresses`.
    pub routes: Vec<Route>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// A route out of one interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads; `0.0.0.0/0` or `::/0` is everywhere.
    pub destination: IpNet,
    /// Next hop; None: the destination is on the link. It may be of the other family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Lower is better. 0 is the kernel's default: 0 for IPv4, 1024 for IPv6.
    #[serde(default)]
    pub metric: u32,
    /// The gateway is taken to be on the link, whatever the addresses say.
    #[serde(default)]
    pub on_link: bool,
}

/// Those of `wanted` that `there` does not have, in their order: what they lead to is reached there by other gateways
/// or not at all. Metrics and source addresses do not count. A route by way of an IPv6 link-local gateway is missing only where another
/// one leads to the same place: it may have been announced by a router, of which a namespace that is silent, or has only
/// just been made, has not heard.
pub fn missing<'a>(wanted: &'a [Route], there: &[Route]) -> Vec<&'a Route> {
    let not_heard = |route: &Route| {
        matches!(route.gateway, Some(IpAddr::V6(via)) if via.is_unicast_link_local())
            && !there.iter().any(|other| other.destination == route.destination)
    };
    let has = |route: &Route| {
        there.iter().any(|other| (other.destination, other.gateway) == (route.destination, route.gateway))
    };
    wanted.iter().filter(|route| !not_heard(route) && !has(route)).collect()
}

impl fmt::Display for Route {
    /// `default by 10.0.0.1`, `10.9.0.0/16 on the link`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.destination.prefix_len() == 0 {
            let family = if matches!(self.destination, IpNet::V6(_)) { "IPv6 " } else { "" };
            write!(f, "{family}default ")?;
        } else {
            write!(f, "{} ", self.destination)?;
        }
        match self.gateway {
            Some(gateway) => write!(f, "by {gateway}"),
            None => f.write_str("on the link"),
        }
    }
}

impl Route {
    /// The same route as another for the kernel: only one of them can be there.
    pub(crate) fn same_place(&self, other: &Route) -> bool {
        self.destination == other.destination
            && self.gateway == other.gateway
            && self.kernel_metric() == other.kernel_metric()
            && (self.source == other.source || self.source.is_none())
    }

    fn kernel_metric(&self) -> u32 {
        match self.destination {
            IpNet::V6(_) if self.metric == 0 => 1024,
            _ => self.metric,
        }
    }
}

/// A neighbour whose hardware address was set for good.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: [u8; 6],
}

/// `52:54:00:12:34:56`.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, gateway: &str) -> Route {
        Route {
            destination: destination.parse().unwrap(),
            gateway: gateway.parse().ok(),
            source: None,
            metric: 0,
            on_link: false,
        }
    }

    #[test]
    fn a_route_is_missing_when_nothing_leads_there_by_the_same_gateway() {
        let wanted = [
            route("0.0.0.0/0", "10.0.0.1"),
            route("10.9.0.0/16", "10.0.0.7"),
            route("169.254.1.1/32", ""),
            route("::/0", "fe80::1"),
        ];
        let texts = |there: &[Route]| {
            missing(&wanted, there).iter().map(ToString::to_string).collect::<Vec<String>>()
        };
        assert_eq!(texts(&wanted), [""; 0]);
        assert_eq!(
            texts(&[]),
            ["default by 10.0.0.1", "10.9.0.0/16 by 10.0.0.7", "169.254.1.1/32 on the link"]
        );
        let there = [
            Route { metric: 5, source: Some([10, 0, 0, 2].into()), ..wanted[0].clone() },
            route("10.9.0.0/16", "10.0.0.8"),
            route("172.16.0.0/12", "10.0.0.1"),
            wanted[2].clone(),
        ];
        assert_eq!(texts(&there), ["10.9.0.0/16 by 10.0.0.7"]);
        let mut other = wanted.to_vec();
        other[3] = route("::/0", "fe80::2");
        assert_eq!(texts(&other), ["IPv6 default by fe80::1"]);
        assert_eq!(route("::/0", "fd00::1").to_string(), "IPv6 default by fd00::1");
    }
}
