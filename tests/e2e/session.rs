//! What a shim refuses when it is asked directly, by whoever can reach its socket.

use std::{fs, future::Future, time::Duration};

use dunlin_tests::{Container, Host, Lab};
use dunlin_wire::{
    service::{
        CancelRequest, CreateDuplicateSocketRequest, FinalizeAction, FinalizeSandboxRequest,
        ImportSandboxRequest, PrepareAndExportSandboxRequest, PrepareSandboxRequest, TransferSandboxRequest,
    },
    service_ttrpc::MigrationClient,
};
use protobuf::well_known_types::any::Any;
use ttrpc::{
    Code, Error,
    asynchronous::Client,
    context::{Context, with_timeout},
};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("session::a_foreign_session_is_refused", a_foreign_session_is_refused),
    ("session::a_payload_of_unknown_kind_is_refused", a_payload_of_unknown_kind_is_refused),
];

fn context() -> Context {
    with_timeout(Duration::from_secs(15).as_nanos().try_into().expect("fits"))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// A client of the shim that listens on `address` inside a host.
async fn connect(lab: &Lab, host: Host, address: &str) -> MigrationClient {
    let inside = address.trim().strip_prefix("unix://").expect("a unix address");
    let path = lab.run_path(host, inside).display().to_string();
    MigrationClient::new(Client::connect(&format!("unix://{path}")).await.expect("the shim listens"))
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(what: &str, result: Result<T, Error>, code: Code) -> String {
    match result {
        Err(Error::RpcStatus(status)) if status.code() == code => status.message().to_owned(),
        other => panic!("{what}: expected {code:?}, got {other:?}"),
    }
}

fn a_foreign_session_is_refused(lab: &Lab) {
    let container = Container::start(lab, Host::A, "c-session", &["/bin/counter"]);
    let address = lab.run_path(Host::A, "/run/dunlin/default/c-session/address");
    let address = fs::read_to_string(address).expect("the shim has left its address");
    block_on(async {
        let client = connect(lab, Host::A, &address).await;
        let empty = PrepareAndExportSandboxRequest::default();
        assert_refused(
            "no session id",
            client.prepare_and_export_sandbox(context(), &empty).await,
            Code::INVALID_ARGUMENT,
        );
        let foreign = "11111111-2222-3333-4444-555555555555".to_owned();
        let request = PrepareSandboxRequest { session_id: foreign.clone(), ..Default::default() };
        assert_refused(
            "PrepareSandbox",
            client.prepare_sandbox(context(), &request).await,
            Code::INVALID_ARGUMENT,
        );
        let request = TransferSandboxRequest { session_id: foreign.clone(), ..Default::default() };
        assert_refused(
            "TransferSandbox",
            client.transfer_sandbox(context(), &request).await,
            Code::INVALID_ARGUMENT,
        );
        let request = CancelRequest { session_id: foreign.clone(), ..Default::default() };
        assert_refused("Cancel", client.cancel(context(), &request).await, Code::INVALID_ARGUMENT);
        for action in [FinalizeAction::FINALIZE_ACTION_STOP, FinalizeAction::FINALIZE_ACTION_RESUME] {
            let request = FinalizeSandboxRequest {
                session_id: foreign.clone(),
                action: action.into(),
                ..Default::default()
            };
            assert_refused(
                "FinalizeSandbox",
                client.finalize_sandbox(context(), &request).await,
                Code::INVALID_ARGUMENT,
            );
        }
        let request = CreateDuplicateSocketRequest {
            session_id: foreign,
            protocol_info: b"{}".to_vec(),
            ..Default::default()
        };
        assert_refused(
            "socket",
            client.create_duplicate_socket(context(), &request).await,
            Code::INVALID_ARGUMENT,
        );
    });
    container.await_lines(Host::A, 20, Duration::from_secs(15));
    lab.migrate(Host::A, "c-session", "b").ok();
    container.assert_only_on(Host::B);
    container.remove(Host::B);
}

fn a_payload_of_unknown_kind_is_refused(lab: &Lab) {
    // A fresh shim, as a node starts one for an arriving sandbox.
    lab.on(Host::B, &["mkdir", "-p", "/run/fresh"]).ok();
    let start = "cd /run/fresh && exec containerd-shim-dunlin-v2 -namespace e2e -address \
        /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id fresh start";
    let address = lab.on(Host::B, &["sh", "-c", start]).ok();
    block_on(async {
        let client = connect(lab, Host::B, &address).await;
        let import = |config: Any| ImportSandboxRequest {
            session_id: "s1".to_owned(),
            sandbox_id: "fresh".to_owned(),
            config: Some(config).into(),
            ..Default::default()
        };
        let unknown = Any { type_url: "type.dunlin.dev/dunlin.teapot.v1".to_owned(), ..Default::default() };
        let text = assert_refused(
            "unknown type",
            client.import_sandbox(context(), &import(unknown)).await,
            Code::INVALID_ARGUMENT,
        );
        assert!(text.contains("teapot"), "the refusal does not name the type: {text}");
        let garbage = Any {
            type_url: "type.dunlin.dev/dunlin.sandbox.v1".to_owned(),
            value: vec![0xff; 64],
            ..Default::default()
        };
        let result = client.import_sandbox(context(), &import(garbage)).await;
        assert!(matches!(result, Err(Error::RpcStatus(_))), "undecodable bytes: {result:?}");
        let nothing = ImportSandboxRequest {
            session_id: "s1".to_owned(),
            sandbox_id: "fresh".to_owned(),
            ..Default::default()
        };
        assert_refused(
            "no payload",
            client.import_sandbox(context(), &nothing).await,
            Code::INVALID_ARGUMENT,
        );
    });
    lab.on(Host::B, &["sh", "-c", "kill $(cat /run/dunlin/e2e/fresh/shim.pid)"]).ok();
}
