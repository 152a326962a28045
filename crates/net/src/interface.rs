//! An interface with all that a guest needs to be it.

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
