//! Makes a container's OCI spec, written for the host, fit the guest.
//!
//! Works on the JSON document itself, so that a field of a newer spec passes through untouched
//! instead of failing to decode.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cgroup::tree::Cgroup;
use crate::path::{ContainerId, HOST_ROOTS, PathError, plain};

/// A spec that the guest cannot run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// A part has another JSON type than the OCI runtime spec gives it.
    #[error("{0} of the container's spec is not a JSON object; send an OCI runtime spec")]
    NotAnObject(&'static str),
    /// There is no process, or it has no arguments.
    #[error("the container's spec names no process with arguments; there is nothing to start")]
    NoProcess,
    /// A mount that names a guest resource in a way that leaves its place.
    #[error("mount source {0:?} leaves the directory that it may name; remove `..` from it")]
    EscapingSource(String),
    /// A mount kind that this guest does not have.
    #[error("mount source {0:?} is of a kind that this guest does not have; remove the mount")]
    UnsupportedSource(String),
    /// An id in the annotations is no id.
    #[error(transparent)]
    Id(#[from] PathError),
}

/// What a container is within its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The pod's first container, which owns its namespaces.
    Sandbox,
    /// A container in the pod of a sandbox.
    Workload,
    /// A pod and a container in one.
    Standalone,
}

/// Role and pod id by the spec's annotations. A virtual pod's own sandbox lies in another sandbox's machine, so hosts may
/// call it a container: it is known by its virtual pod being itself.
pub fn role(spec: &Value, id: &ContainerId) -> Result<(Role, ContainerId), SpecError> {
    let note = |key: &str| spec["annotations"][key].as_str();
    let virtual_pod = note("io.microsoft.cri.virtual-pod-id");
    if virtual_pod == Some(id.as_str()) {
        return Ok((Role::Sandbox, id.clone()));
    }
    match note("io.kubernetes.cri.container-type") {
        Some("sandbox") => Ok((Role::Sandbox, id.clone())),
        Some("container") => {
            let pod = virtual_pod.or(note("io.kubernetes.cri.sandbox-id")).unwrap_or(id.as_str());
            Ok((Role::Workload, ContainerId::parse(pod)?))
        }
        _ => Ok((Role::Standalone, id.clone())),
    }
}

/// What the guest knows and the spec does not.
pub struct Surroundings<'a> {
    /// The container's id in the guest.
    pub id: &'a ContainerId,
    /// Its pod's id in the guest.
    pub pod: &'a ContainerId,
    /// Its root file system.
    pub root: &'a Path,
    /// Directory of the pod's `hostname`, `hosts`, `resolv.conf` and `sandboxMounts`.
    pub pod_dir: &'a Path,
    /// Init of the pod's sandbox, for a workload.
    pub sandbox_pid: Option<i32>,
    /// Whether a path exists in the guest.
    pub exists: &'a dyn Fn(&Path) -> bool,
}

/// Changes the spec in place. Returns what was left out and why, for the log.
pub fn fit(spec: &mut Value, around: &Surroundings<'_>) -> Result<Vec<String>, SpecError> {
    let mut notes = Vec::new();
    let top = object(spec, "the whole")?;
    for key in ["windows", "solaris", "vm", "zos"] {
        top.remove(key);
    }
    if top.remove("hooks").is_some() {
        notes.push("hooks: they are programs of the host".to_owned());
    }
    if !top.get("ociVersion").and_then(Value::as_str).is_some_and(|version| version.starts_with("1.")) {
        top.insert("ociVersion".into(), "1.0.2".into());
    }
    object(entry(top, "root"), "root")?.insert("path".into(), text(around.root));
    let arguments = &top.get("process").unwrap_or(&Value::Null)["args"];
    if arguments.as_array().is_none_or(Vec::is_empty) {
        return Err(SpecError::NoProcess);
    }
    fit_process(entry(top, "process"))?;
    fit_linux(entry(top, "linux"), around, &mut notes)?;
    let mut namespaces = top["linux"]["namespaces"].as_array().into_iter().flatten();
    if namespaces.any(|namespace| namespace["type"] == "uts" && namespace["path"].is_string()) {
        for key in ["hostname", "domainname"] {
            // It would be given to the whole pod.
            if top.remove(key).is_some_and(|name| name.as_str() != Some("")) {
                notes.push(format!("{key}: it is the pod's"));
            }
        }
    }
    let mounts = match top.remove("mounts") {
        Some(Value::Array(mounts)) => mounts,
        _ => Vec::new(),
    };
    top.insert("mounts".into(), Value::Array(fit_mounts(mounts, around, &mut notes)?));
    Ok(notes)
}

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Removes what only means something on the host from an OCI process, of a container or an exec.
pub fn fit_process(process: &mut Value) -> Result<(), SpecError> {
    let process = object(process, "process")?;
    for key in
        ["apparmorProfile", "selinuxLabel", "scheduler", "ioPriority", "execCPUAffinity", "commandLine"]
    {
        process.remove(key);
    }
    // PID 1 is exempt from the out-of-memory killer, and that is inherited.
    if !process.get("oomScoreAdj").is_some_and(Value::is_i64) {
        process.insert("oomScoreAdj".into(), 0.into());
    }
    if process.get("cwd").and_then(Value::as_str).is_none_or(str::is_empty) {
        process.insert("cwd".into(), "/".into());
    }
    object(entry(process, "user"), "process.user")?;
    // The runtime looks the program up in it and refuses to start without.
    let env = entry(process, "env");
    if !env.is_array() {
        *env = json!([]);
    }
    if let Some(env) = env.as_array_mut()
        && !env.iter().any(|word| word.as_str().is_some_and(|word| word.starts_with("PATH=")))
    {
        env.push(DEFAULT_PATH.into());
    }
    Ok(())
}

fn fit_linux(linux: &mut Value, around: &Surroundings<'_>, notes: &mut Vec<String>) -> Result<(), SpecError> {
    let linux = object(linux, "linux")?;
    linux.insert("cgroupsPath".into(), Cgroup::spec_path(around.pod, around.id).into());
    for key in ["mountLabel", "intelRdt", "memoryPolicy", "netDevices", "uidMappings", "gidMappings"] {
        linux.remove(key);
    }
    if linux.remove("seccomp").is_some() {
        notes.push("seccomp: this guest's container runtime has none; the VM is the boundary".to_owned());
    }
    let namespaces = match linux.remove("namespaces") {
        Some(Value::Array(namespaces)) => namespaces,
        _ => Vec::new(),
    };
    let fitted =
        namespaces.into_iter().filter_map(|namespace| fit_namespace(namespace, around, notes)).collect();
    linux.insert("namespaces".into(), Value::Array(fitted));
    fit_resources(entry(linux, "resources"), notes)
}

fn fit_namespace(namespace: Value, around: &Surroundings<'_>, notes: &mut Vec<String>) -> Option<Value> {
    let kind = namespace["type"].as_str()?.to_owned();
    if kind == "user" {
        notes.push("user namespace: ids are the guest's own".to_owned());
        return None;
    }
    let named = namespace["path"].as_str().is_some_and(|path| !path.is_empty());
    let file = match kind.as_str() {
        "network" => "net",
        "ipc" | "uts" | "pid" => kind.as_str(),
        _ => "",
    };
    match around.sandbox_pid {
        Some(pid) if named && !file.is_empty() => {
            Some(json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}))
        }
        _ => {
            if named {
                notes.push(format!("path of the {kind} namespace: it is the host's; a new one is made"));
            }
            Some(json!({"type": kind}))
        }
    }
}

fn fit_resources(resources: &mut Value, notes: &mut Vec<String>) -> Result<(), SpecError> {
    let resources = object(resources, "linux.resources")?;
    for key in ["devices", "blockIO", "hugepageLimits", "network", "rdma", "unified"] {
        if resources.remove(key).is_some_and(|value| !empty(&value)) && key != "devices" {
            notes.push(format!("resources.{key}: the guest has no such controller"));
        }
    }
    if resources.contains_key("memory") {
        let memory = object(entry(resources, "memory"), "linux.resources.memory")?;
        for key in [
            "swap",
            "kernel",
            "kernelTCP",
            "swappiness",
            "disableOOMKiller",
            "useHierarchy",
            "checkBeforeUpdate",
        ] {
            memory.remove(key);
        }
        memory.retain(|_, value| value.as_i64() != Some(0));
    }
    if resources.contains_key("cpu") {
        let cpu = object(entry(resources, "cpu"), "linux.resources.cpu")?;
        // The guest's CPUs and memory nodes are not the host's.
        for key in ["cpus", "mems", "realtimePeriod", "realtimeRuntime"] {
            cpu.remove(key);
        }
        cpu.retain(|_, value| value.as_i64() != Some(0));
    }
    Ok(())
}

/// Kinds of file system that the guest's kernel makes out of nothing.
const KERNEL_FILESYSTEMS: [&str; 8] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];

fn fit_mounts(
    mounts: Vec<Value>,
    around: &Surroundings<'_>,
    notes: &mut Vec<String>,
) -> Result<Vec<Value>, SpecError> {
    let mut fitted = Vec::with_capacity(mounts.len() + 3);
    for mut mount in mounts {
        let destination = mount["destination"].as_str().unwrap_or_default().to_owned();
        let kind = mount["type"].as_str().unwrap_or_default().to_owned();
        let bind = kind == "bind"
            || mount["options"].as_array().into_iter().flatten().any(|o| o == "bind" || o == "rbind");
        if !plain(Path::new(&destination)) {
            notes.push(format!("mount on {destination:?}: not an absolute path"));
            continue;
        }
        if !bind {
            if KERNEL_FILESYSTEMS.contains(&kind.as_str()) {
                fitted.push(mount);
            } else {
                notes.push(format!("mount on {destination}: file system {kind:?} is not the guest's"));
            }
            continue;
        }
        let source = mount["source"].as_str().unwrap_or_default().to_owned();
        match guest_source(&source, around)? {
            Some(path) if (around.exists)(&path) => {
                mount["source"] = text(&path);
                fitted.push(mount);
            }
            _ => notes.push(format!("mount on {destination}: its source {source:?} is the host's")),
        }
    }
    for name in ["hostname", "hosts", "resolv.conf"] {
        let destination = format!("/etc/{name}");
        let source = around.pod_dir.join(name);
        if fitted.iter().all(|mount| mount["destination"] != destination.as_str()) && (around.exists)(&source)
        {
            fitted.push(json!({
                "destination": destination, "type": "bind", "source": text(&source), "options": ["rbind", "rw"],
            }));
        }
    }
    Ok(fitted)
}

/// The guest's path for a bind mount's source; none when it is a path of the host.
fn guest_source(source: &str, around: &Surroundings<'_>) -> Result<Option<PathBuf>, SpecError> {
    let below = |dir: &str, rest: &str| {
        let path = around.pod_dir.join(dir).join(rest.trim_start_matches('/'));
        if plain(&path) { Ok(Some(path)) } else { Err(SpecError::EscapingSource(source.to_owned())) }
    };
    if let Some(rest) = source.strip_prefix("sandbox://") {
        return below("sandboxMounts", rest);
    }
    if let Some(rest) = source.strip_prefix("sandbox-tmp://") {
        return below("sandboxTmpfsMounts", rest);
    }
    if let Some(rest) = source.strip_prefix("uvm://") {
        let path = PathBuf::from(rest);
        return if plain(&path) { Ok(Some(path)) } else { Err(SpecError::EscapingSource(source.to_owned())) };
    }
    if source.contains("://") {
        return Err(SpecError::UnsupportedSource(source.to_owned()));
    }
    let path = PathBuf::from(source);
    Ok((plain(&path) && HOST_ROOTS.iter().any(|root| path.starts_with(root))).then_some(path))
}

fn entry<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Value {
    map.entry(key).or_insert(Value::Null)
}

fn object<'a>(value: &'a mut Value, name: &'static str) -> Result<&'a mut Map<String, Value>, SpecError> {
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().ok_or(SpecError::NotAnObject(name))
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn text(path: &Path) -> Value {
    path.to_string_lossy().into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(mut spec: Value, sandbox_pid: Option<i32>) -> (Value, Vec<String>) {
        let id = ContainerId::parse("c1").unwrap();
        let pod = ContainerId::parse("p1").unwrap();
        let notes = fit(
            &mut spec,
            &Surroundings {
                id: &id,
                pod: &pod,
                root: Path::new("/run/gcs/pods/p1/c1/rootfs"),
                pod_dir: Path::new("/run/gcs/pods/p1/p1"),
                sandbox_pid,
                exists: &|path| !path.ends_with("absent"),
            },
        )
        .unwrap();
        (spec, notes)
    }

    fn minimal() -> Value {
        json!({"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}})
    }

    #[test]
    fn what_is_the_hosts_goes_and_is_told() {
        let mut spec = minimal();
        spec["hooks"] = json!({"prestart": [{"path": "/usr/bin/x"}]});
        spec["windows"] = json!({"network": {}});
        spec["process"]["apparmorProfile"] = "cri-containerd".into();
        spec["linux"] = json!({
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "maskedPaths": ["/proc/kcore"],
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}, {"type": "user"}],
            "resources": {
                "devices": [{"allow": false}],
                "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
                "memory": {"limit": 1000, "swap": 2000, "reservation": 0},
                "cpu": {"shares": 2, "cpus": "0-63", "quota": 0},
            },
        });
        let (spec, notes) = fitted(spec, None);
        assert!(spec.get("hooks").is_none() && spec.get("windows").is_none());
        assert!(spec["process"].get("apparmorProfile").is_none());
        assert_eq!(spec["process"]["oomScoreAdj"], 0);
        assert_eq!(spec["root"]["path"], "/run/gcs/pods/p1/c1/rootfs");
        assert_eq!(spec["linux"]["cgroupsPath"], "/pods/p1/c1");
        assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "pid"}, {"type": "network"}]));
        assert_eq!(spec["linux"]["resources"], json!({"memory": {"limit": 1000}, "cpu": {"shares": 2}}));
        for word in ["hooks", "seccomp", "network namespace", "user namespace", "hugepageLimits"] {
            assert!(notes.iter().any(|note| note.contains(word)), "{word} is not in {notes:?}");
        }
    }

    #[test]
    fn a_workload_joins_its_sandbox() {
        let mut spec = minimal();
        spec["linux"]["namespaces"] = json!([
            {"type": "network", "path": "/proc/1/ns/net"}, {"type": "ipc", "path": "/x"}, {"type": "mount"},
        ]);
        spec["hostname"] = "its-own".into();
        let (with_own, _) = fitted(spec.clone(), Some(77));
        assert_eq!(with_own["hostname"], "its-own");
        spec["linux"]["namespaces"][2] = json!({"type": "uts", "path": "/proc/1/ns/uts"});
        let (joined, notes) = fitted(spec.clone(), Some(77));
        assert!(joined.get("hostname").is_none() && notes.iter().any(|note| note.contains("hostname")));
        spec["linux"]["namespaces"][2] = json!({"type": "mount"});
        let (spec, _) = fitted(spec, Some(77));
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([{"type": "network", "path": "/proc/77/ns/net"}, {"type": "ipc", "path": "/proc/77/ns/ipc"}, {"type": "mount"}])
        );
    }

    #[test]
    fn mounts_become_the_guests() {
        let mut spec = minimal();
        spec["mounts"] = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/var/lib/data", "options": ["rbind"]},
            {"destination": "/disk", "source": "/run/mounts/scsi/0_3_0", "options": ["rbind", "ro"]},
            {"destination": "/gone", "type": "bind", "source": "/run/mounts/absent"},
            {"destination": "/shared", "type": "bind", "source": "sandbox://a/b"},
            {"destination": "/etc/hosts", "type": "bind", "source": "uvm:///run/gcs/hosts"},
            {"destination": "/nfs", "type": "nfs", "source": "srv:/x"},
            {"destination": "rel", "type": "tmpfs"},
        ]);
        let (spec, notes) = fitted(spec, None);
        let seen: Vec<_> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| (m["destination"].as_str().unwrap(), m["source"].as_str().unwrap()))
            .collect();
        assert_eq!(
            seen,
            [
                ("/proc", "proc"),
                ("/disk", "/run/mounts/scsi/0_3_0"),
                ("/shared", "/run/gcs/pods/p1/p1/sandboxMounts/a/b"),
                ("/etc/hosts", "/run/gcs/hosts"),
                ("/etc/hostname", "/run/gcs/pods/p1/p1/hostname"),
                ("/etc/resolv.conf", "/run/gcs/pods/p1/p1/resolv.conf"),
            ]
        );
        assert_eq!(notes.len(), 4, "{notes:?}");
    }

    #[test]
    fn escapes_and_nonsense_are_refused() {
        let id = ContainerId::parse("c").unwrap();
        let around = Surroundings {
            id: &id,
            pod: &id,
            root: Path::new("/run/gcs/r"),
            pod_dir: Path::new("/run/gcs/p"),
            sandbox_pid: None,
            exists: &|_| true,
        };
        assert_eq!(fit(&mut json!({"process": {"args": []}}), &around), Err(SpecError::NoProcess));
        assert_eq!(fit(&mut json!([]), &around), Err(SpecError::NotAnObject("the whole")));
        let mut spec = minimal();
        spec["linux"] = json!(3);
        assert_eq!(fit(&mut spec, &around), Err(SpecError::NotAnObject("linux")));
        for source in ["sandbox://../../x", "uvm://../x"] {
            let mut spec = minimal();
            spec["mounts"] = json!([{"destination": "/a", "type": "bind", "source": source}]);
            assert_eq!(fit(&mut spec, &around), Err(SpecError::EscapingSource(source.into())));
        }
    }

    #[test]
    fn roles_by_annotation() {
        let id = ContainerId::parse("c").unwrap();
        let of = |annotations: Value| {
            role(&json!({"annotations": annotations}), &id).map(|(r, p)| (r, p.to_string()))
        };
        assert_eq!(of(json!({})), Ok((Role::Standalone, "c".into())));
        assert_eq!(
            of(json!({"io.kubernetes.cri.container-type": "sandbox"})),
            Ok((Role::Sandbox, "c".into()))
        );
        let workload =
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"});
        assert_eq!(of(workload), Ok((Role::Workload, "p".into())));
        let own = json!({"io.microsoft.cri.virtual-pod-id": "c", "io.kubernetes.cri.sandbox-id": "p"});
        assert_eq!(of(own.clone()), Ok((Role::Sandbox, "c".into())), "no type");
        for kind in ["sandbox", "container"] {
            let mut own = own.clone();
            own["io.kubernetes.cri.container-type"] = kind.into();
            assert_eq!(of(own), Ok((Role::Sandbox, "c".into())), "{kind}");
        }
        let in_virtual = json!({
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p",
            "io.microsoft.cri.virtual-pod-id": "v",
        });
        assert_eq!(of(in_virtual), Ok((Role::Workload, "v".into())));
        let bad =
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "../p"});
        assert!(of(bad).is_err());
    }
}
