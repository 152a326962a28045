//! Telling the network where a station is now: frames that every neighbour and every bridge on the way believes.
//!
//! | the station has | sent |
//! |---|---|
//! | an IPv4 address | gratuitous ARP request: sender and target are the address (RFC 5227, 3) |
//! | an IPv6 address | unsolicited neighbour advertisement to all nodes, override set (RFC 4861, 7.2.6) |
//! | none | reverse ARP request, which only bridges care for (RFC 903) |

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use crate::error::NetError;
use crate::namespace::Namespace;
use crate::packet;

const BROADCAST: [u8; 6] = [0xff; 6];
/// Ethernet's group of `ff02::1`.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ARP: u16 = 0x0806;
const REVERSE_ARP: u16 = 0x8035;
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// What the receiver has of the address before is replaced.
const OVERRIDE: u8 = 0x20;

/// The Ethernet frames that announce a station, at least one.
#[must_use]
pub fn frames(mac: [u8; 6], addresses: &[IpAddr]) -> Vec<Vec<u8>> {
    if addresses.is_empty() {
        return vec![arp(REVERSE_ARP, 3, mac, Ipv4Addr::UNSPECIFIED)];
    }
    let frame = |address: &IpAddr| match address {
        IpAddr::V4(address) => arp(ARP, 1, mac, *address),
        IpAddr::V6(address) => advertisement(mac, *address),
    };
    addresses.iter().map(frame).collect()
}

/// A request about the sender itself. `operation`: 1 asks for a hardware address, 3 for a protocol's.
fn arp(ether_type: u16, operation: u16, mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ether_type);
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    // A reverse request asks for its own hardware address's; a gratuitous one leaves the target's open.
    frame.extend(if operation == 3 { mac } else { [0; 6] });
    frame.extend(address.octets());
    frame
}

fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    // Option: target's link-layer address, length 1 (of 8 bytes).
    message.extend([2, 1]);
    message.extend(mac);
    let sum = checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, IPV6);
    frame.extend([0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: [u8; 6], from: [u8; 6], ether_type: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(86);
    frame.extend(to);
    frame.extend(from);
    frame.extend(ether_type.to_be_bytes());
    frame
}

/// Of an ICMPv6 message with its pseudo-header (RFC 8200, 8.1).
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let pseudo =
        [&source.octets()[..], &destination.octets(), &length.to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
    let words = pseudo.chunks(2).chain(message.chunks(2));
    let sum: u32 =
        words.map(|word| u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded & 0xffff).unwrap_or(0)
}

/// Sends frames out of one interface, whatever its kernel thinks of them.
#[derive(Debug)]
pub struct Announcer {
    socket: OwnedFd,
    interface: u32,
}

impl Announcer {
    /// For the interface with this number in the namespace.
    pub fn open(namespace: &Namespace, interface: u32) -> Result<Announcer, NetError> {
        let socket = namespace.run(packet::deaf)?.map_err(NetError::Socket)?;
        Ok(Announcer { socket, interface })
    }

    /// Sends each frame once, without waiting. An interface that is down, or whose queue is full, is an error; the
    /// rest is sent all the same.
    pub fn send(&self, frames: &[Vec<u8>]) -> io::Result<()> {
        let mut result = Ok(());
        for frame in frames {
            let sent = packet::send(&self.socket, self.interface, frame);
            if result.is_ok() {
                result = sent;
            }
        }
        result
    }
}
