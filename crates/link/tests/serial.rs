//! The guest on a serial device that is absent, appears, hangs up and comes back. A pty stands for the port.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use dunlin_link::guest::{Device, GuestLink};
use dunlin_link::host::{Endpoint, HostLink};
use dunlin_link::{LinkStatus, LinkStream};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(60);

/// Stands for QEMU: a socket on one side, the port on the other. The port hangs up when the host closes.
fn machine(socket: &Path, port: &Path) {
    let pty = openpty(None, None).unwrap();
    let mut settings = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut settings);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).unwrap();
    let name = nix::unistd::ttyname(pty.slave.as_fd()).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    let (master, slave): (OwnedFd, OwnedFd) = (pty.master, pty.slave);
    let port = port.to_owned();
    std::thread::spawn(move || {
        let (host, _) = listener.accept().unwrap();
        symlink(&name, &port).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL).unwrap());
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
        let mut line = File::from(master);
        let mut to_host = host.try_clone().unwrap();
        host.set_nonblocking(true).unwrap();
        let (mut host, mut buffer, mut to_guest) = (host, [0; 4096], Vec::new());
        loop {
            let mut idle = true;
            if to_guest.is_empty() {
                match host.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => to_guest.extend_from_slice(&buffer[..n]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // Closed with bytes in it that it had not read: reset, which is an end too.
                    Err(_) => break,
                }
            }
            if let Ok(n @ 1..) = line.write(&to_guest) {
                to_guest.drain(..n);
                idle = false;
            }
            if let Ok(n @ 1..) = line.read(&mut buffer) {
                let mut rest = &buffer[..n];
                while !rest.is_empty() {
                    match to_host.write(rest) {
                        Ok(n) => rest = &rest[n..],
                        Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                        Err(_) => break,
                    }
                }
                idle = false;
            }
            if idle {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // The port goes away, and whoever has it open is hung up on.
        std::fs::remove_file(&port).unwrap();
        drop((line, slave));
    });
}

async fn up(mut status: watch::Receiver<LinkStatus>) {
    let wanted = |status: &LinkStatus| matches!(status, LinkStatus::Up { .. });
    timeout(SOON, status.wait_for(wanted)).await.expect("in time").expect("the link lives");
}

async fn gone(mut status: watch::Receiver<LinkStatus>) {
    timeout(SOON, status.wait_for(|status| *status == LinkStatus::Down)).await.expect("in time").unwrap();
}

async fn open(guest: &GuestLink, host: &HostLink) -> (LinkStream, LinkStream) {
    let mut listener = host.listen(4).unwrap();
    let (guest, host) = tokio::join!(guest.dial(4), listener.accept());
    (guest.unwrap(), host.unwrap())
}

#[tokio::test]
async fn the_device_may_come_late_and_twice() {
    let directory = tempfile::tempdir().unwrap();
    let port = directory.path().join("dunlin.link.0");
    let guest = GuestLink::spawn(Device::VirtioSerial { path: port.clone() });
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(*guest.status().borrow(), LinkStatus::Down);
    for round in 0..2 {
        let socket = directory.path().join(format!("link-{round}.sock"));
        machine(&socket, &port);
        let host = HostLink::connect(Endpoint::VirtioSerial { socket }).await.unwrap();
        host.start();
        up(host.status()).await;
        let (mut from, mut to) = open(&guest, &host).await;
        let bytes: Vec<u8> = (0..300_000u32).map(|at| at.to_le_bytes()[(at % 3) as usize]).collect();
        let sent = bytes.clone();
        let sending = tokio::spawn(async move {
            from.write_all(&sent).await.unwrap();
            from.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        timeout(SOON, to.read_to_end(&mut got)).await.expect("in time").unwrap();
        assert!(got == bytes);
        sending.await.unwrap();
        host.close().await;
        gone(guest.status()).await;
        assert!(guest.dial(4).await.is_err());
    }
}
