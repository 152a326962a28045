//! Every controller of a sandbox in, inert, without its machine: all of it or nothing.
//!
//! What a payload can say and this version cannot keep is refused by its place, never dropped: whoever made the sandbox
//! was promised it.

use std::collections::BTreeMap;

use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::Imported as ImportedSet;
use dunlin_qemu::Document;
use dunlin_wire::tree::{
    DiskAccess, ProcessStage, SavedContainer, SavedDisk, SavedPlan9, SavedPod, SavedTree, SavedVm, SavedVpci,
    VmStage,
};

use super::{scsi, tree};
use crate::container::Container;
use crate::controller::NotNow;
use crate::device::plan9::Shares;
use crate::device::scsi::Scsi;
use crate::device::vpci::Devices;
use crate::pod::Pod;
use crate::sandbox::Inner;
use crate::vm::Received;

/// What was imported, before it has its place.
#[derive(Debug)]
pub(super) struct Taken {
    scsi: Scsi,
    pods: BTreeMap<String, Pod>,
    containers: BTreeMap<String, Container>,
    vpci: SavedVpci,
    plan9: SavedPlan9,
    set: ImportedSet,
    next_port: u32,
    bridge_next_id: u64,
    plain_streams: bool,
}

/// The machine as it was built.
pub(super) fn document(tree: &SavedTree) -> Result<Document, Refusal> {
    let document: Document = serde_json::from_slice(&tree.vm.document)
        .map_err(|error| Refusal::invalid(format!("vm.document: {error}")))?;
    document.validate().map_err(|error| Refusal::invalid(format!("vm.document: {error}")))?;
    Ok(document)
}

/// Every controller, inert.
pub(super) fn controllers(tree: SavedTree, document: &Document) -> Result<Taken, Refusal> {
    check_nics(&tree, document)?;
    check_promises(&tree)?;
    let scsi = scsi::import(&tree.vm.scsi)?;
    let mut pods = BTreeMap::new();
    let mut containers = BTreeMap::new();
    let mut set =
        ImportedSet { containers: Default::default(), disks: scsi.mirrored().into_iter().collect() };
    if !tree.vm.vpci.devices.is_empty() || !tree.vm.plan9.shares.is_empty() {
        return Err(Refusal::precondition(
            "vm.vpci, vm.plan9: devices and directories of the source's host cannot be had here; remove them from the pod",
        ));
    }
    for pod in tree.pods {
        let id = pod.pod_id.to_string();
        pods.insert(id.clone(), tree::import_pod(&pod));
        for saved in pod.containers {
            set.containers.insert(saved.container_id.clone());
            let container = tree::import_container(id.clone(), saved)?;
            containers.insert(container.id.clone(), container);
        }
    }
    let SavedVm { vpci, plan9, next_port, bridge_next_id, plain_streams, .. } = tree.vm;
    let next_port = next_port.0;
    Ok(Taken { scsi, pods, containers, vpci, plan9, set, next_port, bridge_next_id, plain_streams })
}

impl Taken {
    /// Its containers and its disks that are copied.
    pub(super) fn set(&self) -> ImportedSet {
        self.set.clone()
    }

    /// What is to be made for it.
    pub(super) fn machine(&self, document: Document) -> Received {
        let Taken { next_port, bridge_next_id, plain_streams, .. } = *self;
        Received { document, next_port, bridge_next_id, plain_streams }
    }

    /// Into a sandbox that has nothing yet.
    pub(super) fn place(self, inner: &mut Inner, shares: &Shares, devices: &Devices) -> Result<(), Refusal> {
        let inert = |error: NotNow| Refusal::precondition(error.to_string());
        shares.adopt(self.plan9).map_err(inert)?;
        let nothing_here = |error: &dyn std::fmt::Display| Refusal::precondition(error.to_string());
        shares.patch(&BTreeMap::new()).map_err(|error| nothing_here(&error))?;
        devices.adopt(self.vpci).map_err(inert)?;
        devices.patch(&BTreeMap::new()).map_err(|error| nothing_here(&error))?;
        inner.scsi = self.scsi;
        inner.pods = self.pods;
        inner.containers = self.containers;
        Ok(())
    }
}

/// What was promised on the source and cannot be kept here.
fn check_promises(tree: &SavedTree) -> Result<(), Refusal> {
    let vm = &tree.vm;
    if vm.stage != VmStage::Running {
        return Err(Refusal::invalid(format!(
            "vm.stage: a machine that is {:?} cannot arrive; export again",
            vm.stage
        )));
    }
    let options = [
        ("confidential", vm.options.confidential.is_some()),
        ("scratch_encryption", vm.options.scratch_encryption),
        ("policy_based_routing", vm.options.policy_based_routing),
        ("fully_physically_backed", vm.options.fully_physically_backed),
    ];
    let options = options.into_iter().find(|(_, asked)| *asked).map(|(name, _)| format!("vm.options.{name}"));
    let disks = || {
        vm.scsi.disks.iter().find_map(|(slot, disk)| Some(format!("vm.scsi.disks[{slot}]{}", of_disk(disk)?)))
    };
    let pods =
        || tree.pods.iter().enumerate().find_map(|(at, pod)| Some(format!("pods[{at}]{}", of_pod(pod)?)));
    match options.or_else(disks).or_else(pods) {
        None => Ok(()),
        Some(place) => Err(Refusal::precondition(format!(
            "{place}: this version of Dunlin cannot give a sandbox that; move it to a host that can"
        ))),
    }
}

fn of_disk(disk: &SavedDisk) -> Option<String> {
    disk.mounts.iter().find_map(|(partition, mount)| {
        let read_only = matches!(disk.access, DiskAccess::ReadOnly { .. });
        let asked = [
            ("encrypted", mount.encrypted),
            ("ensure_filesystem", mount.ensure_filesystem),
            // A disk is mounted as it is attached.
            ("read_only", mount.read_only != read_only),
        ];
        let (name, _) = asked.into_iter().find(|(_, asked)| *asked)?;
        Some(format!(".mounts[{partition}].{name}"))
    })
}

fn of_pod(pod: &SavedPod) -> Option<String> {
    let network = pod.network.as_ref();
    if network.is_some_and(|network| network.policy_based_routing) {
        return Some(".network.policy_based_routing".to_owned());
    }
    if network.is_some_and(|network| !network.namespace_supported) {
        return Some(".network.namespace_supported".to_owned());
    }
    let mut containers = pod.containers.iter().enumerate();
    containers.find_map(|(at, container)| Some(format!(".containers[{at}]{}", of_container(container)?)))
}

/// Streams are carried on for as long as their process lives.
fn of_container(container: &SavedContainer) -> Option<String> {
    if container.io_retry_timeout.is_some() {
        return Some(".io_retry_timeout".to_owned());
    }
    container.processes().find_map(|(id, process)| match process.stage {
        _ if process.io_retry_timeout.is_some() => Some(format!(".processes[{id:?}].io_retry_timeout")),
        // Dunlin's guest makes a process when it is started.
        ProcessStage::Created(_) => Some(format!(".processes[{id:?}].stage")),
        ProcessStage::NotCreated | ProcessStage::Running(_) | ProcessStage::Terminated(..) => None,
    })
}

/// The machine's NICs are those of the pods, on both sides: what else is in it cannot be connected.
fn check_nics(tree: &SavedTree, document: &Document) -> Result<(), Refusal> {
    let mut of_pods: Vec<(u8, String)> = tree
        .pods
        .iter()
        .filter_map(|pod| pod.network.as_ref())
        .flat_map(|network| network.endpoints.values())
        .map(|nic| (nic.root_port, nic.mac.clone()))
        .collect();
    of_pods.sort();
    let mut of_machine: Vec<(u8, String)> =
        document.nics.iter().map(|nic| (nic.root_port.index(), nic.mac.to_string())).collect();
    of_machine.sort();
    if of_pods == of_machine {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "vm.document.nics: the machine has {of_machine:?} and the pods have {of_pods:?}; export again"
    )))
}
