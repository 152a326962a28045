//! The guest's end: serves the channel, follows the host's sessions, dials by port.
//!
//! PID 1 depends on nothing here: the device may be absent, hang up, vanish and come back; all that is seen of it
//! is [`LinkStatus`] and streams that end.

mod device;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::host::ACCEPTED;
use crate::outbox::Outbox;
use crate::packet::Packet;
use crate::session::{OpenRequest, Session};
use crate::{Epoch, LinkStatus, LinkStream};
use device::Stop;

/// How long the host may take to answer a dialled port.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);
/// Openings of the device not yet looked at.
const OPENINGS: usize = 4;

/// Where the guest finds its channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// A virtio-serial port.
    VirtioSerial {
        /// Such as `/dev/virtio-ports/dunlin.link.0`.
        path: PathBuf,
    },
    /// The guest listens on this vsock port; the newest connection wins.
    Vsock {
        /// [`crate::VSOCK_PORT`].
        port: u32,
    },
    /// A unix socket to listen on, for a guest that is no VM: it stands for QEMU's chardev.
    UnixListener {
        /// Created; a stale one is replaced.
        path: PathBuf,
    },
}

/// An opened channel.
#[derive(Debug)]
struct Opening {
    outbox: Outbox,
    packets: mpsc::Receiver<Packet>,
}

type Dials = Option<mpsc::Sender<OpenRequest>>;

/// The guest's end of the link. Clones are handles; it ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct GuestLink {
    status: watch::Receiver<LinkStatus>,
    dials: watch::Receiver<Dials>,
    _alive: Arc<oneshot::Sender<()>>,
}

impl GuestLink {
    /// Serves the device from now on; it is opened for as often and as long as it takes. Never fails. Needs a tokio
    /// runtime.
    #[must_use]
    pub fn spawn(device: Device) -> GuestLink {
        let (openings, opening_queue) = mpsc::channel(OPENINGS);
        let stop = Stop::default();
        device::serve(device, openings, stop.clone());
        let (status_sender, status) = watch::channel(LinkStatus::Down);
        let (dials_sender, dials) = watch::channel(None);
        let (alive, gone) = oneshot::channel();
        let (ended, ended_queue) = mpsc::channel(8);
        let owner = Owner {
            opening_queue,
            current: None,
            session: None,
            last_ended: None,
            status: status_sender,
            dials: dials_sender,
            ended,
            ended_queue,
        };
        tokio::spawn(async move {
            owner.run(gone).await;
            stop.stop();
        });
        GuestLink { status, dials, _alive: Arc::new(alive) }
    }

    /// Opens a stream to a port of the host.
    ///
    /// # Errors
    /// `NotConnected` while there is no session, `ConnectionRefused` when nobody listens, `ConnectionReset` when
    /// the session ends meanwhile, `TimedOut` when the host does not answer in 10 s.
    pub async fn dial(&self, port: u32) -> io::Result<LinkStream> {
        let not_connected = || io::Error::new(io::ErrorKind::NotConnected, "the link has no session");
        let dials = self.dials.borrow().clone().ok_or_else(not_connected)?;
        let opened = async {
            let (request, answer) = oneshot::channel();
            dials.send(request).await.map_err(|_| not_connected())?;
            let mut stream = answer.await.map_err(|_| not_connected())??;
            stream.write_all(&port.to_le_bytes()).await?;
            if stream.read_u8().await? != ACCEPTED {
                let reason = format!("nobody listens on port {port} of the host");
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, reason));
            }
            Ok(stream)
        };
        match tokio::time::timeout(DIAL_DEADLINE, opened).await {
            Ok(result) => result,
            Err(_) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("port {port} was not answered in 10 s")))
            }
        }
    }

    /// How the link stands.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.clone()
    }
}

/// The task that owns the session.
struct Owner {
    opening_queue: mpsc::Receiver<Opening>,
    current: Option<Opening>,
    session: Option<Session>,
    /// A late HELLO of a session that is over must not begin it again half-way.
    last_ended: Option<Epoch>,
    status: watch::Sender<LinkStatus>,
    dials: watch::Sender<Dials>,
    ended: mpsc::Sender<Epoch>,
    ended_queue: mpsc::Receiver<Epoch>,
}

async fn next_packet(current: &mut Option<Opening>) -> Option<Packet> {
    match current {
        Some(opening) => opening.packets.recv().await,
        None => std::future::pending().await,
    }
}

impl Owner {
    async fn run(mut self, mut gone: oneshot::Receiver<()>) {
        loop {
            tokio::select! {
                _ = &mut gone => break,
                opening = self.opening_queue.recv() => {
                    let Some(opening) = opening else { break };
                    self.close_current();
                    self.current = Some(opening);
                    self.status.send_replace(LinkStatus::Connected);
                }
                packet = next_packet(&mut self.current) => match packet {
                    Some(packet) => self.take(packet),
                    None => self.close_current(),
                },
                Some(epoch) = self.ended_queue.recv() => {
                    if self.session.as_ref().is_some_and(|session| session.epoch() == epoch) {
                        self.abandon(epoch);
                    }
                }
            }
        }
        self.close_current();
    }

    fn close_current(&mut self) {
        self.end_session();
        if let Some(opening) = self.current.take() {
            opening.outbox.close();
        }
        self.status.send_replace(LinkStatus::Down);
    }

    fn end_session(&mut self) {
        self.dials.send_replace(None);
        if let Some(session) = self.session.take() {
            self.last_ended = Some(session.epoch());
        }
        if let Some(opening) = &self.current {
            opening.outbox.begin(None);
            self.status.send_replace(LinkStatus::Connected);
        }
    }

    /// Ends a broken session and asks the host for another.
    fn abandon(&mut self, epoch: Epoch) {
        self.end_session();
        if let Some(opening) = &self.current {
            opening.outbox.control(Packet::Bye(epoch));
        }
    }

    fn take(&mut self, packet: Packet) {
        let Some(opening) = &self.current else { return };
        let running = self.session.as_ref().map(Session::epoch);
        match packet {
            Packet::Hello(epoch) if running == Some(epoch) => {
                opening.outbox.control(Packet::HelloAck(epoch));
            }
            Packet::Hello(epoch) if self.last_ended == Some(epoch) => {
                opening.outbox.control(Packet::Bye(epoch));
            }
            Packet::Hello(epoch) => {
                let outbox = opening.outbox.clone();
                self.end_session();
                let session = Session::guest(epoch, &outbox, self.ended.clone());
                outbox.control(Packet::HelloAck(epoch));
                self.dials.send_replace(Some(session.dials()));
                self.session = Some(session);
                info!(%epoch, "the link is up");
                self.status.send_replace(LinkStatus::Up { epoch });
            }
            Packet::Data { epoch, seq, payload } if running == Some(epoch) => {
                let Some(session) = &mut self.session else { return };
                if let Err(broken) = session.data(seq, payload) {
                    warn!(%epoch, ?broken, "the link's session is broken; asking for another");
                    self.abandon(epoch);
                }
            }
            Packet::Bye(epoch) if running == Some(epoch) => {
                info!(%epoch, "the host has ended the link's session");
                self.end_session();
            }
            Packet::Data { .. } | Packet::Bye(_) | Packet::HelloAck(_) => {
                debug!("dropped a packet of another session");
            }
        }
    }
}
