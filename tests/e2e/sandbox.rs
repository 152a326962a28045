//! The Sandbox API of a shim that is asked directly, with whatever containerd there is.

use std::{
    fs,
    future::Future,
    thread,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::ShutdownRequest,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    cgroups::metrics::Metrics,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::SandboxClient,
    shim_async::TaskClient,
    types::introspection::RuntimeInfo,
};
use dunlin_tests::{Container, Host, Lab};
use dunlin_wire::{
    service::{
        CancelRequest, CleanupRequest, FinalizeAction, FinalizeSandboxRequest, ImportSandboxRequest,
        PrepareAndExportSandboxRequest,
    },
    service_ttrpc::MigrationClient,
};
use protobuf::Message;
use tokio::task::JoinHandle;
use ttrpc::{
    Code, Error,
    asynchronous::Client,
    context::{Context, with_timeout},
};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("sandbox::a_sandbox_lives_without_a_container", a_sandbox_lives_without_a_container),
    ("sandbox::containers_come_and_go_in_a_sandbox", containers_come_and_go_in_a_sandbox),
    ("sandbox::a_shim_takes_the_parameters_of_2_3", a_shim_takes_the_parameters_of_2_3),
    ("sandbox::a_machine_that_dies_ends_its_sandbox", a_machine_that_dies_ends_its_sandbox),
    ("sandbox::a_wait_ends_where_the_sandbox_moved_away", a_wait_ends_where_the_sandbox_moved_away),
    ("sandbox::a_wait_ends_where_the_sandbox_never_ran", a_wait_ends_where_the_sandbox_never_ran),
];

const SOON: Duration = Duration::from_secs(20);
/// A sandbox has ended by then, with all that its move or its end takes.
const END: Duration = Duration::from_secs(180);
/// Nothing would have come by then that should not.
const MOMENT: Duration = Duration::from_millis(300);

fn context() -> Context {
    with_timeout(Duration::from_secs(240).as_nanos().try_into().expect("fits"))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(what: &str, result: Result<T, Error>, code: Code) -> String {
    match result {
        Err(Error::RpcStatus(status)) if status.code() == code => status.message().to_owned(),
        other => panic!("{what}: expected {code:?}, got {other:?}"),
    }
}

/// A shim of sandbox `id`, and what it is asked.
struct Shim<'a> {
    lab: &'a Lab,
    host: Host,
    namespace: &'static str,
    id: &'static str,
    client: Client,
}

impl<'a> Shim<'a> {
    /// Starts one as containerd does, in a bundle with `spec`.
    async fn start(lab: &'a Lab, host: Host, id: &'static str, spec: &str) -> Shim<'a> {
        Shim::start_in(lab, host, "e2e", id, spec).await
    }

    async fn start_in(
        lab: &'a Lab,
        host: Host,
        namespace: &'static str,
        id: &'static str,
        spec: &str,
    ) -> Shim<'a> {
        let script = format!(
            "mkdir -p /run/{id} && cd /run/{id} && printf '%s' '{spec}' >config.json && \
             exec containerd-shim-dunlin-v2 -namespace {namespace} -address /run/containerd/containerd.sock \
             -publish-binary containerd -id {id} start"
        );
        let address = lab.on(host, &["sh", "-c", &script]).ok();
        assert_eq!(address, format!("unix:///run/dunlin/{namespace}/{id}/shim.sock"));
        Shim::connect(lab, host, namespace, id).await
    }

    /// One that runs already.
    async fn connect(lab: &'a Lab, host: Host, namespace: &'static str, id: &'static str) -> Shim<'a> {
        let path = lab.run_path(host, &format!("/run/dunlin/{namespace}/{id}/shim.sock"));
        let client = Client::connect(&format!("unix://{}", path.display())).await.expect("the shim listens");
        Shim { lab, host, namespace, id, client }
    }

    fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    fn migration(&self) -> MigrationClient {
        MigrationClient::new(self.client.clone())
    }

    async fn status(&self) -> SandboxStatusResponse {
        let request =
            SandboxStatusRequest { sandbox_id: self.id.to_owned(), verbose: true, ..Default::default() };
        self.sandbox().sandbox_status(context(), &request).await.expect("a status at any time")
    }

    #[track_caller]
    fn assert_standing(&self, status: &SandboxStatusResponse, state: &str, cri: &str) {
        let told = status.info.get("state").map(String::as_str);
        assert_eq!((told, status.state.as_str()), (Some(state), cri), "sandbox {}: {status:?}", self.id);
    }

    async fn create(&self) {
        let request = CreateSandboxRequest { sandbox_id: self.id.to_owned(), ..Default::default() };
        self.sandbox().create_sandbox(context(), &request).await.expect("created; a bundle is not needed");
    }

    async fn ping(&self) -> Result<(), Error> {
        let request = PingRequest { sandbox_id: self.id.to_owned(), ..Default::default() };
        self.sandbox().ping_sandbox(context(), &request).await.map(drop)
    }

    async fn begin(&self) -> Result<u32, Error> {
        let request = StartSandboxRequest { sandbox_id: self.id.to_owned(), ..Default::default() };
        self.sandbox().start_sandbox(context(), &request).await.map(|started| started.pid)
    }

    async fn stop(&self) -> Result<(), Error> {
        let request =
            StopSandboxRequest { sandbox_id: self.id.to_owned(), timeout_secs: 20, ..Default::default() };
        self.sandbox().stop_sandbox(context(), &request).await.map(drop)
    }

    /// A WaitSandbox that is under way.
    async fn waiting(&self) -> JoinHandle<Result<WaitSandboxResponse, Error>> {
        let (client, id) = (self.sandbox(), self.id.to_owned());
        let wait = tokio::spawn(async move {
            let request = WaitSandboxRequest { sandbox_id: id, ..Default::default() };
            client.wait_sandbox(context(), &request).await
        });
        tokio::time::sleep(MOMENT).await;
        assert!(!wait.is_finished(), "WaitSandbox of {} returned before its end", self.id);
        wait
    }

    async fn shutdown(&self) {
        let request = ShutdownSandboxRequest { sandbox_id: self.id.to_owned(), ..Default::default() };
        self.sandbox().shutdown_sandbox(context(), &request).await.expect("shut down");
        let since = Instant::now();
        let directory = self.lab.run_path(self.host, &format!("/run/dunlin/{}/{}", self.namespace, self.id));
        let of_shim = format!("-id {} ", self.id);
        let lives = || self.lab.processes(self.host).iter().any(|line| line.contains(&of_shim));
        while directory.exists() || lives() {
            assert!(since.elapsed() < SOON, "the shim of {} is still there", self.id);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

async fn ended(wait: JoinHandle<Result<WaitSandboxResponse, Error>>) -> u32 {
    let ended = tokio::time::timeout(END, wait).await.expect("WaitSandbox hangs").expect("no panic");
    let ended = ended.expect("WaitSandbox answers");
    assert!(ended.exited_at.seconds > 0, "{ended:?}");
    ended.exit_status
}

fn a_sandbox_lives_without_a_container(lab: &Lab) {
    block_on(async {
        let spec = r#"{"annotations":{"io.microsoft.virtualmachine.computetopology.memory.sizeinmb":"300"}}"#;
        let shim = Shim::start(lab, Host::A, "sb-life", spec).await;
        let client = shim.sandbox();
        shim.assert_standing(&shim.status().await, "absent", "SANDBOX_NOTREADY");
        assert_refused("a start before its time", shim.begin().await, Code::FAILED_PRECONDITION);
        let other = PingRequest { sandbox_id: "another".to_owned(), ..Default::default() };
        let refusal = client.ping_sandbox(context(), &other).await;
        let text = assert_refused("another sandbox", refusal, Code::NOT_FOUND);
        assert!(text.contains("another") && text.contains("sb-life"), "{text}");

        let create = CreateSandboxRequest {
            sandbox_id: "sb-life".to_owned(),
            bundle_path: "/run/sb-life".to_owned(),
            ..Default::default()
        };
        client.create_sandbox(context(), &create).await.expect("created");
        assert_refused("twice", client.create_sandbox(context(), &create).await, Code::ALREADY_EXISTS);
        shim.assert_standing(&shim.status().await, "created", "SANDBOX_NOTREADY");
        let wait = shim.waiting().await;
        let pid = shim.begin().await.expect("started");
        let machine = lab.on(Host::A, &["cat", &format!("/proc/{pid}/cmdline")]).ok();
        assert!(machine.contains("qemu"), "pid {pid} is {machine:?}");
        assert_refused("a second start", shim.begin().await, Code::FAILED_PRECONDITION);
        let status = shim.status().await;
        shim.assert_standing(&status, "ready", "SANDBOX_READY");
        assert_eq!(status.pid, pid);
        assert_eq!(status.info.get("memory.mib").map(String::as_str), Some("300"), "{status:?}");
        assert!(status.created_at.seconds > 0 && status.exited_at.is_none(), "{status:?}");
        shim.ping().await.expect("alive");

        // What ends a shim without containers does not end one that was made for itself.
        let empty = ShutdownRequest { id: "sb-life".to_owned(), ..Default::default() };
        TaskClient::new(shim.client.clone()).shutdown(context(), &empty).await.expect("answered");
        tokio::time::sleep(MOMENT).await;
        shim.ping().await.expect("alive after the Task API's Shutdown");

        let platform = PlatformRequest { sandbox_id: "sb-life".to_owned(), ..Default::default() };
        let platform = client.platform(context(), &platform).await.expect("a platform").platform;
        assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));
        let figures = SandboxMetricsRequest { sandbox_id: "sb-life".to_owned(), ..Default::default() };
        let metric = client.sandbox_metrics(context(), &figures).await.expect("figures").metrics;
        assert_eq!(metric.data.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = Metrics::parse_from_bytes(&metric.data.value).expect("containerd's message");
        assert_eq!(metrics.memory.usage.limit, 300 << 20);
        assert!(
            metrics.memory.usage.usage > 10 << 20 && metrics.cpu.usage.total > 100_000_000,
            "{metrics:?}"
        );

        assert!(!wait.is_finished(), "WaitSandbox returned before the end");
        shim.stop().await.expect("stopped");
        assert_eq!(ended(wait).await, 0);
        assert!(lab.on(Host::A, &["test", "-e", &format!("/proc/{pid}")]).code != 0, "QEMU still runs");
        shim.stop().await.expect("stopped again");
        let status = shim.status().await;
        shim.assert_standing(&status, "stopped", "SANDBOX_NOTREADY");
        assert!(status.pid == 0 && status.exited_at.seconds > 0, "{status:?}");
        assert_refused("a ping", shim.ping().await, Code::UNAVAILABLE);
        assert_refused("figures", client.sandbox_metrics(context(), &figures).await, Code::UNAVAILABLE);
        assert_refused("a start after the end", shim.begin().await, Code::FAILED_PRECONDITION);
        shim.shutdown().await;
    });
}

/// Adds a container to a sandbox as CRI does, by annotations.
fn add(lab: &Lab, sandbox: &str, id: &str) {
    let member = format!("io.kubernetes.cri.sandbox-id={sandbox}");
    let run = ["run", "-d", "--null-io", "--runtime", "io.containerd.dunlin.v2", "--annotation", &member];
    let kind = ["--annotation", "io.kubernetes.cri.container-type=container"];
    lab.ctr(Host::A, &[&run[..], &kind, &[Container::IMAGE, id, "/bin/counter"]].concat()).ok();
}

fn await_state(lab: &Lab, id: &str, state: &str) {
    let since = Instant::now();
    // The runtime of the caller must not be entered twice.
    while thread::scope(|scope| scope.spawn(|| lab.state(Host::A, id)).join().expect("an answer")).as_deref()
        != Some(state)
    {
        assert!(since.elapsed() < SOON, "{id} is not {state}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn containers_come_and_go_in_a_sandbox(lab: &Lab) {
    block_on(async {
        let shim = Shim::start_in(lab, Host::A, "default", "sb-holds", "{}").await;
        shim.create().await;
        let pid = shim.begin().await.expect("started");
        add(lab, "sb-holds", "sb-one");
        add(lab, "sb-holds", "sb-two");
        let machines = lab.processes(Host::A).iter().filter(|line| line.contains("qemu-system")).count();
        assert_eq!(machines, 1, "{:#?}", lab.processes(Host::A));
        assert_eq!(shim.status().await.info.get("containers").map(String::as_str), Some("sb-one sb-two"));
        for id in ["sb-one", "sb-two"] {
            let exec = ["task", "exec", "--exec-id", "e", id, "sh", "-c", "test ! -e /own && echo own >/own"];
            lab.ctr(Host::A, &exec).ok();
        }
        // With the last container the machine would go, were it not the sandbox's.
        lab.ctr(Host::A, &["task", "rm", "-f", "sb-one"]).ok();
        lab.ctr(Host::A, &["task", "rm", "-f", "sb-two"]).ok();
        lab.ctr(Host::A, &["containers", "rm", "sb-one", "sb-two"]).ok();
        let status = shim.status().await;
        shim.assert_standing(&status, "ready", "SANDBOX_READY");
        assert_eq!(status.pid, pid);

        add(lab, "sb-holds", "sb-three");
        await_state(lab, "sb-three", "RUNNING");
        let wait = shim.waiting().await;
        shim.stop().await.expect("stopped");
        assert_eq!(ended(wait).await, 0);
        await_state(lab, "sb-three", "STOPPED");
        let removed = lab.ctr(Host::A, &["task", "rm", "sb-three"]);
        assert!(format!("{}{}", removed.stdout, removed.stderr).contains("137"), "{removed:?}");
        lab.ctr(Host::A, &["containers", "rm", "sb-three"]).ok();
        // Stopped and empty, and still there for who asks.
        shim.assert_standing(&shim.status().await, "stopped", "SANDBOX_NOTREADY");
        shim.shutdown().await;
    });
}

fn a_shim_takes_the_parameters_of_2_3(lab: &Lab) {
    let at = lab.run_path(Host::A, "/run/sb-params");
    fs::create_dir_all(&at).expect("a bundle");
    let params = BootstrapParams {
        instance_id: "sb-params".to_owned(),
        namespace: "e2e".to_owned(),
        containerd_version: "2.3.0".to_owned(),
        containerd_grpc_address: "/run/containerd/containerd.sock".to_owned(),
        containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".to_owned(),
        ..Default::default()
    };
    fs::write(at.join("params"), params.write_to_bytes().expect("bytes")).expect("written");
    let script = "cd /run/sb-params && containerd-shim-dunlin-v2 -info </dev/null >info && \
        exec containerd-shim-dunlin-v2 start <params >result";
    lab.on(Host::A, &["sh", "-c", script]).ok();
    let read = |name| fs::read(at.join(name)).expect("an answer");
    let info = RuntimeInfo::parse_from_bytes(&read("info")).expect("RuntimeInfo");
    assert_eq!(info.name, "io.containerd.dunlin.v2");
    assert!(!info.version.version.is_empty(), "{info:?}");
    let result = BootstrapResult::parse_from_bytes(&read("result")).expect("BootstrapResult");
    let address = "unix:///run/dunlin/e2e/sb-params/shim.sock";
    assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, address, "ttrpc"));
    block_on(async {
        let shim = Shim::connect(lab, Host::A, "e2e", "sb-params").await;
        shim.ping().await.expect("it serves");
        shim.shutdown().await;
    });
}

fn a_machine_that_dies_ends_its_sandbox(lab: &Lab) {
    block_on(async {
        let shim = Shim::start(lab, Host::A, "sb-dies", "{}").await;
        shim.create().await;
        let pid = shim.begin().await.expect("started");
        let wait = shim.waiting().await;
        lab.on(Host::A, &["kill", "-9", &pid.to_string()]).ok();
        assert_eq!(ended(wait).await, 137);
        shim.assert_standing(&shim.status().await, "stopped", "SANDBOX_NOTREADY");
        // Stopped before it ever started: it ends as well.
        let early = Shim::start(lab, Host::A, "sb-early", "{}").await;
        early.create().await;
        let wait = early.waiting().await;
        early.stop().await.expect("stopped");
        assert_eq!(ended(wait).await, 0);
        early.shutdown().await;
        shim.shutdown().await;
    });
}

fn a_wait_ends_where_the_sandbox_moved_away(lab: &Lab) {
    let container = Container::start(lab, Host::A, "sb-moves", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    block_on(async {
        let shim = Shim::connect(lab, Host::A, "default", "sb-moves").await;
        shim.assert_standing(&shim.status().await, "ready", "SANDBOX_READY");
        let wait = shim.waiting().await;
        // Another thread's: this one must go on reading from the shim.
        let migrate = lab.command_on(Host::A, &["dunlin", "migrate", "sb-moves", "--to", "b"]);
        let run =
            tokio::task::spawn_blocking(move || dunlin_tests::Run::new(migrate, Duration::from_secs(180)));
        assert_eq!(ended(wait).await, 0);
        run.await.expect("no panic").ok();
        let there = Shim::connect(lab, Host::B, "default", "sb-moves").await;
        there.assert_standing(&there.status().await, "ready", "SANDBOX_READY");
    });
    container.assert_only_on(Host::B);
    container.remove(Host::B);
}

fn a_wait_ends_where_the_sandbox_never_ran(lab: &Lab) {
    let container = Container::start(lab, Host::A, "sb-stays", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let session = || "e2e-sandbox-session".to_owned();
    block_on(async {
        let source = Shim::connect(lab, Host::A, "default", "sb-stays").await;
        let destination = Shim::start(lab, Host::B, "sb-fresh", "{}").await;
        let export = PrepareAndExportSandboxRequest { session_id: session(), ..Default::default() };
        let exported =
            source.migration().prepare_and_export_sandbox(context(), &export).await.expect("exported");
        // It still runs here, and whoever looks for pods that are not ready must not find it.
        let status = source.status().await;
        source.assert_standing(&status, "migrating", "SANDBOX_READY");
        assert_eq!(status.info.get("migration.state").map(String::as_str), Some("SourceExported"));

        let wait = destination.waiting().await;
        let import = ImportSandboxRequest {
            session_id: session(),
            sandbox_id: "sb-fresh".to_owned(),
            config: exported.config,
            ..Default::default()
        };
        destination.migration().import_sandbox(context(), &import).await.expect("imported");
        // What its controller says of it before its first container; the machine is the saved state's.
        destination.create().await;
        destination.assert_standing(&destination.status().await, "arriving", "SANDBOX_NOTREADY");
        assert_refused("a start amid a move", destination.begin().await, Code::FAILED_PRECONDITION);
        destination.ping().await.expect("a shim that waits for a machine is alive");
        tokio::time::sleep(MOMENT).await;
        assert!(!wait.is_finished(), "WaitSandbox returned while the sandbox was arriving");
        let cancel = CancelRequest { session_id: session(), ..Default::default() };
        destination.migration().cancel(context(), &cancel).await.expect("cancelled");
        assert_eq!(ended(wait).await, 137);
        destination.assert_standing(&destination.status().await, "stopped", "SANDBOX_NOTREADY");
        destination.shutdown().await;

        source.migration().cancel(context(), &cancel).await.expect("cancelled");
        let resume = FinalizeSandboxRequest {
            session_id: session(),
            action: FinalizeAction::FINALIZE_ACTION_RESUME.into(),
            ..Default::default()
        };
        source.migration().finalize_sandbox(context(), &resume).await.expect("goes on");
        let cleanup = CleanupRequest { session_id: session(), ..Default::default() };
        source.migration().cleanup(context(), &cleanup).await.expect("forgotten");
        source.assert_standing(&source.status().await, "ready", "SANDBOX_READY");
    });
    container.await_lines(Host::A, 20, SOON);
    container.remove(Host::A);
}
