//! The daemon's TOML file: read, checked, refused with the name of the key that is wrong.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {reason}; pass the daemon's file with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// Not TOML, or a key is unknown, missing or of the wrong type.
    #[error("{path}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Names the key and the line.
        reason: Box<toml::de::Error>,
    },
    /// A value that parses and cannot be meant.
    #[error("{path}: {key}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what would do.
        reason: String,
    },
}

/// The configuration of `dunlin node`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// This node's name; peers call it so, and its certificate carries it.
    pub(crate) name: String,
    /// Where peers reach the daemon.
    pub(crate) listen: SocketAddr,
    /// Where peers bring memory and disks.
    pub(crate) data_listen: SocketAddr,
    /// The daemon's local socket.
    #[serde(default = "default_socket")]
    pub(crate) socket: PathBuf,
    /// containerd's gRPC socket.
    #[serde(default = "default_containerd")]
    pub(crate) containerd: PathBuf,
    /// The shim's binary: a path, or a name looked up on PATH.
    #[serde(default = "default_shim")]
    pub(crate) shim: PathBuf,
    /// The shim's own configuration, passed on as `DUNLIN_CONFIG`.
    #[serde(default)]
    pub(crate) shim_config: Option<PathBuf>,
    /// What a shim calls to publish events when ttrpc fails.
    #[serde(default = "default_publish_binary")]
    pub(crate) publish_binary: PathBuf,
    /// The shims' state directory.
    #[serde(default = "default_state_dir")]
    pub(crate) state_dir: PathBuf,
    /// Where an arriving container's FIFOs are made.
    #[serde(default = "default_io_dir")]
    pub(crate) io_dir: PathBuf,
    /// Where an arriving container's log files are made.
    #[serde(default = "default_log_dir")]
    pub(crate) log_dir: PathBuf,
    /// Below it lie the termination logs that an arriving container may have written on this host.
    #[serde(default = "default_termination_logs")]
    pub(crate) termination_logs: PathBuf,
    /// Keys. Without them everything between nodes is plain text.
    #[serde(default)]
    pub(crate) tls: Option<TlsConfig>,
    /// The other nodes.
    #[serde(default)]
    pub(crate) peers: Vec<PeerConfig>,
    /// How this node makes network namespaces of arriving pods; without it, they must be there.
    #[serde(default)]
    pub(crate) cni: Option<CniConfig>,
}

/// A network of CNI plugins.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CniConfig {
    /// Where configurations are: `*.conflist`, `*.conf`, `*.json`.
    #[serde(default = "default_cni_conf")]
    pub(crate) conf_dir: PathBuf,
    /// Where plugins are.
    #[serde(default = "default_cni_bin")]
    pub(crate) bin_dir: PathBuf,
    /// The `name` of the one to use, for a pod's only interface, or the first that has none of its own.
    pub(crate) network: String,
    /// Networks of further interfaces, by the interface's name in the pod.
    #[serde(default)]
    pub(crate) interfaces: BTreeMap<String, String>,
}

/// Files in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsConfig {
    /// The authority that both sides' certificates are signed by.
    pub(crate) ca: PathBuf,
    /// This node's certificate; its subject alternative names hold the node's name.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PeerConfig {
    /// Its name.
    pub(crate) name: String,
    /// Its `listen`, as reached from here.
    pub(crate) address: SocketAddr,
    /// Its `data_listen`, as reached from here.
    pub(crate) data_address: SocketAddr,
}

/// The socket that both the daemon and the command line use when nothing is said.
pub(crate) const DEFAULT_SOCKET: &str = "/run/dunlin/node.sock";

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}
fn default_containerd() -> PathBuf {
    "/run/containerd/containerd.sock".into()
}
fn default_shim() -> PathBuf {
    "containerd-shim-dunlin-v2".into()
}
fn default_publish_binary() -> PathBuf {
    "containerd".into()
}
fn default_state_dir() -> PathBuf {
    "/run/dunlin".into()
}
fn default_io_dir() -> PathBuf {
    "/run/dunlin-io".into()
}
fn default_cni_conf() -> PathBuf {
    "/etc/cni/net.d".into()
}
fn default_cni_bin() -> PathBuf {
    "/opt/cni/bin".into()
}
fn default_termination_logs() -> PathBuf {
    crate::cri::admit::KUBELET_PODS.into()
}
fn default_log_dir() -> PathBuf {
    "/var/log/dunlin".into()
}

impl NodeConfig {
    /// Reads and checks `path`.
    pub(crate) fn load(path: &Path) -> Result<NodeConfig, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| ConfigError::Read { path: path.to_owned(), reason })?;
        NodeConfig::parse(path, &text)
    }

    /// Checks `text`; `path` is only named in errors.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<NodeConfig, ConfigError> {
        let config: NodeConfig = toml::from_str(text)
            .map_err(|reason| ConfigError::Parse { path: path.to_owned(), reason: Box::new(reason) })?;
        config.check().map_err(|(key, reason)| ConfigError::Value { path: path.to_owned(), key, reason })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (String, String)> {
        name_is_plain(&self.name).map_err(|reason| ("name".to_owned(), reason))?;
        if self.listen == self.data_listen && self.listen.port() != 0 {
            return Err((
                "data_listen".into(),
                format!(
                    "{} is `listen` already; give the data streams a port of their own",
                    self.data_listen
                ),
            ));
        }
        for (key, path) in [
            ("socket", &self.socket),
            ("containerd", &self.containerd),
            ("state_dir", &self.state_dir),
            ("io_dir", &self.io_dir),
            ("log_dir", &self.log_dir),
            ("termination_logs", &self.termination_logs),
        ] {
            if !path.is_absolute() {
                return Err((key.into(), format!("`{}` is relative; give an absolute path", path.display())));
            }
        }
        let cni =
            self.cni.iter().flat_map(|cni| [("cni.conf_dir", &cni.conf_dir), ("cni.bin_dir", &cni.bin_dir)]);
        if let Some((key, path)) = cni.into_iter().find(|(_, path)| !path.is_absolute()) {
            return Err((key.into(), format!("`{}` is relative; give an absolute path", path.display())));
        }
        let nameless = |cni: &CniConfig| {
            cni.interfaces.iter().any(|(nic, network)| nic.is_empty() || network.is_empty())
        };
        if self.cni.as_ref().is_some_and(nameless) {
            let reason = "an interface and its network both need a name, as in net1 = \"storage\"";
            return Err(("cni.interfaces".into(), reason.into()));
        }
        let mut seen = BTreeMap::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let key = |field: &str| format!("peers[{index}].{field}");
            name_is_plain(&peer.name).map_err(|reason| (key("name"), reason))?;
            if peer.name == self.name {
                return Err((key("name"), format!("`{}` is this node's own name", peer.name)));
            }
            if let Some(first) = seen.insert(&peer.name, index) {
                return Err((key("name"), format!("`{}` is peers[{first}] already", peer.name)));
            }
            for (field, address) in [("address", peer.address), ("data_address", peer.data_address)] {
                if address.port() == 0 || address.ip().is_unspecified() {
                    return Err((
                        key(field),
                        format!("{address} cannot be dialled; give the peer's address and port"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The peer called `name`.
    pub(crate) fn peer(&self, name: &str) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// The names that `peer` knows, for a refusal: `b, c`, or `none`.
    pub(crate) fn peer_names(&self) -> String {
        if self.peers.is_empty() {
            return "none (the configuration has no [[peers]])".into();
        }
        let names: Vec<_> = self.peers.iter().map(|peer| peer.name.as_str()).collect();
        names.join(", ")
    }
}

/// Names are used in file names, certificates and messages.
fn name_is_plain(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.is_empty() || name.len() > 63 || !name.chars().all(plain) {
        return Err(format!("`{name}` is no node name; use 1 to 63 letters, digits, `-`, `.` or `_`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "a"
        listen = "10.0.0.1:7701"
        data_listen = "10.0.0.1:7702"
        [[peers]]
        name = "b"
        address = "10.0.0.2:7701"
        data_address = "10.0.0.2:7702"
    "#;

    fn parse(text: &str) -> Result<NodeConfig, String> {
        NodeConfig::parse(Path::new("node.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_fill_what_is_not_said() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.socket, Path::new("/run/dunlin/node.sock"));
        assert_eq!(config.containerd, Path::new("/run/containerd/containerd.sock"));
        assert_eq!(config.tls, None);
        assert_eq!(config.peer("b").unwrap().address.port(), 7701);
        assert!(config.peer("c").is_none());
        assert_eq!(config.peer_names(), "b");
    }

    #[test]
    fn an_unknown_key_is_named() {
        for (text, key) in [
            (format!("lisen = 1\n{GOOD}"), "lisen"),
            (format!("{GOOD}\nport = 7"), "port"),
            (format!("{GOOD}\n[tls]\nca=\"a\"\ncert=\"b\"\nkey=\"c\"\npassword=\"d\""), "password"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
            assert!(error.starts_with("node.toml"), "{error}");
        }
    }

    #[test]
    fn a_missing_key_is_named() {
        let error = parse("name = \"a\"\nlisten = \"1.1.1.1:1\"").unwrap_err();
        assert!(error.contains("missing field `data_listen`"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_meant_are_refused() {
        for (from, to, key) in [
            ("name = \"a\"", "name = \"a b\"", "name"),
            ("10.0.0.1:7702", "10.0.0.1:7701", "data_listen"),
            ("name = \"b\"", "name = \"a\"", "peers[0].name"),
            ("10.0.0.2:7701", "0.0.0.0:7701", "peers[0].address"),
            ("10.0.0.2:7702", "10.0.0.2:0", "peers[0].data_address"),
            ("name = \"a\"", "name = \"a\"\nsocket = \"node.sock\"", "socket"),
            ("[[peers]]", "[cni]\nnetwork = \"x\"\nbin_dir = \"bin\"\n[[peers]]", "cni.bin_dir"),
            (
                "[[peers]]",
                "[cni]\nnetwork = \"x\"\ninterfaces = { net1 = \"\" }\n[[peers]]",
                "cni.interfaces",
            ),
        ] {
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
            assert!(error.starts_with(&format!("node.toml: {key}: ")), "{error}");
        }
        let twice =
            format!("{GOOD}\n[[peers]]\nname=\"b\"\naddress=\"1.1.1.1:1\"\ndata_address=\"1.1.1.1:2\"");
        assert!(parse(&twice).unwrap_err().contains("peers[0] already"));
    }

    #[test]
    fn a_missing_file_says_which() {
        let error = NodeConfig::load(Path::new("/nonexistent/node.toml")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/node.toml"), "{error}");
    }
}
