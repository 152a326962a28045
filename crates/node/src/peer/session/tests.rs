//! An arriving move against a shim that is half real: a process of its own, which must be gone
//! after an abort, and a Migration service in this one, which notes what it was asked.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dunlin_migration::notice::Phase as Told;
use dunlin_wire::service as wire;
use dunlin_wire::service_ttrpc::{Migration, create_migration};
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;
use crate::containerd::Containerd;
use crate::peer::incoming::{Incoming, IncomingError};
use crate::peer::leftover::has_come_whole;
use crate::proto::{ContainerFacts, Stdio};
use crate::shim::process::Process;

#[derive(Default)]
struct Notes {
    asked: Mutex<Vec<String>>,
    /// What the shim has told by now, when a test says so.
    told: Mutex<Vec<wire::Phase>>,
}

impl Notes {
    fn note(&self, call: &str, session: &str) {
        self.asked.lock().unwrap().push(format!("{call} {session}"));
    }
}

struct Service(Arc<Notes>);

#[async_trait::async_trait]
impl Migration for Service {
    async fn import_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::ImportSandboxRequest,
    ) -> ttrpc::Result<wire::ImportSandboxResponse> {
        self.0.note("import", &request.session_id);
        assert_eq!(request.sandbox_id, "s1");
        if request.config.value == b"bad" {
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "vm.machine: pc-i440fx is unknown");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        Ok(wire::ImportSandboxResponse::new())
    }
    async fn cancel(
        &self,
        _: &TtrpcContext,
        request: wire::CancelRequest,
    ) -> ttrpc::Result<wire::CancelResponse> {
        self.0.note("cancel", &request.session_id);
        Ok(wire::CancelResponse::new())
    }
    async fn finalize_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::FinalizeSandboxRequest,
    ) -> ttrpc::Result<wire::FinalizeSandboxResponse> {
        match request.action.enum_value() {
            Ok(wire::FinalizeAction::FINALIZE_ACTION_STOP) => self.0.note("stop", &request.session_id),
            Ok(wire::FinalizeAction::FINALIZE_ACTION_RESUME) => {
                let handoff = request.handoff.unwrap_or_default();
                let what = format!("resume with {} of {} bytes for", handoff.type_url, handoff.value.len());
                self.0.note(&what, &request.session_id);
            }
            other => panic!("{other:?}"),
        }
        Ok(wire::FinalizeSandboxResponse::new())
    }
    async fn notifications(
        &self,
        _: &TtrpcContext,
        request: wire::NotificationsRequest,
        stream: ttrpc::r#async::ServerStreamSender<wire::NotificationsResponse>,
    ) -> ttrpc::Result<()> {
        let after = request.after_message_id.expect("a coordinator misses nothing");
        let all = self.0.told.lock().unwrap().clone();
        if !all.is_empty() {
            for phase in all {
                let mut told = wire::NotificationsResponse::new();
                told.notification.mut_or_insert_default().phase = phase.into();
                stream.send(&told).await?;
            }
            // More may come: the stream stays open.
            return std::future::pending().await;
        }
        let mut told = wire::NotificationsResponse { message_id: after + 1, ..Default::default() };
        if after == 7 {
            told.notification.mut_or_insert_default().missed = 2;
        } else {
            told.notification.mut_or_insert_default().phase = wire::Phase::PHASE_DONE.into();
        }
        stream.send(&told).await
    }
    async fn cleanup(
        &self,
        _: &TtrpcContext,
        request: wire::CleanupRequest,
    ) -> ttrpc::Result<wire::CleanupResponse> {
        self.0.note("cleanup", &request.session_id);
        Ok(wire::CleanupResponse::new())
    }
}

struct Node {
    dir: tempfile::TempDir,
    config: Arc<NodeConfig>,
    incoming: Incoming,
    notes: Arc<Notes>,
    _server: Server,
}

impl Node {
    async fn start() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let home = at("state/ns/s1");
        // Told to start, it leaves a process that carries the sandbox's id, and the service's address.
        let script = format!(
            "#!/bin/sh\nmkdir -p {home}\nsh -c 'sleep 300; :' s1 >/dev/null 2>&1 &\necho $! > {home}/shim.pid\n\
             echo unix://{socket} > {home}/address\n",
            home = home.display(),
            socket = at("shim.sock").display()
        );
        std::fs::write(at("shim.txt"), script).unwrap();
        assert!(
            std::process::Command::new("cp").arg(at("shim.txt")).arg(at("shim")).status().unwrap().success()
        );
        std::fs::set_permissions(at("shim"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let text = format!(
            "name=\"b\"\nlisten=\"127.0.0.1:1\"\ndata_listen=\"127.0.0.1:2\"\nshim={:?}\nstate_dir={:?}\nio_dir={:?}\nlog_dir={:?}",
            at("shim"),
            at("state"),
            at("io"),
            at("log")
        );
        let config = NodeConfig::parse(Path::new("b"), &text).unwrap();
        let notes = Arc::new(Notes::default());
        let mut server = Server::new()
            .bind(&format!("unix://{}", at("shim.sock").display()))
            .unwrap()
            .register_service(create_migration(Arc::new(Service(Arc::clone(&notes)))));
        server.start().await.unwrap();
        let config = Arc::new(config);
        let incoming = Incoming::new(Arc::clone(&config), Containerd::unreachable());
        Node { dir, config, incoming, notes, _server: server }
    }

    fn begin(&self, session: &str, from: &str) -> Result<Arc<Session>, IncomingError> {
        self.bring(session, from, "s1", &["s1", "c1"])
    }

    fn bring(
        &self,
        session: &str,
        from: &str,
        sandbox: &str,
        containers: &[&str],
    ) -> Result<Arc<Session>, IncomingError> {
        let container = |id: &&str| ContainerFacts {
            id: (*id).into(),
            spec: b"{}".to_vec(),
            stdio: Some(Stdio::default()),
            ..ContainerFacts::default()
        };
        let facts = SandboxFacts {
            namespace: "ns".into(),
            id: sandbox.into(),
            containers: containers.iter().map(container).collect(),
            ..SandboxFacts::default()
        };
        self.incoming.begin(session, from, facts, &["memory".to_owned(), "disk:1".to_owned()])
    }

    fn shim(&self) -> Process {
        let pid = std::fs::read_to_string(self.dir.path().join("state/ns/s1/shim.pid")).unwrap();
        Process::find(pid.trim().parse().unwrap()).expect("the shim lives")
    }

    fn asked(&self) -> Vec<String> {
        self.notes.asked.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn an_abort_leaves_neither_a_process_nor_an_address() {
    let node = Node::start().await;
    let session = node.begin("s-1", "a").unwrap();
    session.import(Any::default()).await.unwrap();
    session.import(Any::default()).await.unwrap();
    assert_eq!(session.stage(), "imported");
    let shim = node.shim();
    // containerd is not there: the tasks cannot be made.
    let error = session.create_tasks().await.unwrap_err();
    assert!(matches!(error, SessionError::Arrival(_)), "{error}");
    // Half made: neither tried again nor gone on with.
    assert_eq!(session.stage(), "half made");
    assert!(matches!(session.create_tasks().await, Err(SessionError::OutOfTurn { .. })));
    assert!(matches!(session.prepare(0).await, Err(SessionError::OutOfTurn { .. })));
    let aborted = node.incoming.abort("s-1", "a", "ns", "s1").await.unwrap();
    assert!(aborted.stopped && !aborted.runs, "{aborted:?}");
    assert!(!shim.lives());
    assert!(!node.dir.path().join("state/ns/s1/address").exists());
    assert_eq!(node.asked(), ["import s-1", "cancel s-1", "stop s-1", "cleanup s-1"]);
    // Repeated, and too late to be revived.
    assert!(node.incoming.abort("s-1", "a", "ns", "s1").await.unwrap().stopped);
    assert!(matches!(node.begin("s-1", "a"), Err(IncomingError::Aborted(_))));
}

#[tokio::test]
async fn a_handoff_as_large_as_they_come_reaches_the_shim() {
    let node = Node::start().await;
    let session = node.begin("s-1", "a").unwrap();
    session.import(Any::default()).await.unwrap();
    let (shim, _watching) = session.watch().unwrap();
    let handoff = Any { type_url: "h".into(), value: vec![255; 3 << 20], ..Any::default() };
    shim.resume(false, Some(handoff)).await.unwrap();
    shim.resume(false, None).await.unwrap();
    assert_eq!(
        node.asked()[1..],
        ["resume with h of 3145728 bytes for s-1", "resume with  of 0 bytes for s-1"]
    );
    assert!(node.incoming.abort("s-1", "a", "ns", "s1").await.unwrap().stopped);
}

#[tokio::test]
async fn a_watch_goes_on_after_what_was_heard() {
    let node = Node::start().await;
    let session = node.begin("s-1", "a").unwrap();
    session.import(Any::default()).await.unwrap();
    let (shim, _watching) = session.watch().unwrap();
    let mut told = shim.notifications(3).await.unwrap();
    let done = told.recv().await.unwrap().unwrap();
    assert_eq!((done.message_id, crate::peer::remote::notice(&done).unwrap().phase), (4, Told::Done));
    assert!(told.recv().await.unwrap().is_none());
    let gap = shim.notifications(7).await.unwrap().recv().await.unwrap().unwrap();
    assert!(crate::peer::remote::notice(&gap).unwrap_err().contains("2 before it"));
    assert!(node.incoming.abort("s-1", "a", "ns", "s1").await.unwrap().stopped);
}

#[tokio::test]
async fn a_later_life_of_the_node_ends_the_shim_that_an_earlier_one_started() {
    let node = Node::start().await;
    node.begin("s-1", "a").unwrap().import(Any::default()).await.unwrap();
    let shim = node.shim();
    let home = ShimHome::new(&node.config.state_dir, "ns", "s1");
    let beginning = [wire::Phase::PHASE_SETUP_DONE, wire::Phase::PHASE_TRANSFER_IN_PROGRESS];
    node.notes.told.lock().unwrap().extend(beginning);
    assert!(!has_come_whole(&home, "s-1").await);
    node.notes.told.lock().unwrap().push(wire::Phase::PHASE_DONE);
    assert!(has_come_whole(&home, "s-1").await);
    // Only the source's word ends a machine that has come whole.
    let later = Incoming::new(Arc::clone(&node.config), Containerd::unreachable());
    let aborted = later.abort("s-1", "a", "ns", "s1").await.unwrap();
    assert!(aborted.stopped && !aborted.runs, "{aborted:?}");
    assert!(!shim.lives());
    assert_eq!(node.asked(), ["import s-1", "cancel s-1", "stop s-1", "cleanup s-1"]);
    // What it could not look for is told.
    assert!(
        aborted.warnings.iter().all(|warning| warning.contains("containers of session s-1")),
        "{aborted:?}"
    );
    assert_eq!(aborted.warnings.len(), 1);
}

#[tokio::test]
async fn a_state_that_the_shim_refuses_is_told_in_its_words() {
    let node = Node::start().await;
    let session = node.begin("s-1", "a").unwrap();
    let error = session.import(Any { value: b"bad".to_vec(), ..Any::default() }).await.unwrap_err();
    assert!(error.to_string().contains("vm.machine: pc-i440fx is unknown"), "{error}");
    let shim = node.shim();
    assert!(node.incoming.abort("s-1", "a", "ns", "s1").await.unwrap().stopped);
    assert!(!shim.lives());
}

#[tokio::test]
async fn requests_out_of_turn_and_of_others_change_nothing() {
    let node = Node::start().await;
    let session = node.begin("s-1", "a").unwrap();
    assert!(matches!(session.run(None).await, Err(SessionError::OutOfTurn { .. })));
    assert!(matches!(session.prepare(0).await, Err(SessionError::OutOfTurn { .. })));
    assert!(matches!(session.transfer(Duration::from_secs(1)).await, Err(SessionError::OutOfTurn { .. })));
    assert!(matches!(session.cleanup().await, Err(SessionError::OutOfTurn { .. })));
    assert!(matches!(node.begin("s-1", "c"), Err(IncomingError::NotYours { .. })));
    assert!(matches!(node.begin("s-2", "a"), Err(IncomingError::Busy { .. })));
    assert!(matches!(node.incoming.abort("s-1", "c", "ns", "s1").await, Err(IncomingError::NotYours { .. })));
    assert!(session.admit(Stream::Memory).is_ok());
    assert!(session.admit(Stream::Memory).is_err());
    assert!(session.admit("disk:7".parse().unwrap()).is_err());
    assert_eq!(node.asked(), Vec::<String>::new());
}

#[tokio::test]
async fn one_name_arrives_once_at_a_time_and_a_sandbox_is_never_empty() {
    let node = Node::start().await;
    let _arriving = node.begin("s-1", "a").unwrap();
    for (sandbox, containers) in [("s1", &["x"][..]), ("s2", &["s2", "c1"])] {
        let refused = node.bring("s-2", "a", sandbox, containers);
        assert!(matches!(refused, Err(IncomingError::Busy { .. })), "{sandbox}: {refused:?}");
    }
    let many: Vec<String> = (0..257).map(|number| format!("c{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for containers in [&[][..], &["x", "y", "x"], &["x", "../y"], &many] {
        let refused = node.bring("s-3", "a", "s3", containers);
        assert!(matches!(refused, Err(IncomingError::Field(_) | IncomingError::Stdio(_))), "{refused:?}");
    }
    assert!(node.bring("s-4", "a", "s4", &["s4", "other"]).is_ok());
    let rows = node.incoming.rows();
    let row = rows.iter().find(|row| row.session == "s-1").unwrap();
    assert_eq!((row.sandbox.as_str(), row.containers.join(" ").as_str()), ("s1", "s1 c1"));
}

#[tokio::test]
async fn a_session_that_never_came_is_confirmed_stopped() {
    let node = Node::start().await;
    assert!(node.incoming.abort("never", "a", "ns", "s1").await.unwrap().stopped);
    assert!(matches!(node.begin("never", "a"), Err(IncomingError::Aborted(_))));
    assert!(node.incoming.abort("x", "a", "../ns", "s1").await.is_err());
}
