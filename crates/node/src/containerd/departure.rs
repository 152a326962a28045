//! Source, after the sandbox runs elsewhere: its objects go, and nothing else does.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::client::{Containerd, optional};
use super::record;
use crate::cri;
use crate::proto::cri_facts::Part;
use crate::proto::{ContainerFacts, SandboxFacts};

/// How long containerd may take, for all of a sandbox, to notice that a shim is gone.
const TASKS_GONE: Duration = Duration::from_secs(30);
pub(super) const POLL: Duration = Duration::from_millis(200);

/// Removes tasks, containers and snapshots of `sandbox`, workloads before the sandbox's own
/// container, with which its shim ends; a sandbox's record is the last. Safe to repeat; says what was left and how to remove it.
pub(crate) async fn remove(containerd: &Containerd, sandbox: &SandboxFacts) -> Vec<String> {
    let deadline = Instant::now() + TASKS_GONE;
    if let Some(pod) = pod_of(sandbox) {
        return remove_pod(containerd, sandbox, pod, deadline).await;
    }
    let mut left = Vec::new();
    for facts in sandbox.containers.iter().rev() {
        left.extend(remove_one(containerd, &sandbox.namespace, facts, deadline).await.err());
    }
    if left.is_empty() {
        left.extend(record::depart(containerd, sandbox, deadline).await.err());
    }
    left
}

/// The sandbox container's id, when CRI made it.
fn pod_of(sandbox: &SandboxFacts) -> Option<&str> {
    let is_pod = |facts: &&ContainerFacts| {
        facts.cri.as_ref().is_some_and(|cri| matches!(cri.part, Some(Part::Pod(_))))
    };
    sandbox.containers.iter().find(is_pod).map(|facts| facts.id.as_str())
}

/// The tasks as of any sandbox; what is left then is CRI's.
async fn remove_pod(
    containerd: &Containerd,
    sandbox: &SandboxFacts,
    pod: &str,
    deadline: Instant,
) -> Vec<String> {
    let mut left = Vec::new();
    for facts in sandbox.containers.iter().rev() {
        left.extend(task_gone(containerd, &sandbox.namespace, &facts.id, deadline).await.err());
    }
    if left.is_empty() {
        left.extend(cri::departure::remove(&containerd.cri(), pod).await.err());
    }
    left
}

async fn remove_one(
    containerd: &Containerd,
    namespace: &str,
    facts: &ContainerFacts,
    deadline: Instant,
) -> Result<(), String> {
    let id = &facts.id;
    task_gone(containerd, namespace, id, deadline).await?;
    optional(containerd.delete_container(namespace, id).await).map_err(|error| {
        format!("{error}; `ctr -n {namespace} container rm {id}` removes the record that is left")
    })?;
    let (snapshotter, key) = (&facts.snapshotter, &facts.snapshot_key);
    let removing = containerd.remove_snapshot(namespace, snapshotter, key);
    optional(removing.await).map(drop).map_err(|error| {
        format!(
            "{error}; `ctr -n {namespace} snapshots --snapshotter {snapshotter} rm {key}` removes the snapshot that is left"
        )
    })
}

/// Deletes the task of a stopped container, or waits until containerd has noticed that its shim
/// is gone and done so itself.
pub(crate) async fn task_gone(
    containerd: &Containerd,
    namespace: &str,
    id: &str,
    deadline: Instant,
) -> Result<(), String> {
    loop {
        let reason = match optional(containerd.delete_task(namespace, id).await) {
            Ok(_) => return Ok(()),
            Err(error) => error.to_string(),
        };
        match optional(containerd.task(namespace, id).await) {
            Ok(None) => return Ok(()),
            Ok(Some(_)) | Err(_) if Instant::now() < deadline => sleep(POLL).await,
            Ok(Some(_)) | Err(_) => {
                return Err(format!(
                    "{reason}; `ctr -n {namespace} task rm -f {id}` removes the task that is left"
                ));
            }
        }
    }
}
