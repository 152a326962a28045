//! Frames: a 16-byte little-endian header and a JSON object.
//!
//! ```text
//! 0      4      8            16
//! | type | size |     id     |  JSON, size - 16 bytes; a newline may follow it inside the size
//! ```

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a frame's header; part of its size.
pub const HEADER_LEN: usize = 16;
/// Largest frame that a host takes from a guest, header included.
pub const MAX_FROM_GUEST: usize = 64 * 1024;
/// Largest frame that a guest takes from a host, header included.
pub const MAX_FROM_HOST: usize = 16 * 1024 * 1024;
/// The first allocation for a body; more only as bytes really arrive.
const BODY_STEP: usize = 64 * 1024;

/// The number in a frame's header that says what the body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessageType(pub u32);

impl MessageType {
    /// A container's exit, guest to host; its frame id is 0.
    pub const NOTIFICATION: MessageType = MessageType(0x3010_0101);

    /// The answer's type: the same number with the top digit 2.
    #[must_use]
    pub const fn response(self) -> MessageType {
        MessageType((self.0 & 0x0fff_ffff) | 0x2000_0000)
    }

    /// Whether this is an answer.
    #[must_use]
    pub const fn is_response(self) -> bool {
        self.0 >> 28 == 2
    }

    /// Whether this is a request.
    #[must_use]
    pub const fn is_request(self) -> bool {
        self.0 >> 28 == 1
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub message: MessageType,
    /// Chosen by the one who asks; the answer repeats it. 0 on notifications.
    pub id: u64,
    /// A JSON object, without a trailing newline.
    pub body: Bytes,
}

/// A frame cannot be read.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The stream ended between two frames.
    #[error("the bridge's stream has ended")]
    Ended,
    /// The stream failed, or ended inside a frame.
    #[error("the bridge's stream cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The header's size is outside of what this end takes.
    #[error(
        "frame of {size} bytes (type {message:#010x}, id {id}) refused: sizes from {HEADER_LEN} to {limit} are taken"
    )]
    Size {
        /// Bytes that the header announces.
        size: u32,
        /// The largest size taken here.
        limit: usize,
        /// The header's type.
        message: u32,
        /// The header's id.
        id: u64,
    },
}

impl Frame {
    /// The frame's bytes.
    ///
    /// # Panics
    /// When the body does not fit a u32; callers bound it far below that.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let size = u32::try_from(HEADER_LEN + self.body.len()).expect("a frame's body is bounded");
        let mut out = BytesMut::with_capacity(HEADER_LEN + self.body.len());
        out.put_u32_le(self.message.0);
        out.put_u32_le(size);
        out.put_u64_le(self.id);
        out.put_slice(&self.body);
        out.freeze()
    }

    /// Reads one frame of at most `limit` bytes. Not cancel safe: a dropped read loses the place.
    ///
    /// # Errors
    /// [`FrameError`]; after any of them the stream is of no more use.
    pub async fn read<R: AsyncRead + Unpin>(stream: &mut R, limit: usize) -> Result<Frame, FrameError> {
        let mut header = [0u8; HEADER_LEN];
        if stream.read(&mut header[..1]).await.map_err(FrameError::Read)? == 0 {
            return Err(FrameError::Ended);
        }
        stream.read_exact(&mut header[1..]).await.map_err(FrameError::Read)?;
        let [m0, m1, m2, m3, s0, s1, s2, s3, id @ ..] = header;
        let message = u32::from_le_bytes([m0, m1, m2, m3]);
        let size = u32::from_le_bytes([s0, s1, s2, s3]);
        let id = u64::from_le_bytes(id);
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if length < HEADER_LEN || length > limit {
            return Err(FrameError::Size { size, limit, message, id });
        }
        let body = read_body(stream, length - HEADER_LEN).await.map_err(FrameError::Read)?;
        Ok(Frame { message: MessageType(message), id, body })
    }
}

async fn read_body<R: AsyncRead + Unpin>(stream: &mut R, length: usize) -> io::Result<Bytes> {
    let mut body = BytesMut::with_capacity(length.min(BODY_STEP));
    let mut rest = stream.take(length as u64);
    while body.len() < length {
        if rest.read_buf(&mut body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    while body.last().is_some_and(|byte| *byte == b'\n') {
        body.truncate(body.len() - 1);
    }
    Ok(body.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn a_frame_has_the_documented_bytes() {
        let frame = Frame { message: MessageType(0x1010_0b01), id: 7, body: Bytes::from_static(b"{}") };
        assert_eq!(
            frame.encode().as_ref(),
            [1, 0x0b, 0x10, 0x10, 18, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']
        );
        assert_eq!(frame.message.response(), MessageType(0x2010_0b01));
    }

    #[test]
    fn an_appended_newline_is_not_part_of_the_body() {
        let frame = Frame { message: MessageType(1), id: 1, body: Bytes::from_static(b"{}\n") };
        let bytes = frame.encode();
        assert_eq!(bytes[4], 19);
        let back = block(Frame::read(&mut bytes.as_ref(), MAX_FROM_GUEST)).unwrap();
        assert_eq!(back.body.as_ref(), b"{}");
    }

    #[test]
    fn sizes_outside_the_bounds_are_refused_before_the_body_is_read() {
        for (size, limit) in [(15u32, MAX_FROM_GUEST), (65_537, MAX_FROM_GUEST), (u32::MAX, MAX_FROM_HOST)] {
            let mut bytes = vec![0u8; HEADER_LEN];
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            let error = block(Frame::read(&mut bytes.as_slice(), limit)).unwrap_err();
            assert!(matches!(error, FrameError::Size { size: s, .. } if s == size), "{error}");
        }
    }

    #[test]
    fn a_large_announcement_without_bytes_allocates_little() {
        let mut bytes = vec![0u8; HEADER_LEN];
        bytes[4..8].copy_from_slice(&(16u32 * 1024 * 1024).to_le_bytes());
        bytes.extend_from_slice(b"{");
        let error = block(Frame::read(&mut bytes.as_slice(), MAX_FROM_HOST)).unwrap_err();
        assert!(matches!(error, FrameError::Read(e) if e.kind() == io::ErrorKind::UnexpectedEof));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut rest = bytes.as_slice();
            block(async { while Frame::read(&mut rest, MAX_FROM_GUEST).await.is_ok() {} });
        }

        #[test]
        fn frames_survive_the_round_trip(
            message in any::<u32>(), id in any::<u64>(), text in "[a-z{}\":0-9]{0,200}"
        ) {
            let frame = Frame { message: MessageType(message), id, body: Bytes::from(text) };
            let bytes = frame.encode();
            prop_assert_eq!(block(Frame::read(&mut bytes.as_ref(), MAX_FROM_GUEST)).unwrap(), frame);
        }
    }
}
