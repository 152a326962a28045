//! Who listens on which port of the host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tracing::debug;

use super::LinkError;
use crate::LinkStream;

/// The answer to a dialled port: taken.
pub(crate) const ACCEPTED: u8 = 0;
/// The answer to a dialled port: nobody listens.
pub(crate) const REFUSED: u8 = 1;
/// Accepted streams that may wait for their listener.
const BACKLOG: usize = 16;
/// How long a new stream may take to name its port.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);

/// The listeners of one link. Clones are handles.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ports(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    listeners: HashMap<u32, mpsc::Sender<LinkStream>>,
    closed: bool,
}

impl Ports {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn listen(&self, port: u32) -> Result<PortListener, LinkError> {
        let mut table = self.lock();
        if table.closed {
            return Err(LinkError::Closed);
        }
        if table.listeners.get(&port).is_some_and(|listener| !listener.is_closed()) {
            return Err(LinkError::AddrInUse { port });
        }
        let (sender, streams) = mpsc::channel(BACKLOG);
        table.listeners.insert(port, sender);
        Ok(PortListener { port, streams, ports: self.clone() })
    }

    /// Brings a stream that the guest has opened to its listener, in a task of its own.
    pub(crate) fn route(&self, mut stream: LinkStream) {
        let ports = self.clone();
        tokio::spawn(async move {
            let Ok(Ok(port)) = tokio::time::timeout(HEADER_DEADLINE, stream.read_u32_le()).await else {
                debug!("a stream of the guest named no port");
                return;
            };
            // The place is taken before the guest hears of it: an accepted stream always arrives.
            let listener = ports.lock().listeners.get(&port).cloned();
            let place = listener.and_then(|listener| listener.try_reserve_owned().ok());
            let answer = if place.is_some() { ACCEPTED } else { REFUSED };
            let answered = tokio::time::timeout(HEADER_DEADLINE, stream.write_all(&[answer])).await;
            match place {
                Some(place) if matches!(answered, Ok(Ok(()))) => {
                    place.send(stream);
                }
                Some(_) => debug!(port, "a stream broke while it was accepted"),
                None => {
                    debug!(port, "a stream was refused: nobody listens or too many wait");
                    let _ = stream.shutdown().await;
                }
            }
        });
    }

    pub(crate) fn close(&self) {
        let mut table = self.lock();
        table.closed = true;
        table.listeners.clear();
    }
}

/// A port of the host. It survives sessions; dropping it frees the port.
#[derive(Debug)]
pub struct PortListener {
    port: u32,
    streams: mpsc::Receiver<LinkStream>,
    ports: Ports,
}

impl PortListener {
    /// The next stream that the guest dials to this port; waits through lost sessions. None once the link is
    /// closed or the VM has ended. Cancel safe.
    pub async fn accept(&mut self) -> Option<LinkStream> {
        self.streams.recv().await
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for PortListener {
    fn drop(&mut self) {
        self.streams.close();
        let mut table = self.ports.lock();
        if table.listeners.get(&self.port).is_some_and(mpsc::Sender::is_closed) {
            table.listeners.remove(&self.port);
        }
    }
}
