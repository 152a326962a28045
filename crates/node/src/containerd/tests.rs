//! With a containerd of our own: private root, state and sockets, ended at the end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_client::services::v1 as api;
use containerd_client::tonic::Request;
use containerd_client::types::{Sandbox, sandbox};
use prost::Message;

use super::arrival::{Arrival, ArrivalError, Place, obstacles};
use super::arrivals::Arrivals;
use super::client::{Containerd, ContainerdError, optional};
use super::facts::{FactsError, Gathered, NetworkWish, gather, list, sandbox_named};
use super::stdio::{self, Streams};
use super::{RUNTIME, SANDBOX, SESSION, departure, record};
use crate::config::NodeConfig;
use crate::peer::leftover;
use crate::proto::{ContainerFacts, SandboxFacts, Stdio as Kinds, StreamKind};

const SNAPSHOTTER: &str = "native";
const NAMESPACE: &str = "default";

struct Host {
    dir: tempfile::TempDir,
    process: Child,
}

impl Host {
    /// Without a shim for our runtime: making a task is bound to fail, as on a broken host.
    fn start() -> Host {
        Host::with_path(tempfile::tempdir().unwrap(), "")
    }

    /// With runc's shim under the name of ours: tasks are real, machines are not.
    fn with_tasks() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let shim = Command::new("sh").args(["-c", "command -v containerd-shim-runc-v2"]).output().unwrap();
        let shim = String::from_utf8(shim.stdout).unwrap();
        assert!(!shim.is_empty(), "containerd-shim-runc-v2 is installed with containerd");
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        std::os::unix::fs::symlink(shim.trim(), dir.path().join("bin/containerd-shim-dunlin-v2")).unwrap();
        let path = format!("{}:", dir.path().join("bin").display());
        Host::with_path(dir, &path)
    }

    fn with_path(dir: tempfile::TempDir, before: &str) -> Host {
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            path("root"),
            path("state"),
            path("c.sock"),
            path("c.sock.ttrpc")
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("containerd")
            .arg("-c")
            .arg(dir.path().join("config.toml"))
            .env("PATH", format!("{before}{}", std::env::var("PATH").unwrap_or_default()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("containerd is installed");
        Host { dir, process }
    }

    async fn connect(&self) -> Containerd {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(containerd) = Containerd::connect(&self.dir.path().join("c.sock")).await
                && containerd.namespaces().await.is_ok()
            {
                return containerd;
            }
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "containerd does not come up: {}", log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn ctr(&self, arguments: &[&str]) {
        let output = Command::new("ctr")
            .arg("-a")
            .arg(self.dir.path().join("c.sock"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What unpacking an image leaves: a committed snapshot called `chain`.
    fn unpack(&self) {
        self.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "base"]);
        self.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "commit", "chain", "base"]);
    }

    fn streams(&self, facts: &ContainerFacts) -> Streams {
        let (io, log): (PathBuf, PathBuf) = (self.dir.path().join("io"), self.dir.path().join("log.d"));
        stdio::plan(&facts.stdio.unwrap(), &io, &log, NAMESPACE, &facts.id).unwrap()
    }

    fn arrival(&self, containerd: &Containerd, session: &str, facts: &ContainerFacts) -> Arrival {
        let place = Place { namespace: NAMESPACE.into(), sandbox: "s1".into(), session: session.into() };
        Arrival::new(containerd.clone(), place, facts.clone(), self.streams(facts))
    }

    /// A node's configuration whose directories are here.
    fn config(&self) -> NodeConfig {
        let at = |name: &str| self.dir.path().join(name);
        let text = format!(
            "name=\"b\"\nlisten=\"127.0.0.1:1\"\ndata_listen=\"127.0.0.1:2\"\nstate_dir={:?}\nio_dir={:?}",
            at("homes"),
            at("io")
        );
        NodeConfig::parse(Path::new("b"), &text).unwrap()
    }

    /// An image with one program, unpacked as `chain`.
    fn unpack_sleep(&self) {
        self.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "prepare", "base"]);
        let bin = self.dir.path().join("root/io.containerd.snapshotter.v1.native/snapshots/1/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::copy("/bin/busybox", bin.join("sleep")).expect("busybox-static is installed");
        self.ctr(&["snapshots", "--snapshotter", SNAPSHOTTER, "commit", "chain", "base"]);
    }
}

fn gone(result: Result<impl Sized, ContainerdError>) -> bool {
    optional(result).unwrap().is_none()
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn facts() -> ContainerFacts {
    ContainerFacts {
        id: "c1".into(),
        image: "docker.io/library/counter:1".into(),
        labels: [("who".to_owned(), "me".to_owned())].into(),
        snapshotter: SNAPSHOTTER.into(),
        snapshot_key: "c1".into(),
        snapshot_parent: "chain".into(),
        runtime: RUNTIME.into(),
        spec_type: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
        spec: br#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"process":{"args":["/bin/sh"],"cwd":"/","user":{}}}"#
            .to_vec(),
        stdio: Some(Kinds { stdout: StreamKind::Fifo.into(), ..Kinds::default() }),
        cri: None,
        in_record: false,
    }
}

#[tokio::test]
#[ignore = "starts containerd: needs root and containerd 1.6 or newer"]
async fn what_an_arrival_made_is_removed_and_nothing_else() {
    let host = Host::start();
    let containerd = host.connect().await;
    let facts = facts();

    let found = obstacles(&containerd, NAMESPACE, &facts).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].field, "image layers");
    assert!(found[0].way_out.contains("docker.io/library/counter:1"), "{found:?}");
    host.unpack();
    assert_eq!(obstacles(&containerd, NAMESPACE, &facts).await.unwrap(), Vec::new());
    let other = ContainerFacts { snapshotter: "nosuch".into(), ..facts.clone() };
    let found = obstacles(&containerd, NAMESPACE, &other).await.unwrap();
    assert_eq!(found.first().map(|mismatch| mismatch.field.as_str()), Some("snapshotter"), "{found:?}");

    // A sandbox's own record wants a containerd that keeps one.
    let record = Sandbox {
        sandbox_id: "s1".into(),
        runtime: Some(sandbox::Runtime { name: RUNTIME.into(), options: None }),
        ..Sandbox::default()
    };
    let sandbox = SandboxFacts {
        namespace: NAMESPACE.into(),
        id: "s1".into(),
        record: record.encode_to_vec(),
        ..SandboxFacts::default()
    };
    let keeps = match containerd.sandbox(NAMESPACE, "s1").await {
        Err(error) if error.is_no_service() => false,
        found => found.unwrap().is_none(),
    };
    let found = record::obstacles(&containerd, &sandbox).await.unwrap();
    let fields: Vec<_> = found.iter().map(|mismatch| mismatch.field.as_str()).collect();
    assert_eq!(fields, if keeps { [].as_slice() } else { &["sandbox record"] }, "{found:?}");
    assert_eq!(record::gather(&containerd, NAMESPACE, "s1").await.unwrap(), None);
    assert_eq!(containerd.sandboxes_labelled(NAMESPACE, SESSION).await.unwrap(), Vec::new());

    // The task cannot be made: no shim is found. Everything before it was.
    let mut arrivals = Arrivals::new(None, vec![host.arrival(&containerd, "one", &facts)]);
    let error = arrivals.create().await.unwrap_err();
    assert!(matches!(error, ArrivalError::Containerd(_)), "{error}");
    let made = containerd.container(NAMESPACE, "c1").await.unwrap();
    assert_eq!((made.labels["who"].as_str(), made.labels[SESSION].as_str()), ("me", "one"));
    assert!(containerd.snapshot(NAMESPACE, SNAPSHOTTER, "c1").await.is_ok());
    assert!(host.dir.path().join("io/default/c1/stdout").exists());
    let found = obstacles(&containerd, NAMESPACE, &facts).await.unwrap();
    let fields: Vec<_> = found.iter().map(|mismatch| mismatch.field.as_str()).collect();
    assert_eq!(fields, ["container id", "snapshot key"]);
    assert!(found.iter().all(|mismatch| mismatch.container == "c1"), "{found:?}");

    // A second arrival finds the container there, and must leave it.
    let mut second = Arrivals::new(None, vec![host.arrival(&containerd, "two", &facts)]);
    let error = second.create().await.unwrap_err();
    assert!(matches!(error, ArrivalError::Containerd(ContainerdError::Exists { .. })), "{error}");
    assert_eq!(second.remove().await, Vec::<String>::new());
    assert!(containerd.container(NAMESPACE, "c1").await.is_ok());

    assert_eq!(arrivals.remove().await, Vec::<String>::new());
    assert_eq!(arrivals.remove().await, Vec::<String>::new());
    assert!(gone(containerd.container(NAMESPACE, "c1").await));
    assert!(gone(containerd.snapshot(NAMESPACE, SNAPSHOTTER, "c1").await));
    assert!(containerd.snapshot(NAMESPACE, SNAPSHOTTER, "chain").await.is_ok());
    assert!(!host.dir.path().join("io/default/c1").exists());
}

#[tokio::test]
#[ignore = "starts containerd: needs root and containerd 1.6 or newer"]
async fn a_container_that_left_is_removed_once_and_one_that_cannot_move_says_why() {
    let host = Host::start();
    let containerd = host.connect().await;
    let facts = facts();
    assert!(containerd.version().await.unwrap().starts_with(|c: char| c == 'v' || c.is_ascii_digit()));

    let error = sandbox_named(&containerd, NAMESPACE, "c1").await.unwrap_err();
    assert!(matches!(error, FactsError::Unknown { .. }), "{error}");
    host.unpack();
    host.arrival(&containerd, "one", &facts).create().await.unwrap_err();

    let error = sandbox_named(&containerd, NAMESPACE, "other").await.unwrap_err().to_string();
    assert!(error.contains("there are: c1"), "{error}");
    assert_eq!(sandbox_named(&containerd, NAMESPACE, "c1").await.unwrap(), "s1");
    assert_eq!(sandbox_named(&containerd, NAMESPACE, "s1").await.unwrap(), "s1");
    for asked in ["c1", "s1"] {
        let error = gather(&containerd, NAMESPACE, "s1", asked, &NetworkWish::default())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("`c1` is not running (no task)"), "{error}");
    }
    host.ctr(&["containers", "create", "--snapshotter", SNAPSHOTTER, "--rootfs", "/tmp", "plain"]);
    let error = sandbox_named(&containerd, NAMESPACE, "plain").await.unwrap_err().to_string();
    assert!(error.contains("io.containerd.runc.v2") && error.contains("--runtime"), "{error}");
    let rows = list(&containerd, "").await.unwrap();
    let row = rows.iter().find(|row| row.id == "c1").unwrap();
    assert_eq!((row.state.as_str(), row.runtime.as_str()), ("no task", RUNTIME));
    assert_eq!(row.sandbox, "s1");
    assert_eq!(rows.iter().find(|row| row.id == "plain").unwrap().sandbox, "");

    let sandbox = SandboxFacts {
        namespace: NAMESPACE.into(),
        id: "s1".into(),
        containers: vec![facts],
        ..SandboxFacts::default()
    };
    assert_eq!(departure::remove(&containerd, &sandbox).await, Vec::<String>::new());
    assert!(gone(containerd.container(NAMESPACE, "c1").await));
    assert!(gone(containerd.snapshot(NAMESPACE, SNAPSHOTTER, "c1").await));
    assert_eq!(departure::remove(&containerd, &sandbox).await, Vec::<String>::new());
}

#[tokio::test]
#[ignore = "starts containerd: needs root and containerd 1.6 or newer"]
async fn the_next_life_of_a_node_removes_what_nobody_answers_for() {
    let host = Host::start();
    let (containerd, config) = (host.connect().await, host.config());
    host.unpack();
    let named = |id: &str| ContainerFacts { id: id.into(), snapshot_key: id.into(), ..facts() };
    let mut settled = host.arrival(&containerd, "one", &named("settled"));
    settled.create().await.unwrap_err();
    settled.settle().await.unwrap();
    settled.settle().await.unwrap();
    let labels = containerd.container(NAMESPACE, "settled").await.unwrap().labels;
    assert_eq!(labels, [("who".to_owned(), "me".to_owned())].into());
    for (session, id) in [("one", "left-1"), ("two", "left-2")] {
        host.arrival(&containerd, session, &named(id)).create().await.unwrap_err();
    }
    let there = async |id: &str| {
        let record = !gone(containerd.container(NAMESPACE, id).await);
        assert_eq!(record, !gone(containerd.snapshot(NAMESPACE, SNAPSHOTTER, id).await), "{id}");
        record
    };

    // Asked by one session's source, then swept as a whole.
    let left = leftover::remove_session(&config, &containerd, NAMESPACE, "one").await;
    assert_eq!(left, Vec::<String>::new());
    assert!(!there("left-1").await && there("left-2").await && there("settled").await);
    assert!(!host.dir.path().join("io/default/left-1").exists());
    // A sandbox that somebody serves is nobody's leftover.
    let home = host.dir.path().join("homes/default/s1");
    std::fs::create_dir_all(&home).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(home.join("s")).unwrap();
    std::fs::write(home.join("address"), format!("unix://{}\n", home.join("s").display())).unwrap();
    leftover::sweep(&config, &containerd).await;
    assert!(there("left-2").await);
    drop(listener);
    // A shim that cannot be asked is one to look at again: this one ends by itself.
    let mut shim = Command::new("sh").args(["-c", "sleep 2; exit", "shim", "-id", "s1"]).spawn().unwrap();
    std::fs::write(home.join("shim.pid"), shim.id().to_string()).unwrap();
    let waited = tokio::task::spawn_blocking(move || shim.wait());
    leftover::sweep(&config, &containerd).await;
    assert!(!there("left-2").await && there("settled").await);
    waited.await.unwrap().unwrap();
}

/// A pod of runc's shim, with ids of this test alone: runc's state is shared by the machine.
struct Pod<'a> {
    host: &'a Host,
    containerd: Containerd,
    tasks: api::tasks_client::TasksClient<containerd_client::tonic::transport::Channel>,
    id: String,
}

impl Pod<'_> {
    async fn new<'a>(host: &'a Host, name: &str) -> Pod<'a> {
        let containerd = host.connect().await;
        let channel = containerd_client::connect(host.dir.path().join("c.sock")).await.unwrap();
        let id = format!("dunlin-{}-{name}", std::process::id());
        Pod { host, containerd, tasks: api::tasks_client::TasksClient::new(channel), id }
    }

    /// A container's id from its short name; the pod's own is empty.
    fn named(&self, name: &str) -> String {
        if name.is_empty() { self.id.clone() } else { format!("{}-{name}", self.id) }
    }

    fn facts(&self, name: &str) -> ContainerFacts {
        let kind = if name.is_empty() { "sandbox" } else { "container" };
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": {
                "args": ["/bin/sleep", "300"], "cwd": "/", "user": { "uid": 0, "gid": 0 }
            },
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "annotations": {
                "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": self.id
            },
        });
        let id = self.named(name);
        ContainerFacts {
            snapshot_key: id.clone(),
            id,
            spec: spec.to_string().into_bytes(),
            stdio: Some(Kinds::default()),
            ..facts()
        }
    }

    fn arrival(&self, name: &str) -> Arrival {
        let place = Place { namespace: NAMESPACE.into(), sandbox: self.id.clone(), session: "one".into() };
        let facts = self.facts(name);
        let streams = self.host.streams(&facts);
        Arrival::new(self.containerd.clone(), place, facts, streams)
    }

    async fn start(&self, name: &str) {
        let request = api::StartRequest { container_id: self.named(name), exec_id: String::new() };
        self.tasks.clone().start(namespaced(request)).await.unwrap();
    }

    async fn kill(&self, name: &str) {
        let id = self.named(name);
        let request = api::KillRequest { container_id: id.clone(), signal: 9, ..Default::default() };
        self.tasks.clone().kill(namespaced(request)).await.unwrap();
        let waiting = api::WaitRequest { container_id: id, exec_id: String::new() };
        self.tasks.clone().wait(namespaced(waiting)).await.unwrap();
    }

    async fn pause(&self, name: &str) {
        let request = api::PauseTaskRequest { container_id: self.named(name) };
        self.tasks.clone().pause(namespaced(request)).await.unwrap();
    }

    async fn resume(&self, name: &str) {
        let request = api::ResumeTaskRequest { container_id: self.named(name) };
        self.tasks.clone().resume(namespaced(request)).await.unwrap();
    }
}

fn namespaced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().unwrap());
    request
}

#[tokio::test]
#[ignore = "starts containerd: needs root and containerd 1.6 or newer"]
async fn a_pod_is_read_made_and_removed_as_one() {
    let host = Host::with_tasks();
    let pod = Pod::new(&host, "pod").await;
    let containerd = &pod.containerd;
    host.unpack_sleep();

    // Made in order, all but one started; what each state is, is its shim's.
    let names = ["", "created", "ended", "paused", "runs"];
    let mut arrivals = Arrivals::new(None, names.map(|name| pod.arrival(name)).into());
    let pids = arrivals.create().await.unwrap();
    assert!(pids.len() == 5 && pids.iter().all(|pid| *pid > 0), "{pids:?}");
    for name in ["", "ended", "paused", "runs"] {
        pod.start(name).await;
    }
    pod.kill("ended").await;
    pod.pause("paused").await;
    arrivals.settle().await.unwrap();

    // One without a task, one of another runtime: neither moves.
    let bare = pod.facts("bare");
    let spec = || Some(prost_types::Any { type_url: bare.spec_type.clone(), value: bare.spec.clone() });
    for (name, runtime) in [("bare", RUNTIME), ("runc", "io.containerd.runc.v2")] {
        let container = api::Container {
            id: pod.named(name),
            runtime: Some(api::container::Runtime { name: runtime.into(), options: None }),
            spec: spec(),
            ..api::Container::default()
        };
        containerd.create_container(NAMESPACE, container).await.unwrap();
    }

    for asked in ["", "ended", "created"] {
        let asked = pod.named(asked);
        assert_eq!(sandbox_named(containerd, NAMESPACE, &asked).await.unwrap(), pod.id);
        let Gathered { sandbox, stays } =
            gather(containerd, NAMESPACE, &pod.id, &asked, &NetworkWish::default()).await.unwrap();
        assert_eq!(sandbox.ids(), names.map(|name| pod.named(name)));
        assert_eq!(sandbox.id, pod.id);
        assert_eq!(stays.len(), 1, "{stays:?}");
        assert!(stays[0].contains(&format!("container rm {}", pod.named("bare"))), "{stays:?}");
        assert!(sandbox.containers.iter().all(|container| container.snapshot_parent == "chain"));
    }
    let error = gather(containerd, NAMESPACE, &pod.id, &pod.named("bare"), &NetworkWish::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("-bare` is not running (no task)"), "{error}");
    let error = sandbox_named(containerd, NAMESPACE, &pod.named("runc")).await.unwrap_err();
    assert!(matches!(error, FactsError::Runtime { .. }), "{error}");
    let rows = list(containerd, NAMESPACE).await.unwrap();
    let states: Vec<_> =
        rows.iter().filter(|row| row.sandbox == pod.id).map(|row| row.state.as_str()).collect();
    assert_eq!(states, ["running", "no task", "created", "stopped", "paused", "running"]);

    // Nothing lives any more: what is left does not move, and goes as one.
    let Gathered { sandbox, .. } =
        gather(containerd, NAMESPACE, &pod.id, &pod.id, &NetworkWish::default()).await.unwrap();
    pod.resume("paused").await;
    for name in ["", "created", "paused", "runs"] {
        pod.kill(name).await;
    }
    let error = gather(containerd, NAMESPACE, &pod.id, &pod.id, &NetworkWish::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("is not running (stopped)"), "{error}");
    assert_eq!(departure::remove(containerd, &sandbox).await, Vec::<String>::new());
    for id in sandbox.ids() {
        assert!(gone(containerd.task(NAMESPACE, &id).await), "{id}");
        assert!(gone(containerd.container(NAMESPACE, &id).await), "{id}");
        assert!(gone(containerd.snapshot(NAMESPACE, SNAPSHOTTER, &id).await), "{id}");
    }
    assert_eq!(departure::remove(containerd, &sandbox).await, Vec::<String>::new());
    assert!(containerd.container(NAMESPACE, &pod.named("bare")).await.is_ok());
}

#[tokio::test]
#[ignore = "starts containerd: needs root and containerd 1.6 or newer"]
async fn a_pod_whose_last_container_cannot_be_made_leaves_nothing() {
    let host = Host::with_tasks();
    let pod = Pod::new(&host, "half").await;
    let containerd = &pod.containerd;
    host.unpack_sleep();
    let taken = api::Container {
        id: pod.named("taken"),
        labels: [("who".to_owned(), "another".to_owned())].into(),
        runtime: Some(api::container::Runtime { name: RUNTIME.into(), options: None }),
        spec: Some(prost_types::Any { type_url: "x".into(), value: b"{}".to_vec() }),
        ..api::Container::default()
    };
    containerd.create_container(NAMESPACE, taken).await.unwrap();

    let mut arrivals = Arrivals::new(None, ["", "web", "taken"].map(|name| pod.arrival(name)).into());
    let error = arrivals.create().await.unwrap_err().to_string();
    assert!(error.contains("-taken` ") && error.contains("exists already"), "{error}");
    let record = containerd.container(NAMESPACE, &pod.id).await.unwrap();
    let spec: serde_json::Value = serde_json::from_slice(&record.spec.unwrap().value).unwrap();
    assert_eq!(spec["annotations"][SANDBOX], pod.id);
    for name in ["", "web"] {
        assert!(!gone(containerd.task(NAMESPACE, &pod.named(name)).await), "{name}");
        pod.kill(name).await;
    }
    arrivals.delete_tasks().await.unwrap();
    assert_eq!(arrivals.remove().await, Vec::<String>::new());
    assert_eq!(arrivals.remove().await, Vec::<String>::new());
    for name in ["", "web"] {
        let id = pod.named(name);
        assert!(gone(containerd.task(NAMESPACE, &id).await), "{id}");
        assert!(gone(containerd.container(NAMESPACE, &id).await), "{id}");
        assert!(gone(containerd.snapshot(NAMESPACE, SNAPSHOTTER, &id).await), "{id}");
    }
    let kept = containerd.container(NAMESPACE, &pod.named("taken")).await.unwrap();
    assert_eq!(kept.labels["who"], "another");
}

#[tokio::test]
async fn a_missing_containerd_names_its_socket() {
    let error = Containerd::connect(Path::new("/nonexistent/c.sock")).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent/c.sock") && error.contains("is it running"), "{error}");
}
