//! The service's InitializeOptions in QEMU's terms, and what becomes of them pass by pass.
//!
//! A pass number is QEMU's: pass 1 sends all of memory, each later one what was written meanwhile. "After pass n" is when
//! QEMU begins pass n + 1. Everything here is the source's to do; a destination checks its options in the same way and
//! needs none of them.
//!
//! | field | here |
//! |---|---|
//! | `memory_transport` | TCP; absent options mean it too |
//! | `target_blackout_transfer_time` | `downtime-limit`, 1 to 2 000 000 ms; absent: 30 ms, doubled after each pass from the fourth on, up to 300 ms |
//! | `skip_throttling` | true: the guest is never slowed down, as when nothing is said; false: it may be (`auto-converge`) |
//! | `minimum_throttle_percentage` | 1 to 99: `cpu-throttle-initial`; 20 when only another throttle field is there |
//! | `throttling_scale` | 1 to 99, rounded: `cpu-throttle-increment`; else 10 |
//! | `starting_brownout_pass_number_for_throttling` | from that pass on; before it at most 1 percent is taken, the least that QEMU's switched-on mechanism can take, because it cannot be switched on while a migration runs |
//! | `target_number_of_brownout_transfer_passes` | after that pass `downtime-limit` is twice the pause that QEMU then expects, at most 5 s |
//! | `maximum_number_of_brownout_transfer_passes` | after that pass `downtime-limit` is QEMU's maximum, so that it pauses the guest at once; two passes later the transfer is given up |
//! | `blackout_time_threshold_for_cancelling_migration` | with the flag below, from the guest's pause to the end of sending; without it, a longer pause is only logged |
//! | `cancel_if_blackout_threshold_exceeds` | past the threshold the transfer is cancelled and the guest goes on here; refused without a threshold |
//! | `perf_tracing_enabled` | the steps of the pause are logged with their times, at info |
//! | `copy_shared_disks` | disks on shared storage are mirrored like the others |
//! | `compression_settings` | refused: QEMU compresses with worker threads over several connections of its own (multifd), and this transfer has one that was handed over; its older `compress` is deprecated and goes away |
//! | `checksum_verification` | refused: QEMU's stream carries no checksum |
//! | `prepare_memory_transfer_mode` | refused: QEMU has nothing to prepare, it tracks writes from the transfer's begin on |
//!
//! However long a limit is, the pause has its own deadline: see `sending`.

use std::time::Duration;

use dunlin_migration::refusal::Refusal;
use dunlin_qemu::{MigrationOptions, Throttle};
use dunlin_wire::service::{InitializeOptions, MemoryTransferThrottleParams, MemoryTransport};

/// How long the guest may stand still when the caller names no time, at first.
const FIRST_LIMIT: Duration = Duration::from_millis(30);
/// And at last, for a guest that writes faster than that allows.
const LAST_LIMIT: Duration = Duration::from_millis(300);
/// Passes that the first limit is tried for. The first pass is all of memory, the second what it left behind.
const PATIENCE: u64 = 4;
/// QEMU's own bound of `downtime-limit`.
const LONGEST_LIMIT: Duration = Duration::from_secs(2000);
/// The longest pause that is aimed at after the target number of passes.
const TARGET_LIMIT: Duration = Duration::from_secs(5);
/// Passes that the longest limit is tried for.
const LAST_PASSES: u64 = 2;
/// The least that QEMU's throttling can take once it is switched on.
const IDLE_THROTTLE: Throttle = Throttle { initial: 1, increment: 1, maximum: 1 };

/// How a transfer is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TransferOptions {
    /// QEMU's, as it begins.
    pub(crate) qemu: MigrationOptions,
    /// The caller named the time that the guest may stand still: it is not raised before a pass number says so.
    fixed: bool,
    /// The throttling of later passes, and the first of them.
    later_throttle: Option<(u64, Throttle)>,
    target_passes: Option<u64>,
    maximum_passes: Option<u64>,
    threshold: Option<Threshold>,
    /// Log what the pause consists of.
    pub(crate) tracing: bool,
    /// Disks on shared storage are copied all the same.
    pub(crate) copy_shared: bool,
}

/// The pause that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Threshold {
    /// From the guest's pause on.
    pub(crate) after: Duration,
    /// The transfer is cancelled; otherwise only logged.
    pub(crate) cancels: bool,
}

/// What QEMU says of a transfer when a pass begins.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reading {
    /// How long the guest would stand still now.
    pub(crate) expected_downtime: Option<Duration>,
    /// What is taken of the guest's CPU time, percent.
    pub(crate) throttle: Option<u8>,
}

/// A transfer under way: its options, and what QEMU was told last.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    options: TransferOptions,
    told: MigrationOptions,
}

/// The guest writes faster than the caller's bound allows to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "maximum_number_of_brownout_transfer_passes: {maximum} passes over memory, and {LAST_PASSES} more with the longest \
     pause allowed, did not come to an end; allow more passes, or move when the guest writes less"
)]
pub(crate) struct TooManyPasses {
    maximum: u64,
}

impl TransferOptions {
    pub(crate) fn threshold(&self) -> Option<Threshold> {
        self.threshold
    }

    /// What QEMU is told at a pass depends on what it says there.
    pub(crate) fn needs_reading(&self) -> bool {
        self.target_passes.is_some() || self.later_throttle.is_some()
    }
}

impl Course {
    pub(crate) fn new(options: TransferOptions) -> Course {
        let told = options.qemu.clone();
        Course { options, told }
    }

    pub(crate) fn options(&self) -> &TransferOptions {
        &self.options
    }

    /// QEMU begins `pass`: what it is to be told, when that is something else than before.
    pub(crate) fn pass(
        &mut self,
        pass: u64,
        reading: Reading,
    ) -> Result<Option<MigrationOptions>, TooManyPasses> {
        if let Some(maximum) = self.options.maximum_passes
            && pass > maximum.saturating_add(LAST_PASSES)
        {
            return Err(TooManyPasses { maximum });
        }
        // A limit that sank again would hold up a pass that was about to be the last.
        let downtime_limit = self.options.limit(pass, reading).max(self.told.downtime_limit);
        let throttle = self.options.throttle(pass, reading);
        let next = MigrationOptions { downtime_limit, throttle, ..self.told.clone() };
        if next == self.told {
            return Ok(None);
        }
        self.told = next.clone();
        Ok(Some(next))
    }
}

impl TransferOptions {
    /// QEMU stops the guest as soon as it expects to send the rest within the limit: a small one makes for a short
    /// pause, and raising it pass by pass lets a busy guest come to an end all the same.
    fn limit(&self, pass: u64, reading: Reading) -> Duration {
        let done = pass.saturating_sub(1);
        if self.maximum_passes.is_some_and(|maximum| done >= maximum) {
            return LONGEST_LIMIT;
        }
        let first = self.qemu.downtime_limit;
        if self.target_passes.is_some_and(|target| done >= target) {
            let expected = reading.expected_downtime.unwrap_or(LAST_LIMIT);
            return self.short_of_threshold(expected.saturating_mul(2).clamp(first, TARGET_LIMIT.max(first)));
        }
        if self.fixed || pass <= PATIENCE {
            return first;
        }
        let doublings = u32::try_from(pass - PATIENCE).unwrap_or(u32::MAX);
        let limit =
            2_u32.checked_pow(doublings).map_or(LAST_LIMIT, |factor| FIRST_LIMIT.saturating_mul(factor));
        self.short_of_threshold(limit.min(LAST_LIMIT)).max(first)
    }

    /// A pause is not aimed at that would be cancelled.
    fn short_of_threshold(&self, limit: Duration) -> Duration {
        let cancelled = self.threshold.filter(|threshold| threshold.cancels);
        cancelled.map_or(limit, |threshold| limit.min(threshold.after))
    }

    fn throttle(&self, pass: u64, reading: Reading) -> Option<Throttle> {
        match self.later_throttle {
            Some((from, throttle)) if pass >= from => {
                // From the idle percent the next step is to lead to the first one that was asked for.
                let short = throttle.initial.saturating_sub(reading.throttle.unwrap_or(throttle.initial));
                let increment = if short > 0 { short } else { throttle.increment };
                Some(Throttle { increment, ..throttle })
            }
            Some(_) | None => self.qemu.throttle,
        }
    }
}

/// The service's options in QEMU's terms; what QEMU cannot do is refused by name.
pub(super) fn transfer_options(options: Option<InitializeOptions>) -> Result<TransferOptions, Refusal> {
    let options = options.map(checked).transpose()?.unwrap_or_default();
    let tracing = options.perf_tracing_enabled;
    let copy_shared = options.copy_shared_disks;
    let cancels = options.cancel_if_blackout_threshold_exceeds;
    let params = options.memory_transfer_throttle_params.unwrap_or_default();

    let milliseconds = |field, value: Option<u32>| {
        let value = whole(field, value, 1, 2_000_000)?;
        Ok::<_, Refusal>(value.map(|value| Duration::from_millis(value.into())))
    };
    let named = milliseconds("target_blackout_transfer_time", params.target_blackout_transfer_time)?;
    let field = "blackout_time_threshold_for_cancelling_migration";
    let threshold = milliseconds(field, params.blackout_time_threshold_for_cancelling_migration)?;
    if cancels && threshold.is_none() {
        return Err(Refusal::invalid(format!(
            "init_options.cancel_if_blackout_threshold_exceeds: there is no threshold; set memory_transfer_throttle_params.{field} too"
        )));
    }
    let threshold = threshold.map(|after| Threshold { after, cancels });
    if let (Some(named), Some(Threshold { after, cancels: true })) = (named, threshold)
        && named > after
    {
        return Err(Refusal::invalid(format!(
            "init_options.memory_transfer_throttle_params.target_blackout_transfer_time: a pause of {named:?} would be cancelled \
             after {after:?} ({field}); aim at less, or allow more"
        )));
    }
    let passes =
        |field, value: Option<u32>| Ok::<_, Refusal>(whole(field, value, 1, u32::MAX)?.map(u64::from));
    let field = "target_number_of_brownout_transfer_passes";
    let target_passes = passes(field, params.target_number_of_brownout_transfer_passes)?;
    let maximum_passes = passes(
        "maximum_number_of_brownout_transfer_passes",
        params.maximum_number_of_brownout_transfer_passes,
    )?;
    if let (Some(target), Some(maximum)) = (target_passes, maximum_passes)
        && target > maximum
    {
        return Err(invalid(field, &format!("{target} is more than the maximum of {maximum}")));
    }

    let (throttle, later_throttle) = throttling(&params)?;
    // The wires announce the guest; to have it do so as well would cost it its first moments.
    let mut qemu = MigrationOptions { throttle, announce: false, ..MigrationOptions::default() };
    let unnamed = match threshold {
        Some(Threshold { after, cancels: true }) => FIRST_LIMIT.min(after),
        Some(Threshold { cancels: false, .. }) | None => FIRST_LIMIT,
    };
    qemu.downtime_limit = named.unwrap_or(unnamed);
    let fixed = named.is_some();
    Ok(TransferOptions {
        qemu,
        fixed,
        later_throttle,
        target_passes,
        maximum_passes,
        threshold,
        tracing,
        copy_shared,
    })
}

/// Refuses what has no counterpart.
fn checked(options: InitializeOptions) -> Result<InitializeOptions, Refusal> {
    if options.memory_transport.enum_value() != Ok(MemoryTransport::MEMORY_TRANSPORT_TCP) {
        return Err(Refusal::unknown(
            "init_options.memory_transport: only TCP is supported; set it, or leave the options out",
        ));
    }
    let reason = if options.compression_settings.is_some() {
        "compression_settings: QEMU's workers need connections of their own, and this transfer has the one that is handed over"
    } else if options.checksum_verification {
        "checksum_verification: QEMU's stream carries no checksum"
    } else if options.prepare_memory_transfer_mode {
        "prepare_memory_transfer_mode: QEMU has nothing to prepare, it tracks writes from the transfer's begin on"
    } else {
        return Ok(options);
    };
    Err(Refusal::invalid(format!("init_options.{reason}; leave it out")))
}

/// QEMU's throttling as a transfer begins; and from which pass on another one.
type Throttling = (Option<Throttle>, Option<(u64, Throttle)>);

fn throttling(params: &MemoryTransferThrottleParams) -> Result<Throttling, Refusal> {
    let field = "minimum_throttle_percentage";
    let minimum = whole(field, params.minimum_throttle_percentage, 1, 99)?;
    let scale = params.throttling_scale.map(percent).transpose()?;
    let field = "starting_brownout_pass_number_for_throttling";
    let from = whole(field, params.starting_brownout_pass_number_for_throttling, 1, u32::MAX)?;
    let asked = minimum.is_some() || scale.is_some() || from.is_some();
    match params.skip_throttling {
        Some(true) if asked => {
            return Err(invalid("skip_throttling", "the other fields ask for throttling"));
        }
        Some(true) => return Ok((None, None)),
        None if !asked => return Ok((None, None)),
        Some(false) | None => {}
    }
    let defaults = Throttle::default();
    let initial = minimum.and_then(|percent| u8::try_from(percent).ok()).unwrap_or(defaults.initial);
    let throttle = Throttle { initial, increment: scale.unwrap_or(defaults.increment), ..defaults };
    match from {
        Some(from) if from > 1 => Ok((Some(IDLE_THROTTLE), Some((from.into(), throttle)))),
        Some(_) | None => Ok((Some(throttle), None)),
    }
}

fn percent(scale: f64) -> Result<u8, Refusal> {
    let rounded = scale.round();
    if !(1.0..=99.0).contains(&rounded) {
        return Err(invalid("throttling_scale", &format!("{scale} is not 1 to 99 percent")));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number from 1 to 99"
    )]
    Ok(rounded as u8)
}

fn whole(field: &str, value: Option<u32>, least: u32, most: u32) -> Result<Option<u32>, Refusal> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            let range =
                if most == u32::MAX { format!("{least} or more") } else { format!("{least} to {most}") };
            Err(invalid(field, &format!("{value} is not {range}")))
        }
        value => Ok(value),
    }
}

fn invalid(field: &str, reason: &str) -> Refusal {
    Refusal::invalid(format!(
        "init_options.memory_transfer_throttle_params.{field}: {reason}; correct it, or leave it out"
    ))
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
