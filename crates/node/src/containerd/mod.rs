//! containerd as the node needs it: what a sandbox is made of, making one for an arriving
//! move, removing one that has left.
//!
//! ```text
//!   client        one call each, with namespace and deadline; `sandboxes`: those of the Sandbox services
//!   membership    which containers are one sandbox, and in which order
//!   facts         source: what must exist on the other side
//!   arrival       destination: one container, snapshot -> container -> task, and back
//!   arrivals      destination: all of a sandbox, in order, and back in the reverse one
//!   record        both: the record of a sandbox that was made through the Sandbox API
//!   departure     source, after the move: task -> container -> snapshot
//!   stdio         which FIFO or file stands in for the source's
//! ```

pub(crate) mod arrival;
pub(crate) mod arrivals;
pub(crate) mod client;
pub(crate) mod departure;
pub(crate) mod facts;
pub(crate) mod membership;
pub(crate) mod record;
mod sandboxes;
pub(crate) mod stdio;

pub(crate) use client::{Containerd, ContainerdError};

/// The runtime that both sides must use.
pub(crate) const RUNTIME: &str = "io.containerd.dunlin.v2";
/// OCI annotation: the container's id in the saved state.
pub(crate) const SOURCE_CONTAINER: &str = "io.microsoft.migration.source-container-id";
/// OCI annotation: the sandbox whose shim already waits.
pub(crate) const SANDBOX: &str = "io.dunlin.migration.sandbox-id";
/// OCI annotation: the pod sandbox of a container made through CRI.
pub(crate) const CRI_SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
/// OCI annotation: `sandbox` or `container`.
pub(crate) const CRI_TYPE: &str = "io.kubernetes.cri.container-type";
/// OCI annotation: one of several pods of a sandbox; on that pod's own sandbox container, its id.
pub(crate) const VIRTUAL_POD: &str = "io.microsoft.cri.virtual-pod-id";
/// Label of container and snapshot: the session that made them, until what they are for runs.
pub(crate) const SESSION: &str = "io.dunlin.migration.session";

#[cfg(test)]
mod tests;
