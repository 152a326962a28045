//! A machine's pods: network, containers, processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::{ContainerRole, ContainerStage, NetworkStage};
use crate::ids::{ContainerId, ExecId, GuestPid, ReservationId, SandboxId, StdioPort};

/// One pod.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedPod {
    /// Containerd's id on the source.
    pub pod_id: SandboxId,
    /// The guest's id, fixed at creation.
    pub guest_pod_id: SandboxId,
    /// Its network, when it has one of its own.
    pub network: Option<SavedNetwork>,
    /// Its containers: one that stands alone, or a sandbox container and its workloads, or none yet.
    pub containers: Vec<SavedContainer>,
}

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedNetwork {
    /// The guest's name of the namespace, fixed at creation. Empty only where there is no endpoint.
    pub namespace_id: String,
    /// Routes follow policies.
    pub policy_based_routing: bool,
    /// The guest keeps network namespaces.
    pub namespace_supported: bool,
    /// Where it is in its life.
    pub stage: NetworkStage,
    /// By NIC id, the guest's name of the network card.
    pub endpoints: BTreeMap<String, SavedEndpoint>,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedEndpoint {
    /// What the source's host calls it; for people.
    pub endpoint_id: String,
    /// One station's address: six pairs of lower-case hex digits with `:` between.
    pub mac: String,
    /// The interface's name in the guest.
    pub name: String,
    /// The PCIe root port that it is plugged into.
    pub root_port: u8,
    /// Bytes of a packet, 68 to 65535.
    pub mtu: u32,
    /// Its addresses, each once.
    pub addresses: Vec<IpNet>,
    /// Its routes, in the order in which they can be made.
    pub routes: Vec<SavedRoute>,
    /// Its permanent neighbours: address and hardware address, spelled as `mac`.
    pub neighbours: Vec<(IpAddr, String)>,
}

/// One route of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedRoute {
    /// What it leads to.
    pub destination: IpNet,
    /// Over whom, who may be of the other family; none: over the link.
    pub gateway: Option<IpAddr>,
    /// The address that is spoken from, of the destination's family; none: the kernel's choice.
    pub source: Option<IpAddr>,
    /// Its rank, 0 the best.
    pub metric: u32,
    /// The gateway is on the link, whatever the addresses say.
    pub on_link: bool,
}

/// One container.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedContainer {
    /// Containerd's id on the source.
    pub container_id: ContainerId,
    /// The guest's id, fixed at creation.
    pub guest_container_id: ContainerId,
    /// What it is in its pod.
    pub role: ContainerRole,
    /// Where it is in its life.
    pub stage: ContainerStage,
    /// Its processes are frozen, by Task.Pause.
    pub paused: bool,
    /// How long a lost stdio connection is dialled again; none: until the process ends.
    pub io_retry_timeout: Option<Duration>,
    /// Read-only layers, topmost first.
    pub layers: Vec<SavedLayer>,
    /// The writable layer.
    pub scratch: Option<SavedLayer>,
    /// The layers are mounted at `rootfs_path`.
    pub layers_combined: bool,
    /// The composed root in the guest; absolute.
    pub rootfs_path: String,
    /// The disks that it holds beside its layers and scratch.
    pub scsi_reservations: BTreeSet<ReservationId>,
    /// The shares that it holds.
    pub plan9_reservations: BTreeSet<ReservationId>,
    /// The passed-through devices that it holds, by their UUIDs.
    pub vpci_devices: BTreeSet<String>,
    /// Mounts whose content is in the guest: by the mount's place in the container, the copy's in the guest. Both are
    /// absolute.
    pub copies: BTreeMap<String, String>,
    /// Mounts that are disks: by the mount's place in the container, one of `scsi_reservations`.
    pub disk_volumes: BTreeMap<String, ReservationId>,
    /// The init process.
    pub init: SavedProcess,
    /// The others.
    pub execs: BTreeMap<ExecId, SavedProcess>,
}

/// One layer of a container's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedLayer {
    /// The disk under it.
    pub reservation: ReservationId,
    /// Its mount in the guest; absolute.
    pub guest_path: String,
}

/// When and how a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedExit {
    /// As containerd reports it.
    pub code: u32,
    /// Seconds since 1970.
    pub at_seconds: i64,
    /// Nanoseconds within the second.
    pub at_nanos: u32,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessStage {
    /// Known, not in the guest.
    NotCreated,
    /// In the guest, not started.
    Created(GuestPid),
    /// Running.
    Running(GuestPid),
    /// Ended; the pid it had, when it had one.
    Terminated(Option<GuestPid>, SavedExit),
}

/// One process.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedProcess {
    /// Where it is in its life.
    pub stage: ProcessStage,
    /// The bundle's path on the source; for people, never opened.
    pub bundle: String,
    /// The OCI process object, JSON.
    pub oci_process: Vec<u8>,
    /// As [`SavedContainer::io_retry_timeout`].
    pub io_retry_timeout: Option<Duration>,
    /// Its stdio; none: that stream is not connected.
    pub stdin: Option<StdioPort>,
    /// As `stdin`.
    pub stdout: Option<StdioPort>,
    /// As `stdin`.
    pub stderr: Option<StdioPort>,
    /// `CloseIO` was called: no more input comes.
    pub stdin_closed: bool,
    /// Has a terminal.
    pub terminal: bool,
    /// Frame id of the WaitForProcess that is open on the source; 0: none.
    pub wait_call_id: u64,
}

impl SavedContainer {
    /// Every process with its exec id; the init's is "".
    pub fn processes(&self) -> impl Iterator<Item = (&str, &SavedProcess)> {
        let execs = self.execs.iter().map(|(id, process)| (id.as_str(), process));
        std::iter::once(("", &self.init)).chain(execs)
    }
}

impl SavedProcess {
    /// Its connected ports.
    pub fn ports(&self) -> impl Iterator<Item = StdioPort> {
        [self.stdin, self.stdout, self.stderr].into_iter().flatten()
    }

    /// Its pid in the guest, when it has one.
    pub fn pid(&self) -> Option<GuestPid> {
        match self.stage {
            ProcessStage::NotCreated => None,
            ProcessStage::Created(pid) | ProcessStage::Running(pid) => Some(pid),
            ProcessStage::Terminated(pid, _) => pid,
        }
    }
}
