//! Destination: a spec that names this host's network namespaces, and says what is wanted of a pod's NICs.

use serde_json::{Map, Value, json};

use super::{GuestNic, NETWORK, NICS, REBIND};
use crate::proto::{ContainerFacts, NetworkMode, SandboxFacts};

/// The annotation that container `id` gets, if it is a pod with a network: what is wanted of its cards, or else what
/// they are.
pub(crate) fn note(sandbox: &SandboxFacts, id: &str) -> Option<(&'static str, String)> {
    let pod = sandbox.networks.iter().find(|network| network.pod == id)?;
    if sandbox.network() == NetworkMode::Rebind {
        return Some((NETWORK, REBIND.to_owned()));
    }
    let nics: Vec<GuestNic> = pod.interfaces.iter().map(GuestNic::of).collect();
    Some((NICS, serde_json::to_string(&nics).unwrap_or_default()))
}

/// `container` as [`settle`] has it. A spec that is no JSON object stays, and is refused where it is used.
pub(crate) fn settled(container: &ContainerFacts, sandbox: &SandboxFacts) -> ContainerFacts {
    let mut container = container.clone();
    if let Ok(mut spec) = serde_json::from_slice::<Map<String, Value>>(&container.spec) {
        settle(&mut spec, &container.id, sandbox);
        container.spec = Value::Object(spec).to_string().into_bytes();
    }
    container
}

/// Has `spec`, that of container `id`, name the destination's namespace wherever it named the source's, and
/// its annotation say what `sandbox` is moved with.
fn settle(spec: &mut Map<String, Value>, id: &str, sandbox: &SandboxFacts) {
    let namespaces = spec.get_mut("linux").and_then(|linux| linux.get_mut("namespaces"));
    for namespace in namespaces.and_then(Value::as_array_mut).into_iter().flatten() {
        let moved = sandbox.networks.iter().find(|network| {
            namespace["type"] == "network" && namespace["path"].as_str() == Some(&network.namespace)
        });
        if let Some(network) = moved.filter(|network| !network.destination.is_empty()) {
            namespace["path"] = json!(network.destination);
        }
    }
    // Of the move that brought it to the source.
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.retain(|key, _| key != NETWORK && key != NICS);
    }
    let Some((key, value)) = note(sandbox, id) else { return };
    let annotations = spec.entry("annotations").or_insert(Value::Null);
    if annotations.is_null() {
        *annotations = json!({});
    }
    annotations[key] = json!(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Interface, PodNetwork, Route};

    #[test]
    fn the_destinations_namespace_takes_the_place_of_the_sources() {
        let network = PodNetwork {
            pod: "pod".into(),
            namespace: "/run/netns/here".into(),
            destination: "/run/netns/there".into(),
            ..PodNetwork::default()
        };
        let mut sandbox = SandboxFacts { networks: vec![network], ..SandboxFacts::default() };
        sandbox.set_network(NetworkMode::Rebind);
        let spec = json!({
            "annotations": { "dev.dunlin.network": "an older one" },
            "linux": { "namespaces": [
                { "type": "ipc", "path": "/run/netns/here" },
                { "type": "network", "path": "/run/netns/here" },
            ] },
        });
        let settled = |id: &str, sandbox: &SandboxFacts| {
            let mut spec = spec.as_object().unwrap().clone();
            settle(&mut spec, id, sandbox);
            Value::Object(spec)
        };
        let pod = settled("pod", &sandbox);
        assert_eq!(pod["linux"]["namespaces"][0]["path"], "/run/netns/here");
        assert_eq!(pod["linux"]["namespaces"][1]["path"], "/run/netns/there");
        assert_eq!(pod["annotations"][NETWORK], REBIND);
        // A workload shares the namespace, and the wish is its pod's.
        let workload = settled("web", &sandbox);
        assert_eq!(workload["linux"]["namespaces"][1]["path"], "/run/netns/there");
        assert_eq!(workload["annotations"].get(NETWORK), None);
        sandbox.set_network(NetworkMode::Keep);
        let interface = Interface {
            name: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1400,
            addresses: Vec::new(),
            routes: vec![Route { destination: "0.0.0.0/0".into(), gateway: "10.1.2.1".into() }],
        };
        sandbox.networks[0].interfaces = vec![interface.clone()];
        let kept = settled("pod", &sandbox);
        assert_eq!(kept["annotations"].get(NETWORK), None);
        // What the next host is told of the guest's cards, whatever stands beside the machine there.
        let nics: Vec<GuestNic> = serde_json::from_str(kept["annotations"][NICS].as_str().unwrap()).unwrap();
        let mut beside = [Interface {
            name: "net7".into(),
            mac: "06:00:00:00:00:09".into(),
            mtu: 9000,
            addresses: Vec::new(),
            routes: Vec::new(),
        }];
        crate::network::as_the_guest_has_it(&mut beside, &nics);
        assert_eq!(beside[0], Interface { name: "net7".into(), ..interface });
    }
}
