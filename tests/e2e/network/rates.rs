//! What moves did to connections, in figures: printed, for how fast a machine is decides no test.

use std::time::{Duration, Instant};

use super::ms;

/// What one move did to the connections; rates are MiB/s, down to the client and up from it.
pub(super) struct Row {
    pub(super) pause: Duration,
    pub(super) gap: Duration,
    pub(super) at_rest: (f64, f64),
    pub(super) moving: (f64, f64),
}

/// Down and up, MiB/s, from `before` to `now`.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(super) fn rates(before: (u64, u64), now: (u64, u64), since: Instant) -> (f64, f64) {
    let rate = |bytes: u64| bytes as f64 / since.elapsed().as_secs_f64() / f64::from(1 << 20);
    (rate(now.0 - before.0), rate(now.1 - before.1))
}

/// The middle one.
fn median(rows: &[Row], of: impl Fn(&Row) -> f64) -> f64 {
    let mut values: Vec<f64> = rows.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Pause and gaps of all moves, worst first, and the rates, for whoever reads the test's output.
pub(super) fn summary(rows: &[Row]) {
    let mut excess: Vec<f64> = rows.iter().map(|row| ms(row.gap) - ms(row.pause)).collect();
    excess.sort_by(f64::total_cmp);
    let within = excess.iter().filter(|excess| **excess <= 50.0).count();
    println!(
        "    gap less pause: median {:.0} ms, worst {:.0} ms; at most 50 ms in {within} of {} moves",
        excess[excess.len() / 2],
        excess[excess.len() - 1],
        excess.len()
    );
    println!(
        "    median rates: down {:.0} and up {:.1} MiB/s at rest, {:.0} and {:.1} MiB/s from a move's beginning to its end",
        median(rows, |row| row.at_rest.0),
        median(rows, |row| row.at_rest.1),
        median(rows, |row| row.moving.0),
        median(rows, |row| row.moving.1)
    );
}
