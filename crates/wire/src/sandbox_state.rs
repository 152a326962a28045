//! What an orchestrator needs to make a sandbox's configuration elsewhere: `dunlin.sandboxstate.v1`.
//!
//! Information only: nothing in it refers to the saved tree, and a destination never reads it. It is
//! what Create will be asked for again: options, sizes, annotations and resources, by pod and container.

use std::collections::{BTreeMap, BTreeSet};

use crate::Any;
use crate::envelope::{self, EnvelopeError, Payload};
use crate::ids::{ContainerId, IdError, SandboxId};
use crate::saved;
use crate::tree::{CONTAINERS_MAX, ContainerRole, PODS_MAX, SandboxOptions};

/// A sandbox's configuration is refused. Each names the place, the reason and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SandboxStateError {
    /// The envelope.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// An id's shape.
    #[error(transparent)]
    Field(#[from] IdError),
    /// Something stands twice.
    #[error("{place}: {what} {name} stands twice; export again")]
    Twice {
        /// Where the second one is.
        place: String,
        /// What kind of thing.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// More of something than is allowed.
    #[error("{place}: {count} are more than the {limit} allowed; use fewer, or split the pod")]
    TooMany {
        /// Where.
        place: String,
        /// How many.
        count: usize,
        /// How many may be.
        limit: usize,
    },
    /// A value that its field cannot have.
    #[error("{place}: {reason}; export again with the same Dunlin version on both hosts")]
    Shape {
        /// Where.
        place: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// A sandbox's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxState {
    /// Containerd's namespace.
    pub namespace: String,
    /// Containerd's id of the sandbox on the source.
    pub sandbox_id: SandboxId,
    /// As in `io.containerd.dunlin.v2`.
    pub runtime: String,
    /// What it was made with.
    pub options: SandboxOptions,
    /// The sandbox's.
    pub annotations: BTreeMap<String, String>,
    /// The machine's memory, MiB.
    pub memory_mib: u64,
    /// The machine's processors.
    pub vcpus: u32,
    /// QEMU's name of the machine.
    pub machine: String,
    /// QEMU's name of the CPU model.
    pub cpu: String,
    /// Size of a container's scratch disk, MiB.
    pub scratch_mib: u64,
    /// Its pods.
    pub pods: Vec<PodState>,
}

/// A pod's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodState {
    /// Containerd's id on the source.
    pub pod_id: SandboxId,
    /// The guest's id.
    pub guest_pod_id: SandboxId,
    /// May be empty: the guest's.
    pub hostname: String,
    /// Its containers.
    pub containers: Vec<ContainerState>,
}

/// A container's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerState {
    /// Containerd's id on the source.
    pub container_id: ContainerId,
    /// The guest's id.
    pub guest_container_id: ContainerId,
    /// What it is in its pod.
    pub role: ContainerRole,
    /// Its OCI spec's annotations.
    pub annotations: BTreeMap<String, String>,
    /// JSON object: its OCI spec's `linux.resources`. Empty: none.
    pub resources: Vec<u8>,
}

impl SandboxState {
    /// The payload's name, `type.dunlin.dev/dunlin.sandboxstate.v1`.
    pub fn type_url() -> String {
        saved::SandboxState::type_url()
    }

    /// Opens and checks the payload.
    pub fn open(any: &Any) -> Result<SandboxState, SandboxStateError> {
        const PLACE: &str = "sandbox_state";
        let message: saved::SandboxState = envelope::open(any, &PLACE)?;
        limit(&format!("{PLACE}.pods"), message.pods.len(), PODS_MAX)?;
        // A namespace has an identifier's shape, as containerd has it.
        ContainerId::new(message.namespace.as_str())
            .map_err(|error| error.of(format_args!("{PLACE}.namespace")))?;
        let options_at = format!("{PLACE}.options");
        let options = message.options.into_option().ok_or_else(|| shape(&options_at, "missing"))?;
        let options = SandboxOptions::from_message(options);
        if !options.has_architecture() {
            return Err(shape(&format!("{options_at}.architecture"), "is neither amd64 nor arm64"));
        }
        let mut pods = Vec::with_capacity(message.pods.len());
        let mut seen = BTreeSet::new();
        for (at, pod) in message.pods.into_iter().enumerate() {
            let place = format!("{PLACE}.pods[{at}]");
            let pod = self::pod(pod, &place)?;
            if !seen.insert(pod.pod_id.clone()) {
                return Err(SandboxStateError::Twice { place, what: "pod", name: pod.pod_id.to_string() });
            }
            pods.push(pod);
        }
        Ok(SandboxState {
            namespace: message.namespace,
            sandbox_id: SandboxId::new(message.sandbox_id)
                .map_err(|error| error.of(format_args!("{PLACE}.sandbox_id")))?,
            runtime: message.runtime,
            options,
            annotations: message.annotations,
            memory_mib: message.memory_mib,
            vcpus: message.vcpus,
            machine: message.machine,
            cpu: message.cpu,
            scratch_mib: message.scratch_mib,
            pods,
        })
    }

    /// Seals it, when [`SandboxState::open`] would take it.
    pub fn seal(&self) -> Result<Any, SandboxStateError> {
        let message = saved::SandboxState {
            namespace: self.namespace.clone(),
            sandbox_id: self.sandbox_id.to_string(),
            runtime: self.runtime.clone(),
            options: Some(self.options.message()).into(),
            annotations: self.annotations.clone(),
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            machine: self.machine.clone(),
            cpu: self.cpu.clone(),
            scratch_mib: self.scratch_mib,
            pods: self.pods.iter().map(PodState::message).collect(),
            ..saved::SandboxState::default()
        };
        let any = envelope::seal(message);
        SandboxState::open(&any)?;
        Ok(any)
    }
}

impl PodState {
    fn message(&self) -> saved::PodState {
        saved::PodState {
            pod_id: self.pod_id.to_string(),
            guest_pod_id: self.guest_pod_id.to_string(),
            hostname: self.hostname.clone(),
            containers: self.containers.iter().map(ContainerState::message).collect(),
            ..saved::PodState::default()
        }
    }
}

impl ContainerState {
    fn message(&self) -> saved::ContainerState {
        saved::ContainerState {
            container_id: self.container_id.to_string(),
            guest_container_id: self.guest_container_id.to_string(),
            role: self.role.message().into(),
            annotations: self.annotations.clone(),
            resources: self.resources.clone(),
            ..saved::ContainerState::default()
        }
    }
}

fn pod(message: saved::PodState, place: &str) -> Result<PodState, SandboxStateError> {
    limit(&format!("{place}.containers"), message.containers.len(), CONTAINERS_MAX)?;
    let mut containers = Vec::with_capacity(message.containers.len());
    let mut seen = BTreeSet::new();
    for (at, container) in message.containers.into_iter().enumerate() {
        let place = format!("{place}.containers[{at}]");
        let container = self::container(container, &place)?;
        if !seen.insert(container.container_id.clone()) {
            let name = container.container_id.to_string();
            return Err(SandboxStateError::Twice { place, what: "container", name });
        }
        containers.push(container);
    }
    let at = |name: &str| format!("{place}.{name}");
    Ok(PodState {
        pod_id: SandboxId::new(message.pod_id).map_err(|error| error.of(at("pod_id")))?,
        guest_pod_id: SandboxId::new(message.guest_pod_id).map_err(|error| error.of(at("guest_pod_id")))?,
        hostname: message.hostname,
        containers,
    })
}

fn container(message: saved::ContainerState, place: &str) -> Result<ContainerState, SandboxStateError> {
    let at = |name: &str| format!("{place}.{name}");
    let role = message.role.enum_value().ok().and_then(ContainerRole::from_message);
    let role = role.ok_or_else(|| shape(&at("role"), "missing"))?;
    let object =
        |json: &[u8]| serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(json).is_ok();
    if !message.resources.is_empty() && !object(&message.resources) {
        return Err(shape(&at("resources"), "is not a JSON object"));
    }
    Ok(ContainerState {
        container_id: ContainerId::new(message.container_id).map_err(|error| error.of(at("container_id")))?,
        guest_container_id: ContainerId::new(message.guest_container_id)
            .map_err(|error| error.of(at("guest_container_id")))?,
        role,
        annotations: message.annotations,
        resources: message.resources,
    })
}

fn shape(place: &str, reason: &'static str) -> SandboxStateError {
    SandboxStateError::Shape { place: place.to_owned(), reason }
}

fn limit(place: &str, count: usize, limit: usize) -> Result<(), SandboxStateError> {
    if count > limit {
        return Err(SandboxStateError::TooMany { place: place.to_owned(), count, limit });
    }
    Ok(())
}

#[cfg(test)]
#[path = "sandbox_state_tests.rs"]
mod tests;
