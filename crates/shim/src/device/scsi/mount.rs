//! A disk's mount in the guest; how many use it is the number of its reservations.
//!
//! | state     | mount   | unmount   | save |
//! |-----------|---------|-----------|------|
//! | Reserved  | Mounted | Unmounted | =    |
//! | Mounted   | -       | Unmounted | =    |
//! | Unmounted | -       | =         | -    |

use crate::controller::Transitions;

/// Where a mount stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum State {
    #[default]
    Reserved,
    Mounted,
    Unmounted,
}

/// What changes a mount's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Mount,
    Unmount,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] =
        &[("Reserved", State::Reserved), ("Mounted", State::Mounted), ("Unmounted", State::Unmounted)];
    const OPS: &'static [(&'static str, Op)] =
        &[("mount", Op::Mount), ("unmount", Op::Unmount), ("save", Op::Save)];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::Reserved, Op::Mount) => Some(State::Mounted),
            (_, Op::Unmount) => Some(State::Unmounted),
            (State::Reserved | State::Mounted, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// A mount in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mount {
    pub(crate) state: State,
    /// Empty while it is only reserved.
    pub(crate) guest_path: String,
    /// `guest_path` leads to the device itself; nothing is mounted.
    pub(crate) block_device: bool,
    /// For mount(8), beside what the guest always sets.
    pub(crate) options: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("mount.rs"));
    }
}
