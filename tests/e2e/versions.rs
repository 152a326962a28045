//! The newer containerds: each has a lab of its own, and what a runtime is asked for in it.

use std::{
    fs,
    future::Future,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::sandbox::{
        ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStatusRequest,
        ControllerStatusResponse, ControllerStopRequest, ControllerWaitRequest, StoreCreateRequest,
        StoreDeleteRequest, controller_client::ControllerClient, store_client::StoreClient,
    },
    tonic::Request,
    types::{Sandbox, sandbox},
};
use dunlin_tests::{Container, Host, Lab};
use prost_types::Any;

use crate::{Case, cri, disks, movement, pods, records, surface};

/// With the installed containerd, in the first lab.
pub(crate) const CASES: &[Case] = &[("versions::installed_a_task_lives_and_moves", a_task_lives_and_moves)];

const IN_1_7: &[Case] = &[
    ("versions::1_7_a_task_lives_and_moves", a_task_lives_and_moves),
    ("versions::1_7_a_killed_shim_takes_all_with_it", surface::a_killed_shim_takes_all_with_it),
    ("versions::1_7_a_restarted_containerd_finds_its_task", surface::a_restarted_containerd_finds_its_task),
    ("versions::1_7_a_sandbox_moves_with_its_record", records::a_sandbox_moves_with_its_record),
    ("versions::1_7_a_pod_moves_with_every_byte", pods::there_and_back_with_every_byte),
    ("versions::1_7_a_pod_of_cri_moves", cri::a_pod_moves_and_is_execd_into),
    ("versions::1_7_a_blockfile_is_attached_as_it_is", disks::a_blockfile_is_attached_as_it_is),
    ("versions::1_7_nothing_stays", surface::nothing_stays_when_containers_are_gone),
];

const IN_2: &[Case] = &[
    ("versions::2_x_a_task_lives_and_moves", a_task_lives_and_moves),
    ("versions::2_x_a_killed_shim_takes_all_with_it", surface::a_killed_shim_takes_all_with_it),
    ("versions::2_x_a_restarted_containerd_finds_its_task", surface::a_restarted_containerd_finds_its_task),
    ("versions::2_x_a_sandbox_through_containerd", a_sandbox_through_containerd),
    ("versions::2_x_a_sandbox_moves_with_its_record", records::a_sandbox_moves_with_its_record),
    ("versions::2_x_a_pod_moves_with_every_byte", pods::there_and_back_with_every_byte),
    ("versions::2_x_a_pod_of_cri_moves", cri::a_pod_moves_and_is_execd_into),
    ("versions::2_x_a_blockfile_is_attached_as_it_is", disks::a_blockfile_is_attached_as_it_is),
    ("versions::2_x_erofs_layers_are_attached_as_they_are", disks::erofs_layers_are_attached_as_they_are),
    ("versions::2_x_nothing_stays", surface::nothing_stays_when_containers_are_gone),
];

/// The cases of a series of containerd.
pub(crate) fn of(series: &str) -> &'static [Case] {
    if series == "1.7" { IN_1_7 } else { IN_2 }
}

/// All of them, to be listed.
pub(crate) fn all() -> impl Iterator<Item = Case> {
    IN_1_7.iter().chain(IN_2).copied()
}

const SOON: Duration = Duration::from_secs(20);

/// What containerd tells its subscribers, written down on the host itself.
struct Events<'a> {
    lab: &'a Lab,
    host: Host,
    pid: String,
}

impl<'a> Events<'a> {
    fn begin(lab: &'a Lab, host: Host) -> Events<'a> {
        let listen = "timeout 900 ctr events >/run/events 2>/dev/null & echo $!";
        let pid = lab.on(host, &["sh", "-c", listen]).ok().trim().to_owned();
        // Subscribed as soon as it hears of a namespace's label.
        let since = Instant::now();
        let events = Events { lab, host, pid };
        let mut label = 0;
        while !events.text().contains("/namespaces/update") {
            assert!(since.elapsed() < SOON, "no events on host {host}");
            label += 1;
            lab.ctr(host, &["namespaces", "label", "default", &format!("heard={label}")]).ok();
        }
        events
    }

    fn text(&self) -> String {
        fs::read_to_string(self.lab.run_path(self.host, "/run/events")).unwrap_or_default()
    }

    /// Those of one task's own process under a topic.
    fn of(&self, topic: &str, id: &str) -> Vec<String> {
        let text = self.text();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let of_init = |line: &&str| !line.contains("\"id\":") || line.contains(&format!("\"id\":\"{id}\""));
        whole
            .lines()
            .filter(|line| line.contains(&format!(" /tasks/{topic} ")))
            .filter(|line| line.contains(&format!("\"container_id\":\"{id}\"")))
            .filter(of_init)
            .map(ToOwned::to_owned)
            .collect()
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        let _ = self.lab.command_on(self.host, &["kill", &self.pid]).output();
    }
}

fn a_task_lives_and_moves(lab: &Lab) {
    let events = Host::ALL.map(|host| Events::begin(lab, host));
    let run = ["run", "--rm", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, "v-run"];
    let run = lab.ctr(Host::A, &[&run[..], &["sh", "-c", "echo to-out; exit 7"]].concat());
    assert_eq!((run.code, run.stdout.as_str()), (7, "to-out\n"), "stderr: {}", run.stderr);

    let container = Container::start(lab, Host::A, "v-task", &["/bin/counter"]);
    container.await_state(Host::A, "RUNNING", SOON);
    container.await_lines(Host::A, 20, SOON);
    assert_eq!(container.exec(Host::A, "code", &["sh", "-c", "exit 3"]).code, 3);
    assert_eq!(container.exec(Host::A, "say", &["echo", "hello"]).ok(), "hello\n");
    let identity = container.identity(Host::A, "id-0");
    for (number, host) in [Host::B, Host::A].into_iter().enumerate() {
        lab.migrate(host.other(), "v-task", host.name()).ok();
        container.assert_only_on(host);
        container.await_lines(host, 20, SOON);
        assert_eq!(container.identity(host, &format!("id-{}", number + 1)), identity, "another process");
        // A move is no exit.
        assert_eq!(events[0].of("exit", "v-task"), Vec::<String>::new());
        assert_eq!(events[1].of("exit", "v-task"), Vec::<String>::new());
    }
    movement::assert_whole(&container, Host::A);

    container.remove(Host::A);
    assert_eq!(container.state(Host::A), None);
    let since = Instant::now();
    while events[0].of("delete", "v-task").len() < 2 {
        assert!(since.elapsed() < SOON, "no event of the deletion: {}", events[0].text());
    }
    let exits = events[0].of("exit", "v-task");
    assert_eq!(exits.len(), 1, "{exits:#?}");
    assert!(exits[0].contains("\"exit_status\":137"), "{exits:#?}");
    assert_eq!(events[1].of("exit", "v-task"), Vec::<String>::new());
    let exits = events[0].of("exit", "v-run");
    assert!(exits.len() == 1 && exits[0].contains("\"exit_status\":7"), "{exits:#?}");
    assert_eq!(events[0].of("start", "v-run").len(), 1, "{}", events[0].text());
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// A request to containerd, in its namespace and with a deadline.
fn asked<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "default".parse().expect("an ASCII header value"));
    request.set_timeout(Duration::from_secs(60));
    request
}

fn a_sandbox_through_containerd(lab: &Lab) {
    block_on(sandbox_through_containerd(lab));
}

const ID: &str = "v-sandbox";
const SANDBOXER: &str = "shim";

/// containerd's own Sandbox API drives the shim's. Not in 1.7, whose service refuses its own events' topics.
async fn sandbox_through_containerd(lab: &Lab) {
    let socket = lab.run_path(Host::A, "/run/containerd/containerd.sock");
    let channel = || async { containerd_client::connect(&socket).await.expect("containerd answers") };
    let mut controller = ControllerClient::new(channel().await);
    let spec = r#"{"ociVersion":"1.0.2","annotations":{"io.microsoft.virtualmachine.computetopology.memory.sizeinmb":"200"}}"#;
    let sandbox = Sandbox {
        sandbox_id: ID.to_owned(),
        runtime: Some(sandbox::Runtime { name: "io.containerd.dunlin.v2".to_owned(), options: None }),
        spec: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
            value: spec.as_bytes().to_vec(),
        }),
        sandboxer: SANDBOXER.to_owned(),
        ..Sandbox::default()
    };
    let stored = StoreCreateRequest { sandbox: Some(sandbox.clone()) };
    StoreClient::new(channel().await).create(asked(stored)).await.expect("stored");
    let create = ControllerCreateRequest {
        sandbox_id: ID.to_owned(),
        sandbox: Some(sandbox),
        sandboxer: SANDBOXER.to_owned(),
        ..ControllerCreateRequest::default()
    };
    controller.create(asked(create)).await.expect("created");
    let start = ControllerStartRequest { sandbox_id: ID.to_owned(), sandboxer: SANDBOXER.to_owned() };
    let started = controller.start(asked(start)).await.expect("started").into_inner();
    let bundle = format!("/run/containerd/io.containerd.sandbox.controller.v1.shim/default/{ID}");
    let told = fs::read_to_string(lab.run_path(Host::A, &bundle).join("bootstrap.json")).expect("its answer");
    assert!(told.contains("\"version\":3") && told.contains("\"protocol\":\"ttrpc\""), "{told}");
    let machine = lab.on(Host::A, &["cat", &format!("/proc/{}/cmdline", started.pid)]).ok();
    assert!(machine.contains("qemu"), "pid {} is {machine:?}", started.pid);
    // containerd loses its connection and finds the sandbox again.
    lab.service(Host::A, "stop", "containerd");
    lab.service(Host::A, "start", "containerd");
    let mut controller = ControllerClient::new(channel().await);
    let found = status(&mut controller).await;
    assert_eq!((found.state.as_str(), found.pid), ("SANDBOX_READY", started.pid), "{found:?}");
    let told = |key: &str| found.info.get(key).map(String::as_str);
    assert_eq!((told("state"), told("memory.mib")), (Some("ready"), Some("200")), "{found:?}");

    // It sends the sandbox's containers straight to its shim.
    let run = ["run", "-d", "--null-io", "--sandbox", ID, "--runtime", "io.containerd.dunlin.v2"];
    lab.ctr(Host::A, &[&run[..], &[Container::IMAGE, "v-inside", "/bin/counter"]].concat()).ok();
    let machines = lab.processes(Host::A).iter().filter(|line| line.contains("qemu-system")).count();
    assert_eq!(machines, 1, "{:#?}", lab.processes(Host::A));
    let exec = ["task", "exec", "--exec-id", "e", "v-inside", "echo", "inside"];
    assert_eq!(lab.ctr(Host::A, &exec).ok(), "inside\n");
    lab.ctr(Host::A, &["task", "rm", "-f", "v-inside"]).ok();
    lab.ctr(Host::A, &["containers", "rm", "v-inside"]).ok();
    let found = status(&mut controller).await;
    assert_eq!((found.state.as_str(), found.pid), ("SANDBOX_READY", started.pid), "{found:?}");

    let wait = ControllerWaitRequest { sandbox_id: ID.to_owned(), sandboxer: SANDBOXER.to_owned() };
    let mut waiter = controller.clone();
    let waiting = tokio::spawn(async move { waiter.wait(asked(wait)).await });
    let stop = ControllerStopRequest {
        sandbox_id: ID.to_owned(),
        timeout_secs: 20,
        sandboxer: SANDBOXER.to_owned(),
    };
    controller.stop(asked(stop)).await.expect("stopped");
    let ended = waiting.await.expect("no panic").expect("the wait ends").into_inner();
    assert_eq!(ended.exit_status, 0);
    let stopped = status(&mut controller).await;
    assert_eq!((stopped.state.as_str(), stopped.pid), ("SANDBOX_NOTREADY", 0), "{stopped:?}");
    let shutdown = ControllerShutdownRequest { sandbox_id: ID.to_owned(), sandboxer: SANDBOXER.to_owned() };
    controller.shutdown(asked(shutdown)).await.expect("shut down");
    let forget = StoreDeleteRequest { sandbox_id: ID.to_owned() };
    StoreClient::new(channel().await).delete(asked(forget)).await.expect("forgotten");
}

async fn status(
    controller: &mut ControllerClient<containerd_client::tonic::transport::Channel>,
) -> ControllerStatusResponse {
    let request =
        ControllerStatusRequest { sandbox_id: ID.to_owned(), verbose: true, sandboxer: SANDBOXER.to_owned() };
    controller.status(asked(request)).await.expect("a status").into_inner()
}
