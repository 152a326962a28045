//! containerd of one host through its gRPC API: containers with annotations, execs with FIFOs of the
//! caller's choice, and answers with times, none of which `ctr` gives.

use std::{
    collections::HashMap,
    future::Future,
    thread,
    time::{Duration, SystemTime},
};

use containerd_client::{
    services::v1::{
        CloseIoRequest, Container as Record, CreateContainerRequest, CreateTaskRequest,
        DeleteContainerRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest,
        GetContainerRequest, GetRequest, KillRequest, Namespace, ResizePtyRequest, StartRequest,
        UpdateNamespaceRequest, UpdateTaskRequest, WaitRequest,
        container::Runtime,
        containers_client::ContainersClient,
        namespaces_client::NamespacesClient,
        snapshots::{
            PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
            snapshots_client::SnapshotsClient,
        },
        tasks_client::TasksClient,
    },
    tonic::{Code, Request, Response, Status, transport::Channel},
    types::v1::Process,
};
use prost_types::{Any, FieldMask, Timestamp};
use serde_json::{Value, json};
use tokio::{runtime::Handle, sync::oneshot};

use crate::{Host, Lab};

const CALL: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "default";
const RUNTIME: &str = "io.containerd.dunlin.v2";
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// A runtime that runs by itself, so that calls, waits and events go on beside the case.
pub struct Background {
    /// Where to spawn.
    pub handle: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Background {
    /// Starts it.
    ///
    /// # Panics
    /// When there can be no runtime.
    pub fn start() -> Background {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let thread = thread::spawn(move || {
            let _ = runtime.block_on(ended);
        });
        Background { handle, end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// How a process ended, as containerd tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// 0 to 255.
    pub code: u32,
    /// When, by the guest's clock.
    pub at: SystemTime,
}

impl Ended {
    /// containerd's two fields.
    ///
    /// # Panics
    /// When the time is missing or before 1970.
    pub fn new(code: u32, at: Option<Timestamp>) -> Ended {
        let at = at.expect("an exit has a time");
        Ended { code, at: SystemTime::try_from(at).expect("a time after 1970") }
    }
}

/// Paths on the host; empty: not connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// A FIFO that the process reads.
    pub stdin: String,
    /// A FIFO that the process writes.
    pub stdout: String,
    /// A FIFO that the process writes.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// What all containers of the demo image have in common: containerd's own spec of it and its layers.
#[derive(Clone, Debug)]
pub struct Template {
    spec: Value,
    image: String,
    snapshotter: String,
    parent: String,
}

/// containerd of one host.
#[derive(Clone)]
pub struct Containerd {
    /// Whose it is.
    pub host: Host,
    handle: Handle,
    pub(crate) channel: Channel,
}

pub(crate) fn with_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("an ASCII header value"));
    request
}

fn json_any(kind: &str, value: &Value) -> Any {
    Any { type_url: kind.to_owned(), value: value.to_string().into_bytes() }
}

impl Containerd {
    /// Connects to a host's.
    ///
    /// # Panics
    /// When nobody listens.
    pub fn connect(lab: &Lab, host: Host, background: &Background) -> Containerd {
        let socket = lab.run_path(host, "/run/containerd/containerd.sock");
        let handle = background.handle.clone();
        let channel = handle.block_on(containerd_client::connect(socket));
        let channel = channel.unwrap_or_else(|error| panic!("containerd on host {host}: {error}"));
        Containerd { host, handle, channel }
    }

    /// Waits for an answer.
    fn ask<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let answer = self.handle.block_on(async { tokio::time::timeout(CALL, call).await });
        let answer =
            answer.unwrap_or_else(|_| panic!("host {}: {what}: no answer after {CALL:?}", self.host));
        answer.map(Response::into_inner)
    }

    #[track_caller]
    fn must<T>(&self, what: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> T {
        self.ask(what, call).unwrap_or_else(|status| {
            panic!("host {}: {what}: {} ({:?})", self.host, status.message(), status.code())
        })
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    /// Reads what `ctr` makes of the demo image.
    ///
    /// # Panics
    /// When that fails.
    pub fn template(&self, lab: &Lab) -> Template {
        let id = "template";
        lab.ctr(self.host, &["containers", "create", crate::Container::IMAGE, id]).ok();
        let record = self.record(id);
        let stat =
            StatSnapshotRequest { snapshotter: record.snapshotter.clone(), key: record.snapshot_key.clone() };
        let stat = self.must("stat of a snapshot", self.snapshots().stat(with_namespace(stat)));
        lab.ctr(self.host, &["containers", "rm", id]).ok();
        let spec = record.spec.expect("a container has a spec").value;
        Template {
            spec: serde_json::from_slice(&spec).expect("a spec is JSON"),
            image: record.image,
            snapshotter: record.snapshotter,
            parent: stat.info.expect("a snapshot has facts").parent,
        }
    }

    fn record(&self, id: &str) -> Record {
        let request = GetContainerRequest { id: id.to_owned() };
        let answer = self.must(&format!("container {id}"), self.containers().get(with_namespace(request)));
        answer.container.expect("the answer has the container")
    }

    /// Makes snapshot, container and task of `id`; nothing runs in it yet.
    ///
    /// # Panics
    /// When one of them is refused.
    #[track_caller]
    pub fn create(
        &self,
        template: &Template,
        id: &str,
        notes: &[(&str, &str)],
        args: &[String],
        stdio: &Stdio,
    ) {
        let mut spec = template.spec.clone();
        let notes: HashMap<&str, &str> = notes.iter().copied().collect();
        spec["annotations"] = json!(notes);
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(stdio.terminal);
        spec["linux"]["cgroupsPath"] = json!(format!("/{NAMESPACE}/{id}"));
        let prepare = PrepareSnapshotRequest {
            snapshotter: template.snapshotter.clone(),
            key: id.to_owned(),
            parent: template.parent.clone(),
            labels: HashMap::new(),
        };
        let rootfs =
            self.must(&format!("snapshot {id}"), self.snapshots().prepare(with_namespace(prepare))).mounts;
        let container = Record {
            id: id.to_owned(),
            image: template.image.clone(),
            runtime: Some(Runtime { name: RUNTIME.to_owned(), options: None }),
            spec: Some(json_any(SPEC, &spec)),
            snapshotter: template.snapshotter.clone(),
            snapshot_key: id.to_owned(),
            ..Record::default()
        };
        let create = CreateContainerRequest { container: Some(container) };
        self.must(&format!("create of container {id}"), self.containers().create(with_namespace(create)));
        let task = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..CreateTaskRequest::default()
        };
        self.must(&format!("create of task {id}"), self.tasks().create(with_namespace(task)));
    }

    /// Adds an exec; it does not run yet.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn exec(&self, template: &Template, id: &str, exec: &str, args: &[String], stdio: &Stdio) {
        let mut process = template.spec["process"].clone();
        process["args"] = json!(args);
        process["terminal"] = json!(stdio.terminal);
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            spec: Some(json_any(PROCESS, &process)),
            exec_id: exec.to_owned(),
        };
        self.must(&format!("exec {exec} in {id}"), self.tasks().exec(with_namespace(request)));
    }

    /// Starts an init (exec id "") or an exec; gives its pid.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn start(&self, id: &str, exec: &str) -> u32 {
        let request = StartRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        self.must(&format!("start of {id} {exec}"), self.tasks().start(with_namespace(request))).pid
    }

    /// What containerd says of a process, its streams included.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn process(&self, id: &str, exec: &str) -> Process {
        let request = GetRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        let answer = self.must(&format!("state of {id} {exec}"), self.tasks().get(with_namespace(request)));
        answer.process.expect("the answer has the process")
    }

    /// Sends a signal to one process.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn kill(&self, id: &str, exec: &str, signal: u32) {
        let request =
            KillRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), signal, all: false };
        self.must(&format!("signal {signal} to {id} {exec}"), self.tasks().kill(with_namespace(request)));
    }

    /// Ends a process's input.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn close_stdin(&self, id: &str, exec: &str) {
        let request = CloseIoRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), stdin: true };
        self.must(&format!("end of input of {id} {exec}"), self.tasks().close_io(with_namespace(request)));
    }

    /// Makes a process's terminal another size, in characters.
    pub fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<(), Status> {
        let request = ResizePtyRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            width: columns,
            height: rows,
        };
        self.ask(&format!("resize of {id} {exec}"), self.tasks().resize_pty(with_namespace(request)))
    }

    /// Changes a task's limits. `resources`: OCI LinuxResources.
    pub fn update(&self, id: &str, resources: &Value) -> Result<(), Status> {
        let request = UpdateTaskRequest {
            container_id: id.to_owned(),
            resources: Some(json_any(RESOURCES, resources)),
            annotations: HashMap::new(),
        };
        self.ask(&format!("update of {id}"), self.tasks().update(with_namespace(request)))
    }

    /// Deletes an exec, or with exec id "" a task, its container and its snapshot. Gives how it ended.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn delete(&self, id: &str, exec: &str) -> Ended {
        if !exec.is_empty() {
            let request = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
            let what = format!("delete of {id} {exec}");
            let gone = self.must(&what, self.tasks().delete_process(with_namespace(request)));
            return Ended::new(gone.exit_status, gone.exited_at);
        }
        let record = self.record(id);
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        let gone = self.must(&format!("delete of task {id}"), self.tasks().delete(with_namespace(request)));
        let request = DeleteContainerRequest { id: id.to_owned() };
        self.must(&format!("delete of container {id}"), self.containers().delete(with_namespace(request)));
        let request = RemoveSnapshotRequest { snapshotter: record.snapshotter, key: record.snapshot_key };
        match self.ask("removal of a snapshot", self.snapshots().remove(with_namespace(request))) {
            Ok(()) => {}
            // Without its container it is garbage, and containerd may have collected it already.
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => panic!("host {}: removal of snapshot {id}: {status}", self.host),
        }
        Ended::new(gone.exit_status, gone.exited_at)
    }

    /// Asks for a process's end in the background; the answer, or why there is none, goes to `answer`.
    pub fn wait(&self, id: &str, exec: &str, answer: impl FnOnce(Result<Ended, Status>) + Send + 'static) {
        let request = WaitRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        let mut tasks = self.tasks();
        self.handle.spawn(async move {
            let ended = tasks.wait(with_namespace(request)).await;
            answer(ended.map(|ended| {
                let ended = ended.into_inner();
                Ended::new(ended.exit_status, ended.exited_at)
            }));
        });
    }

    /// Sets a label of the namespace that all is in, which containerd tells its subscribers of.
    #[track_caller]
    pub(crate) fn label_namespace(&self, key: &str, value: &str) {
        let labels = HashMap::from([(key.to_owned(), value.to_owned())]);
        let request = UpdateNamespaceRequest {
            namespace: Some(Namespace { name: NAMESPACE.to_owned(), labels }),
            update_mask: Some(FieldMask { paths: vec![format!("labels.{key}")] }),
        };
        let mut namespaces = NamespacesClient::new(self.channel.clone());
        self.must("label of a namespace", namespaces.update(with_namespace(request)));
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }
}
