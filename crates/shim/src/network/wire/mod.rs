//! The wires of a sandbox's pods: what connects their NICs to the interfaces of their namespaces.
//!
//! ```text
//! connect   namespace read, taps made (down), redirects set: the namespace is silent from here on
//! open      frames go through            shut   and no longer
//! take off  the redirects go             leave  they stay, and lead nowhere: the address speaks elsewhere now
//! ```
//!
//! A pod has its wires under its id in the guest; one that is not known yet (the Sandbox API names the namespace
//! before there is a container) under "".

mod nic;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dunlin_net::{Handle, Interface, Namespace, view};
use dunlin_qemu::{MacAddress, RootPort};
use dunlin_wire::tree::SavedEndpoint;

use super::error::NetworkError;
use super::plan;
pub(crate) use nic::NicWire;

/// One pod's.
#[derive(Debug)]
pub(crate) struct PodWires {
    pub(crate) namespace: Namespace,
    pub(crate) nics: Vec<NicWire>,
    /// By NIC id, as they were made; the pod's controller has them from there on.
    pub(crate) endpoints: BTreeMap<String, SavedEndpoint>,
}

/// All pods' of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    pods: Mutex<BTreeMap<String, Arc<PodWires>>>,
    /// One pod is wired at a time: ports are counted.
    turn: tokio::sync::Mutex<()>,
}

impl Wires {
    /// Connects every usable interface of the namespace at `path`. `taken`: root ports with something else in them.
    pub(crate) async fn connect(
        &self,
        pod: &str,
        path: &str,
        taken: &BTreeSet<u8>,
    ) -> Result<Arc<PodWires>, NetworkError> {
        let _turn = self.turn.lock().await;
        let (namespace, handle, interfaces) = self.look(pod, path).await?;
        let ports = plan::ports(&interfaces, &(taken | &self.ports()))?;
        let wanted = interfaces.into_iter().zip(ports).map(|(interface, port)| {
            let endpoint = plan::endpoint(&interface, port);
            (uuid::Uuid::new_v4().to_string(), endpoint, interface)
        });
        self.make(pod, namespace, &handle, wanted.collect()).await
    }

    /// Connects a destination's interfaces to the NICs that a pod has already.
    pub(crate) async fn connect_saved(
        &self,
        pod: &str,
        path: &str,
        saved: &BTreeMap<String, SavedEndpoint>,
        contract: plan::Contract,
    ) -> Result<Arc<PodWires>, NetworkError> {
        let _turn = self.turn.lock().await;
        let (namespace, handle, interfaces) = self.look(pod, path).await?;
        let mut pairs = plan::pairs(saved, &interfaces, path, contract)?;
        let wanted = saved.iter().filter_map(|(id, nic)| {
            let interface = pairs.remove(id)?;
            let endpoint = match contract {
                plan::Contract::Keep => nic.clone(),
                plan::Contract::Rebind => plan::rebound(nic, &interface),
            };
            Some((id.clone(), endpoint, interface))
        });
        let wanted = wanted.collect();
        self.make(pod, namespace, &handle, wanted).await
    }

    async fn look(&self, pod: &str, path: &str) -> Result<(Namespace, Handle, Vec<Interface>), NetworkError> {
        let namespace = Namespace::open(Path::new(path))?;
        let other = self
            .pods()
            .iter()
            .find(|(_, wires)| wires.namespace.id() == namespace.id())
            .map(|(id, _)| id.clone());
        if let Some(other) = other {
            return Err(NetworkError::Shared { path: path.to_owned(), pod: other });
        }
        let handle = namespace.netlink()?;
        let interfaces = plan::usable(view::interfaces(&handle).await?);
        tracing::debug!(pod, path, count = interfaces.len(), "interfaces of the pod's namespace");
        Ok((namespace, handle, interfaces))
    }

    async fn make(
        &self,
        pod: &str,
        namespace: Namespace,
        handle: &Handle,
        wanted: Vec<(String, SavedEndpoint, Interface)>,
    ) -> Result<Arc<PodWires>, NetworkError> {
        let mut wires = PodWires { namespace, nics: Vec::new(), endpoints: BTreeMap::new() };
        for (id, endpoint, interface) in wanted {
            let made = match hardware(&endpoint) {
                Ok((mac, port)) => {
                    NicWire::connect(&wires.namespace, handle, &interface, id.clone(), mac, port)
                        .await
                        .map_err(NetworkError::from)
                }
                Err(error) => Err(error),
            };
            match made {
                Ok(nic) => {
                    wires.nics.push(nic);
                    wires.endpoints.insert(id, endpoint);
                }
                Err(error) => {
                    take_off(&wires).await;
                    return Err(error);
                }
            }
        }
        let wires = Arc::new(wires);
        self.pods().insert(pod.to_owned(), Arc::clone(&wires));
        Ok(wires)
    }

    pub(crate) fn of(&self, pod: &str) -> Option<Arc<PodWires>> {
        self.pods().get(pod).cloned()
    }

    /// Every pod's.
    pub(crate) fn all(&self) -> Vec<Arc<PodWires>> {
        self.pods().values().cloned().collect()
    }

    /// What was connected before its pod was known is this pod's.
    pub(crate) fn adopt(&self, pod: &str) -> Option<Arc<PodWires>> {
        let mut pods = self.pods();
        let wires = pods.remove("")?;
        pods.insert(pod.to_owned(), Arc::clone(&wires));
        Some(wires)
    }

    /// A pod is gone: its interfaces hear again, its taps go. Nothing to take off is no error.
    pub(crate) async fn take_off(&self, pod: &str) {
        let wires = self.pods().remove(pod);
        if let Some(wires) = wires {
            take_off(&wires).await;
        }
    }

    /// The pods' addresses belong to another host: their interfaces stay silent, until their namespace goes or another
    /// pod is connected there.
    pub(crate) fn leave_all(&self) {
        let all = std::mem::take(&mut *self.pods());
        all.values().for_each(|wires| wires.leave());
    }

    /// As [`Wires::leave_all`], of one pod.
    pub(crate) fn leave(&self, pod: &str) {
        let wires = self.pods().remove(pod);
        if let Some(wires) = wires {
            wires.leave();
        }
    }

    /// Nothing is connected any more: every interface hears again.
    pub(crate) async fn take_off_all(&self) {
        let all = std::mem::take(&mut *self.pods());
        for wires in all.values() {
            take_off(wires).await;
        }
    }

    /// Root ports of all NICs.
    fn ports(&self) -> BTreeSet<u8> {
        self.pods().values().flat_map(|wires| wires.nics.iter().map(|nic| nic.port.index())).collect()
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<PodWires>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PodWires {
    /// Frames go through, both ways.
    pub(crate) fn open(&self) {
        self.nics.iter().for_each(NicWire::open);
    }

    pub(crate) fn shut(&self) {
        self.nics.iter().for_each(NicWire::shut);
    }

    fn leave(&self) {
        self.nics.iter().for_each(NicWire::leave);
    }

    /// Tells the network where the NICs are, with their addresses.
    pub(crate) fn announce(&self) {
        for nic in self.nics.iter().filter(|nic| nic.is_open()) {
            let addresses = self
                .endpoints
                .get(&nic.id)
                .map(|endpoint| endpoint.addresses.iter().map(ipnet::IpNet::addr).collect::<Vec<IpAddr>>());
            nic.announce(&addresses.unwrap_or_default());
        }
    }
}

async fn take_off(wires: &PodWires) {
    wires.shut();
    let handle = match wires.namespace.netlink() {
        Ok(handle) => handle,
        Err(error) => {
            tracing::warn!(%error, "the pod's interfaces stay silent");
            return;
        }
    };
    for nic in &wires.nics {
        nic.disconnect(&handle).await;
    }
}

/// The card's address and place.
fn hardware(endpoint: &SavedEndpoint) -> Result<(MacAddress, RootPort), NetworkError> {
    let wrong = |field, reason: String| NetworkError::Saved { name: endpoint.name.clone(), field, reason };
    let mac = endpoint.mac.parse().map_err(|error: dunlin_qemu::InvalidField| wrong("mac", error.reason))?;
    let port = RootPort::new(endpoint.root_port).map_err(|error| wrong("root_port", error.reason))?;
    Ok((mac, port))
}

/// For tests of what comes of a wire that cannot be.
#[cfg(test)]
mod tests {
    use dunlin_net::NetError;

    use super::*;

    #[test]
    fn a_card_of_another_machine_is_refused() {
        let interface = Interface {
            name: "eth0".into(),
            index: 1,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            kind: None,
            up: true,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
        };
        let endpoint = plan::endpoint(&interface, RootPort::new(3).unwrap());
        assert_eq!(hardware(&endpoint).unwrap().1.index(), 3);
        let error = hardware(&SavedEndpoint { root_port: 4, ..endpoint }).unwrap_err().to_string();
        assert!(error.contains("eth0") && error.contains("root_port"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_namespace_is_refused() {
        let wires = Wires::default();
        let error = wires.connect("p", "/nonexistent", &BTreeSet::new()).await.unwrap_err();
        assert!(matches!(error, NetworkError::Net(NetError::Open { .. })), "{error}");
        assert!(wires.all().is_empty());
    }
}
