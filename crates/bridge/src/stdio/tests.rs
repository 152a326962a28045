use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;

use super::*;

/// One end of a connection that breaks after so many bytes in all; a break is a reset, never an end of file.
pub(super) struct End {
    inner: DuplexStream,
    left: Arc<AtomicUsize>,
    shut: Arc<AtomicBool>,
    peer_shut: Arc<AtomicBool>,
}

fn connection(bytes: usize) -> (End, End) {
    let (a, b) = tokio::io::duplex(4096);
    let left = Arc::new(AtomicUsize::new(bytes));
    let (a_shut, b_shut) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    (
        End { inner: a, left: left.clone(), shut: a_shut.clone(), peer_shut: b_shut.clone() },
        End { inner: b, left, shut: b_shut, peer_shut: a_shut },
    )
}

fn reset<T>() -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left.load(Ordering::Relaxed) == 0 {
            return reset();
        }
        let before = out.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, out))?;
        if out.filled().len() == before && !self.peer_shut.load(Ordering::Relaxed) {
            return reset();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return reset();
        }
        let n = ready!(Pin::new(&mut self.inner).poll_write(cx, &bytes[..bytes.len().min(left)]))?;
        self.left.fetch_sub(n, Ordering::Relaxed);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut.store(true, Ordering::Relaxed);
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Both ends of a network whose connections break after the given numbers of bytes, and then hold.
pub(super) fn network(breaks: Vec<usize>) -> (mpsc::Receiver<End>, mpsc::Receiver<End>) {
    let (a_sender, a) = mpsc::channel(1);
    let (b_sender, b) = mpsc::channel(1);
    tokio::spawn(async move {
        for bytes in breaks.into_iter().chain(std::iter::repeat(usize::MAX)) {
            let (one, two) = connection(bytes);
            if a_sender.send(one).await.is_err() || b_sender.send(two).await.is_err() {
                return;
            }
        }
    });
    (a, b)
}

pub(super) fn pattern(from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|at| at.wrapping_mul(31).to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect()
}

pub(super) fn paused<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(async {
        tokio::time::timeout(Duration::from_secs(3600), future).await.expect("ends in virtual time")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_byte_arrives_once_whatever_breaks(
        len in 0usize..200_000, breaks in proptest::collection::vec(1usize..9000, 0..60)
    ) {
        paused(async move {
            let (mut out, sink) = tokio::io::duplex(999);
            let collect = tokio::spawn(async move {
                let mut bytes = Vec::new();
                out.read_to_end(&mut bytes).await.unwrap();
                bytes
            });
            let (guest, host) = network(breaks);
            let sender = Sender::default();
            let bytes = pattern(0, len);
            let resume = Resume::at(0);
            let receiving = async {
                let ended = receive(host, sink, &resume).await.unwrap();
                assert_eq!(ended.total, len as u64);
                ended.linger().await;
                // Told, and so done: the sender ends next.
                std::future::pending::<()>().await;
            };
            let drained = tokio::select! {
                drained = send(&sender, bytes.as_slice(), guest, std::future::pending()) => drained,
                () = receiving => unreachable!(),
            };
            assert_eq!(drained, Drained::Complete { total: len as u64 });
            assert_eq!(resume.total(), Some(len as u64));
            assert!(collect.await.unwrap() == pattern(0, len));
        });
    }

    #[test]
    fn a_receiver_that_knows_nothing_misses_no_byte(
        len in 1usize..150_000, first in 1usize..60_000, breaks in proptest::collection::vec(1usize..9000, 0..20)
    ) {
        paused(async move {
            let sender = Sender::default();
            let bytes = pattern(0, len);
            let (guest_sender, guest) = mpsc::channel(1);
            let sending = {
                let sender = sender.clone();
                let bytes = bytes.clone();
                tokio::spawn(async move { send(&sender, bytes.as_slice(), guest, std::future::pending()).await })
            };
            // The source host: it breaks off after `first` bytes of traffic.
            let (one, two) = connection(first);
            guest_sender.send(one).await.unwrap();
            let (host_sender, host) = mpsc::channel(1);
            host_sender.send(two).await.unwrap();
            drop(host_sender);
            let mut taken = Vec::new();
            let old = Resume::at(0);
            // It may get everything when `first` is large enough; the rest is then nothing.
            let _ = receive(host, &mut taken, &old).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let acknowledged = sender.position().acknowledged;
            assert!(acknowledged <= taken.len() as u64);

            let mut rest = Vec::new();
            let (guest_side, host_side) = network(breaks);
            let feed = tokio::spawn(async move {
                let mut guest_side = guest_side;
                while let Some(end) = guest_side.recv().await {
                    if guest_sender.send(end).await.is_err() { return }
                }
            });
            if !sending.is_finished() {
                let resume = Resume::unknown();
                let ended = receive(host_side, &mut rest, &resume).await.unwrap();
                assert_eq!(ended.total, len as u64);
                let lingering = tokio::spawn(ended.linger());
                assert_eq!(sending.await.unwrap(), Drained::Complete { total: len as u64 });
                lingering.abort();
            }
            feed.abort();
            let overlap = taken.len() + rest.len() - len;
            assert!(taken.len() as u64 - acknowledged >= overlap as u64, "only unacknowledged bytes come again");
            let mut all = taken.clone();
            all.extend_from_slice(&rest[overlap.min(rest.len())..]);
            assert!(all == bytes);
        });
    }
}

#[test]
fn a_sink_that_blocks_blocks_the_source_at_the_bound() {
    paused(async {
        let (mut process, source) = tokio::io::duplex(1);
        let (guest, host) = network(Vec::new());
        // Room for one byte and nobody who reads.
        let (_out, sink) = tokio::io::duplex(1);
        let sender = Sender::default();
        let resume = Resume::at(0);
        let written = AtomicUsize::new(0);
        let process = async {
            loop {
                process.write_all(&[7]).await.unwrap();
                written.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::select! {
            _ = send(&sender, source, guest, std::future::pending()) => panic!("cannot end"),
            _ = receive(host, sink, &resume) => panic!("cannot end"),
            () = process => {}
            () = tokio::time::sleep(Duration::from_secs(5)) => {}
        }
        let written = written.into_inner();
        assert!((RETAINED..RETAINED + 16).contains(&written), "{written}");
        assert_eq!(resume.total(), Some(1));
    });
}

#[test]
fn a_stopped_sender_says_what_is_left() {
    paused(async {
        let (_never, nobody) = mpsc::channel::<End>(1);
        let sender = Sender::default();
        let stop = tokio::time::sleep(Duration::from_secs(1));
        let drained = send(&sender, b"abc".as_slice(), nobody, stop).await;
        assert_eq!(drained, Drained::Stopped { acknowledged: 0, pending: 3 });
        assert_eq!(sender.position().pending, b"abc");
    });
}

#[test]
fn input_moves_to_another_host_without_loss_or_repetition() {
    paused(async {
        let (guest_sender, guest) = mpsc::channel(1);
        let (out, sink) = tokio::io::duplex(1 << 20);
        let resume = Resume::at(0);
        let receiving =
            tokio::spawn(async move { receive(guest, sink, &resume).await.map(|ended| ended.total) });
        // The source's host reads 5000 bytes; its connection breaks on the way.
        let (one, two) = connection(1700);
        guest_sender.send(one).await.unwrap();
        let (host_sender, host) = mpsc::channel(1);
        host_sender.send(two).await.unwrap();
        let source = Sender::default();
        let (mut client, fifo) = tokio::io::duplex(8192);
        client.write_all(&pattern(0, 5000)).await.unwrap();
        let stop = tokio::time::sleep(Duration::from_secs(2));
        let Drained::Stopped { pending, .. } = send(&source, fifo, host, stop).await else {
            panic!("not all sent")
        };
        assert!(pending > 0);
        // The destination's host goes on from what was saved.
        let (one, two) = connection(usize::MAX);
        guest_sender.send(one).await.unwrap();
        let (host_sender, host) = mpsc::channel(1);
        host_sender.send(two).await.unwrap();
        let destination = Sender::at(source.position());
        let more = pattern(5000, 3000);
        let drained = send(&destination, more.as_slice(), host, std::future::pending()).await;
        assert_eq!(drained, Drained::Complete { total: 8000 });
        assert_eq!(receiving.await.unwrap().unwrap(), 8000);
        let mut bytes = Vec::new();
        let mut out = out;
        out.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes == pattern(0, 8000));
    });
}

#[test]
fn plain_streams_end_by_the_close_handshake() {
    paused(async {
        let (guest, host) = tokio::io::duplex(100);
        let mut got = Vec::new();
        let bytes = pattern(0, 10_000);
        let (sent, received) =
            tokio::join!(plain::send(bytes.as_slice(), guest), plain::receive(host, &mut got));
        assert_eq!((sent.unwrap(), received.unwrap()), (10_000, 10_000));
        assert!(got == bytes);
    });
}
