//! What a host says of an adapter, checked. Pure.

use std::net::IpAddr;

use dunlin_bridge::message::{NetworkAdapter, Route as RouteSettings};
use dunlin_net::{Neighbour, Route, Wanted};
use ipnet::IpNet;

use super::error::NetworkError;
use super::resolv::Names;

/// The smallest MTU that IPv4 works with, bytes.
const SMALLEST_MTU: u32 = 68;
/// Bytes of an interface's name, without its NUL.
const LONGEST_NAME: usize = 15;

/// What an adapter shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Adapter {
    /// Lower case.
    pub(super) id: String,
    /// None in an Update that leaves it out.
    pub(super) mac: Option<[u8; 6]>,
    /// None: the first `eth<n>` that is free, or the name that it has.
    pub(super) name: Option<String>,
    /// None: what the NIC came with.
    pub(super) mtu: Option<u32>,
    /// Bytes taken off that.
    pub(super) overhead: u32,
    pub(super) addresses: Vec<IpNet>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
    pub(super) names: Names,
}

impl Adapter {
    /// Checks all settings; the first that cannot be used is named.
    pub(super) fn read(settings: &NetworkAdapter) -> Result<Adapter, NetworkError> {
        if settings.id.is_empty() {
            return Err(NetworkError::settings(
                "ID",
                "it is empty; give the GUID that Update and Remove will name",
            ));
        }
        for (set, field) in [
            (settings.policy_based_routing, "PolicyBasedRouting"),
            (settings.enable_low_metric, "EnableLowMetric"),
        ] {
            if set {
                let reason = "this guest routes by destination and metric only; leave it out and give Metric";
                return Err(NetworkError::settings(field, reason));
            }
        }
        let overhead = u32::from(settings.encap_overhead);
        let mtu = (settings.dunlin_mtu != 0).then_some(settings.dunlin_mtu);
        if let Some(mtu) = mtu
            && !(SMALLEST_MTU + overhead..=65_535).contains(&mtu)
        {
            let reason = format!("{mtu} less {overhead} is not {SMALLEST_MTU} to 65535 bytes");
            return Err(NetworkError::settings("DunlinMtu", reason));
        }
        let addresses = settings.ip_configs.iter().map(|config| {
            let address = address("IPAddress", &config.ip_address)?;
            let fits = config.prefix_length > 0;
            IpNet::new(address, config.prefix_length).ok().filter(|_| fits).ok_or_else(|| {
                let reason = format!("{} is no prefix length of {address}", config.prefix_length);
                NetworkError::settings("PrefixLength", reason)
            })
        });
        let neighbours = settings.dunlin_neighbors.iter().map(|neighbour| {
            let mac = mac("DunlinNeighbors", &neighbour.mac_address)?;
            Ok(Neighbour { address: address("DunlinNeighbors", &neighbour.ip_address)?, mac })
        });
        Ok(Adapter {
            id: settings.id.to_ascii_lowercase(),
            mac: address_of(settings)?,
            name: name(&settings.dunlin_name)?,
            mtu,
            overhead,
            addresses: addresses.collect::<Result<_, NetworkError>>()?,
            routes: settings
                .routes
                .iter()
                .filter_map(|settings| route(settings).transpose())
                .collect::<Result<_, _>>()?,
            neighbours: neighbours.collect::<Result<_, NetworkError>>()?,
            names: Names::read(&settings.dns_suffix, &settings.dns_server_list)?,
        })
    }

    /// What its interface shall have. `native_mtu` is what the NIC came with.
    pub(super) fn wanted(&self, name: Option<String>, native_mtu: u32) -> Wanted {
        let mtu = self.mtu.unwrap_or(native_mtu).saturating_sub(self.overhead).max(SMALLEST_MTU);
        Wanted {
            name,
            mtu: Some(mtu),
            addresses: self.addresses.clone(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
        }
    }
}

/// The NIC's hardware address, if the settings name it.
pub(super) fn address_of(settings: &NetworkAdapter) -> Result<Option<[u8; 6]>, NetworkError> {
    match settings.mac_address.as_str() {
        "" => Ok(None),
        text => Ok(Some(mac("MacAddress", text)?)),
    }
}

fn address(field: &'static str, text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::settings(field, format!("{text:?} is no IPv4 or IPv6 address")))
}

/// Six bytes with `-` or `:` between them.
fn mac(field: &'static str, text: &str) -> Result<[u8; 6], NetworkError> {
    let wrong = || {
        NetworkError::settings(field, format!("{text:?} is not six hexadecimal bytes joined by `-` or `:`"))
    };
    let mut parts = text.split(['-', ':']);
    let mut bytes = [0; 6];
    for byte in &mut bytes {
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(digits).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
    if parts.next().is_none() && unicast { Ok(bytes) } else { Err(wrong()) }
}

fn name(text: &str) -> Result<Option<String>, NetworkError> {
    let plain = |b: u8| b.is_ascii_graphic() && !b"/:%".contains(&b);
    match text {
        "" => Ok(None),
        text if text.len() <= LONGEST_NAME
            && text.bytes().all(plain)
            && !["lo", ".", "..", "all", "default"].contains(&text) =>
        {
            Ok(Some(text.to_owned()))
        }
        text => {
            let reason =
                format!("{text:?} cannot be an interface's name: 1 to {LONGEST_NAME} characters like eth0");
            Err(NetworkError::settings("DunlinName", reason))
        }
    }
}

/// None for a default route through the all-zero address, which other hosts send and mean nothing by.
fn route(settings: &RouteSettings) -> Result<Option<Route>, NetworkError> {
    let text = settings.destination_prefix.as_str();
    let destination = text.parse::<IpNet>().map_err(|_| {
        NetworkError::settings("DestinationPrefix", format!("{text:?} is not like 10.0.0.0/8 or fd00::/8"))
    })?;
    let hop = match settings.next_hop.as_str() {
        "" => None,
        text => Some(address("NextHop", text)?),
    };
    let nowhere = hop.is_some_and(|hop| hop.is_unspecified());
    if nowhere && destination.prefix_len() == 0 {
        return Ok(None);
    }
    let source = match settings.dunlin_source.as_str() {
        "" => None,
        text => Some(address("DunlinSource", text)?),
    };
    if source.is_some_and(|source| source.is_ipv4() != destination.addr().is_ipv4()) {
        return Err(NetworkError::settings(
            "DunlinSource",
            format!("it is of another family than {destination}"),
        ));
    }
    Ok(Some(Route {
        destination: destination.trunc(),
        gateway: hop.filter(|_| !nowhere),
        source,
        metric: settings.metric,
        on_link: settings.dunlin_on_link,
    }))
}

#[cfg(test)]
mod tests {
    use dunlin_bridge::message::{IpConfig, Neighbor};

    use super::*;

    fn settings() -> NetworkAdapter {
        NetworkAdapter { id: "7E".into(), mac_address: "52-54-00-AB-cd-01".into(), ..Default::default() }
    }

    fn to(destination: &str, hop: &str) -> RouteSettings {
        RouteSettings { destination_prefix: destination.into(), next_hop: hop.into(), ..Default::default() }
    }

    #[test]
    fn everything_is_read() {
        let adapter = Adapter::read(&NetworkAdapter {
            encap_overhead: 50,
            ip_configs: vec![IpConfig { ip_address: "fd00::2".into(), prefix_length: 64 }],
            routes: vec![
                to("0.0.0.0/0", "0.0.0.0"),
                to("::/0", "::"),
                to("10.1.2.3/16", "0.0.0.0"),
                to("0.0.0.0/0", ""),
                RouteSettings {
                    metric: 70_000,
                    dunlin_source: "fd00::2".into(),
                    dunlin_on_link: true,
                    ..to("::/0", "fe80::1")
                },
            ],
            dunlin_name: "net1".into(),
            dunlin_mtu: 9000,
            dunlin_neighbors: vec![Neighbor {
                ip_address: "10.0.0.1".into(),
                mac_address: "02:00:00:00:00:01".into(),
            }],
            ..settings()
        });
        let adapter = adapter.unwrap();
        assert_eq!((adapter.id.as_str(), adapter.mac), ("7e", Some([0x52, 0x54, 0, 0xab, 0xcd, 1])));
        let wanted = adapter.wanted(None, 1500);
        assert_eq!((wanted.mtu, wanted.name), (Some(8950), None));
        assert_eq!(wanted.addresses, ["fd00::2/64".parse().unwrap()]);
        let shown: Vec<_> = wanted
            .routes
            .iter()
            .map(|route| (route.destination.to_string(), route.gateway.map(|hop| hop.to_string())))
            .collect();
        assert_eq!(
            shown,
            [
                ("10.1.0.0/16".to_owned(), None),
                ("0.0.0.0/0".to_owned(), None),
                ("::/0".to_owned(), Some("fe80::1".to_owned()))
            ]
        );
        assert_eq!((wanted.routes[2].metric, wanted.routes[2].on_link), (70_000, true));
        assert_eq!(wanted.neighbours[0].mac, [2, 0, 0, 0, 0, 1]);
        let plain = Adapter::read(&NetworkAdapter { encap_overhead: 50, ..settings() }).unwrap();
        assert_eq!(plain.wanted(None, 1500).mtu, Some(1450));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let with = |change: &dyn Fn(&mut NetworkAdapter)| {
            let mut settings = settings();
            change(&mut settings);
            Adapter::read(&settings).unwrap_err().to_string()
        };
        let ip = |address: &str, bits| vec![IpConfig { ip_address: address.into(), prefix_length: bits }];
        let cases: [(&str, String); 12] = [
            ("ID", with(&|s| s.id.clear())),
            ("MacAddress", with(&|s| s.mac_address = "52:54:00".into())),
            ("MacAddress", with(&|s| s.mac_address = "01:00:5e:00:00:01".into())),
            ("MacAddress", with(&|s| s.mac_address = "52:54:00:00:+1:01".into())),
            ("PolicyBasedRouting", with(&|s| s.policy_based_routing = true)),
            ("EnableLowMetric", with(&|s| s.enable_low_metric = true)),
            ("DunlinMtu", with(&|s| s.dunlin_mtu = 67)),
            ("DunlinName", with(&|s| s.dunlin_name = "../x".into())),
            ("IPAddress", with(&|s| s.ip_configs = ip("10.0.0", 8))),
            ("PrefixLength", with(&|s| s.ip_configs = ip("10.0.0.1", 33))),
            ("PrefixLength", with(&|s| s.ip_configs = ip("10.0.0.1", 0))),
            ("DestinationPrefix", with(&|s| s.routes = vec![to("default", "10.0.0.1")])),
        ];
        for (field, text) in cases {
            assert!(text.starts_with(&format!("{field} of the network adapter: ")), "{text}");
        }
    }
}
