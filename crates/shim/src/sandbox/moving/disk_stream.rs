//! One disk's NBD stream on the receiving side, carried to QEMU's server.
//!
//! It ends in order when the source's client takes its leave, which it does when its mirror is finished: the guest stands
//! still there. Every other end is a fault, and the guest runs on at the source.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use dunlin_qemu::{NbdClientStream, NotNbd};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// At a time, bytes.
const FROM_SOURCE: usize = 1 << 20;

/// A disk's stream came to no good end.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the source hung up before it had finished the disk")]
    HungUp,
    #[error("the connection to the source broke: {0}")]
    Source(#[source] io::Error),
    #[error(transparent)]
    Foreign(#[from] NotNbd),
    #[error("QEMU's NBD server cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    #[error("QEMU's NBD server took no more: {0}")]
    Server(#[source] io::Error),
    #[error("QEMU's NBD server hung up")]
    ServerHungUp,
}

impl Broken {
    /// Whether the other side's end is likely to be known better there.
    pub(super) fn came_from_the_source(&self) -> bool {
        match self {
            Broken::HungUp | Broken::Source(_) | Broken::Foreign(_) => true,
            Broken::Unreachable(_) | Broken::Server(_) | Broken::ServerHungUp => false,
        }
    }
}

/// Carries the stream to its end. Gives the bytes that came.
pub(super) async fn carry(socket: OwnedFd, server: &Path) -> Result<u64, Broken> {
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true).map_err(Broken::Source)?;
    let mut source = TcpStream::from_std(stream).map_err(Broken::Source)?;
    let mut server = UnixStream::connect(server).await.map_err(Broken::Unreachable)?;
    let (mut from_source, mut to_source) = source.split();
    let (mut from_server, mut to_server) = server.split();
    let requests = async {
        let (mut client, mut carried, mut buffer) = (NbdClientStream::default(), 0, vec![0; FROM_SOURCE]);
        loop {
            let read = match from_source.read(&mut buffer).await.map_err(Broken::Source)? {
                0 => return Err(Broken::HungUp),
                read => read,
            };
            client.feed(&buffer[..read])?;
            to_server.write_all(&buffer[..read]).await.map_err(Broken::Server)?;
            carried += read as u64;
            if client.took_leave() {
                // It had every answer before: nothing is under way any more.
                return Ok(carried);
            }
        }
    };
    let answers = async {
        match tokio::io::copy(&mut from_server, &mut to_source).await {
            Ok(_) => Broken::ServerHungUp,
            Err(error) => Broken::Source(error),
        }
    };
    tokio::select! {
        biased;
        end = requests => end,
        broken = answers => Err(broken),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::{TcpListener, UnixListener};

    use super::*;

    /// The client's flags and a write of four bytes.
    fn begun() -> Vec<u8> {
        let write =
            [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 1], &[7; 8], &[0; 8], &[0, 0, 0, 4], b"data"];
        [&[0, 0, 0, 3][..], &write.concat()].concat()
    }

    fn leave() -> Vec<u8> {
        [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 2], &[7; 8], &[0; 12]].concat()
    }

    struct Carried {
        source: TcpStream,
        server: UnixStream,
        end: tokio::task::JoinHandle<Result<u64, Broken>>,
        _at: tempfile::TempDir,
    }

    impl Carried {
        async fn new() -> Carried {
            let at = tempfile::tempdir().unwrap();
            let path = at.path().join("nbd.sock");
            let nbd = UnixListener::bind(&path).unwrap();
            let hosts = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let source = TcpStream::connect(hosts.local_addr().unwrap()).await.unwrap();
            let socket = hosts.accept().await.unwrap().0.into_std().unwrap();
            let end = tokio::spawn(async move { carry(socket.into(), &path).await });
            let server = nbd.accept().await.unwrap().0;
            Carried { source, server, end, _at: at }
        }

        async fn end(self) -> Result<u64, Broken> {
            tokio::time::timeout(Duration::from_secs(10), self.end).await.expect("it ends").unwrap()
        }
    }

    #[tokio::test]
    async fn a_client_that_takes_its_leave_ends_a_stream_in_order() {
        let mut carried = Carried::new().await;
        let (begun, leave) = (begun(), leave());
        carried.source.write_all(&begun).await.unwrap();
        carried.server.write_all(b"done").await.unwrap();
        let mut answer = [0; 4];
        carried.source.read_exact(&mut answer).await.unwrap();
        carried.source.write_all(&leave).await.unwrap();
        let mut arrived = vec![0; begun.len() + leave.len()];
        carried.server.read_exact(&mut arrived).await.unwrap();
        assert_eq!(arrived, [begun, leave].concat());
        assert_eq!(carried.end().await.unwrap(), arrived.len() as u64);
    }

    #[tokio::test]
    async fn every_other_end_is_a_fault() {
        let mut hung_up = Carried::new().await;
        hung_up.source.write_all(&begun()).await.unwrap();
        hung_up.source.shutdown().await.unwrap();
        assert!(matches!(hung_up.end().await, Err(Broken::HungUp)));

        let in_the_middle = Carried::new().await;
        let mut source = in_the_middle.source;
        source.write_all(&leave()[..20]).await.unwrap();
        drop(source);
        assert!(matches!(in_the_middle.end.await.unwrap(), Err(Broken::HungUp | Broken::Foreign(_))));

        // Closed with a byte unread, a socket is reset.
        let mut reset = Carried::new().await;
        reset.source.write_all(&begun()).await.unwrap();
        reset.server.write_all(b"unread").await.unwrap();
        reset.source.readable().await.unwrap();
        drop(std::mem::replace(&mut reset.source, another().await));
        let end = reset.end().await;
        assert!(matches!(end, Err(Broken::Source(_))), "{end:?}");

        let mut server = Carried::new().await;
        server.source.write_all(&begun()).await.unwrap();
        server.server.read_exact(&mut vec![0; begun().len()]).await.unwrap();
        drop(std::mem::replace(&mut server.server, UnixStream::pair().unwrap().0));
        let end = server.end().await;
        assert!(matches!(end, Err(Broken::ServerHungUp)), "{end:?}");
        assert!(!end.unwrap_err().came_from_the_source());
    }

    async fn another() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).await.unwrap()
    }
}
