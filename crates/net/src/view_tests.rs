//! Whatever the kernel's answers hold, reading them ends without a panic and gives what can be given.

use proptest::collection::vec;
use proptest::prelude::*;
use rtnetlink::packet_core::{NetlinkDeserializable, NetlinkHeader};
use rtnetlink::packet_route::RouteNetlinkMessage;

use super::*;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;

/// One attribute: length, type, value, padding.
fn attribute() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        Just(0usize),
        Just(1),
        Just(2),
        Just(4),
        Just(6),
        Just(8),
        Just(16),
        Just(20),
        0usize..40
    ];
    (0u16..66, value, any::<u8>(), any::<bool>()).prop_flat_map(|(kind, length, fill, same)| {
        vec(any::<u8>(), length).prop_map(move |random| {
            let value = if same { vec![fill; length] } else { random };
            let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        })
    })
}

/// A header of so many bytes whose first, the family, is one that is looked at, then attributes.
fn message(header: usize) -> impl Strategy<Value = Vec<u8>> {
    let family = prop_oneof![Just(0u8), Just(2), Just(10), Just(7), any::<u8>()];
    (family, vec(any::<u8>(), header - 1), vec(attribute(), 0..12))
        .prop_map(|(family, rest, attributes)| [vec![family], rest, attributes.concat()].concat())
}

fn decode(kind: u16, bytes: &[u8]) -> Option<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    RouteNetlinkMessage::deserialize(&header, bytes).ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn odd_answers_do_no_harm(
        link in message(16), address in message(8), route in message(12), neighbour in message(12)
    ) {
        let addresses: Vec<_> = match decode(NEW_ADDRESS, &address) {
            Some(RouteNetlinkMessage::NewAddress(mut found)) => {
                found.header.index = 1;
                vec![found]
            }
            _ => Vec::new(),
        };
        let routes: Vec<_> = match decode(NEW_ROUTE, &route) {
            Some(RouteNetlinkMessage::NewRoute(mut found)) => {
                found.header.table = RouteHeader::RT_TABLE_MAIN;
                found.header.kind = RouteType::Unicast;
                found.header.tos = 0;
                found.attributes.push(RouteAttribute::Oif(1));
                parse_route(&found)
            }
            _ => Vec::new(),
        };
        let neighbours: Vec<_> = match decode(NEW_NEIGHBOUR, &neighbour) {
            Some(RouteNetlinkMessage::NewNeighbour(mut found)) => {
                found.header.ifindex = 1;
                found.header.state = NeighbourState::Permanent;
                vec![found]
            }
            _ => Vec::new(),
        };
        if let Some(RouteNetlinkMessage::NewLink(mut found)) = decode(NEW_LINK, &link) {
            found.header.index = 1;
            let interface = assemble(&found, &addresses, &routes, &neighbours);
            for address in &interface.addresses {
                prop_assert!(!address.addr().is_loopback());
                prop_assert!(address.prefix_len() <= address.max_prefix_len());
            }
            for route in &interface.routes {
                prop_assert_eq!(route.destination, route.destination.trunc());
            }
        }
    }
}
