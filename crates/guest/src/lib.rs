//! PID 1 of the utility VM.
//!
//! ```text
//!  link ── bridge ──> service ──> container ──> oci (one short process per operation)
//!                        │            ├──> stdio   relays between pipes or ptys and the link
//!                        │            └──> cgroup  limits, freezing, killing, statistics
//!                        ├──> storage               disks by controller and LUN, mounts, layers
//!                        └──> network               NICs by MAC, into the pods' namespaces
//!  init: mounts, modules, tmpfs root, clock   reaper: every exit   log: never blocks
//! ```
//!
//! Invariants: libcontainer never runs inside PID 1; nothing that the host does or fails to do
//! ends or blocks PID 1; every child is started and reaped through [`reaper`]; paths that the host
//! names are checked in [`path`] before they are used.

pub mod cgroup;
pub mod container;
pub mod init;
pub mod log;
pub mod network;
pub mod oci;
pub mod path;
pub mod reaper;
pub mod service;
pub mod stdio;
pub mod storage;
