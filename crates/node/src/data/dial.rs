//! Source: brings one stream to the destination's data port.

use std::net::SocketAddr;
use std::time::Duration;

use dunlin_wire::handover::{PREAMBLE_ACCEPTED, Preamble};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// For each of connecting, being answered.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why a stream could not be brought.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// No connection.
    #[error("cannot reach the data port {address}: {reason}; check `data_address` of the peer, its `data_listen`, and the firewall between (`nc -vz {} {}`)", address.ip(), address.port())]
    Connect {
        /// The data port.
        address: SocketAddr,
        /// The system's words.
        reason: String,
    },
    /// It was closed, or something else answered.
    #[error("{address} did not accept the stream: {reason}; see the log of the node there")]
    Refused {
        /// The data port.
        address: SocketAddr,
        /// What came instead.
        reason: String,
    },
}

/// Connects, shows `preamble`, and returns the socket once it was accepted. The socket is left
/// non-blocking; its next owner sets what it wants.
pub(crate) async fn dial(address: SocketAddr, preamble: &Preamble) -> Result<TcpStream, DialError> {
    let unreachable = |reason: String| DialError::Connect { address, reason };
    let refused = |reason: String| DialError::Refused { address, reason };
    let late = || format!("nothing within {} s", DEADLINE.as_secs());
    let mut socket = tokio::time::timeout(DEADLINE, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable(late()))?
        .map_err(|error| unreachable(error.to_string()))?;
    super::set_up(&socket).map_err(|error| unreachable(error.to_string()))?;
    let exchange = async {
        socket.write_all(preamble.to_line().as_bytes()).await?;
        let mut answer = [0; PREAMBLE_ACCEPTED.len()];
        socket.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    match tokio::time::timeout(DEADLINE, exchange).await {
        Ok(Ok(answer)) if answer == PREAMBLE_ACCEPTED => Ok(socket),
        Ok(Ok(answer)) => Err(refused(format!("it answered {:?}", String::from_utf8_lossy(&answer)))),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(refused("it closed the connection".into()))
        }
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(_) => Err(refused(late())),
    }
}
