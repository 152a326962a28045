//! The pods' networks: which adapters belong to which namespace of the host's naming, and where that namespace is in
//! the guest.
//!
//! ```text
//!  Add ──> known ──────────────────── the sandbox's init has a pid ──> placed <── Update
//!           │  ^                                                          │
//!           │  └───────────────────── the sandbox's state is deleted ─────┤
//!           └──────────────────────────────> gone <──────────── Remove ───┘
//! ```
//!
//! A NIC is known by its MAC: it may be called anything until it has its name, and comes back to the guest's own
//! namespace when its pod's ends. It is down until it is configured.

mod adapter;
mod error;
mod nic;
mod resolv;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dunlin_bridge::message::NetworkAdapter;
use dunlin_net::Namespace;
use serde_json::Value;
use tokio::sync::Mutex;

use adapter::Adapter;
pub use error::NetworkError;
use nic::Nic;

use crate::path::ContainerId;

/// How long a NIC may take to appear after it was plugged in.
const APPEARANCE: Duration = Duration::from_secs(5);

/// The host's name for a namespace, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespaceKey(String);

impl NamespaceKey {
    /// The namespace that the spec of a sandbox or standalone container names; else one that is called as the
    /// container is.
    pub fn of(spec: &Value, id: &ContainerId) -> NamespaceKey {
        let named = spec["windows"]["network"]["networkNamespace"].as_str().filter(|name| !name.is_empty());
        NamespaceKey(named.unwrap_or(id.as_str()).to_ascii_lowercase())
    }

    fn read(text: &str) -> Result<NamespaceKey, NetworkError> {
        if text.is_empty() {
            return Err(NetworkError::settings("NamespaceID", "it is empty; name the pod's namespace"));
        }
        Ok(NamespaceKey(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for NamespaceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The networks of all pods. Clones share them.
#[derive(Clone)]
pub struct Networks {
    shared: Arc<Shared>,
}

struct Shared {
    /// The guest's own namespace, where NICs appear.
    own: Namespace,
    pods: Mutex<HashMap<NamespaceKey, PodNetwork>>,
}

#[derive(Default)]
struct PodNetwork {
    nics: Vec<Nic>,
    home: Option<Home>,
}

/// Where a namespace is.
struct Home {
    container: ContainerId,
    /// Directory of the pod's `resolv.conf`.
    dir: PathBuf,
    namespace: Namespace,
}

impl PodNetwork {
    /// Puts what is not there yet into the pod's namespace; does nothing before there is one.
    async fn sync(&mut self, own: &Namespace) -> Result<(), NetworkError> {
        let PodNetwork { nics, home: Some(home) } = self else { return Ok(()) };
        for nic in nics.iter_mut().filter(|nic| !nic.placed) {
            nic.place(own, &home.namespace).await?;
        }
        resolv::write(&home.dir, nics.iter().map(|nic| &nic.adapter.names))
    }

    /// Takes all NICs back out of a namespace that ends.
    async fn leave(&mut self, own: &Namespace) {
        let Some(home) = self.home.take() else { return };
        for nic in &mut self.nics {
            if let Err(error) = nic.send_back(own, &home.namespace).await {
                // It comes back by itself when the last that holds the namespace lets go.
                tracing::warn!(id = %nic.adapter.id, %error, "a NIC is not taken back from its pod");
            }
        }
    }

    /// Which adapter is meant: by id, else by MAC, because a host that took a machine over names it anew.
    fn position(&self, id: &str, mac: Option<[u8; 6]>) -> Option<usize> {
        let by_id = self.nics.iter().position(|nic| nic.adapter.id.eq_ignore_ascii_case(id));
        by_id.or_else(|| self.nics.iter().position(|nic| Some(nic.mac) == mac))
    }
}

impl Networks {
    /// None yet. `own` is the namespace where NICs appear.
    pub fn new(own: Namespace) -> Networks {
        Networks { shared: Arc::new(Shared { own, pods: Mutex::default() }) }
    }

    /// Network Add: waits for the NIC, remembers it, and puts it into the pod's namespace if there is one already.
    pub async fn add(&self, settings: &NetworkAdapter) -> Result<(), NetworkError> {
        let key = NamespaceKey::read(&settings.namespace_id)?;
        let adapter = Adapter::read(settings)?;
        let no_mac = "it is empty; this guest knows a NIC by nothing else";
        let mac = adapter.mac.ok_or_else(|| NetworkError::settings("MacAddress", no_mac))?;
        free(&*self.shared.pods.lock().await, &adapter.id, mac)?;
        let link = nic::wait_for(&self.shared.own, mac, APPEARANCE).await?;
        let mut pods = self.shared.pods.lock().await;
        free(&pods, &adapter.id, mac)?;
        let pod = pods.entry(key.clone()).or_default();
        pod.nics.push(Nic { adapter, mac, native_mtu: link.mtu, placed: false });
        let synced = pod.sync(&self.shared.own).await;
        if synced.is_err() {
            // As if it had not been asked for, so that it can be asked for again.
            if let (Some(mut nic), Some(home)) = (pod.nics.pop(), &pod.home) {
                let _ = nic.send_back(&self.shared.own, &home.namespace).await;
            }
            forget_if_empty(&mut pods, &key);
        }
        synced
    }

    /// Network Update: the NIC has exactly the new addresses, routes and neighbours, its name and, unless told, its
    /// MTU staying as they are.
    pub async fn update(&self, settings: &NetworkAdapter) -> Result<(), NetworkError> {
        let key = NamespaceKey::read(&settings.namespace_id)?;
        let mut adapter = Adapter::read(settings)?;
        let mut pods = self.shared.pods.lock().await;
        let pod = pods.get_mut(&key).ok_or_else(|| NetworkError::UnknownNamespace(key.clone()))?;
        let unknown = || NetworkError::UnknownAdapter { namespace: key.clone(), id: settings.id.clone() };
        let position = pod.position(&adapter.id, adapter.mac).ok_or_else(unknown)?;
        let nic = &mut pod.nics[position];
        if adapter.mac.is_some_and(|mac| mac != nic.mac) {
            return Err(NetworkError::settings(
                "MacAddress",
                "a NIC keeps its own; remove it and add another",
            ));
        }
        adapter.name = adapter.name.or_else(|| nic.adapter.name.clone());
        adapter.mtu = adapter.mtu.or(nic.adapter.mtu);
        nic.adapter = adapter;
        if let Some(home) = pod.home.as_ref().filter(|_| nic.placed) {
            nic.reconfigure(&home.namespace).await?;
        }
        pod.sync(&self.shared.own).await
    }

    /// Network Remove: forgets the adapter; its NIC, if it is still plugged in, goes back to the guest's own namespace
    /// and is down. What is not known is removed already.
    pub async fn remove(&self, settings: &NetworkAdapter) -> Result<(), NetworkError> {
        let key = NamespaceKey::read(&settings.namespace_id)?;
        let mut pods = self.shared.pods.lock().await;
        let mac = adapter::address_of(settings)?;
        let found = pods.get_mut(&key).and_then(|pod| {
            let position = pod.position(&settings.id, mac)?;
            Some((pod.nics.remove(position), pod.home.as_ref()))
        });
        let Some((mut nic, home)) = found else {
            tracing::warn!(namespace = %key, id = %settings.id, "an adapter that is not known is removed");
            return Ok(());
        };
        let home = home.map_or(&self.shared.own, |home| &home.namespace);
        let sent_back = nic.send_back(&self.shared.own, home).await;
        forget_if_empty(&mut pods, &key);
        sent_back
    }

    /// The init of a sandbox or standalone container has a pid: its namespace gets the adapters that were added for
    /// it and those that come later. On failure all is as before.
    pub async fn attach(
        &self,
        key: &NamespaceKey,
        container: &ContainerId,
        dir: &Path,
        pid: i32,
    ) -> Result<(), NetworkError> {
        let namespace = Namespace::of_pid(pid)?;
        let mut pods = self.shared.pods.lock().await;
        let pod = pods.entry(key.clone()).or_default();
        if let Some(home) = &pod.home {
            return Err(NetworkError::Taken { namespace: key.clone(), container: home.container.clone() });
        }
        pod.home = Some(Home { container: container.clone(), dir: dir.to_owned(), namespace });
        let synced = pod.sync(&self.shared.own).await;
        if synced.is_err() {
            pod.leave(&self.shared.own).await;
            forget_if_empty(&mut pods, key);
        }
        synced
    }

    /// A container's state is deleted. If a namespace was its, the NICs in it go back to the guest's own, and are
    /// remembered for the next sandbox of that namespace.
    pub async fn release(&self, container: &ContainerId) {
        let mut pods = self.shared.pods.lock().await;
        let mut released = Vec::new();
        for (key, pod) in pods.iter_mut() {
            if pod.home.as_ref().is_some_and(|home| home.container == *container) {
                pod.leave(&self.shared.own).await;
                released.push(key.clone());
            }
        }
        for key in released {
            forget_if_empty(&mut pods, &key);
        }
    }
}

/// Fails when an adapter of this id, or a NIC of this address, is known.
fn free(pods: &HashMap<NamespaceKey, PodNetwork>, id: &str, mac: [u8; 6]) -> Result<(), NetworkError> {
    for nic in pods.values().flat_map(|pod| &pod.nics) {
        if nic.adapter.id == id {
            return Err(NetworkError::Exists(id.to_owned()));
        }
        if nic.mac == mac {
            return Err(NetworkError::SameMac { id: id.to_owned(), other: nic.adapter.id.clone(), mac });
        }
    }
    Ok(())
}

fn forget_if_empty(pods: &mut HashMap<NamespaceKey, PodNetwork>, key: &NamespaceKey) {
    if pods.get(key).is_some_and(|pod| pod.nics.is_empty() && pod.home.is_none()) {
        pods.remove(key);
    }
}
