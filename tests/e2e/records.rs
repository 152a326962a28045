//! Sandboxes that were made through containerd's own Sandbox API move with what containerd keeps of them.

use std::{
    collections::HashMap,
    future::Future,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::sandbox::{
        ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStatusRequest,
        ControllerStatusResponse, ControllerStopRequest, ControllerWaitRequest, StoreCreateRequest,
        StoreDeleteRequest, StoreGetRequest, controller_client::ControllerClient, store_client::StoreClient,
    },
    tonic::{Code, Request, Response, Status, transport::Channel},
    types::{Sandbox, sandbox},
};
use dunlin_tests::{Container, Host, Lab, PodNet, Run};
use prost_types::Any;

use crate::rollback::{SlowNetwork, move_in_transfer};

const SOON: Duration = Duration::from_secs(20);
const MOVE: Duration = Duration::from_secs(180);
const SANDBOXER: &str = "shim";

/// One host's Sandbox services.
struct Services {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

fn asked<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "default".parse().expect("an ASCII header value"));
    request.set_timeout(Duration::from_secs(60));
    request
}

impl Services {
    fn of(lab: &Lab, host: Host) -> Services {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let socket = lab.run_path(host, "/run/containerd/containerd.sock");
        let channel = runtime.block_on(containerd_client::connect(socket)).expect("containerd answers");
        Services { runtime, channel }
    }

    fn store(&self) -> StoreClient<Channel> {
        StoreClient::new(self.channel.clone())
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn ask<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.runtime.block_on(call).map(Response::into_inner)
    }

    /// 1.7 does what it is asked, and then fails to tell its subscribers: their topic lacks its first `/`.
    fn done<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) {
        match self.ask(call) {
            Ok(_) => {}
            Err(status) if status.message().contains("must start with '/'") => {}
            Err(status) => panic!("{status}"),
        }
    }

    /// The record without its times.
    fn record(&self, id: &str) -> Option<Sandbox> {
        let request = asked(StoreGetRequest { sandbox_id: id.to_owned() });
        match self.ask(self.store().get(request)) {
            Ok(answer) => {
                let found = answer.sandbox.expect("a record");
                assert!(found.created_at.is_some() && found.updated_at.is_some(), "{found:?}");
                Some(Sandbox { created_at: None, updated_at: None, ..found })
            }
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => panic!("{status}"),
        }
    }

    fn status(&self, id: &str) -> ControllerStatusResponse {
        let request = ControllerStatusRequest {
            sandbox_id: id.to_owned(),
            verbose: true,
            sandboxer: SANDBOXER.to_owned(),
        };
        self.ask(self.controller().status(asked(request))).expect("a status")
    }

    /// Neither a record nor anything that the controller knows.
    fn assert_none(&self, id: &str, when: &str) {
        assert_eq!(self.record(id), None, "{when}");
        let since = Instant::now();
        while !self.status(id).state.is_empty() {
            assert!(since.elapsed() < SOON, "{when}: {:?}", self.status(id));
        }
    }

    fn create(&self, sandbox: &Sandbox, netns_path: &str, options: &Any) {
        let request = StoreCreateRequest { sandbox: Some(sandbox.clone()) };
        self.ask(self.store().create(asked(request))).expect("stored");
        let request = ControllerCreateRequest {
            sandbox_id: sandbox.sandbox_id.clone(),
            sandbox: Some(sandbox.clone()),
            sandboxer: SANDBOXER.to_owned(),
            netns_path: netns_path.to_owned(),
            options: Some(options.clone()),
            ..ControllerCreateRequest::default()
        };
        self.done(self.controller().create(asked(request)));
        let request = ControllerStartRequest {
            sandbox_id: sandbox.sandbox_id.clone(),
            sandboxer: SANDBOXER.to_owned(),
        };
        self.done(self.controller().start(asked(request)));
        assert_eq!(self.status(&sandbox.sandbox_id).state, "SANDBOX_READY");
    }
}

fn any(kind: &str, value: &str) -> Any {
    Any { type_url: kind.to_owned(), value: value.as_bytes().to_vec() }
}

/// The card of the container's guest, and its addresses.
fn card(container: &Container<'_>, host: Host) -> String {
    let look =
        "cat /sys/class/net/eth0/address; ip -o addr show dev eth0 scope global | sed 's/valid_lft.*//'";
    container.exec(host, "card", &["sh", "-c", look]).ok()
}

pub(crate) fn a_sandbox_moves_with_its_record(lab: &Lab) {
    const ID: &str = "v-record";
    let [here, there] = Host::ALL.map(|host| Services::of(lab, host));
    let spec = r#"{"ociVersion":"1.0.2","annotations":{"io.microsoft.virtualmachine.computetopology.memory.sizeinmb":"200"}}"#;
    // What only CreateSandbox says.
    let nets = PodNet::on_both(lab, ID, &["--address", "10.88.0.71/16", "--address", "fd88::71/64"]);
    let options = any("dunlin.test/options", "as they are");
    let said = |status: ControllerStatusResponse| {
        let path = status.info.get("network.namespace").cloned().unwrap_or_default();
        (path, status.extra)
    };
    let sandbox = Sandbox {
        sandbox_id: ID.to_owned(),
        runtime: Some(sandbox::Runtime { name: "io.containerd.dunlin.v2".to_owned(), options: None }),
        spec: Some(any("types.containerd.io/opencontainers/runtime-spec/1/Spec", spec)),
        labels: HashMap::from([("who".to_owned(), "end-to-end".to_owned())]),
        extensions: HashMap::from([("note".to_owned(), any("dunlin.test/note", "as it is"))]),
        sandboxer: SANDBOXER.to_owned(),
        ..Sandbox::default()
    };
    here.create(&sandbox, &nets[0].path(), &options);
    let kept = here.record(ID).expect("stored");
    lab.migrate(Host::A, ID, "b").fails_naming(&[ID, "no container"]);
    let counter = Container::start_with(lab, Host::A, "v-recorded", &["--sandbox", ID], &["/bin/counter"]);
    counter.await_lines(Host::A, 20, SOON);
    let identity = counter.identity(Host::A, "id-a");
    let card = card(&counter, Host::A);
    // 1.7 does not pass the namespace on to its shim.
    let version = lab.ctr(Host::A, &["version"]).ok();
    let named = !version.contains(" 1.7.");
    assert_eq!(
        said(here.status(ID)),
        (if named { nets[0].path() } else { String::new() }, Some(options.clone()))
    );
    assert_eq!(card.contains("10.88.0.71/16") && card.contains("fd88::71/64"), named, "{card}, {version}");

    // The destination has a record of that name, of something else.
    let taken = StoreCreateRequest { sandbox: Some(Sandbox { labels: HashMap::new(), ..sandbox.clone() }) };
    there.ask(there.store().create(asked(taken))).expect("stored");
    let others = there.record(ID);
    lab.migrate(Host::A, ID, "b").fails_naming(&["sandbox record", ID, "exists already", "delete it there"]);
    assert_eq!((there.record(ID), here.record(ID).as_ref()), (others, Some(&kept)));
    let delete = StoreDeleteRequest { sandbox_id: ID.to_owned() };
    there.ask(there.store().delete(asked(delete))).expect("deleted");

    // Turned back: the source's is as it was, the destination has nothing.
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, ID);
    let arriving = there.status(ID);
    lab.on(Host::A, &["dunlin", "cancel", ID]).ok();
    Run::finish(child, "dunlin migrate", MOVE).fails_naming(&["cancel"]);
    assert_eq!(arriving.info.get("state").map(String::as_str), Some("arriving"), "{arriving:?}");
    assert_eq!((here.record(ID).as_ref(), here.status(ID).state.as_str()), (Some(&kept), "SANDBOX_READY"));
    there.assert_none(ID, "after a cancelled move");
    // A node that dies leaves it to its next life.
    let child = move_in_transfer(lab, ID);
    lab.service(Host::B, "kill", "node");
    Run::finish(child, "dunlin migrate", MOVE).fails();
    drop(slow);
    lab.service(Host::B, "start", "node");
    let since = Instant::now();
    while there.record(ID).is_some() {
        assert!(since.elapsed() < Duration::from_secs(60), "the record stays on host b");
        std::thread::sleep(Duration::from_millis(200));
    }
    there.assert_none(ID, "after the node's next start");

    lab.migrate(Host::A, ID, "b").ok();
    counter.assert_only_on(Host::B);
    counter.await_lines(Host::B, 20, SOON);
    assert_eq!(counter.identity(Host::B, "id-b"), identity, "another process");
    here.assert_none(ID, "on the source after the move");
    assert_eq!(self::card(&counter, Host::B), card);
    assert_eq!(said(there.status(ID)), (if named { nets[1].path() } else { String::new() }, Some(options)));
    assert_eq!(there.record(ID), Some(kept.clone()));
    let info = lab.ctr(Host::B, &["containers", "info", "v-recorded"]).ok();
    assert!(info.contains(&format!("\"SandboxID\": \"{ID}\"")), "{info}");
    // containerd loses its connections and finds the sandbox again, and with it the container.
    lab.service(Host::B, "stop", "containerd");
    lab.service(Host::B, "start", "containerd");
    let there = Services::of(lab, Host::B);
    let status = there.status(ID);
    assert_eq!(status.state, "SANDBOX_READY", "{status:?}");
    assert_eq!(status.info.get("containers").map(String::as_str), Some("v-recorded"), "{status:?}");
    let machine = lab.on(Host::B, &["cat", &format!("/proc/{}/cmdline", status.pid)]).ok();
    assert!(machine.contains("qemu"), "pid {} is {machine:?}", status.pid);
    let run = ["run", "-d", "--null-io", "--sandbox", ID, "--runtime", "io.containerd.dunlin.v2"];
    lab.ctr(Host::B, &[&run[..], &[Container::IMAGE, "v-later", "sleep", "600"]].concat()).ok();
    for id in ["v-later", "v-recorded"] {
        lab.ctr(Host::B, &["task", "rm", "-f", id]).ok();
        lab.ctr(Host::B, &["containers", "rm", id]).ok();
    }
    // Its machine outlives its containers, as on the source.
    assert_eq!(there.status(ID).state, "SANDBOX_READY");

    let wait = ControllerWaitRequest { sandbox_id: ID.to_owned(), sandboxer: SANDBOXER.to_owned() };
    let mut waiter = there.controller();
    let waiting = there.runtime.spawn(async move { waiter.wait(asked(wait)).await });
    let stop = ControllerStopRequest {
        sandbox_id: ID.to_owned(),
        timeout_secs: 20,
        sandboxer: SANDBOXER.to_owned(),
    };
    there.ask(there.controller().stop(asked(stop))).expect("stopped");
    there.done(async { waiting.await.expect("no panic") });
    assert_eq!(there.status(ID).state, "SANDBOX_NOTREADY");
    let shutdown = ControllerShutdownRequest { sandbox_id: ID.to_owned(), sandboxer: SANDBOXER.to_owned() };
    // The end that it is about may cut its answer off; what counts is that nothing stays.
    let _ = there.ask(there.controller().shutdown(asked(shutdown)));
    there
        .ask(there.store().delete(asked(StoreDeleteRequest { sandbox_id: ID.to_owned() })))
        .expect("deleted");
    there.assert_none(ID, "after its end");
    for host in Host::ALL {
        lab.assert_nothing_of(host, "default", ID);
    }
}
