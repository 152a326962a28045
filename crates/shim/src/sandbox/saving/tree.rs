//! Between the sandbox's pods, containers and processes and the saved tree, both ways, without a decision.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dunlin_migration::refusal::Refusal;
use dunlin_wire::ids::{ContainerId, ExecId, GuestPid, SandboxId, StdioPort};
use dunlin_wire::tree::{
    ContainerRole, ContainerStage, ProcessStage, SavedContainer, SavedExit, SavedLayer, SavedPod,
    SavedProcess,
};
use protobuf::well_known_types::timestamp::Timestamp;

use crate::container::{self, Container, DiskRef, INIT};
use crate::hold::Hold;
use crate::network::Network;
use crate::pod::{self, Pod};
use crate::process::io::{Ports, Stdio};
use crate::process::{self, Exit, Process};
use crate::sandbox::Inner;
use crate::service::status::{time, timestamp};

/// Ports for a process that has none yet.
pub(super) type SetAside<'a> = &'a dyn Fn(&Stdio) -> Ports;

/// Every pod, its sandbox container first.
pub(super) fn save_pods(inner: &Inner, set_aside: SetAside<'_>) -> Result<Vec<SavedPod>, Refusal> {
    let saved = inner.pods.values().map(|pod| {
        let mut members: Vec<&Container> =
            inner.containers.values().filter(|container| container.pod == pod.id).collect();
        members.sort_by_key(|container| container.role == ContainerRole::Workload);
        Ok::<_, Refusal>(SavedPod {
            pod_id: SandboxId::new(pod.id.clone())?,
            guest_pod_id: SandboxId::new(pod.guest_id.clone())?,
            network: pod.network.save(),
            containers: members
                .into_iter()
                .map(|container| save_container(container, set_aside))
                .collect::<Result<_, _>>()?,
        })
    });
    saved.collect()
}

fn save_container(container: &Container, set_aside: SetAside<'_>) -> Result<SavedContainer, Refusal> {
    let layer =
        |disk: &DiskRef| SavedLayer { reservation: disk.reservation, guest_path: disk.guest_path.clone() };
    let mut init = None;
    let mut execs = BTreeMap::new();
    for (exec_id, process) in &container.processes {
        if exec_id == INIT {
            init = Some(save_process(process, set_aside)?);
        } else {
            execs.insert(ExecId::new(exec_id.clone())?, save_process(process, set_aside)?);
        }
    }
    let init = init.ok_or_else(|| Refusal::unknown(format!("container {}: it has no init", container.id)))?;
    Ok(SavedContainer {
        container_id: ContainerId::new(container.id.clone())?,
        guest_container_id: ContainerId::new(container.guest_id.clone())?,
        role: container.role,
        layers: container.layers.iter().map(layer).collect(),
        scratch: container.scratch.as_ref().map(layer),
        layers_combined: container.layers_combined,
        rootfs_path: container.rootfs_path.clone(),
        stage: match container.state {
            container::State::Created => ContainerStage::Created,
            container::State::Stopped => ContainerStage::Stopped,
            _ => ContainerStage::Running,
        },
        paused: container.paused,
        io_retry_timeout: None,
        scsi_reservations: container.disk_volumes.values().cloned().collect(),
        plan9_reservations: container.plan9_reservations.clone(),
        vpci_devices: container.vpci_devices.clone(),
        copies: container.copies.clone(),
        disk_volumes: container.disk_volumes.clone(),
        init,
        execs,
    })
}

fn save_process(process: &Process, set_aside: SetAside<'_>) -> Result<SavedProcess, Refusal> {
    let pid = (process.pid() != 0).then_some(GuestPid(process.pid()));
    let stage = match (process.state(), pid, process.ended()) {
        (process::State::Running, Some(pid), _) => ProcessStage::Running(pid),
        (process::State::Terminated, pid, Some(exit)) => {
            let at = timestamp(exit.at);
            let at_nanos = u32::try_from(at.nanos).unwrap_or(0);
            ProcessStage::Terminated(pid, SavedExit { code: exit.code, at_seconds: at.seconds, at_nanos })
        }
        _ => ProcessStage::NotCreated,
    };
    let port = |port: Option<u32>| port.map(StdioPort);
    let ports = match stage {
        ProcessStage::NotCreated => set_aside(&process.stdio),
        ProcessStage::Created(_) | ProcessStage::Running(_) | ProcessStage::Terminated(..) => process.ports,
    };
    Ok(SavedProcess {
        stage,
        bundle: process.bundle.display().to_string(),
        oci_process: process.spec.clone().unwrap_or_default(),
        stdin: port(ports.stdin),
        stdout: port(ports.stdout),
        stderr: port(ports.stderr),
        terminal: process.stdio.terminal,
        stdin_closed: process.stdin_closed,
        io_retry_timeout: None,
        wait_call_id: process.wait_call_id,
    })
}

/// A pod, inert.
pub(super) fn import_pod(saved: &SavedPod) -> Pod {
    let owner = saved.containers.iter().find(|container| container.role != ContainerRole::Workload);
    let ended = owner.is_none_or(|container| container.stage == ContainerStage::Stopped);
    Pod {
        id: saved.pod_id.to_string(),
        guest_id: saved.guest_pod_id.to_string(),
        state: if ended { pod::State::Ended } else { pod::State::Ready },
        hold: Hold::Imported,
        hostname: String::new(),
        network: Network::import(saved.network.as_ref()),
    }
}

/// A container, inert.
pub(super) fn import_container(pod: String, saved: SavedContainer) -> Result<Container, Refusal> {
    let disk = |layer: SavedLayer| DiskRef { reservation: layer.reservation, guest_path: layer.guest_path };
    let mut processes = BTreeMap::new();
    processes.insert(INIT.to_owned(), import_process(INIT, saved.init)?);
    for (exec_id, process) in saved.execs {
        let process = import_process(exec_id.as_str(), process)?;
        processes.insert(exec_id.into(), process);
    }
    let state = match saved.stage {
        ContainerStage::Created => container::State::Created,
        ContainerStage::Running => container::State::Running,
        ContainerStage::Stopped => container::State::Stopped,
        ContainerStage::NotCreated | ContainerStage::Invalid => {
            return Err(Refusal::invalid(format!(
                "container {}: stage: it was not whole on the source; delete it there and export again",
                saved.container_id
            )));
        }
    };
    Ok(Container {
        id: saved.container_id.into(),
        guest_id: saved.guest_container_id.into(),
        pod,
        role: saved.role,
        bundle: PathBuf::new(),
        state,
        hold: Hold::Imported,
        paused: saved.paused,
        pausing: 0,
        layers: saved.layers.into_iter().map(disk).collect(),
        scratch: saved.scratch.map(disk),
        layers_combined: saved.layers_combined,
        rootfs_path: saved.rootfs_path,
        in_guest: true,
        plan9_reservations: saved.plan9_reservations,
        vpci_devices: saved.vpci_devices,
        copies: saved.copies,
        disk_volumes: saved.disk_volumes,
        processes,
        annotations: BTreeMap::new(),
        resources: serde_json::Value::Null,
    })
}

fn import_process(exec_id: &str, saved: SavedProcess) -> Result<Process, Refusal> {
    let spec = (!saved.oci_process.is_empty()).then_some(saved.oci_process);
    if let Some(spec) = &spec {
        serde_json::from_slice::<serde::de::IgnoredAny>(spec).map_err(|error| {
            Refusal::invalid(format!("process {exec_id:?}: oci_process is not JSON ({error}); export again"))
        })?;
    }
    let stdio = Stdio { terminal: saved.terminal, ..Stdio::default() };
    let mut process = Process::new(exec_id.to_owned(), PathBuf::new(), stdio, spec);
    let port = |port: Option<StdioPort>| port.map(|port| port.0);
    process.ports =
        Ports { stdin: port(saved.stdin), stdout: port(saved.stdout), stderr: port(saved.stderr) };
    process.stdin_closed = saved.stdin_closed;
    process.wait_call_id = saved.wait_call_id;
    match saved.stage {
        ProcessStage::NotCreated | ProcessStage::Created(_) => {}
        ProcessStage::Running(pid) => process.import(process::State::Running, pid.0, None),
        ProcessStage::Terminated(pid, exit) => {
            let nanos = i32::try_from(exit.at_nanos).unwrap_or(0);
            let at = time(&Timestamp { seconds: exit.at_seconds, nanos, ..Timestamp::default() });
            let exit = Exit { code: exit.code, at };
            process.import(process::State::Terminated, pid.map_or(0, |pid| pid.0), Some(exit));
        }
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::process::streams::Streams;

    #[test]
    fn a_process_that_is_not_started_says_which_streams_it_wants() {
        let stdio = Stdio { stdout: "/run/x".into(), ..Stdio::default() };
        let process = Process::new("e1".into(), "/b".into(), stdio, Some(br#"{"args":[]}"#.to_vec()));
        let set_aside =
            |stdio: &Stdio| Ports { stdout: (!stdio.stdout.is_empty()).then_some(9), ..Ports::default() };
        let again = import_process("e1", save_process(&process, &set_aside).unwrap()).unwrap();
        assert_eq!(again.state(), process::State::Created);
        assert_eq!(again.ports, Ports { stdout: Some(9), ..Ports::default() });
        assert_eq!(process.ports, Ports::default(), "here it gets its own when it starts");
    }

    #[test]
    fn a_process_comes_back_as_it_was_saved() {
        let none = |_: &Stdio| Ports::default();
        let mut process =
            Process::new("e1".into(), "/b".into(), Stdio::default(), Some(br#"{"args":[]}"#.to_vec()));
        let ports = Ports { stdin: None, stdout: Some(7), stderr: Some(8) };
        process.begin().unwrap();
        process.started(42, ports, Streams::default()).unwrap();
        process.stdin_closed = true;
        let again = import_process("e1", save_process(&process, &none).unwrap()).unwrap();
        assert_eq!(
            (again.state(), again.pid(), again.ports, again.spec, again.stdin_closed),
            (process::State::Running, 42, ports, process.spec.clone(), true)
        );
        let exit = Exit { code: 3, at: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_500_000_001) };
        process.terminate(exit);
        let again = import_process("e1", save_process(&process, &none).unwrap()).unwrap();
        assert_eq!((again.state(), again.ended()), (process::State::Terminated, Some(exit)));
    }
}
