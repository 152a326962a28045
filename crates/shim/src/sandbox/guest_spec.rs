//! What of a container's OCI spec goes into the guest: everything but what only means something on
//! this host. What the guest cannot do is refused here by name, before a machine boots.

use dunlin_wire::tree::ContainerRole;
use serde_json::{Map, Value, json};

/// The pod's shared memory, as the guest names it.
const POD_SHM: &str = "sandbox-tmp://shm";

/// Gives the spec for the guest, or names what cannot go along.
pub(crate) fn for_guest(mut spec: Value, role: ContainerRole, rootfs_path: &str) -> Result<Value, String> {
    let Some(object) = spec.as_object_mut() else { return Err("the spec is not a JSON object".to_owned()) };
    if !object.contains_key("process") {
        return Err("the spec has no process".to_owned());
    }
    if let Some(Value::Array(mounts)) = object.remove("mounts") {
        object.insert("mounts".to_owned(), Value::Array(fit_mounts(mounts, role)));
    }
    // Hooks are programs of this host, and the Windows section is of no host of ours.
    object.remove("hooks");
    object.remove("windows");
    let root = object.entry("root").or_insert_with(|| json!({}));
    if let Some(root) = root.as_object_mut() {
        root.insert("path".to_owned(), json!(rootfs_path));
    }
    let linux = object.entry("linux").or_insert_with(|| json!({}));
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("cgroupsPath");
        // A path of the host's: what it stands for the guest knows by the pod.
        leave_host_namespaces(linux, role);
        if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
            for device_of_host in ["devices", "blockIO", "hugepageLimits", "network"] {
                resources.remove(device_of_host);
            }
        }
    }
    Ok(spec)
}

/// A bind mount of this host's is left as it is: it becomes a volume.
fn fit_mounts(mounts: Vec<Value>, role: ContainerRole) -> Vec<Value> {
    let shared_memory = |mount: &Value| is_bind(mount) && text(mount, "destination") == "/dev/shm";
    let pod_shm = role != ContainerRole::Standalone && mounts.iter().any(shared_memory);
    let mut fitted = Vec::with_capacity(mounts.len());
    for mut mount in mounts {
        let destination = text(&mount, "destination").to_owned();
        let bind = is_bind(&mount);
        if destination == "/dev/shm" && pod_shm {
            // CRI mounts a tmpfs there and binds the pod's over it.
            if bind {
                mount["source"] = json!(POD_SHM);
                fitted.push(mount);
            }
            continue;
        }
        fitted.push(mount);
    }
    fitted
}

fn text<'a>(mount: &'a Value, key: &str) -> &'a str {
    mount.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn is_bind(mount: &Value) -> bool {
    let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
    text(mount, "type") == "bind"
        || options.filter_map(Value::as_str).any(|option| matches!(option, "bind" | "rbind"))
}

/// A namespace that is joined by path is this host's; the container gets its own in the guest, or, in a pod,
/// that of the pod's sandbox, which the guest finds by itself when a path is there.
fn leave_host_namespaces(linux: &mut Map<String, Value>, role: ContainerRole) {
    let namespaces = linux.entry("namespaces").or_insert_with(|| json!([]));
    let Some(namespaces) = namespaces.as_array_mut() else { return };
    if role != ContainerRole::Workload {
        for namespace in namespaces.iter_mut().filter_map(Value::as_object_mut) {
            namespace.remove("path");
        }
    }
    // A pod on its host's network has no UTS namespace in CRI's spec, and its name is the machine's.
    if role == ContainerRole::Sandbox && namespaces.iter().all(|namespace| namespace["type"] != "uts") {
        namespaces.push(json!({"type": "uts"}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_the_host_stays_here() {
        let spec = json!({
            "process": {"args": ["sh"]},
            "root": {"path": "rootfs", "readonly": true},
            "hooks": {"prestart": []},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": "/default/c",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}],
                "resources": {"devices": [{"allow": false}], "memory": {"limit": 1}},
            },
        });
        let spec = for_guest(spec, ContainerRole::Standalone, "/run/gcs/pods/c/c/rootfs").unwrap();
        assert_eq!(spec["root"], json!({"path": "/run/gcs/pods/c/c/rootfs", "readonly": true}));
        assert!(spec.get("hooks").is_none());
        assert_eq!(
            spec["linux"],
            json!({"namespaces": [{"type": "network"}], "resources": {"memory": {"limit": 1}}})
        );
    }

    #[test]
    fn the_pods_shared_memory_is_the_guests() {
        let bind = |destination: &str| json!({"destination": destination, "type": "bind", "source": "/var/lib/x", "options": ["rbind"]});
        let spec = json!({
            "process": {},
            "mounts": [
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                bind("/dev/shm"), bind("/etc/hosts"),
            ],
            "linux": {"namespaces": [{"type": "ipc", "path": "/proc/7/ns/ipc"}]},
        });
        let workload = for_guest(spec.clone(), ContainerRole::Workload, "/r").unwrap();
        let shm = json!({"destination": "/dev/shm", "type": "bind", "source": POD_SHM, "options": ["rbind"]});
        assert_eq!(workload["mounts"], json!([shm, bind("/etc/hosts")]));
        assert_eq!(workload["linux"]["namespaces"], json!([{"type": "ipc", "path": "/proc/7/ns/ipc"}]));
        let sandbox = for_guest(spec, ContainerRole::Sandbox, "/r").unwrap();
        assert_eq!(sandbox["linux"]["namespaces"], json!([{"type": "ipc"}, {"type": "uts"}]));
    }
}
