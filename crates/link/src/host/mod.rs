//! The host's end: connects to the VM's channel, begins sessions, listens by port.

mod channel;
mod ports;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

pub(crate) use ports::ACCEPTED;
pub use ports::PortListener;

use crate::outbox::Outbox;
use crate::packet::{Decoder, Packet};
use crate::session::Session;
use crate::{Epoch, LinkStatus};
use channel::Channel;
use ports::Ports;

/// How long the channel may take to appear.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long a guest that was started may take to listen.
pub const GUEST_DEADLINE: Duration = Duration::from_secs(120);
/// Time between two HELLOs.
const HELLO_EVERY: Duration = Duration::from_millis(100);
/// How long a closing link tries to say so.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);
/// Packets read and not yet looked at.
const PACKETS: usize = 16;

/// Where a VM's channel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// The unix socket on which QEMU listens for the virtio-serial port's chardev.
    VirtioSerial {
        /// Its path.
        socket: PathBuf,
    },
    /// The guest listens.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// Its port, [`crate::VSOCK_PORT`].
        port: u32,
    },
}

/// The host cannot use its link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The channel did not appear.
    #[error("cannot connect to the VM's link at {endpoint:?} within {}s: {source}; look whether QEMU still runs", CONNECT_DEADLINE.as_secs())]
    Connect {
        /// Where it was looked for.
        endpoint: Endpoint,
        /// The last attempt's failure.
        source: io::Error,
    },
    /// Another listener has the port.
    #[error("port {port} of the link has a listener already; drop that one first")]
    AddrInUse {
        /// The port.
        port: u32,
    },
    /// The link has been closed or the VM has ended.
    #[error("the link is closed; connect to the VM again")]
    Closed,
}

/// The host's end of a VM's link. Clones are handles; the link closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct HostLink {
    ports: Ports,
    status: watch::Receiver<LinkStatus>,
    orders: mpsc::Sender<Close>,
    start: Arc<watch::Sender<bool>>,
}

#[derive(Debug)]
struct Close;

impl HostLink {
    /// Connects to the channel, within [`CONNECT_DEADLINE`]. No byte is sent. On vsock it is the guest that listens,
    /// so that the connection is made at the start, within [`GUEST_DEADLINE`]; without it the link goes down.
    ///
    /// # Errors
    /// [`LinkError::Connect`].
    pub async fn connect(endpoint: Endpoint) -> Result<HostLink, LinkError> {
        let ports = Ports::default();
        let (status_sender, status) = watch::channel(LinkStatus::Connected);
        let (orders, order_queue) = mpsc::channel(4);
        let (start, started) = watch::channel(false);
        match &endpoint {
            Endpoint::VirtioSerial { .. } => {
                let channel = Channel::connect(&endpoint, Instant::now() + CONNECT_DEADLINE)
                    .await
                    .map_err(|source| LinkError::Connect { endpoint, source })?;
                let owner = Owner::new(channel, ports.clone(), status_sender);
                tokio::spawn(owner.run(order_queue, started));
            }
            Endpoint::Vsock { .. } => {
                tokio::spawn(dial_when_started(endpoint, ports.clone(), status_sender, order_queue, started));
            }
        }
        Ok(HostLink { ports, status, orders, start: Arc::new(start) })
    }

    /// Begins sessions: from now on one is kept up as long as the channel is there. Repeating it does nothing.
    pub fn start(&self) {
        self.start.send_replace(true);
    }

    /// Takes a port; possible before and after the start. Streams that the guest dials wait here, at most 16; more
    /// are refused, as are those for ports without a listener.
    ///
    /// # Errors
    /// [`LinkError::AddrInUse`] while another listener has it, [`LinkError::Closed`].
    pub fn listen(&self, port: u32) -> Result<PortListener, LinkError> {
        self.ports.listen(port)
    }

    /// How the link stands.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.clone()
    }

    /// Says BYE, then gives the channel up. All streams end, all listeners return None.
    pub async fn close(self) {
        let mut status = self.status.clone();
        if self.orders.send(Close).await.is_ok() {
            let _ = status.wait_for(|status| *status == LinkStatus::Down).await;
        }
    }
}

/// Connects to a guest that may not run yet, then owns the channel.
async fn dial_when_started(
    endpoint: Endpoint,
    ports: Ports,
    status: watch::Sender<LinkStatus>,
    mut orders: mpsc::Receiver<Close>,
    mut started: watch::Receiver<bool>,
) {
    let dialled = tokio::select! {
        _ = orders.recv() => None,
        channel = async {
            if !asked(&mut started).await {
                return None;
            }
            let channel = Channel::connect(&endpoint, Instant::now() + GUEST_DEADLINE).await;
            channel.inspect_err(|error| warn!(?endpoint, %error, "the guest does not answer on its link")).ok()
        } => channel,
    };
    match dialled {
        Some(channel) => Owner::new(channel, ports, status).run(orders, started).await,
        None => {
            ports.close();
            status.send_replace(LinkStatus::Down);
        }
    }
}

/// The task that owns the channel and the session.
struct Owner {
    outbox: Outbox,
    packets: mpsc::Receiver<Packet>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    ports: Ports,
    status: watch::Sender<LinkStatus>,
    phase: Phase,
    ended: mpsc::Sender<Epoch>,
    ended_queue: mpsc::Receiver<Epoch>,
}

enum Phase {
    NotStarted,
    Greeting(Epoch),
    Up(Session),
}

/// Waits for the start. False: nobody is left who could ask for it.
async fn asked(started: &mut watch::Receiver<bool>) -> bool {
    started.wait_for(|started| *started).await.is_ok()
}

impl Owner {
    fn new(channel: Channel, ports: Ports, status: watch::Sender<LinkStatus>) -> Owner {
        let outbox = Outbox::default();
        let (mut read_half, mut write_half) = tokio::io::split(channel);
        let (sender, packets) = mpsc::channel(PACKETS);
        let reader = tokio::spawn(async move {
            let mut decoder = Decoder::default();
            let mut buffer = vec![0; 64 * 1024];
            let mut found = Vec::new();
            while let Ok(n @ 1..) = read_half.read(&mut buffer).await {
                decoder.feed(&buffer[..n], |packet| found.push(packet));
                for packet in found.drain(..) {
                    if sender.send(packet).await.is_err() {
                        return;
                    }
                }
            }
        });
        let to_write = outbox.clone();
        let writer = tokio::spawn(async move {
            while let Some(bytes) = to_write.take().await {
                if write_half.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let _ = write_half.flush().await;
        });
        let (ended, ended_queue) = mpsc::channel(8);
        Owner { outbox, packets, reader, writer, ports, status, phase: Phase::NotStarted, ended, ended_queue }
    }

    async fn run(mut self, mut orders: mpsc::Receiver<Close>, mut started: watch::Receiver<bool>) {
        let mut hello = tokio::time::interval(HELLO_EVERY);
        hello.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = orders.recv() => {
                    // None: the last handle was dropped.
                    debug!(asked = order.is_some(), "closing the link");
                    self.say_bye().await;
                    break;
                }
                true = asked(&mut started), if matches!(self.phase, Phase::NotStarted) => {
                    self.greet();
                    hello.reset_immediately();
                }
                _ = hello.tick(), if matches!(self.phase, Phase::Greeting(_)) => {
                    if let Phase::Greeting(epoch) = self.phase {
                        self.outbox.control(Packet::Hello(epoch));
                    }
                }
                Some(epoch) = self.ended_queue.recv() => {
                    if matches!(&self.phase, Phase::Up(session) if session.epoch() == epoch) {
                        self.greet();
                        hello.reset_immediately();
                    }
                }
                packet = self.packets.recv() => {
                    let Some(packet) = packet else {
                        info!("the VM's channel has ended");
                        break;
                    };
                    if self.take(packet) {
                        hello.reset_immediately();
                    }
                }
            }
        }
        self.phase = Phase::NotStarted;
        self.outbox.close();
        self.reader.abort();
        self.writer.abort();
        self.ports.close();
        self.status.send_replace(LinkStatus::Down);
    }

    fn greet(&mut self) {
        let epoch = Epoch(rand::random());
        debug!(%epoch, "beginning a session");
        self.phase = Phase::Greeting(epoch);
        self.outbox.begin(None);
        self.status.send_replace(LinkStatus::Connected);
    }

    /// Acts on a packet. True: a new session is being begun.
    fn take(&mut self, packet: Packet) -> bool {
        match (packet, &mut self.phase) {
            (Packet::HelloAck(epoch), Phase::Greeting(greeted)) if *greeted == epoch => {
                let ports = self.ports.clone();
                let session =
                    Session::host(epoch, &self.outbox, move |stream| ports.route(stream), self.ended.clone());
                self.phase = Phase::Up(session);
                info!(%epoch, "the link is up");
                self.status.send_replace(LinkStatus::Up { epoch });
                false
            }
            (Packet::Data { epoch, seq, payload }, Phase::Up(session)) if session.epoch() == epoch => {
                let Err(broken) = session.data(seq, payload) else { return false };
                warn!(%epoch, ?broken, "the link's session is broken; beginning another");
                self.greet();
                true
            }
            (Packet::Bye(epoch), Phase::Up(session)) if session.epoch() == epoch => {
                info!(%epoch, "the guest has ended the link's session");
                self.greet();
                true
            }
            (Packet::Bye(epoch), Phase::Greeting(greeted)) if *greeted == epoch => {
                self.greet();
                true
            }
            _ => false,
        }
    }

    async fn say_bye(&mut self) {
        let epoch = match &self.phase {
            Phase::NotStarted => return,
            Phase::Greeting(epoch) => *epoch,
            Phase::Up(session) => session.epoch(),
        };
        self.outbox.control(Packet::Bye(epoch));
        self.outbox.close();
        let _ = tokio::time::timeout(CLOSE_DEADLINE, &mut self.writer).await;
    }
}
