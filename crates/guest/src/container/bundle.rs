//! Files of a pod and of a bundle in the guest.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;

use super::error::ContainerError;
use crate::path::ContainerId;

/// Writes `hostname`, `hosts` and `resolv.conf` of a pod, unless the host has put them there.
pub(super) fn write_pod_files(dir: &Path, id: &ContainerId, spec: &Value) -> Result<(), ContainerError> {
    let hostname = hostname(spec, id)?;
    let files = [
        ("hostname", format!("{hostname}\n")),
        (
            "hosts",
            format!(
                "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
            ),
        ),
        ("resolv.conf", String::new()),
    ];
    fs::create_dir_all(dir).map_err(ContainerError::at("create the directory", dir))?;
    for (name, text) in files {
        let path = dir.join(name);
        if !path.exists() {
            fs::write(&path, text).map_err(ContainerError::at("write", &path))?;
        }
    }
    Ok(())
}

/// A pod with a UTS namespace of its own that says no hostname has the one of its files.
pub(super) fn name_pod(spec: &mut Value, id: &ContainerId) -> Result<(), ContainerError> {
    let own = |namespace: &Value| {
        namespace["type"] == "uts" && namespace["path"].as_str().unwrap_or_default().is_empty()
    };
    let namespaces = spec["linux"]["namespaces"].as_array();
    if namespaces.is_some_and(|namespaces| namespaces.iter().any(own)) {
        spec["hostname"] = hostname(spec, id)?.into();
    }
    Ok(())
}

/// Writes a JSON document that only PID 1 and its own processes read.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), ContainerError> {
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(ContainerError::at("create", path))?;
    file.write_all(value.to_string().as_bytes()).map_err(ContainerError::at("write", path))
}

/// The spec's hostname, else the id, cut to what a hostname may be.
fn hostname(spec: &Value, id: &ContainerId) -> Result<String, ContainerError> {
    match spec["hostname"].as_str() {
        None | Some("") => Ok(id.as_str().chars().take(63).collect()),
        Some(name) => {
            let fits =
                name.len() <= 255 && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
            if fits { Ok(name.to_owned()) } else { Err(ContainerError::BadHostname(name.to_owned())) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hostnames() {
        let id = ContainerId::parse("abc").unwrap();
        assert_eq!(hostname(&json!({}), &id).unwrap(), "abc");
        assert_eq!(hostname(&json!({"hostname": "web-1.x"}), &id).unwrap(), "web-1.x");
        assert!(hostname(&json!({"hostname": "a\nb"}), &id).is_err());
    }

    #[test]
    fn a_pod_is_called_as_its_files_say() {
        let id = ContainerId::parse("abc").unwrap();
        let named = |mut spec: Value| {
            name_pod(&mut spec, &id).unwrap();
            spec["hostname"].clone()
        };
        assert_eq!(named(json!({"linux": {"namespaces": [{"type": "uts"}]}})), "abc");
        assert_eq!(named(json!({"hostname": "web", "linux": {"namespaces": [{"type": "uts"}]}})), "web");
        assert_eq!(named(json!({"linux": {"namespaces": [{"type": "pid"}]}})), Value::Null);
    }

    #[test]
    fn files_of_the_host_stay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
        let id = ContainerId::parse("abc").unwrap();
        write_pod_files(dir.path(), &id, &json!({})).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("hostname")).unwrap(), "abc\n");
        assert_eq!(fs::read_to_string(dir.path().join("resolv.conf")).unwrap(), "nameserver 192.0.2.1\n");
    }
}
