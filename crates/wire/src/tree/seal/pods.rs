//! Pods: network, containers, processes.

use std::net::IpAddr;
use std::time::Duration;

use protobuf::well_known_types::duration::Duration as DurationMessage;
use protobuf::well_known_types::timestamp::Timestamp;

use super::super::{
    DIRECTORY_MAX, ProcessStage, SavedContainer, SavedLayer, SavedNetwork, SavedPod, SavedProcess,
    SavedRoute, SavedScsi,
};
use crate::Any;
use crate::envelope::{EnvelopeError, Place, try_seal};
use crate::saved;

pub(super) fn pod(scsi: &SavedScsi, pod: SavedPod, place: Place<'_>) -> Result<Any, EnvelopeError> {
    let mut message = saved::Pod::new();
    message.pod_id = pod.pod_id.into();
    message.guest_pod_id = pod.guest_pod_id.into();
    if let Some(network) = &pod.network {
        message.network = Some(self::network(network, &format_args!("{place}.network"))?).into();
    }
    let containers = &pod.containers;
    message.bundle_directory = containers.iter().find_map(bundle_directory).unwrap_or_default().to_owned();
    message.root_directory = containers.iter().find_map(root_directory).unwrap_or_default().to_owned();
    let said = (message.bundle_directory.as_str(), message.root_directory.as_str());
    let containers = pod.containers.into_iter().enumerate();
    let containers =
        containers.map(|(at, one)| container(scsi, one, said, &format_args!("{place}.containers[{at}]")));
    message.containers = containers.collect::<Result<_, _>>()?;
    try_seal(message, place)
}

/// Where the bundle is under the container's id.
fn bundle_directory(container: &SavedContainer) -> Option<&str> {
    directory(container.init.bundle.strip_suffix(container.container_id.as_str())?)
}

/// Where the root is under the guest's id.
fn root_directory(container: &SavedContainer) -> Option<&str> {
    let bundle = container.rootfs_path.strip_suffix("/rootfs")?;
    directory(bundle.strip_suffix(container.guest_container_id.as_str())?)
}

fn directory(path: &str) -> Option<&str> {
    path.strip_suffix('/').filter(|path| (1..=DIRECTORY_MAX).contains(&path.len()))
}

fn network(network: &SavedNetwork, place: Place<'_>) -> Result<Any, EnvelopeError> {
    let mut message = saved::Network::new();
    message.namespace_id.clone_from(&network.namespace_id);
    message.policy_based_routing = network.policy_based_routing;
    message.namespace_supported = network.namespace_supported;
    message.stage = saved::NetworkStage::from(network.stage).into();
    for (id, endpoint) in &network.endpoints {
        let mut one = saved::Endpoint::new();
        one.endpoint_id.clone_from(&endpoint.endpoint_id);
        one.mac.clone_from(&endpoint.mac);
        one.name.clone_from(&endpoint.name);
        one.root_port = endpoint.root_port.into();
        one.mtu = endpoint.mtu;
        one.addresses = endpoint.addresses.iter().map(ToString::to_string).collect();
        one.routes = endpoint.routes.iter().map(route).collect();
        one.neighbours = endpoint.neighbours.iter().map(neighbour).collect();
        message.endpoints.insert(id.clone(), one);
    }
    try_seal(message, place)
}

fn route(route: &SavedRoute) -> saved::Route {
    saved::Route {
        destination: route.destination.to_string(),
        gateway: route.gateway.map(|address| address.to_string()).unwrap_or_default(),
        source: route.source.map(|address| address.to_string()).unwrap_or_default(),
        metric: route.metric,
        on_link: route.on_link,
        ..saved::Route::default()
    }
}

fn neighbour((address, mac): &(IpAddr, String)) -> saved::Neighbour {
    saved::Neighbour { address: address.to_string(), mac: mac.clone(), ..saved::Neighbour::default() }
}

/// `said`: the pod's directories of bundles and of roots; empty: none.
fn container(
    scsi: &SavedScsi,
    container: SavedContainer,
    said: (&str, &str),
    place: Place<'_>,
) -> Result<Any, EnvelopeError> {
    let (bundles, roots) = said;
    let mut message = saved::Container::new();
    let same_bundle = bundle_directory(&container) == Some(bundles);
    if container.guest_container_id != container.container_id {
        message.guest_container_id = container.guest_container_id.to_string();
    }
    message.role = container.role.message().into();
    message.stage = saved::ContainerStage::from(container.stage).into();
    message.paused = container.paused;
    message.io_retry_timeout = duration(container.io_retry_timeout).into();
    message.layers = container.layers.iter().map(|one| layer(scsi, one)).collect();
    message.scratch = container.scratch.as_ref().map(|one| layer(scsi, one)).into();
    message.layers_combined = container.layers_combined;
    if root_directory(&container) != Some(roots) {
        message.rootfs_path = container.rootfs_path;
    }
    message.scsi_reservations = container.scsi_reservations.iter().map(|id| id.to_bytes()).collect();
    message.plan9_reservations = container.plan9_reservations.iter().map(|id| id.to_bytes()).collect();
    message.vpci_devices = container.vpci_devices.into_iter().collect();
    message.container_id = container.container_id.into();
    for (destination, guest_path) in container.copies {
        let mut copy = saved::Copy::new();
        copy.destination = destination;
        copy.guest_path = guest_path;
        message.copies.push(copy);
    }
    for (destination, reservation) in container.disk_volumes {
        let mut disk = saved::DiskVolume::new();
        disk.destination = destination;
        disk.reservation_id = reservation.to_bytes();
        message.disk_volumes.push(disk);
    }
    // Of the execs: as the init's.
    let bundle = container.init.bundle.clone();
    let init = process(container.init, same_bundle, &format_args!("{place}.processes[\"\"]"))?;
    message.processes.insert(String::new(), init);
    for (id, one) in container.execs {
        let at = format_args!("{place}.processes[{:?}]", id.as_str());
        let said = one.bundle == bundle;
        let one = process(one, said, &at)?;
        message.processes.insert(id.to_string(), one);
    }
    try_seal(message, place)
}

fn layer(scsi: &SavedScsi, layer: &SavedLayer) -> saved::LayerReservation {
    let mut message = saved::LayerReservation::new();
    message.reservation_id = layer.reservation.to_bytes();
    if scsi.mount_path(&layer.reservation) != Some(layer.guest_path.as_str()) {
        message.guest_path.clone_from(&layer.guest_path);
    }
    message
}

/// `said`: its container says where its bundle is.
fn process(process: SavedProcess, said: bool, place: Place<'_>) -> Result<Any, EnvelopeError> {
    let mut message = saved::Process::new();
    message.pid = process.pid().map_or(0, |pid| pid.0);
    message.bundle = (!said).then_some(process.bundle);
    message.oci_process_json = process.oci_process;
    message.io_retry_timeout = duration(process.io_retry_timeout).into();
    message.stdin_port = process.stdin.map_or(0, |port| port.0);
    message.stdout_port = process.stdout.map_or(0, |port| port.0);
    message.stderr_port = process.stderr.map_or(0, |port| port.0);
    message.stdin_closed = process.stdin_closed;
    message.terminal = process.terminal;
    message.wait_call_id = process.wait_call_id;
    message.stage = match process.stage {
        ProcessStage::NotCreated => saved::ProcessStage::PROCESS_STAGE_NOT_CREATED,
        ProcessStage::Created(_) => saved::ProcessStage::PROCESS_STAGE_CREATED,
        ProcessStage::Running(_) => saved::ProcessStage::PROCESS_STAGE_RUNNING,
        ProcessStage::Terminated(_, exit) => {
            message.exit_code = exit.code;
            let mut at = Timestamp::new();
            at.seconds = exit.at_seconds;
            at.nanos = exit.at_nanos.cast_signed();
            message.exited_at = Some(at).into();
            saved::ProcessStage::PROCESS_STAGE_TERMINATED
        }
    }
    .into();
    try_seal(message, place)
}

fn duration(duration: Option<Duration>) -> Option<DurationMessage> {
    let duration = duration?;
    let mut message = DurationMessage::new();
    // More seconds than a payload can say are told as negative ones, which the check after sealing refuses.
    message.seconds = i64::try_from(duration.as_secs()).unwrap_or(-1);
    message.nanos = duration.subsec_nanos().cast_signed();
    Some(message)
}
