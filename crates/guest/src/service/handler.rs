//! The bridge's requests, handed to the room that answers them.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use dunlin_bridge::guest::{Failure, Handler, ShutdownKind};
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    CombinedLayers, ContainerConfig, FilesAnswer, FilesStep, GuestPid, MappedDirectory, MappedVirtualDisk,
    Modification, NegotiateRequest, ProcessExit, ProcessParameters, PropertyType, RequestType, Resource,
    UTILITY_VM, VsockStdioRelaySettings,
};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::container::{Config, ContainerError, Containers, Execute, process_list};
use crate::init::clock;
use crate::network::{NetworkError, Networks};
use crate::stdio::{Carriage, Ports};
use crate::storage::copies::Copies;
use crate::storage::disk::DiskAddress;
use crate::storage::layers::{self, Layers};
use crate::storage::mounts::{self, DiskMount};
use crate::storage::share::{ShareMount, Shares};
use crate::storage::{StorageError, pci};

/// Longest text of stacks: the answer must fit into a frame of 64 KiB, escaped.
const STACKS_BOUND: usize = 40 * 1024;

/// Answers the host's requests.
pub(super) struct GuestHandler {
    containers: Containers,
    shares: Shares,
    copies: Copies,
    networks: Networks,
    power_off: watch::Sender<bool>,
}

impl GuestHandler {
    pub(super) fn new(
        containers: Containers,
        shares: Shares,
        networks: Networks,
        power_off: watch::Sender<bool>,
    ) -> GuestHandler {
        GuestHandler { containers, shares, copies: Copies::default(), networks, power_off }
    }
}

fn failure(error: ContainerError) -> Failure {
    Failure::new(HResult::of(error.hresult()), error.to_string())
}

fn network(error: NetworkError) -> Failure {
    Failure::new(HResult::of(error.hresult()), error.to_string())
}

fn refuse(text: impl Into<String>) -> Failure {
    Failure::new(HResult::FAIL, text)
}

async fn storage<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| refuse(error.to_string())),
        Err(_) => Err(failure(ContainerError::Lost)),
    }
}

impl Handler for GuestHandler {
    async fn negotiated(&self, host: &NegotiateRequest) {
        let Some(nanos) = host.host_time_unix_nanos.and_then(|nanos| u64::try_from(nanos).ok()) else {
            return;
        };
        match clock::follow_host(nanos) {
            Ok(Some(step)) => tracing::info!(step_nanos = %step, "clock stepped to the host's"),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "clock stays off the host's"),
        }
    }

    async fn create(&self, container: String, config: ContainerConfig) -> Result<(), Failure> {
        if container == UTILITY_VM {
            return Err(refuse("the utility VM exists already; create containers in it"));
        }
        let config = Config {
            bundle: config.oci_bundle_path,
            spec: config.oci_specification,
            scratch: config.scratch_dir_path,
        };
        self.containers.create(&container, config).await.map_err(failure)
    }

    async fn start(&self, container: String) -> Result<(), Failure> {
        self.containers.check(&container).map_err(failure)
    }

    async fn shutdown(&self, container: String, kind: ShutdownKind) -> Result<(), Failure> {
        if container == UTILITY_VM {
            self.power_off.send_replace(true);
            return Ok(());
        }
        self.containers.shut_down(&container, kind == ShutdownKind::Forced).map_err(failure)
    }

    async fn execute(
        &self,
        container: String,
        parameters: ProcessParameters,
        stdio: VsockStdioRelaySettings,
    ) -> Result<GuestPid, Failure> {
        let outside = container == UTILITY_VM || parameters.create_in_utility_vm;
        let carriage = match (stdio.resumable, &parameters.oci_process) {
            (true, _) => Carriage::Resumable,
            (false, None) if !outside => Carriage::Replaying,
            (false, _) => Carriage::Once,
        };
        let ports = Ports {
            stdin: stdio.std_in.filter(|_| parameters.create_std_in_pipe),
            stdout: stdio.std_out.filter(|_| parameters.create_std_out_pipe),
            stderr: stdio.std_err.filter(|_| parameters.create_std_err_pipe),
            carriage,
        };
        let command = if parameters.command_args.is_empty() {
            parameters.command_line.split_whitespace().map(str::to_owned).collect()
        } else {
            parameters.command_args
        };
        let what = Execute {
            process: parameters.oci_process,
            command,
            directory: parameters.working_directory,
            environment: parameters.environment,
            ports,
            console: parameters.console_size.map(|[rows, columns]| (columns, rows)),
        };
        let pid = if outside {
            self.containers.execute_in_utility_vm(what).await
        } else {
            self.containers.execute(&container, what).await
        };
        pid.map(GuestPid).map_err(failure)
    }

    async fn wait(
        &self,
        container: String,
        pid: GuestPid,
        timeout: Option<Duration>,
    ) -> Result<ProcessExit, Failure> {
        let milliseconds = timeout.map(|time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX - 1));
        let exit = if container == UTILITY_VM {
            self.containers.wait_in_utility_vm(pid.0, milliseconds).await
        } else {
            self.containers.wait(&container, pid.0, milliseconds).await
        };
        exit.map_err(failure)
    }

    async fn signal(&self, container: String, pid: GuestPid, signal: i32) -> Result<(), Failure> {
        self.containers.signal(&container, pid.0, signal).map_err(failure)
    }

    async fn resize(&self, container: String, pid: GuestPid, height: u16, width: u16) -> Result<(), Failure> {
        self.containers.resize(&container, pid.0, width, height).map_err(failure)
    }

    async fn properties(&self, container: String, kinds: Vec<PropertyType>) -> Result<Value, Failure> {
        if container == UTILITY_VM {
            return Err(refuse("the utility VM has no properties; ask for a container's"));
        }
        self.containers.check(&container).map_err(failure)?;
        let mut answer = Map::new();
        for kind in kinds {
            match kind {
                PropertyType::ProcessList => {
                    let pids = self.containers.pids(&container).map_err(failure)?;
                    answer.extend(process_list(&pids));
                }
                PropertyType::Statistics => {
                    let metrics = self.containers.statistics(&container).map_err(failure)?;
                    answer.insert("LCOWMetrics".to_owned(), metrics);
                }
                _ => tracing::warn!(?kind, "unknown property is left out"),
            }
        }
        Ok(Value::Object(answer))
    }

    async fn modify(&self, container: String, modification: Modification) -> Result<(), Failure> {
        let Modification { request_type, resource } = modification;
        if let Resource::ContainerConstraints(limits) = &resource {
            return self.containers.constrain(&container, &limits.linux).map_err(failure);
        }
        if container != UTILITY_VM {
            self.containers.check(&container).map_err(failure)?;
            return Err(refuse(
                "a container takes ContainerConstraints only; send other resources to the utility VM",
            ));
        }
        let unsupported = |name: &str| {
            Err(refuse(format!("{request_type:?} of {name} is not supported by this guest; leave it out")))
        };
        match (request_type, resource) {
            (RequestType::Add, Resource::MappedVirtualDisk(disk)) => {
                let mount = disk_mount(disk);
                storage(move || mounts::add(&mount)).await
            }
            (RequestType::Remove, Resource::MappedVirtualDisk(disk)) => {
                let mount = disk_mount(disk);
                storage(move || mounts::remove(&mount)).await
            }
            (RequestType::Remove, Resource::ScsiDevice(disk)) => {
                storage(move || DiskAddress::new(disk.controller.into(), disk.lun.into())?.remove()).await
            }
            (RequestType::Add, Resource::CombinedLayers(combined)) => {
                let layers = layers_of(combined);
                storage(move || layers::add(&layers)).await
            }
            (RequestType::Remove, Resource::CombinedLayers(combined)) => {
                let layers = layers_of(combined);
                let containers = self.containers.clone();
                storage(move || layers::remove(&layers, |bundle| containers.has_bundle(bundle))).await
            }
            (_, Resource::MappedVirtualDisk(_)) => unsupported("MappedVirtualDisk"),
            (_, Resource::ScsiDevice(_)) => unsupported("SCSIDevice"),
            (_, Resource::CombinedLayers(_)) => unsupported("CombinedLayers"),
            (RequestType::Add, Resource::MappedDirectory(directory)) => {
                let added = self.shares.add(&share_mount(directory)).await;
                added.map_err(|error| refuse(error.to_string()))
            }
            (RequestType::Remove, Resource::MappedDirectory(directory)) => {
                let removed = self.shares.remove(&directory.mount_path).await;
                removed.map_err(|error| refuse(error.to_string()))
            }
            (RequestType::Add, Resource::VpciDevice(device)) => {
                storage(move || pci::wait(&device.vmbus_guid, device.root_port).map(drop)).await
            }
            (RequestType::Add, Resource::Network(nic)) => self.networks.add(&nic).await.map_err(network),
            (RequestType::Update, Resource::Network(nic)) => {
                self.networks.update(&nic).await.map_err(network)
            }
            (RequestType::Remove, Resource::Network(nic)) => {
                self.networks.remove(&nic).await.map_err(network)
            }
            (_, Resource::MappedDirectory(_)) => unsupported("MappedDirectory"),
            (_, Resource::VpciDevice(_)) => unsupported("VPCIDevice"),
            (_, Resource::Network(_)) => unsupported("Network"),
            (_, Resource::PodCgroupMemoryLimit) => unsupported("PodCgroupMemoryLimit"),
            (_, Resource::SecurityPolicy(_)) => unsupported("SecurityPolicy"),
            (_, Resource::SecurityPolicyFragment(_)) => unsupported("SecurityPolicyFragment"),
            (_, Resource::ContainerConstraints(_)) => unsupported("ContainerConstraints"),
        }
    }

    async fn files(&self, place: String, step: FilesStep) -> Result<FilesAnswer, Failure> {
        let copies = self.copies.clone();
        storage(move || copies.step(&place, step)).await
    }

    async fn pause(&self, container: String) -> Result<(), Failure> {
        self.containers.freeze(&container, true).await.map_err(failure)
    }

    async fn resume(&self, container: String) -> Result<(), Failure> {
        self.containers.freeze(&container, false).await.map_err(failure)
    }

    async fn dump_stacks(&self) -> Result<String, Failure> {
        Ok(stacks())
    }

    async fn delete_state(&self, container: String) -> Result<(), Failure> {
        self.containers.delete(&container).await.map_err(failure)
    }
}

fn disk_mount(disk: MappedVirtualDisk) -> DiskMount {
    DiskMount {
        mount_path: disk.mount_path,
        controller: disk.controller.into(),
        lun: disk.lun.into(),
        partition: disk.partition,
        read_only: disk.read_only,
        options: disk.options,
        block_device: disk.block_dev,
        filesystem: disk.filesystem,
        encrypted: disk.encrypted,
        ensure_filesystem: disk.ensure_filesystem,
    }
}

fn share_mount(directory: MappedDirectory) -> ShareMount {
    ShareMount {
        mount_path: directory.mount_path,
        port: directory.port,
        share_name: directory.share_name,
        read_only: directory.read_only,
    }
}

fn layers_of(combined: CombinedLayers) -> Layers {
    Layers {
        root: combined.container_root_path,
        layers: combined.layers.into_iter().map(|layer| layer.path).collect(),
        scratch: combined.scratch_path,
    }
}

/// Name, state and kernel stack of each of PID 1's threads.
fn stacks() -> String {
    let mut text = String::new();
    for task in fs::read_dir("/proc/self/task").into_iter().flatten().filter_map(Result::ok) {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or("State: unknown");
        let _ = write!(
            text,
            "thread {} {}{state}\n{}\n",
            task.file_name().display(),
            read("comm"),
            read("stack")
        );
    }
    text.truncate(text.floor_char_boundary(STACKS_BOUND));
    text
}
