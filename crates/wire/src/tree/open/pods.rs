//! Pods: network, containers, processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::{
    ADDRESSES_MAX, CONTAINERS_MAX, ContainerRole, DEVICES_MAX, ENDPOINTS_MAX, LAYERS_MAX, NEIGHBOURS_MAX,
    PROCESSES_MAX, ProcessStage, RESERVATIONS_MAX, ROUTES_MAX, SavedContainer, SavedEndpoint, SavedExit,
    SavedLayer, SavedNetwork, SavedPod, SavedProcess, SavedRoute, SavedScsi, TreeError, VOLUMES_MAX,
};
use super::shape::{
    absolute, contradiction, directory, duration, field, known, label, limit, mac, missing, shown, uuid,
};
use crate::Any;
use crate::envelope::open;
use crate::ids::{ContainerId, ExecId, GuestPid, ReservationId, SandboxId, StdioPort};
use crate::saved;

/// Bytes of a packet: the least that IPv4 takes, and the most that its length field can say.
const MTU_LEAST: u32 = 68;
const MTU_MOST: u32 = 65_535;

pub(super) fn pod(any: &Any, scsi: &SavedScsi, place: &str) -> Result<SavedPod, TreeError> {
    let message: saved::Pod = open(any, place)?;
    limit(&format!("{place}.containers"), message.containers.len(), CONTAINERS_MAX)?;
    let bundles = directory(message.bundle_directory, &format!("{place}.bundle_directory"))?;
    let roots = directory(message.root_directory, &format!("{place}.root_directory"))?;
    let said = (bundles.as_str(), roots.as_str());
    let containers = message.containers.iter().enumerate();
    let containers = containers
        .map(|(at, any)| container(any, scsi, said, &format!("{place}.containers[{at}]")))
        .collect::<Result<_, _>>()?;
    let network = message.network.as_ref().map(|any| network(any, &format!("{place}.network")));
    Ok(SavedPod {
        pod_id: field(SandboxId::new(message.pod_id), place, "pod_id")?,
        guest_pod_id: field(SandboxId::new(message.guest_pod_id), place, "guest_pod_id")?,
        network: network.transpose()?,
        containers,
    })
}

fn network(any: &Any, place: &str) -> Result<SavedNetwork, TreeError> {
    let message: saved::Network = open(any, place)?;
    limit(&format!("{place}.endpoints"), message.endpoints.len(), ENDPOINTS_MAX)?;
    let namespace_at = format!("{place}.namespace_id");
    let mut endpoints = BTreeMap::new();
    for (id, endpoint) in message.endpoints {
        let at = format!("{place}.endpoints[{:?}]", shown(&id));
        endpoints.insert(label(id, &at)?, self::endpoint(endpoint, &at)?);
    }
    Ok(SavedNetwork {
        namespace_id: match (message.namespace_id.is_empty(), endpoints.is_empty()) {
            (true, true) => String::new(),
            (true, false) => return Err(missing(&namespace_at)),
            (false, _) => label(message.namespace_id, &namespace_at)?,
        },
        policy_based_routing: message.policy_based_routing,
        namespace_supported: message.namespace_supported,
        stage: known(message.stage, place, "stage")?.into(),
        endpoints,
    })
}

fn endpoint(message: saved::Endpoint, place: &str) -> Result<SavedEndpoint, TreeError> {
    let root_port = u8::try_from(message.root_port).map_err(|_| {
        contradiction(
            &format!("{place}.root_port"),
            format!("{} is above 255, the last that there can be", message.root_port),
        )
    })?;
    limit(&format!("{place}.addresses"), message.addresses.len(), ADDRESSES_MAX)?;
    limit(&format!("{place}.routes"), message.routes.len(), ROUTES_MAX)?;
    limit(&format!("{place}.neighbours"), message.neighbours.len(), NEIGHBOURS_MAX)?;
    if !(MTU_LEAST..=MTU_MOST).contains(&message.mtu) {
        let reason = format!("{} is outside {MTU_LEAST} to {MTU_MOST}", message.mtu);
        return Err(contradiction(&format!("{place}.mtu"), reason));
    }
    let mut addresses: Vec<IpNet> = Vec::with_capacity(message.addresses.len());
    for (at, text) in message.addresses.iter().enumerate() {
        let here = format!("{place}.addresses[{at}]");
        let address = prefix(text, &here)?;
        if let Some(first) = addresses.iter().position(|known| known.addr() == address.addr()) {
            return Err(TreeError::Twice {
                place: here,
                what: "the address",
                name: address.addr().to_string(),
                first: format!("{place}.addresses[{first}]"),
            });
        }
        addresses.push(address);
    }
    let routes = message.routes.iter().enumerate();
    let neighbours = message.neighbours.into_iter().enumerate();
    Ok(SavedEndpoint {
        endpoint_id: label(message.endpoint_id, &format!("{place}.endpoint_id"))?,
        mac: mac(message.mac, &format!("{place}.mac"))?,
        name: label(message.name, &format!("{place}.name"))?,
        root_port,
        mtu: message.mtu,
        addresses,
        routes: routes
            .map(|(at, one)| route(one, &format!("{place}.routes[{at}]")))
            .collect::<Result<_, _>>()?,
        neighbours: neighbours
            .map(|(at, one)| {
                let here = format!("{place}.neighbours[{at}]");
                let address = ip(&one.address, &format!("{here}.address"))?;
                Ok::<_, TreeError>((address, mac(one.mac, &format!("{here}.mac"))?))
            })
            .collect::<Result<_, _>>()?,
    })
}

fn route(message: &saved::Route, place: &str) -> Result<SavedRoute, TreeError> {
    let destination = prefix(&message.destination, &format!("{place}.destination"))?;
    let other = |text: &str, name: &str| match text.is_empty() {
        true => Ok(None),
        false => ip(text, &format!("{place}.{name}")).map(Some),
    };
    let source = other(&message.source, "source")?;
    if let Some(source) = source
        && source.is_ipv4() != destination.addr().is_ipv4()
    {
        let reason = format!("{source} is of another family than {destination}");
        return Err(contradiction(&format!("{place}.source"), reason));
    }
    Ok(SavedRoute {
        destination,
        gateway: other(&message.gateway, "gateway")?,
        source,
        metric: message.metric,
        on_link: message.on_link,
    })
}

/// An address and the length of its network. Bits beyond that may be set: an interface's address keeps its own.
fn prefix(text: &str, place: &str) -> Result<IpNet, TreeError> {
    let wrong = |_| {
        let shown = shown(text);
        contradiction(place, format!("{shown:?} is not an IP address and the length of its network"))
    };
    text.parse().map_err(wrong)
}

fn ip(text: &str, place: &str) -> Result<IpAddr, TreeError> {
    text.parse().map_err(|_| contradiction(place, format!("{:?} is not an IP address", shown(text))))
}

/// `said`: the pod's directories of bundles and of roots; empty: none.
fn container(
    any: &Any,
    scsi: &SavedScsi,
    said: (&str, &str),
    place: &str,
) -> Result<SavedContainer, TreeError> {
    let (bundles, roots) = said;
    let message: saved::Container = open(any, place)?;
    limit(&format!("{place}.processes"), message.processes.len(), PROCESSES_MAX)?;
    limit(&format!("{place}.layers"), message.layers.len(), LAYERS_MAX)?;
    let init_at = format!("{place}.processes[\"\"]");
    let init = message.processes.get("").ok_or_else(|| missing(&format!("{init_at} (the init process)")))?;
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
        let at = format!("{place}.processes[{:?}]", shown(id));
        let exec = process(any, Some(&init.bundle), &at)?;
        execs.insert(ExecId::new(id.as_str()).map_err(|error| error.of(&at))?, exec);
    }
    let layers = message.layers.into_iter().enumerate();
    let scratch_at = format!("{place}.scratch");
    let role = known(message.role, place, "role")?;
    let rootfs_path = if message.rootfs_path.is_empty() && !roots.is_empty() {
        format!("{roots}/{guest_container_id}/rootfs")
    } else {
        message.rootfs_path
    };
    Ok(SavedContainer {
        container_id,
        guest_container_id,
        role: ContainerRole::from_message(role).ok_or_else(|| missing(&format!("{place}.role")))?,
        stage: known(message.stage, place, "stage")?.into(),
        paused: message.paused,
        io_retry_timeout: duration(message.io_retry_timeout, place, "io_retry_timeout")?,
        layers: layers
            .map(|(at, one)| layer(one, scsi, &format!("{place}.layers[{at}]")))
            .collect::<Result<_, _>>()?,
        scratch: message.scratch.into_option().map(|one| layer(one, scsi, &scratch_at)).transpose()?,
        layers_combined: message.layers_combined,
        rootfs_path: absolute(rootfs_path, &format!("{place}.rootfs_path"))?,
        scsi_reservations: held(
            message.scsi_reservations,
            &format!("{place}.scsi_reservations"),
            RESERVATIONS_MAX,
            reservation,
        )?,
        plan9_reservations: held(
            message.plan9_reservations,
            &format!("{place}.plan9_reservations"),
            RESERVATIONS_MAX,
            reservation,
        )?,
        vpci_devices: held(message.vpci_devices, &format!("{place}.vpci_devices"), DEVICES_MAX, uuid)?,
        copies: volumes(message.copies, &format!("{place}.copies"), |copy, here| {
            Ok((copy.destination, absolute(copy.guest_path, &format!("{here}.guest_path"))?))
        })?,
        disk_volumes: volumes(message.disk_volumes, &format!("{place}.disk_volumes"), |disk, here| {
            Ok((disk.destination, reservation(disk.reservation_id, &format!("{here}.reservation_id"))?))
        })?,
        init,
        execs,
    })
}

fn reservation(id: Vec<u8>, place: &str) -> Result<ReservationId, TreeError> {
    Ok(super::super::uuid::id(&id, place)?)
}

/// A list in which nothing stands twice.
fn held<I, T: Ord + ToString>(
    ids: Vec<I>,
    place: &str,
    most: usize,
    shape: impl Fn(I, &str) -> Result<T, TreeError>,
) -> Result<BTreeSet<T>, TreeError> {
    limit(place, ids.len(), most)?;
    let mut held = BTreeSet::new();
    for (at, id) in ids.into_iter().enumerate() {
        let here = format!("{place}[{at}]");
        if let Some(twice) = held.replace(shape(id, &here)?) {
            return Err(TreeError::Twice {
                place: here,
                what: "the id",
                name: twice.to_string(),
                first: place.to_owned(),
            });
        }
    }
    Ok(held)
}

/// What mounts became, by their places in the container: no two are at the same.
fn volumes<M, T>(
    messages: Vec<M>,
    place: &str,
    parts: impl Fn(M, &str) -> Result<(String, T), TreeError>,
) -> Result<BTreeMap<String, T>, TreeError> {
    limit(place, messages.len(), VOLUMES_MAX)?;
    let mut volumes = BTreeMap::new();
    for (at, message) in messages.into_iter().enumerate() {
        let here = format!("{place}[{at}]");
        let (destination, volume) = parts(message, &here)?;
        let destination = absolute(destination, &format!("{here}.destination"))?;
        if volumes.insert(destination.clone(), volume).is_some() {
            return Err(TreeError::Twice {
                place: here,
                what: "the mount on",
                name: shown(&destination),
                first: place.to_owned(),
            });
        }
    }
    Ok(volumes)
}

fn layer(message: saved::LayerReservation, scsi: &SavedScsi, place: &str) -> Result<SavedLayer, TreeError> {
    let reservation = reservation(message.reservation_id, &format!("{place}.reservation_id"))?;
    let guest_path = if message.guest_path.is_empty() {
        let mounted = scsi.mount_path(&reservation).map(str::to_owned);
        mounted.ok_or_else(|| TreeError::Dangling {
            place: place.to_owned(),
            what: "the mount of SCSI reservation",
            name: reservation.to_string(),
        })?
    } else {
        absolute(message.guest_path, &format!("{place}.guest_path"))?
    };
    Ok(SavedLayer { reservation, guest_path })
}

/// `bundle`: where the payload says none.
fn process(any: &Any, bundle: Option<&str>, place: &str) -> Result<SavedProcess, TreeError> {
    let message: saved::Process = open(any, place)?;
    let contradiction = |reason: &str| contradiction(place, reason.to_owned());
    let port = |number| (number != 0).then_some(StdioPort(number));
    if message.terminal && message.stderr_port != 0 {
        return Err(contradiction("has a terminal and a stderr of its own"));
    }
    let pid = (message.pid != 0).then_some(GuestPid(message.pid));
    let with_pid = || pid.ok_or_else(|| missing(&format!("{place}.pid")));
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
            let at = exited_at.ok_or_else(|| missing(&format!("{place}.exited_at")))?;
            let at_nanos = u32::try_from(at.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
            let at_nanos = at_nanos.ok_or_else(|| contradiction("exited_at is no time"))?;
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
            (None, None) => return Err(missing(&format!("{place}.bundle"))),
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
