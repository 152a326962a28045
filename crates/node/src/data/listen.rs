//! Destination: lets in the streams that a session expects, and nobody else.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dunlin_wire::handover::{PREAMBLE_ACCEPTED, PREAMBLE_MAX, Preamble};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// From accept to a whole preamble.
const DEADLINE: Duration = Duration::from_secs(5);
/// Connections that may be between accept and hand-over at once.
const UNPROVEN_MAX: usize = 64;

/// Who knows which streams are expected.
#[async_trait]
pub(crate) trait Door: Send + Sync + 'static {
    /// Checks session, token and stream, and books the stream: a second one is refused.
    /// The refusal is logged, never sent.
    fn admit(&self, preamble: &Preamble) -> Result<(), String>;
    /// Takes a socket whose preamble was admitted and answered.
    async fn adopt(&self, preamble: Preamble, socket: TcpStream);
}

/// Serves `listener` until it is dropped or aborted.
pub(crate) async fn serve<D: Door>(listener: TcpListener, door: Arc<D>) {
    let unproven = Arc::new(Semaphore::new(UNPROVEN_MAX));
    loop {
        let (socket, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors is the likely cause: others must close theirs first.
                tracing::warn!(%error, "cannot accept a data stream");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&unproven).try_acquire_owned() else {
            tracing::warn!(%from, "dropped: {UNPROVEN_MAX} data streams have not shown who they are yet");
            continue;
        };
        let door = Arc::clone(&door);
        tokio::spawn(async move {
            if let Err(reason) = admit(socket, door.as_ref()).await {
                tracing::warn!(%from, reason, "refused a data stream");
            }
            drop(permit);
        });
    }
}

async fn admit<D: Door>(mut socket: TcpStream, door: &D) -> Result<(), String> {
    super::set_up(&socket).map_err(|error| error.to_string())?;
    let line = tokio::time::timeout(DEADLINE, read_line(&mut socket))
        .await
        .map_err(|_| format!("no preamble within {} s", DEADLINE.as_secs()))??;
    let preamble = Preamble::parse(&line).map_err(|error| error.to_string())?;
    door.admit(&preamble)?;
    // Before the hand-over: the destination's shim may be the one that speaks first.
    let answering = socket.write_all(PREAMBLE_ACCEPTED);
    tokio::time::timeout(DEADLINE, answering)
        .await
        .map_err(|_| "the answer could not be sent in time".to_owned())?
        .map_err(|error| error.to_string())?;
    door.adopt(preamble, socket).await;
    Ok(())
}

/// One byte at a time: what follows the newline is not ours to read.
async fn read_line(socket: &mut TcpStream) -> Result<Vec<u8>, String> {
    let mut line = Vec::with_capacity(128);
    while line.last() != Some(&b'\n') {
        if line.len() == PREAMBLE_MAX {
            return Err(format!("{PREAMBLE_MAX} bytes without a newline"));
        }
        match socket.read_u8().await {
            Ok(byte) => line.push(byte),
            Err(error) => return Err(format!("closed within the preamble: {error}")),
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use dunlin_wire::handover::{Stream, Token};
    use dunlin_wire::ids::{SessionId, Slot};
    use nix::sys::socket::{getsockopt, sockopt};
    use tokio::sync::mpsc;

    use super::*;
    use crate::data::SILENCE;
    use crate::data::dial::{DialError, dial};

    struct OneSession {
        token: Token,
        taken: Mutex<Vec<Stream>>,
        adopted: mpsc::Sender<(Preamble, TcpStream)>,
    }

    #[async_trait]
    impl Door for OneSession {
        fn admit(&self, preamble: &Preamble) -> Result<(), String> {
            if preamble.session.as_str() != "s" || !preamble.token.matches(&self.token) {
                return Err("unknown".into());
            }
            let mut taken = self.taken.lock().unwrap();
            if taken.contains(&preamble.stream) {
                return Err("twice".into());
            }
            taken.push(preamble.stream);
            Ok(())
        }
        async fn adopt(&self, preamble: Preamble, socket: TcpStream) {
            self.adopted.send((preamble, socket)).await.unwrap();
        }
    }

    async fn door() -> (std::net::SocketAddr, mpsc::Receiver<(Preamble, TcpStream)>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (adopted, arrivals) = mpsc::channel(4);
        let door = OneSession { token: Token::new("good").unwrap(), taken: Mutex::default(), adopted };
        tokio::spawn(serve(listener, Arc::new(door)));
        (address, arrivals)
    }

    fn preamble(session: &str, token: &str, stream: Stream) -> Preamble {
        Preamble { session: SessionId::new(session).unwrap(), token: Token::new(token).unwrap(), stream }
    }

    #[tokio::test]
    async fn an_expected_stream_comes_through_with_every_later_byte() {
        let (address, mut arrivals) = door().await;
        let mut here = dial(address, &preamble("s", "good", Stream::Memory)).await.unwrap();
        here.write_all(b"after\n").await.unwrap();
        let (shown, mut there) = arrivals.recv().await.unwrap();
        assert_eq!(shown.stream, Stream::Memory);
        for socket in [&here, &there] {
            assert!(socket.nodelay().unwrap());
            // Its peer's silence is noticed while something is on the way to it, and while nothing is.
            let silence = getsockopt(socket, sockopt::TcpUserTimeout).unwrap();
            assert_eq!(u128::from(silence), SILENCE.as_millis());
            assert!(getsockopt(socket, sockopt::KeepAlive).unwrap());
            let idle = getsockopt(socket, sockopt::TcpKeepIdle).unwrap();
            let interval = getsockopt(socket, sockopt::TcpKeepInterval).unwrap();
            assert!(u64::from(idle + interval) < SILENCE.as_secs());
        }
        let mut bytes = [0; 6];
        there.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"after\n");
        there.write_all(b"back").await.unwrap();
        let mut bytes = [0; 4];
        here.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"back");
    }

    #[tokio::test]
    async fn a_wrong_token_an_unknown_session_and_a_second_stream_are_closed_without_a_word() {
        let (address, mut arrivals) = door().await;
        let disk = Stream::Disk(Slot::new(0, 1).unwrap());
        dial(address, &preamble("s", "good", disk)).await.unwrap();
        arrivals.recv().await.unwrap();
        for (session, token, stream) in
            [("s", "bad", Stream::Memory), ("x", "good", Stream::Memory), ("s", "good", disk)]
        {
            let error = dial(address, &preamble(session, token, stream)).await.unwrap_err();
            assert!(matches!(error, DialError::Refused { .. }), "{error}");
        }
        assert!(arrivals.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_preamble_without_an_end_is_cut_at_the_cap() {
        let (address, mut arrivals) = door().await;
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(&[b'x'; PREAMBLE_MAX]).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(4), socket.read_to_end(&mut answer)).await;
        assert!(read.expect("closed before the deadline of a slow preamble").is_ok());
        assert!(answer.is_empty());
        assert!(arrivals.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_caller_is_closed_at_the_deadline() {
        let (address, _arrivals) = door().await;
        let mut socket = TcpStream::connect(address).await.unwrap();
        let mut answer = Vec::new();
        // No time of the test's own: a clock that stands still jumps to whichever comes next, also while
        // the kernel is still at work on the connection.
        socket.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty());
    }

    #[tokio::test]
    async fn nobody_there_names_the_port_and_how_to_check() {
        // A port that is kept and not listened on: a free one may be another test's by now.
        let kept = tokio::net::TcpSocket::new_v4().unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = kept.local_addr().unwrap();
        let error = dial(address, &preamble("s", "good", Stream::Memory)).await.unwrap_err().to_string();
        assert!(error.contains(&format!("nc -vz 127.0.0.1 {}", address.port())), "{error}");
    }
}
