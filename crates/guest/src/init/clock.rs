//! Follows the host's clock at negotiation; a guest that was moved wakes up with the past.

use std::io;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// Differences up to this are left alone: the message itself took time to arrive.
const TOLERANCE: Duration = Duration::from_millis(5);

/// Steps CLOCK_REALTIME to the host's when it is off by more than 5 ms. Tells by how many
/// nanoseconds it was stepped, forward positive.
pub fn follow_host(host_unix_nanos: u64) -> io::Result<Option<i128>> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let ours = i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec());
    let Some(step) = step(ours, host_unix_nanos) else { return Ok(None) };
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(host_unix_nanos)))?;
    Ok(Some(step))
}

fn step(ours_unix_nanos: i128, host_unix_nanos: u64) -> Option<i128> {
    let off = i128::from(host_unix_nanos) - ours_unix_nanos;
    (off.unsigned_abs() > TOLERANCE.as_nanos()).then_some(off)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_left_alone() {
        assert_eq!(step(1_000_000_000, 1_004_999_999), None);
        assert_eq!(step(1_000_000_000, 995_000_001), None);
        assert_eq!(step(1_000_000_000, 1_005_000_001), Some(5_000_001));
        assert_eq!(step(2_000_000_000, 1_000_000_000), Some(-1_000_000_000));
    }
}
