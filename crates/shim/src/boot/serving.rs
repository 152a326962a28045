//! Whether a shim serves at a socket, asked of itself.
//!
//! That a connection is taken says nothing: the kernel takes it for as long as the listening socket is open, and a
//! process that dies closes its connections before that one. containerd calls `delete` as soon as its own connection
//! ends, so it is exactly then that a dead shim still looks alive.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use protobuf::Message;
use ttrpc::MessageHeader;

/// A shim that has not answered by then is busy; the end of a dying one comes much sooner. containerd gives a whole
/// `delete` 5 s.
const ANSWER: Duration = Duration::from_secs(2);

/// False when nobody is there or whoever was ends before it answers. One that is silent lives.
pub(crate) fn serves(socket: &Path) -> bool {
    serves_within(socket, ANSWER)
}

fn serves_within(socket: &Path, answer: Duration) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let asked = stream
        .set_read_timeout(Some(answer))
        .and_then(|()| stream.set_write_timeout(Some(answer)))
        .and_then(|()| stream.write_all(&question()));
    let answered = asked.and_then(|()| stream.read(&mut [0]));
    match answered {
        Ok(bytes) => bytes > 0,
        Err(error) => !matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
    }
}

/// Task.Connect, which changes nothing; a refusal of it is an answer too.
fn question() -> Vec<u8> {
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: "Connect".to_owned(),
        payload: ConnectRequest::default().write_to_bytes().unwrap_or_default(),
        timeout_nano: i64::try_from(ANSWER.as_nanos()).unwrap_or_default(),
        ..ttrpc::Request::default()
    };
    let body = request.write_to_bytes().unwrap_or_default();
    let mut message: Vec<u8> =
        MessageHeader::new_request(1, u32::try_from(body.len()).unwrap_or_default()).into();
    message.extend(body);
    message
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_answers_or_is_slow_serves_and_who_ends_does_not() {
        let at = tempfile::tempdir().unwrap();
        let socket = at.path().join("s");
        assert!(!serves(&socket), "there is no socket");
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(serves_within(&socket, Duration::from_millis(50)), "silent is not dead");
        let _ = listener.accept().unwrap();

        let answers = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 10];
            stream.read_exact(&mut head).unwrap();
            stream.write_all(b"x").unwrap();
            listener
        });
        assert!(serves(&socket));
        let listener = answers.join().unwrap();

        // As a dying process: the connection is taken by the kernel alone, and then the socket goes.
        let dies = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(listener);
        });
        assert!(!serves(&socket));
        dies.join().unwrap();
        assert!(!serves(&socket));

        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let hangs_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
        assert!(!serves(&socket));
        hangs_up.join().unwrap();
    }
}
