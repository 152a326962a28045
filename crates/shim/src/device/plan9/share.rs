//! The life of a share on the host.
//!
//! | state    | add   | fail    | remove  | save | import | patch | resume | abort   |
//! |----------|-------|---------|---------|------|--------|-------|--------|---------|
//! | Reserved | Added | Invalid | Removed | =    | =      | =     | =      | Removed |
//! | Added    | =     | Invalid | Removed | =    | =      | =     | =      | Removed |
//! | Invalid  | -     | =       | Removed | =    | =      | =     | =      | Removed |
//! | Removed  | -     | -       | =       | =    | =      | =     | =      | =       |
//!
//! `add`: its server listens. `fail`: adding or removing it went wrong half-way, or the server that it had is on
//! another host. `abort` is asked of imported shares only.

pub(crate) use dunlin_wire::tree::ShareStage as State;

use crate::controller::Transitions;

/// What is done to a share.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Add,
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
        ("Added", State::Added),
        ("Invalid", State::Invalid),
        ("Removed", State::Removed),
    ];

    const OPS: &'static [(&'static str, Op)] = &[
        ("add", Op::Add),
        ("fail", Op::Fail),
        ("remove", Op::Remove),
        ("save", Op::Save),
        ("import", Op::Import),
        ("patch", Op::Patch),
        ("resume", Op::Resume),
        ("abort", Op::Abort),
    ];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (_, Op::Save | Op::Import | Op::Patch | Op::Resume) => Some(self),
            (_, Op::Remove | Op::Abort) => Some(State::Removed),
            (State::Reserved | State::Added, Op::Add) => Some(State::Added),
            (State::Reserved | State::Added | State::Invalid, Op::Fail) => Some(State::Invalid),
            (State::Invalid | State::Removed, Op::Add) | (State::Removed, Op::Fail) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_is_true() {
        crate::controller::check_table::<super::State>(include_str!("share.rs"));
    }
}
