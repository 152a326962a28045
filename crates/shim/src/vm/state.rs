//! The states of a sandbox's machine.
//!
//! | state       | boot     | up        | failed     | import   | prepare   | run     | leave     | end        | save |
//! |-------------|----------|-----------|------------|----------|-----------|---------|-----------|------------|------|
//! | NotCreated  | Starting | -         | -          | Imported | -         | -       | -         | Terminated | -    |
//! | Starting    | -        | Running   | Terminated | -        | -         | -       | -         | Terminated | -    |
//! | Running     | -        | -         | -          | -        | -         | =       | MovedAway | Terminated | =    |
//! | Imported    | -        | -         | -          | -        | Preparing | -       | -         | Terminated | -    |
//! | Preparing   | -        | Receiving | Imported   | -        | -         | -       | -         | Terminated | -    |
//! | Receiving   | -        | -         | -          | -        | -         | Running | -         | Terminated | -    |
//! | MovedAway   | -        | -         | -          | -        | -         | -       | =         | =          | -    |
//! | Terminated  | Starting | -         | -          | -        | -         | -       | MovedAway | =          | -    |
//!
//! A source's machine stays `Running` for the whole of a move, also while QEMU has it paused: the session says which
//! calls it answers. A destination's is resumed by `run` and aborted by `end`.

use crate::controller::Transitions;

/// Where the machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    NotCreated,
    Starting,
    Running,
    /// A destination knows its document.
    Imported,
    Preparing,
    /// QEMU waits for the state, or has it and does not run.
    Receiving,
    /// On a source: its state is complete elsewhere.
    MovedAway,
    Terminated,
}

/// What changes it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Boot,
    Up,
    Failed,
    Import,
    Prepare,
    Run,
    Leave,
    End,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] = &[
        ("NotCreated", State::NotCreated),
        ("Starting", State::Starting),
        ("Running", State::Running),
        ("Imported", State::Imported),
        ("Preparing", State::Preparing),
        ("Receiving", State::Receiving),
        ("MovedAway", State::MovedAway),
        ("Terminated", State::Terminated),
    ];
    const OPS: &'static [(&'static str, Op)] = &[
        ("boot", Op::Boot),
        ("up", Op::Up),
        ("failed", Op::Failed),
        ("import", Op::Import),
        ("prepare", Op::Prepare),
        ("run", Op::Run),
        ("leave", Op::Leave),
        ("end", Op::End),
        ("save", Op::Save),
    ];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::NotCreated | State::Terminated, Op::Boot) => Some(State::Starting),
            (State::Starting, Op::Up) => Some(State::Running),
            (State::Starting, Op::Failed) => Some(State::Terminated),
            (State::NotCreated, Op::Import) => Some(State::Imported),
            (State::Imported, Op::Prepare) => Some(State::Preparing),
            (State::Preparing, Op::Up) => Some(State::Receiving),
            (State::Preparing, Op::Failed) => Some(State::Imported),
            (State::Receiving | State::Running, Op::Run) => Some(State::Running),
            // It may have ended after its state was complete elsewhere.
            (State::Running | State::Terminated | State::MovedAway, Op::Leave) => Some(State::MovedAway),
            (State::MovedAway | State::Terminated, Op::End) => Some(self),
            (_, Op::End) => Some(State::Terminated),
            (State::Running, Op::Save) => Some(State::Running),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("state.rs"));
    }
}
