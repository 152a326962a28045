//! The life of a share's mount in the guest. It counts its users.
//!
//! | state     | map     | fail    | unmap     | save | import | patch | resume | abort     |
//! |-----------|---------|---------|-----------|------|--------|-------|--------|-----------|
//! | Reserved  | Mounted | Invalid | Unmounted | =    | =      | =     | =      | Unmounted |
//! | Mounted   | =       | Invalid | Unmounted | =    | =      | =     | =      | Unmounted |
//! | Invalid   | -       | =       | Unmounted | =    | =      | =     | =      | Unmounted |
//! | Unmounted | -       | -       | =         | =    | =      | =     | =      | =         |
//!
//! `unmap` is for the last user. `fail`: the guest did not mount or unmount it, or its server is on another host.

pub(crate) use dunlin_wire::tree::ShareMountStage as State;

use crate::controller::Transitions;

/// What is done to a mount.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Map,
    Fail,
    Unmap,
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
        ("Mounted", State::Mounted),
        ("Invalid", State::Invalid),
        ("Unmounted", State::Unmounted),
    ];

    const OPS: &'static [(&'static str, Op)] = &[
        ("map", Op::Map),
        ("fail", Op::Fail),
        ("unmap", Op::Unmap),
        ("save", Op::Save),
        ("import", Op::Import),
        ("patch", Op::Patch),
        ("resume", Op::Resume),
        ("abort", Op::Abort),
    ];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (_, Op::Save | Op::Import | Op::Patch | Op::Resume) => Some(self),
            (_, Op::Unmap | Op::Abort) => Some(State::Unmounted),
            (State::Reserved | State::Mounted, Op::Map) => Some(State::Mounted),
            (State::Reserved | State::Mounted | State::Invalid, Op::Fail) => Some(State::Invalid),
            (State::Invalid | State::Unmounted, Op::Map) | (State::Unmounted, Op::Fail) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_is_true() {
        crate::controller::check_table::<super::State>(include_str!("mount.rs"));
    }
}
