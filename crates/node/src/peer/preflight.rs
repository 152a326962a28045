//! Destination: may this container come? Everything that can be known before anything is made.

use std::path::Path;
use std::time::Duration;

use crate::config::NodeConfig;
use crate::containerd::{Containerd, ContainerdError, RUNTIME, arrival, record, stdio};
use crate::cri::{self, plan::Plan};
use crate::network::{cni as made_here, contract, namespaces};
use crate::proto::{self, HostFacts, Mismatch, NetworkMode, Nic, PodNetwork, PreflightRequest, SandboxFacts};
use crate::shim::ShimHome;

/// A shim that prints its version.
const VERSION: Duration = Duration::from_secs(5);

/// What a node knows of its host.
pub(crate) async fn host_facts(config: &NodeConfig) -> HostFacts {
    HostFacts {
        architecture: std::env::consts::ARCH.into(),
        shim_version: shim_version(&config.shim).await.unwrap_or_else(|problem| problem),
    }
}

async fn shim_version(shim: &Path) -> Result<String, String> {
    let running = tokio::process::Command::new(shim).arg("-v").kill_on_drop(true).output();
    let problem = |reason: String| format!("none ({}: {reason})", shim.display());
    let output = tokio::time::timeout(VERSION, running)
        .await
        .map_err(|_| problem(format!("no answer to -v within {} s", VERSION.as_secs())))?
        .map_err(|error| problem(error.to_string()))?;
    if !output.status.success() {
        return Err(problem(output.status.to_string()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Compares `request` with this host: what will become of its NICs, and what stands in the way; an empty
/// list of that lets it come.
pub(crate) async fn compare(
    config: &NodeConfig,
    containerd: &Containerd,
    request: &PreflightRequest,
) -> Result<(Vec<Nic>, Vec<Mismatch>), ContainerdError> {
    let mut nics = Vec::new();
    let theirs = request.host.clone().unwrap_or_default();
    let sandbox = request.sandbox.clone().unwrap_or_default();
    let mut found = hosts(request.protocol, &theirs, &host_facts(config).await);
    let unusable = identity(&sandbox);
    if unusable.is_empty() {
        found.extend(shim_there(config, &sandbox).await);
        for container in &sandbox.containers {
            found.extend(arrival::obstacles(containerd, &sandbox.namespace, container).await?);
        }
        found.extend(record::obstacles(containerd, &sandbox).await?);
        found.extend(pod_obstacles(config, containerd, &sandbox).await);
        for pod in &sandbox.networks {
            let (settled, mismatches) = network_of(config, pod, sandbox.network()).await;
            nics.extend(settled);
            found.extend(mismatches);
        }
    }
    found.extend(unusable);
    Ok((nics, found))
}

fn hosts(protocol: u32, theirs: &HostFacts, ours: &HostFacts) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let mut compare = |field: &str, source: String, destination: String, way_out: &str| {
        if source != destination {
            found.push(Mismatch {
                field: field.into(),
                source,
                destination,
                way_out: way_out.into(),
                container: String::new(),
            });
        }
    };
    compare(
        "node protocol",
        protocol.to_string(),
        proto::PROTOCOL.to_string(),
        "install the same version of dunlin on both nodes",
    );
    compare(
        "architecture",
        theirs.architecture.clone(),
        ours.architecture.clone(),
        "choose a destination of the source's architecture",
    );
    compare(
        "shim version",
        theirs.shim_version.clone(),
        ours.shim_version.clone(),
        "install the same containerd-shim-dunlin-v2 on both nodes, or correct `shim` in the node's configuration",
    );
    found
}

/// What of the sandbox's own description cannot be used on any host.
fn identity(sandbox: &SandboxFacts) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let ids = sandbox.containers.iter().map(|container| &container.id);
    for id in [&sandbox.namespace, &sandbox.id].into_iter().chain(ids) {
        if stdio::plain(id).is_err() {
            found.push(Mismatch {
                field: "container id".into(),
                source: id.clone(),
                destination: "cannot be part of a path".into(),
                way_out: "use letters, digits, `-`, `_` and `.` in namespace and container ids".into(),
                container: String::new(),
            });
        }
    }
    for container in &sandbox.containers {
        if container.runtime != RUNTIME {
            found.push(Mismatch {
                field: "runtime".into(),
                source: container.runtime.clone(),
                destination: RUNTIME.into(),
                way_out: format!("start the container with `--runtime {RUNTIME}`"),
                container: container.id.clone(),
            });
        }
    }
    found
}

/// What stands in the way of a pod that CRI is to make.
async fn pod_obstacles(
    config: &NodeConfig,
    containerd: &Containerd,
    sandbox: &SandboxFacts,
) -> Vec<Mismatch> {
    let refused = |destination: String| {
        vec![Mismatch {
            field: "pod".into(),
            source: sandbox.id.clone(),
            destination,
            way_out: "make CRI able to make the pod there, or choose another destination".into(),
            container: String::new(),
        }]
    };
    match Plan::read(&sandbox.containers, &config.log_dir) {
        Ok(None) => Vec::new(),
        Ok(Some(plan)) => match cri::arrival::obstacles(&containerd.cri(), &plan).await {
            Ok(found) => found,
            Err(error) => refused(error.to_string()),
        },
        Err(error) => refused(error.to_string()),
    }
}

/// What becomes of a pod's NICs in the namespace that is to take its place.
async fn network_of(config: &NodeConfig, pod: &PodNetwork, mode: NetworkMode) -> (Vec<Nic>, Vec<Mismatch>) {
    let place = &pod.destination;
    if place.is_empty() {
        // CRI makes it, and the shim compares.
        return (contract::expected(pod, mode), Vec::new());
    }
    let refused = |destination: String, way_out: String| {
        let mismatch = Mismatch {
            field: "network namespace".into(),
            source: pod.namespace.clone(),
            destination,
            way_out,
            container: pod.pod.clone(),
        };
        (Vec::new(), vec![mismatch])
    };
    let path = match namespaces::admitted(place) {
        Ok(path) => path,
        Err(way_out) => return refused(format!("{place}, which is not opened for another host"), way_out),
    };
    if let Some(cni) = config.cni.as_ref().filter(|_| !path.exists()) {
        // Made during the move; what can be known of it now is whether there are networks to make it with.
        return match made_here::networks(cni, pod) {
            Ok(_) => (contract::expected(pod, mode), Vec::new()),
            Err(error) => refused(error.to_string(), format!("correct `[cni]` there, or make {place}")),
        };
    }
    match namespaces::interfaces(path).await {
        Ok(there) => contract::settle(pod, &there, mode, place),
        Err(error) => refused(
            error.to_string(),
            "make it there with the same addresses, name another one with --netns, or configure `[cni]` in its node"
                .into(),
        ),
    }
}

/// A shim that serves the sandbox here already. A directory whose shim has died is no obstacle.
async fn shim_there(config: &NodeConfig, sandbox: &SandboxFacts) -> Option<Mismatch> {
    let home = ShimHome::new(&config.state_dir, &sandbox.namespace, &sandbox.id);
    let socket = home.listening().await?;
    Some(Mismatch {
        field: "sandbox id".into(),
        source: sandbox.id.clone(),
        destination: format!("a shim serves it already ({socket})"),
        way_out: format!(
            "remove the containers of that sandbox there, or end the shim whose pid is in {}/shim.pid",
            home.path().display()
        ),
        container: String::new(),
    })
}

/// The list as a refusal reads it: one line a mismatch.
pub(crate) fn describe(destination: &str, mismatches: &[Mismatch]) -> String {
    let mut text = format!("{destination} cannot take it:");
    for Mismatch { field, source, destination, way_out, container } in mismatches {
        let about = if container.is_empty() { String::new() } else { format!("container {container}, ") };
        text.push_str(&format!("\n  {about}{field}: here {source}; there {destination}; {way_out}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(architecture: &str, shim: &str) -> HostFacts {
        HostFacts { architecture: architecture.into(), shim_version: shim.into() }
    }

    #[test]
    fn equal_hosts_have_nothing_to_say() {
        let host = facts("x86_64", "containerd-shim-dunlin-v2 0.1.0");
        assert_eq!(hosts(proto::PROTOCOL, &host, &host), Vec::new());
    }

    #[test]
    fn each_difference_names_field_both_values_and_a_way_out() {
        let found = hosts(9, &facts("x86_64", "v 1"), &facts("aarch64", "v 2"));
        let fields: Vec<_> = found.iter().map(|mismatch| mismatch.field.as_str()).collect();
        assert_eq!(fields, ["node protocol", "architecture", "shim version"]);
        assert!(found.iter().all(|mismatch| !mismatch.way_out.is_empty()));
        let text = describe("b", &found);
        let first = format!("b cannot take it:\n  node protocol: here 9; there {}; install", proto::PROTOCOL);
        assert!(text.starts_with(&first), "{text}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn ids_and_runtimes_of_every_container_are_looked_at() {
        let container = |id: &str, runtime: &str| proto::ContainerFacts {
            id: id.into(),
            runtime: runtime.into(),
            ..proto::ContainerFacts::default()
        };
        let mut sandbox = SandboxFacts {
            namespace: "default".into(),
            id: "pod".into(),
            containers: vec![container("pod", RUNTIME), container("web", RUNTIME)],
            ..SandboxFacts::default()
        };
        assert_eq!(identity(&sandbox), Vec::new());
        sandbox.containers.push(container("../side", RUNTIME));
        sandbox.containers.push(container("old", "io.containerd.runc.v2"));
        let found = identity(&sandbox);
        assert_eq!(found.len(), 2, "{found:?}");
        let text = describe("b", &found);
        assert!(text.contains("\n  container id: here ../side; there cannot"), "{text}");
        assert!(text.contains("\n  container old, runtime: here io.containerd.runc.v2; there"), "{text}");
    }

    #[tokio::test]
    async fn a_missing_shim_is_told_where_its_version_would_stand() {
        let text = shim_version(Path::new("/nonexistent/shim")).await.unwrap_err();
        assert!(text.starts_with("none (/nonexistent/shim: "), "{text}");
    }
}
