use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;

use super::frame::MAX_LINE;
use super::{QmpClient, QmpError};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;
const SHORT: Duration = Duration::from_secs(5);

/// The other end of the socket: reads commands, writes whatever a test wants QEMU to say.
struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn command(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).await.unwrap();
    }

    async fn answer(&mut self, id: &Value, value: Value) {
        self.say(&format!("{}\r\n", json!({ "return": value, "id": id }))).await;
    }
}

async fn connected() -> (QmpClient, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(BufReader::new(theirs));
    let peer = async move {
        peer.say(&format!("{GREETING}\r\n")).await;
        let hello = peer.command().await;
        assert_eq!(hello["execute"], "qmp_capabilities");
        peer.answer(&hello["id"], json!({})).await;
        peer
    };
    let (client, peer) = tokio::join!(QmpClient::negotiate(ours, SHORT), peer);
    (client.unwrap(), peer)
}

fn closed_reason(result: Result<Value, QmpError>) -> String {
    match result {
        Err(QmpError::Closed { reason }) => reason.to_string(),
        other => panic!("expected a closed connection, got {other:?}"),
    }
}

#[tokio::test]
async fn answers_find_their_callers_in_any_order_and_between_events() {
    let (client, mut peer) = connected().await;
    let mut events = client.events();
    let qemu = async {
        let first = peer.command().await;
        let second = peer.command().await;
        peer.say("{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 12, \"microseconds\": 34}}\r\n{\"retu")
            .await;
        tokio::task::yield_now().await;
        peer.say(&format!("rn\": \"second\", \"id\": {}}}\n", second["id"])).await;
        peer.say("{\"timestamp\": {\"seconds\": 13, \"microseconds\": 0}, \"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n").await;
        peer.say(&format!(
            "{}\n",
            json!({"error": {"class": "GenericError", "desc": "no"}, "id": first["id"]})
        ))
        .await;
    };
    let (first, second, ()) =
        tokio::join!(client.execute("first", json!({})), client.execute("second", json!({"a": 1})), qemu);
    let refusal = first.unwrap_err().refusal().cloned().unwrap();
    assert_eq!(
        (refusal.command.as_str(), refusal.class.as_str(), refusal.desc.as_str()),
        ("first", "GenericError", "no")
    );
    assert_eq!(second.unwrap(), json!("second"));
    let stop = events.recv().await.unwrap();
    assert_eq!((stop.name.as_str(), stop.time.unix_nanos()), ("STOP", Some(12_000_034_000)));
    assert_eq!(events.recv().await.unwrap().data, json!({"status": "active"}));
}

#[tokio::test]
async fn a_null_answer_is_an_answer() {
    let (client, mut peer) = connected().await;
    let qemu = async {
        let command = peer.command().await;
        peer.answer(&command["id"], Value::Null).await;
    };
    let (answer, ()) = tokio::join!(client.execute("x", json!({})), qemu);
    assert_eq!(answer.unwrap(), Value::Null);
}

#[tokio::test]
async fn a_malformed_line_ends_the_connection_with_its_reason() {
    for (line, expected) in [
        ("{\"return\": {}\n", "EOF while parsing"),
        ("{\"surprise\": 1}\n", "neither a greeting"),
        ("{\"return\": {}}\n", "without an id"),
        ("{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n", "JSON parse error"),
        ("{\"event\": \"STOP\"}\n", "no timestamp"),
    ] {
        let (client, mut peer) = connected().await;
        let qemu = async {
            peer.command().await;
            peer.say(line).await;
        };
        let (answer, ()) = tokio::join!(client.execute("x", json!({})), qemu);
        let reason = closed_reason(answer);
        assert!(reason.contains(expected), "{line}: {reason}");
        assert_eq!(closed_reason(client.execute("later", json!({})).await), reason);
    }
}

#[tokio::test]
async fn an_oversized_line_is_refused_before_it_is_stored() {
    let (client, mut peer) = connected().await;
    let qemu = async {
        peer.command().await;
        let chunk = "x".repeat(64 * 1024);
        // The client may hang up while this is still being written.
        for _ in 0..(MAX_LINE / chunk.len() + 2) {
            if peer.0.get_mut().write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
    };
    let (answer, ()) = tokio::join!(client.execute("x", json!({})), qemu);
    assert!(closed_reason(answer).contains("longer than"));
}

#[tokio::test]
async fn a_socket_closed_in_the_middle_of_a_reply_fails_every_call_and_the_events() {
    let (client, mut peer) = connected().await;
    let mut events = client.events();
    let qemu = async move {
        peer.command().await;
        peer.command().await;
        peer.say("{\"return\": {\"half").await;
        drop(peer);
    };
    let (first, second, ()) =
        tokio::join!(client.execute("first", json!({})), client.execute("second", json!({})), qemu);
    assert!(closed_reason(first).contains("middle of a line"));
    assert!(closed_reason(second).contains("middle of a line"));
    assert!(events.recv().await.is_err());
    assert!(client.events().recv().await.is_err());
}

#[tokio::test]
async fn a_late_answer_reaches_nobody_else() {
    let (client, mut peer) = connected().await;
    let late = client.execute_within("slow", json!({}), Duration::from_millis(20)).await;
    assert!(matches!(late, Err(QmpError::Timeout { ref command, .. }) if command == "slow"), "{late:?}");
    let slow = peer.command().await;
    let qemu = async {
        let next = peer.command().await;
        peer.answer(&slow["id"], json!("late")).await;
        peer.answer(&next["id"], json!("mine")).await;
    };
    let (answer, ()) = tokio::join!(client.execute("next", json!({})), qemu);
    assert_eq!(answer.unwrap(), json!("mine"));
}

#[tokio::test]
async fn a_peer_that_is_not_qmp_is_refused() {
    for text in ["SSH-2.0-OpenSSH\n", "{\"return\": {}, \"id\": 1}\n", ""] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(text.as_bytes()).await.unwrap();
        drop(theirs);
        let refused = QmpClient::negotiate(ours, SHORT).await;
        assert!(matches!(refused, Err(QmpError::Greeting { .. })), "{refused:?}");
    }
    let (ours, _silent) = UnixStream::pair().unwrap();
    let refused = QmpClient::negotiate(ours, Duration::from_millis(20)).await;
    assert!(matches!(refused, Err(QmpError::Timeout { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (client, mut peer) = connected().await;
    let (kept, passed) = UnixStream::pair().unwrap();
    let passed = OwnedFd::from(passed.into_std().unwrap());
    let qemu = async {
        let stream = peer.0.get_mut();
        let (text, fd) = stream
            .async_io(Interest::READABLE, || {
                let mut bytes = [0; 512];
                let mut space = nix::cmsg_space!([i32; 1]);
                let mut slices = [IoSliceMut::new(&mut bytes)];
                let message = recvmsg::<()>(
                    stream.as_raw_fd(),
                    &mut slices,
                    Some(&mut space),
                    MsgFlags::MSG_CMSG_CLOEXEC,
                )?;
                let fds: Vec<i32> = message
                    .cmsgs()?
                    .flat_map(|control| match control {
                        ControlMessageOwned::ScmRights(fds) => fds,
                        _ => Vec::new(),
                    })
                    .collect();
                let length = message.bytes;
                assert_eq!(fds.len(), 1);
                // SAFETY: the kernel has just installed this descriptor for us and nobody else knows it.
                Ok((bytes[..length].to_vec(), unsafe { OwnedFd::from_raw_fd(fds[0]) }))
            })
            .await
            .unwrap();
        let command: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            (&command["execute"], &command["arguments"]["fdname"]),
            (&json!("getfd"), &json!("memory"))
        );
        peer.answer(&command["id"], json!({})).await;
        fd
    };
    let (result, fd) = tokio::join!(client.pass_fd("memory", passed), qemu);
    result.unwrap();
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true).unwrap();
    let mut received = UnixStream::from_std(stream).unwrap();
    received.write_all(b"hello\n").await.unwrap();
    let mut line = String::new();
    BufReader::new(kept).read_line(&mut line).await.unwrap();
    assert_eq!(line, "hello\n");
}

#[tokio::test]
async fn dropping_the_client_hangs_up() {
    let (client, mut peer) = connected().await;
    drop(client);
    let mut line = String::new();
    let read = tokio::time::timeout(SHORT, peer.0.read_line(&mut line)).await;
    assert_eq!(read.expect("the client hangs up").unwrap(), 0);
}
