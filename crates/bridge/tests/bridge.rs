//! Host and guest over in-memory connections that are cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use dunlin_bridge::frame::{Frame, MAX_FROM_GUEST, MAX_FROM_HOST, MessageType};
use dunlin_bridge::guest::{Failure, Handler, ServeError, Server, ShutdownKind};
use dunlin_bridge::host::{Bridge, BridgeError};
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    Base64, ContainerConfig, ContainerNotification, ENTRIES_MAX, FileEntry, FileKind, FileOffset,
    FilesAnswer, FilesList, FilesStep, GuestPid, Modification, NegotiateRequest, NotificationType,
    ProcessExit, ProcessParameters, PropertyType, READ_MAX, Request, Resource, SchemaVersion, ScsiDevice,
    VsockStdioRelaySettings,
};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const SOON: Duration = Duration::from_secs(10);

/// When the fake guest says that each process ended.
fn ended() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789)
}

/// Answers at once, except to waits, which end when `exit` is set.
struct Fake {
    executed: AtomicU32,
    clock: AtomicU32,
    exit: watch::Sender<Option<u32>>,
    stacks: usize,
}

impl Fake {
    fn new() -> Arc<Fake> {
        Arc::new(Fake {
            executed: AtomicU32::new(0),
            clock: AtomicU32::new(0),
            exit: watch::Sender::new(None),
            stacks: 10,
        })
    }
}

fn known(container: &str) -> Result<(), Failure> {
    if container == "c" {
        return Ok(());
    }
    Err(Failure::new(HResult::SYSTEM_NOT_FOUND, format!("container {container} is not known")))
}

impl Handler for Fake {
    async fn negotiated(&self, host: &NegotiateRequest) {
        if host.host_time_unix_nanos.is_some() {
            self.clock.fetch_add(1, Ordering::SeqCst);
        }
    }
    async fn create(&self, container: String, _: ContainerConfig) -> Result<(), Failure> {
        known(&container)
    }
    async fn start(&self, container: String) -> Result<(), Failure> {
        known(&container)
    }
    async fn shutdown(&self, container: String, _: ShutdownKind) -> Result<(), Failure> {
        known(&container)
    }
    async fn execute(
        &self,
        container: String,
        _: ProcessParameters,
        _: VsockStdioRelaySettings,
    ) -> Result<GuestPid, Failure> {
        known(&container)?;
        let pid = self.executed.fetch_add(1, Ordering::SeqCst) + 1;
        let mut exit = self.exit.subscribe();
        let _ = exit.wait_for(Option::is_some).await;
        Ok(GuestPid(pid))
    }
    async fn wait(&self, _: String, _: GuestPid, timeout: Option<Duration>) -> Result<ProcessExit, Failure> {
        let mut exit = self.exit.subscribe();
        let waited = async { exit.wait_for(Option::is_some).await.ok().and_then(|code| *code) };
        match tokio::time::timeout(timeout.unwrap_or(Duration::MAX), waited).await {
            Ok(Some(code)) => Ok(ProcessExit { code, at: Some(ended()) }),
            Ok(None) => panic!("on purpose"),
            Err(_) => Err(Failure::new(HResult::TIMEOUT, "still running")),
        }
    }
    async fn signal(&self, _: String, _: GuestPid, signal: i32) -> Result<(), Failure> {
        Err(Failure::new(HResult::FAIL, format!("signal {signal}")))
    }
    async fn resize(&self, _: String, _: GuestPid, _: u16, _: u16) -> Result<(), Failure> {
        panic!("on purpose")
    }
    async fn properties(&self, _: String, kinds: Vec<PropertyType>) -> Result<Value, Failure> {
        Ok(json!({ "asked": kinds.len() }))
    }
    async fn modify(&self, _: String, modification: Modification) -> Result<(), Failure> {
        assert_eq!(
            modification,
            Modification::remove(Resource::ScsiDevice(ScsiDevice { controller: 1, lun: 2 }))
        );
        Ok(())
    }
    async fn files(&self, place: String, step: FilesStep) -> Result<FilesAnswer, Failure> {
        match step {
            FilesStep::Read(at) => {
                let whole = vec![7; READ_MAX + 5];
                let from = usize::try_from(at.offset).unwrap().min(whole.len());
                let part = whole[from..].iter().copied().take(READ_MAX).collect();
                Ok(FilesAnswer { data: Base64(part), ..FilesAnswer::default() })
            }
            FilesStep::Compare(list) => {
                let lacking = (0..u32::try_from(list.entries.len()).unwrap()).collect();
                Ok(FilesAnswer { lacking, ..FilesAnswer::default() })
            }
            other => Err(Failure::new(HResult::FAIL, format!("{place}: {other:?}"))),
        }
    }
    async fn pause(&self, container: String) -> Result<(), Failure> {
        known(&container)
    }
    async fn resume(&self, container: String) -> Result<(), Failure> {
        known(&container)
    }
    async fn dump_stacks(&self) -> Result<String, Failure> {
        Ok("s".repeat(self.stacks))
    }
    async fn delete_state(&self, container: String) -> Result<(), Failure> {
        known(&container)
    }
}

type Serving = JoinHandle<Result<(), ServeError>>;

/// One connection; aborting what is returned cuts it.
async fn connect(bridge: &Bridge, server: &Server<Fake>) -> Serving {
    let (host, guest) = tokio::io::duplex(1 << 16);
    let server = server.clone();
    let serving = tokio::spawn(async move { server.serve(guest).await });
    let capabilities = bridge.attach(host).await.unwrap();
    assert!(capabilities.speaks_dunlin());
    serving
}

async fn cut(bridge: &Bridge, serving: Serving) {
    serving.abort();
    let mut connected = bridge.connected();
    tokio::time::timeout(SOON, connected.wait_for(|connected| !connected)).await.unwrap().unwrap();
}

#[tokio::test]
async fn requests_are_answered_and_failures_carry_code_and_text() {
    let fake = Fake::new();
    let (bridge, server) = (Bridge::new(0), Server::new(fake.clone()));
    let _serving = connect(&bridge, &server).await;
    assert_eq!(fake.clock.load(Ordering::SeqCst), 1);
    let config = ContainerConfig {
        schema_version: SchemaVersion::V21,
        oci_bundle_path: "/b".into(),
        oci_specification: json!({}),
        scratch_dir_path: "/s".into(),
    };
    bridge.create("c", &config).await.unwrap();
    let error = bridge.create("d", &config).await.unwrap_err();
    assert_eq!(error.hresult(), Some(HResult::SYSTEM_NOT_FOUND));
    assert!(error.to_string().contains("container d is not known"), "{error}");
    let old = ContainerConfig { schema_version: SchemaVersion { major: 2, minor: 0 }, ..config };
    assert_eq!(bridge.create("c", &old).await.unwrap_err().hresult(), Some(HResult::INVALID_JSON));
    bridge.pause("c").await.unwrap();
    bridge.resume("c").await.unwrap();
    let scsi = Modification::remove(Resource::ScsiDevice(ScsiDevice { controller: 1, lun: 2 }));
    bridge.modify("c", &scsi).await.unwrap();
    assert_eq!(bridge.properties("c", &[PropertyType::Statistics]).await.unwrap(), json!({"asked": 1}));
    assert!(bridge.signal("c", GuestPid(1), None).await.unwrap_err().to_string().contains("signal 9"));
    let expired = bridge.wait("c", GuestPid(1), Some(Duration::from_millis(20))).await.unwrap_err();
    assert_eq!(expired.hresult(), Some(HResult::TIMEOUT));
    // A handler's panic is an answer too.
    assert_eq!(bridge.resize("c", GuestPid(1), 1, 1).await.unwrap_err().hresult(), Some(HResult::FAIL));
    assert_eq!(bridge.dump_stacks().await.unwrap().len(), 10);
}

#[tokio::test]
async fn a_request_across_lost_connections_runs_once_and_is_answered() {
    let fake = Fake::new();
    let (bridge, server) = (Bridge::new(0), Server::new(fake.clone()));
    // Asked before there is any connection.
    let asked = {
        let bridge = bridge.clone();
        tokio::spawn(async move { bridge.execute("c", &ProcessParameters::default(), None).await })
    };
    for _ in 0..3 {
        let serving = connect(&bridge, &server).await;
        // One answered request: what was sent before it has been seen by the guest.
        bridge.pause("c").await.unwrap();
        cut(&bridge, serving).await;
    }
    // The answer becomes ready while nobody is connected.
    fake.exit.send_replace(Some(0));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!asked.is_finished());
    let _serving = connect(&bridge, &server).await;
    let pid = tokio::time::timeout(SOON, asked).await.unwrap().unwrap().unwrap();
    assert_eq!(pid, GuestPid(1));
    assert_eq!(fake.executed.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn exits_and_waits_come_after_a_reconnect() {
    let fake = Fake::new();
    let (bridge, server) = (Bridge::new(0), Server::new(fake.clone()));
    let mut notifications = bridge.notifications();
    let serving = connect(&bridge, &server).await;
    let wait = bridge.begin_wait("c", GuestPid(1), None).unwrap();
    bridge.pause("c").await.unwrap();
    cut(&bridge, serving).await;
    server.notify(&ContainerNotification::exit("c", NotificationType::ForcedExit));
    fake.exit.send_replace(Some(137));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _serving = connect(&bridge, &server).await;
    let wait = tokio::time::timeout(SOON, wait.exit()).await.unwrap().unwrap();
    assert_eq!(wait, ProcessExit { code: 137, at: Some(ended()) });
    let exit = tokio::time::timeout(SOON, notifications.recv()).await.unwrap().unwrap();
    assert_eq!((exit.base.container_id.as_str(), exit.kind), ("c", NotificationType::ForcedExit));
}

#[tokio::test]
async fn another_host_gets_no_answers_of_the_first() {
    let fake = Fake::new();
    let server = Server::new(fake.clone());
    let source = Bridge::new(0);
    let serving = connect(&source, &server).await;
    let old = source.begin_wait("c", GuestPid(1), None).unwrap();
    source.pause("c").await.unwrap();
    cut(&source, serving).await;
    let destination = Bridge::new(source.next_id());
    let _serving = connect(&destination, &server).await;
    let adopted = destination.adopt_wait(old.id()).unwrap();
    let fresh = destination.begin_wait("c", GuestPid(1), None).unwrap();
    assert!(fresh.id() >= source.next_id());
    fake.exit.send_replace(Some(3));
    assert_eq!(tokio::time::timeout(SOON, fresh.exit()).await.unwrap().unwrap().code, 3);
    destination.pause("c").await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), adopted.exit()).await.is_err());
}

#[tokio::test]
async fn an_answer_too_large_for_a_host_is_a_failure_and_the_bridge_stays() {
    let fake = Arc::new(Fake { stacks: 70_000, ..Arc::into_inner(Fake::new()).unwrap() });
    let (bridge, server) = (Bridge::new(0), Server::new(fake));
    let _serving = connect(&bridge, &server).await;
    let error = bridge.dump_stacks().await.unwrap_err();
    assert!(error.to_string().contains("hosts take 65536"), "{error}");
    bridge.pause("c").await.unwrap();
}

#[tokio::test]
async fn close_fails_all_calls() {
    let (bridge, server) = (Bridge::new(0), Server::new(Fake::new()));
    let _serving = connect(&bridge, &server).await;
    let wait = bridge.begin_wait("c", GuestPid(1), None).unwrap();
    bridge.close();
    assert!(matches!(wait.exit().await, Err(BridgeError::Closed)));
    assert!(matches!(bridge.pause("c").await, Err(BridgeError::Closed)));
    let (host, guest) = tokio::io::duplex(1 << 16);
    let serving = tokio::spawn(async move { server.serve(guest).await });
    assert!(matches!(bridge.attach(host).await, Err(BridgeError::Closed)));
    let _ = tokio::time::timeout(SOON, serving).await.unwrap();
}

#[tokio::test]
async fn nothing_is_served_before_negotiation_and_no_other_version() {
    let server = Server::new(Fake::new());
    let (mut host, guest) = tokio::io::duplex(1 << 16);
    let serving = tokio::spawn(async move { server.serve(guest).await });
    let pause = Request::PauseContainer.message_type();
    let request =
        Frame { message: pause, id: 1, body: Bytes::from_static(br#"{"ContainerId":"c","ActivityId":""}"#) };
    host.write_all(&request.encode()).await.unwrap();
    let answer = Frame::read(&mut host, MAX_FROM_GUEST).await.unwrap();
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.message, body["Result"].as_i64()), (pause.response(), Some(-2_147_467_263)));
    assert!(body.get("ActivityId").is_none());
    let negotiate = Frame {
        message: Request::NegotiateProtocol.message_type(),
        id: 2,
        body: Bytes::from_static(
            br#"{"ContainerId":"","ActivityId":"","MinimumVersion":5,"MaximumVersion":6}"#,
        ),
    };
    host.write_all(&negotiate.encode()).await.unwrap();
    let answer = Frame::read(&mut host, MAX_FROM_GUEST).await.unwrap();
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["Result"].as_i64(), Some(-1_070_137_076));
    assert!(matches!(serving.await.unwrap(), Err(ServeError::Version { minimum: 5, maximum: 6 })));
}

#[tokio::test]
async fn a_host_that_takes_no_answers_is_not_listened_to_until_it_does() {
    const ASKED: u64 = 20_000;
    let server = Server::new(Fake::new());
    let (host, guest) = tokio::io::duplex(4096);
    let serving = tokio::spawn(async move { server.serve(guest).await });
    let (mut answers, mut requests) = tokio::io::split(host);
    let ask = |request: Request, id: u64, body: &'static [u8]| {
        Frame { message: request.message_type(), id, body: Bytes::from_static(body) }.encode()
    };
    let hello =
        br#"{"ContainerId":"","ActivityId":"","MinimumVersion":4,"MaximumVersion":4,"HostInstance":"a"}"#;
    requests.write_all(&ask(Request::NegotiateProtocol, 0, hello)).await.unwrap();
    assert_eq!(Frame::read(&mut answers, MAX_FROM_GUEST).await.unwrap().id, 0);
    let (asked, mut written) = watch::channel(0);
    let asking = tokio::spawn(async move {
        for id in 1..=ASKED {
            let request = ask(Request::PauseContainer, id, br#"{"ContainerId":"c","ActivityId":""}"#);
            requests.write_all(&request).await.unwrap();
            asked.send_replace(id);
        }
        requests
    });
    // Until it does not get on any more.
    while tokio::time::timeout(Duration::from_millis(500), written.changed()).await.is_ok() {}
    assert!(*written.borrow() < 2000, "{} requests were taken, and no answer was", *written.borrow());
    for _ in 0..ASKED {
        let answer = tokio::time::timeout(SOON, Frame::read(&mut answers, MAX_FROM_GUEST)).await;
        answer.expect("each is answered").unwrap();
    }
    drop(asking.await.unwrap());
    serving.abort();
}

/// A guest that is not ours, by hand.
async fn upstream(guest: &mut DuplexStream, before: &[Frame]) {
    let asked = Frame::read(guest, MAX_FROM_HOST).await.unwrap();
    for frame in before {
        guest.write_all(&frame.encode()).await.unwrap();
    }
    let body =
        br#"{"Result":0,"Version":4,"Capabilities":{"RuntimeOsType":"Linux","GuestDefinedCapabilities":{}}}"#;
    let answer = Frame { message: asked.message.response(), id: asked.id, body: Bytes::from_static(body) };
    guest.write_all(&answer.encode()).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_is_not_ours_is_never_asked_twice_and_its_early_words_are_kept() {
    let bridge = Bridge::new(100);
    let early = [
        Frame {
            message: MessageType::NOTIFICATION,
            id: 0,
            body: Bytes::from_static(
                br#"{"ContainerId":"c","Type":"UnexpectedExit","Operation":"None","Result":0}"#,
            ),
        },
        Frame {
            message: Request::WaitForProcess.message_type().response(),
            id: 7,
            body: Bytes::from_static(br#"{"Result":0,"ExitCode":5}"#),
        },
    ];
    let (host, mut guest) = tokio::io::duplex(1 << 16);
    let (attached, ()) = tokio::join!(bridge.attach(host), upstream(&mut guest, &early));
    assert!(!attached.unwrap().speaks_dunlin());
    assert_eq!(bridge.capabilities().map(|guest| guest.speaks_dunlin()), Some(false));
    assert_eq!(bridge.notifications().recv().await.unwrap().base.container_id, "c");
    let exit = bridge.adopt_wait(7).unwrap().exit().await.unwrap();
    assert_eq!(exit, ProcessExit { code: 5, at: None }, "such a guest does not say when");

    let first = bridge.begin_wait("c", GuestPid(1), None).unwrap();
    assert_eq!(Frame::read(&mut guest, MAX_FROM_HOST).await.unwrap().id, first.id());
    drop(guest);
    let mut connected = bridge.connected();
    connected.wait_for(|connected| !connected).await.unwrap();
    let second = bridge.begin_wait("c", GuestPid(2), None).unwrap();
    let (host, mut guest) = tokio::io::duplex(1 << 16);
    let (attached, ()) = tokio::join!(bridge.attach(host), upstream(&mut guest, &[]));
    attached.unwrap();
    // The first was written to the lost connection: such a guest still has it.
    assert_eq!(Frame::read(&mut guest, MAX_FROM_HOST).await.unwrap().id, second.id());
    let late = Frame { id: first.id(), ..early[1].clone() };
    guest.write_all(&late.encode()).await.unwrap();
    assert_eq!(tokio::time::timeout(SOON, first.exit()).await.unwrap().unwrap().code, 5);
}

#[tokio::test]
async fn answers_about_files_fit_their_frames() {
    let bridge = Bridge::new(1);
    let server = Server::new(Fake::new());
    let _serving = connect(&bridge, &server).await;
    let entry = FileEntry {
        path: "a-directory/and-a-file-in-it".into(),
        kind: FileKind::File { size: 1, digest: "0".repeat(64) },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: -1,
        mtime_nanos: 999_999_999,
    };
    let list = FilesList { entries: vec![entry; ENTRIES_MAX] };
    let answer = bridge.files("/run/mounts/copies/c/0", FilesStep::Compare(list)).await.unwrap();
    assert_eq!(answer.lacking.len(), ENTRIES_MAX);
    let read = async |offset: usize| {
        let step = FilesStep::Read(FileOffset { offset: offset as u64 });
        bridge.files("/run/mounts/copies/c/0", step).await.unwrap().data.0
    };
    assert_eq!(read(0).await, vec![7; READ_MAX]);
    assert_eq!(read(READ_MAX).await, vec![7; 5]);
    assert_eq!(read(READ_MAX + 5).await, Vec::<u8>::new());
    let refused = bridge.files("/x", FilesStep::Remove).await.unwrap_err().to_string();
    assert!(refused.contains("/x: Remove"), "{refused}");
}
