//! Peers that fall silent or hang up, and what one side learns from how the other's streams end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use dunlin_qemu::{
    DiskSource, MigrationOptions, MigrationStatus, Mode, NbdClientStream, Qemu, Role, RunState,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::common::{
    Host, SOON, dial, disk_writing_boot_disk, document, pattern, slot, stream_pair, tcp_pair,
    writing_boot_disk,
};
use crate::migration::{Pair, becomes, given_up_after, is_counting, is_writing, run_past_the_bios};

/// Much longer than a QEMU that hears takes, and less than the shortest wait for one that does not.
const AT_ONCE: Duration = Duration::from_secs(6);

fn stream(socket: OwnedFd) -> tokio::net::UnixStream {
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(true).unwrap();
    tokio::net::UnixStream::from_std(socket).unwrap()
}

/// A connection to an NBD server whose client is overheard; gives what it said.
fn overheard(nbd: &Path) -> (OwnedFd, JoinHandle<NbdClientStream>) {
    let (client, ours) = stream_pair();
    let (mut from_client, mut to_client) = stream(ours).into_split();
    let (mut from_server, mut to_server) = stream(dial(nbd)).into_split();
    let answers = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    let heard = tokio::spawn(async move {
        let (mut said, mut buffer) = (NbdClientStream::default(), vec![0; 1 << 20]);
        while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
            said.feed(&buffer[..read]).unwrap();
            let _ = to_server.write_all(&buffer[..read]).await;
        }
        answers.abort();
        said
    });
    (client, heard)
}

#[tokio::test]
async fn a_mirror_takes_its_leave_when_it_is_finished_and_at_no_other_end() {
    let pair = Pair::new(&document()).await;
    let place = slot(0, 1);
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let image = DiskSource::writable(host.disk("a.raw", &pattern(1 << 20)));
        qemu.attach_disk(place, &image).await.unwrap();
    }
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    run_past_the_bios(&pair.source, &pair.source_host).await;
    let start = async |socket| {
        pair.source.mirror_start(place, socket, &export).await.unwrap();
        pair.source.mirror_ready(place, SOON).await.unwrap();
    };
    let left = async |heard: JoinHandle<NbdClientStream>| {
        tokio::time::timeout(SOON, heard).await.expect("the stream ends").unwrap().took_leave()
    };

    let (socket, heard) = overheard(&nbd);
    start(socket).await;
    pair.source.mirrors_abort(&[place]).await.unwrap();
    assert!(!left(heard).await, "aborted in step");

    // Over by itself, connection in order: the guest runs on all the same.
    let (socket, heard) = overheard(&nbd);
    start(socket).await;
    let cancel = json!({ "device": "mirror-0-1", "force": false });
    pair.source.qmp().execute("block-job-cancel", cancel).await.unwrap();
    let begin = Instant::now();
    while pair.source.fallen_mirror(&[place]).await.unwrap().is_none() {
        assert!(begin.elapsed() < SOON, "it does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    pair.source.mirrors_abort(&[place]).await.unwrap();
    assert!(!left(heard).await, "over before it was told to");

    let (socket, heard) = overheard(&nbd);
    start(socket).await;
    assert_eq!(pair.source.fallen_mirror(&[place]).await.unwrap(), None);
    pair.source.mirror_finish(place).await.unwrap();
    assert!(left(heard).await, "finished");
}

/// Bytes that QEMU says to an NBD server at first, and a few more.
const HANDSHAKE: u64 = 150;

/// Connects a client and a server until so many bytes went from one to the other; then reads no more of them, and keeps the
/// connection until it is dropped itself.
fn falls_silent(client: OwnedFd, server: OwnedFd, reads: u64) -> Sender<()> {
    let of = |socket: &OwnedFd| File::from(socket.try_clone().unwrap());
    setsockopt(&client, sockopt::RcvBuf, &4096).unwrap();
    let (said, heard) = (of(&client).take(reads), of(&server));
    let (guard, dropped) = channel();
    let relay = |mut from: Box<dyn Read + Send>, mut to: File| {
        let mut buffer = [0; 64];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..read]).is_err() {
                return;
            }
        }
    };
    let (answers, back) = (of(&server), of(&client));
    std::thread::spawn(move || relay(Box::new(answers), back));
    std::thread::spawn(move || {
        relay(Box::new(said), heard);
        let _ = dropped.recv();
        drop(client);
        let _ = shutdown(server.as_raw_fd(), Shutdown::Both);
    });
    guard
}

/// Writes that the guest has had answered of its first disk.
async fn writes_done(qemu: &Qemu) -> u64 {
    let stats = qemu.qmp().execute("query-blockstats", json!({})).await.unwrap();
    let of = |device: &serde_json::Value| device["stats"]["wr_operations"].as_u64();
    stats.as_array().unwrap().iter().filter_map(of).sum()
}

async fn writes_more(qemu: &Qemu, writes: u64) {
    let (begin, first) = (Instant::now(), writes_done(qemu).await);
    while writes_done(qemu).await < first + writes {
        assert!(begin.elapsed() < SOON, "the guest writes nothing");
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}

/// QEMU 7.2 writes to memory that it has freed when a mirror's job ends while a write of the guest is under way.
#[tokio::test]
async fn a_mirror_ends_among_the_guests_writes_and_the_guest_goes_on() {
    let pair = Pair::new(&document()).await;
    let place = slot(0, 0);
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let image = DiskSource::writable(host.disk("boot.raw", &disk_writing_boot_disk()));
        qemu.attach_disk(place, &image).await.unwrap();
    }
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    pair.source.cont().await.unwrap();
    writes_more(&pair.source, 10).await;

    for round in 0..40 {
        let (socket, heard) = overheard(&nbd);
        pair.source.mirror_start(place, socket, &export).await.unwrap();
        writes_more(&pair.source, 1 + round % 3).await;
        if round % 2 == 1 {
            // Its peer is gone.
            heard.abort();
            writes_more(&pair.source, 1).await;
        }
        pair.source.mirrors_abort(&[place]).await.unwrap();
        assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
        writes_more(&pair.source, 3).await;
    }

    // Given up anywhere, the next one ends what it left, and the guest does not stand still for it.
    for waits in 0.. {
        pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
        writes_more(&pair.source, 1).await;
        let ended = given_up_after(waits, pair.source.mirrors_abort(&[place])).await;
        pair.source.mirrors_abort(&[place]).await.unwrap();
        assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
        if ended.is_some() {
            assert!(waits > 5, "it has that many commands");
            break;
        }
    }

    // A write waits for a peer that says nothing, and stopping the guest would wait for the write. So does the copy, most of
    // the time in the middle of a request.
    for sockets in [stream_pair as fn() -> _, tcp_pair] {
        for reads in (HANDSHAKE..HANDSHAKE + 160).step_by(20) {
            let (socket, ours) = sockets();
            let silent = falls_silent(ours, dial(&nbd), reads);
            pair.source.mirror_start(place, socket, &export).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let begin = Instant::now();
            pair.source.mirrors_abort(&[place]).await.unwrap();
            assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
            writes_more(&pair.source, 3).await;
            drop(silent);
        }
    }
}

/// Waits until QEMU answers nothing any more.
async fn falls_deaf(qemu: &Qemu) {
    let begin = Instant::now();
    while tokio::time::timeout(Duration::from_millis(500), qemu.status()).await.is_ok() {
        assert!(begin.elapsed() < SOON, "it answers all the time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_migration_is_taken_back_at_once_while_a_disk_s_peer_is_silent() {
    let pair = Pair::new(&document()).await;
    let place = slot(0, 7);
    let original = pair.source_host.disk("a.raw", &pattern(64 << 20));
    pair.source.attach_disk(place, &DiskSource::writable(&original)).await.unwrap();
    let copy = pair.destination_host.disk("a.raw", &vec![0; 64 << 20]);
    pair.destination.attach_disk(place, &DiskSource::writable(&copy)).await.unwrap();
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    run_past_the_bios(&pair.source, &pair.source_host).await;
    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    let frozen = nix::unistd::Pid::from_raw(pair.destination.pid());
    kill(frozen, Signal::SIGSTOP).unwrap();
    assert!(!pair.source.mirror_job(place).await.unwrap().unwrap().ready, "writes are under way");

    // Memory goes to somebody who reads. When the guest is stopped QEMU waits for its disks.
    pair.source.prepare_migration(Role::Source, &MigrationOptions::default()).await.unwrap();
    let (out, sink) = stream_pair();
    let kept = out.try_clone().unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut UnixStream::from(sink), &mut std::io::sink()));
    pair.source.migrate_to_fd(out).await.unwrap();
    falls_deaf(&pair.source).await;

    let begin = Instant::now();
    pair.source.take_back(&[place], Some(&kept), true).await.unwrap();
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    becomes(&pair.source, RunState::Running).await;
    is_counting(&pair.source).await;
    pair.source.mirrors_abort(&[place]).await.unwrap();
    drop(kept);
    reader.join().unwrap().unwrap();
    kill(frozen, Signal::SIGCONT).unwrap();
}

#[tokio::test]
async fn a_migration_is_taken_back_soon_while_its_own_peer_is_silent_at_the_last() {
    let host = Host::new();
    let source = host.spawn(&document(), Mode::Boot).await;
    // More than a socket holds is written to again before the guest is stopped.
    let boot = DiskSource::read_only(host.disk("boot.raw", &writing_boot_disk()));
    source.attach_disk(slot(0, 0), &boot).await.unwrap();
    source.cont().await.unwrap();
    is_writing(&source).await;
    source.prepare_migration(Role::Source, &MigrationOptions::default()).await.unwrap();
    let (out, sink) = stream_pair();
    let kept = out.try_clone().unwrap();
    let silent = Arc::new(AtomicBool::new(false));
    let reads = Arc::clone(&silent);
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn(move || {
        let (mut sink, mut buffer) = (UnixStream::from(sink), vec![0; 1 << 16]);
        sink.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        while !reads.load(Ordering::Relaxed) {
            let _ = sink.read(&mut buffer);
        }
        let _ = told.recv();
    });
    source.migrate_to_fd(out).await.unwrap();
    source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    silent.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    // QEMU may fall deaf before it has answered.
    let _ = tokio::time::timeout(Duration::from_millis(500), source.migrate_continue()).await;
    falls_deaf(&source).await;

    let begin = Instant::now();
    source.take_back(&[], Some(&kept), true).await.unwrap();
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    becomes(&source, RunState::Running).await;
    drop(tell);
    reader.join().unwrap();
}
