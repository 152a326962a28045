//! Settings of a network adapter.
//!
//! Fields that begin with `Dunlin` are ours. They go only to a guest that answered `DunlinVersion`, and so does the
//! request type Update, which gives an adapter that is there other addresses, routes and neighbours. Without
//! `DunlinName` the guest takes the first `eth<n>` that is free, without `DunlinMtu` the MTU that the NIC came with.

use serde::{Deserialize, Serialize};

use super::{is_false, is_zero};

/// Settings of a network adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkAdapter {
    /// The namespace it belongs to; compared without regard to case.
    #[serde(rename = "NamespaceID", default, skip_serializing_if = "String::is_empty")]
    pub namespace_id: String,
    /// The host's GUID of the adapter; compared without regard to case.
    #[serde(rename = "ID", default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Hardware address, `aa-bb-…` or `aa:bb:…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
    /// Comma-separated search list.
    #[serde(rename = "DNSSuffix", default, skip_serializing_if = "String::is_empty")]
    pub dns_suffix: String,
    /// Comma-separated addresses.
    #[serde(rename = "DNSServerList", default, skip_serializing_if = "String::is_empty")]
    pub dns_server_list: String,
    /// Bytes taken off the MTU.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub encap_overhead: u16,
    /// A passed-through device.
    #[serde(rename = "VPCIAssigned", default, skip_serializing_if = "is_false")]
    pub vpci_assigned: bool,
    /// None: DHCP.
    #[serde(rename = "IPConfigs", default, skip_serializing_if = "Vec::is_empty")]
    pub ip_configs: Vec<IpConfig>,
    /// Routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// A table of its own.
    #[serde(default, skip_serializing_if = "is_false")]
    pub policy_based_routing: bool,
    /// A better metric for this adapter.
    #[serde(default, skip_serializing_if = "is_false")]
    pub enable_low_metric: bool,
    /// Dunlin's: name of the interface in its namespace, at most 15 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dunlin_name: String,
    /// Dunlin's: MTU of the interface, bytes; `encap_overhead` still comes off it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dunlin_mtu: u32,
    /// Dunlin's: neighbours that are set for good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dunlin_neighbors: Vec<Neighbor>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IpConfig {
    /// IPv4 or IPv6.
    #[serde(rename = "IPAddress", default, skip_serializing_if = "String::is_empty")]
    pub ip_address: String,
    /// Bits.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prefix_length: u8,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Route {
    /// Gateway; empty: the destination is on the link. All zero: the same, but then a default route is passed over.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub next_hop: String,
    /// CIDR.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub destination_prefix: String,
    /// Linux metric. Other guests read 16 bits of it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub metric: u32,
    /// Dunlin's: preferred source address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dunlin_source: String,
    /// Dunlin's: the gateway is on the link, whatever the addresses say.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dunlin_on_link: bool,
}

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Neighbor {
    /// IPv4 or IPv6.
    #[serde(rename = "IPAddress", default, skip_serializing_if = "String::is_empty")]
    pub ip_address: String,
    /// Hardware address, `aa-bb-…` or `aa:bb:…`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
}
