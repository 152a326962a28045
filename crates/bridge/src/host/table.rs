//! The requests that await an answer, and the answers that await a request.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::frame::{Frame, MessageType};

/// Answers kept for ids that nobody waits for yet.
const PARKED: usize = 256;
/// How long they are kept.
const GRACE: Duration = Duration::from_secs(120);

#[derive(Debug)]
struct Outstanding {
    asked: MessageType,
    /// None for an adopted wait: another host has asked.
    frame: Option<Bytes>,
    written: bool,
    answer: oneshot::Sender<Bytes>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    outstanding: BTreeMap<u64, Outstanding>,
    to_write: VecDeque<u64>,
    parked: VecDeque<(Instant, Frame)>,
}

impl Table {
    pub(super) fn register(
        &mut self,
        id: u64,
        asked: MessageType,
        frame: Option<Bytes>,
    ) -> oneshot::Receiver<Bytes> {
        let (answer, receiver) = oneshot::channel();
        self.parked.retain(|(since, _)| since.elapsed() < GRACE);
        let early =
            self.parked.iter().position(|(_, frame)| frame.id == id && frame.message == asked.response());
        if let Some((_, frame)) = early.and_then(|at| self.parked.remove(at)) {
            let _ = answer.send(frame.body);
            return receiver;
        }
        if frame.is_some() {
            self.to_write.push_back(id);
        }
        self.outstanding.insert(id, Outstanding { asked, frame, written: false, answer });
        receiver
    }

    pub(super) fn forget(&mut self, id: u64) {
        self.outstanding.remove(&id);
    }

    pub(super) fn clear(&mut self) {
        self.outstanding.clear();
        self.to_write.clear();
        self.parked.clear();
    }

    /// A new connection: queues what is outstanding, in the order of the ids. What the old connection has written
    /// only when `repeat_written`, that is when the guest runs no id twice.
    pub(super) fn send_again(&mut self, repeat_written: bool) {
        let again = |request: &Outstanding| request.frame.is_some() && (repeat_written || !request.written);
        self.to_write = self.outstanding.iter().filter(|(_, r)| again(r)).map(|(id, _)| *id).collect();
    }

    pub(super) fn next_to_write(&mut self) -> Option<(u64, Bytes)> {
        while let Some(id) = self.to_write.pop_front() {
            let frame = self.outstanding.get(&id).and_then(|request| request.frame.clone());
            if let Some(frame) = frame {
                return Some((id, frame));
            }
        }
        None
    }

    pub(super) fn written(&mut self, id: u64) {
        if let Some(request) = self.outstanding.get_mut(&id) {
            request.written = true;
        }
    }

    /// Takes an answer. False: it answers something else than was asked under its id.
    pub(super) fn answer(&mut self, frame: Frame) -> bool {
        let Some(request) = self.outstanding.get(&frame.id) else {
            debug!(id = frame.id, "an answer that nobody waits for is kept for a while");
            self.parked.retain(|(since, _)| since.elapsed() < GRACE);
            if self.parked.len() == PARKED {
                self.parked.pop_front();
            }
            self.parked.push_back((Instant::now(), frame));
            return true;
        };
        if request.asked.response() != frame.message {
            warn!(
                id = frame.id,
                message = frame.message.0,
                "the guest's answer is of another type than the request"
            );
            return false;
        }
        if let Some(request) = self.outstanding.remove(&frame.id) {
            let _ = request.answer.send(frame.body);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: u64) -> Frame {
        Frame { message: MessageType(0x2010_0601), id, body: Bytes::from(format!("{id}")) }
    }

    const WAIT: MessageType = MessageType(0x1010_0601);

    #[test]
    fn early_answers_are_bounded_and_the_newest_are_kept() {
        let mut table = Table::default();
        for id in 0..1000 {
            assert!(table.answer(answer(id)));
        }
        assert_eq!(table.parked.len(), PARKED);
        assert!(table.register(1, WAIT, None).try_recv().is_err());
        assert_eq!(table.register(999, WAIT, None).try_recv().unwrap().as_ref(), b"999");
    }

    #[test]
    fn an_answer_of_another_type_is_refused() {
        let mut table = Table::default();
        let mut receiver = table.register(5, MessageType(0x1010_0101), Some(Bytes::new()));
        assert!(!table.answer(answer(5)));
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn what_was_written_is_repeated_only_to_guests_that_run_no_id_twice() {
        let mut table = Table::default();
        let _one = table.register(1, WAIT, Some(Bytes::from_static(b"1")));
        let _two = table.register(2, WAIT, Some(Bytes::from_static(b"2")));
        let _adopted = table.register(3, WAIT, None);
        assert_eq!(table.next_to_write().unwrap().0, 1);
        table.written(1);
        table.send_again(false);
        assert_eq!(table.next_to_write().unwrap().0, 2);
        assert!(table.next_to_write().is_none());
        table.send_again(true);
        assert_eq!(table.next_to_write().unwrap().0, 1);
        assert_eq!(table.next_to_write().unwrap().0, 2);
        assert!(table.next_to_write().is_none());
    }
}
