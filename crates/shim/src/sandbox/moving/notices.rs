//! The session's notices to its subscribers.
//!
//! A session numbers its notices from 1 and keeps the last [`BACKLOG`] of them. Every subscriber reads from there at its
//! own pace, so that a slow one costs nothing and holds nobody up; one that asks for, or falls behind to, what is not
//! kept any more gets a gap marker in its place (`missed` = how many, with the id of the last one missed) and goes on
//! with the oldest one kept. At the session's end a subscriber gets what is left for it, and then the end.
//!
//! `start_time` of every notice is when its session began, `update_time` when it happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use dunlin_wire::service;
use protobuf::MessageField;
use tokio::sync::Notify;

use crate::service::status::timestamp;

/// Notices that a session keeps. The handoff, at most 3 MiB, is in one of them; the others are small.
pub(crate) const BACKLOG: usize = 1024;

/// The notices of this shim's present session.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    present: Mutex<Option<Arc<Room>>>,
}

/// One session's.
#[derive(Debug)]
struct Room {
    began: SystemTime,
    kept: Mutex<Kept>,
    news: Notify,
}

#[derive(Debug)]
struct Kept {
    /// Of the oldest in `notices`, or of the first to come.
    oldest: u32,
    notices: VecDeque<Arc<service::NotificationsResponse>>,
    ended: bool,
}

/// One subscriber.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// None: the session was over before it began to listen.
    room: Option<Arc<Room>>,
    /// The id that it wants next.
    next: u32,
}

enum Look {
    Notice(Arc<service::NotificationsResponse>),
    Nothing,
    Ended,
}

impl Hub {
    /// A session begins: its notices are numbered from 1. Subscribers of one before it get their end.
    pub(crate) fn begin(&self) {
        self.replace(Some(Arc::new(Room::new(SystemTime::now()))));
    }

    /// The session is forgotten.
    pub(crate) fn end(&self) {
        self.replace(None);
    }

    fn replace(&self, room: Option<Arc<Room>>) {
        let before = std::mem::replace(&mut *self.present(), room);
        if let Some(before) = before {
            before.kept().ended = true;
            before.news.notify_waiters();
        }
    }

    /// Keeps a notice for every subscriber, present and to come. Without a session nobody may listen.
    pub(crate) fn publish(&self, notification: service::Notification) {
        let room = self.present().clone();
        if let Some(room) = room {
            room.publish(notification);
        }
    }

    /// Everything after the id `after`; without it the latest notice, if there is one, and what follows. An id that was
    /// not given yet is waited for.
    pub(crate) fn subscribe(&self, after: Option<u32>) -> Subscription {
        let room = self.present().clone();
        let next = match (after, &room) {
            (Some(after), _) => after.saturating_add(1),
            (None, Some(room)) => room.kept().latest(),
            (None, None) => 1,
        };
        Subscription { room, next }
    }

    fn present(&self) -> MutexGuard<'_, Option<Arc<Room>>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    fn new(began: SystemTime) -> Room {
        let kept = Kept { oldest: 1, notices: VecDeque::new(), ended: false };
        Room { began, kept: Mutex::new(kept), news: Notify::new() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, notification: service::Notification) {
        let mut kept = self.kept();
        if kept.notices.len() == BACKLOG {
            kept.notices.pop_front();
            kept.oldest += 1;
        }
        let message = self.message(kept.following(), notification);
        kept.notices.push_back(Arc::new(message));
        drop(kept);
        self.news.notify_waiters();
    }

    fn message(&self, id: u32, notification: service::Notification) -> service::NotificationsResponse {
        service::NotificationsResponse {
            message_id: id,
            notification: MessageField::some(notification),
            start_time: MessageField::some(timestamp(self.began)),
            update_time: MessageField::some(timestamp(SystemTime::now())),
            ..service::NotificationsResponse::default()
        }
    }

    /// What there is for a subscriber that wants `next`.
    fn look(&self, next: &mut u32) -> Look {
        let kept = self.kept();
        if *next < kept.oldest {
            let marker = service::Notification {
                origin: kept.notices.front().map(|notice| notice.notification.origin).unwrap_or_default(),
                missed: kept.oldest - *next,
                ..service::Notification::default()
            };
            let marker = self.message(kept.oldest - 1, marker);
            *next = kept.oldest;
            return Look::Notice(Arc::new(marker));
        }
        let at = usize::try_from(*next - kept.oldest).unwrap_or(usize::MAX);
        match kept.notices.get(at) {
            Some(notice) => {
                *next = next.saturating_add(1);
                Look::Notice(Arc::clone(notice))
            }
            None if kept.ended => Look::Ended,
            None => Look::Nothing,
        }
    }
}

impl Kept {
    /// The id of the next one that is published.
    fn following(&self) -> u32 {
        self.oldest.saturating_add(u32::try_from(self.notices.len()).unwrap_or(u32::MAX))
    }

    /// The id of the last one, or of the first to come.
    fn latest(&self) -> u32 {
        (self.following() - 1).max(1)
    }
}

impl Subscription {
    /// The next notice; None when the session was cleaned up.
    pub(crate) async fn next(&mut self) -> Option<Arc<service::NotificationsResponse>> {
        let room = self.room.as_ref()?;
        loop {
            // Listens before it looks: what is published in between wakes it.
            let news = room.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            match room.look(&mut self.next) {
                Look::Notice(notice) => return Some(notice),
                Look::Ended => return None,
                Look::Nothing => news.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn hub() -> Hub {
        let hub = Hub::default();
        hub.begin();
        hub
    }

    fn publish(hub: &Hub, count: usize) {
        for _ in 0..count {
            hub.publish(service::Notification {
                origin: service::Origin::ORIGIN_SOURCE.into(),
                phase: service::Phase::PHASE_TRANSFER_IN_PROGRESS.into(),
                ..service::Notification::default()
            });
        }
    }

    /// Id and how many it says were missed.
    async fn read(subscription: &mut Subscription) -> Option<(u32, u32)> {
        let soon = Duration::from_secs(5);
        let notice = tokio::time::timeout(soon, subscription.next()).await.expect("a notice or the end")?;
        let missed = notice.notification.missed;
        assert_eq!(missed > 0, notice.notification.phase.value() == 0, "only a marker has no phase");
        assert_eq!(notice.notification.origin.value(), 1, "a marker too says whose it is");
        Some((notice.message_id, missed))
    }

    async fn is_quiet(subscription: &mut Subscription) -> bool {
        tokio::time::timeout(Duration::from_millis(20), subscription.next()).await.is_err()
    }

    #[tokio::test]
    async fn a_newcomer_gets_the_latest_and_then_what_follows_until_the_end() {
        let hub = hub();
        let mut early = hub.subscribe(None);
        publish(&hub, 2);
        let mut late = hub.subscribe(None);
        publish(&hub, 1);
        assert_eq!(read(&mut early).await, Some((1, 0)));
        assert_eq!(read(&mut late).await, Some((2, 0)));
        assert_eq!(read(&mut late).await, Some((3, 0)));
        hub.end();
        assert_eq!(read(&mut late).await, None);
        // Not read yet is not lost by the end.
        assert_eq!(read(&mut early).await, Some((2, 0)));
        assert_eq!(read(&mut early).await, Some((3, 0)));
        assert_eq!(read(&mut early).await, None);
        hub.begin();
        publish(&hub, 1);
        assert_eq!(read(&mut hub.subscribe(None)).await, Some((1, 0)));
    }

    #[tokio::test]
    async fn what_follows_an_id_is_replayed() {
        let hub = hub();
        publish(&hub, 5);
        let mut all = hub.subscribe(Some(0));
        for id in 1..=5 {
            assert_eq!(read(&mut all).await, Some((id, 0)));
        }
        let mut some = hub.subscribe(Some(3));
        assert_eq!(read(&mut some).await, Some((4, 0)));
        let mut last = hub.subscribe(Some(5));
        assert!(is_quiet(&mut last).await, "there is nothing after the last one");
        let mut future = hub.subscribe(Some(6));
        publish(&hub, 2);
        assert_eq!(read(&mut last).await, Some((6, 0)));
        assert_eq!(read(&mut future).await, Some((7, 0)));
        assert!(is_quiet(&mut hub.subscribe(Some(u32::MAX))).await);
    }

    #[tokio::test]
    async fn a_slow_reader_finds_a_gap_and_holds_nobody_up() {
        let hub = hub();
        let mut slow = hub.subscribe(Some(0));
        let mut quick = hub.subscribe(Some(0));
        publish(&hub, BACKLOG);
        for id in 1..=u32::try_from(BACKLOG).unwrap() {
            assert_eq!(read(&mut quick).await, Some((id, 0)));
        }
        publish(&hub, 10);
        assert_eq!(read(&mut quick).await, Some((1025, 0)), "it is not behind");
        assert_eq!(read(&mut slow).await, Some((10, 10)), "ten are gone, the tenth was the last of them");
        assert_eq!(read(&mut slow).await, Some((11, 0)));
        // And once more, further on.
        publish(&hub, BACKLOG);
        assert_eq!(read(&mut slow).await, Some((1034, 1023)));
        assert_eq!(read(&mut slow).await, Some((1035, 0)));
        // Who asks for what is gone is told as much.
        let mut late = hub.subscribe(Some(1000));
        assert_eq!(read(&mut late).await, Some((1034, 34)));
        assert_eq!(read(&mut late).await, Some((1035, 0)));
        // The latest is always there, so the outcome of a transfer is never among the missed.
        assert_eq!(read(&mut hub.subscribe(None)).await, Some((2058, 0)));
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_whoever_listens() {
        let hub = hub();
        let _silent = hub.subscribe(Some(0));
        publish(&hub, 3 * BACKLOG);
        let room = hub.present().clone().unwrap();
        assert_eq!(room.kept().notices.len(), BACKLOG);
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken_by_a_notice_and_by_the_end() {
        let hub = Arc::new(hub());
        let mut reader = hub.subscribe(None);
        let told = tokio::spawn(async move { (read(&mut reader).await, read(&mut reader).await) });
        tokio::task::yield_now().await;
        publish(&hub, 1);
        tokio::task::yield_now().await;
        hub.end();
        assert_eq!(told.await.unwrap(), (Some((1, 0)), None));
    }

    #[tokio::test]
    async fn without_a_session_there_is_nothing_to_hear() {
        let hub = Hub::default();
        publish(&hub, 1);
        assert_eq!(read(&mut hub.subscribe(None)).await, None);
        assert_eq!(read(&mut hub.subscribe(Some(0))).await, None);
    }

    #[tokio::test]
    async fn times_are_the_session_s_begin_and_the_notice_s_own() {
        let hub = hub();
        tokio::time::sleep(Duration::from_millis(5)).await;
        publish(&hub, 1);
        tokio::time::sleep(Duration::from_millis(5)).await;
        publish(&hub, 1);
        let mut all = hub.subscribe(Some(0));
        let (one, two) = (all.next().await.unwrap(), all.next().await.unwrap());
        let at = |time: &MessageField<protobuf::well_known_types::timestamp::Timestamp>| {
            (time.seconds, time.nanos)
        };
        assert_eq!(at(&one.start_time), at(&two.start_time));
        assert!(at(&one.start_time) < at(&one.update_time) && at(&one.update_time) < at(&two.update_time));
    }
}
