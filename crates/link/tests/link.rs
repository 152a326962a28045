//! Both ends of the link over a unix socket, as QEMU's chardev would carry them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dunlin_link::guest::{Device, GuestLink};
use dunlin_link::host::{Endpoint, HostLink, LinkError, PortListener};
use dunlin_link::packet::{Decoder, Packet};
use dunlin_link::{Epoch, LinkStatus, LinkStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(60);

async fn up(mut status: watch::Receiver<LinkStatus>) -> Epoch {
    let seen = timeout(SOON, status.wait_for(|s| matches!(s, LinkStatus::Up { .. }))).await;
    match *seen.expect("up in time").expect("the link lives") {
        LinkStatus::Up { epoch } => epoch,
        LinkStatus::Connected | LinkStatus::Down => unreachable!(),
    }
}

async fn connect(socket: &Path) -> HostLink {
    HostLink::connect(Endpoint::VirtioSerial { socket: socket.to_owned() }).await.unwrap()
}

struct Pair {
    directory: tempfile::TempDir,
    guest: GuestLink,
    host: HostLink,
}

impl Pair {
    fn socket(&self) -> PathBuf {
        self.directory.path().join("link.sock")
    }
}

async fn pair() -> Pair {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("link.sock");
    let guest = GuestLink::spawn(Device::UnixListener { path: socket.clone() });
    let host = connect(&socket).await;
    host.start();
    assert_eq!(up(host.status()).await, up(guest.status()).await);
    Pair { directory, guest, host }
}

async fn open(guest: &GuestLink, listener: &mut PortListener) -> (LinkStream, LinkStream) {
    let (dialled, accepted) = tokio::join!(guest.dial(listener.port()), listener.accept());
    (dialled.unwrap(), accepted.unwrap())
}

#[tokio::test]
async fn streams_carry_bytes_both_ways_and_close_by_halves() {
    let pair = pair().await;
    let mut listener = pair.host.listen(7).unwrap();
    let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
    guest.write_all(b"question").await.unwrap();
    guest.shutdown().await.unwrap();
    let mut text = String::new();
    host.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    host.write_all(b"answer").await.unwrap();
    host.shutdown().await.unwrap();
    text.clear();
    guest.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
}

#[tokio::test]
async fn ports_without_a_listener_refuse_and_taken_ports_say_so() {
    let pair = pair().await;
    let refused = pair.guest.dial(9).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let listener = pair.host.listen(9).unwrap();
    assert!(matches!(pair.host.listen(9), Err(LinkError::AddrInUse { port: 9 })));
    drop(listener);
    let mut again = pair.host.listen(9).unwrap();
    open(&pair.guest, &mut again).await;
}

#[tokio::test]
async fn a_stream_dropped_unclosed_is_a_reset_and_not_an_end() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    let (guest, mut host) = open(&pair.guest, &mut listener).await;
    drop(guest);
    let error = timeout(SOON, host.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn no_byte_is_sent_before_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let host = connect(&socket).await;
    let (mut channel, _) = listener.accept().await.unwrap();
    let mut byte = [0u8; 1];
    assert!(timeout(Duration::from_millis(250), channel.read(&mut byte)).await.is_err());
    host.start();
    host.start();
    assert_eq!(timeout(SOON, channel.read(&mut byte)).await.unwrap().unwrap(), 1);
    drop(channel);
    let mut status = host.status();
    timeout(SOON, status.wait_for(|s| *s == LinkStatus::Down)).await.unwrap().unwrap();
    assert!(matches!(host.listen(3), Err(LinkError::Closed)));
}

async fn next_packet(channel: &mut UnixStream, decoder: &mut Decoder) -> Packet {
    let mut found = Vec::new();
    let mut byte = [0u8; 1];
    while found.is_empty() {
        assert_eq!(timeout(SOON, channel.read(&mut byte)).await.unwrap().unwrap(), 1);
        decoder.feed(&byte, |packet| found.push(packet));
    }
    found.remove(0)
}

#[tokio::test]
async fn hello_is_repeated_until_its_own_answer() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let host = connect(&socket).await;
    host.start();
    let (mut channel, _) = listener.accept().await.unwrap();
    let mut decoder = Decoder::default();
    let Packet::Hello(epoch) = next_packet(&mut channel, &mut decoder).await else { panic!("not a HELLO") };
    channel.write_all(&Packet::HelloAck(Epoch(epoch.0 ^ 1)).encode()).await.unwrap();
    assert_eq!(next_packet(&mut channel, &mut decoder).await, Packet::Hello(epoch));
    assert_eq!(*host.status().borrow(), LinkStatus::Connected);
    channel.write_all(&Packet::HelloAck(epoch).encode()).await.unwrap();
    assert_eq!(up(host.status()).await, epoch);
    // A gap in the numbers of DATA packets ends the session rather than pass.
    let gap = Packet::Data { epoch, seq: 1, payload: bytes::Bytes::from_static(b"x") };
    channel.write_all(&gap.encode()).await.unwrap();
    loop {
        match next_packet(&mut channel, &mut decoder).await {
            Packet::Hello(next) if next != epoch => break,
            _ => {}
        }
    }
    host.close().await;
}

#[tokio::test]
async fn a_new_host_resets_all_streams_and_the_listener_of_the_old_one_ends() {
    let pair = pair().await;
    let mut listener = pair.host.listen(5).unwrap();
    let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
    guest.write_all(b"half of somethi").await.unwrap();
    let old = up(pair.guest.status()).await;

    let second = connect(&pair.socket()).await;
    second.start();
    let new = up(second.status()).await;
    assert_ne!(old, new);
    assert_eq!(up(pair.guest.status()).await, new);
    let mut bytes = Vec::new();
    let error = timeout(SOON, guest.read_to_end(&mut bytes)).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(guest.write(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let error = timeout(SOON, host.read_to_end(&mut bytes)).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(timeout(SOON, listener.accept()).await.unwrap().is_none());

    let mut listener = second.listen(5).unwrap();
    let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
    guest.write_all(b"ok").await.unwrap();
    let mut two = [0; 2];
    host.read_exact(&mut two).await.unwrap();
    assert_eq!(&two, b"ok");
}

#[tokio::test]
async fn one_channel_survives_new_sessions_begun_in_the_middle_of_a_packet() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let guest = GuestLink::spawn(Device::UnixListener { path: socket.clone() });
    let mut channel = loop {
        if let Ok(channel) = UnixStream::connect(&socket).await {
            break channel;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let mut decoder = Decoder::default();
    for number in 1..20u64 {
        let cut = Packet::Data { epoch: Epoch(number), seq: 0, payload: bytes::Bytes::from(vec![9u8; 500]) };
        let cut = cut.encode();
        channel.write_all(&cut[..usize::try_from(number * 17).unwrap()]).await.unwrap();
        for _ in 0..3 {
            channel.write_all(&Packet::Hello(Epoch(number)).encode()).await.unwrap();
        }
        loop {
            if next_packet(&mut channel, &mut decoder).await == Packet::HelloAck(Epoch(number)) {
                break;
            }
        }
        assert_eq!(up(guest.status()).await, Epoch(number));
    }
    // A session that was ended is not begun again by its own late HELLO.
    channel.write_all(&Packet::Bye(Epoch(19)).encode()).await.unwrap();
    channel.write_all(&Packet::Hello(Epoch(19)).encode()).await.unwrap();
    loop {
        match next_packet(&mut channel, &mut decoder).await {
            Packet::Bye(epoch) => break assert_eq!(epoch, Epoch(19)),
            Packet::HelloAck(_) | Packet::Hello(_) | Packet::Data { .. } => {}
        }
    }
    assert_eq!(*guest.status().borrow(), LinkStatus::Connected);
    assert_eq!(guest.dial(1).await.unwrap_err().kind(), ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_stalled_stream_does_not_block_another() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    let (mut stalled, _unread) = open(&pair.guest, &mut listener).await;
    let writer = tokio::spawn(async move {
        let block = vec![1u8; 64 * 1024];
        while stalled.write_all(&block).await.is_ok() {}
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!writer.is_finished());
    let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
    let sender = tokio::spawn(async move {
        guest.write_all(&vec![2u8; 4 << 20]).await.unwrap();
        guest.shutdown().await.unwrap();
    });
    let mut bytes = Vec::new();
    timeout(SOON, host.read_to_end(&mut bytes)).await.expect("not blocked").unwrap();
    assert_eq!(bytes.len(), 4 << 20);
    sender.await.unwrap();
    writer.abort();
}

#[tokio::test]
async fn one_stream_too_many_is_refused_and_the_others_live() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    let epoch = up(pair.guest.status()).await;
    let mut open_ones = Vec::new();
    let refused = loop {
        match pair.guest.dial(1).await {
            Ok(stream) => {
                let accepted = timeout(SOON, listener.accept()).await.unwrap().unwrap();
                open_ones.push((stream, accepted));
            }
            Err(error) => break error,
        }
        assert!(open_ones.len() < 1000, "never refused");
    };
    assert!(refused.to_string().contains("streams of the link are open"), "{refused}");
    let (mut guest, mut host) = open_ones.swap_remove(0);
    guest.write_all(b"x").await.unwrap();
    assert_eq!(host.read_u8().await.unwrap(), b'x');
    drop((guest, host));
    open(&pair.guest, &mut listener).await;
    assert_eq!(up(pair.host.status()).await, epoch);
}

#[tokio::test]
async fn a_half_closed_stream_dropped_by_the_host_does_not_hold_up_the_guest() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
    host.shutdown().await.unwrap();
    drop(host);
    let written = async {
        guest.write_all(&vec![2u8; 2 << 20]).await.unwrap();
        guest.shutdown().await.unwrap();
    };
    timeout(SOON, written).await.expect("read to its end by the session");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_at_once_neither_stall_nor_mix() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    let mut jobs = tokio::task::JoinSet::new();
    for number in 0..8u8 {
        let (guest, host) = open(&pair.guest, &mut listener).await;
        for stream in [guest, host] {
            let (mut read, mut write) = tokio::io::split(stream);
            jobs.spawn(async move {
                write.write_all(&vec![number; 3 << 20]).await.unwrap();
                write.shutdown().await.unwrap();
            });
            jobs.spawn(async move {
                let mut bytes = Vec::new();
                read.read_to_end(&mut bytes).await.unwrap();
                assert_eq!(bytes.len(), 3 << 20);
                assert!(bytes.iter().all(|byte| *byte == number));
            });
        }
    }
    timeout(Duration::from_secs(60), async {
        while let Some(job) = jobs.join_next().await {
            job.unwrap()
        }
    })
    .await
    .expect("no stall");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn speed_is_printed() {
    let pair = pair().await;
    let mut listener = pair.host.listen(1).unwrap();
    const LEN: usize = 128 << 20;
    for (name, byte) in [("text-like", b'a'), ("zeros", 0)] {
        let (mut guest, mut host) = open(&pair.guest, &mut listener).await;
        let start = Instant::now();
        let sender = tokio::spawn(async move {
            let block = vec![byte; 1 << 20];
            for _ in 0..LEN >> 20 {
                guest.write_all(&block).await.unwrap();
            }
            guest.shutdown().await.unwrap();
        });
        let mut buffer = vec![0u8; 256 * 1024];
        let mut total = 0;
        while let n @ 1.. = host.read(&mut buffer).await.unwrap() {
            total += n;
        }
        sender.await.unwrap();
        assert_eq!(total, LEN);
        println!("{name}: {:.0} MB/s", LEN as f64 / 1e6 / start.elapsed().as_secs_f64());
    }
}
