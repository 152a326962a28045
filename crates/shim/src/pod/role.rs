//! What a container is within its pod, by the annotations of its spec, and what the guest is told of it.

use std::collections::HashMap;

use dunlin_wire::tree::ContainerRole;
use serde_json::{Value, json};

/// CRI's word for what a container is: `sandbox` or `container`.
pub(crate) const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The sandbox that a container belongs to.
pub(crate) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// A pod of its own within another pod's machine.
pub(crate) const VIRTUAL_POD_ID: &str = "io.microsoft.cri.virtual-pod-id";

/// A container's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) role: ContainerRole,
    /// containerd's id of the pod.
    pub(crate) pod: String,
}

/// The place of container `id`. Err: what contradicts what, in words.
pub(crate) fn place(annotations: &HashMap<String, String>, id: &str) -> Result<Place, String> {
    let note = |key: &str| annotations.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let virtual_pod = note(VIRTUAL_POD_ID);
    let own = |role| Ok(Place { role, pod: id.to_owned() });
    match note(CONTAINER_TYPE) {
        _ if virtual_pod == Some(id) => own(ContainerRole::Sandbox),
        Some("sandbox") => own(ContainerRole::Sandbox),
        Some("container") => match virtual_pod.or(note(SANDBOX_ID)) {
            Some(pod) if pod != id => Ok(Place { role: ContainerRole::Workload, pod: pod.to_owned() }),
            Some(_) => Err(format!(
                "annotation {SANDBOX_ID}: a container cannot be its own sandbox; set {CONTAINER_TYPE} to `sandbox`"
            )),
            None => Err(format!(
                "annotation {CONTAINER_TYPE} says `container`, and {SANDBOX_ID} does not say of which sandbox; set it"
            )),
        },
        Some(other) => Err(format!(
            "annotation {CONTAINER_TYPE}: {other:?} is neither `sandbox` nor `container`; correct or remove it"
        )),
        None => own(ContainerRole::Standalone),
    }
}

/// Rewrites a spec's annotations to the ids that the guest knows.
pub(crate) fn for_guest(spec: &mut Value, role: ContainerRole, guest_pod: &str) {
    let Some(object) = spec.as_object_mut() else { return };
    let annotations = object.entry("annotations").or_insert_with(|| json!({}));
    if !annotations.is_object() {
        *annotations = json!({});
    }
    let Some(annotations) = annotations.as_object_mut() else { return };
    annotations.remove(VIRTUAL_POD_ID);
    let kind = match role {
        ContainerRole::Sandbox => Some("sandbox"),
        ContainerRole::Workload => Some("container"),
        ContainerRole::Standalone => None,
    };
    match kind {
        Some(kind) => {
            annotations.insert(CONTAINER_TYPE.to_owned(), json!(kind));
            annotations.insert(SANDBOX_ID.to_owned(), json!(guest_pod));
        }
        None => {
            annotations.remove(CONTAINER_TYPE);
            annotations.remove(SANDBOX_ID);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(notes: &[(&str, &str)]) -> Result<(ContainerRole, String), String> {
        let notes = notes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        place(&notes, "c").map(|place| (place.role, place.pod))
    }

    #[test]
    fn every_row_of_the_table() {
        assert_eq!(placed(&[]), Ok((ContainerRole::Standalone, "c".into())));
        assert_eq!(placed(&[(CONTAINER_TYPE, "sandbox")]), Ok((ContainerRole::Sandbox, "c".into())));
        let workload = [(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")];
        assert_eq!(placed(&workload), Ok((ContainerRole::Workload, "p".into())));
        let in_virtual = [(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p"), (VIRTUAL_POD_ID, "v")];
        assert_eq!(placed(&in_virtual), Ok((ContainerRole::Workload, "v".into())));
        let own_virtual = [(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p"), (VIRTUAL_POD_ID, "c")];
        assert_eq!(placed(&own_virtual), Ok((ContainerRole::Sandbox, "c".into())));
    }

    #[test]
    fn contradictions_are_named() {
        assert!(placed(&[(CONTAINER_TYPE, "container")]).unwrap_err().contains(SANDBOX_ID));
        assert!(placed(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "c")]).unwrap_err().contains("sandbox"));
        assert!(placed(&[(CONTAINER_TYPE, "other")]).unwrap_err().contains("other"));
    }

    #[test]
    fn the_guest_sees_its_own_ids() {
        let mut spec = json!({"annotations": {SANDBOX_ID: "new", VIRTUAL_POD_ID: "v", "x": "y"}});
        for_guest(&mut spec, ContainerRole::Workload, "old");
        assert_eq!(spec["annotations"], json!({CONTAINER_TYPE: "container", SANDBOX_ID: "old", "x": "y"}));
        let mut spec = json!({});
        for_guest(&mut spec, ContainerRole::Standalone, "c");
        assert_eq!(spec["annotations"], json!({}));
    }
}
