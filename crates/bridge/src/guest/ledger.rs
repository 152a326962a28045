//! Which requests a host has made, and what waits to be sent to it.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use tracing::debug;

/// Finished answers that are kept for a repeated request.
const KEPT: usize = 256;
/// Requests under way at a time.
const RUNNING: usize = 4096;
/// Frames that wait to be sent; with more of them a host is not listened to until it takes some.
const WAITING: usize = 1024;
/// Notifications among them; of more the newest are kept. As many wait on a host.
const NOTIFICATIONS: usize = 256;

/// Counts the hosts that have negotiated; requests belong to one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct HostGeneration(u64);

#[derive(Debug)]
enum Seen {
    Running,
    Done(Bytes),
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    connection: u64,
    host: HostGeneration,
    instance: Option<String>,
    requests: HashMap<u64, Seen>,
    done: VecDeque<u64>,
    running: usize,
    outgoing: VecDeque<Outgoing>,
}

#[derive(Debug)]
enum Outgoing {
    Notification(Bytes),
    Answer(Bytes),
}

impl Outgoing {
    fn bytes(&self) -> &Bytes {
        match self {
            Outgoing::Notification(bytes) | Outgoing::Answer(bytes) => bytes,
        }
    }
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    New,
    /// Its answer has been queued again.
    Repeated,
    Running,
    TooMany,
}

/// What a connection's writer does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Write(Bytes),
    Idle,
    Superseded,
}

impl Ledger {
    /// A connection has negotiated. A host without an instance cannot be told from the one before it.
    pub(super) fn begin(&mut self, instance: Option<&str>) -> (u64, HostGeneration) {
        self.connection += 1;
        if instance != self.instance.as_deref() {
            self.instance = instance.map(str::to_owned);
            self.host.0 += 1;
            self.requests.clear();
            self.done.clear();
            // The waits of a host that is gone go on until their processes end; they are not this one's.
            self.running = 0;
            self.outgoing.retain(|outgoing| matches!(outgoing, Outgoing::Notification(_)));
        }
        (self.connection, self.host)
    }

    pub(super) fn admit(&mut self, id: u64) -> Admission {
        // Without an instance ids say nothing: such a host repeats none, but a new one may reuse them.
        if self.instance.is_some() {
            match self.requests.get(&id) {
                Some(Seen::Done(answer)) => {
                    let answer = answer.clone();
                    if !self.outgoing.iter().any(|outgoing| *outgoing.bytes() == answer) {
                        self.outgoing.push_back(Outgoing::Answer(answer));
                    }
                    return Admission::Repeated;
                }
                Some(Seen::Running) => return Admission::Running,
                None => {}
            }
        }
        self.running += 1;
        if self.running > RUNNING {
            return Admission::TooMany;
        }
        self.requests.insert(id, Seen::Running);
        Admission::New
    }

    pub(super) fn finish(&mut self, host: HostGeneration, id: u64, answer: Bytes) {
        if host != self.host {
            debug!(id, "an answer to a host that is gone is dropped");
            return;
        }
        self.running = self.running.saturating_sub(1);
        if self
            .requests
            .insert(id, Seen::Done(answer.clone()))
            .is_none_or(|seen| matches!(seen, Seen::Running))
        {
            self.done.push_back(id);
        }
        while self.done.len() > KEPT {
            if let Some(oldest) = self.done.pop_front() {
                self.requests.remove(&oldest);
            }
        }
        self.outgoing.push_back(Outgoing::Answer(answer));
    }

    /// Whether the host may ask for more.
    pub(super) fn has_room(&self) -> bool {
        self.outgoing.len() < WAITING
    }

    pub(super) fn queue(&mut self, notification: Bytes) {
        let is = |outgoing: &Outgoing| matches!(outgoing, Outgoing::Notification(_));
        if self.outgoing.iter().filter(|outgoing| is(outgoing)).count() >= NOTIFICATIONS {
            // The first may be on its way, and is counted as written when it has gone.
            if let Some(oldest) = self.outgoing.iter().skip(1).position(is) {
                debug!("no host takes notifications; the oldest is dropped");
                self.outgoing.remove(oldest + 1);
            }
        }
        self.outgoing.push_back(Outgoing::Notification(notification));
    }

    pub(super) fn next(&self, connection: u64) -> Next {
        if connection != self.connection {
            return Next::Superseded;
        }
        self.outgoing.front().map_or(Next::Idle, |outgoing| Next::Write(outgoing.bytes().clone()))
    }

    /// The connection has written what [`Ledger::next`] gave it.
    pub(super) fn written(&mut self, connection: u64) {
        if connection == self.connection {
            self.outgoing.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn a_repeated_id_is_answered_from_the_table_and_ignored_while_it_runs() {
        let mut ledger = Ledger::default();
        let (connection, host) = ledger.begin(Some("a"));
        assert_eq!(ledger.admit(1), Admission::New);
        assert_eq!(ledger.admit(1), Admission::Running);
        ledger.finish(host, 1, answer("one"));
        assert_eq!(ledger.next(connection), Next::Write(answer("one")));
        ledger.written(connection);
        assert_eq!(ledger.next(connection), Next::Idle);
        let (second, _) = ledger.begin(Some("a"));
        assert_eq!(ledger.admit(1), Admission::Repeated);
        assert_eq!(ledger.next(connection), Next::Superseded);
        assert_eq!(ledger.next(second), Next::Write(answer("one")));
    }

    #[test]
    fn a_new_host_starts_with_a_clean_table_and_gets_no_answers_of_the_old_one() {
        let mut ledger = Ledger::default();
        let (_, old) = ledger.begin(Some("a"));
        ledger.admit(1);
        ledger.admit(2);
        ledger.finish(old, 1, answer("one"));
        ledger.queue(answer("exit"));
        let (connection, _) = ledger.begin(Some("b"));
        assert_eq!(ledger.next(connection), Next::Write(answer("exit")));
        ledger.written(connection);
        ledger.finish(old, 2, answer("two"));
        assert_eq!(ledger.next(connection), Next::Idle);
        assert_eq!(ledger.admit(1), Admission::New);
    }

    #[test]
    fn what_runs_for_hosts_that_are_gone_counts_no_more() {
        let mut ledger = Ledger::default();
        let (_, old) = ledger.begin(Some("a"));
        for id in 0..RUNNING as u64 {
            assert_eq!(ledger.admit(id), Admission::New);
        }
        assert_eq!(ledger.admit(RUNNING as u64), Admission::TooMany);
        ledger.begin(Some("b"));
        for id in 0..RUNNING as u64 {
            assert_eq!(ledger.admit(id), Admission::New);
        }
        ledger.finish(old, 1, answer("late"));
        assert_eq!(ledger.admit(RUNNING as u64), Admission::TooMany);
    }

    #[test]
    fn of_notifications_that_nobody_takes_the_newest_are_kept() {
        let mut ledger = Ledger::default();
        let (connection, host) = ledger.begin(Some("a"));
        ledger.queue(answer("on its way"));
        assert_eq!(ledger.next(connection), Next::Write(answer("on its way")));
        ledger.admit(1);
        ledger.finish(host, 1, answer("one"));
        for number in 0..1000_u32 {
            ledger.queue(Bytes::from(number.to_le_bytes().to_vec()));
        }
        ledger.written(connection);
        assert_eq!(ledger.next(connection), Next::Write(answer("one")), "answers are not dropped");
        ledger.written(connection);
        let first = 1000 - u32::try_from(NOTIFICATIONS).unwrap() + 1;
        assert_eq!(ledger.next(connection), Next::Write(Bytes::from(first.to_le_bytes().to_vec())));
        assert_eq!(ledger.outgoing.len(), NOTIFICATIONS - 1);
    }

    #[test]
    fn the_table_keeps_the_last_answers_only() {
        let mut ledger = Ledger::default();
        let (_, host) = ledger.begin(Some("a"));
        for id in 0..1000 {
            assert_eq!(ledger.admit(id), Admission::New);
            ledger.finish(host, id, answer("x"));
        }
        assert_eq!(ledger.requests.len(), KEPT);
        assert_eq!(ledger.admit(999), Admission::Repeated);
        assert_eq!(ledger.admit(0), Admission::New);
    }
}
