//! A sandbox whose QEMU and guest are doubles on the real wire, and a containerd that takes its events.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, create_events};
use dunlin_testkit::{FakeQemu, Faults, Script};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;
use serde_json::json;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::boot::directory::StateDirectory;
use crate::config::{Accelerator, Config};
use crate::process::io::Stdio;
use crate::sandbox::Sandbox;
use crate::sandbox::create::NewTask;
use crate::sandbox::error::SandboxError;
use crate::service::events::Publisher;

pub(super) const SANDBOX: &str = "pod";
pub(super) const WORKLOAD: &str = "work";
pub(super) const SOON: Duration = Duration::from_secs(20);

type Exits = Arc<Mutex<Vec<(String, u32)>>>;

/// The exits that containerd was told of: the process's id and its code.
struct Containerd(Exits);

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        if request.envelope.topic == "/tasks/exit" {
            let exit = TaskExit::parse_from_bytes(&request.envelope.event.value).expect("an exit");
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push((exit.id, exit.exit_status));
        }
        Ok(Empty::default())
    }
}

pub(super) struct Rig {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) qemu: FakeQemu,
    pub(super) faults: Faults,
    exits: Exits,
    _containerd: Server,
    directory: tempfile::TempDir,
}

impl Rig {
    /// None, and word of it, for a user who may not start a QEMU: it gets a network namespace of its own.
    pub(super) async fn new() -> Option<Rig> {
        Rig::with_inits(Script::default()).await
    }

    /// The same with inits that do something.
    pub(super) async fn with_inits(script: Script) -> Option<Rig> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: a machine is made by root only");
            return None;
        }
        // Sockets lie in it, and their paths are short.
        let directory = tempfile::Builder::new().prefix("dnl").tempdir_in("/tmp").unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["kernel", "initramfs", "layer"] {
            std::fs::write(at(name), name).unwrap();
        }
        let faults = Faults::default();
        let qemu = FakeQemu::install(directory.path(), script, &faults).unwrap();
        let mut config = Config { state_dir: at("s"), data_dir: at("data"), ..Config::default() };
        (config.guest.kernel, config.guest.initramfs) = (at("kernel"), at("initramfs"));
        (config.vm.qemu, config.vm.accelerator) = (qemu.binary().to_owned(), Accelerator::Tcg);
        // Nobody mounts it.
        (config.disks.mkfs_ext4, config.disks.scratch_mib) = ("true".into(), 16);
        let exits = Exits::default();
        let socket = at("events");
        let mut containerd = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(Arc::clone(&exits)))));
        containerd.start().await.unwrap();
        let state = StateDirectory::new(&config.state_dir, "ns", SANDBOX);
        state.create().unwrap();
        let publisher = Publisher::spawn("ns".to_owned(), socket.display().to_string());
        let sandbox = Sandbox::new("ns".to_owned(), SANDBOX.to_owned(), config, state, publisher);
        Some(Rig { sandbox, qemu, faults, exits, _containerd: containerd, directory })
    }

    /// A pod whose two inits run.
    pub(super) async fn with_a_running_pod() -> Option<Rig> {
        let rig = Rig::new().await?;
        rig.run_pod().await;
        Some(rig)
    }

    pub(super) async fn run_pod(&self) {
        for id in [SANDBOX, WORKLOAD] {
            self.create(id).await.unwrap();
            self.sandbox.start(id, "").await.unwrap();
        }
    }

    /// containerd's Create of the pod's sandbox or of its workload.
    pub(super) async fn create(&self, id: &str) -> Result<u32, SandboxError> {
        self.create_with(id, Stdio::default()).await
    }

    /// The same with streams.
    pub(super) async fn create_with(&self, id: &str, stdio: Stdio) -> Result<u32, SandboxError> {
        let kind = if id == SANDBOX { "sandbox" } else { "container" };
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": { "args": ["init"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "linux": {},
            "annotations": {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-id": SANDBOX,
            },
        });
        let bundle = self.path(id);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let layer = self.path("layer").display().to_string();
        let rootfs = vec![Mount { type_: "erofs".to_owned(), source: layer, ..Mount::default() }];
        let task = NewTask { id: id.to_owned(), bundle, rootfs, stdio, checkpoint: String::new() };
        self.sandbox.create(task).await
    }

    /// containerd's Exec in the workload.
    pub(super) fn exec(&self, exec_id: &str) {
        let spec = json!({ "args": ["exec"], "cwd": "/" }).to_string();
        self.sandbox.exec(WORKLOAD, exec_id.to_owned(), Stdio::default(), spec.as_bytes()).unwrap();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until containerd was told of as many exits, and then that it is told of no more.
    pub(super) async fn exits(&self, count: usize) -> Vec<(String, u32)> {
        let told = || self.exits.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all = async {
            while told().len() < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, all).await.unwrap_or_else(|_| panic!("only {:?}", told()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut told = told();
        told.sort();
        told
    }

    /// Deletes what there is of the pod, as containerd does after an end: each is there until then, and not after.
    pub(super) async fn delete_all(&self, ids: &[&str]) {
        for id in ids {
            let deleted = tokio::time::timeout(SOON, self.sandbox.delete(id, "")).await;
            let (_, exit) = deleted.expect("a delete ends").unwrap_or_else(|error| panic!("{id}: {error}"));
            assert_eq!(exit.code, 137, "{id}");
            assert!(matches!(self.sandbox.delete(id, "").await, Err(SandboxError::NoContainer { .. })));
        }
    }
}
