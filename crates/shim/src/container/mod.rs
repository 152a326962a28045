//! One container: its states, its layers, its processes.
//!
//! | state    | created | started | exited  | delete   | leave | save |
//! |----------|---------|---------|---------|----------|-------|------|
//! | Creating | Created | -       | -       | Deleting | -     | -    |
//! | Created  | -       | Running | Stopped | Deleting | Away  | =    |
//! | Running  | -       | -       | Stopped | -        | Away  | =    |
//! | Stopped  | -       | -       | =       | Deleting | Away  | =    |
//! | Away     | -       | -       | =       | Deleting | =     | -    |
//! | Deleting | -       | -       | =       | -        | =     | -    |
//!
//! `exited` is the init's end; an exec's end is the process's alone. Its part in a move is its
//! [`Hold`]: a container that arrives has the state it had on the source, and does nothing before it is
//! resumed. A saved one still learns of its init's end, which is reported by the host that owns the task then.

pub(crate) mod limits;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dunlin_wire::ids::ReservationId;
use dunlin_wire::tree::ContainerRole;
use serde_json::Value;

use crate::controller::Transitions;
use crate::hold::Hold;
use crate::process::Process;

/// The key of the init among a container's processes.
pub(crate) const INIT: &str = "";

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its disks and its rootfs are being made.
    Creating,
    /// In the guest; its init is parked.
    Created,
    Running,
    /// Its init has ended.
    Stopped,
    /// It is another host's; here it can only be deleted.
    Away,
    Deleting,
}

/// What changes a container's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Created,
    Started,
    Exited,
    Delete,
    Leave,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] = &[
        ("Creating", State::Creating),
        ("Created", State::Created),
        ("Running", State::Running),
        ("Stopped", State::Stopped),
        ("Away", State::Away),
        ("Deleting", State::Deleting),
    ];
    const OPS: &'static [(&'static str, Op)] = &[
        ("created", Op::Created),
        ("started", Op::Started),
        ("exited", Op::Exited),
        ("delete", Op::Delete),
        ("leave", Op::Leave),
        ("save", Op::Save),
    ];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::Creating, Op::Created) => Some(State::Created),
            (State::Created, Op::Started) => Some(State::Running),
            (State::Created | State::Running | State::Stopped, Op::Exited) => Some(State::Stopped),
            (State::Away | State::Deleting, Op::Exited | Op::Leave) => Some(self),
            (State::Creating | State::Created | State::Stopped | State::Away, Op::Delete) => {
                Some(State::Deleting)
            }
            (State::Created | State::Running | State::Stopped, Op::Leave) => Some(State::Away),
            (State::Created | State::Running | State::Stopped, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// A disk that a container uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskRef {
    pub(crate) reservation: ReservationId,
    /// Where the guest has mounted it.
    pub(crate) guest_path: String,
}

/// A container of this sandbox.
#[derive(Debug)]
pub(crate) struct Container {
    /// containerd's id; another one after a move when the orchestrator chose so.
    pub(crate) id: String,
    /// The guest's id, fixed at creation.
    pub(crate) guest_id: String,
    /// containerd's id of its pod.
    pub(crate) pod: String,
    pub(crate) role: ContainerRole,
    pub(crate) bundle: PathBuf,
    pub(crate) state: State,
    pub(crate) hold: Hold,
    pub(crate) paused: bool,
    /// Pauses and resumes that the guest was asked for and `paused` does not tell of yet.
    pub(crate) pausing: u32,
    /// Topmost first.
    pub(crate) layers: Vec<DiskRef>,
    pub(crate) scratch: Option<DiskRef>,
    /// The layers are one tree at `rootfs_path` in the guest.
    pub(crate) layers_combined: bool,
    pub(crate) rootfs_path: String,
    /// The guest has created it: its state there must be deleted.
    pub(crate) in_guest: bool,
    pub(crate) plan9_reservations: BTreeSet<ReservationId>,
    pub(crate) vpci_devices: BTreeSet<String>,
    /// Mounts that are copies: by their place in the container, the copy's in the guest.
    pub(crate) copies: BTreeMap<String, String>,
    /// Mounts that are disks, by their place in the container.
    pub(crate) disk_volumes: BTreeMap<String, ReservationId>,
    /// By exec id.
    pub(crate) processes: BTreeMap<String, Process>,
    /// Of its spec, for whoever makes it anew elsewhere.
    pub(crate) annotations: BTreeMap<String, String>,
    /// OCI LinuxResources of its spec.
    pub(crate) resources: Value,
}

impl Container {
    pub(crate) fn init(&self) -> Option<&Process> {
        self.processes.get(INIT)
    }

    /// For errors.
    pub(crate) fn what(&self) -> String {
        format!("container {}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("mod.rs"));
    }
}
