//! The pods' NICs: when they are connected, told to the guest, and let speak.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dunlin_migration::refusal::Refusal;
use dunlin_net::Tail;
use dunlin_wire::tree::{ContainerRole, SavedEndpoint};

use serde_json::Value;

use super::error::SandboxError;
use super::moving::refusal;
use super::{Sandbox, bundle};
use crate::network::error::NetworkError;
use crate::network::plan::Contract;
use crate::network::wire::PodWires;
use crate::vm::Vm;

/// After the first announcement: together 50, 150 and 400 ms.
const ANNOUNCED_AGAIN: [Duration; 3] =
    [Duration::from_millis(50), Duration::from_millis(100), Duration::from_millis(250)];

impl Sandbox {
    /// Connects the NICs of a new pod to the namespace that it names, silent as yet. None: it names none.
    pub(super) async fn connect_pod(
        &self,
        guest_pod: &str,
        path: Option<String>,
    ) -> Result<Option<Arc<PodWires>>, SandboxError> {
        let early = self.wires.adopt(guest_pod);
        let wires = match (early, path) {
            (Some(wires), _) => wires,
            (None, None) => return Ok(None),
            (None, Some(path)) => match self.wires.connect(guest_pod, &path, &self.taken_ports()).await {
                Ok(wires) => wires,
                // To the guest each container of a sandbox of the Sandbox API is a pod of its own, and one has the NICs.
                Err(NetworkError::Shared { pod, .. }) if self.api.holds_machine() => {
                    tracing::warn!(guest_pod, pod, "the sandbox's network is another container's");
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            },
        };
        if let Some(pod) = self.inner().pods.values_mut().find(|pod| pod.guest_id == guest_pod) {
            pod.network.connected(wires.endpoints.clone());
        }
        Ok(Some(wires))
    }

    /// The Sandbox API names a namespace before there is a pod: the machine boots with its NICs.
    pub(super) async fn connect_early(&self, path: &str) -> Result<(), SandboxError> {
        if !path.is_empty() {
            self.wires.connect("", path, &self.taken_ports()).await?;
        }
        Ok(())
    }

    /// Destination: connects the NICs of an imported pod to this host's namespace, silent until the switchover. Gives
    /// what they are to the guest from then on.
    pub(super) async fn connect_imported(
        &self,
        source: &str,
        path: Option<String>,
        annotation: Option<&str>,
    ) -> Result<BTreeMap<String, SavedEndpoint>, Refusal> {
        let (guest_pod, saved) = {
            let inner = self.inner();
            let container = inner.container(source).map_err(|error| refusal(&error))?;
            if container.role == ContainerRole::Workload {
                return Ok(BTreeMap::new());
            }
            let Some(pod) = inner.pods.get(&container.pod) else { return Ok(BTreeMap::new()) };
            (pod.guest_id.clone(), pod.network.endpoints().clone())
        };
        if saved.is_empty() {
            return Ok(saved);
        }
        let contract = Contract::read(annotation).ok_or_else(|| {
            let name = Contract::ANNOTATION;
            let found = annotation.unwrap_or_default();
            Refusal::invalid(format!(
                "annotation {name}: {found:?} is neither `keep` nor `rebind`; leave it out"
            ))
        })?;
        let precondition =
            |error: NetworkError| Refusal::precondition(format!("container {source}: {error}"));
        let Some(path) = path else { return Err(precondition(NetworkError::no_namespace(&saved))) };
        let wires = self.wires.connect_saved(&guest_pod, &path, &saved, contract).await;
        Ok(wires.map_err(precondition)?.endpoints.clone())
    }

    /// Destination: the guest stands still on the source, or runs here. Frames for it come here from now on, and wait
    /// for it. Repeats announce again.
    pub(super) fn open_wires(&self) {
        for wires in self.wires.all() {
            wires.open();
            wires.announce();
        }
    }

    /// Destination: nothing of the guest is heard here any more.
    pub(super) fn shut_wires(&self) {
        self.wires.all().iter().for_each(|wires| wires.shut());
    }

    /// Its guest runs here, where others may believe that it does not: told now, and again, because a frame may be
    /// lost and a bridge may be slow.
    pub(super) fn announce(&self) {
        let all = self.wires.all();
        all.iter().for_each(|wires| wires.announce());
        if all.iter().all(|wires| wires.nics.is_empty()) {
            return;
        }
        tokio::spawn(async move {
            for pause in ANNOUNCED_AGAIN {
                tokio::time::sleep(pause).await;
                // A wire that was shut meanwhile says nothing.
                all.iter().for_each(|wires| wires.announce());
            }
        });
    }

    /// The addresses speak on another host now, or do so still: the interfaces here stay silent.
    pub(super) fn leave_wires(&self) {
        self.wires.leave_all();
    }

    /// Source, from the start of the memory's transfer: what is sent to the guest is noted.
    pub(super) fn follow_frames(&self) -> Vec<(String, Tail)> {
        let mut tails = Vec::new();
        for wires in self.wires.all() {
            for nic in &wires.nics {
                match nic.follow(&wires.namespace) {
                    Ok(tail) => tails.push((nic.id.clone(), tail)),
                    // A client sends again what is lost.
                    Err(error) => {
                        tracing::warn!(nic = nic.id, %error, "frames that come during the pause are lost")
                    }
                }
            }
        }
        tails
    }

    /// Destination, guest running: gives it the frames that came for it on the source, and tells it what is different
    /// here.
    pub(super) fn deliver(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        frames: &BTreeMap<String, Vec<Vec<u8>>>,
        rebound: Vec<(String, BTreeMap<String, SavedEndpoint>)>,
    ) {
        for wires in self.wires.all() {
            for nic in &wires.nics {
                if let Some(frames) = frames.get(&nic.id).filter(|frames| !frames.is_empty()) {
                    nic.inject(frames);
                }
            }
        }
        self.rebinding.begin(rebound.iter().map(|(_, nics)| nics.len()).sum());
        for (pod, nics) in rebound.into_iter().filter(|(_, nics)| !nics.is_empty()) {
            let (sandbox, vm) = (Arc::clone(self), Arc::clone(vm));
            tokio::spawn(async move {
                for (id, endpoint) in nics {
                    let answer = vm.rebind_nic(&pod, &id, &endpoint).await;
                    match &answer {
                        Ok(()) => tracing::info!(pod, nic = id, "the guest has this host's addresses"),
                        Err(error) => {
                            tracing::error!(pod, nic = id, %error, "the guest keeps addresses that are not this host's");
                        }
                    }
                    sandbox
                        .rebinding
                        .answered(answer.map_err(|error| (pod.clone(), endpoint.name, error.to_string())));
                }
                sandbox.announce();
            });
        }
    }

    /// Gives the guest a new pod's NICs and lets them speak.
    pub(super) async fn introduce_nics(
        &self,
        vm: &Vm,
        guest_pod: &str,
        wires: &PodWires,
    ) -> Result<(), SandboxError> {
        // Those with which the machine has booted are there.
        let introduced = async {
            vm.plug(wires).await?;
            vm.add_nics(guest_pod, &wires.endpoints).await
        };
        if let Err(error) = introduced.await {
            // The guest may have some of them: such a pod does not move.
            if let Some(pod) = self.inner().pods.values_mut().find(|pod| pod.guest_id == guest_pod) {
                pod.network.fail();
            }
            return Err(error.into());
        }
        wires.open();
        Ok(())
    }

    /// Pods that are gone: their NICs leave the machine that runs on, and their interfaces hear again.
    pub(super) async fn disconnect_pods(&self, vm: Option<&Arc<Vm>>, guest_pods: &[String]) {
        for pod in guest_pods {
            if let (Some(vm), Some(wires)) = (vm, self.wires.of(pod))
                && let Err(error) = vm.remove_nics(pod, &wires).await
            {
                tracing::warn!(pod, %error, "a network card stays in the machine");
            }
            self.wires.take_off(pod).await;
        }
    }

    /// The network namespace of a pod whose first container has this spec. The Sandbox API's word comes first: containers
    /// of such a sandbox name a process that they take for its own.
    pub(super) fn namespace_of(&self, spec: &Value) -> Option<String> {
        self.api.netns_path().or_else(|| bundle::network_namespace(spec))
    }

    /// Root ports with a device of the host in them.
    fn taken_ports(&self) -> BTreeSet<u8> {
        self.devices.ports()
    }
}
