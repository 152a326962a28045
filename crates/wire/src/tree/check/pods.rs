//! Within pods, and from pods to the machine's tables.

use std::rc::Rc;

use super::super::{
    ContainerRole, NetworkStage, ProcessStage, SavedContainer, SavedLayer, SavedNetwork, SavedPod,
    SavedProcess, SavedTree, TreeError,
};
use super::{Claims, Names, below, contradiction, dangling};

pub(super) fn pod<'a>(
    tree: &'a SavedTree,
    pod: &'a SavedPod,
    place: &Rc<str>,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    names.pods.claim("pod id", pod.pod_id.as_str(), place)?;
    names.guest_pods.claim("guest pod id", pod.guest_pod_id.as_str(), place)?;
    roles(pod, place)?;
    if let Some(network) = &pod.network {
        self::network(network, &below(place, format_args!(".network")), names)?;
    }
    for (at, container) in pod.containers.iter().enumerate() {
        self::container(tree, container, &below(place, format_args!(".containers[{at}]")), names)?;
    }
    Ok(())
}

/// Each container's role fits the others', and the pod is called as who holds it.
fn roles(pod: &SavedPod, place: &str) -> Result<(), TreeError> {
    let mut holder = None;
    for (at, container) in pod.containers.iter().enumerate() {
        let here = || format!("{place}.containers[{at}]");
        match container.role {
            ContainerRole::Workload => continue,
            ContainerRole::Standalone if pod.containers.len() > 1 => {
                let reason = format!("stands alone, and its pod has {} containers", pod.containers.len());
                return Err(contradiction(&format!("{}.role", here()), reason));
            }
            ContainerRole::Sandbox | ContainerRole::Standalone => {}
        }
        if let Some(first) = holder.replace(at) {
            return Err(TreeError::Twice {
                place: format!("{}.role", here()),
                what: "the sandbox container of pod",
                name: pod.pod_id.to_string(),
                first: format!("{place}.containers[{first}]"),
            });
        }
        for (name, own, of_pod) in [
            ("container_id", container.container_id.as_str(), pod.pod_id.as_str()),
            ("guest_container_id", container.guest_container_id.as_str(), pod.guest_pod_id.as_str()),
        ] {
            if own != of_pod {
                let reason = format!("{own} holds a pod of another name, {of_pod}");
                return Err(contradiction(&format!("{}.{name}", here()), reason));
            }
        }
    }
    if holder.is_none() && !pod.containers.is_empty() {
        let reason = "has workloads and no sandbox container".to_owned();
        return Err(contradiction(&format!("{place}.containers"), reason));
    }
    Ok(())
}

fn network<'a>(network: &'a SavedNetwork, place: &Rc<str>, names: &mut Names<'a>) -> Result<(), TreeError> {
    if network.stage == NetworkStage::NotConfigured && !network.endpoints.is_empty() {
        let reason = format!("is not configured and has {} endpoints", network.endpoints.len());
        return Err(contradiction(place, reason));
    }
    for (id, endpoint) in &network.endpoints {
        let here = below(place, format_args!(".endpoints[{id:?}]"));
        names.nics.claim("NIC", id, &here)?;
        names.macs.claim("MAC address", endpoint.mac.as_str(), &here)?;
        names.root_ports.claim("root port", endpoint.root_port, &here)?;
    }
    Ok(())
}

fn container<'a>(
    tree: &'a SavedTree,
    container: &'a SavedContainer,
    place: &Rc<str>,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    names.containers.claim("container id", container.container_id.as_str(), place)?;
    let guest_id = container.guest_container_id.as_str();
    names.guest_containers.claim("guest container id", guest_id, place)?;
    names.rootfs_paths.claim("rootfs path", container.rootfs_path.as_str(), place)?;
    for (at, layer) in container.layers.iter().enumerate() {
        self::layer(tree, layer, &below(place, format_args!(".layers[{at}]")), false, names)?;
    }
    if let Some(scratch) = &container.scratch {
        self::layer(tree, scratch, &below(place, format_args!(".scratch")), true, names)?;
    }
    for id in &container.scsi_reservations {
        let here = below(place, format_args!(".scsi_reservations"));
        if !tree.vm.scsi.reservations.contains_key(id) {
            return Err(dangling(here.to_string(), "SCSI reservation", id.as_str()));
        }
        names.scsi_reservations.claim("SCSI reservation", id.as_str(), &here)?;
    }
    for id in &container.plan9_reservations {
        let here = below(place, format_args!(".plan9_reservations"));
        if !tree.vm.plan9.reservations.contains_key(id) {
            return Err(dangling(here.to_string(), "Plan9 reservation", id.as_str()));
        }
        names.plan9_reservations.claim("Plan9 reservation", id.as_str(), &here)?;
    }
    for id in &container.vpci_devices {
        if !tree.vm.vpci.devices.contains_key(id) {
            return Err(dangling(format!("{place}.vpci_devices"), "VPCI device", id));
        }
    }
    for (destination, guest_path) in &container.copies {
        let here = below(place, format_args!(".copies[{destination:?}]"));
        names.guest_paths.claim("guest path", guest_path.as_str(), &here)?;
    }
    let mut volume_disks: Claims<&str> = Claims::default();
    for (destination, id) in &container.disk_volumes {
        let here = below(place, format_args!(".disk_volumes[{destination:?}]"));
        if !container.scsi_reservations.contains(id) {
            return Err(dangling(here.to_string(), "the container's SCSI reservation", id.as_str()));
        }
        if container.copies.contains_key(destination) {
            return Err(contradiction(&here, "is a copy and a disk".to_owned()));
        }
        volume_disks.claim("SCSI reservation", id.as_str(), &here)?;
    }
    for (id, process) in container.processes() {
        self::process(tree, process, &below(place, format_args!(".processes[{id:?}]")), names)?;
    }
    Ok(())
}

fn layer<'a>(
    tree: &'a SavedTree,
    layer: &'a SavedLayer,
    place: &Rc<str>,
    scratch: bool,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    let Some((slot, disk)) = tree.disk(layer) else {
        return Err(dangling(
            format!("{place}.reservation_id"),
            "SCSI reservation",
            layer.reservation.as_str(),
        ));
    };
    let writable = disk.access.is_writable();
    if scratch != writable {
        let reason = if scratch {
            format!("the scratch is on disk {slot}, which is read-only")
        } else {
            format!("a read-only layer is on disk {slot}, which is writable")
        };
        return Err(contradiction(place, reason));
    }
    names.scsi_reservations.claim("SCSI reservation", layer.reservation.as_str(), place)
}

fn process(
    tree: &SavedTree,
    process: &SavedProcess,
    place: &Rc<str>,
    names: &mut Names<'_>,
) -> Result<(), TreeError> {
    for port in process.ports() {
        names.ports.claim("stdio port", port, place)?;
        if port >= tree.vm.next_port {
            let next = tree.vm.next_port;
            let reason = format!("stdio port {port} is not below the next free one, {next}");
            return Err(contradiction(place, reason));
        }
    }
    if process.wait_call_id != 0 {
        let id = process.wait_call_id;
        names.waits.claim("wait call id", id, place)?;
        if id >= tree.vm.bridge_next_id {
            let next = tree.vm.bridge_next_id;
            return Err(contradiction(
                place,
                format!("wait call id {id} is not below the next free one, {next}"),
            ));
        }
    }
    match process.stage {
        // The pid of an ended process may stand for another one by now.
        ProcessStage::NotCreated | ProcessStage::Terminated(..) => Ok(()),
        ProcessStage::Created(pid) | ProcessStage::Running(pid) => {
            names.pids.claim("guest pid", pid.0, place)
        }
    }
}
