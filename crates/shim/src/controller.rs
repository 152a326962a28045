//! What all controllers share: states that change through one pure function, and the table in a
//! module's docs that is held against it.
//!
//! A table looks like this; its first column are the states, its header the operations:
//!
//! ```text
//! | state   | attach   | save | import  |
//! |---------|----------|------|---------|
//! | Waiting | Attached | =    | Waiting |
//! ```
//!
//! A cell is the name of the state that follows, `=` (stays) or `-` (refused).

use std::fmt::{Debug, Display};

use thiserror::Error;

/// States of a controller and the operations that change them.
pub(crate) trait Transitions: Copy + Eq + Debug + 'static {
    /// What can be asked of a thing in these states.
    type Op: Copy + Debug + 'static;

    /// Rows of the module's table, in its order.
    const STATES: &'static [(&'static str, Self)];

    /// Columns of the module's table, in its order.
    const OPS: &'static [(&'static str, Self::Op)];

    /// The state after `op`. None: refused in this state.
    fn after(self, op: Self::Op) -> Option<Self>;

    /// This state's name in the table.
    fn name(self) -> &'static str {
        Self::STATES.iter().find(|(_, state)| *state == self).map_or("unnamed", |(name, _)| name)
    }

    /// Goes to the state after `op`, or stays and says why. `what` names the thing, for example
    /// `container web`.
    fn enter(&mut self, op: Self::Op, what: impl Display) -> Result<(), NotNow> {
        match self.after(op) {
            Some(next) => {
                *self = next;
                Ok(())
            }
            None => Err(NotNow { what: what.to_string(), state: self.name(), op: op_name::<Self>(op) }),
        }
    }
}

/// The column of an operation. Operations need no equality of their own: their debug form is one.
fn op_name<T: Transitions>(op: T::Op) -> &'static str {
    let wanted = format!("{op:?}");
    T::OPS.iter().find(|(_, op)| format!("{op:?}") == wanted).map_or("unnamed", |(name, _)| name)
}

/// The operation has no place in the thing's present state.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{what} is in the state {state}, in which `{op}` is refused; wait until its state has changed, or delete it"
)]
pub(crate) struct NotNow {
    /// The thing, for example `container web`.
    pub(crate) what: String,
    /// Its state, as the table of its module calls it.
    pub(crate) state: &'static str,
    /// What was asked, as the table calls it.
    pub(crate) op: &'static str,
}

/// Holds the table in a module's docs (`source` is its text: `include_str!` of itself) against
/// [`Transitions::after`]: every state a row, every operation a column, in the order of the
/// constants, and every cell what the code answers. A module with several tables: the one whose
/// first column are these states.
///
/// # Panics
/// At the first difference, with the row and the column.
#[cfg(test)]
pub(crate) fn check_table<T: Transitions>(source: &str) {
    let states: Vec<&str> = T::STATES.iter().map(|(name, _)| *name).collect();
    let ops: Vec<&str> = T::OPS.iter().map(|(name, _)| *name).collect();
    let tables = tables(source);
    let table = match tables.as_slice() {
        [one] => one,
        [] => panic!("the module's docs hold no `//! | state | ... |` table"),
        several => several
            .iter()
            .find(|table| table.rows.iter().map(|row| row[0]).eq(states.iter().copied()))
            .unwrap_or_else(|| panic!("no table of the docs has the rows {states:?}")),
    };
    assert_eq!(table.header[1..], ops, "the table's columns");
    let rows: Vec<&str> = table.rows.iter().map(|row| row[0]).collect();
    assert_eq!(rows, states, "the table's rows");
    for (row, (name, state)) in table.rows.iter().zip(T::STATES) {
        assert_eq!(row.len(), ops.len() + 1, "cells of the row {name}");
        for (cell, (op, asked)) in row[1..].iter().zip(T::OPS) {
            let answer = match state.after(*asked) {
                None => "-",
                Some(next) if next == *state => "=",
                Some(next) => next.name(),
            };
            assert_eq!(*cell, answer, "the table's cell for {name} and {op} against the code");
        }
    }
}

#[cfg(test)]
struct Table<'a> {
    header: Vec<&'a str>,
    rows: Vec<Vec<&'a str>>,
}

/// Tables of the module docs whose header begins with `state`.
#[cfg(test)]
fn tables(source: &str) -> Vec<Table<'_>> {
    let mut tables: Vec<Table<'_>> = Vec::new();
    let mut inside = false;
    for line in source.lines() {
        let cells = line.trim().strip_prefix("//!").map(str::trim).and_then(|line| {
            let line = line.strip_prefix('|')?.strip_suffix('|')?;
            Some(line.split('|').map(|cell| cell.trim().trim_matches('`')).collect::<Vec<_>>())
        });
        match cells {
            None => inside = false,
            Some(cells)
                if cells.iter().all(|cell| !cell.is_empty() && cell.chars().all(|c| "-:".contains(c)))
                    && cells[0].len() > 1 => {}
            Some(cells) if inside => {
                if let Some(table) = tables.last_mut() {
                    table.rows.push(cells);
                }
            }
            Some(cells) if cells[0] == "state" => {
                inside = true;
                tables.push(Table { header: cells, rows: Vec::new() });
            }
            Some(_) => {}
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Lamp {
        Off,
        On,
        Broken,
    }

    #[derive(Debug, Clone, Copy)]
    enum Turn {
        On,
        Off,
        Drop,
    }

    impl Transitions for Lamp {
        type Op = Turn;
        const STATES: &'static [(&'static str, Self)] =
            &[("Off", Lamp::Off), ("On", Lamp::On), ("Broken", Lamp::Broken)];
        const OPS: &'static [(&'static str, Turn)] =
            &[("on", Turn::On), ("off", Turn::Off), ("drop", Turn::Drop)];

        fn after(self, op: Turn) -> Option<Lamp> {
            match (self, op) {
                (Lamp::Off | Lamp::On, Turn::On) => Some(Lamp::On),
                (Lamp::Off | Lamp::On, Turn::Off) => Some(Lamp::Off),
                (_, Turn::Drop) => Some(Lamp::Broken),
                (Lamp::Broken, _) => None,
            }
        }
    }

    const RIGHT: &str = "//! | state  | on | off | drop   |
//! |--------|----|-----|--------|
//! | Off    | On | =   | Broken |
//! | On     | =  | Off | Broken |
//! | Broken | -  | -   | =      |
";

    #[test]
    fn a_true_table_passes_also_beside_another() {
        check_table::<Lamp>(RIGHT);
        check_table::<Lamp>(&format!("//! | state | x |\n//! |---|---|\n//! | Other | = |\n//!\n{RIGHT}"));
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let wrong = [
            RIGHT.replace("| Off    | On |", "| Off    | =  |"),
            RIGHT.replace("| Broken | -  |", "| Broken | On |"),
            RIGHT.replace("//! | Broken | -  | -   | =      |\n", ""),
            RIGHT.replace("| off |", "| out |"),
            RIGHT.replace("| drop   |", "|").replace("| Broken |\n", "|\n"),
            String::new(),
        ];
        for source in wrong {
            assert!(std::panic::catch_unwind(|| check_table::<Lamp>(&source)).is_err(), "{source}");
        }
    }

    #[test]
    fn a_refusal_names_the_thing_its_state_and_the_operation() {
        let mut lamp = Lamp::Off;
        lamp.enter(Turn::Drop, "the lamp").unwrap();
        let error = lamp.enter(Turn::On, "the lamp").unwrap_err();
        assert_eq!(error, NotNow { what: "the lamp".into(), state: "Broken", op: "on" });
        assert_eq!(lamp, Lamp::Broken, "a refused operation changes nothing");
    }
}
