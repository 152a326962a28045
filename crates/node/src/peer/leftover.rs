//! Destination: what a former life of this node began and nobody can finish any more.
//!
//! A session is known to the life that began it alone: after a restart its move cannot succeed, unless
//! it had already. What is left of it is found by the label that its containers, and the sandbox's record if it has one, carry until they run:
//!
//! | shim of the sandbox | containers and record |
//! |---|---|
//! | runs the machine | stay; the label goes |
//! | holds a machine that has come whole | stay, with a warning: if the source is lost, it is the last copy |
//! | waits for the session | go, after the shim has cancelled it and is ended |
//! | is gone, and containerd has no task | go |
//! | does not know the session | stay, with a warning |
//! | anything else, or what goes could not be removed | looked at again, in the end stay, with a warning |

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Duration;

use containerd_client::services::v1::Container;
use containerd_client::types::Sandbox;
use containerd_client::types::v1::Status;
use dunlin_wire::service;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::config::NodeConfig;
use crate::containerd::arrival::{Place, remove_objects};
use crate::containerd::client::{Containerd, ContainerdError, optional};
use crate::containerd::membership::{annotation_of, runtime_of};
use crate::containerd::{CRI_SANDBOX, RUNTIME, SANDBOX, SESSION, SOURCE_CONTAINER, record, stdio};
use crate::cri;
use crate::network::cni::made::Memory;
use crate::network::namespaces;
use crate::shim::{Shim, ShimHome, process};

/// A shim that was cancelled and is being ended by its owner.
const SHIM_END: Duration = Duration::from_secs(5);
/// All of it, when the node starts.
const SWEEP: Duration = Duration::from_secs(60);
/// From one look to the next.
const AGAIN: Duration = Duration::from_secs(1);
/// How long containerd may take to notice that a shim is gone.
const TASK_GONE: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(200);
/// A shim that has told all it has to tell says nothing for so long.
const TOLD: Duration = Duration::from_secs(1);

/// A container that an arrival made and that nobody owns yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unsettled {
    place: Place,
    id: String,
    snapshotter: String,
    snapshot_key: String,
    /// Its pod, when CRI made it.
    pod: Option<String>,
}

/// What arrivals of one sandbox made and nobody owns yet; one of the two is there.
#[derive(Debug, Default)]
struct Found {
    containers: Vec<Unsettled>,
    /// The sandbox's own, with the session that made it.
    record: Option<(Place, Sandbox)>,
}

impl Found {
    fn session(&self) -> Option<&str> {
        let first = self.containers.first().map(|container| &container.place);
        first.or(self.record.as_ref().map(|(place, _)| place)).map(|place| place.session.as_str())
    }
}

/// What became of a session that this life of the node does not know.
#[derive(Debug)]
pub(crate) enum Former {
    /// Its shim is ended.
    Gone,
    /// No shim here knows it.
    NotHere,
    /// It is past the point where it can be taken back; in the shim's words.
    Runs(String),
    /// Nobody can say, and why.
    Unclear(String),
}

/// Whether a shim that does not answer ends by itself within a moment. Its machine ends with it.
async fn gone(shim: process::Process) -> bool {
    let ended = async {
        while shim.lives() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SHIM_END, ended).await.is_ok()
}

/// Asks the shim of `home` to cancel `session`, and ends it when it has.
pub(crate) async fn end_shim(home: &ShimHome, session: &str) -> Former {
    let Some(process) = home.process() else { return Former::NotHere };
    let shim = match Shim::connect(home, session).await {
        Ok(shim) => shim,
        Err(error) => return Former::Unclear(error.to_string()),
    };
    match shim.cancel().await {
        Err(error) if error.is_no_session() => return Former::NotHere,
        // What is cancelled ends its tasks; whoever owns those may delete them and end the shim before it has answered.
        Err(error) if error.is_silence() => {
            return if gone(process).await { Former::Gone } else { Former::Unclear(error.to_string()) };
        }
        // It is decided, or being decided: STOP tells which way.
        Err(error) => tracing::debug!(session, %error, "cannot be cancelled"),
        Ok(()) => {}
    }
    match shim.stop().await {
        Err(error) if error.is_resumed() => return Former::Runs(error.to_string()),
        Err(error) => return Former::Unclear(error.to_string()),
        Ok(()) => {}
    }
    let _ = shim.cleanup().await;
    if !process::end(process).await {
        let path = home.path().display();
        return Former::Unclear(format!("the shim could not be ended; its pid is in {path}/shim.pid"));
    }
    home.forget();
    Former::Gone
}

/// Whether the shim of `home` told that all of the machine is there. One that cannot be asked says no.
pub(super) async fn has_come_whole(home: &ShimHome, session: &str) -> bool {
    let Ok(shim) = Shim::connect(home, session).await else { return false };
    let Ok(mut told) = shim.notifications(0).await else { return false };
    let done = service::Phase::PHASE_DONE;
    while let Ok(Ok(Some(response))) = tokio::time::timeout(TOLD, told.recv()).await {
        if response.notification.phase.enum_value() == Ok(done) {
            return true;
        }
    }
    false
}

/// What a look at one sandbox came to.
#[derive(Debug)]
enum Verdict {
    /// Nothing of it is unsettled any more.
    Settled,
    /// It is not this node's to decide, and why.
    Left(String),
    /// This time it could not be decided, and why.
    Unsure(String),
}

/// When the node starts, before it takes part in any move: goes through every namespace, and again while something could not
/// be decided: a shim or CRI may still be busy with what the former life had asked of them.
pub(crate) async fn sweep(config: &NodeConfig, containerd: &Containerd) {
    let deadline = Instant::now() + SWEEP;
    // Kept outside: a look that is cut off in its middle must not take the reasons with it.
    let mut unsure = BTreeMap::new();
    let sweeping = async {
        let mut told = HashSet::new();
        loop {
            sweep_sandboxes(config, containerd, &mut told, &mut unsure).await?;
            if unsure.is_empty() || Instant::now() + AGAIN >= deadline {
                break;
            }
            sleep(AGAIN).await;
        }
        sweep_networks(config, containerd).await
    };
    match tokio::time::timeout_at(deadline, sweeping).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot look for what unfinished moves have left"),
        Err(_) => tracing::warn!("gave up looking for what unfinished moves have left"),
    }
    for (sandbox, reason) in unsure {
        tracing::warn!(sandbox, reason, "left as it is; starting this node again looks at it again");
    }
}

/// Looks once at each sandbox. `told`: those that are left for good; `unsure`: those that could not be decided, and why.
async fn sweep_sandboxes(
    config: &NodeConfig,
    containerd: &Containerd,
    told: &mut HashSet<String>,
    unsure: &mut BTreeMap<String, String>,
) -> Result<(), ContainerdError> {
    let mut still = HashSet::new();
    for namespace in containerd.namespaces().await? {
        let records = unsettled_records(containerd, &namespace).await?;
        for (sandbox, found) in by_sandbox(unsettled(containerd, &namespace).await?, records) {
            let name = format!("{namespace}/{sandbox}");
            if told.contains(&name) {
                continue;
            }
            let home = ShimHome::new(&config.state_dir, &namespace, &sandbox);
            // One that cannot be looked at keeps no other waiting.
            let reason = match sweep_sandbox(config, containerd, &home, &found).await {
                Ok(Verdict::Settled) => continue,
                Ok(Verdict::Left(reason)) => {
                    tracing::warn!(sandbox = name, reason, "left as it is");
                    told.insert(name);
                    continue;
                }
                Ok(Verdict::Unsure(reason)) => reason,
                Err(error) => error.to_string(),
            };
            unsure.insert(name.clone(), reason);
            still.insert(name);
        }
    }
    unsure.retain(|name, _| still.contains(name));
    Ok(())
}

async fn sweep_sandbox(
    config: &NodeConfig,
    containerd: &Containerd,
    home: &ShimHome,
    found: &Found,
) -> Result<Verdict, ContainerdError> {
    let Some(session) = found.session() else {
        return Ok(Verdict::Settled);
    };
    if home.process().is_some() || home.listening().await.is_some() {
        // A shim lets nothing run before its move has succeeded.
        if any_runs(containerd, &found.containers).await? {
            return settle(containerd, found).await;
        }
        if has_come_whole(home, session).await {
            return Ok(Verdict::Left(format!(
                "its machine has come whole and was never told to run (session {session}): the source ends or runs it; \
                 when the source is lost for good, FinalizeSandbox in the shim at {}/address decides",
                home.path().display()
            )));
        }
        match end_shim(home, session).await {
            Former::Gone => {}
            Former::Runs(_) => return settle(containerd, found).await,
            Former::NotHere => {
                let reason = format!("a shim serves it and does not know session {session}");
                return Ok(Verdict::Left(reason));
            }
            Former::Unclear(reason) => return Ok(Verdict::Unsure(format!("session {session}: {reason}"))),
        }
    }
    let mut left = Vec::new();
    for container in found.containers.iter().rev() {
        let id = &container.id;
        match remove(containerd, &config.io_dir, container).await {
            Ok(()) => tracing::warn!(session, id, "removed a container that an unfinished move had left"),
            Err(reason) => left.push(reason),
        }
    }
    if let Some((place, kept)) = &found.record {
        let removing = record::remove(containerd, place, &kept.sandboxer, Instant::now() + TASK_GONE);
        match removing.await {
            Ok(()) => tracing::warn!(session, "removed a sandbox's record that an unfinished move had left"),
            Err(reason) => left.push(reason),
        }
    }
    Ok(if left.is_empty() { Verdict::Settled } else { Verdict::Unsure(left.join("; ")) })
}

/// Removes what `session` made in `namespace`, once its shim is gone. Says what was left.
pub(crate) async fn remove_session(
    config: &NodeConfig,
    containerd: &Containerd,
    namespace: &str,
    session: &str,
) -> Vec<String> {
    let found = match unsettled(containerd, namespace).await {
        Ok(found) => found,
        Err(error) => {
            return vec![format!(
                "cannot look for containers of session {session}: {error}; restarting this node removes them"
            )];
        }
    };
    let mut left = Vec::new();
    for container in found.iter().rev().filter(|container| container.place.session == session) {
        left.extend(remove(containerd, &config.io_dir, container).await.err());
    }
    match unsettled_records(containerd, namespace).await {
        Ok(records) => {
            for (place, kept) in records.iter().filter(|(place, _)| place.session == session) {
                let deadline = Instant::now() + TASK_GONE;
                left.extend(record::remove(containerd, place, &kept.sandboxer, deadline).await.err());
            }
        }
        Err(error) => left.push(format!("cannot look for records of session {session}: {error}")),
    }
    left.extend(Memory::of(&config.state_dir).release_session(session).await);
    left
}

/// Network namespaces that were made for moves which nobody can finish any more: they go, unless a container
/// is in them.
async fn sweep_networks(config: &NodeConfig, containerd: &Containerd) -> Result<(), ContainerdError> {
    let memory = Memory::of(&config.state_dir);
    let open = memory.unsettled();
    if open.is_empty() {
        return Ok(());
    }
    let mut used = Vec::new();
    for namespace in containerd.namespaces().await? {
        for container in containerd.containers(&namespace).await? {
            let spec = container.spec.and_then(|spec| serde_json::from_slice::<Value>(&spec.value).ok());
            used.extend(spec.as_ref().and_then(namespaces::named).map(str::to_owned));
        }
    }
    for (path, session) in open {
        if used.iter().any(|used| Path::new(used) == path) {
            memory.settle(&session);
            continue;
        }
        for reason in memory.release_session(&session).await {
            tracing::warn!(session, reason, "an unfinished move has left a network namespace");
        }
    }
    Ok(())
}

async fn unsettled(containerd: &Containerd, namespace: &str) -> Result<Vec<Unsettled>, ContainerdError> {
    let labelled = containerd.containers_labelled(namespace, SESSION).await?;
    Ok(labelled.iter().filter_map(|container| read(namespace, container)).collect())
}

async fn unsettled_records(
    containerd: &Containerd,
    namespace: &str,
) -> Result<Vec<(Place, Sandbox)>, ContainerdError> {
    let labelled = containerd.sandboxes_labelled(namespace, SESSION).await?;
    let read = |kept: Sandbox| {
        let session = kept.labels.get(SESSION).filter(|session| !session.is_empty())?.clone();
        let ours = kept.runtime.as_ref().is_some_and(|runtime| runtime.name == RUNTIME);
        let plain = [namespace, &kept.sandbox_id].into_iter().all(|id| stdio::plain(id).is_ok());
        let place = Place { namespace: namespace.into(), sandbox: kept.sandbox_id.clone(), session };
        (ours && plain).then_some((place, kept))
    };
    Ok(labelled.into_iter().filter_map(read).collect())
}

/// What is known of a labelled container; `None` when an arrival cannot have made it.
fn read(namespace: &str, container: &Container) -> Option<Unsettled> {
    let session = container.labels.get(SESSION).filter(|session| !session.is_empty())?;
    let sandbox = annotation_of(container, SANDBOX)?;
    annotation_of(container, SOURCE_CONTAINER)?;
    let plain = [namespace, &container.id, &sandbox].into_iter().all(|id| stdio::plain(id).is_ok());
    (plain && runtime_of(container) == RUNTIME).then(|| Unsettled {
        place: Place { namespace: namespace.into(), sandbox, session: session.clone() },
        id: container.id.clone(),
        snapshotter: container.snapshotter.clone(),
        snapshot_key: container.snapshot_key.clone(),
        pod: container.labels.get(cri::KIND).and_then(|_| annotation_of(container, CRI_SANDBOX)),
    })
}

fn by_sandbox(found: Vec<Unsettled>, records: Vec<(Place, Sandbox)>) -> BTreeMap<String, Found> {
    let mut sandboxes: BTreeMap<String, Found> = BTreeMap::new();
    for container in found {
        sandboxes.entry(container.place.sandbox.clone()).or_default().containers.push(container);
    }
    for (place, kept) in records {
        let sandbox = place.sandbox.clone();
        sandboxes.entry(sandbox).or_default().record = Some((place, kept));
    }
    sandboxes
}

async fn any_runs(containerd: &Containerd, sandbox: &[Unsettled]) -> Result<bool, ContainerdError> {
    for Unsettled { place, id, .. } in sandbox {
        let task = optional(containerd.task(&place.namespace, id).await)?;
        if task.is_some_and(|task| task.status() == Status::Running) {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn settle(containerd: &Containerd, sandbox: &Found) -> Result<Verdict, ContainerdError> {
    for Unsettled { place, id, .. } in &sandbox.containers {
        optional(containerd.remove_label(&place.namespace, id, SESSION).await)?;
    }
    if let Some((place, kept)) = &sandbox.record {
        optional(record::settle(containerd, &place.namespace, kept.clone()).await)?;
    }
    Ok(Verdict::Settled)
}

async fn remove(containerd: &Containerd, io_dir: &Path, container: &Unsettled) -> Result<(), String> {
    let Unsettled { place, id, snapshotter, snapshot_key, pod } = container;
    let namespace = &place.namespace;
    let way_out = |reason: String| {
        format!(
            "{reason}; `ctr -n {namespace} task rm -f {id}; ctr -n {namespace} container rm {id}` removes what is left"
        )
    };
    let deadline = Instant::now() + TASK_GONE;
    // Only waited for, never deleted: a task that stays is somebody's.
    while let Some(task) =
        optional(containerd.task(namespace, id).await).map_err(|e| way_out(e.to_string()))?
    {
        if Instant::now() >= deadline {
            return Err(way_out(format!("container `{id}` still has a task (pid {})", task.pid)));
        }
        sleep(POLL).await;
    }
    // containerd tells of no task whose shim is gone; one of a sandbox with a record it keeps all the same, and would let
    // no other have its name, until it is asked to delete it.
    let _ = containerd.delete_task(namespace, id).await;
    if let Some(pod) = pod {
        // Its record is CRI's to remove, and goes with its whole pod.
        return cri::departure::remove(&containerd.cri(), pod).await;
    }
    remove_objects(containerd, place, id, snapshotter, snapshot_key)
        .await
        .map_err(|error| way_out(error.to_string()))?;
    stdio::remove_fifos(io_dir, namespace, id).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::container::Runtime;
    use prost_types::Any;

    use super::*;

    fn arrived(annotations: &[&str], session: &str) -> Container {
        let annotations: serde_json::Map<String, serde_json::Value> =
            annotations.iter().map(|key| ((*key).to_owned(), "s1".into())).collect();
        let spec = serde_json::json!({ "annotations": annotations }).to_string().into_bytes();
        Container {
            id: "c1".into(),
            labels: [(SESSION.to_owned(), session.to_owned())].into(),
            runtime: Some(Runtime { name: RUNTIME.into(), options: None }),
            spec: Some(Any { type_url: String::new(), value: spec }),
            snapshotter: "native".into(),
            snapshot_key: "k".into(),
            ..Container::default()
        }
    }

    #[test]
    fn only_what_an_arrival_made_is_taken_for_one() {
        const BOTH: [&str; 2] = [SANDBOX, SOURCE_CONTAINER];
        let place = Place { namespace: "ns".into(), sandbox: "s1".into(), session: "s".into() };
        let whole = Unsettled {
            place,
            id: "c1".into(),
            snapshotter: "native".into(),
            snapshot_key: "k".into(),
            pod: None,
        };
        assert_eq!(read("ns", &arrived(&BOTH, "s")), Some(whole));
        assert_eq!(read("ns", &arrived(&BOTH[..1], "s")), None);
        assert_eq!(read("ns", &arrived(&BOTH[1..], "s")), None);
        assert_eq!(read("ns", &arrived(&BOTH, "")), None);
        assert_eq!(read("../ns", &arrived(&BOTH, "s")), None);
        let runc = Runtime { name: "io.containerd.runc.v2".into(), options: None };
        assert_eq!(read("ns", &Container { runtime: Some(runc), ..arrived(&BOTH, "s") }), None);
        assert_eq!(read("ns", &Container { labels: [].into(), ..arrived(&BOTH, "s") }), None);
    }
}
