//! Pods made through containerd's CRI plugin.
//!
//! The plugin keeps its pods in a memory of its own, so objects made behind its back are no pods to it:
//! on the destination it is asked to make the pod again, on the source to remove it.
//!
//! ```text
//!   client        one call each, with a deadline
//!   stored        what the plugin says a pod was made with
//!   facts         source: that, in the form in which it travels
//!   admit         both: which of it may come; no path of another host is kept
//!   plan          both: the pod and its containers, in the order in which they can be made
//!   arrival       destination: pod -> containers, each told which of the source's it continues; and back
//!   departure     source, after the move: the tasks, then the pod through the plugin
//! ```
//!
//! The ids are the plugin's on each host, other ones on each; the shim knows its containers by the
//! annotations that the configurations carry, which the plugin must be set to pass on (`pod_annotations`
//! and `container_annotations` of the runtime handler). A plugin that does not is found out before
//! anything of the pod has run.

pub(crate) mod admit;
pub(crate) mod arrival;
pub(crate) mod client;
pub(crate) mod departure;
pub(crate) mod facts;
pub(crate) mod plan;
pub(crate) mod stored;

/// Messages and stubs of `proto/cri.proto`; generated, never edited.
#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::pedantic)]
pub(crate) mod api {
    tonic::include_proto!("runtime.v1");
}

/// The namespace in which the plugin keeps everything.
pub(crate) const NAMESPACE: &str = "k8s.io";
/// Label by which the plugin knows its containers: `sandbox` or `container`.
pub(crate) const KIND: &str = "io.cri-containerd.kind";

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
