//! What an NBD client sends, read along by whoever carries it: how far it is, and whether it has taken its leave.
//!
//! ```text
//! flags (4 bytes) -> options (16 bytes and their data) ... -> requests (28 or 32 bytes, a write with its data) ... -> disconnect
//! ```
//!
//! A stream that breaks ends anywhere; only a client that disconnects says that it wants nothing more. QEMU's does so when
//! its node is closed in order, and not when it dies or its socket is hung up. Data is stepped over and never looked at: what
//! a guest writes to its disk is taken for nothing else.
//!
//! The frames are those of the NBD protocol's document, "proto.md".

use std::mem;

const OPTION: &[u8] = b"IHAVEOPT";
/// An option's header: magic, number, length of its data.
const OPTION_HEAD: usize = 16;
const REQUEST: [u8; 4] = 0x2560_9513_u32.to_be_bytes();
const REQUEST_HEAD: usize = 28;
/// A request after extended headers were agreed on: its length is twice as wide.
const EXTENDED: [u8; 4] = 0x21e4_1c71_u32.to_be_bytes();
const EXTENDED_HEAD: usize = 32;
/// Flag of an extended request: data follows, whatever the command.
const PAYLOAD: u16 = 1 << 5;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

/// The stream is not that of an NBD client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is no NBD client's: after {at} bytes neither an option nor a request begins")]
pub struct NotNbd {
    /// Bytes before the frame that cannot be read.
    pub at: u64,
}

/// A client's side of one NBD connection, as far as it was read.
#[derive(Debug)]
pub struct NbdClientStream {
    at: u64,
    /// Of the next frame; never a whole head.
    head: Vec<u8>,
    /// Bytes of data before the next frame. At first the client's flags.
    data: u64,
    left: bool,
}

impl Default for NbdClientStream {
    fn default() -> NbdClientStream {
        NbdClientStream { at: 0, head: Vec::with_capacity(EXTENDED_HEAD), data: 4, left: false }
    }
}

impl NbdClientStream {
    /// Reads on. What follows the client's leave is nobody's, and is not looked at.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), NotNbd> {
        while !bytes.is_empty() && !self.left {
            if self.data > 0 {
                let step = bytes.len().min(usize::try_from(self.data).unwrap_or(usize::MAX));
                bytes = &bytes[step..];
                self.data -= step as u64;
                self.at += step as u64;
                continue;
            }
            let wanted = self.head_length()? - self.head.len();
            let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.head.extend_from_slice(taken);
            bytes = rest;
            if self.head.len() == self.head_length()? && self.head.len() >= OPTION_HEAD {
                self.frame();
            }
        }
        Ok(())
    }

    /// Whether the client has disconnected in order.
    pub fn took_leave(&self) -> bool {
        self.left
    }

    /// Of the frame that has begun; of its magic as long as that is not there.
    fn head_length(&self) -> Result<usize, NotNbd> {
        let Some(magic) = self.head.first_chunk::<4>() else { return Ok(4) };
        match *magic {
            REQUEST => Ok(REQUEST_HEAD),
            EXTENDED => Ok(EXTENDED_HEAD),
            _ if self.head.iter().zip(OPTION).all(|(one, other)| one == other) => Ok(OPTION_HEAD),
            _ => Err(NotNbd { at: self.at }),
        }
    }

    /// A whole head is there.
    fn frame(&mut self) {
        let head = mem::take(&mut self.head);
        self.at += head.len() as u64;
        let short = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let number =
            |from: usize| head[from..].iter().fold(0, |sum: u64, byte| (sum << 8) | u64::from(*byte));
        self.data = match head.len() {
            OPTION_HEAD => number(12),
            REQUEST_HEAD if short(6) == WRITE => number(24),
            EXTENDED_HEAD if short(6) == WRITE || short(4) & PAYLOAD != 0 => number(24),
            _ => 0,
        };
        self.left = head.len() != OPTION_HEAD && short(6) == DISCONNECT;
        self.head = head;
        self.head.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        [OPTION, &number.to_be_bytes(), &length, data].concat()
    }

    fn request(kind: u16, length: u32, data: &[u8]) -> Vec<u8> {
        let kind = kind.to_be_bytes();
        [&REQUEST[..], &[0, 0], &kind, &[7; 8], &[0; 8], &length.to_be_bytes(), data].concat()
    }

    fn extended(flags: u16, kind: u16, length: u64, data: &[u8]) -> Vec<u8> {
        let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
        [&EXTENDED[..], &flags, &kind, &[7; 8], &[0; 8], &length.to_be_bytes(), data].concat()
    }

    /// How the stream stands after each of its bytes: whether the client has left.
    fn read(stream: &[u8]) -> Result<Vec<bool>, NotNbd> {
        let mut client = NbdClientStream::default();
        stream
            .iter()
            .map(|byte| {
                client.feed(&[*byte])?;
                Ok(client.took_leave())
            })
            .collect()
    }

    fn session() -> Vec<u8> {
        let greeting = [vec![0, 0, 0, 3], option(8, b""), option(7, b"\0\0\0\x08disk-0-1\0\0")];
        let read = request(0, 4096, b"");
        let write = request(WRITE, 4096, &[9; 4096]);
        [greeting.concat(), read, write, request(3, 0, b"")].concat()
    }

    #[test]
    fn a_client_has_left_with_the_last_byte_of_its_disconnect_and_not_before() {
        let stream = [session(), request(DISCONNECT, 0, b"")].concat();
        let left = read(&stream).unwrap();
        assert_eq!(left.iter().position(|left| *left), Some(stream.len() - 1));
        // In one piece it is the same.
        let mut client = NbdClientStream::default();
        client.feed(&stream).unwrap();
        assert!(client.took_leave());
        client.feed(b"whatever follows").unwrap();
    }

    #[test]
    fn what_is_written_to_the_disk_is_never_taken_for_a_disconnect() {
        let leave = request(DISCONNECT, 0, b"");
        let length = u32::try_from(leave.len()).unwrap();
        let stream = [session(), request(WRITE, length, &leave)].concat();
        assert!(read(&stream).unwrap().iter().all(|left| !left));
        let length = u64::from(length);
        let stream =
            [session(), extended(PAYLOAD, WRITE, length, &leave), extended(PAYLOAD, 7, length, &leave)];
        assert!(read(&stream.concat()).unwrap().iter().all(|left| !left));
    }

    #[test]
    fn extended_requests_are_read_as_well() {
        let stream = [session(), extended(0, 0, 1 << 40, b""), extended(0, DISCONNECT, 0, b"")].concat();
        let left = read(&stream).unwrap();
        assert_eq!(left.iter().position(|left| *left), Some(stream.len() - 1));
    }

    #[test]
    fn another_stream_is_refused_at_the_frame_that_is_none() {
        let stream = [session(), b"GET / HTTP/1.1\r\n".to_vec()].concat();
        assert_eq!(read(&stream), Err(NotNbd { at: session().len() as u64 }));
        assert_eq!(read(b"\0\0\0\x03IHAVE beans, not options"), Err(NotNbd { at: 4 }));
    }
}
