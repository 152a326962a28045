//! Streams that are held at any moment and go on elsewhere, over connections that break at any byte.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::tests::{End, network, pattern, paused};
use super::*;

/// Numbers that only depend on the seed.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % bound.max(1)
    }
}

/// A FIFO's writing end that takes as little as it likes, when it likes; what it took can be seen.
#[derive(Clone)]
struct Sink {
    taken: Arc<Mutex<Vec<u8>>>,
    count: watch::Sender<usize>,
    shut: Arc<Mutex<usize>>,
    random: Random,
}

impl Sink {
    fn new(seed: u64) -> Sink {
        Sink {
            taken: Arc::default(),
            count: watch::Sender::new(0),
            shut: Arc::default(),
            random: Random(seed),
        }
    }

    fn taken(&self) -> usize {
        self.taken.lock().unwrap().len()
    }
}

impl AsyncWrite for Sink {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.random.below(4) == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let n = 1 + self.random.below(bytes.len().min(900));
        self.taken.lock().unwrap().extend_from_slice(&bytes[..n]);
        self.count.send_modify(|count| *count += n);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        *self.shut.lock().unwrap() += 1;
        Poll::Ready(Ok(()))
    }
}

/// A FIFO's reading end with the whole pattern in it; how far it was read can be seen.
#[derive(Clone)]
struct Source {
    len: usize,
    read: watch::Sender<usize>,
    random: Random,
}

impl Source {
    fn new(len: usize, seed: u64) -> Source {
        Source { len, read: watch::Sender::new(0), random: Random(seed) }
    }

    fn read(&self) -> usize {
        *self.read.borrow()
    }
}

impl AsyncRead for Source {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.random.below(4) == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let at = self.read();
        let most = into.remaining().min(self.len - at);
        let n = if most == 0 { 0 } else { 1 + self.random.below(most.min(1500)) };
        into.put_slice(&pattern(at as u64, n));
        self.read.send_modify(|read| *read += n);
        Poll::Ready(Ok(()))
    }
}

/// A stay of a stream on one host.
#[derive(Debug, Clone)]
struct Stay {
    breaks: Vec<usize>,
    /// Bytes after which it is held, each time counted from the last; all but the last hold are rolled back.
    holds: Vec<usize>,
    held_for: Duration,
}

fn stays() -> impl Strategy<Value = VecDeque<Stay>> {
    let stay = (
        proptest::collection::vec(1usize..9000, 0..10),
        proptest::collection::vec(0usize..20_000, 1..4),
        0u64..300,
    );
    let stay =
        stay.prop_map(|(breaks, holds, held)| Stay { breaks, holds, held_for: Duration::from_millis(held) });
    proptest::collection::vec(stay, 1..5).prop_map(VecDeque::from)
}

/// Brings a host's network to the guest, whose dials all end up here.
fn arrive(guest: &mpsc::Sender<End>, breaks: Vec<usize>) -> (JoinHandle<()>, mpsc::Receiver<End>) {
    let (mut guests, hosts) = network(breaks);
    let guest = guest.clone();
    let feed = tokio::spawn(async move {
        while let Some(end) = guests.recv().await {
            if guest.send(end).await.is_err() {
                return;
            }
        }
    });
    (feed, hosts)
}

/// Waits for so many more; false when the other task ended before.
async fn more(count: &watch::Sender<usize>, bytes: usize, task: &JoinHandle<()>) -> bool {
    let goal = *count.borrow() + bytes;
    let mut count = count.subscribe();
    tokio::select! {
        biased;
        _ = count.wait_for(|count| *count >= goal) => true,
        () = async { while !task.is_finished() { tokio::time::sleep(Duration::from_millis(5)).await } } => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn output_that_moves_is_the_same_bytes(len in 0usize..120_000, stays in stays(), seed in any::<u64>()) {
        paused(async move {
            let (dialled, guest) = mpsc::channel(1);
            let mut sending = tokio::spawn(async move {
                let source = Source::new(len, seed);
                send(&Sender::default(), source, guest, std::future::pending()).await
            });
            let sink = Sink::new(!seed);
            let mut total = 0;
            let last = Stay { breaks: vec![1, 2, 3], holds: Vec::new(), held_for: Duration::ZERO };
            for stay in stays.into_iter().chain([last]) {
                let (feed, host) = arrive(&dialled, stay.breaks);
                let resume = Resume::at(total);
                let (taking, into) = (resume.clone(), sink.clone());
                let task = tokio::spawn(async move { receive(host, into, &taking).await.unwrap().linger().await });
                let last = stay.holds.is_empty();
                for bytes in stay.holds {
                    resume.release();
                    more(&sink.count, bytes, &task).await;
                    total = resume.hold().unwrap();
                    let shut = *sink.shut.lock().unwrap();
                    assert_eq!(total, sink.taken() as u64, "what hold returns is what the sink took");
                    tokio::time::sleep(stay.held_for).await;
                    assert_eq!(total, sink.taken() as u64, "a held receiver hands on nothing");
                    assert_eq!(shut, *sink.shut.lock().unwrap(), "not even the end");
                    assert_eq!(resume.total(), Some(total));
                }
                if last {
                    // It may be content since an earlier host, and then never dials again.
                    assert_eq!((&mut sending).await.unwrap(), Drained::Complete { total: len as u64 });
                }
                task.abort();
                feed.abort();
            }
            assert!(*sink.taken.lock().unwrap() == pattern(0, len));
        });
    }

    #[test]
    fn input_that_moves_is_the_same_bytes(
        len in 0usize..120_000, stays in stays(), seed in any::<u64>(), limit in 1usize..5000
    ) {
        paused(async move {
            let (dialled, guest) = mpsc::channel(1);
            let sink = Sink::new(seed);
            let into = sink.clone();
            let receiving =
                tokio::spawn(async move { receive(guest, into, &Resume::at(0)).await.map(|ended| ended.total) });
            let source = Source::new(len, !seed);
            let mut position = Position::default();
            let last = Stay { breaks: vec![1, 2, 3], holds: Vec::new(), held_for: Duration::ZERO };
            for stay in stays.into_iter().chain([last]) {
                let (feed, host) = arrive(&dialled, stay.breaks);
                let sender = Sender::at(position.clone());
                let (sent, from) = (sender.clone(), source.clone());
                let ended = position.source_ended;
                let task = tokio::spawn(async move {
                    let never = std::future::pending();
                    if ended {
                        // Whatever stands in for an input that has ended elsewhere is not read.
                        send(&sent, b"not read".as_slice(), host, never).await;
                    } else {
                        send(&sent, from, host, never).await;
                    }
                });
                let moves = !stay.holds.is_empty();
                for bytes in stay.holds {
                    sender.release();
                    more(&source.read, bytes, &task).await;
                    sender.limit(limit);
                    position = sender.hold();
                    let read = position.acknowledged + position.pending.len() as u64;
                    assert_eq!(read, source.read() as u64, "what hold returns is what was read");
                    tokio::time::sleep(stay.held_for).await;
                    assert_eq!(read, source.read() as u64, "a held sender reads nothing");
                }
                if moves {
                    task.abort();
                } else {
                    // The guest does not linger: its host need not learn that all was taken.
                    assert_eq!(receiving.await.unwrap().unwrap(), len as u64);
                    task.abort();
                    feed.abort();
                    break;
                }
                feed.abort();
            }
            assert!(*sink.taken.lock().unwrap() == pattern(0, len));
            assert_eq!(*sink.shut.lock().unwrap(), 1);
        });
    }

    #[test]
    fn plain_output_of_an_init_comes_whole_once_a_connection_lasts(
        len in 0usize..plain::TAIL, breaks in proptest::collection::vec(1usize..9000, 0..30), seed in any::<u64>()
    ) {
        paused(async move {
            let (guest, host) = network(breaks);
            let sink = Sink::new(seed);
            let resume = Resume::at(0);
            let receiving = async {
                let ended = plain::receive_replayed(host, sink.clone(), &resume).await.unwrap();
                ended.linger().await;
                std::future::pending::<()>().await;
            };
            let sent = tokio::select! {
                sent = plain::send_replaying(Source::new(len, !seed), guest) => sent.unwrap(),
                () = receiving => unreachable!(),
            };
            assert_eq!(sent, len as u64);
            assert!(sink.taken.lock().unwrap().ends_with(&pattern(0, len)));
            assert_eq!(resume.total(), Some(sink.taken() as u64));
        });
    }
}

#[test]
fn plain_output_repeats_its_tail_and_no_more() {
    paused(async {
        let len = 3 * plain::TAIL;
        let (guest, host) = network(vec![2 * plain::TAIL + 777]);
        let sink = Sink::new(5);
        let resume = Resume::at(0);
        let receiving = async { plain::receive_replayed(host, sink.clone(), &resume).await.unwrap() };
        let (sent, _ended) = tokio::join!(plain::send_replaying(Source::new(len, 3), guest), receiving);
        assert_eq!(sent.unwrap(), len as u64);
        let taken = sink.taken.lock().unwrap();
        // All that crossed before the break, then the tail from where the writer had come to, then the rest.
        let first = 2 * plain::TAIL + 777;
        assert!(taken.starts_with(&pattern(0, first - 4096)), "at most what was on its way is missing");
        assert!(taken.ends_with(&pattern((first - plain::TAIL) as u64, len - first + plain::TAIL)));
        assert!(taken.len() <= len + plain::TAIL);
    });
}

#[test]
fn a_lowered_limit_holds_the_source_back_until_there_is_room() {
    paused(async {
        let (_never, nobody) = mpsc::channel::<End>(1);
        let sender = Sender::default();
        sender.limit(4096);
        let source = Source::new(1 << 20, 1);
        let (sent, from) = (sender.clone(), source.clone());
        let task = tokio::spawn(async move { send(&sent, from, nobody, std::future::pending()).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((source.read(), sender.position().pending.len()), (4096, 4096));
        sender.limit(5000);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(source.read(), 5000, "more room is used at once");
        sender.limit(10);
        sender.limit(4000);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let position = sender.hold();
        assert_eq!((position.pending.len(), source.read()), (5000, 5000), "what was read stays");
        sender.limit(RETAINED);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(source.read(), 5000, "held is held, room or not");
        sender.release();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(source.read(), RETAINED);
        task.abort();
    });
}

#[test]
fn a_held_receiver_with_a_stuck_sink_counts_what_the_sink_took() {
    paused(async {
        let (guest, host) = network(Vec::new());
        let (mut out, sink) = tokio::io::duplex(7);
        let resume = Resume::at(0);
        let taking = resume.clone();
        let receiving = tokio::spawn(async move { receive(host, sink, &taking).await.unwrap().total });
        let sender = Sender::default();
        let sending = sender.clone();
        tokio::spawn(async move {
            send(&sending, pattern(0, 20).as_slice(), guest, std::future::pending()).await
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(resume.hold(), Some(7), "the pipe is full");
        let mut bytes = [0u8; 7];
        tokio::io::AsyncReadExt::read_exact(&mut out, &mut bytes).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(resume.total(), Some(7), "there is room again, and it is held");
        assert_eq!(sender.position().acknowledged, 0, "nothing is acknowledged that was not handed on");
        resume.release();
        let mut rest = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut out, &mut rest).await.unwrap();
        assert_eq!([&bytes[..], &rest].concat(), pattern(0, 20));
        assert_eq!(receiving.await.unwrap(), 20);
    });
}

/// On several threads, so that a hold meets reads and writes that are under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn holds_are_exact_while_both_ends_are_at_work() {
    let (guest, host) = network(Vec::new());
    let (sink, source) = (Sink::new(7), Source::new(usize::MAX, 9));
    let (resume, sender) = (Resume::at(0), Sender::default());
    let (taking, into) = (resume.clone(), sink.clone());
    let receiving = tokio::spawn(async move { receive(host, into, &taking).await.map(|ended| ended.total) });
    let (sending, from) = (sender.clone(), source.clone());
    let sent = tokio::spawn(async move { send(&sending, from, guest, std::future::pending()).await });
    let holder = std::thread::spawn(move || {
        let end = std::time::Instant::now() + Duration::from_secs(60);
        for round in 0..200 {
            let total = resume.hold().unwrap();
            let position = sender.hold();
            let read = position.acknowledged + position.pending.len() as u64;
            let seen = || (sink.taken() as u64, source.read() as u64);
            assert_eq!(seen(), (total, read), "{round}");
            std::thread::sleep(Duration::from_micros(100));
            assert_eq!(seen(), (total, read), "{round}, some time later");
            resume.release();
            sender.release();
            while seen().0 == total || seen().1 == read {
                assert!(std::time::Instant::now() < end, "it does not go on after {round}");
                std::thread::yield_now();
            }
        }
        let _ = resume.hold();
        let taken = sink.taken.lock().unwrap();
        assert!(*taken == pattern(0, taken.len()));
    });
    tokio::task::spawn_blocking(|| holder.join()).await.unwrap().unwrap();
    receiving.abort();
    sent.abort();
}

#[test]
fn a_held_receiver_does_not_end_its_sink() {
    paused(async {
        let (guest, host) = network(Vec::new());
        let (sink, resume) = (Sink::new(1), Resume::at(0));
        let (taking, into) = (resume.clone(), sink.clone());
        let receiving = tokio::spawn(async move { receive(host, into, &taking).await.unwrap().total });
        let (mut process, source) = tokio::io::duplex(64);
        tokio::spawn(async move { send(&Sender::default(), source, guest, std::future::pending()).await });
        tokio::io::AsyncWriteExt::write_all(&mut process, b"all of it").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(resume.hold(), Some(9));
        drop(process);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(*sink.shut.lock().unwrap(), 0);
        resume.release();
        assert_eq!(receiving.await.unwrap(), 9);
        assert_eq!(*sink.shut.lock().unwrap(), 1);
    });
}
