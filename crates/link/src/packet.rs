//! Packets on the raw channel.
//!
//! ```text
//! COBS( kind u8 | epoch u64 LE | [seq u32 LE | payload]  | crc32 u32 LE ) 0x00
//!                                 `-- DATA only --'
//! ```
//!
//! 0x00 never occurs inside a packet, so after any garbage the next packet is found at the next 0x00. HELLO,
//! HELLO_ACK and BYE are sent with a 0x00 before them too: they may follow half of something.

use bytes::Bytes;

use crate::Epoch;

/// Most payload bytes of a DATA packet.
pub const MAX_PAYLOAD: usize = 32 * 1024;
const HEADER: usize = 1 + 8;
const SEQ: usize = 4;
const CRC: usize = 4;
const MAX_DECODED: usize = HEADER + SEQ + MAX_PAYLOAD + CRC;
/// Most bytes of a packet on the wire, without its 0x00.
const MAX_ENCODED: usize = MAX_DECODED + MAX_DECODED / 254 + 1;

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Host: begin this session.
    Hello(Epoch),
    /// Guest: this session has begun.
    HelloAck(Epoch),
    /// Bytes of the session.
    Data {
        /// The session.
        epoch: Epoch,
        /// Counts the sender's DATA packets of the session from 0, wrapping.
        seq: u32,
        /// 1 to [`MAX_PAYLOAD`] bytes.
        payload: Bytes,
    },
    /// Either: this session is over.
    Bye(Epoch),
}

impl Packet {
    /// The packet's bytes on the wire.
    ///
    /// # Panics
    /// When a payload is longer than [`MAX_PAYLOAD`].
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let (kind, epoch) = match self {
            Packet::Hello(epoch) => (1, epoch),
            Packet::HelloAck(epoch) => (2, epoch),
            Packet::Data { epoch, .. } => (3, epoch),
            Packet::Bye(epoch) => (4, epoch),
        };
        let mut plain = Vec::with_capacity(MAX_DECODED.min(HEADER + SEQ + CRC + self.payload().len()));
        plain.push(kind);
        plain.extend_from_slice(&epoch.0.to_le_bytes());
        let mut wire = Vec::with_capacity(plain.capacity() + plain.capacity() / 254 + 3);
        if let Packet::Data { seq, payload, .. } = self {
            assert!(payload.len() <= MAX_PAYLOAD, "a DATA packet carries at most {MAX_PAYLOAD} bytes");
            plain.extend_from_slice(&seq.to_le_bytes());
            plain.extend_from_slice(payload);
        } else {
            wire.push(0);
        }
        let crc = crc32fast::hash(&plain);
        plain.extend_from_slice(&crc.to_le_bytes());
        stuff(&plain, &mut wire);
        wire.push(0);
        Bytes::from(wire)
    }

    fn payload(&self) -> &[u8] {
        match self {
            Packet::Data { payload, .. } => payload,
            Packet::Hello(_) | Packet::HelloAck(_) | Packet::Bye(_) => &[],
        }
    }

    fn decode(wire: &[u8]) -> Option<Packet> {
        let mut plain = cobs::decode_vec(wire).ok()?;
        let body_len = plain.len().checked_sub(CRC)?;
        let (body, crc) = plain.split_at(body_len);
        if crc32fast::hash(body).to_le_bytes() != crc {
            return None;
        }
        let (kind, rest) = body.split_first()?;
        let (epoch, rest) = rest.split_first_chunk::<8>()?;
        let epoch = Epoch(u64::from_le_bytes(*epoch));
        match (kind, rest.is_empty()) {
            (1, true) => Some(Packet::Hello(epoch)),
            (2, true) => Some(Packet::HelloAck(epoch)),
            (4, true) => Some(Packet::Bye(epoch)),
            (3, false) => {
                let (seq, payload) = rest.split_first_chunk::<4>()?;
                let seq = u32::from_le_bytes(*seq);
                if payload.is_empty() || payload.len() > MAX_PAYLOAD {
                    return None;
                }
                plain.truncate(body_len);
                Some(Packet::Data { epoch, seq, payload: Bytes::from(plain).slice(HEADER + SEQ..) })
            }
            _ => None,
        }
    }
}

/// COBS without the terminator. Runs without zeros are copied whole, which is most of a text.
fn stuff(plain: &[u8], wire: &mut Vec<u8>) {
    let mut rest = plain;
    loop {
        let window = &rest[..rest.len().min(254)];
        match window.iter().position(|byte| *byte == 0) {
            Some(zero) => {
                wire.push(u8::try_from(zero + 1).unwrap_or(u8::MAX));
                wire.extend_from_slice(&rest[..zero]);
                rest = &rest[zero + 1..];
            }
            None if window.len() == 254 => {
                wire.push(u8::MAX);
                wire.extend_from_slice(window);
                rest = &rest[254..];
                if rest.is_empty() {
                    return;
                }
            }
            None => {
                wire.push(u8::try_from(rest.len() + 1).unwrap_or(u8::MAX));
                wire.extend_from_slice(rest);
                return;
            }
        }
    }
}

/// Finds packets in a stream of bytes that may begin and break anywhere.
#[derive(Debug, Default)]
pub struct Decoder {
    held: Vec<u8>,
    /// The current run is longer than any packet: drop up to the next 0x00.
    skipping: bool,
    dropped: u64,
}

impl Decoder {
    /// Takes bytes as they come and hands each whole packet to `found`.
    pub fn feed(&mut self, mut bytes: &[u8], mut found: impl FnMut(Packet)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == 0) {
            let run = &bytes[..end];
            bytes = &bytes[end + 1..];
            let fits = !self.skipping && self.held.len() + run.len() <= MAX_ENCODED;
            let packet = if !fits {
                None
            } else if self.held.is_empty() {
                Packet::decode(run)
            } else {
                self.held.extend_from_slice(run);
                Packet::decode(&self.held)
            };
            let empty = fits && self.held.is_empty() && run.is_empty();
            self.held.clear();
            self.skipping = false;
            match packet {
                Some(packet) => found(packet),
                None if empty => {}
                None => self.dropped += 1,
            }
        }
        if self.skipping || self.held.len() + bytes.len() > MAX_ENCODED {
            self.skipping = true;
            self.held.clear();
        } else {
            self.held.extend_from_slice(bytes);
        }
    }

    /// Runs of bytes that were no packet, so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_all(bytes: &[u8]) -> Vec<Packet> {
        let mut decoder = Decoder::default();
        let mut out = Vec::new();
        decoder.feed(bytes, |packet| out.push(packet));
        out
    }

    fn packet() -> impl Strategy<Value = Packet> {
        let epoch = any::<u64>().prop_map(Epoch);
        prop_oneof![
            epoch.clone().prop_map(Packet::Hello),
            epoch.clone().prop_map(Packet::HelloAck),
            epoch.clone().prop_map(Packet::Bye),
            (epoch, any::<u32>(), proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..1200))
                .prop_map(|(epoch, seq, payload)| Packet::Data { epoch, seq, payload: Bytes::from(payload) }),
        ]
    }

    #[test]
    fn the_largest_packet_fits_and_a_longer_run_is_skipped_without_being_kept() {
        for byte in [0u8, 1] {
            let largest =
                Packet::Data { epoch: Epoch(1), seq: 2, payload: Bytes::from(vec![byte; MAX_PAYLOAD]) };
            assert_eq!(decode_all(&largest.encode()), [largest]);
        }
        let mut decoder = Decoder::default();
        for _ in 0..100 {
            decoder.feed(&[7u8; 4096], |_| panic!("no packet here"));
            assert!(decoder.held.len() <= MAX_ENCODED);
        }
        let mut got = Vec::new();
        decoder.feed(&Packet::Bye(Epoch(3)).encode(), |packet| got.push(packet));
        assert_eq!(got, [Packet::Bye(Epoch(3))]);
        assert_eq!(decoder.dropped(), 1);
    }

    proptest! {
        #[test]
        fn stuffing_is_cobs(plain in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..1200)) {
            let mut wire = Vec::new();
            stuff(&plain, &mut wire);
            prop_assert!(!wire.contains(&0));
            prop_assert_eq!(cobs::decode_vec(&wire).unwrap(), plain);
        }

        #[test]
        fn packets_survive_any_split(
            packets in proptest::collection::vec(packet(), 1..8), cuts in proptest::collection::vec(1usize..400, 0..40)
        ) {
            let wire: Vec<u8> = packets.iter().flat_map(|p| p.encode().to_vec()).collect();
            let mut decoder = Decoder::default();
            let mut out = Vec::new();
            let mut rest = wire.as_slice();
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                decoder.feed(now, |p| out.push(p));
                rest = later;
            }
            decoder.feed(rest, |p| out.push(p));
            prop_assert_eq!(out, packets);
        }

        #[test]
        fn after_garbage_and_a_cut_packet_the_next_control_packet_is_found(
            garbage in proptest::collection::vec(any::<u8>(), 0..2000), cut in packet(), keep in 0usize..1300,
            next in any::<u64>()
        ) {
            let mut wire = garbage;
            let bytes = cut.encode();
            wire.extend_from_slice(&bytes[..keep.min(bytes.len())]);
            wire.extend_from_slice(&Packet::Hello(Epoch(next)).encode());
            let got = decode_all(&wire);
            prop_assert_eq!(got.last(), Some(&Packet::Hello(Epoch(next))));
        }

        #[test]
        fn a_changed_byte_never_passes(packet in packet(), at in any::<prop::sample::Index>(), flip in 1u8..=255) {
            let mut wire = packet.encode().to_vec();
            let at = at.index(wire.len());
            wire[at] ^= flip;
            wire.push(0);
            for got in decode_all(&wire) {
                prop_assert_eq!(&got, &packet); // only when the flip hit a delimiter
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            decode_all(&bytes);
        }
    }
}
