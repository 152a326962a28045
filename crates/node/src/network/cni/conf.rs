//! A network's configuration: a list of plugins, or one plugin by itself, as CNI's specification has them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::CniError;

/// Endings of files that hold a configuration.
const ENDINGS: [&str; 3] = ["conflist", "conf", "json"];

/// A named list of plugins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Network {
    pub(crate) name: String,
    /// `cniVersion`.
    pub(crate) version: String,
    /// Each with its `type` and all else that is its own; at least one.
    pub(crate) plugins: Vec<Map<String, Value>>,
}

/// What an interface is asked to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    /// With prefix lengths; none: the network's own choice.
    pub(crate) ips: Vec<String>,
    pub(crate) mac: String,
}

impl Network {
    /// The network called `name` among the files of `dir`. One that cannot be read is an error only when no
    /// other has the name.
    pub(crate) fn find(dir: &Path, name: &str) -> Result<Network, CniError> {
        let mut known = Vec::new();
        let mut broken = None;
        for path in files(dir)? {
            match Network::read(&path) {
                Ok(network) if network.name == name => return Ok(network),
                Ok(network) => known.push(network.name),
                Err(error) => broken = broken.or(Some(error)),
            }
        }
        if let Some(error) = broken {
            return Err(error);
        }
        let known =
            if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        Err(CniError::Unknown { network: name.into(), dir: dir.to_owned(), known })
    }

    fn read(path: &Path) -> Result<Network, CniError> {
        let wrong = |reason: String| CniError::Conf { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        Network::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Network, String> {
        let mut file: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut word = |key: &str| match file.remove(key) {
            Some(Value::String(word)) if !word.is_empty() => Ok(word),
            _ => Err(format!("`{key}` is missing")),
        };
        let (name, version) = (word("name")?, word("cniVersion")?);
        let plugins = match file.remove("plugins") {
            Some(Value::Array(plugins)) => plugins,
            Some(_) => return Err("`plugins` is no list".into()),
            None => vec![Value::Object(file)],
        };
        let plugins = plugins.into_iter().map(|plugin| match plugin {
            Value::Object(plugin) if plugin.get("type").is_some_and(Value::is_string) => Ok(plugin),
            _ => Err("a plugin without `type`".to_owned()),
        });
        let plugins = plugins.collect::<Result<Vec<_>, String>>()?;
        if plugins.is_empty() {
            return Err("`plugins` is empty".into());
        }
        Ok(Network { name, version, plugins })
    }

    /// What plugin `index` is to read, the result of the ones before it among it.
    pub(super) fn stdin(&self, index: usize, wanted: &Wanted, before: Option<&Value>) -> Value {
        let mut conf = self.plugins[index].clone();
        let mut runtime = Map::new();
        for (capability, value, any) in [
            ("ips", json!(wanted.ips), !wanted.ips.is_empty()),
            ("mac", json!(wanted.mac), !wanted.mac.is_empty()),
        ] {
            if any && has(&conf, capability) {
                runtime.insert(capability.into(), value);
            }
        }
        conf.remove("capabilities");
        if !runtime.is_empty() {
            conf.insert("runtimeConfig".into(), Value::Object(runtime));
        }
        conf.insert("name".into(), json!(self.name));
        conf.insert("cniVersion".into(), json!(self.version));
        if let Some(before) = before {
            conf.insert("prevResult".into(), before.clone());
        }
        Value::Object(conf)
    }

    /// `CNI_ARGS` of plugin `index`: the older way to ask, for what it does not declare a capability for.
    pub(super) fn arguments(&self, index: usize, wanted: &Wanted) -> String {
        let mut text = "IgnoreUnknown=1".to_owned();
        let conf = &self.plugins[index];
        if !has(conf, "ips") && !wanted.ips.is_empty() {
            text.push_str(&format!(";IP={}", wanted.ips.join(",")));
        }
        if !has(conf, "mac") && !wanted.mac.is_empty() {
            text.push_str(&format!(";MAC={}", wanted.mac));
        }
        text
    }

    /// The `type` of plugin `index`.
    pub(super) fn kind(&self, index: usize) -> &str {
        self.plugins[index]["type"].as_str().unwrap_or_default()
    }
}

fn has(conf: &Map<String, Value>, capability: &str) -> bool {
    conf.get("capabilities").is_some_and(|all| all[capability] == true)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>, CniError> {
    let failed = |error: std::io::Error| CniError::File {
        action: "list",
        path: dir.to_owned(),
        reason: error.to_string(),
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(failed)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| ENDINGS.iter().any(|known| end == *known)))
        .collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion":"0.4.0","name":"pods","plugins":[
        {"type":"bridge","capabilities":{"ips":true},"ipam":{"type":"static"}},{"type":"tuning"}]}"#;

    fn wanted() -> Wanted {
        Wanted { ips: vec!["10.0.0.5/24".into(), "fd00::5/64".into()], mac: "02:00:00:00:00:05".into() }
    }

    #[test]
    fn a_plugin_is_asked_in_the_way_that_it_declares() {
        let network = Network::parse(LIST).unwrap();
        let first = network.stdin(0, &wanted(), None);
        assert_eq!(first["runtimeConfig"], json!({ "ips": ["10.0.0.5/24", "fd00::5/64"] }));
        assert_eq!((first["name"].as_str(), first["capabilities"].is_null()), (Some("pods"), true));
        assert_eq!(network.arguments(0, &wanted()), "IgnoreUnknown=1;MAC=02:00:00:00:00:05");
        let before = json!({ "ips": [] });
        let second = network.stdin(1, &wanted(), Some(&before));
        assert_eq!((&second["prevResult"], second["runtimeConfig"].is_null()), (&before, true));
        let all = "IgnoreUnknown=1;IP=10.0.0.5/24,fd00::5/64;MAC=02:00:00:00:00:05";
        assert_eq!(network.arguments(1, &wanted()), all);
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let network =
            Network::parse(r#"{"cniVersion":"0.3.1","name":"one","type":"macvlan","master":"x"}"#).unwrap();
        assert_eq!((network.plugins.len(), network.kind(0)), (1, "macvlan"));
        assert_eq!(network.stdin(0, &Wanted::default(), None)["master"], "x");
        for (text, word) in [
            ("{}", "`name`"),
            ("[]", "invalid type"),
            (r#"{"name":"x","cniVersion":"1","plugins":[]}"#, "empty"),
        ] {
            assert!(Network::parse(text).unwrap_err().contains(word), "{text}");
        }
    }

    #[test]
    fn a_network_is_found_by_name_and_one_that_is_not_there_is_told_with_those_that_are() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-pods.conflist"), LIST).unwrap();
        std::fs::write(dir.path().join("README"), "not one").unwrap();
        assert_eq!(Network::find(dir.path(), "pods").unwrap().plugins.len(), 2);
        let error = Network::find(dir.path(), "other").unwrap_err().to_string();
        assert!(error.contains("`other`") && error.contains("there are pods"), "{error}");
    }
}
