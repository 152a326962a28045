//! A pod: the containers that share a network namespace, under one id that the guest keeps for ever.
//!
//! | state  | ready | ended | save |
//! |--------|-------|-------|------|
//! | Making | Ready | Ended | -    |
//! | Ready  | -     | Ended | =    |
//! | Ended  | -     | =     | =    |
//!
//! A pod is made with its sandbox (or standalone) container, is ready once the guest has that container, ends with
//! its init, and goes with its last container. New containers join only a ready pod that takes part in no move.

pub(crate) mod role;

use crate::controller::Transitions;
use crate::hold::Hold;
use crate::network::Network;

/// Where a pod stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its first container is being created.
    Making,
    /// Containers can join it.
    Ready,
    /// Its namespaces' owner has ended.
    Ended,
}

/// What changes a pod's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Ready,
    Ended,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] =
        &[("Making", State::Making), ("Ready", State::Ready), ("Ended", State::Ended)];
    const OPS: &'static [(&'static str, Op)] =
        &[("ready", Op::Ready), ("ended", Op::Ended), ("save", Op::Save)];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::Making, Op::Ready) => Some(State::Ready),
            (_, Op::Ended) => Some(State::Ended),
            (State::Ready | State::Ended, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// One pod of this sandbox.
#[derive(Debug)]
pub(crate) struct Pod {
    /// containerd's id of its sandbox or standalone container.
    pub(crate) id: String,
    /// The guest's id, fixed at creation.
    pub(crate) guest_id: String,
    pub(crate) state: State,
    pub(crate) hold: Hold,
    pub(crate) hostname: String,
    pub(crate) network: Network,
}

impl Pod {
    /// For errors.
    pub(crate) fn what(&self) -> String {
        format!("pod {}", self.id)
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
