//! Handing a stream between hosts to a shim: what a `CreateDuplicateSocket` call says about
//! the socket, and the line that opens a connection to a node's data port.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{IdError, SessionId, Slot};

/// Longest `protocol_info`, bytes.
pub const PROTOCOL_INFO_MAX: usize = 1024;
/// Longest preamble line with its newline, bytes: read no more than this before it is refused.
pub const PREAMBLE_MAX: usize = 512;
/// Longest token, bytes.
pub const TOKEN_MAX: usize = 128;
/// The destination's answer to a preamble that it accepts.
pub const PREAMBLE_ACCEPTED: &[u8] = b"OK\n";

const MAGIC: &str = "DUNLIN1";

/// What one connection between the hosts carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Stream {
    /// Guest memory and device state.
    Memory,
    /// The contents of the writable disk in this slot.
    Disk(Slot),
}

/// `memory` or `disk:<slot>`.
impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stream::Memory => f.write_str("memory"),
            Stream::Disk(slot) => write!(f, "disk:{slot}"),
        }
    }
}

impl FromStr for Stream {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Stream, IdError> {
        if text == "memory" {
            return Ok(Stream::Memory);
        }
        match text.strip_prefix("disk:") {
            Some(slot) => Ok(Stream::Disk(slot.parse().map_err(|error: IdError| error.of("stream"))?)),
            None => Err(IdError::new("stream", text, "is no stream", "use memory or disk:<slot>")),
        }
    }
}

impl TryFrom<String> for Stream {
    type Error = IdError;
    fn try_from(text: String) -> Result<Stream, IdError> {
        text.parse()
    }
}

impl From<Stream> for String {
    fn from(stream: Stream) -> String {
        stream.to_string()
    }
}

fn memory() -> Stream {
    Stream::Memory
}

/// A hand-over message has not the shape that its field asks for.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// Refused before it was looked into.
    #[error("{what}: {size} bytes are more than the {cap} allowed; send a well-formed one")]
    TooLong {
        /// `protocol_info` or `preamble`.
        what: &'static str,
        /// Bytes given.
        size: usize,
        /// Bytes allowed.
        cap: usize,
    },
    /// Not the JSON object that is asked for.
    #[error(r#"protocol_info: not the object that is asked for; send {{"pid":…,"fd":…,"stream":"memory"}}"#)]
    ProtocolInfo(#[source] serde_json::Error),
    /// A number that cannot name a process or a descriptor.
    #[error("protocol_info: {field} is {value}; it must name an open descriptor of a living process")]
    OutOfRange {
        /// `pid` or `fd`.
        field: &'static str,
        /// As given.
        value: i64,
    },
    /// Not a preamble line.
    #[error("preamble: {reason}; send `DUNLIN1 <session> <token> <memory|disk:<slot>>` and a newline")]
    Preamble {
        /// What is wrong.
        reason: &'static str,
    },
    /// A part of the preamble is wrong.
    #[error("preamble: a part is wrong")]
    Part(#[source] IdError),
}

/// `CreateDuplicateSocketRequest.protocol_info`: which descriptor of which process is the
/// socket, and what it carries. Without `stream`: memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtocolInfo {
    /// Process that holds the socket, in the shim's PID namespace.
    pub pid: i32,
    /// The descriptor in that process.
    pub fd: i32,
    /// What it carries.
    #[serde(default = "memory")]
    pub stream: Stream,
}

impl ProtocolInfo {
    /// Reads a call's bytes; refuses more than [`PROTOCOL_INFO_MAX`].
    pub fn parse(bytes: &[u8]) -> Result<ProtocolInfo, HandoverError> {
        if bytes.len() > PROTOCOL_INFO_MAX {
            return Err(HandoverError::TooLong {
                what: "protocol_info",
                size: bytes.len(),
                cap: PROTOCOL_INFO_MAX,
            });
        }
        let info: ProtocolInfo = serde_json::from_slice(bytes).map_err(HandoverError::ProtocolInfo)?;
        if info.pid <= 0 {
            return Err(HandoverError::OutOfRange { field: "pid", value: info.pid.into() });
        }
        if info.fd < 0 {
            return Err(HandoverError::OutOfRange { field: "fd", value: info.fd.into() });
        }
        Ok(info)
    }

    /// The bytes for a call.
    pub fn to_bytes(&self) -> Vec<u8> {
        format!(r#"{{"pid":{},"fd":{},"stream":"{}"}}"#, self.pid, self.fd, self.stream).into_bytes()
    }
}

/// The secret that lets one connection into one session: 1 to 128 letters, digits, `-` or `_`.
/// Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Checks `text`.
    pub fn new(text: impl Into<String>) -> Result<Token, IdError> {
        let text = text.into();
        let shaped = !text.is_empty()
            && text.len() <= TOKEN_MAX
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if shaped {
            return Ok(Token(text));
        }
        // The value is left out: a log is no place for half a secret.
        Err(IdError::new("token", "", "is no token", "give 1 to 128 letters, digits, '-' or '_'"))
    }

    /// The text as it crosses the wire.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether both are the same, in time that does not depend on where they differ.
    pub fn matches(&self, other: &Token) -> bool {
        let (a, b) = (self.0.as_bytes(), other.0.as_bytes());
        a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y)) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The line that the source's node sends first on each connection to the destination's data port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preamble {
    /// Which move.
    pub session: SessionId,
    /// What proves that the sender may.
    pub token: Token,
    /// What follows.
    pub stream: Stream,
}

impl Preamble {
    /// Reads one line, its newline included; refuses more than [`PREAMBLE_MAX`].
    pub fn parse(line: &[u8]) -> Result<Preamble, HandoverError> {
        if line.len() > PREAMBLE_MAX {
            return Err(HandoverError::TooLong { what: "preamble", size: line.len(), cap: PREAMBLE_MAX });
        }
        let wrong = |reason| HandoverError::Preamble { reason };
        let text = std::str::from_utf8(line).map_err(|_| wrong("it is not UTF-8"))?;
        let text = text.strip_suffix('\n').ok_or(wrong("it has no newline"))?;
        let parts: Vec<&str> = text.splitn(5, ' ').collect();
        let [magic, session, token, stream] = parts[..] else {
            return Err(wrong("it has not four parts"));
        };
        if magic != MAGIC {
            return Err(wrong("it is not of this protocol"));
        }
        Ok(Preamble {
            session: SessionId::new(session).map_err(HandoverError::Part)?,
            token: Token::new(token).map_err(HandoverError::Part)?,
            stream: stream.parse().map_err(HandoverError::Part)?,
        })
    }

    /// The line with its newline.
    pub fn to_line(&self) -> String {
        format!("{MAGIC} {} {} {}\n", self.session, self.token.expose(), self.stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn protocol_info_without_a_stream_is_memory() {
        let info = ProtocolInfo::parse(br#"{"pid":7,"fd":0}"#).unwrap();
        assert_eq!(info, ProtocolInfo { pid: 7, fd: 0, stream: Stream::Memory });
    }

    #[test]
    fn protocol_info_names_what_is_wrong() {
        for (bytes, word) in [
            (&br#"{"pid":0,"fd":3}"#[..], "pid"),
            (br#"{"pid":1,"fd":-1}"#, "fd"),
            (br#"{"pid":1,"fd":3,"stream":"disk:256"}"#, "protocol_info"),
            (br#"{"pid":1,"fd":3,"more":1}"#, "protocol_info"),
            (b"", "protocol_info"),
            (&[b' '; 2000], "1024"),
        ] {
            let error = ProtocolInfo::parse(bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn preamble_is_the_line_of_the_design() {
        let preamble = Preamble {
            session: SessionId::new("move-1").unwrap(),
            token: Token::new("s3cret").unwrap(),
            stream: Stream::Disk(Slot::new(1, 2).unwrap()),
        };
        assert_eq!(preamble.to_line(), "DUNLIN1 move-1 s3cret disk:66\n");
        assert_eq!(Preamble::parse(preamble.to_line().as_bytes()).unwrap(), preamble);
        assert!(!format!("{preamble:?}").contains("s3cret"));
    }

    #[test]
    fn preamble_refuses_other_shapes() {
        let bad: [&[u8]; 8] = [
            b"DUNLIN1 a b memory",
            b"DUNLIN2 a b memory\n",
            b"DUNLIN1 a b\n",
            b"DUNLIN1 a b memory more\n",
            b"DUNLIN1  b memory\n",
            b"DUNLIN1 a b disk:9999\n",
            b"DUNLIN1 a b/c memory\n",
            b"\xff\n",
        ];
        for line in bad {
            assert!(Preamble::parse(line).is_err(), "{line:?}");
        }
        assert!(matches!(Preamble::parse(&[b'x'; 513]), Err(HandoverError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = ProtocolInfo::parse(&bytes);
            let _ = Preamble::parse(&bytes);
        }

        #[test]
        fn what_is_written_reads_back(
            pid in 1..=i32::MAX, fd in 0..=i32::MAX, slot in proptest::option::of(0u32..256),
            session in "[!-~]{1,256}", token in "[a-zA-Z0-9_-]{1,128}",
        ) {
            let stream = slot.map_or(Stream::Memory, |n| Stream::Disk(Slot::try_from(n).unwrap()));
            let info = ProtocolInfo { pid, fd, stream };
            prop_assert_eq!(ProtocolInfo::parse(&info.to_bytes()).unwrap(), info);
            let preamble = Preamble { session: SessionId::new(session).unwrap(), token: Token::new(token).unwrap(), stream };
            prop_assert_eq!(Preamble::parse(preamble.to_line().as_bytes()).unwrap(), preamble);
        }
    }
}
