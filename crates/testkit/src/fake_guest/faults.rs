//! What goes wrong between a guest's bridge and its host: the guest does what it is asked, and its answers come late,
//! spoilt or never.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use dunlin_bridge::frame::{Frame, FrameError, MAX_FROM_GUEST, MessageType};
use dunlin_bridge::message::Request;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

/// Answers on their way.
const QUEUED: usize = 64;

/// What becomes of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It stays away until [`Faults::clear`]; all of this kind.
    Held,
    /// Once: it bears an id that nobody has asked under.
    OtherId,
    /// Once: it says that it answers another kind of request.
    OtherKind,
    /// Once: its body is no JSON.
    NoJson,
    /// Once: its header announces more than any host takes.
    Oversized,
}

/// The faults of a guest. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    set: Mutex<HashMap<u32, Fault>>,
    met: watch::Sender<u64>,
    cleared: watch::Sender<u64>,
    plain: AtomicBool,
}

impl Faults {
    /// From now on answers to requests of this kind meet this fault.
    pub fn set(&self, request: Request, fault: Fault) {
        self.lock().insert(request.message_type().response().0, fault);
        self.0.met.send_replace(0);
    }

    /// The guest's agent says of itself that it has no extensions: no streams that resume, no answers that come again. For
    /// one that was not started yet.
    pub fn be_plain(&self) {
        self.0.plain.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_plain(&self) -> bool {
        self.0.plain.load(Ordering::Relaxed)
    }

    /// Waits until an answer has met a fault that was set last: the guest has done what it was asked.
    pub async fn met(&self) {
        let mut met = self.0.met.subscribe();
        // The sender is as old as this value.
        let _ = met.wait_for(|met| *met > 0).await;
    }

    /// No more faults; what was held is sent.
    pub fn clear(&self) {
        self.lock().clear();
        self.0.cleared.send_modify(|times| *times += 1);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Fault>> {
        self.0.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, message: MessageType) -> Option<Fault> {
        let mut set = self.lock();
        let fault = *set.get(&message.0)?;
        if fault != Fault::Held {
            set.remove(&message.0);
        }
        Some(fault)
    }

    /// Carries a guest's answers to the host.
    pub(super) async fn carry<R, W>(&self, mut from: R, mut to: W) -> Result<(), FrameError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (queue, mut queued) = mpsc::channel::<Bytes>(QUEUED);
        let reading = async {
            loop {
                let frame = Frame::read(&mut from, MAX_FROM_GUEST).await?;
                let fault = self.meet(frame.message);
                if fault == Some(Fault::Held) {
                    let (queue, mut cleared) = (queue.clone(), self.0.cleared.subscribe());
                    tokio::spawn(async move {
                        if cleared.changed().await.is_ok() {
                            let _ = queue.send(frame.encode()).await;
                        }
                    });
                } else {
                    let _ = queue.send(spoilt(frame, fault)).await;
                }
                if fault.is_some() {
                    self.0.met.send_modify(|met| *met += 1);
                }
            }
        };
        let writing = async {
            while let Some(bytes) = queued.recv().await {
                to.write_all(&bytes).await.map_err(FrameError::Read)?;
                to.flush().await.map_err(FrameError::Read)?;
            }
            Ok(())
        };
        tokio::select! {
            ended = reading => ended,
            ended = writing => ended,
        }
    }
}

fn spoilt(mut frame: Frame, fault: Option<Fault>) -> Bytes {
    match fault {
        None | Some(Fault::Held) => {}
        Some(Fault::OtherId) => frame.id = u64::MAX,
        Some(Fault::OtherKind) => frame.message = MessageType(frame.message.0 ^ 0xff00),
        Some(Fault::NoJson) => frame.body = Bytes::from_static(b"\x00 no JSON"),
        Some(Fault::Oversized) => {
            let mut bytes = frame.encode().to_vec();
            bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
            return bytes.into();
        }
    }
    frame.encode()
}
