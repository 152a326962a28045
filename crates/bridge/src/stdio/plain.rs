//! Stdio with a peer that does not resume streams: no acknowledgements, and a close handshake.
//!
//! An exec's streams and every input are one connection and end when it breaks: [`send`], [`receive`]. The output of a
//! container's init goes on: the guest connects again, repeats the last [`TAIL`] bytes and continues
//! ([`send_replaying`]), and the host accepts again on the same port ([`receive_replayed`]). Bytes may then come twice,
//! and what was on its way beyond the tail is lost; nothing better can be had without acknowledgements.

use std::collections::VecDeque;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::debug;

use super::{Connect, REDIAL, ReceiveError, Resume};

const PIECE: usize = 32 * 1024;
/// Bytes last written that are repeated on a new connection.
pub const TAIL: usize = 128 * 1024;

/// Sends all of `source`, half-closes, and waits until the receiver closes: that is when it has taken everything.
/// Yields the bytes sent.
///
/// # Errors
/// The stream broke.
pub async fn send<R, S>(mut source: R, mut stream: S) -> io::Result<u64>
where
    R: AsyncRead + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let total = copy(&mut source, &mut stream).await?;
    finish(&mut stream).await?;
    Ok(total)
}

/// Sends all of `source` over as many connections as it takes, as [`send`] does over one. A connection that breaks is
/// noticed by the next write; the one after it begins with a repetition of the last [`TAIL`] bytes written. A source
/// that fails counts as ended: a closed pty does so. Yields the bytes sent, each counted once.
///
/// # Errors
/// There will be no more connections.
pub async fn send_replaying<R, C>(mut source: R, mut connect: C) -> io::Result<u64>
where
    R: AsyncRead + Unpin,
    C: Connect,
{
    let mut tail = Tail::default();
    let mut stream = connect.connect().await.ok_or(io::ErrorKind::NotConnected)?;
    let mut buffer = vec![0; PIECE];
    let mut total = 0;
    loop {
        let n = source.read(&mut buffer).await.unwrap_or_else(|error| {
            debug!(%error, "a stdio source has failed; taken as its end");
            0
        });
        if n == 0 {
            break;
        }
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            match write_some(&mut stream, rest).await {
                Ok(written) => {
                    tail.push(&rest[..written]);
                    total += written as u64;
                    rest = &rest[written..];
                }
                Err(error) => stream = replayed(&mut connect, &mut tail, &error).await?,
            }
        }
    }
    while let Err(error) = finish(&mut stream).await {
        stream = replayed(&mut connect, &mut tail, &error).await?;
    }
    Ok(total)
}

/// Receives into `sink` to the end, shuts the sink down and closes. Yields the bytes received.
///
/// # Errors
/// The stream broke, or the sink did.
pub async fn receive<S, W>(mut stream: S, mut sink: W) -> io::Result<u64>
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: AsyncWrite + Unpin,
{
    let total = copy(&mut stream, &mut sink).await?;
    sink.shutdown().await?;
    stream.shutdown().await?;
    Ok(total)
}

/// Receives what [`send_replaying`] sends into `sink`, over as many connections as it takes, repetitions included;
/// [`Ended::linger`] afterwards. `resume` can hold the bytes back; its total counts what was handed on.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive_replayed<C, W>(
    mut connect: C,
    mut sink: W,
    resume: &Resume,
) -> Result<Ended<C>, ReceiveError>
where
    C: Connect,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; PIECE];
    loop {
        let Some(mut stream) = connect.connect().await else { return Err(ReceiveError::Disconnected) };
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => {
                    resume.released().await;
                    // A sink that cannot be shut down has all its bytes all the same.
                    let _ = sink.shutdown().await;
                    let _ = stream.shutdown().await;
                    return Ok(Ended { connect });
                }
                Ok(n) => {
                    let mut fresh = &buffer[..n];
                    while !fresh.is_empty() {
                        let taken = resume.hand_on(&mut sink, fresh).await.map_err(ReceiveError::Sink)?;
                        fresh = &fresh[taken..];
                    }
                    sink.flush().await.map_err(ReceiveError::Sink)?;
                }
                Err(error) => {
                    debug!(%error, "a plain stdio stream broke; waiting for the next");
                    break;
                }
            }
        }
        tokio::time::sleep(REDIAL / 10).await;
    }
}

/// A plain stream that was received to its end. Let it linger until the process is gone: a sender that missed the
/// close repeats itself on another connection, and waits there.
#[derive(Debug)]
pub struct Ended<C> {
    connect: C,
}

impl<C: Connect> Ended<C> {
    /// Closes a repetition without taking it; ends when one has come to its end, or there will be no more connections.
    pub async fn linger(mut self) {
        while let Some(mut stream) = self.connect.connect().await {
            if tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.is_ok()
                && stream.shutdown().await.is_ok()
            {
                return;
            }
        }
    }
}

/// The last bytes written.
#[derive(Debug, Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL)..];
        let over = (self.0.len() + bytes.len()).saturating_sub(TAIL);
        self.0.drain(..over);
        self.0.extend(bytes);
    }
}

/// A new connection on which the tail has been repeated.
async fn replayed<C: Connect>(connect: &mut C, tail: &mut Tail, broken: &io::Error) -> io::Result<C::Stream> {
    debug!(%broken, "a plain stdio stream broke; connecting again");
    loop {
        let mut stream = connect.connect().await.ok_or(io::ErrorKind::NotConnected)?;
        let repeated = async {
            stream.write_all(tail.0.make_contiguous()).await?;
            stream.flush().await
        };
        match repeated.await {
            Ok(()) => return Ok(stream),
            Err(error) => debug!(%error, "a plain stdio stream broke while it was repeated"),
        }
        tokio::time::sleep(REDIAL).await;
    }
}

async fn write_some<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<usize> {
    let n = stream.write(bytes).await?;
    if n == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    stream.flush().await?;
    Ok(n)
}

/// Half-closes and waits for the receiver's close.
async fn finish<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    stream.shutdown().await?;
    let mut waste = [0u8; 64];
    while stream.read(&mut waste).await? > 0 {}
    Ok(())
}

async fn copy<R, W>(from: &mut R, to: &mut W) -> io::Result<u64>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; PIECE];
    let mut total = 0;
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(total);
        }
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
        total += n as u64;
    }
}
