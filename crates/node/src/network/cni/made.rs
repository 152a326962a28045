//! A namespace that this node made: from ADD to DEL, and the memory of it.
//!
//! ```text
//!   make ──> remembered ──> fresh and silent ──> ADD, interface by interface, plugin by plugin ──> here
//!                \______________\_____________________\_________________ release: DEL in reverse, unbound, forgotten
//! ```
//!
//! **Silent.** While the pod still runs elsewhere, its address is here too. A kernel that answered for it would reset
//! the pod's connections, so the namespace has no way to its own addresses (the rule that leads to their table is
//! gone) before it has any, nor does it look for duplicates or routers. The pod's machine is beside that: what
//! comes for it is taken at the interface. What plugins send by themselves (a gratuitous ARP at the end of ADD) cannot
//! be kept; the source says again where the pod is, see `network::holding`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use dunlin_net::Namespace;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::process::Command;

use super::conf::{Network, Wanted};
use super::plugin::Call;
use super::{CniError, networks};
use crate::config::CniConfig;
use crate::proto::{NetworkMode, PodNetwork};

/// Below the node's state directory; a name that no containerd namespace can have.
const MEMORY: &str = ".networks";
const IP: Duration = Duration::from_secs(5);
/// Set in a fresh namespace for the interfaces to come: nothing is asked, nothing is said.
const SETTINGS: [(&str, &str); 5] = [
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    // No link-local address.
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv4/conf/default/arp_notify", "0"),
];

/// What is remembered of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    path: PathBuf,
    /// The move it was made for.
    session: String,
    /// The pod runs here: it goes with the pod, not with the session.
    settled: bool,
    /// In the order in which they are made.
    interfaces: Vec<Attached>,
    /// CNI's name for it.
    container: String,
    bin_dir: PathBuf,
}

/// One interface, of a network of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Attached {
    name: String,
    network: Network,
    wanted: Wanted,
    /// Of the last plugin; Null: ADD did not come to its end.
    result: Value,
}

/// The memory of a node.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    dir: PathBuf,
}

impl Memory {
    /// That of the node whose state directory this is.
    pub(crate) fn of(state_dir: &Path) -> Memory {
        Memory { dir: state_dir.join(MEMORY) }
    }

    fn file(&self, path: &Path) -> PathBuf {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.dir.join(format!("{name}.json"))
    }

    fn write(&self, record: &Record) -> Result<(), CniError> {
        let path = self.file(&record.path);
        let failed = |reason: String| CniError::File { action: "write", path: path.clone(), reason };
        std::fs::create_dir_all(&self.dir).map_err(|error| failed(error.to_string()))?;
        let text = serde_json::to_vec_pretty(record).map_err(|error| failed(error.to_string()))?;
        // Whole or not at all: half a record would keep an address for ever.
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(|error| failed(error.to_string()))
    }

    fn records(&self) -> Vec<Record> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let files = entries.filter(|path| path.extension().is_some_and(|end| end == "json"));
        files
            .filter_map(|path| {
                let read = std::fs::read(&path).map_err(|error| error.to_string());
                let record = read.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
                if let Err(reason) = &record {
                    tracing::warn!(path = %path.display(), reason, "what is remembered of a network namespace cannot be read");
                }
                record.ok()
            })
            .collect()
    }

    /// Makes the namespace of `pod` for `session`, with its addresses when they are kept, unless there is one.
    /// True: it was made.
    pub(crate) async fn make(
        &self,
        config: &CniConfig,
        session: &str,
        pod: &PodNetwork,
        mode: NetworkMode,
    ) -> Result<bool, CniError> {
        let path = Path::new(&pod.destination);
        if path.exists() {
            return Ok(false);
        }
        let attached = networks(config, pod)?.into_iter().zip(&pod.interfaces).map(|(network, interface)| {
            let wanted = match mode {
                NetworkMode::Keep => Wanted { ips: interface.addresses.clone(), mac: interface.mac.clone() },
                NetworkMode::Rebind => Wanted::default(),
            };
            Attached { name: interface.name.clone(), network, wanted, result: Value::Null }
        });
        let record = Record {
            path: path.to_owned(),
            session: session.to_owned(),
            settled: false,
            interfaces: attached.collect(),
            container: format!("dunlin-{session}-{}", path.file_name().unwrap_or_default().to_string_lossy()),
            bin_dir: config.bin_dir.clone(),
        };
        // Remembered first: whatever exists from here on is removed by somebody.
        self.write(&record)?;
        match Box::pin(self.make_now(record)).await {
            Ok(()) => Ok(true),
            Err(error) => {
                if let Err(left) = self.release(path).await {
                    tracing::warn!(session, error = %left, "a network namespace that could not be made is not all gone");
                }
                Err(error)
            }
        }
    }

    async fn make_now(&self, mut record: Record) -> Result<(), CniError> {
        bind_fresh(&record.path)?;
        silence(&record.path).await?;
        for number in 0..record.interfaces.len() {
            let Attached { name, network, wanted, .. } = &record.interfaces[number];
            let mut result = None;
            for index in 0..network.plugins.len() {
                let (kind, arguments) = (network.kind(index), network.arguments(index, wanted));
                let stdin = network.stdin(index, wanted, result.as_ref());
                result = Some(record.call("ADD", name).run(kind, &arguments, &stdin).await?);
            }
            tracing::info!(path = %record.path.display(), name, network = network.name, "made a pod's interface");
            record.interfaces[number].result = result.unwrap_or_default();
            // Each one: a later one may not be made, and this one's DEL is to be given its result.
            self.write(&record)?;
        }
        Ok(())
    }

    /// The pod of `session` runs here: its namespace goes with it.
    pub(crate) fn settle(&self, session: &str) {
        for mut record in self.records().into_iter().filter(|record| record.session == session) {
            record.settled = true;
            if let Err(error) = self.write(&record) {
                tracing::warn!(session, %error, "a network namespace is still the move's");
            }
        }
    }

    /// Removes the namespace at `path` if it was made here. True: it was. Safe to repeat.
    pub(crate) async fn release(&self, path: &Path) -> Result<bool, CniError> {
        let Some(record) = self.records().into_iter().find(|record| record.path == path) else {
            return Ok(false);
        };
        for Attached { name, network, wanted, result } in record.interfaces.iter().rev() {
            let before = Some(result).filter(|result| !result.is_null());
            for index in (0..network.plugins.len()).rev() {
                let (kind, arguments) = (network.kind(index), network.arguments(index, wanted));
                let stdin = network.stdin(index, wanted, before);
                record.call("DEL", name).run(kind, &arguments, &stdin).await?;
            }
        }
        unbind(path)?;
        let file = self.file(path);
        std::fs::remove_file(&file).map_err(|error| CniError::File {
            action: "remove",
            path: file,
            reason: error.to_string(),
        })?;
        tracing::info!(path = %path.display(), "removed a pod's network namespace");
        Ok(true)
    }

    /// Removes what was made for `session` and did not come to run. Says what was left.
    pub(crate) async fn release_session(&self, session: &str) -> Vec<String> {
        let mut left = Vec::new();
        for record in self.records().into_iter().filter(|record| record.session == session && !record.settled)
        {
            if let Err(error) = self.release(&record.path).await {
                left.push(format!("{error}; the namespace {} is left", record.path.display()));
            }
        }
        left
    }

    /// Namespaces of sessions that have not settled, each with its session.
    pub(crate) fn unsettled(&self) -> Vec<(PathBuf, String)> {
        let open = self.records().into_iter().filter(|record| !record.settled);
        open.map(|record| (record.path, record.session)).collect()
    }
}

impl Record {
    fn call<'a>(&'a self, command: &'static str, interface: &'a str) -> Call<'a> {
        Call { command, container: &self.container, namespace: &self.path, interface, bin_dir: &self.bin_dir }
    }
}

/// A fresh namespace under the name `path`.
fn bind_fresh(path: &Path) -> Result<(), CniError> {
    let failed =
        |action: &'static str, reason: String| CniError::File { action, path: path.to_owned(), reason };
    let namespace =
        Namespace::fresh().map_err(|source| CniError::Namespace { path: path.to_owned(), source })?;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|error| failed("create the directory of", error.to_string()))?;
    }
    std::fs::File::create_new(path).map_err(|error| failed("create", error.to_string()))?;
    use std::os::fd::{AsFd, AsRawFd};
    let own = format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd());
    mount(Some(own.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|error| failed("name a network namespace", error.to_string()))
}

fn unbind(path: &Path) -> Result<(), CniError> {
    while path.exists() && umount2(path, MntFlags::MNT_DETACH).is_ok() {}
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(CniError::File { action: "remove", path: path.to_owned(), reason: error.to_string() })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// From here on the namespace's kernel answers nobody; see the module's words.
async fn silence(path: &Path) -> Result<(), CniError> {
    let failed = |source| CniError::Namespace { path: path.to_owned(), source };
    let namespace = Namespace::open(path).map_err(failed)?;
    let set = namespace.run(|| {
        SETTINGS.iter().try_for_each(|(key, value)| {
            let file = format!("/proc/sys/net/{key}");
            match std::fs::write(&file, value) {
                // A kernel without IPv6.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err((file, error)),
                Ok(()) => Ok(()),
            }
        })
    });
    set.map_err(failed)?.map_err(|(file, error)| CniError::File {
        action: "write",
        path: file.into(),
        reason: error.to_string(),
    })?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // IPv6 looks at its rules at all only when one was added.
    for rule in ["-4 rule del pref 0", "-6 rule add pref 40000 lookup main", "-6 rule del pref 0"] {
        let words = ["-n", &name].into_iter().chain(rule.split(' ')).collect::<Vec<&str>>();
        let running = Command::new("ip").args(&words).stdin(Stdio::null()).kill_on_drop(true).output();
        let reason = match tokio::time::timeout(IP, running).await {
            Ok(Ok(output)) if output.status.success() => continue,
            Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Ok(Err(error)) => format!("{error}; install iproute2"),
            Err(_) => format!("no end within {} s", IP.as_secs()),
        };
        return Err(CniError::File { action: "silence with `ip`", path: path.to_owned(), reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
