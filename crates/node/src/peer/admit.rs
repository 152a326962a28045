//! Destination: which paths of this host a container's spec from another host may name.
//!
//! Bind mounts are not looked at but for one: what is missing here or may not be shared is refused by the
//! shim, and what is there is read. Only the termination log is ever written back.

use std::path::Path;

use serde_json::Value;

use crate::cri::admit::is_inside;
use crate::network::namespaces;
use crate::proto::ContainerFacts;

/// Its content goes to the host when the container ends.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Refuses, in words, a spec that would have this host join a namespace or write a file that is nobody's to ask for.
/// `logs`: below it termination logs may be written.
pub(super) fn paths(container: &ContainerFacts, logs: &Path) -> Result<(), String> {
    let spec: Value = serde_json::from_slice(&container.spec)
        .map_err(|error| format!("container `{}`: its spec is no JSON: {error}", container.id))?;
    let of = |list: &Value| list.as_array().cloned().unwrap_or_default();
    for namespace in of(&spec["linux"]["namespaces"]) {
        let Some(path) = namespace["path"].as_str().filter(|path| !path.is_empty()) else { continue };
        if namespace["type"] == "network" {
            namespaces::admitted(path).map_err(|way_out| {
                format!("container `{}` names the network namespace {path}: {way_out}", container.id)
            })?;
        }
    }
    for mount in of(&spec["mounts"]) {
        let source = mount["source"].as_str().unwrap_or_default();
        if mount["destination"] == TERMINATION_LOG && !is_inside(logs, source) {
            return Err(format!(
                "container `{}` has {source} mounted on {TERMINATION_LOG}, which would be written on this host; such a \
                 file must be below {}, `termination_logs` of the node's configuration",
                container.id,
                logs.display()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_be_joined_or_written_must_be_in_its_place() {
        let container = |namespace: &str, source: &str| {
            let spec = json!({
                "linux": { "namespaces": [
                    { "type": "pid" }, { "type": "ipc", "path": "/proc/1/ns/ipc" }, { "type": "network", "path": namespace },
                ] },
                "mounts": [
                    { "destination": "/data", "source": "/srv" }, { "destination": TERMINATION_LOG, "source": source },
                ],
            });
            ContainerFacts {
                id: "c".into(),
                spec: spec.to_string().into_bytes(),
                ..ContainerFacts::default()
            }
        };
        let logs = Path::new("/var/lib/kubelet/pods");
        let paths = |container: &ContainerFacts| paths(container, logs);
        let kubelets = "/var/lib/kubelet/pods/u/containers/c/1";
        for namespace in ["", "/run/netns/web"] {
            assert_eq!(paths(&container(namespace, kubelets)), Ok(()));
        }
        let refused = paths(&container("/proc/1/ns/net", kubelets)).unwrap_err();
        assert!(refused.contains("`c`") && refused.contains("/proc/1/ns/net"), "{refused}");
        for source in ["/etc/passwd", "/var/lib/kubelet/pods/../../x", "/var/lib/kubelet/pods"] {
            let refused = paths(&container("", source)).unwrap_err();
            assert!(refused.contains(source) && refused.contains(TERMINATION_LOG), "{refused}");
        }
        let none = ContainerFacts { spec: b"{".to_vec(), ..ContainerFacts::default() };
        assert!(paths(&none).unwrap_err().contains("JSON"));
    }
}
