//! Where a controller stands in a move, beside its own life.
//!
//! A source's controller is saved and stays as it is until the move's end; a destination's begins as
//! imported, is patched with what is this host's, and is freed when the machine runs here, or ended
//! when it never will. What a controller may do while it is not free is its own table's business.
//!
//! | state    | save   | import   | patch   | resume | abort |
//! |----------|--------|----------|---------|--------|-------|
//! | Free     | Source | Imported | -       | =      | =     |
//! | Source   | =      | -        | -       | Free   | =     |
//! | Imported | -      | -        | Patched | -      | Free  |
//! | Patched  | -      | -        | -       | Free   | Free  |

use crate::controller::Transitions;

/// A controller's part in a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Hold {
    /// In none.
    #[default]
    Free,
    /// Saved: it goes to another host, or it is freed again.
    Source,
    /// Known from a payload alone.
    Imported,
    /// And pointed at this host's bundle, streams and disks.
    Patched,
}

/// What a move asks of a controller.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Save,
    Import,
    Patch,
    Resume,
    Abort,
}

impl Hold {
    /// It was brought by a move that has not ended.
    pub(crate) fn arriving(self) -> bool {
        matches!(self, Hold::Imported | Hold::Patched)
    }
}

impl Transitions for Hold {
    type Op = Step;
    const STATES: &'static [(&'static str, Hold)] = &[
        ("Free", Hold::Free),
        ("Source", Hold::Source),
        ("Imported", Hold::Imported),
        ("Patched", Hold::Patched),
    ];
    const OPS: &'static [(&'static str, Step)] = &[
        ("save", Step::Save),
        ("import", Step::Import),
        ("patch", Step::Patch),
        ("resume", Step::Resume),
        ("abort", Step::Abort),
    ];

    fn after(self, step: Step) -> Option<Hold> {
        match (self, step) {
            (Hold::Free | Hold::Source, Step::Save) => Some(Hold::Source),
            (Hold::Free, Step::Import) => Some(Hold::Imported),
            (Hold::Imported, Step::Patch) => Some(Hold::Patched),
            (Hold::Free | Hold::Source | Hold::Patched, Step::Resume) => Some(Hold::Free),
            (Hold::Free | Hold::Imported | Hold::Patched, Step::Abort) => Some(Hold::Free),
            // What was saved runs here, or leaves: there is nothing to end.
            (Hold::Source, Step::Abort) => Some(Hold::Source),
            (Hold::Source | Hold::Imported | Hold::Patched, Step::Import)
            | (Hold::Free | Hold::Source | Hold::Patched, Step::Patch)
            | (Hold::Imported | Hold::Patched, Step::Save)
            | (Hold::Imported, Step::Resume) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<Hold>(include_str!("hold.rs"));
    }
}
