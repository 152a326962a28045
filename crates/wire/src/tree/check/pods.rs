//! Pods, and what they hold of the machine's tables.

use super::super::shape::{self, absolute, label, limit, mac, missing, no_time, shown, told_duration, uuid};
use super::super::{
    ADDRESSES_MAX, CONTAINERS_MAX, ContainerRole, DEVICES_MAX, ENDPOINTS_MAX, LAYERS_MAX, NEIGHBOURS_MAX,
    NetworkStage, PROCESSES_MAX, ProcessStage, RESERVATIONS_MAX, ROUTES_MAX, SavedContainer, SavedEndpoint,
    SavedLayer, SavedNetwork, SavedPod, SavedProcess, SavedTree, TreeError, VOLUMES_MAX,
};
use super::{Claims, Names, contradiction, dangling};
use crate::envelope::Place;
use crate::ids::ReservationId;

/// Bytes of a packet: the least that IPv4 takes, and the most that its length field can say.
const MTU_LEAST: u32 = 68;
const MTU_MOST: u32 = 65_535;

pub(super) fn pod<'a>(
    tree: &'a SavedTree,
    pod: &'a SavedPod,
    place: Place<'_>,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    names.pods.claim("pod id", pod.pod_id.as_str(), place)?;
    names.guest_pods.claim("guest pod id", pod.guest_pod_id.as_str(), place)?;
    limit(&format_args!("{place}.containers"), pod.containers.len(), CONTAINERS_MAX)?;
    roles(pod, place)?;
    if let Some(network) = &pod.network {
        self::network(network, &format_args!("{place}.network"), names)?;
    }
    for (at, container) in pod.containers.iter().enumerate() {
        self::container(tree, container, &format_args!("{place}.containers[{at}]"), names)?;
    }
    Ok(())
}

/// Each container's role fits the others', and the pod is called as who holds it.
fn roles(pod: &SavedPod, place: Place<'_>) -> Result<(), TreeError> {
    let mut holder = None;
    for (at, container) in pod.containers.iter().enumerate() {
        let here = || format!("{place}.containers[{at}]");
        match container.role {
            ContainerRole::Workload => continue,
            ContainerRole::Standalone if pod.containers.len() > 1 => {
                let reason = format!("stands alone, and its pod has {} containers", pod.containers.len());
                return Err(contradiction(&format_args!("{}.role", here()), reason));
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
                return Err(contradiction(&format_args!("{}.{name}", here()), reason));
            }
        }
    }
    if holder.is_none() && !pod.containers.is_empty() {
        let reason = "has workloads and no sandbox container".to_owned();
        return Err(contradiction(&format_args!("{place}.containers"), reason));
    }
    Ok(())
}

fn network<'a>(network: &'a SavedNetwork, place: Place<'_>, names: &mut Names<'a>) -> Result<(), TreeError> {
    if network.stage == NetworkStage::NotConfigured && !network.endpoints.is_empty() {
        let reason = format!("is not configured and has {} endpoints", network.endpoints.len());
        return Err(contradiction(place, reason));
    }
    limit(&format_args!("{place}.endpoints"), network.endpoints.len(), ENDPOINTS_MAX)?;
    let namespace_at = format_args!("{place}.namespace_id");
    match (network.namespace_id.is_empty(), network.endpoints.is_empty()) {
        (true, true) => {}
        (true, false) => return Err(missing(&namespace_at)),
        (false, _) => label(&network.namespace_id, &namespace_at)?,
    }
    for (id, endpoint) in &network.endpoints {
        let here = format_args!("{place}.endpoints[{:?}]", shown(id));
        label(id, &here)?;
        self::endpoint(endpoint, &here)?;
        names.nics.claim("NIC", id, &here)?;
        names.macs.claim("MAC address", endpoint.mac.as_str(), &here)?;
        names.root_ports.claim("root port", endpoint.root_port, &here)?;
    }
    Ok(())
}

fn endpoint(endpoint: &SavedEndpoint, place: Place<'_>) -> Result<(), TreeError> {
    limit(&format_args!("{place}.addresses"), endpoint.addresses.len(), ADDRESSES_MAX)?;
    limit(&format_args!("{place}.routes"), endpoint.routes.len(), ROUTES_MAX)?;
    limit(&format_args!("{place}.neighbours"), endpoint.neighbours.len(), NEIGHBOURS_MAX)?;
    if !(MTU_LEAST..=MTU_MOST).contains(&endpoint.mtu) {
        let reason = format!("{} is outside {MTU_LEAST} to {MTU_MOST}", endpoint.mtu);
        return Err(shape::contradiction(&format_args!("{place}.mtu"), reason));
    }
    for (at, address) in endpoint.addresses.iter().enumerate() {
        let address = address.addr();
        if let Some(first) = endpoint.addresses[..at].iter().position(|known| known.addr() == address) {
            return Err(TreeError::Twice {
                place: format!("{place}.addresses[{at}]"),
                what: "the address",
                name: address.to_string(),
                first: format!("{place}.addresses[{first}]"),
            });
        }
    }
    label(&endpoint.endpoint_id, &format_args!("{place}.endpoint_id"))?;
    mac(&endpoint.mac, &format_args!("{place}.mac"))?;
    label(&endpoint.name, &format_args!("{place}.name"))?;
    for (at, route) in endpoint.routes.iter().enumerate() {
        if let Some(source) = route.source
            && source.is_ipv4() != route.destination.addr().is_ipv4()
        {
            let reason = format!("{source} is of another family than {}", route.destination);
            return Err(shape::contradiction(&format_args!("{place}.routes[{at}].source"), reason));
        }
    }
    for (at, (_, one)) in endpoint.neighbours.iter().enumerate() {
        mac(one, &format_args!("{place}.neighbours[{at}].mac"))?;
    }
    Ok(())
}

fn container<'a>(
    tree: &'a SavedTree,
    container: &'a SavedContainer,
    place: Place<'_>,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    names.containers.claim("container id", container.container_id.as_str(), place)?;
    let guest_id = container.guest_container_id.as_str();
    names.guest_containers.claim("guest container id", guest_id, place)?;
    names.rootfs_paths.claim("rootfs path", container.rootfs_path.as_str(), place)?;
    shapes(container, place)?;
    for (at, layer) in container.layers.iter().enumerate() {
        self::layer(tree, layer, &format_args!("{place}.layers[{at}]"), false, names)?;
    }
    if let Some(scratch) = &container.scratch {
        self::layer(tree, scratch, &format_args!("{place}.scratch"), true, names)?;
    }
    for id in &container.scsi_reservations {
        let here = format_args!("{place}.scsi_reservations");
        if !tree.vm.scsi.reservations.contains_key(id) {
            return Err(dangling(&here, "SCSI reservation", id));
        }
        names.scsi_reservations.claim("SCSI reservation", *id, &here)?;
    }
    for id in &container.plan9_reservations {
        let here = format_args!("{place}.plan9_reservations");
        if !tree.vm.plan9.reservations.contains_key(id) {
            return Err(dangling(&here, "Plan9 reservation", id));
        }
        names.plan9_reservations.claim("Plan9 reservation", *id, &here)?;
    }
    for id in &container.vpci_devices {
        if !tree.vm.vpci.devices.contains_key(id) {
            return Err(dangling(&format_args!("{place}.vpci_devices"), "VPCI device", id));
        }
    }
    for (destination, guest_path) in &container.copies {
        let here = format_args!("{place}.copies[{:?}]", shown(destination));
        absolute(destination, &here)?;
        absolute(guest_path, &format_args!("{here}.guest_path"))?;
        names.guest_paths.claim("guest path", guest_path.as_str(), &here)?;
    }
    let mut volume_disks: Claims<ReservationId> = Claims::new(names.told);
    for (destination, id) in &container.disk_volumes {
        let here = format_args!("{place}.disk_volumes[{:?}]", shown(destination));
        absolute(destination, &here)?;
        if !container.scsi_reservations.contains(id) {
            return Err(dangling(&here, "the container's SCSI reservation", id));
        }
        if container.copies.contains_key(destination) {
            return Err(contradiction(&here, "is a copy and a disk".to_owned()));
        }
        volume_disks.claim("SCSI reservation", *id, &here)?;
    }
    for (id, process) in container.processes() {
        self::process(tree, process, &format_args!("{place}.processes[{:?}]", shown(id)), names)?;
    }
    Ok(())
}

/// How much it may have, and how its own fields may look.
fn shapes(container: &SavedContainer, place: Place<'_>) -> Result<(), TreeError> {
    // The init counts too.
    limit(&format_args!("{place}.processes"), container.execs.len() + 1, PROCESSES_MAX)?;
    limit(&format_args!("{place}.layers"), container.layers.len(), LAYERS_MAX)?;
    let scsi = container.scsi_reservations.len();
    limit(&format_args!("{place}.scsi_reservations"), scsi, RESERVATIONS_MAX)?;
    let plan9 = container.plan9_reservations.len();
    limit(&format_args!("{place}.plan9_reservations"), plan9, RESERVATIONS_MAX)?;
    limit(&format_args!("{place}.vpci_devices"), container.vpci_devices.len(), DEVICES_MAX)?;
    limit(&format_args!("{place}.copies"), container.copies.len(), VOLUMES_MAX)?;
    limit(&format_args!("{place}.disk_volumes"), container.disk_volumes.len(), VOLUMES_MAX)?;
    told_duration(container.io_retry_timeout, place, "io_retry_timeout")?;
    absolute(&container.rootfs_path, &format_args!("{place}.rootfs_path"))?;
    for (at, id) in container.vpci_devices.iter().enumerate() {
        uuid(id, &format_args!("{place}.vpci_devices[{at}]"))?;
    }
    Ok(())
}

fn layer<'a>(
    tree: &'a SavedTree,
    layer: &'a SavedLayer,
    place: Place<'_>,
    scratch: bool,
    names: &mut Names<'a>,
) -> Result<(), TreeError> {
    absolute(&layer.guest_path, &format_args!("{place}.guest_path"))?;
    let Some((slot, disk)) = tree.disk(layer) else {
        return Err(dangling(&format_args!("{place}.reservation_id"), "SCSI reservation", layer.reservation));
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
    names.scsi_reservations.claim("SCSI reservation", layer.reservation, place)
}

fn process(
    tree: &SavedTree,
    process: &SavedProcess,
    place: Place<'_>,
    names: &mut Names<'_>,
) -> Result<(), TreeError> {
    if process.terminal && process.stderr.is_some() {
        return Err(shape::contradiction(place, "has a terminal and a stderr of its own".to_owned()));
    }
    told_duration(process.io_retry_timeout, place, "io_retry_timeout")?;
    if let ProcessStage::Terminated(_, exit) = process.stage
        && exit.at_nanos >= 1_000_000_000
    {
        return Err(no_time(place));
    }
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
