//! The CRI part of the lab's containerd: what a cluster's hosts need for pods that can move, and no more.

use serde_json::{Value, json};

use super::config::quoted;
use super::layout::HostLayout;
use super::network::{POD_BRIDGE, POD_MTU};

/// The image of every pod's sandbox container.
pub(crate) const PAUSE_IMAGE: &str = "localhost/pause:1";
/// The namespace in which CRI keeps its images and containers.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// containerd 2 renamed CRI's parts, and the file's own version went up with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileVersion {
    /// containerd 1.6 and 1.7.
    Two,
    /// containerd 2.
    Three,
}

/// The tables of CRI. Its annotations lead an arriving pod to the machine that waits for it, so both
/// lists must be there; the third of each is for pods that get other addresses. Pods that are not on the
/// host's network are on the lab's segment, see [`pod_network`].
pub(crate) fn tables(host: &HostLayout, file: FileVersion) -> String {
    let (runtime, images, sandbox_image) = match file {
        FileVersion::Two => {
            let plugin = "io.containerd.grpc.v1.cri";
            (plugin, String::new(), format!("sandbox_image = \"{PAUSE_IMAGE}\"\n"))
        }
        FileVersion::Three => {
            let images = format!(
                "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n\
                 sandbox = \"{PAUSE_IMAGE}\"\n"
            );
            ("io.containerd.cri.v1.runtime", images, String::new())
        }
    };
    format!(
        "{images}\
         [plugins.\"{runtime}\"]\n\
         {sandbox_image}\
         # Lowering it below containerd's own is not allowed in most containers.\n\
         restrict_oom_score_adj = true\n\
         [plugins.\"{runtime}\".cni]\n\
         conf_dir = {conf_dir}\n\
         bin_dir = \"{CNI_BIN}\"\n\
         [plugins.\"{runtime}\".containerd]\n\
         default_runtime_name = \"dunlin\"\n\
         [plugins.\"{runtime}\".containerd.runtimes.dunlin]\n\
         runtime_type = \"io.containerd.dunlin.v2\"\n\
         pod_annotations = [\"io.microsoft.*\", \"io.dunlin.*\", \"dev.dunlin.*\"]\n\
         container_annotations = [\"io.microsoft.*\", \"io.dunlin.*\", \"dev.dunlin.*\"]\n\
         # The machine has devices of its own.\n\
         privileged_without_host_devices = true\n",
        conf_dir = quoted(&host.cni_config()),
    )
}

/// Where Debian has the network plugins.
pub(crate) const CNI_BIN: &str = "/usr/lib/cni";
/// The address of the one pod that CRI may make on the pods' segment: the same on both hosts, so that it
/// can move with it.
pub(crate) const CRI_POD_ADDRESS: &str = "10.88.0.77/16";

/// A network for nodes that make arriving pods' namespaces themselves (`[cni]`), as `20-moved.conflist`: the
/// addresses are those that the node asks for. CRI takes the first file only.
pub(crate) fn moved_network() -> Value {
    let routes = json!([{ "dst": "0.0.0.0/0", "gw": "10.88.0.254" }, { "dst": "::/0", "gw": "fd88::254" }]);
    json!({
        "cniVersion": "0.4.0",
        "name": "moved",
        "plugins": [{
            "type": "bridge",
            "bridge": POD_BRIDGE,
            "mtu": POD_MTU,
            "capabilities": { "ips": true, "mac": true },
            "ipam": { "type": "static", "routes": routes },
        }],
    })
}

/// The same for a pod's further interfaces, as `30-moved-aside.conflist`: nothing leads out by it.
pub(crate) fn moved_aside_network() -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "moved-aside",
        "plugins": [{
            "type": "bridge",
            "bridge": POD_BRIDGE,
            "mtu": POD_MTU,
            "capabilities": { "ips": true, "mac": true },
            "ipam": { "type": "static" },
        }],
    })
}

/// CRI's network, as `10-pods0.conflist`. Its addresses are static because hosts that share a segment
/// without a common IPAM would otherwise give other ones, or the same one twice.
pub(crate) fn pod_network() -> Value {
    let addresses = json!([{ "address": CRI_POD_ADDRESS }]);
    let routes = json!([{ "dst": "0.0.0.0/0", "gw": "10.88.0.254" }]);
    json!({
        "cniVersion": "0.4.0",
        "name": "pods0",
        "plugins": [{
            "type": "bridge",
            "bridge": POD_BRIDGE,
            "mtu": POD_MTU,
            "ipam": { "type": "static", "addresses": addresses, "routes": routes },
        }],
    })
}
