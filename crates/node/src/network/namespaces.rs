//! Which network namespace a spec names, and what its interfaces are.

use std::path::{Component, Path};

use dunlin_net::{Namespace, NetError, mac_text, view};
use serde_json::Value;

use super::{GuestNic, NICS, as_the_guest_has_it};
use crate::containerd::{CRI_TYPE, VIRTUAL_POD};
use crate::proto::{ContainerFacts, Interface, NamespaceChoice, PodNetwork, Route};

/// Where a host has its named namespaces. One that another host asks for is looked for nowhere else.
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];
/// The kernel's word for a machine's own taps, which stand beside the interfaces that they serve.
const TAP: &str = "tun";

/// Why the namespaces of a sandbox are not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// It cannot be read.
    #[error("the network namespace of pod `{pod}`: {source}")]
    Read {
        /// The pod's container.
        pod: String,
        /// Names the path.
        source: NetError,
    },
    /// `--netns` for what is no pod with a namespace.
    #[error("--netns names `{pod}`, which has no network namespace; pods with one: {known}")]
    Choice {
        /// As given.
        pod: String,
        /// The others.
        known: String,
    },
    /// `--netns` for a pod that CRI makes.
    #[error("--netns: pod `{pod}` is made by CRI, which gives it a namespace of its own; leave --netns out")]
    OfCri {
        /// The pod's container.
        pod: String,
    },
}

/// The path of the network namespace that a spec names, if it names one.
pub(crate) fn named(spec: &Value) -> Option<&str> {
    let namespaces = spec["linux"]["namespaces"].as_array()?;
    let network = namespaces.iter().find(|namespace| namespace["type"] == "network")?;
    network["path"].as_str().filter(|path| !path.is_empty())
}

/// Whether a container's namespace is its pod's: that of a workload is its sandbox container's.
fn is_pod(id: &str, spec: &Value) -> bool {
    let note = |key: &str| spec["annotations"][key].as_str().filter(|value| !value.is_empty());
    note(VIRTUAL_POD) == Some(id) || note(CRI_TYPE).is_none_or(|kind| kind == "sandbox")
}

/// The namespace of a sandbox that was made with one, whatever its containers' specs name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own<'a> {
    /// The container that has its cards.
    pub(crate) pod: &'a str,
    pub(crate) path: &'a str,
}

/// The networks of a sandbox's pods, each with its place on the destination: the one that was chosen, else
/// the same path. A pod without interfaces has none.
pub(crate) async fn gather(
    containers: &[ContainerFacts],
    own: Option<Own<'_>>,
    choices: &[NamespaceChoice],
) -> Result<Vec<PodNetwork>, NetworkError> {
    let mut networks = Vec::new();
    for container in containers {
        let spec: Value = serde_json::from_slice(&container.spec).unwrap_or_default();
        let path = match own {
            None => named(&spec).filter(|_| is_pod(&container.id, &spec)),
            Some(own) => (own.pod == container.id).then_some(own.path),
        };
        let Some(path) = path else { continue };
        let read = |source| NetworkError::Read { pod: container.id.clone(), source };
        let mut interfaces = interfaces(Path::new(path)).await.map_err(read)?;
        let noted = spec["annotations"][NICS].as_str().and_then(|noted| serde_json::from_str(noted).ok());
        let noted: Vec<GuestNic> = noted.unwrap_or_default();
        as_the_guest_has_it(&mut interfaces, &noted);
        let chosen = choices.iter().find(|choice| choice.pod == container.id);
        let chosen = chosen.or_else(|| choices.iter().find(|choice| choice.pod.is_empty()));
        let destination = match (chosen, container.cri.is_some()) {
            (Some(_), true) => return Err(NetworkError::OfCri { pod: container.id.clone() }),
            (Some(choice), false) => choice.path.clone(),
            (None, true) => String::new(),
            (None, false) => path.to_owned(),
        };
        networks.push(PodNetwork {
            pod: container.id.clone(),
            namespace: path.to_owned(),
            destination,
            interfaces,
        });
    }
    let known = |choice: &&NamespaceChoice| {
        if choice.pod.is_empty() {
            !networks.is_empty()
        } else {
            networks.iter().any(|of| of.pod == choice.pod)
        }
    };
    if let Some(choice) = choices.iter().find(|choice| !known(choice)) {
        let names: Vec<&str> = networks.iter().map(|network| network.pod.as_str()).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(NetworkError::Choice { pod: choice.pod.clone(), known });
    }
    Ok(networks)
}

/// What a machine would be connected to in the namespace at `path`: every interface that is up, but `lo` and taps.
pub(crate) async fn interfaces(path: &Path) -> Result<Vec<Interface>, NetError> {
    let handle = Namespace::open(path)?.netlink()?;
    let found = view::interfaces(&handle).await?;
    let serves = |interface: &dunlin_net::Interface| {
        interface.up && interface.name != "lo" && interface.kind.as_deref() != Some(TAP)
    };
    let route = |route: &dunlin_net::Route| Route {
        destination: route.destination.to_string(),
        gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
    };
    let told = |interface: dunlin_net::Interface| Interface {
        mac: mac_text(interface.mac),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
        routes: interface.routes.iter().map(route).collect(),
        name: interface.name,
    };
    Ok(found.into_iter().filter(serves).map(told).collect())
}

/// Whether a path that came from another host may be opened as a namespace here. Err: in words, what would do.
pub(crate) fn admitted(path: &str) -> Result<&Path, String> {
    let path = Path::new(path);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let here = path.parent().is_some_and(|parent| NAMED.iter().any(|named| Path::new(named) == parent));
    if plain && here {
        return Ok(path);
    }
    Err(format!("bind it to a name in {} there, and give that with --netns", NAMED[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str, spec: &str) -> ContainerFacts {
        ContainerFacts { id: id.into(), spec: spec.as_bytes().to_vec(), ..ContainerFacts::default() }
    }

    const OWN: &str =
        r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/proc/self/ns/net"}]}}"#;

    #[test]
    fn a_namespace_counts_when_it_has_a_path_and_is_the_pods() {
        let parse = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
        assert_eq!(named(&parse(OWN)), Some("/proc/self/ns/net"));
        assert_eq!(named(&parse(r#"{"linux":{"namespaces":[{"type":"network"}]}}"#)), None);
        assert_eq!(named(&parse("{}")), None);
        let noted = |kind: &str| {
            parse(&format!(r#"{{"annotations":{{"io.kubernetes.cri.container-type":"{kind}"}}}}"#))
        };
        assert!(
            is_pod("c", &noted("sandbox")) && is_pod("c", &parse("{}")) && !is_pod("c", &noted("container"))
        );
    }

    #[tokio::test]
    async fn a_pod_is_found_with_its_place_and_a_stray_choice_is_named() {
        let choice = |pod: &str| NamespaceChoice { pod: pod.into(), path: "/run/netns/there".into() };
        let pods = [container("web", OWN), container("plain", "{}")];
        let networks = gather(&pods, None, &[]).await.unwrap();
        assert_eq!(networks.len(), 1);
        assert_eq!(networks[0].destination, "/proc/self/ns/net");
        for chosen in ["web", ""] {
            let networks = gather(&pods, None, &[choice(chosen)]).await.unwrap();
            assert_eq!(networks[0].destination, "/run/netns/there");
        }
        let error = gather(&pods, None, &[choice("plain")]).await.unwrap_err().to_string();
        assert!(error.contains("`plain`") && error.contains("web"), "{error}");
        // A sandbox's own comes before what its containers name.
        let own = Own { pod: "plain", path: "/proc/self/ns/net" };
        let networks = gather(&pods, Some(own), &[]).await.unwrap();
        assert_eq!(networks.iter().map(|of| of.pod.as_str()).collect::<Vec<_>>(), ["plain"]);
        let gone = [container("web", &OWN.replace("/proc/self/ns/net", "/run/netns/there-is-none"))];
        let error = gather(&gone, None, &[]).await.unwrap_err().to_string();
        assert!(error.contains("/run/netns/there-is-none") && error.contains("`web`"), "{error}");
    }

    #[test]
    fn a_path_of_another_host_opens_named_namespaces_only() {
        for good in ["/run/netns/web", "/var/run/netns/cni-1"] {
            assert_eq!(admitted(good), Ok(Path::new(good)));
        }
        for bad in ["/proc/1/ns/net", "/run/netns/../x", "run/netns/web", "/run/netns", "/run/netns/a/b", ""]
        {
            assert!(admitted(bad).unwrap_err().contains("--netns"), "{bad}");
        }
    }
}
