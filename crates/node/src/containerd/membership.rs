//! Which containers are one sandbox: what shares a virtual machine moves together.
//!
//! | told by | sandbox |
//! |---|---|
//! | annotation `io.dunlin.migration.sandbox-id` | its value: an earlier move left it |
//! | else annotation `io.kubernetes.cri.sandbox-id` | its value |
//! | else the record's own `sandbox` field (containerd 1.7 and newer) | its value |
//! | else | the container's own id |
//!
//! A container that CRI adds to a pod after a move names the pod by its id there; it is of the sandbox that
//! the pod's own container names.

use containerd_client::services::v1::Container;
use serde_json::Value;

use super::{CRI_SANDBOX, CRI_TYPE, RUNTIME, SANDBOX, VIRTUAL_POD};

/// The runtime of a container's record.
pub(crate) fn runtime_of(container: &Container) -> &str {
    container.runtime.as_ref().map_or("", |runtime| &runtime.name)
}

/// The sandbox that `container` names. A spec that cannot be read says nothing.
fn sandbox_of(container: &Container) -> String {
    let spec = spec_of(container);
    let annotated = [SANDBOX, CRI_SANDBOX].into_iter().find_map(|key| annotation(&spec, key));
    let field = Some(container.sandbox.as_str()).filter(|id| !id.is_empty());
    annotated.or(field).unwrap_or(&container.id).to_owned()
}

/// The sandbox whose shim runs `container`, one of `all` in its namespace.
pub(crate) fn sandbox_among(container: &Container, all: &[Container]) -> String {
    let named = sandbox_of(container);
    let pod = all.iter().find(|other| other.id == named && other.id != container.id);
    pod.map_or(named, sandbox_of)
}

/// The containers of `sandbox` that Dunlin runs: the sandbox's own, those of its pods, then the
/// workloads; by id within each.
pub(crate) fn members(mut containers: Vec<Container>, sandbox: &str) -> Vec<Container> {
    let ours: Vec<bool> = containers
        .iter()
        .map(|container| runtime_of(container) == RUNTIME && sandbox_among(container, &containers) == sandbox)
        .collect();
    let mut ours = ours.into_iter();
    containers.retain(|_| ours.next().unwrap_or(false));
    containers.sort_by_cached_key(|container| (rank(container, sandbox), container.id.clone()));
    containers
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Machine,
    Pod,
    Workload,
}

fn rank(container: &Container, sandbox: &str) -> Rank {
    let spec = spec_of(container);
    let is_pod = annotation(&spec, CRI_TYPE) == Some("sandbox")
        || annotation(&spec, VIRTUAL_POD) == Some(container.id.as_str());
    match is_pod {
        // After a move through CRI the machine's own sandbox container has another id.
        true if container.id == sandbox || annotation(&spec, VIRTUAL_POD).is_none() => Rank::Machine,
        true => Rank::Pod,
        false if container.id == sandbox => Rank::Machine,
        false => Rank::Workload,
    }
}

/// The OCI annotation `key` of `container`, unless it is empty.
pub(crate) fn annotation_of(container: &Container, key: &str) -> Option<String> {
    annotation(&spec_of(container), key).map(str::to_owned)
}

fn spec_of(container: &Container) -> Value {
    let spec = container.spec.as_ref().and_then(|spec| serde_json::from_slice(&spec.value).ok());
    spec.unwrap_or_default()
}

fn annotation<'a>(spec: &'a Value, key: &str) -> Option<&'a str> {
    spec["annotations"][key].as_str().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::container::Runtime;
    use prost_types::Any;

    use super::*;

    fn container(id: &str, annotations: &str) -> Container {
        let spec = format!(r#"{{"annotations":{{{annotations}}}}}"#).into_bytes();
        Container {
            id: id.into(),
            runtime: Some(Runtime { name: RUNTIME.into(), options: None }),
            spec: Some(Any { type_url: String::new(), value: spec }),
            ..Container::default()
        }
    }

    fn ids(members: &[Container]) -> Vec<&str> {
        members.iter().map(|container| container.id.as_str()).collect()
    }

    #[test]
    fn the_sandbox_is_named_by_the_last_move_then_cri_then_the_record_then_the_container() {
        const CRI: &str = r#""io.kubernetes.cri.sandbox-id":"pod""#;
        const MOVED: &str = r#""io.dunlin.migration.sandbox-id":"moved""#;
        let recorded =
            |annotations: &str| Container { sandbox: "recorded".into(), ..container("c1", annotations) };
        assert_eq!(sandbox_of(&recorded(&format!("{CRI},{MOVED}"))), "moved");
        assert_eq!(sandbox_of(&recorded(CRI)), "pod");
        assert_eq!(sandbox_of(&recorded("")), "recorded");
        assert_eq!(sandbox_of(&container("c1", "")), "c1");
        assert_eq!(sandbox_of(&container("c1", r#""io.dunlin.migration.sandbox-id":"""#)), "c1");
        assert_eq!(sandbox_of(&Container { spec: None, ..recorded(CRI) }), "recorded");
    }

    #[test]
    fn members_are_the_sandboxs_of_our_runtime_sandbox_containers_first() {
        let cri = |kind: &str| {
            format!(r#""io.kubernetes.cri.sandbox-id":"pod","io.kubernetes.cri.container-type":"{kind}""#)
        };
        let workload = |id| container(id, &cri("container"));
        let virtual_pod = format!(r#"{},"io.microsoft.cri.virtual-pod-id":"a-second""#, cri("sandbox"));
        let runc = Container {
            runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
            ..workload("other-runtime")
        };
        let all = vec![
            workload("b"),
            runc,
            container("alone", ""),
            container("a-second", &virtual_pod),
            workload("a"),
            container("pod", &cri("sandbox")),
        ];
        assert_eq!(ids(&members(all.clone(), "pod")), ["pod", "a-second", "a", "b"]);
        assert_eq!(ids(&members(all.clone(), "alone")), ["alone"]);
        assert_eq!(ids(&members(all, "a")), Vec::<&str>::new());
    }

    #[test]
    fn a_sandbox_that_moved_keeps_its_members_whatever_cri_calls_the_pod() {
        const MOVED: &str = r#""io.dunlin.migration.sandbox-id":"first""#;
        let cri = |kind: &str| {
            format!(
                r#"{MOVED},"io.kubernetes.cri.sandbox-id":"new","io.kubernetes.cri.container-type":"{kind}""#
            )
        };
        const ADDED: &str =
            r#""io.kubernetes.cri.sandbox-id":"new","io.kubernetes.cri.container-type":"container""#;
        let all = vec![
            container("a", &cri("container")),
            container("added", ADDED),
            container("new", &cri("sandbox")),
        ];
        assert_eq!(sandbox_among(&all[1], &all), "first");
        assert_eq!(ids(&members(all, "first")), ["new", "a", "added"]);
    }
}
