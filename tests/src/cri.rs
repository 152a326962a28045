//! A pod made through CRI, as an orchestrator would make it, and gone when the case ends.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use tokio::runtime::Runtime;
use tonic::{Response, Status, transport::Channel};

use self::api::runtime_service_client::RuntimeServiceClient;
use crate::{Counted, Host, Lab, Run, count};

/// Messages and stubs of `proto/cri.proto`; generated, never edited.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod api {
    tonic::include_proto!("runtime.v1");
}

const CALL: Duration = Duration::from_secs(60);
const MOVE: Duration = Duration::from_secs(180);
/// For what a move leaves behind to go.
const GONE: Duration = Duration::from_secs(60);
/// CRI's namespace in containerd.
const NAMESPACE: &str = "k8s.io";

/// The CRI of one host's containerd.
pub struct Cri {
    host: Host,
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// Connects to a host's.
    ///
    /// # Panics
    /// When nobody listens.
    pub fn of(lab: &Lab, host: Host) -> Cri {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let socket = lab.run_path(host, "/run/containerd/containerd.sock");
        let channel = runtime
            .block_on(containerd_client::connect(&socket))
            .unwrap_or_else(|error| panic!("containerd on host {host}: {error}"));
        Cri { host, runtime, client: RuntimeServiceClient::new(channel) }
    }

    /// One call, in time; its refusal is a value.
    fn call<T, F>(&self, ask: impl FnOnce(RuntimeServiceClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked =
            self.runtime.block_on(async { tokio::time::timeout(CALL, ask(self.client.clone())).await });
        match asked {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => panic!("CRI on host {} did not answer within {CALL:?}", self.host),
        }
    }

    #[track_caller]
    fn ok<T, F>(&self, what: &str, ask: impl FnOnce(RuntimeServiceClient<Channel>) -> F) -> T
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call(ask).unwrap_or_else(|status| panic!("CRI on host {}: {what}: {status}", self.host))
    }

    /// All pods.
    ///
    /// # Panics
    /// When CRI does not answer.
    #[track_caller]
    pub fn pods(&self) -> Vec<api::PodSandbox> {
        let request = api::ListPodSandboxRequest::default();
        self.ok("list pods", |mut client| async move { client.list_pod_sandbox(request).await }).items
    }

    /// The containers of a pod, by their names.
    ///
    /// # Panics
    /// When CRI does not answer.
    #[track_caller]
    pub fn containers(&self, pod: &str) -> HashMap<String, api::Container> {
        let filter = api::ContainerFilter { pod_sandbox_id: pod.to_owned(), ..Default::default() };
        let request = api::ListContainersRequest { filter: Some(filter) };
        let listed =
            self.ok("list containers", |mut client| async move { client.list_containers(request).await });
        let name = |container: &api::Container| container.metadata.clone().unwrap_or_default().name;
        listed.containers.into_iter().map(|container| (name(&container), container)).collect()
    }

    /// Runs a command in a container to its end.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn exec(&self, container: &str, command: &[&str]) -> (i32, String) {
        let request = api::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: 20,
        };
        let ran = self.ok("exec", |mut client| async move { client.exec_sync(request).await });
        (ran.exit_code, String::from_utf8_lossy(&ran.stdout).into_owned())
    }

    /// Gives a container other resources, as kubelet does when it resizes a pod in place.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn update(&self, container: &str, resources: api::LinuxContainerResources) {
        let container_id = container.to_owned();
        let request = api::UpdateContainerResourcesRequest { container_id, linux: Some(resources) };
        self.ok("update a container", |mut client| async move {
            client.update_container_resources(request).await
        });
    }

    /// Ends a pod and removes it.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn remove_pod(&self, pod: &str) {
        let stop = api::StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        self.ok("stop pod", |mut client| async move { client.stop_pod_sandbox(stop).await });
        let remove = api::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        self.ok("remove pod", |mut client| async move { client.remove_pod_sandbox(remove).await });
    }
}

/// A pod on one of the hosts.
pub struct Pod<'a> {
    lab: &'a Lab,
    name: String,
    /// Its first id, which its machine keeps.
    sandbox: String,
    config: api::PodSandboxConfig,
    network: api::NamespaceMode,
}

impl<'a> Pod<'a> {
    /// Makes a pod on the host's network with the handler of Dunlin's runtime.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn run(lab: &'a Lab, host: Host, name: &str) -> Pod<'a> {
        Pod::run_on(lab, host, name, api::NamespaceMode::Node)
    }

    /// The same on the host's network or, with `Pod`, on the pods' segment.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn run_on(lab: &'a Lab, host: Host, name: &str, network: api::NamespaceMode) -> Pod<'a> {
        let options = api::NamespaceOption { network: network.into(), ..Default::default() };
        let context =
            api::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}"),
                namespace: "e2e".to_owned(),
                attempt: 3,
            }),
            log_directory: lab.host_dir(host).join("logs/pods").join(name).display().to_string(),
            labels: [("who".to_owned(), "end-to-end".to_owned())].into(),
            annotations: [("dunlin.test/kept".to_owned(), "as it is".to_owned())].into(),
            linux: Some(api::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() }),
            ..Default::default()
        };
        let mut pod = Pod { lab, name: name.to_owned(), sandbox: String::new(), config, network };
        let request = api::RunPodSandboxRequest {
            config: Some(pod.config.clone()),
            runtime_handler: "dunlin".to_owned(),
        };
        let cri = Cri::of(lab, host);
        let ran = cri.ok("run pod", |mut client| async move { client.run_pod_sandbox(request).await });
        pod.sandbox = ran.pod_sandbox_id;
        pod
    }

    /// Makes a container of the demo image in the pod and starts it; its log is `<name>.log`.
    ///
    /// # Panics
    /// When CRI refuses.
    #[track_caller]
    pub fn start(&self, host: Host, name: &str, command: &[&str]) {
        let options = api::NamespaceOption {
            network: self.network.into(),
            pid: api::NamespaceMode::Container.into(),
            ..Default::default()
        };
        let context =
            api::LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 1 }),
            image: Some(api::ImageSpec {
                image: "docker.io/dunlin/demo:latest".to_owned(),
                ..Default::default()
            }),
            command: command.iter().map(ToString::to_string).collect(),
            envs: vec![api::KeyValue { key: "GIVEN".to_owned(), value: b"by CRI".to_vec() }],
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig { security_context: Some(context), resources: None }),
            ..Default::default()
        };
        let cri = Cri::of(self.lab, host);
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.id(host).expect("the pod is here"),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let made =
            cri.ok("create container", |mut client| async move { client.create_container(request).await });
        let request = api::StartContainerRequest { container_id: made.container_id };
        cri.ok("start container", |mut client| async move { client.start_container(request).await });
    }

    /// What CRI on a host says of the pod, if it is there.
    ///
    /// # Panics
    /// When CRI does not answer.
    #[track_caller]
    pub fn listed(&self, host: Host) -> Option<api::PodSandbox> {
        let pods = Cri::of(self.lab, host).pods();
        pods.into_iter().find(|pod| pod.metadata == self.config.metadata)
    }

    /// The pod's id on a host, if it is there.
    ///
    /// # Panics
    /// When CRI does not answer.
    #[track_caller]
    pub fn id(&self, host: Host) -> Option<String> {
        self.listed(host).map(|pod| pod.id)
    }

    /// The id of one of its containers on a host.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn container(&self, host: Host, name: &str) -> String {
        let pod = self.id(host).unwrap_or_else(|| panic!("pod {} is not on host {host}", self.name));
        let mut containers = Cri::of(self.lab, host).containers(&pod);
        containers.remove(name).unwrap_or_else(|| panic!("pod {} has no {name} on host {host}", self.name)).id
    }

    /// `ExecSync` in one of its containers.
    ///
    /// # Panics
    /// When CRI refuses or the command fails.
    #[track_caller]
    pub fn exec(&self, host: Host, name: &str, command: &[&str]) -> String {
        let (code, output) = Cri::of(self.lab, host).exec(&self.container(host, name), command);
        assert_eq!(code, 0, "{command:?} in {name} on host {host}: {output}");
        output
    }

    /// `dunlin migrate` by the pod's id.
    ///
    /// # Panics
    /// When the pod is not there.
    #[track_caller]
    pub fn migrate(&self, from: Host) -> Run {
        self.migrate_with(from, &[])
    }

    /// The same with further options.
    ///
    /// # Panics
    /// When the pod is not there.
    #[track_caller]
    pub fn migrate_with(&self, from: Host, options: &[&str]) -> Run {
        let id = self.id(from).expect("the pod is here");
        let arguments = ["dunlin", "migrate", "-n", NAMESPACE, &id, "--to", from.other().name()];
        Run::new(self.lab.command_on(from, &[&arguments, options].concat()), MOVE)
    }

    /// READY on `host` with all of `names` RUNNING, and on the other neither in CRI nor in containerd, nor its machine.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_only_on(&self, host: Host, names: &[&str]) {
        let pod = self.listed(host).unwrap_or_else(|| panic!("pod {} is not on host {host}", self.name));
        assert_eq!(pod.state(), api::PodSandboxState::SandboxReady, "on host {host}");
        assert_eq!(pod.runtime_handler, "dunlin");
        assert_eq!(pod.labels.get("who").map(String::as_str), Some("end-to-end"));
        assert_eq!(pod.annotations.get("dunlin.test/kept").map(String::as_str), Some("as it is"));
        let containers = Cri::of(self.lab, host).containers(&pod.id);
        let mut present: Vec<&str> = containers.keys().map(String::as_str).collect();
        let mut wanted = names.to_vec();
        present.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(present, wanted, "on host {host}");
        for (name, container) in &containers {
            assert_eq!(container.state(), api::ContainerState::ContainerRunning, "{name} on host {host}");
        }
        self.assert_gone_from(host.other());
        self.lab.assert_nothing_of(host.other(), NAMESPACE, &self.sandbox);
    }

    /// Neither CRI nor containerd on `host` has anything in CRI's namespace, or soon has not: a source may be told
    /// to go on while the destination still clears away.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_gone_from(&self, host: Host) {
        let since = Instant::now();
        let look = |kind: &str| self.lab.ctr(host, &["-n", NAMESPACE, kind, "ls", "-q"]).ok();
        loop {
            let left = (self.id(host), look("tasks"), look("containers"));
            if left.0.is_none() && left.1.trim().is_empty() && left.2.trim().is_empty() {
                return;
            }
            assert!(since.elapsed() < GONE, "left on host {host}: {left:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where CRI on a host writes a container's log; on the destination of a move, the node chose the place.
    pub fn log_path(&self, host: Host, moved: bool, name: &str) -> PathBuf {
        let logs = self.lab.host_dir(host).join("logs");
        let pod = match moved {
            true => logs.join(format!("containers/e2e_{}_uid-of-{}", self.name, self.name)),
            false => logs.join("pods").join(&self.name),
        };
        pod.join(format!("{name}.log"))
    }

    /// What a container has written on its standard output, by CRI's log file.
    ///
    /// # Panics
    /// When a line is not of CRI's form.
    pub fn log(&self, host: Host, moved: bool, name: &str) -> String {
        let bytes = fs::read(self.log_path(host, moved, name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let mut output = String::new();
        for line in text.lines() {
            // <time> <stream> <F: a whole line, P: a part of one> <text>
            let mut fields = line.splitn(4, ' ');
            let (_, stream, tag) = (fields.next(), fields.next(), fields.next());
            assert!(
                stream == Some("stdout") && matches!(tag, Some("F" | "P")),
                "no line of a CRI log: {line}"
            );
            output.push_str(fields.next().unwrap_or_default());
            if tag == Some("F") {
                output.push('\n');
            }
        }
        output
    }

    /// Waits until a counter has written `more` further lines to its log on a host: it runs there.
    ///
    /// # Panics
    /// When it has not after `deadline`.
    #[track_caller]
    pub fn await_lines(&self, host: Host, moved: bool, name: &str, more: u64, deadline: Duration) {
        let counted = || -> Counted { count(&self.log(host, moved, name)) };
        let (since, wanted) = (Instant::now(), counted().last + more);
        while counted().last < wanted {
            let last = counted().last;
            assert!(since.elapsed() < deadline, "{name} on host {host} is at {last}, not at {wanted}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends and removes it on a host, through CRI.
    ///
    /// # Panics
    /// When CRI refuses, or something stays.
    #[track_caller]
    pub fn remove(&self, host: Host) {
        Cri::of(self.lab, host).remove_pod(&self.id(host).expect("the pod is here"));
        self.assert_gone_from(host);
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        for host in Host::ALL {
            if !self.lab.run_path(host, "/run/containerd/containerd.sock").exists() {
                continue;
            }
            let cri = Cri::of(self.lab, host);
            let listing = api::ListPodSandboxRequest::default();
            let listed = cri.call(|mut client| async move { client.list_pod_sandbox(listing).await });
            let mine = listed.map(|listed| listed.items).unwrap_or_default();
            for pod in mine.into_iter().filter(|pod| pod.metadata == self.config.metadata) {
                let request = api::RemovePodSandboxRequest { pod_sandbox_id: pod.id };
                let _ = cri.call(|mut client| async move { client.remove_pod_sandbox(request).await });
            }
        }
    }
}
