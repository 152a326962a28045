//! Which sandbox a container goes into: its own, or one whose shim runs already.

use std::collections::HashMap;
use std::path::Path;

use super::directory::StateDirectory;
use super::serving::serves;
use crate::sandbox::bundle;

/// CRI: the id of the pod's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// CRI: `sandbox` or `container`.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The pod of its own that a container belongs to inside another sandbox's machine.
const VIRTUAL_POD: &str = "io.microsoft.cri.virtual-pod-id";

/// What a bundle's annotations say of the sandbox to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Join {
    /// Whose shim serves the container.
    pub(crate) sandbox: String,
    /// It is the sandbox of a pod itself: further containers will name it as theirs.
    pub(crate) heads_pod: bool,
}

/// `None`: the container has a sandbox of its own.
pub(crate) fn of(annotations: &HashMap<String, String>, own: &str) -> Option<Join> {
    let other = |key: &str| annotations.get(key).filter(|sandbox| sandbox.as_str() != own);
    // A migrated container joins also the sandbox of its own name: the shim that imported it runs.
    let sandbox = annotations.get(bundle::SANDBOX_ANNOTATION).or_else(|| other(SANDBOX_ID))?;
    let says = |key: &str, value: &str| annotations.get(key).is_some_and(|said| said == value);
    let heads_pod = sandbox != own && (says(CONTAINER_TYPE, "sandbox") || says(VIRTUAL_POD, own));
    Some(Join { sandbox: sandbox.clone(), heads_pod })
}

/// Whether an id from an annotation may become a directory's name.
pub(crate) fn is_id(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !id.is_empty() && id.len() <= 76 && id.chars().all(allowed) && !id.starts_with('.')
}

/// The address of the shim that a directory names, when it serves there.
pub(crate) fn live_address(directory: &StateDirectory) -> Option<String> {
    let address = directory.address()?;
    let path = address.strip_prefix("unix://").unwrap_or(&address);
    serves(Path::new(path)).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(own: &str, annotations: &[(&str, &str)]) -> Option<(String, bool)> {
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        of(&annotations, own).map(|join| (join.sandbox, join.heads_pod))
    }

    #[test]
    fn containers_go_where_their_annotations_say() {
        let migrated = bundle::SANDBOX_ANNOTATION;
        assert_eq!(join("c", &[]), None);
        assert_eq!(join("p", &[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "p")]), None);
        assert_eq!(
            join("c", &[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")]),
            Some(("p".to_owned(), false))
        );
        assert_eq!(join("c", &[(migrated, "c")]), Some(("c".to_owned(), false)));
        assert_eq!(
            join("c", &[(migrated, "q"), (CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")]),
            Some(("q".to_owned(), false))
        );
    }

    #[test]
    fn the_sandbox_of_a_virtual_pod_joins_and_is_joined() {
        let annotations = [(CONTAINER_TYPE, "sandbox"), (VIRTUAL_POD, "v"), (SANDBOX_ID, "p")];
        assert_eq!(join("v", &annotations), Some(("p".to_owned(), true)));
        let annotations = [(CONTAINER_TYPE, "container"), (VIRTUAL_POD, "v"), (SANDBOX_ID, "p")];
        assert_eq!(join("c", &annotations), Some(("p".to_owned(), false)));
    }

    #[test]
    fn ids_stay_below_the_state_directory() {
        assert!(is_id("pod-1.a_b"));
        for bad in ["", "..", "a/b", ".hidden", &"x".repeat(77)] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
