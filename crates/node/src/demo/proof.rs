//! Whether a counter's lines prove that it went on counting: pure, fed by `super`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// What a list of counter lines holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// The highest number seen.
    pub(super) last: u64,
    /// Numbers from 1 to `last` that are not there.
    pub(super) missing: u64,
    /// Lines whose number was there before.
    pub(super) repeated: u64,
    /// Lines that are neither a number nor the `pid` line.
    pub(super) damaged: u64,
    /// `pid` lines: one for each start of the counter.
    pub(super) starts: u64,
}

impl Tally {
    /// Counted from 1 without a hole, and started once.
    pub(super) fn is_whole(&self) -> bool {
        self.last > 0 && self.missing == 0 && self.damaged == 0 && self.starts == 1
    }
}

/// Counts lines of the form `<number> <uptime>` and `pid <pid>`; an unfinished last line
/// must already be cut off.
pub(super) fn tally<'a>(lines: impl IntoIterator<Item = &'a str>) -> Tally {
    let mut tally = Tally::default();
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for line in lines {
        match Line::parse(line) {
            Some(Line::Pid) => tally.starts += 1,
            Some(Line::Number(number)) => *seen.entry(number).or_default() += 1,
            None => tally.damaged += 1,
        }
    }
    tally.last = seen.keys().next_back().copied().unwrap_or(0);
    let different = u64::try_from(seen.len()).unwrap_or(u64::MAX);
    tally.missing = tally.last.saturating_sub(different);
    tally.repeated = seen.values().map(|count| count - 1).sum();
    tally
}

enum Line {
    Pid,
    Number(u64),
}

impl Line {
    fn parse(line: &str) -> Option<Line> {
        let (first, second) = line.split_once(' ')?;
        if first == "pid" {
            return second.parse::<u32>().ok().map(|_| Line::Pid);
        }
        second.parse::<f64>().ok()?;
        first.parse().ok().filter(|number| *number > 0).map(Line::Number)
    }
}

/// The longest time between the arrivals of two neighbours.
pub(super) fn longest_gap(arrivals: &[Instant]) -> Duration {
    arrivals.windows(2).map(|pair| pair[1].duration_since(pair[0])).max().unwrap_or_default()
}

/// The whole lines of a text that may end in the middle of one.
pub(super) fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    let end = text.rfind('\n').map_or(0, |at| at + 1);
    text[..end].lines()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_count_is_whole() {
        let tally = tally(["pid 1", "1 0.10", "2 0.11", "3 0.12"]);
        assert_eq!(tally, Tally { last: 3, missing: 0, repeated: 0, damaged: 0, starts: 1 });
        assert!(tally.is_whole());
    }

    #[test]
    fn what_is_wrong_is_counted() {
        let tally = tally(["pid 1", "1 0.10", "3 0.12", "3 0.12", "4 0.", "x", "5", "pid 2", "6 0.2"]);
        assert_eq!(tally, Tally { last: 6, missing: 2, repeated: 1, damaged: 2, starts: 2 });
        assert!(!tally.is_whole());
    }

    #[test]
    fn an_empty_count_proves_nothing() {
        assert!(!tally([]).is_whole());
        assert!(!tally(["pid 1"]).is_whole());
    }

    #[test]
    fn an_unfinished_line_is_cut_off() {
        assert_eq!(whole_lines("1 0.1\n2 0.").collect::<Vec<_>>(), ["1 0.1"]);
        assert_eq!(whole_lines("1 0").count(), 0);
    }

    #[test]
    fn the_longest_gap_is_between_neighbours() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(longest_gap(&[at(0), at(10), at(250), at(260)]), Duration::from_millis(240));
        assert_eq!(longest_gap(&[at(0)]), Duration::ZERO);
    }
}
