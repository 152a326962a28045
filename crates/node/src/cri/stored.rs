//! What a pod was made with, read back from the plugin.
//!
//! containerd 1.6 keeps the configurations in extensions of its container records, 2.x in its sandbox
//! store; both give them out, in one form, in the verbose answers of PodSandboxStatus and ContainerStatus,
//! so that is what is read. The form is JSON: the messages' own field names, enumerations as numbers,
//! fields with their zero value left out. A field that is not known here is refused by its name: what
//! cannot be read would be lost on the other host.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};

use super::api;

/// Why the plugin's account cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoredError {
    /// Not JSON, or with a field that is not known.
    #[error(
        "containerd's account of `{id}` cannot be read: {reason}; it may have been made by a newer containerd than this version of dunlin knows"
    )]
    Unreadable {
        /// Pod or container.
        id: String,
        /// What and where.
        reason: String,
    },
    /// Without a configuration.
    #[error("containerd's account of `{id}` has no `config`; is it a pod made through CRI?")]
    NoConfig {
        /// Pod or container.
        id: String,
    },
    /// An environment variable whose value is neither plain nor base64 of what the process got.
    #[error(
        "container `{id}`: the value of its environment variable `{key}` is not the one in its OCI spec, so it cannot be made again; something changed the spec after CRI"
    )]
    Environment {
        /// The container.
        id: String,
        /// The variable.
        key: String,
    },
}

#[derive(Deserialize)]
struct PodAccount {
    config: Option<api::PodSandboxConfig>,
}

#[derive(Deserialize)]
struct ContainerAccount {
    config: Option<api::ContainerConfig>,
    #[serde(rename = "runtimeSpec")]
    spec: Option<Spec>,
}

#[derive(Deserialize)]
struct Spec {
    process: Option<Process>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    env: Vec<String>,
}

/// What became of a configuration in containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    /// The runtime's type.
    pub(crate) runtime: String,
    annotations: HashMap<String, String>,
}

impl Made {
    /// An annotation of the OCI spec.
    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }
}

#[derive(Deserialize)]
struct MadeAccount {
    #[serde(rename = "runtimeType", default)]
    runtime: String,
    #[serde(rename = "runtimeSpec")]
    spec: Option<Spec>,
}

/// What pod or container `id` became, from the plugin's account of it.
pub(crate) fn spec(id: &str, account: &str) -> Result<Made, StoredError> {
    let account: MadeAccount = parse(id, account)?;
    let annotations = account.spec.map(|spec| spec.annotations).unwrap_or_default();
    Ok(Made { runtime: account.runtime, annotations })
}

/// The configuration of pod `id`, from the plugin's account of it.
pub(crate) fn pod(id: &str, account: &str) -> Result<api::PodSandboxConfig, StoredError> {
    let account: PodAccount = parse(id, account)?;
    account.config.ok_or_else(|| StoredError::NoConfig { id: id.to_owned() })
}

/// The configuration of container `id`, from the plugin's account of it.
pub(crate) fn container(id: &str, account: &str) -> Result<api::ContainerConfig, StoredError> {
    let account: ContainerAccount = parse(id, account)?;
    let mut config = account.config.ok_or_else(|| StoredError::NoConfig { id: id.to_owned() })?;
    let env = account.spec.and_then(|spec| spec.process).map(|process| process.env).unwrap_or_default();
    settle_environment(id, &mut config.envs, &env)?;
    Ok(config)
}

fn parse<'a, T: Deserialize<'a>>(id: &str, account: &'a str) -> Result<T, StoredError> {
    serde_json::from_str(account)
        .map_err(|error| StoredError::Unreadable { id: id.to_owned(), reason: error.to_string() })
}

/// A value as the JSON has it: plain from a containerd whose messages call it text, base64 from a newer
/// one whose messages call it bytes. Which of the two, [`settle_environment`] finds out.
pub(crate) fn text_as_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    String::deserialize(deserializer).map(String::into_bytes)
}

/// Decodes the values if they are base64: what the process got, which the OCI spec says, decides.
fn settle_environment(id: &str, envs: &mut [api::KeyValue], process: &[String]) -> Result<(), StoredError> {
    let got = |key: &str, value: &[u8]| {
        process.iter().any(|entry| {
            entry.as_bytes().strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b"="))
                == Some(value)
        })
    };
    // Of two values of one variable the process got the last.
    let last = |at: usize| envs[at + 1..].iter().all(|later| later.key != envs[at].key);
    let told: Vec<usize> = (0..envs.len()).filter(|at| last(*at)).collect();
    if told.iter().all(|at| got(&envs[*at].key, &envs[*at].value)) {
        return Ok(());
    }
    let decoded: Vec<Option<Vec<u8>>> = envs.iter().map(|env| STANDARD.decode(&env.value).ok()).collect();
    let wrong = told.iter().find(|at| {
        let at = **at;
        !decoded[at].as_ref().is_some_and(|value| got(&envs[at].key, value))
    });
    if let Some(at) = wrong {
        return Err(StoredError::Environment { id: id.to_owned(), key: envs[*at].key.clone() });
    }
    for (env, value) in envs.iter_mut().zip(decoded) {
        // One that a later value hides may be anything.
        env.value = value.unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_read_as_containerd_writes_it() {
        let account = r#"{"pid":7,"processStatus":"running","runtimeHandler":"dunlin","config":{
            "metadata":{"name":"web","uid":"u1","namespace":"shop"},"hostname":"web-0",
            "log_directory":"/var/log/pods/shop_web_u1","dns_config":{"servers":["10.0.0.53"]},
            "port_mappings":[{"protocol":1,"container_port":53,"host_port":5353}],
            "labels":{"app":"web"},"annotations":{"a":"b"},
            "linux":{"cgroup_parent":"/kubepods","sysctls":{"kernel.shm_rmid_forced":"1"},
              "security_context":{"namespace_options":{"network":2,"pid":1},"run_as_user":{},
                "selinux_options":{"type":"spc_t"},"seccomp":{"profile_type":1}}}}}"#;
        let config = pod("p", account).unwrap();
        let metadata = config.metadata.unwrap();
        assert_eq!((metadata.name.as_str(), metadata.uid.as_str(), metadata.attempt), ("web", "u1", 0));
        assert_eq!(config.port_mappings[0].protocol, 1);
        assert_eq!(config.dns_config.unwrap().servers, ["10.0.0.53"]);
        let context = config.linux.unwrap().security_context.unwrap();
        assert_eq!(context.namespace_options.unwrap().network, api::NamespaceMode::Node as i32);
        assert_eq!(context.run_as_user, Some(api::Int64Value { value: 0 }), "root is said, not left out");
        assert_eq!(context.selinux_options.unwrap().r#type, "spc_t");
    }

    fn account(envs: &str, process: &str) -> String {
        format!(
            r#"{{"sandboxID":"p","removing":false,"config":{{"metadata":{{"name":"one","attempt":2}},
            "image":{{"image":"sha256:0123"}},"command":["/bin/counter"],"envs":{envs},"log_path":"one/2.log",
            "mounts":[{{"container_path":"/d","host_path":"/h","uidMappings":[{{"length":1}}]}}],
            "CDI_devices":[{{"name":"x"}}],
            "linux":{{"resources":{{"memory_limit_in_bytes":67108864}}}}}},
            "runtimeSpec":{{"ociVersion":"1.0.2-dev","process":{{"env":{process}}}}}}}"#
        )
    }

    #[test]
    fn a_container_is_read_as_containerd_writes_it() {
        let config = container("c", &account("[]", "[]")).unwrap();
        assert_eq!(config.metadata.unwrap().attempt, 2);
        assert_eq!(config.linux.unwrap().resources.unwrap().memory_limit_in_bytes, 64 << 20);
        assert_eq!(config.mounts[0].uid_mappings[0].length, 1);
        assert_eq!(config.cdi_devices[0].name, "x");
    }

    #[test]
    fn environment_values_are_what_the_process_got() {
        let process = r#"["PATH=/bin","A=b","B=c=d","AA=x"]"#;
        let plain =
            container("c", &account(r#"[{"key":"A","value":"b"},{"key":"B","value":"c=d"}]"#, process));
        let coded =
            container("c", &account(r#"[{"key":"A","value":"Yg=="},{"key":"B","value":"Yz1k"}]"#, process));
        for config in [plain.unwrap(), coded.unwrap()] {
            let values: Vec<&[u8]> = config.envs.iter().map(|env| env.value.as_slice()).collect();
            assert_eq!(values, [b"b".as_slice(), b"c=d"]);
        }
        // A value that is base64 of something else by chance stays as it is.
        let chance = container("c", &account(r#"[{"key":"A","value":"Yg=="}]"#, r#"["A=Yg=="]"#)).unwrap();
        assert_eq!(chance.envs[0].value, b"Yg==");
        // The first of two is hidden by the second.
        let twice = r#"[{"key":"A","value":"old"},{"key":"A","value":"b"}]"#;
        assert_eq!(container("c", &account(twice, process)).unwrap().envs[1].value, b"b");
    }

    #[test]
    fn an_environment_that_was_changed_behind_cri_is_refused_by_name() {
        let error = container("c", &account(r#"[{"key":"A","value":"z"}]"#, r#"["A=b"]"#)).unwrap_err();
        assert!(error.to_string().contains("variable `A`"), "{error}");
    }

    #[test]
    fn a_field_that_is_not_known_is_refused_by_name() {
        let error = pod("p", r#"{"config":{"windows":{}}}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `windows`"), "{error}");
        assert!(matches!(pod("p", r#"{"pid":1}"#), Err(StoredError::NoConfig { .. })));
        assert!(matches!(pod("p", "not json"), Err(StoredError::Unreadable { .. })));
    }
}
