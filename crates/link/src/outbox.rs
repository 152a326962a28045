//! What waits to be written to the channel: control packets first, then the current session's data.
//!
//! Bounded: at most one control packet of each kind, and data up to a soft cap at which the session's writer
//! waits. A new session throws away the data of the old one, so nothing stale delays it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::Epoch;
use crate::packet::Packet;

/// Data bytes at which a session's writer waits.
const DATA_CAP: usize = 256 * 1024;

#[derive(Debug, Default)]
struct Queue {
    control: VecDeque<Packet>,
    data: VecDeque<Bytes>,
    data_len: usize,
    session: Option<Epoch>,
    next_seq: u32,
    writer: Option<Waker>,
    closed: bool,
}

/// The queue. Clones are handles.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    blocking: Condvar,
    waiting: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_taker(&self) {
        self.0.blocking.notify_one();
        self.0.waiting.notify_one();
    }

    /// From now on only data of this session is taken; what was queued of others is gone.
    pub(crate) fn begin(&self, epoch: Option<Epoch>) {
        let waker = {
            let mut queue = self.lock();
            queue.session = epoch;
            queue.next_seq = 0;
            queue.data.clear();
            queue.data_len = 0;
            queue.writer.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Queues a control packet in place of a waiting one of its kind.
    pub(crate) fn control(&self, packet: Packet) {
        {
            let mut queue = self.lock();
            let kind = std::mem::discriminant(&packet);
            queue.control.retain(|waiting| std::mem::discriminant(waiting) != kind);
            queue.control.push_back(packet);
        }
        self.wake_taker();
    }

    /// Queues data of a session, or registers to be woken when there is room. Ready(false): not its time any more.
    pub(crate) fn poll_data(
        &self,
        context: &mut Context<'_>,
        epoch: Epoch,
        payload: &mut Vec<u8>,
    ) -> Poll<bool> {
        {
            let mut queue = self.lock();
            if queue.closed || queue.session != Some(epoch) {
                return Poll::Ready(false);
            }
            if queue.data_len >= DATA_CAP {
                queue.writer = Some(context.waker().clone());
                return Poll::Pending;
            }
            let seq = queue.next_seq;
            queue.next_seq = seq.wrapping_add(1);
            let bytes = Packet::Data { epoch, seq, payload: Bytes::from(std::mem::take(payload)) }.encode();
            queue.data_len += bytes.len();
            queue.data.push_back(bytes);
        }
        self.wake_taker();
        Poll::Ready(true)
    }

    /// No more is taken; who waits is woken.
    pub(crate) fn close(&self) {
        let waker = {
            let mut queue = self.lock();
            queue.closed = true;
            queue.writer.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        self.0.blocking.notify_all();
        self.0.waiting.notify_one();
    }

    fn pop(queue: &mut Queue) -> Option<(Bytes, Option<Waker>)> {
        if let Some(packet) = queue.control.pop_front() {
            return Some((packet.encode(), None));
        }
        let bytes = queue.data.pop_front()?;
        queue.data_len -= bytes.len();
        let waker = if queue.data_len < DATA_CAP { queue.writer.take() } else { None };
        Some((bytes, waker))
    }

    /// The next bytes to write. None: closed, and all that was queued has been taken.
    pub(crate) async fn take(&self) -> Option<Bytes> {
        loop {
            let closed = {
                let mut queue = self.lock();
                if let Some((bytes, waker)) = Outbox::pop(&mut queue) {
                    drop(queue);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                    return Some(bytes);
                }
                queue.closed
            };
            if closed {
                return None;
            }
            self.0.waiting.notified().await;
        }
    }

    /// As [`Outbox::take`], for a thread.
    pub(crate) fn take_blocking(&self) -> Option<Bytes> {
        let mut queue = self.lock();
        loop {
            if let Some((bytes, waker)) = Outbox::pop(&mut queue) {
                drop(queue);
                if let Some(waker) = waker {
                    waker.wake();
                }
                return Some(bytes);
            }
            if queue.closed {
                return None;
            }
            queue = self.0.blocking.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::task::noop_waker;

    #[test]
    fn control_goes_first_and_a_new_session_drops_the_old_ones_data() {
        let outbox = Outbox::default();
        let waker = noop_waker();
        let mut context = Context::from_waker(&waker);
        outbox.begin(Some(Epoch(1)));
        assert_eq!(outbox.poll_data(&mut context, Epoch(1), &mut vec![1]), Poll::Ready(true));
        outbox.control(Packet::HelloAck(Epoch(1)));
        outbox.control(Packet::HelloAck(Epoch(2)));
        assert_eq!(outbox.take_blocking(), Some(Packet::HelloAck(Epoch(2)).encode()));
        outbox.begin(Some(Epoch(2)));
        assert_eq!(outbox.poll_data(&mut context, Epoch(1), &mut vec![1]), Poll::Ready(false));
        assert_eq!(outbox.poll_data(&mut context, Epoch(2), &mut vec![9]), Poll::Ready(true));
        outbox.close();
        let data = Packet::Data { epoch: Epoch(2), seq: 0, payload: Bytes::from_static(&[9]) };
        assert_eq!(outbox.take_blocking(), Some(data.encode()));
        assert_eq!(outbox.take_blocking(), None);
    }

    #[test]
    fn data_is_bounded() {
        let outbox = Outbox::default();
        let waker = noop_waker();
        let mut context = Context::from_waker(&waker);
        outbox.begin(Some(Epoch(1)));
        let mut taken = 0;
        while outbox.poll_data(&mut context, Epoch(1), &mut vec![1; 32 * 1024]).is_ready() {
            taken += 1;
            assert!(taken < 100, "never full");
        }
        assert!(taken >= 8);
    }
}
