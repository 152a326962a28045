//! The raw channel in the guest, read and written by threads of its own.
//!
//! A virtio-serial port without a host is always readable with 0 bytes, so poll on it spins; blocking threads and a
//! pause do not.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::{Device, Opening};
use crate::outbox::Outbox;
use crate::packet::Decoder;

/// Pause after a read of 0 bytes on a serial port: no host has it open.
const NO_HOST: Duration = Duration::from_millis(20);
/// Pause before a device that could not be opened is tried again.
const REOPEN: Duration = Duration::from_millis(100);
/// Packets read and not yet looked at.
const PACKETS: usize = 16;
const READ_BUFFER: usize = 64 * 1024;

/// Ends the threads of sockets; a serial port's reader ends with its machine.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<Mutex<StopState>>);

#[derive(Debug, Default)]
struct StopState {
    stopped: bool,
    listener: Option<OwnedFd>,
    connection: Option<OwnedFd>,
}

fn shut(fd: &OwnedFd) {
    let _ = socket::shutdown(fd.as_raw_fd(), socket::Shutdown::Both);
}

impl Stop {
    pub(super) fn stop(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        state.listener.iter().chain(&state.connection).for_each(shut);
    }

    fn stopped(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }

    fn listener(&self, fd: OwnedFd) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            shut(&fd);
        }
        state.listener = Some(fd);
    }

    /// The newest connection; the one before is hung up on.
    fn connection(&self, fd: OwnedFd) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            shut(&fd);
        }
        if let Some(old) = state.connection.replace(fd) {
            shut(&old);
        }
    }
}

/// Serves the device in threads until nobody takes its openings any more.
pub(super) fn serve(device: Device, openings: mpsc::Sender<Opening>, stop: Stop) {
    spawn("link-device", move || match device {
        Device::VirtioSerial { path } => serve_serial(&path, &openings, &stop),
        Device::Vsock { port } => serve_listener(&openings, &stop, || listen_vsock(port)),
        Device::UnixListener { path } => serve_listener(&openings, &stop, || listen_unix(&path)),
    });
}

/// Starts a thread, and tries again for as long as the system refuses one.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    let slot = Arc::new(Mutex::new(Some(run)));
    loop {
        let slot = slot.clone();
        let body = move || {
            let run = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(run) = run {
                run();
            }
        };
        match thread::Builder::new().name(name.to_owned()).spawn(body) {
            Ok(_) => return,
            Err(error) => {
                warn!(%error, name, "cannot start a thread of the link; trying again");
                thread::sleep(REOPEN);
            }
        }
    }
}

fn serve_serial(path: &Path, openings: &mpsc::Sender<Opening>, stop: &Stop) {
    while !openings.is_closed() && !stop.stopped() {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .and_then(|file| file.try_clone().map(|clone| (file, clone)));
        match opened {
            Ok((reader, writer)) => serve_channel(reader, writer, openings, Some(path)),
            Err(error) => debug!(%error, path = %path.display(), "the link's port is not there yet"),
        }
        thread::sleep(REOPEN);
    }
}

fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let fd = socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    socket::listen(&fd, Backlog::new(4)?)?;
    Ok(fd)
}

fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    Ok(OwnedFd::from(UnixListener::bind(path)?))
}

fn serve_listener(openings: &mpsc::Sender<Opening>, stop: &Stop, listen: impl Fn() -> io::Result<OwnedFd>) {
    while !openings.is_closed() && !stop.stopped() {
        let listener = listen().and_then(|fd| {
            stop.listener(fd.try_clone()?);
            Ok(fd)
        });
        match listener {
            Ok(listener) => {
                while !stop.stopped()
                    && let Ok(connection) = accept(&listener, stop)
                {
                    let openings = openings.clone();
                    spawn("link-reader", move || {
                        let (reader, writer) = connection;
                        serve_channel(reader, writer, &openings, None);
                    });
                }
            }
            Err(error) => debug!(%error, "the link's socket is not there yet"),
        }
        if !stop.stopped() {
            thread::sleep(REOPEN);
        }
    }
}

fn accept(listener: &OwnedFd, stop: &Stop) -> io::Result<(File, File)> {
    loop {
        match socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(raw) => {
                // SAFETY: accept4 has just returned this descriptor and nobody else owns it.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                stop.connection(fd.try_clone()?);
                let reader = File::from(fd);
                let writer = reader.try_clone()?;
                return Ok((reader, writer));
            }
            Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the path still names the device that is open.
fn names(path: &Path, open: &File) -> bool {
    let (there, here) = (std::fs::metadata(path), open.metadata());
    there.is_ok_and(|there| here.is_ok_and(|here| there.rdev() == here.rdev()))
}

/// Reads the channel to its end in this thread, and writes it in another. A serial port (whose path is given) has no
/// end while it is there: a read of 0 bytes only says that no host has it open.
fn serve_channel(
    mut reader: File,
    mut writer: File,
    openings: &mpsc::Sender<Opening>,
    serial: Option<&Path>,
) {
    let outbox = Outbox::default();
    let (sender, packets) = mpsc::channel(PACKETS);
    let to_write = outbox.clone();
    spawn("link-writer", move || {
        while let Some(bytes) = to_write.take_blocking() {
            if let Err(error) = writer.write_all(&bytes) {
                debug!(%error, "the link's channel cannot be written");
                to_write.close();
                return;
            }
        }
    });
    if openings.blocking_send(Opening { outbox: outbox.clone(), packets }).is_err() {
        outbox.close();
        return;
    }
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; READ_BUFFER];
    let mut found = Vec::new();
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => match serial {
                Some(path) if !sender.is_closed() && names(path, &reader) => thread::sleep(NO_HOST),
                Some(_) | None => break,
            },
            Ok(n) => {
                decoder.feed(&buffer[..n], |packet| found.push(packet));
                if found.drain(..).any(|packet| sender.blocking_send(packet).is_err()) {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                debug!(%error, "the link's channel cannot be read");
                break;
            }
        }
    }
    outbox.close();
}
