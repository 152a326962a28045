//! The whole path without a VM: link, bridge, stdio; and a move from one host to another.

use std::path::Path;
use std::time::Duration;

use dunlin_bridge::BRIDGE_PORT;
use dunlin_bridge::host::Bridge;
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    ContainerConfig, GuestPid, ProcessParameters, SchemaVersion, VsockStdioRelaySettings,
};
use dunlin_bridge::stdio::{self, Connect, Resume, Sender};
use dunlin_link::LinkStream;
use dunlin_link::host::{Endpoint, HostLink, PortListener};
use dunlin_testkit::{FakeGuest, Finish, Script};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

struct Accept(PortListener);

impl Connect for Accept {
    type Stream = LinkStream;
    async fn connect(&mut self) -> Option<LinkStream> {
        self.0.accept().await
    }
}

struct Host {
    link: HostLink,
    bridge: Bridge,
    attaching: JoinHandle<()>,
}

impl Host {
    async fn connect(socket: &Path, first_id: u64) -> Host {
        let link = HostLink::connect(Endpoint::VirtioSerial { socket: socket.to_owned() }).await.unwrap();
        let bridge = Bridge::new(first_id);
        let mut listener = link.listen(BRIDGE_PORT).unwrap();
        let attach_to = bridge.clone();
        let attaching = tokio::spawn(async move {
            while let Some(stream) = listener.accept().await {
                let _ = attach_to.attach(stream).await;
            }
        });
        Host { link, bridge, attaching }
    }

    fn receive(&self, port: u32, resume: Resume) -> (DuplexStream, JoinHandle<()>) {
        let (out, sink) = tokio::io::duplex(512);
        let accept = Accept(self.link.listen(port).unwrap());
        let task = tokio::spawn(async move {
            if let Ok(ended) = stdio::receive(accept, sink, &resume).await {
                ended.linger().await;
            }
        });
        (out, task)
    }

    async fn vanish(self) {
        self.attaching.abort();
        self.bridge.close();
        self.link.close().await;
    }
}

fn config() -> ContainerConfig {
    ContainerConfig {
        schema_version: SchemaVersion::V21,
        oci_bundle_path: "/run/gcs/pods/c/c".into(),
        oci_specification: serde_json::json!({}),
        scratch_dir_path: String::new(),
    }
}

fn resumable(std_in: Option<u32>, std_out: u32) -> Option<VsockStdioRelaySettings> {
    Some(VsockStdioRelaySettings { std_in, std_out: Some(std_out), std_err: None, resumable: true })
}

fn counted(lines: u64) -> String {
    (0..lines).map(|line| format!("{line}\n")).collect()
}

#[tokio::test]
async fn a_container_prints_and_its_exit_comes_after_its_output() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("link.sock");
    let guest = FakeGuest::start(&socket, Script::count(5000, Duration::ZERO, 7));
    let host = Host::connect(&socket, 0).await;
    host.link.start();
    let (mut out, _relay) = host.receive(0x4000_0001, Resume::at(0));
    host.bridge.create("c", &config()).await.unwrap();
    assert_eq!(
        host.bridge.create("c", &config()).await.unwrap_err().hresult(),
        Some(HResult::SYSTEM_ALREADY_EXISTS)
    );
    let stdio = resumable(None, 0x4000_0001);
    let pid = host.bridge.execute("c", &ProcessParameters::default(), stdio).await.unwrap();
    let wait = host.bridge.begin_wait("c", pid, None).unwrap();
    let mut text = String::new();
    timeout(SOON, out.read_to_string(&mut text)).await.unwrap().unwrap();
    assert!(text == counted(5000));
    assert_eq!(timeout(SOON, wait.exit()).await.unwrap().unwrap().code, 7);
    assert_eq!(host.bridge.signal("c", pid, None).await.unwrap_err().hresult(), Some(HResult::NOT_FOUND));
    host.bridge.delete_state("c").await.unwrap();
    let journal = guest.journal();
    assert_eq!(journal[..3], ["negotiate", "create c", "create c"], "{journal:?}");
}

#[tokio::test]
async fn input_is_echoed_and_its_end_ends_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("link.sock");
    let guest = FakeGuest::start(&socket, Script::default());
    guest.script_init("c", Script { then: Finish::Cat, ..Script::default() });
    let host = Host::connect(&socket, 0).await;
    host.link.start();
    let (mut out, _relay) = host.receive(0x4000_0002, Resume::at(0));
    let (mut client, fifo) = tokio::io::duplex(64);
    let accept = Accept(host.link.listen(0x4000_0001).unwrap());
    tokio::spawn(async move { stdio::send(&Sender::default(), fifo, accept, std::future::pending()).await });
    host.bridge.create("c", &config()).await.unwrap();
    let stdio = resumable(Some(0x4000_0001), 0x4000_0002);
    let pid = host.bridge.execute("c", &ProcessParameters::default(), stdio).await.unwrap();
    client.write_all(b"hello, process").await.unwrap();
    drop(client);
    let mut text = String::new();
    timeout(SOON, out.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "hello, process");
    assert_eq!(timeout(SOON, host.bridge.wait("c", pid, None)).await.unwrap().unwrap().code, 0);
}

#[tokio::test]
async fn a_guest_that_moves_goes_on_without_losing_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let (a, b) = (directory.path().join("a.sock"), directory.path().join("b.sock"));
    let guest = FakeGuest::start(&a, Script::count(2000, Duration::from_millis(1), 3));
    let source = Host::connect(&a, 0).await;
    source.link.start();
    let resume = Resume::at(0);
    let (mut out, relay) = source.receive(0x4000_0001, resume.clone());
    source.bridge.create("c", &config()).await.unwrap();
    let stdio = resumable(None, 0x4000_0001);
    let pid: GuestPid = source.bridge.execute("c", &ProcessParameters::default(), stdio).await.unwrap();
    let mut before = vec![0; 1000];
    timeout(SOON, out.read_exact(&mut before)).await.unwrap().unwrap();
    let next_id = source.bridge.next_id();

    relay.abort();
    source.vanish().await;
    guest.move_to(&b);
    // What the aborted relay had put in the client's pipe is the client's.
    let mut rest = Vec::new();
    timeout(SOON, out.read_to_end(&mut rest)).await.unwrap().unwrap();
    before.extend_from_slice(&rest);
    assert_eq!(resume.total(), Some(before.len() as u64));

    let destination = Host::connect(&b, next_id).await;
    let (mut out, _relay) = destination.receive(0x4000_0001, Resume::at(before.len() as u64));
    destination.link.start();
    let wait = destination.bridge.begin_wait("c", pid, None).unwrap();
    let mut after = Vec::new();
    timeout(SOON, out.read_to_end(&mut after)).await.unwrap().unwrap();
    before.extend_from_slice(&after);
    assert!(before == counted(2000).into_bytes());
    assert_eq!(timeout(SOON, wait.exit()).await.unwrap().unwrap().code, 3);
}

#[tokio::test]
async fn input_and_output_that_are_held_move_without_losing_or_repeating_a_byte() {
    const STDIN: u32 = 0x4000_0001;
    const STDOUT: u32 = 0x4000_0002;
    let directory = tempfile::tempdir().unwrap();
    let socket = |host: usize| directory.path().join(format!("{host}.sock"));
    let guest = FakeGuest::start(&socket(0), Script::default());
    guest.script_init("c", Script { then: Finish::Cat, ..Script::default() });
    let typed: Vec<u8> = counted(40_000).into_bytes();
    let mut rest = typed.as_slice();
    let mut printed = Vec::new();
    let (mut sender, mut resume, mut next_id) = (Sender::default(), Resume::at(0), 0);
    let mut pid = None;
    for host_number in 0..4 {
        let host = Host::connect(&socket(host_number), next_id).await;
        let (mut out, relay) = host.receive(STDOUT, resume.clone());
        let (mut client, fifo) = tokio::io::duplex(16 * 1024);
        let accept = Accept(host.link.listen(STDIN).unwrap());
        let sending = sender.clone();
        let input =
            tokio::spawn(async move { stdio::send(&sending, fifo, accept, std::future::pending()).await });
        host.link.start();
        if host_number == 0 {
            host.bridge.create("c", &config()).await.unwrap();
            let stdio = resumable(Some(STDIN), STDOUT);
            pid = Some(host.bridge.execute("c", &ProcessParameters::default(), stdio).await.unwrap());
        }
        if host_number == 3 {
            client.write_all(rest).await.unwrap();
            drop(client);
            timeout(SOON, out.read_to_end(&mut printed)).await.unwrap().unwrap();
            let exit = host.bridge.wait("c", pid.unwrap(), None);
            assert_eq!(timeout(SOON, exit).await.unwrap().unwrap().code, 0);
            break;
        }
        let mut piece = vec![0; 30_000 + 777 * host_number];
        let now = &rest[..piece.len() + 10_000];
        let (written, read) =
            timeout(SOON, async { tokio::join!(client.write_all(now), out.read_exact(&mut piece)) })
                .await
                .unwrap();
        written.unwrap();
        read.unwrap();
        printed.extend_from_slice(&piece);
        sender.limit(4096);
        let position = sender.hold();
        let total = resume.hold().unwrap();
        input.abort();
        relay.abort();
        // What this host's client has written and the relay has not read is still the client's.
        let read = usize::try_from(position.acknowledged).unwrap() + position.pending.len();
        rest = &typed[read..];
        timeout(SOON, out.read_to_end(&mut printed)).await.unwrap().unwrap();
        assert_eq!(total, printed.len() as u64);
        next_id = host.bridge.next_id();
        host.vanish().await;
        guest.move_to(&socket(host_number + 1));
        (sender, resume) = (Sender::at(position), Resume::at(total));
    }
    assert!(printed == typed, "{} of {} bytes", printed.len(), typed.len());
}

#[tokio::test]
async fn an_init_on_a_host_that_does_not_resume_repeats_itself_after_a_break() {
    let directory = tempfile::tempdir().unwrap();
    let (a, b) = (directory.path().join("a.sock"), directory.path().join("b.sock"));
    let guest = FakeGuest::start(&a, Script::count(3000, Duration::from_millis(1), 5));
    let plain_output = |host: &Host| {
        let (out, sink) = tokio::io::duplex(1 << 20);
        let accept = Accept(host.link.listen(0x4000_0001).unwrap());
        tokio::spawn(async move {
            if let Ok(ended) = stdio::plain::receive_replayed(accept, sink, &Resume::at(0)).await {
                ended.linger().await;
            }
        });
        out
    };
    let source = Host::connect(&a, 0).await;
    let mut out = plain_output(&source);
    source.link.start();
    source.bridge.create("c", &config()).await.unwrap();
    let stdio = VsockStdioRelaySettings { std_out: Some(0x4000_0001), ..Default::default() };
    let pid = source.bridge.execute("c", &ProcessParameters::default(), Some(stdio)).await.unwrap();
    let mut before = vec![0; 1000];
    timeout(SOON, out.read_exact(&mut before)).await.unwrap().unwrap();
    let next_id = source.bridge.next_id();
    source.vanish().await;
    guest.move_to(&b);

    let destination = Host::connect(&b, next_id).await;
    let mut out = plain_output(&destination);
    destination.link.start();
    let mut after = String::new();
    timeout(SOON, out.read_to_string(&mut after)).await.unwrap().unwrap();
    assert!(after == counted(3000), "all of it is within the tail");
    let exit = timeout(SOON, destination.bridge.wait("c", pid, None)).await.unwrap().unwrap();
    assert_eq!(exit.code, 5);
}
