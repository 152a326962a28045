//! The sandbox's configuration, for an orchestrator that makes it anew elsewhere.

use dunlin_migration::refusal::Refusal;
use dunlin_wire::ids::{ContainerId, SandboxId};
use dunlin_wire::sandbox_state::{ContainerState, PodState};

use crate::pod::Pod;
use crate::sandbox::Inner;

/// One pod and its containers.
pub(super) fn pod(inner: &Inner, pod: &Pod) -> Result<PodState, Refusal> {
    let members = inner.containers.values().filter(|container| container.pod == pod.id);
    let containers = members.map(|container| {
        Ok::<_, Refusal>(ContainerState {
            container_id: ContainerId::new(container.id.clone())?,
            guest_container_id: ContainerId::new(container.guest_id.clone())?,
            role: container.role,
            annotations: container.annotations.clone(),
            resources: if container.resources.is_null() {
                Vec::new()
            } else {
                container.resources.to_string().into_bytes()
            },
        })
    });
    Ok(PodState {
        pod_id: SandboxId::new(pod.id.clone())?,
        guest_pod_id: SandboxId::new(pod.guest_id.clone())?,
        hostname: pod.hostname.clone(),
        containers: containers.collect::<Result<_, _>>()?,
    })
}
