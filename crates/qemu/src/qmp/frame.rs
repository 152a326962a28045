//! Lines out of a byte stream, with a cap that is checked before memory is taken.

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// Longest line taken from QEMU, bytes. A `query-block` of 256 disks is about a tenth of it.
pub(super) const MAX_LINE: usize = 4 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    #[error("the stream ended in the middle of a line ({0} bytes in)")]
    Truncated(usize),
    #[error("reading failed: {0}")]
    Read(#[from] std::io::Error),
}

/// The next line without its end, or `None` when the stream ended between two lines.
pub(super) async fn next_line<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    cap: usize,
) -> Result<Option<Vec<u8>>, FrameError> {
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return if line.is_empty() { Ok(None) } else { Err(FrameError::Truncated(line.len())) };
        }
        let end = available.iter().position(|&byte| byte == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        if line.len() + part.len() > cap {
            return Err(FrameError::TooLong(cap));
        }
        line.extend_from_slice(part);
        let taken = part.len() + usize::from(end.is_some());
        reader.consume(taken);
        if end.is_some() {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(Some(line));
        }
    }
}
