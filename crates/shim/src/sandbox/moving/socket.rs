//! Taking over a connected socket from another process of this host.

use std::os::fd::{FromRawFd, OwnedFd};

use dunlin_migration::refusal::Refusal;
use dunlin_wire::handover::ProtocolInfo;

/// Duplicates the socket that a handover names, checked to be a connected stream socket.
pub(crate) fn fetch(handover: &ProtocolInfo) -> Result<OwnedFd, Refusal> {
    let what = format!("socket {} of process {}", handover.fd, handover.pid);
    let failed = |step: &str| {
        let error = std::io::Error::last_os_error();
        Refusal::invalid(format!(
            "protocol_info: {what}: {step} failed ({error}); keep the socket open until the answer"
        ))
    };
    // SAFETY: both calls take plain numbers and give a new descriptor or -1.
    let socket = unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, handover.pid, 0);
        if process < 0 {
            return Err(failed("pidfd_open"));
        }
        let process = OwnedFd::from_raw_fd(descriptor(process));
        let socket =
            libc::syscall(libc::SYS_pidfd_getfd, std::os::fd::AsRawFd::as_raw_fd(&process), handover.fd, 0);
        if socket < 0 {
            return Err(failed("pidfd_getfd"));
        }
        OwnedFd::from_raw_fd(descriptor(socket))
    };
    check(&socket, &what)?;
    Ok(socket)
}

/// A descriptor as the kernel gave it: it fits an int by definition.
fn descriptor(number: libc::c_long) -> i32 {
    i32::try_from(number).unwrap_or(-1)
}

fn check(socket: &OwnedFd, what: &str) -> Result<(), Refusal> {
    use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};
    match getsockopt(socket, sockopt::SockType) {
        Ok(SockType::Stream) => {}
        Ok(other) => {
            return Err(Refusal::invalid(format!(
                "protocol_info: {what} is a {other:?} socket; pass a stream socket"
            )));
        }
        Err(error) => {
            return Err(Refusal::invalid(format!("protocol_info: {what} is not a socket ({error})")));
        }
    }
    let fd = std::os::fd::AsRawFd::as_raw_fd(socket);
    getpeername::<SockaddrStorage>(fd).map(drop).map_err(|error| {
        Refusal::precondition(format!("protocol_info: {what} is not connected ({error}); connect it first"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_wire::handover::Stream;
    use std::os::fd::AsRawFd;

    fn of(fd: i32) -> ProtocolInfo {
        ProtocolInfo { pid: i32::try_from(std::process::id()).unwrap(), fd, stream: Stream::Memory }
    }

    #[test]
    fn a_connected_socket_is_taken_over() {
        use std::io::{Read, Write};
        let (mine, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        let taken = fetch(&of(mine.as_raw_fd())).unwrap();
        drop(mine);
        let mut taken = std::os::unix::net::UnixStream::from(taken);
        other.write_all(b"x").unwrap();
        let mut byte = [0];
        taken.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn what_is_no_connected_stream_is_refused_with_the_reason() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(fetch(&of(file.as_raw_fd())).unwrap_err().message.contains("not a socket"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(fetch(&of(listener.as_raw_fd())).unwrap_err().message.contains("not connected"));
        let datagram = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(fetch(&of(datagram.as_raw_fd())).unwrap_err().message.contains("stream"));
    }
}
