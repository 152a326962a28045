//! Processes that end while the link is away, and hosts that do not resume.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dunlin_bridge::host::Bridge;
use dunlin_bridge::message::{
    ContainerNotification, GuestPid, Modification, NotificationType, ProcessParameters,
    VsockStdioRelaySettings,
};
use dunlin_bridge::stdio::{Resume, plain};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Host, LIMIT, Lines, config, layers, sh};

/// More than a stream keeps and a pipe holds.
const MANY_LINES: usize = 40_000;
/// Long enough for everything below to end unless it waits for the host.
const AWAY: Duration = Duration::from_secs(6);
/// How far the guest's clock may be from ours, which it is told by a message that a busy host delivers late.
const CLOCK: Duration = Duration::from_secs(5);

async fn all(mut output: DuplexStream) -> String {
    let mut text = String::new();
    timeout(LIMIT, output.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

async fn code(host: &Host, container: &str, pid: GuestPid) -> u32 {
    timeout(LIMIT, host.bridge.wait(container, pid, None)).await.unwrap().unwrap().code
}

pub(super) async fn run(host: &mut Host, ends: &mut mpsc::Receiver<ContainerNotification>, socket: &Path) {
    ended_while_away(host, ends, socket).await;
    plain_streams(host, socket).await;
}

async fn ended_while_away(host: &mut Host, ends: &mut mpsc::Receiver<ContainerNotification>, socket: &Path) {
    println!("== processes that end while the link is away");
    host.modify(Modification::add(layers("four"))).await;
    let script = "read word; echo read; sleep 1; echo last $word; exit 8";
    host.bridge.create("four", &config("four", script)).await.unwrap();
    let (input, connections) = host.port();
    let (mut typed, fifo) = tokio::io::duplex(64);
    tokio::spawn(async move {
        let sender = dunlin_bridge::stdio::Sender::default();
        dunlin_bridge::stdio::send(&sender, fifo, connections, std::future::pending()).await
    });
    let (port, mut output) = host.output();
    let parameters =
        ProcessParameters { create_std_in_pipe: true, create_std_out_pipe: true, ..Default::default() };
    let stdio = VsockStdioRelaySettings {
        std_in: Some(input),
        std_out: Some(port),
        resumable: true,
        ..Default::default()
    };
    let init = host.bridge.execute("four", &parameters, Some(stdio)).await.unwrap();
    let init_wait = host.bridge.begin_wait("four", init, None).unwrap();
    let begun = SystemTime::now();
    let (short, short_output) = host.exec("four", sh("sleep 1; echo short; exit 11"), None).await.unwrap();
    let short_wait = host.bridge.begin_wait("four", short, None).unwrap();
    let many =
        format!("sleep 1; i=0; while [ $i -lt {MANY_LINES} ]; do echo line $i; i=$((i+1)); done; exit 12");
    let (long, long_output) = host.exec("four", sh(&many), None).await.unwrap();
    let mut tty = sh("sleep 1; echo on a terminal; stty size; exit 13");
    tty["terminal"] = true.into();
    let (terminal, terminal_output) = host.exec("four", tty, None).await.unwrap();
    let (copy, copy_output) = host
        .exec("four", sh("sleep 2; cat; exit 14"), Some(Box::leak(vec![b'x'; 300_000].into_boxed_slice())))
        .await
        .unwrap();
    host.lose_the_link(socket, AWAY).await;
    let back = SystemTime::now();
    let exit = timeout(LIMIT, short_wait.exit()).await.unwrap().unwrap();
    assert_eq!(exit.code, 11);
    let at = exit.at.unwrap();
    let before = back.duration_since(at).expect("it ended while the link was away");
    assert!(before > Duration::from_secs(1), "{before:?}");
    assert!(at + CLOCK > begun, "it ended before it began: {at:?}");
    assert_eq!(all(short_output).await, "short\n");
    assert_eq!(code(host, "four", terminal).await, 13);
    assert_eq!(all(terminal_output).await, "on a terminal\r\n40 120\r\n");
    assert_eq!(code(host, "four", long).await, 12);
    let text = all(long_output).await;
    assert!(text.lines().eq((0..MANY_LINES).map(|n| format!("line {n}"))), "{} bytes", text.len());
    assert_eq!(code(host, "four", copy).await, 14);
    assert_eq!(all(copy_output).await.len(), 300_000);

    // The end of an init ends all that runs in its container.
    println!("== so does an init, and another host asks");
    typed.write_all(b"words\n").await.unwrap();
    let mut word = [0; 5];
    timeout(LIMIT, output.read_exact(&mut word)).await.unwrap().unwrap();
    assert_eq!(&word, b"read\n");
    host.lose_the_link(socket, AWAY).await;
    let back = SystemTime::now();
    let exit = timeout(LIMIT, init_wait.exit()).await.unwrap().unwrap();
    assert_eq!(exit.code, 8);
    assert!(back.duration_since(exit.at.unwrap()).unwrap() > Duration::from_secs(1), "{exit:?}");
    assert_eq!(all(output).await, "last words\n");
    let end = timeout(LIMIT, ends.recv()).await.unwrap().unwrap();
    assert_eq!((end.base.container_id.as_str(), end.kind), ("four", NotificationType::UnexpectedExit));
    assert!(timeout(Duration::from_millis(500), ends.recv()).await.is_err(), "its end is told twice");
    let first = host.bridge.wait("four", init, None).await.unwrap();

    host.bridge = Bridge::new(host.bridge.next_id());
    host.lose_the_link(socket, Duration::from_millis(300)).await;
    assert!(host.bridge.capabilities().unwrap().speaks_dunlin());
    for (pid, expected) in [(init, 8), (short, 11), (long, 12), (terminal, 13), (copy, 14)] {
        let told = host.bridge.wait("four", pid, Some(Duration::from_millis(500))).await.unwrap();
        assert_eq!(told.code, expected, "another host is told otherwise");
        assert!(told.at.is_some());
    }
    assert_eq!(host.bridge.wait("four", init, None).await.unwrap(), first, "the time stays");
    tear_down(host, "four").await;
}

async fn tear_down(host: &Host, container: &str) {
    host.modify(Modification::remove(layers(container))).await;
    host.bridge.delete_state(container).await.unwrap();
}

struct PlainExec {
    pid: GuestPid,
    output: DuplexStream,
    /// The guest has connected its output twice.
    again: Arc<AtomicBool>,
}

async fn plain_exec(host: &mut Host, script: &str, with_input: bool) -> PlainExec {
    let (port, mut connections) = host.port();
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    let again = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&again);
    tokio::spawn(async move {
        let stream = connections.recv().await.unwrap();
        let _ = plain::receive(stream, theirs).await;
        // Other hosts close their listener here.
        seen.store(connections.recv().await.is_some(), Ordering::SeqCst);
    });
    let std_in = with_input.then(|| {
        let (port, mut connections) = host.port();
        tokio::spawn(async move {
            // More never comes, nor an end.
            let (mut typed, fifo) = tokio::io::duplex(64);
            typed.write_all(b"typed\n").await.unwrap();
            let _ = plain::send(fifo, connections.recv().await.unwrap()).await;
        });
        port
    });
    let parameters = ProcessParameters {
        oci_process: Some(sh(script)),
        create_std_in_pipe: std_in.is_some(),
        create_std_out_pipe: true,
        ..Default::default()
    };
    let stdio = VsockStdioRelaySettings { std_in, std_out: Some(port), ..Default::default() };
    let pid = host.bridge.execute("five", &parameters, Some(stdio)).await.unwrap();
    PlainExec { pid, output: ours, again }
}

async fn plain_streams(host: &mut Host, socket: &Path) {
    println!("== a host that does not resume");
    host.modify(Modification::add(layers("five"))).await;
    let script =
        "trap 'echo bye; exit 9' TERM; i=0; while true; do echo tick $i; i=$((i+1)); sleep 0.1; done";
    host.bridge.create("five", &config("five", script)).await.unwrap();
    let (port, connections) = host.port();
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    tokio::spawn(async move {
        if let Ok(ended) = plain::receive_replayed(connections, theirs, &Resume::at(0)).await {
            ended.linger().await;
        }
    });
    let parameters = ProcessParameters { create_std_out_pipe: true, ..Default::default() };
    let stdio = VsockStdioRelaySettings { std_out: Some(port), ..Default::default() };
    let init = host.bridge.execute("five", &parameters, Some(stdio)).await.unwrap();
    let mut lines: Lines = BufReader::new(ours).lines();
    while timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().as_deref() != Some("tick 5") {}

    let mut exec = plain_exec(host, "echo before; sleep 15; echo after; exit 3", false).await;
    let mut reader = plain_exec(host, "cat; echo input has ended; exit 4", true).await;
    for (output, expected) in [(&mut exec.output, "before\n"), (&mut reader.output, "typed\n")] {
        let mut text = vec![0u8; expected.len()];
        timeout(LIMIT, output.read_exact(&mut text)).await.unwrap().unwrap();
        assert_eq!(text, expected.as_bytes());
    }
    host.lose_the_link(socket, Duration::from_millis(500)).await;
    let told = code(host, "five", exec.pid).await;
    assert_eq!(told, 3, "an exit does not wait for output that nobody will take");
    assert_eq!(code(host, "five", reader.pid).await, 4, "its input does not end");
    assert_eq!(all(exec.output).await, "");
    assert!(!exec.again.load(Ordering::SeqCst) && !reader.again.load(Ordering::SeqCst));

    // The last 128 KiB come again, which is all so far; then it goes on, and to its end.
    let mut again = false;
    let mut last = 5;
    // On a slow machine more than these have come before the break.
    while last < 40 || (!again && last < 1000) {
        let line = timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().unwrap();
        // The break may have cut a line.
        let Some(number) = line.rsplit("tick ").next().and_then(|n| n.parse::<u64>().ok()) else { continue };
        again |= number == 0;
        assert!(!again || number == 0 || number == last + 1, "{number} after {last}");
        last = number;
    }
    assert!(again, "nothing was repeated");
    host.bridge.signal("five", init, Some(15)).await.unwrap();
    assert_eq!(code(host, "five", init).await, 9);
    let mut rest = Vec::new();
    while let Some(line) = timeout(LIMIT, lines.next_line()).await.unwrap().unwrap() {
        rest.push(line);
    }
    assert_eq!(rest.last().map(String::as_str), Some("bye"));
    tear_down(host, "five").await;
}
