//! The announcements' bytes, read by an independent parser.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dunlin_net::announce::frames;
use etherparse::{ArpHardwareId, ArpOperation, EtherType, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

fn mac() -> impl Strategy<Value = [u8; 6]> {
    any::<[u8; 6]>().prop_map(|mut mac| {
        mac[0] &= 0xfe;
        mac
    })
}

fn v4(mac: [u8; 6], address: Ipv4Addr, frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let ethernet = packet.link.as_ref().unwrap().to_header().unwrap().ethernet2().unwrap();
    assert_eq!((ethernet.destination, ethernet.source), ([0xff; 6], mac));
    let Some(NetSlice::Arp(arp)) = packet.net else { panic!("no ARP: {packet:?}") };
    assert_eq!((arp.hw_addr_type(), arp.proto_addr_type()), (ArpHardwareId::ETHERNET, EtherType::IPV4));
    assert_eq!(arp.operation(), ArpOperation::REQUEST);
    assert_eq!((arp.sender_hw_addr(), arp.sender_protocol_addr()), (&mac[..], &address.octets()[..]));
    assert_eq!((arp.target_hw_addr(), arp.target_protocol_addr()), (&[0; 6][..], &address.octets()[..]));
}

fn v6(mac: [u8; 6], address: Ipv6Addr, frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let ethernet = packet.link.as_ref().unwrap().to_header().unwrap().ethernet2().unwrap();
    assert_eq!((ethernet.destination, ethernet.source), ([0x33, 0x33, 0, 0, 0, 1], mac));
    let Some(NetSlice::Ipv6(ip)) = &packet.net else { panic!("no IPv6: {packet:?}") };
    let header = ip.header();
    assert_eq!((header.source_addr(), header.destination_addr()), (address, "ff02::1".parse().unwrap()));
    // A receiver takes no other hop limit.
    assert_eq!((header.hop_limit(), usize::from(header.payload_length())), (255, frame.len() - 14 - 40));
    let Some(TransportSlice::Icmpv6(icmp)) = &packet.transport else { panic!("no ICMPv6: {packet:?}") };
    assert_eq!((icmp.type_u8(), icmp.code_u8()), (136, 0));
    assert!(icmp.is_checksum_valid(header.source(), header.destination()));
    // Override without solicited or router; then the target, and its link-layer address as an option.
    assert_eq!(icmp.bytes5to8(), [0x20, 0, 0, 0]);
    let rest = icmp.payload();
    assert_eq!(rest[..16], address.octets());
    assert_eq!(rest[16..], [&[2, 1], &mac[..]].concat());
}

proptest! {
    #[test]
    fn every_address_is_announced_in_its_familys_words(mac in mac(), addresses in prop::collection::vec(any::<IpAddr>(), 1..6)) {
        let frames = frames(mac, &addresses);
        prop_assert_eq!(frames.len(), addresses.len());
        for (address, frame) in addresses.iter().zip(&frames) {
            match address {
                IpAddr::V4(address) => v4(mac, *address, frame),
                IpAddr::V6(address) => v6(mac, *address, frame),
            }
        }
    }

    #[test]
    fn a_station_without_an_address_is_told_to_bridges(mac in mac()) {
        let frames = frames(mac, &[]);
        prop_assert_eq!(frames.len(), 1);
        let packet = SlicedPacket::from_ethernet(&frames[0]).unwrap();
        let ethernet = packet.link.unwrap().to_header().unwrap().ethernet2().unwrap();
        prop_assert_eq!((ethernet.destination, ethernet.source, ethernet.ether_type.0), ([0xff; 6], mac, 0x8035));
        let body = &frames[0][14..];
        prop_assert_eq!(&body[..8], &[0, 1, 8, 0, 6, 4, 0, 3]);
        prop_assert_eq!((&body[8..14], &body[14..18], &body[18..24], &body[24..]), (&mac[..], &[0; 4][..], &mac[..], &[0; 4][..]));
    }
}
