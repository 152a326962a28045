//! The bytes that a sender may have to send again.

use std::collections::VecDeque;

/// Most bytes kept unacknowledged, unless a sender is told otherwise.
pub const RETAINED: usize = 256 * 1024;

/// Where a stream stands at its sender: what a destination needs to go on with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// Bytes acknowledged.
    pub acknowledged: u64,
    /// The bytes after these, read from the source and not acknowledged; at most [`RETAINED`], or what
    /// [`super::Sender::limit`] has set.
    pub pending: Vec<u8>,
    /// The source has ended: nothing follows the pending bytes.
    pub source_ended: bool,
}

#[derive(Debug)]
pub(super) struct Retained {
    /// Offset of the first byte kept.
    base: u64,
    bytes: VecDeque<u8>,
    origin: Origin,
    pub(super) source_ended: bool,
    /// Most bytes to keep; there may be more when it was lowered.
    pub(super) limit: usize,
}

/// How far the base can be trusted against the receiver's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A new sender: perhaps of an old stream.
    New,
    /// Saved by another sender, that may have gone on after it was saved.
    Saved,
    /// The receiver has spoken.
    Agreed,
}

impl Retained {
    pub(super) fn new() -> Retained {
        Retained {
            base: 0,
            bytes: VecDeque::new(),
            origin: Origin::New,
            source_ended: false,
            limit: RETAINED,
        }
    }

    pub(super) fn at(position: Position) -> Retained {
        Retained {
            base: position.acknowledged,
            bytes: position.pending.into(),
            origin: Origin::Saved,
            source_ended: position.source_ended,
            limit: RETAINED,
        }
    }

    pub(super) fn position(&self) -> Position {
        Position {
            acknowledged: self.base,
            pending: self.bytes.iter().copied().collect(),
            source_ended: self.source_ended,
        }
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// Offset after the last byte kept.
    pub(super) fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// A receiver that has taken `total` bytes for good goes on: the offset to send from, or None when its word cannot
    /// be true.
    pub(super) fn resume(&mut self, total: u64) -> Option<u64> {
        if total == super::UNKNOWN {
            // It goes by this sender's word from now on.
            self.origin = Origin::Agreed;
            return Some(self.base);
        }
        match std::mem::replace(&mut self.origin, Origin::Agreed) {
            // What came before is the receiver's already; what was read here comes after it.
            Origin::New => self.base = total,
            // The other sender went on: what it saved is the receiver's already.
            Origin::Saved if total > self.end() => {
                self.bytes.clear();
                self.base = total;
            }
            Origin::Saved | Origin::Agreed => {}
        }
        if total < self.base {
            return Some(self.base);
        }
        self.acknowledge(total).then_some(total)
    }

    /// The receiver has taken `total` bytes for good. False: more than there are.
    pub(super) fn acknowledge(&mut self, total: u64) -> bool {
        if total > self.end() {
            return false;
        }
        if let Ok(taken) = usize::try_from(total.saturating_sub(self.base)) {
            self.bytes.drain(..taken);
            self.base += taken as u64;
        }
        true
    }

    /// Some of the bytes kept from this offset on; empty at the end.
    pub(super) fn from(&self, offset: u64) -> &[u8] {
        let skip = usize::try_from(offset.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let (front, back) = self.bytes.as_slices();
        match front.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => back.get(skip - front.len().min(skip)..).unwrap_or(&[]),
        }
    }

    pub(super) fn drained(&self) -> bool {
        self.source_ended && self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_that_knew_nothing_is_believed_about_no_older_stream() {
        let mut kept = Retained::new();
        kept.push(b"abcdef");
        assert_eq!(kept.resume(crate::stdio::UNKNOWN), Some(0));
        // It took four, and its acknowledgement was lost with the connection.
        assert_eq!(kept.resume(4), Some(4));
        assert_eq!((kept.base(), kept.end(), kept.from(4)), (4, 6, b"ef".as_slice()));
    }

    #[test]
    fn acknowledgements_free_room_and_lies_are_refused() {
        let mut kept = Retained::new();
        kept.push(b"abcdef");
        assert_eq!(kept.resume(0), Some(0));
        assert!(kept.acknowledge(4));
        assert!(kept.acknowledge(2), "an old one is no lie");
        assert_eq!((kept.base(), kept.end(), kept.from(4)), (4, 6, b"ef".as_slice()));
        assert!(!kept.acknowledge(7));
        assert_eq!(kept.resume(5), Some(5));
        assert_eq!(kept.resume(9), None);
        assert_eq!(kept.resume(super::super::UNKNOWN), Some(5));
        assert_eq!(kept.resume(1), Some(5));
        let position = Position { acknowledged: 5, pending: b"f".to_vec(), source_ended: false };
        assert_eq!(kept.position(), position);
    }

    #[test]
    fn a_new_sender_of_an_old_stream_takes_the_receivers_word_once() {
        let mut kept = Retained::new();
        kept.push(b"new");
        assert_eq!(kept.resume(1000), Some(1000));
        assert_eq!((kept.end(), kept.from(1000)), (1003, b"new".as_slice()));
        assert!(kept.acknowledge(1003));
        assert_eq!(kept.resume(2000), None);
    }

    #[test]
    fn a_saved_position_that_is_behind_the_receiver_gives_way_to_it() {
        let saved = Position { acknowledged: 10, pending: b"abc".to_vec(), source_ended: true };
        assert_eq!(Retained::at(saved.clone()).resume(12), Some(12));
        let mut kept = Retained::at(saved);
        assert_eq!(kept.resume(40), Some(40));
        let position = Position { acknowledged: 40, pending: Vec::new(), source_ended: true };
        assert_eq!(kept.position(), position);
        assert!(kept.drained());
    }

    #[test]
    fn every_byte_is_found_when_the_ring_wraps() {
        let mut kept = Retained::new();
        let mut next = 0u8;
        for round in 0..500u64 {
            for _ in 0..7 {
                kept.push(&[next]);
                next = next.wrapping_add(1);
            }
            let mut at = kept.base();
            while at < kept.end() {
                let piece = kept.from(at);
                assert!(!piece.is_empty());
                for byte in piece {
                    assert_eq!(u64::from(*byte), at % 256);
                    at += 1;
                }
            }
            assert!(kept.acknowledge(round * 7));
        }
    }
}
