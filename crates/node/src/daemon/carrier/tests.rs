//! What a source's shim refuses, as the move's driver hears it.

use std::path::Path;

use dunlin_wire::service as wire;
use dunlin_wire::service_ttrpc::{Migration, create_migration};
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

const REASON: &str =
    "container web: the mount /data is shared with the host (plan9);\nremove it and try again";

struct Refuses;

#[async_trait]
impl Migration for Refuses {
    async fn prepare_and_export_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::PrepareAndExportSandboxRequest,
    ) -> ttrpc::Result<wire::PrepareAndExportSandboxResponse> {
        let status = ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, REASON);
        Err(ttrpc::Error::RpcStatus(status))
    }
    async fn cancel(&self, _: &TtrpcContext, _: wire::CancelRequest) -> ttrpc::Result<wire::CancelResponse> {
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no session")))
    }
}

#[tokio::test]
async fn what_cannot_move_is_told_in_the_shims_words_and_anything_else_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let address = format!("unix://{}", at("shim.sock").display());
    std::fs::create_dir_all(at("state/ns/pod")).unwrap();
    std::fs::write(at("state/ns/pod/address"), &address).unwrap();
    let mut server =
        Server::new().bind(&address).unwrap().register_service(create_migration(Arc::new(Refuses)));
    server.start().await.unwrap();
    let text = format!(
        "name=\"a\"\nlisten=\"127.0.0.1:1\"\ndata_listen=\"127.0.0.1:2\"\nstate_dir={:?}\n\
         [[peers]]\nname=\"b\"\naddress=\"127.0.0.1:3\"\ndata_address=\"127.0.0.1:4\"",
        at("state")
    );
    let config = Arc::new(NodeConfig::parse(Path::new("a"), &text).unwrap());
    let remote = Remote::new(config.peer("b").unwrap(), None, "a", "s").unwrap();
    let session = SessionId::new("s").unwrap();
    let facts = SandboxFacts { namespace: "ns".into(), id: "pod".into(), ..SandboxFacts::default() };
    let limits = Limits { transfer: Duration::from_secs(1), downtime_ms: 0, copy_shared_disks: false };
    let (told, _watcher) = broadcast::channel(1);
    let means = Means { config, containerd: Containerd::unreachable(), exports: Exports::default() };
    let hands = Hands::new(means, session, facts, remote, limits, told);
    let (events, _heard) = mpsc::channel(1);

    let failure = hands.carry(Work::SourceExport, &events).await.unwrap_err();
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Refused, REASON));
    let failure = hands.carry(Work::SourceCancel, &events).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::NoSession);
    assert!(failure.message.contains("sandbox `pod` refused Cancel: no session"), "{}", failure.message);
}
