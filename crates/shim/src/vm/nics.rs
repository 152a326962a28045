//! The machine's network cards: plugged in, told to the guest, and pulled out.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use dunlin_bridge::message::{Modification, NetworkAdapter, RequestType, Resource, UTILITY_VM};
use dunlin_qemu::{Document, Nic};
use dunlin_wire::tree::SavedEndpoint;

use super::devices::UNPLUG_DEADLINE;
use super::guest::asked;
use super::{Vm, VmError};
use crate::network::plan;
use crate::network::wire::{NicWire, PodWires};

/// A guest that runs dials within milliseconds.
const DIAL_DEADLINE: Duration = Duration::from_secs(60);

impl Vm {
    /// The NICs that are plugged in.
    pub(super) fn nics(&self) -> MutexGuard<'_, Vec<Nic>> {
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a destination builds: the machine as it was built, and the NICs that it has now.
    pub(crate) fn present_document(&self) -> Document {
        let mut nics = self.nics().clone();
        nics.sort_by_key(|nic| nic.root_port);
        Document { nics, ..self.document.clone() }
    }

    /// Plugs in what is not plugged in yet. The guest sees it at once, or when it first runs.
    pub(crate) async fn plug(&self, wires: &PodWires) -> Result<(), VmError> {
        for nic in &wires.nics {
            if nic.claim_plug()
                && let Err(error) = self.plug_one(nic).await
            {
                nic.unplugged();
                return Err(error);
            }
        }
        Ok(())
    }

    async fn plug_one(&self, nic: &NicWire) -> Result<(), VmError> {
        let tap = nic.descriptor().map_err(|source| VmError::Tap { id: nic.id.clone(), source })?;
        self.qemu.attach_nic(nic.port, nic.mac, tap).await?;
        self.nics().push(Nic { mac: nic.mac, root_port: nic.port });
        Ok(())
    }

    /// Tells the guest of a pod's NICs, which wait in it for the pod's namespace.
    pub(crate) async fn add_nics(
        &self,
        namespace: &str,
        endpoints: &BTreeMap<String, SavedEndpoint>,
    ) -> Result<(), VmError> {
        for (id, endpoint) in endpoints {
            self.network(RequestType::Add, self.adapter(namespace, id, endpoint))
                .await
                .map_err(asked("adding a network card"))?;
        }
        Ok(())
    }

    /// Gives a NIC that the guest has other addresses, routes and neighbours, once the guest has dialled.
    pub(crate) async fn rebind_nic(
        &self,
        namespace: &str,
        id: &str,
        endpoint: &SavedEndpoint,
    ) -> Result<(), VmError> {
        let mut connected = self.bridge.connected();
        let dialled = connected.wait_for(|connected| *connected);
        if tokio::time::timeout(DIAL_DEADLINE, dialled).await.is_err() {
            return Err(VmError::NotDialled { seconds: DIAL_DEADLINE.as_secs() });
        }
        self.network(RequestType::Update, self.adapter(namespace, id, endpoint))
            .await
            .map_err(asked("giving a network card other addresses"))
    }

    /// Has the guest let go of a pod's NICs, and pulls them out. Goes on after a failure and gives the first; a NIC that
    /// the guest does not let go of stays in the machine.
    pub(crate) async fn remove_nics(&self, namespace: &str, wires: &PodWires) -> Result<(), VmError> {
        let mut result = Ok(());
        for nic in wires.nics.iter().filter(|nic| nic.is_plugged()) {
            let removed = self.remove_nic(namespace, nic).await;
            if result.is_ok() {
                result = removed;
            }
        }
        result
    }

    async fn remove_nic(&self, namespace: &str, nic: &NicWire) -> Result<(), VmError> {
        let adapter = NetworkAdapter {
            namespace_id: namespace.to_owned(),
            id: nic.id.clone(),
            mac_address: nic.mac.to_string(),
            ..NetworkAdapter::default()
        };
        let forgotten = self.network(RequestType::Remove, adapter).await;
        self.qemu.detach_nic(nic.port, UNPLUG_DEADLINE).await?;
        nic.unplugged();
        self.nics().retain(|present| present.root_port != nic.port);
        forgotten.map_err(asked("removing a network card"))
    }

    fn adapter(&self, namespace: &str, id: &str, endpoint: &SavedEndpoint) -> NetworkAdapter {
        plan::adapter(namespace, id, endpoint, self.guest.dunlin.load(Ordering::Relaxed))
    }

    async fn network(
        &self,
        request_type: RequestType,
        adapter: NetworkAdapter,
    ) -> Result<(), dunlin_bridge::host::BridgeError> {
        let modification = Modification { request_type, resource: Resource::Network(adapter) };
        self.bridge.modify(UTILITY_VM, &modification).await
    }
}
