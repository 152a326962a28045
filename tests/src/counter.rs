//! Reads what the counter of the demo image wrote.

use std::collections::BTreeMap;

/// What a list of counter lines holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// The highest number.
    pub last: u64,
    /// Numbers below it that are not there.
    pub missing: Vec<u64>,
    /// Numbers that are there more than once.
    pub repeated: Vec<u64>,
    /// Lines that are neither `<number> <uptime>` nor `pid <pid>`.
    pub damaged: Vec<String>,
    /// What the `pid` lines say.
    pub pids: Vec<u32>,
}

/// Counts the lines of `text`; a last line without an end is left out.
pub fn count(text: &str) -> Counted {
    let end = text.rfind('\n').map_or(0, |at| at + 1);
    let mut counted = Counted::default();
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for line in text[..end].lines() {
        match line.split_once(' ') {
            Some(("pid", pid)) if pid.parse::<u32>().is_ok() => {
                counted.pids.extend(pid.parse::<u32>());
            }
            Some((number, uptime)) if number.parse::<u64>().is_ok() && uptime.parse::<f64>().is_ok() => {
                *seen.entry(number.parse().unwrap_or_default()).or_default() += 1;
            }
            Some(_) | None => counted.damaged.push(line.to_owned()),
        }
    }
    counted.last = seen.keys().next_back().copied().unwrap_or(0);
    counted.missing = (1..=counted.last).filter(|number| !seen.contains_key(number)).collect();
    counted.repeated = seen.iter().filter(|(_, times)| **times > 1).map(|(number, _)| *number).collect();
    counted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_repeats_and_damage_are_named() {
        let counted = count("pid 1\n1 0.1\n2 0.2\n2 0.2\n4 0.4\n5 x\n6 0.6");
        assert_eq!(counted.last, 4);
        assert_eq!(counted.missing, [3]);
        assert_eq!(counted.repeated, [2]);
        assert_eq!(counted.damaged, ["5 x"]);
        assert_eq!(counted.pids, [1]);
    }
}
