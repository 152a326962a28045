//! Pods: network, containers, processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::shape::{contradiction, directory, duration, field, known, missing, no_time, shown};
use super::super::{
    ContainerRole, ProcessStage, SavedContainer, SavedEndpoint, SavedExit, SavedLayer, SavedNetwork,
    SavedPod, SavedProcess, SavedRoute, SavedScsi, TreeError,
};
use crate::Any;
use crate::envelope::{Place, open};
use crate::ids::{ContainerId, ExecId, GuestPid, ReservationId, SandboxId, StdioPort};
use crate::saved;

pub(super) fn pod(any: &Any, scsi: &SavedScsi, place: Place<'_>) -> Result<SavedPod, TreeError> {
    let message: saved::Pod = open(any, place)?;
    let bundles = directory(message.bundle_directory, &format_args!("{place}.bundle_directory"))?;
    let roots = directory(message.root_directory, &format_args!("{place}.root_directory"))?;
    let said = (bundles.as_str(), roots.as_str());
    let containers = message.containers.iter().enumerate();
    let containers = containers
        .map(|(at, any)| container(any, scsi, said, &format_args!("{place}.containers[{at}]")))
        .collect::<Result<_, _>>()?;
    let network = message.network.as_ref().map(|any| network(any, &format_args!("{place}.network")));
    Ok(SavedPod {
        pod_id: field(SandboxId::new(message.pod_id), place, "pod_id")?,
        guest_pod_id: field(SandboxId::new(message.guest_pod_id), place, "guest_pod_id")?,
        network: network.transpose()?,
        containers,
    })
}

fn network(any: &Any, place: Place<'_>) -> Result<SavedNetwork, TreeError> {
    let message: saved::Network = open(any, place)?;
    let mut endpoints = BTreeMap::new();
    for (id, endpoint) in message.endpoints {
        let at = format_args!("{place}.endpoints[{:?}]", shown(&id));
        let endpoint = self::endpoint(endpoint, &at)?;
        endpoints.insert(id.clone(), endpoint);
    }
    Ok(SavedNetwork {
        namespace_id: message.namespace_id,
        policy_based_routing: message.policy_based_routing,
        namespace_supported: message.namespace_supported,
        stage: known(message.stage, place, "stage")?.into(),
        endpoints,
    })
}

fn endpoint(message: saved::Endpoint, place: Place<'_>) -> Result<SavedEndpoint, TreeError> {
    let root_port = u8::try_from(message.root_port).map_err(|_| {
        contradiction(
            &format_args!("{place}.root_port"),
            format!("{} is above 255, the last that there can be", message.root_port),
        )
    })?;
    let addresses = message.addresses.iter().enumerate();
    let routes = message.routes.iter().enumerate();
    let neighbours = message.neighbours.into_iter().enumerate();
    Ok(SavedEndpoint {
        endpoint_id: message.endpoint_id,
        mac: message.mac,
        name: message.name,
        root_port,
        mtu: message.mtu,
        addresses: addresses
            .map(|(at, text)| prefix(text, &format_args!("{place}.addresses[{at}]")))
            .collect::<Result<_, _>>()?,
        routes: routes
            .map(|(at, one)| route(one, &format_args!("{place}.routes[{at}]")))
            .collect::<Result<_, _>>()?,
        neighbours: neighbours
            .map(|(at, one)| {
                let here = format_args!("{place}.neighbours[{at}]");
                let address = ip(&one.address, &format_args!("{here}.address"))?;
                Ok::<_, TreeError>((address, one.mac))
            })
            .collect::<Result<_, _>>()?,
    })
}

fn route(message: &saved::Route, place: Place<'_>) -> Result<SavedRoute, TreeError> {
    let destination = prefix(&message.destination, &format_args!("{place}.destination"))?;
    let other = |text: &str, name: &str| match text.is_empty() {
        true => Ok(None),
        false => ip(text, &format_args!("{place}.{name}")).map(Some),
    };
    Ok(SavedRoute {
        destination,
        gateway: other(&message.gateway, "gateway")?,
        source: other(&message.source, "source")?,
        metric: message.metric,
        on_link: message.on_link,
    })
}

/// An address and the length of its network. Bits beyond that may be set: an interface's address keeps its own.
fn prefix(text: &str, place: Place<'_>) -> Result<IpNet, TreeError> {
    let wrong = |_| {
        let shown = shown(text);
        contradiction(place, format!("{shown:?} is not an IP address and the length of its network"))
    };
    text.parse().map_err(wrong)
}

fn ip(text: &str, place: Place<'_>) -> Result<IpAddr, TreeError> {
    text.parse().map_err(|_| contradiction(place, format!("{:?} is not an IP address", shown(text))))
}

/// `said`: the pod's directories of bundles and of roots; empty: none.
fn container(
    any: &Any,
    scsi: &SavedScsi,
    said: (&str, &str),
    place: Place<'_>,
) -> Result<SavedContainer, TreeError> {
    let (bundles, roots) = said;
    let message: saved::Container = open(any, place)?;
    let init_at = format_args!("{place}.processes[\"\"]");
    let init =
        message.processes.get("").ok_or_else(|| missing(&format_args!("{init_at} (the init process)")))?;
    let container_id = field(ContainerId::new(message.container_id), place, "container_id")?;
    let guest_container_id = if message.guest_container_id.is_empty() {
        container_id.clone()
    } else {
        field(ContainerId::new(message.guest_container_id), place, "guest_container_id")?
    };
    let bundle = (!bundles.is_empty()).then(|| format!("{bundles}/{container_id}"));
    let init = process(init, bundle.as_deref(), &init_at)?;
    let mut execs = BTreeMap::new();
    // Ordered by id: the init's, which is empty, comes first.
    for (id, any) in message.processes.iter().skip(1) {
        let at = format_args!("{place}.processes[{:?}]", shown(id));
        let exec = process(any, Some(&init.bundle), &at)?;
        execs.insert(ExecId::new(id.as_str()).map_err(|error| error.of(at))?, exec);
    }
    let layers = message.layers.into_iter().enumerate();
    let scratch_at = format_args!("{place}.scratch");
    let role = known(message.role, place, "role")?;
    let rootfs_path = if message.rootfs_path.is_empty() && !roots.is_empty() {
        format!("{roots}/{guest_container_id}/rootfs")
    } else {
        message.rootfs_path
    };
    Ok(SavedContainer {
        container_id,
        guest_container_id,
        role: ContainerRole::from_message(role).ok_or_else(|| missing(&format_args!("{place}.role")))?,
        stage: known(message.stage, place, "stage")?.into(),
        paused: message.paused,
        io_retry_timeout: duration(message.io_retry_timeout, place, "io_retry_timeout")?,
        layers: layers
            .map(|(at, one)| layer(one, scsi, &format_args!("{place}.layers[{at}]")))
            .collect::<Result<_, _>>()?,
        scratch: message.scratch.into_option().map(|one| layer(one, scsi, &scratch_at)).transpose()?,
        layers_combined: message.layers_combined,
        rootfs_path,
        scsi_reservations: held(
            message.scsi_reservations,
            &format_args!("{place}.scsi_reservations"),
            reservation,
        )?,
        plan9_reservations: held(
            message.plan9_reservations,
            &format_args!("{place}.plan9_reservations"),
            reservation,
        )?,
        vpci_devices: held(message.vpci_devices, &format_args!("{place}.vpci_devices"), |id, _| Ok(id))?,
        copies: volumes(message.copies, &format_args!("{place}.copies"), |copy, _| {
            Ok((copy.destination, copy.guest_path))
        })?,
        disk_volumes: volumes(message.disk_volumes, &format_args!("{place}.disk_volumes"), |disk, here| {
            Ok((disk.destination, reservation(disk.reservation_id, &format_args!("{here}.reservation_id"))?))
        })?,
        init,
        execs,
    })
}

fn reservation(id: Vec<u8>, place: Place<'_>) -> Result<ReservationId, TreeError> {
    ReservationId::from_bytes(&id).map_err(|error| error.of(place).into())
}

/// A list in which nothing stands twice.
fn held<I, T: Ord + ToString>(
    ids: Vec<I>,
    place: Place<'_>,
    shape: impl Fn(I, Place<'_>) -> Result<T, TreeError>,
) -> Result<BTreeSet<T>, TreeError> {
    let mut held = BTreeSet::new();
    for (at, id) in ids.into_iter().enumerate() {
        let here = format_args!("{place}[{at}]");
        if let Some(twice) = held.replace(shape(id, &here)?) {
            return Err(TreeError::Twice {
                place: here.to_string(),
                what: "the id",
                name: twice.to_string(),
                first: place.to_string(),
            });
        }
    }
    Ok(held)
}

/// What mounts became, by their places in the container: no two are at the same.
fn volumes<M, T>(
    messages: Vec<M>,
    place: Place<'_>,
    parts: impl Fn(M, Place<'_>) -> Result<(String, T), TreeError>,
) -> Result<BTreeMap<String, T>, TreeError> {
    let mut volumes = BTreeMap::new();
    for (at, message) in messages.into_iter().enumerate() {
        let here = format_args!("{place}[{at}]");
        let (destination, volume) = parts(message, &here)?;
        if volumes.insert(destination.clone(), volume).is_some() {
            return Err(TreeError::Twice {
                place: here.to_string(),
                what: "the mount on",
                name: shown(&destination).to_owned(),
                first: place.to_string(),
            });
        }
    }
    Ok(volumes)
}

fn layer(
    message: saved::LayerReservation,
    scsi: &SavedScsi,
    place: Place<'_>,
) -> Result<SavedLayer, TreeError> {
    let reservation = reservation(message.reservation_id, &format_args!("{place}.reservation_id"))?;
    let guest_path = if message.guest_path.is_empty() {
        let mounted = scsi.mount_path(&reservation).map(str::to_owned);
        mounted.ok_or_else(|| TreeError::Dangling {
            place: place.to_string(),
            what: "the mount of SCSI reservation",
            name: reservation.to_string(),
        })?
    } else {
        message.guest_path
    };
    Ok(SavedLayer { reservation, guest_path })
}

/// `bundle`: where the payload says none.
fn process(any: &Any, bundle: Option<&str>, place: Place<'_>) -> Result<SavedProcess, TreeError> {
    let message: saved::Process = open(any, place)?;
    let contradiction = |reason: &str| contradiction(place, reason.to_owned());
    let port = |number| (number != 0).then_some(StdioPort(number));
    let pid = (message.pid != 0).then_some(GuestPid(message.pid));
    let with_pid = || pid.ok_or_else(|| missing(&format_args!("{place}.pid")));
    let stage = known(message.stage, place, "stage")?;
    let exited_at = message.exited_at.into_option();
    if stage != saved::ProcessStage::PROCESS_STAGE_TERMINATED
        && (exited_at.is_some() || message.exit_code != 0)
    {
        return Err(contradiction("has an exit and has not ended"));
    }
    let stage = match stage {
        saved::ProcessStage::PROCESS_STAGE_NOT_CREATED if pid.is_some() => {
            return Err(contradiction("has a pid and was not created"));
        }
        saved::ProcessStage::PROCESS_STAGE_NOT_CREATED => ProcessStage::NotCreated,
        saved::ProcessStage::PROCESS_STAGE_CREATED => ProcessStage::Created(with_pid()?),
        saved::ProcessStage::PROCESS_STAGE_RUNNING => ProcessStage::Running(with_pid()?),
        saved::ProcessStage::PROCESS_STAGE_TERMINATED => {
            let at = exited_at.ok_or_else(|| missing(&format_args!("{place}.exited_at")))?;
            let at_nanos = u32::try_from(at.nanos).map_err(|_| no_time(place))?;
            ProcessStage::Terminated(
                pid,
                SavedExit { code: message.exit_code, at_seconds: at.seconds, at_nanos },
            )
        }
    };
    Ok(SavedProcess {
        stage,
        bundle: match (message.bundle, bundle) {
            (Some(said), _) => said,
            (None, Some(elsewhere)) => elsewhere.to_owned(),
            (None, None) => return Err(missing(&format_args!("{place}.bundle"))),
        },
        oci_process: message.oci_process_json,
        io_retry_timeout: duration(message.io_retry_timeout, place, "io_retry_timeout")?,
        stdin: port(message.stdin_port),
        stdout: port(message.stdout_port),
        stderr: port(message.stderr_port),
        stdin_closed: message.stdin_closed,
        terminal: message.terminal,
        wait_call_id: message.wait_call_id,
    })
}
