//! Destination: the containerd objects of a container that arrives, made in order and removed in
//! the reverse one.
//!
//! Invariant: only what carries this session's label is ever removed; an object that was there
//! before is a refusal, never a casualty.

use std::collections::HashMap;

use containerd_client::services::v1 as api;
use prost_types::Any;
use tokio::time::Instant;

use super::client::{Containerd, ContainerdError, optional};
use super::departure::task_gone;
use super::stdio::{StdioError, Streams};
use super::{RUNTIME, SANDBOX, SESSION, SOURCE_CONTAINER};
use crate::cri::arrival::CriArrivalError;
use crate::proto::{ContainerFacts, Mismatch};

/// Why the objects could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArrivalError {
    /// containerd refused.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The streams could not be made.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// CRI could not make the pod.
    #[error(transparent)]
    Pod(#[from] CriArrivalError),
    /// The spec is not a JSON object.
    #[error(
        "container or sandbox `{id}`: its OCI spec cannot be annotated: {reason}; only JSON specs can be moved"
    )]
    Spec {
        /// The container, or the sandbox.
        id: String,
        /// What is wrong.
        reason: String,
    },
}

/// Where a container arrives, and on whose account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) namespace: String,
    /// The sandbox whose shim waits.
    pub(crate) sandbox: String,
    /// The session that is answerable for what is made.
    pub(crate) session: String,
}

/// The objects of one arriving container.
#[derive(Debug)]
pub(crate) struct Arrival {
    containerd: Containerd,
    place: Place,
    facts: ContainerFacts,
    streams: Streams,
    made: Made,
}

/// What may exist on our account: noted before it is asked for, since an Abort may come between.
#[derive(Debug, Default, Clone, Copy)]
struct Made {
    fifos: bool,
    objects: bool,
    task: bool,
}

/// What stands in the way of `facts` in `namespace` here; nothing is made.
pub(crate) async fn obstacles(
    containerd: &Containerd,
    namespace: &str,
    facts: &ContainerFacts,
) -> Result<Vec<Mismatch>, ContainerdError> {
    let id = &facts.id;
    let mut found = Vec::new();
    if optional(containerd.container(namespace, id).await)?.is_some() {
        found.push(Mismatch {
            field: "container id".into(),
            source: id.clone(),
            destination: format!("{id} exists already in namespace {namespace}"),
            way_out: format!(
                "remove it there: `ctr -n {namespace} task rm -f {id}; ctr -n {namespace} container rm {id}`"
            ),
            container: id.clone(),
        });
    }
    let (snapshotter, parent) = (&facts.snapshotter, &facts.snapshot_parent);
    match containerd.snapshot(namespace, snapshotter, parent).await {
        Ok(_) => {}
        Err(error) if error.is_not_found() => found.push(Mismatch {
            field: "image layers".into(),
            source: format!("{} ({parent})", facts.image),
            destination: format!("not unpacked in namespace {namespace}, snapshotter {snapshotter}"),
            way_out: image_way_out(namespace, facts),
            container: id.clone(),
        }),
        Err(ContainerdError::Refused { reason, .. }) => found.push(Mismatch {
            field: "snapshotter".into(),
            source: snapshotter.clone(),
            destination: reason,
            way_out: format!("enable the {snapshotter} snapshotter in the destination's containerd"),
            container: id.clone(),
        }),
        Err(error) => return Err(error),
    }
    if let Ok(Some(_)) = optional(containerd.snapshot(namespace, snapshotter, &facts.snapshot_key).await) {
        found.push(Mismatch {
            field: "snapshot key".into(),
            source: facts.snapshot_key.clone(),
            destination: "exists already".into(),
            way_out: format!(
                "remove it there: `ctr -n {namespace} snapshots --snapshotter {snapshotter} rm {}`",
                facts.snapshot_key
            ),
            container: id.clone(),
        });
    }
    Ok(found)
}

fn image_way_out(namespace: &str, facts: &ContainerFacts) -> String {
    let snapshotter = &facts.snapshotter;
    if facts.image.is_empty() {
        return format!("import the image it was made from there: `ctr -n {namespace} images import FILE`");
    }
    format!(
        "bring the same image there: `ctr -n {namespace} images pull --snapshotter {snapshotter} {image}`, or `ctr -n \
         {namespace} images export FILE {image}` here and `ctr -n {namespace} images import --snapshotter {snapshotter} FILE` there",
        image = facts.image
    )
}

impl Arrival {
    /// Nothing is made yet.
    pub(crate) fn new(
        containerd: Containerd,
        place: Place,
        facts: ContainerFacts,
        streams: Streams,
    ) -> Arrival {
        Arrival { containerd, place, facts, streams, made: Made::default() }
    }

    /// Makes FIFOs, container, snapshot and task, once. Answers the init's pid, as the shim tells it.
    pub(crate) async fn create(&mut self) -> Result<u32, ArrivalError> {
        if !self.made.fifos {
            self.made.fifos = true;
            self.streams.make()?;
        }
        let namespace = &self.place.namespace;
        // The record comes first: it is what keeps containerd's garbage collector off the snapshot,
        // and what a later life of this node finds.
        let container = container_of(&self.place, &self.facts)?;
        self.made.objects = true;
        self.containerd.create_container(namespace, container).await?;
        let (snapshotter, key) = (&self.facts.snapshotter, &self.facts.snapshot_key);
        let (parent, labels) = (&self.facts.snapshot_parent, [session_label(&self.place)].into());
        let rootfs = self.containerd.prepare_snapshot(namespace, snapshotter, key, parent, labels).await?;
        self.made.task = true;
        let request = api::CreateTaskRequest {
            container_id: self.facts.id.clone(),
            rootfs,
            stdin: self.streams.stdin.clone(),
            stdout: self.streams.stdout.clone(),
            stderr: self.streams.stderr.clone(),
            terminal: self.streams.terminal,
            ..api::CreateTaskRequest::default()
        };
        Ok(self.containerd.create_task(namespace, request).await?)
    }

    /// Deletes the task while its shim can still answer; the shim's exit finishes what this does not.
    pub(crate) async fn delete_task(&mut self) -> Result<(), ContainerdError> {
        if !self.made.task {
            return Ok(());
        }
        optional(self.containerd.delete_task(&self.place.namespace, &self.facts.id).await)?;
        self.made.task = false;
        Ok(())
    }

    /// The container runs here: this node does not answer for it any more. Safe to repeat.
    pub(crate) async fn settle(&mut self) -> Result<(), ContainerdError> {
        if !self.made.objects {
            return Ok(());
        }
        // Deleted meanwhile by whoever owns it now: then there is no label either.
        let removing = self.containerd.remove_label(&self.place.namespace, &self.facts.id, SESSION);
        optional(removing.await)?;
        self.made = Made::default();
        Ok(())
    }

    /// Removes what was made, after the shim is gone; containerd may take until `deadline` to
    /// notice that. Safe to repeat; says what was left.
    pub(crate) async fn remove(&mut self, deadline: Instant) -> Vec<String> {
        let (namespace, id) = (&self.place.namespace, &self.facts.id);
        let mut left = Vec::new();
        if self.made.task {
            match task_gone(&self.containerd, namespace, id, deadline).await {
                Ok(()) => self.made.task = false,
                Err(reason) => left.push(reason),
            }
        }
        if self.made.objects && !self.made.task {
            let (snapshotter, key) = (&self.facts.snapshotter, &self.facts.snapshot_key);
            match remove_objects(&self.containerd, &self.place, id, snapshotter, key).await {
                Ok(()) => self.made.objects = false,
                Err(error) => left.push(error.to_string()),
            }
        }
        if self.made.fifos {
            self.streams.remove();
            self.made.fifos = false;
        }
        left
    }
}

/// Removes container `id`, then snapshot `key`: each if it is there and the session of `place`
/// made it.
pub(crate) async fn remove_objects(
    containerd: &Containerd,
    place: &Place,
    id: &str,
    snapshotter: &str,
    key: &str,
) -> Result<(), ContainerdError> {
    let namespace = &place.namespace;
    let ours = |labels: &HashMap<String, String>| labels.get(SESSION) == Some(&place.session);
    let container = optional(containerd.container(namespace, id).await)?;
    if container.is_some_and(|container| ours(&container.labels)) {
        optional(containerd.delete_container(namespace, id).await)?;
    }
    let snapshot = optional(containerd.snapshot(namespace, snapshotter, key).await)?;
    if snapshot.is_some_and(|snapshot| ours(&snapshot.labels)) {
        optional(containerd.remove_snapshot(namespace, snapshotter, key).await)?;
    }
    Ok(())
}

/// The container as the destination's containerd keeps it. It names a sandbox when the sandbox's record has come too.
fn container_of(place: &Place, facts: &ContainerFacts) -> Result<api::Container, ArrivalError> {
    let spec =
        annotated(place, facts).map_err(|reason| ArrivalError::Spec { id: facts.id.clone(), reason })?;
    let mut labels = facts.labels.clone();
    labels.extend([session_label(place)]);
    Ok(api::Container {
        id: facts.id.clone(),
        labels,
        image: facts.image.clone(),
        runtime: Some(api::container::Runtime { name: RUNTIME.into(), options: None }),
        spec: Some(Any { type_url: facts.spec_type.clone(), value: spec }),
        snapshotter: facts.snapshotter.clone(),
        snapshot_key: facts.snapshot_key.clone(),
        sandbox: if facts.in_record { place.sandbox.clone() } else { String::new() },
        ..api::Container::default()
    })
}

fn session_label(place: &Place) -> (String, String) {
    (SESSION.into(), place.session.clone())
}

/// The spec with the two annotations that lead `start` to the waiting shim; those of an earlier
/// move are overwritten.
fn annotated(place: &Place, facts: &ContainerFacts) -> Result<Vec<u8>, String> {
    annotate(&facts.spec, &[(SOURCE_CONTAINER, &facts.id), (SANDBOX, &place.sandbox)])
}

/// A JSON spec with annotations, which take the place of those of their names. Err: in words, what is wrong with it.
pub(super) fn annotate(spec: &[u8], notes: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    let mut spec: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(spec).map_err(|error| error.to_string())?;
    let annotations = spec.entry("annotations").or_insert_with(|| serde_json::json!({}));
    if annotations.is_null() {
        *annotations = serde_json::json!({});
    }
    let annotations = annotations.as_object_mut().ok_or("`annotations` is not an object")?;
    for (key, value) in notes {
        annotations.insert((*key).into(), (*value).into());
    }
    serde_json::to_vec(&spec).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(session: &str) -> Place {
        Place { namespace: "default".into(), sandbox: "s1".into(), session: session.into() }
    }

    fn facts(spec: &str) -> ContainerFacts {
        ContainerFacts {
            id: "c1".into(),
            image: "docker.io/library/busybox:1".into(),
            snapshotter: "overlayfs".into(),
            spec_type: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
            spec: spec.as_bytes().to_vec(),
            ..ContainerFacts::default()
        }
    }

    fn json(spec: &[u8]) -> serde_json::Value {
        serde_json::from_slice(spec).unwrap()
    }

    #[test]
    fn the_spec_keeps_its_annotations_and_gains_two() {
        let spec = r#"{"hostname":"x","annotations":{"a":"b"}}"#;
        let text = json(&annotated(&place("s"), &facts(spec)).unwrap());
        assert_eq!(text["hostname"], "x");
        assert_eq!(text["annotations"]["a"], "b");
        assert_eq!(text["annotations"][SOURCE_CONTAINER], "c1");
        assert_eq!(text["annotations"][SANDBOX], "s1");
        for none in ["{}", r#"{"annotations":null}"#] {
            assert_eq!(json(&annotated(&place("s"), &facts(none)).unwrap())["annotations"][SANDBOX], "s1");
        }
        assert!(annotated(&place("s"), &facts("[]")).is_err());
        assert!(annotated(&place("s"), &facts(r#"{"annotations":7}"#)).is_err());
    }

    #[test]
    fn a_second_hop_overwrites_what_the_first_one_wrote() {
        let first = container_of(&place("one"), &facts("{}")).unwrap();
        let spec = String::from_utf8(first.spec.clone().unwrap().value).unwrap();
        let here = ContainerFacts { id: "c1-at-b".into(), labels: first.labels, ..facts(&spec) };
        let second = container_of(&Place { sandbox: "s2".into(), ..place("two") }, &here).unwrap();
        let text = String::from_utf8(second.spec.unwrap().value).unwrap();
        assert_eq!(text.matches(SOURCE_CONTAINER).count(), 1, "{text}");
        assert_eq!(text.matches(SANDBOX).count(), 1, "{text}");
        let text = json(text.as_bytes());
        assert_eq!(text["annotations"][SOURCE_CONTAINER], "c1-at-b");
        assert_eq!(text["annotations"][SANDBOX], "s2");
        assert_eq!(second.labels[SESSION], "two");
    }

    #[test]
    fn a_missing_image_is_named_with_the_command_that_brings_it() {
        let way_out = image_way_out("default", &facts("{}"));
        assert!(
            way_out
                .contains("ctr -n default images pull --snapshotter overlayfs docker.io/library/busybox:1")
        );
    }

    #[test]
    fn the_container_keeps_its_identity_and_gets_our_runtime() {
        let mine = ContainerFacts { labels: [("who".to_owned(), "me".to_owned())].into(), ..facts("{}") };
        let container = container_of(&place("s"), &mine).unwrap();
        assert_eq!(container.id, "c1");
        assert_eq!(container.runtime.unwrap().name, RUNTIME);
        assert_eq!(container.image, "docker.io/library/busybox:1");
        assert_eq!((container.labels["who"].as_str(), container.labels[SESSION].as_str()), ("me", "s"));
        assert_eq!(container.sandbox, "");
        let of_record = container_of(&place("s"), &ContainerFacts { in_record: true, ..mine }).unwrap();
        assert_eq!(of_record.sandbox, "s1");
        let error = container_of(&place("s"), &facts("[]")).unwrap_err().to_string();
        assert!(error.contains("`c1`"), "{error}");
    }
}
