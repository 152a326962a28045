//! The life of a passed-through device.
//!
//! | state           | assign   | ready | fail            | remove  | save | import | patch | resume | abort   |
//! |-----------------|----------|-------|-----------------|---------|------|--------|-------|--------|---------|
//! | Reserved        | Assigned | -     | Removed         | Removed | =    | =      | =     | =      | Removed |
//! | Assigned        | -        | Ready | AssignedInvalid | Removed | =    | =      | =     | =      | Removed |
//! | Ready           | -        | =     | AssignedInvalid | Removed | =    | =      | =     | =      | Removed |
//! | AssignedInvalid | -        | -     | =               | Removed | =    | =      | =     | =      | Removed |
//! | Removed         | -        | -     | -               | =       | =    | =      | =     | =      | =       |
//!
//! `assign`: it is plugged into the machine. `ready`: the guest has seen it. `fail`: the guest did not take it, or did
//! not let go of it, or it is on another host.

pub(crate) use dunlin_wire::tree::VpciStage as State;

use crate::controller::Transitions;

/// What is done to a device.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Assign,
    Ready,
    Fail,
    Remove,
    Save,
    Import,
    Patch,
    Resume,
    Abort,
}

impl Transitions for State {
    type Op = Op;

    const STATES: &'static [(&'static str, State)] = &[
        ("Reserved", State::Reserved),
        ("Assigned", State::Assigned),
        ("Ready", State::Ready),
        ("AssignedInvalid", State::AssignedInvalid),
        ("Removed", State::Removed),
    ];

    const OPS: &'static [(&'static str, Op)] = &[
        ("assign", Op::Assign),
        ("ready", Op::Ready),
        ("fail", Op::Fail),
        ("remove", Op::Remove),
        ("save", Op::Save),
        ("import", Op::Import),
        ("patch", Op::Patch),
        ("resume", Op::Resume),
        ("abort", Op::Abort),
    ];

    fn after(self, op: Op) -> Option<State> {
        use State::{Assigned, AssignedInvalid, Ready, Removed, Reserved};
        match (self, op) {
            (_, Op::Save | Op::Import | Op::Patch | Op::Resume) => Some(self),
            (_, Op::Remove | Op::Abort) => Some(Removed),
            (Reserved, Op::Assign) => Some(Assigned),
            (Assigned | Ready, Op::Ready) => Some(Ready),
            (Reserved, Op::Fail) => Some(Removed),
            (Assigned | Ready | AssignedInvalid, Op::Fail) => Some(AssignedInvalid),
            (Assigned | Ready | AssignedInvalid | Removed, Op::Assign)
            | (Reserved | AssignedInvalid | Removed, Op::Ready)
            | (Removed, Op::Fail) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_is_true() {
        crate::controller::check_table::<super::State>(include_str!("device.rs"));
    }
}
