//! Source: everything about a sandbox that the other side needs, and whether it can move.

use std::path::Path;

use containerd_client::services::v1::Container;
use containerd_client::types::Sandbox;
use containerd_client::types::v1::{Process, Status};
use prost::Message;

use super::client::{Containerd, ContainerdError, optional};
use super::membership::{members, runtime_of, sandbox_among};
use super::{RUNTIME, SESSION, record, stdio};
use crate::cri::facts::CriFactsError;
use crate::cri::plan::{Plan, PlanError};
use crate::network::namespaces::{self, NetworkError};
use crate::{cri, proto};

/// Why a container cannot be moved from here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FactsError {
    /// No such container, and no such sandbox.
    #[error("there is no container or sandbox `{id}` in namespace `{namespace}`; {known}")]
    Unknown {
        /// What was asked for.
        id: String,
        /// Where.
        namespace: String,
        /// What there is, in words.
        known: String,
    },
    /// Another runtime's container.
    #[error(
        "container `{id}` runs under {runtime}, which cannot be moved; only containers started with `--runtime {RUNTIME}` can"
    )]
    Runtime {
        /// The container.
        id: String,
        /// Its runtime.
        runtime: String,
    },
    /// A sandbox that has a record and no container.
    #[error(
        "sandbox `{id}` in namespace `{namespace}` has no container, and one without can not be moved; add one to it first"
    )]
    Empty {
        /// The sandbox.
        id: String,
        /// Its namespace.
        namespace: String,
    },
    /// It does not run.
    #[error(
        "container `{id}` is not running ({state}), so there is nothing to move; `ctr -n {namespace} task start {id}` starts it"
    )]
    NotRunning {
        /// The container.
        id: String,
        /// Its namespace.
        namespace: String,
        /// Its state in words.
        state: String,
    },
    /// containerd keeps no spec, or one that is not JSON.
    #[error(
        "container `{id}`: its OCI spec cannot be read: {reason}; only containers with a JSON spec can be moved"
    )]
    Spec {
        /// The container.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// It has no snapshot.
    #[error(
        "container `{id}` has no snapshot (it was made from a root directory); only containers made from an image can be moved"
    )]
    NoSnapshot {
        /// The container.
        id: String,
    },
    /// A stream that cannot be remade elsewhere.
    #[error("container `{id}`: {reason}")]
    Stdio {
        /// The container.
        id: String,
        /// Which stream and what would do.
        reason: stdio::StdioError,
    },
    /// A pod that CRI cannot make again.
    #[error(transparent)]
    Cri(#[from] CriFactsError),
    /// Containers that are not one pod to CRI.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A pod's network namespace that cannot be read, or a choice that means none.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
}

/// A sandbox that can move.
#[derive(Debug)]
pub(crate) struct Gathered {
    /// What moves.
    pub(crate) sandbox: proto::SandboxFacts,
    /// Containers of the sandbox without a task: they stay, in words, each with the way out.
    pub(crate) stays: Vec<String>,
}

/// The sandbox that `name` means: that of the container `name`, else the sandbox `name` itself.
pub(crate) async fn sandbox_named(
    containerd: &Containerd,
    namespace: &str,
    name: &str,
) -> Result<String, FactsError> {
    let containers = containerd.containers(namespace).await?;
    if let Some(container) = containers.iter().find(|container| container.id == name) {
        return match runtime_of(container) {
            RUNTIME => Ok(sandbox_among(container, &containers)),
            other => Err(FactsError::Runtime { id: name.into(), runtime: other.into() }),
        };
    }
    if members(containers, name).is_empty() {
        if record::gather(containerd, namespace, name).await?.is_some() {
            return Err(FactsError::Empty { id: name.into(), namespace: namespace.into() });
        }
        return Err(unknown(containerd, namespace, name).await);
    }
    Ok(name.into())
}

/// What is wanted of the pods' networks on the destination.
#[derive(Debug, Clone, Default)]
pub(crate) struct NetworkWish {
    /// Whether their addresses are kept.
    pub(crate) mode: proto::NetworkMode,
    /// Where their namespaces are there.
    pub(crate) namespaces: Vec<proto::NamespaceChoice>,
}

/// Reads all of `sandbox` and refuses one that cannot move. `asked` is the container, or the
/// sandbox, by which it was named.
pub(crate) async fn gather(
    containerd: &Containerd,
    namespace: &str,
    sandbox: &str,
    asked: &str,
    wish: &NetworkWish,
) -> Result<Gathered, FactsError> {
    let mut with_task = Vec::new();
    let mut without = Vec::new();
    for container in members(containerd.containers(namespace).await?, sandbox) {
        // One by one: a list leaves out a task whose shim does not answer.
        match optional(containerd.task(namespace, &container.id).await)? {
            Some(task) => with_task.push((container, task)),
            None => without.push(container.id),
        }
    }
    let not_running = |id: &str, state: &str| FactsError::NotRunning {
        id: id.into(),
        namespace: namespace.into(),
        state: state.into(),
    };
    if without.iter().any(|id| id == asked) {
        return Err(not_running(asked, "no task"));
    }
    if !with_task.iter().any(|(_, task)| lives(task.status())) {
        let named = with_task.iter().find(|(container, _)| container.id == asked).or(with_task.first());
        return Err(match (named, without.first()) {
            (Some((container, task)), _) => not_running(&container.id, state_word(task.status())),
            (None, Some(id)) => not_running(id, "no task"),
            (None, None) => unknown(containerd, namespace, asked).await,
        });
    }
    let mut containers: Vec<proto::ContainerFacts> = Vec::with_capacity(with_task.len());
    for (container, task) in with_task {
        let in_record = container.sandbox == sandbox;
        let facts = facts_of(containerd, namespace, container, &task).await?;
        containers.push(proto::ContainerFacts { in_record, ..facts });
    }
    let record = match containers.iter().any(|container| container.cri.is_some()) {
        // CRI keeps its pods' records itself, there as here.
        true => None,
        false => record::gather(containerd, namespace, sandbox).await?,
    };
    if record.is_none() {
        containers.iter_mut().for_each(|container| container.in_record = false);
    }
    let (said, connected) = match record.as_deref().map(Sandbox::decode) {
        Some(Ok(record)) => {
            let sandboxer = record::sandboxer(&record);
            containerd.said_of_sandbox(namespace, sandbox, sandboxer).await?
        }
        // One that cannot be read is refused where it is.
        Some(Err(_)) | None => Default::default(),
    };
    // Containers of such a sandbox may name any namespace: the sandbox's own comes first.
    let own = connected.filter(|_| !said.netns_path.is_empty());
    let own = own.as_deref().map(|pod| namespaces::Own { pod, path: &said.netns_path });
    let networks = namespaces::gather(&containers, own, &wish.namespaces).await?;
    let record_network =
        own.map(|own| own.pod.to_owned()).filter(|pod| networks.iter().any(|of| of.pod == *pod));
    // The destination reads the same; here a pod that cannot be made again is told before anything begins.
    let is_pod = Plan::read(&containers, Path::new("/"))?.is_some();
    let stays = without.iter().map(|id| {
        if is_pod {
            return format!("container `{id}` of pod `{sandbox}` has no task; it is removed with the pod and not made again");
        }
        format!(
            "container `{id}` of sandbox `{sandbox}` has no task, so it stays; `ctr -n {namespace} container rm {id}` removes it"
        )
    });
    Ok(Gathered {
        stays: stays.collect(),
        sandbox: proto::SandboxFacts {
            namespace: namespace.into(),
            id: sandbox.into(),
            containers,
            networks,
            network: wish.mode.into(),
            record: record.unwrap_or_default(),
            record_network: record_network.unwrap_or_default(),
            record_options: said.options.map(|options| options.encode_to_vec()).unwrap_or_default(),
        },
    })
}

async fn facts_of(
    containerd: &Containerd,
    namespace: &str,
    container: Container,
    task: &Process,
) -> Result<proto::ContainerFacts, FactsError> {
    let id = container.id;
    if container.snapshot_key.is_empty() {
        return Err(FactsError::NoSnapshot { id });
    }
    let snapshot = containerd.snapshot(namespace, &container.snapshotter, &container.snapshot_key).await?;
    let no_spec = |reason: &str| FactsError::Spec { id: id.clone(), reason: reason.into() };
    let spec = container.spec.ok_or_else(|| no_spec("there is none"))?;
    serde_json::from_slice::<serde::de::IgnoredAny>(&spec.value)
        .map_err(|error| no_spec(&error.to_string()))?;
    let stdio = stdio::kinds(task).map_err(|reason| FactsError::Stdio { id: id.clone(), reason })?;
    let cri = match container.labels.get(cri::KIND) {
        Some(kind) if namespace == cri::NAMESPACE => {
            Some(cri::facts::gather(&containerd.cri(), kind, &id).await?)
        }
        Some(_) | None => None,
    };
    let mut labels = container.labels;
    // Of the move that brought it here; the next one has its own.
    labels.remove(SESSION);
    Ok(proto::ContainerFacts {
        id,
        image: container.image,
        labels,
        snapshotter: container.snapshotter,
        snapshot_key: container.snapshot_key,
        snapshot_parent: snapshot.parent,
        runtime: RUNTIME.into(),
        spec_type: spec.type_url,
        spec: spec.value,
        stdio: Some(stdio),
        cri,
        in_record: false,
    })
}

/// Rows for `dunlin ps`; an empty `namespace` means every one. Sessions are left empty.
pub(crate) async fn list(
    containerd: &Containerd,
    namespace: &str,
) -> Result<Vec<proto::ContainerRow>, ContainerdError> {
    let namespaces =
        if namespace.is_empty() { containerd.namespaces().await? } else { vec![namespace.to_owned()] };
    let mut rows = Vec::new();
    for namespace in namespaces {
        let tasks = containerd.tasks(&namespace).await?;
        let containers = containerd.containers(&namespace).await?;
        for container in &containers {
            // The list names its subject in `id`, single answers in `container_id` as well.
            let task = tasks.iter().find(|task| task.id == container.id || task.container_id == container.id);
            let runtime = runtime_of(container);
            let sandbox = match runtime {
                RUNTIME => sandbox_among(container, &containers),
                _ => String::new(),
            };
            rows.push(proto::ContainerRow {
                namespace: namespace.clone(),
                state: task.map_or("no task", |task| state_word(task.status())).into(),
                runtime: runtime.into(),
                sandbox,
                image: container.image.clone(),
                id: container.id.clone(),
                session: String::new(),
            });
        }
    }
    Ok(rows)
}

async fn unknown(containerd: &Containerd, namespace: &str, id: &str) -> FactsError {
    let known = what_there_is(containerd, namespace).await;
    FactsError::Unknown { id: id.into(), namespace: namespace.into(), known }
}

async fn what_there_is(containerd: &Containerd, namespace: &str) -> String {
    let here = match containerd.containers(namespace).await {
        Ok(here) => here,
        Err(_) => return "see `dunlin ps`".into(),
    };
    let names: Vec<_> = here.iter().map(|container| container.id.as_str()).collect();
    if !names.is_empty() {
        return format!("there are: {}", names.join(", "));
    }
    match containerd.namespaces().await {
        Ok(namespaces) if !namespaces.is_empty() => {
            format!("it is empty; namespaces here: {} (choose one with --namespace)", namespaces.join(", "))
        }
        _ => "it is empty".into(),
    }
}

/// Whether a task in this state has a machine to move it with.
fn lives(status: Status) -> bool {
    match status {
        Status::Created | Status::Running | Status::Paused | Status::Pausing => true,
        Status::Unknown | Status::Stopped => false,
    }
}

/// A task's state as people read it.
fn state_word(status: Status) -> &'static str {
    match status {
        Status::Unknown => "unknown",
        Status::Created => "created",
        Status::Running => "running",
        Status::Stopped => "stopped",
        Status::Paused => "paused",
        Status::Pausing => "pausing",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_way_out() {
        let runtime = FactsError::Runtime { id: "c1".into(), runtime: "io.containerd.runc.v2".into() };
        assert!(runtime.to_string().contains("--runtime io.containerd.dunlin.v2"), "{runtime}");
        let stopped =
            FactsError::NotRunning { id: "c1".into(), namespace: "default".into(), state: "no task".into() };
        assert!(stopped.to_string().contains("ctr -n default task start c1"), "{stopped}");
    }
}
