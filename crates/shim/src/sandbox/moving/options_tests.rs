//! Each option: what QEMU is told of it at first and pass by pass, or the words that refuse it.

use dunlin_wire::service::CompressionSettings;
use protobuf::{EnumOrUnknown, MessageField};

use super::*;

fn tcp() -> InitializeOptions {
    InitializeOptions {
        memory_transport: EnumOrUnknown::new(MemoryTransport::MEMORY_TRANSPORT_TCP),
        ..InitializeOptions::default()
    }
}

fn with(set: impl FnOnce(&mut MemoryTransferThrottleParams)) -> InitializeOptions {
    let mut params = MemoryTransferThrottleParams::default();
    set(&mut params);
    InitializeOptions { memory_transfer_throttle_params: MessageField::some(params), ..tcp() }
}

fn read(options: InitializeOptions) -> TransferOptions {
    transfer_options(Some(options)).unwrap()
}

/// Refused, with the field's name in front.
fn refused(options: InitializeOptions, field: &str) -> String {
    let message = transfer_options(Some(options)).unwrap_err().message;
    assert!(message.contains(&format!("{field}: ")), "{message}");
    message
}

/// The limit at each pass from 1 on, milliseconds, when QEMU expects `expected` milliseconds.
fn limits(options: TransferOptions, passes: u64, expected: u64) -> Vec<u128> {
    let mut course = Course::new(options);
    let reading = Reading { expected_downtime: Some(Duration::from_millis(expected)), ..Reading::default() };
    let told = (1..=passes).map(|pass| {
        course.pass(pass, reading).unwrap();
        course.told.downtime_limit.as_millis()
    });
    told.collect()
}

#[test]
fn absent_options_are_the_defaults_and_present_ones_need_a_transport() {
    assert_eq!(transfer_options(None).unwrap(), read(tcp()));
    refused(InitializeOptions::default(), "memory_transport");
    let options = read(tcp());
    assert_eq!((options.qemu.throttle, options.threshold, options.tracing), (None, None, false));
}

#[test]
fn what_qemu_cannot_do_is_refused_by_name_and_reason() {
    let compression = MessageField::some(CompressionSettings::default());
    let options = InitializeOptions { compression_settings: compression, ..tcp() };
    assert!(refused(options, "compression_settings").contains("connections"));
    let options = InitializeOptions { checksum_verification: true, ..tcp() };
    assert!(refused(options, "checksum_verification").contains("no checksum"));
    let options = InitializeOptions { prepare_memory_transfer_mode: true, ..tcp() };
    assert!(refused(options, "prepare_memory_transfer_mode").contains("nothing to prepare"));
}

#[test]
fn an_unnamed_limit_begins_low_and_is_raised_to_the_last_one() {
    assert_eq!(limits(read(tcp()), 10, 9000), [30, 30, 30, 30, 60, 120, 240, 300, 300, 300]);
    let mut course = Course::new(read(tcp()));
    assert_eq!(course.pass(4, Reading::default()), Ok(None), "nothing new is not told");
    assert!(course.pass(5, Reading::default()).unwrap().is_some());
    assert_eq!(course.pass(5, Reading::default()), Ok(None));
    assert!(course.pass(u64::MAX, Reading::default()).unwrap().is_some());
}

#[test]
fn target_blackout_transfer_time_is_the_limit_and_stays() {
    let options = read(with(|p| p.target_blackout_transfer_time = Some(77)));
    assert_eq!(options.qemu.downtime_limit, Duration::from_millis(77));
    assert_eq!(limits(options, 40, 9000), [77; 40]);
    for wrong in [0, 2_000_001] {
        refused(with(|p| p.target_blackout_transfer_time = Some(wrong)), "target_blackout_transfer_time");
    }
}

#[test]
fn skip_throttling_false_throttles_and_true_does_not() {
    assert_eq!(read(with(|p| p.skip_throttling = Some(true))).qemu.throttle, None);
    assert_eq!(read(with(|p| p.skip_throttling = Some(false))).qemu.throttle, Some(Throttle::default()));
    let both = with(|p| {
        p.skip_throttling = Some(true);
        p.throttling_scale = Some(5.0);
    });
    refused(both, "skip_throttling");
}

#[test]
fn minimum_and_scale_are_the_first_step_and_the_next_ones() {
    let options = with(|p| {
        p.minimum_throttle_percentage = Some(35);
        p.throttling_scale = Some(7.6);
    });
    let throttle = Throttle { initial: 35, increment: 8, maximum: 99 };
    assert_eq!(read(options).qemu.throttle, Some(throttle));
    for wrong in [0, 100, 300] {
        refused(with(|p| p.minimum_throttle_percentage = Some(wrong)), "minimum_throttle_percentage");
    }
    for wrong in [0.4, 99.6, -3.0, f64::NAN, f64::INFINITY] {
        refused(with(|p| p.throttling_scale = Some(wrong)), "throttling_scale");
    }
}

#[test]
fn throttling_waits_for_its_pass_and_then_begins_where_it_was_asked_to() {
    let options = read(with(|p| {
        p.starting_brownout_pass_number_for_throttling = Some(3);
        p.minimum_throttle_percentage = Some(40);
        p.target_blackout_transfer_time = Some(10);
    }));
    assert_eq!(options.qemu.throttle, Some(IDLE_THROTTLE));
    assert!(options.needs_reading());
    let mut course = Course::new(options.clone());
    let taken = |throttle| Reading { throttle, ..Reading::default() };
    assert_eq!(course.pass(2, taken(Some(1))), Ok(None));
    let asked = Throttle { initial: 40, increment: 10, maximum: 99 };
    let told = course.pass(3, taken(Some(1))).unwrap().unwrap();
    assert_eq!(told.throttle, Some(Throttle { increment: 39, ..asked }), "from 1 to 40 in one step");
    assert_eq!(course.pass(4, taken(Some(1))), Ok(None));
    assert_eq!(course.pass(5, taken(Some(40))).unwrap().unwrap().throttle, Some(asked));
    assert_eq!(course.pass(6, taken(Some(50))), Ok(None));
    // A guest that was not even idly throttled begins at the first step by itself.
    let mut course = Course::new(options);
    assert_eq!(course.pass(3, taken(None)).unwrap().unwrap().throttle, Some(asked));
    let first = read(with(|p| p.starting_brownout_pass_number_for_throttling = Some(1)));
    assert_eq!((first.qemu.throttle, first.later_throttle), (Some(Throttle::default()), None));
    let field = "starting_brownout_pass_number_for_throttling";
    refused(with(|p| p.starting_brownout_pass_number_for_throttling = Some(0)), field);
}

#[test]
fn after_the_target_number_of_passes_the_limit_is_what_lets_the_next_one_be_the_last() {
    let target = |p: &mut MemoryTransferThrottleParams| {
        p.target_number_of_brownout_transfer_passes = Some(2);
    };
    assert!(read(with(target)).needs_reading() && !read(tcp()).needs_reading());
    assert_eq!(limits(read(with(target)), 4, 450), [30, 30, 900, 900]);
    assert_eq!(limits(read(with(target)), 3, 60_000), [30, 30, 5000], "but no pause of a minute");
    assert_eq!(limits(read(with(target)), 6, 1), [30, 30, 30, 30, 30, 30], "never less than before");
    let named = with(|p| {
        target(p);
        p.target_blackout_transfer_time = Some(8000);
    });
    assert_eq!(limits(read(named), 4, 1), [8000; 4]);
    let field = "target_number_of_brownout_transfer_passes";
    refused(with(|p| p.target_number_of_brownout_transfer_passes = Some(0)), field);
    let crossed = with(|p| {
        target(p);
        p.maximum_number_of_brownout_transfer_passes = Some(1);
    });
    refused(crossed, field);
}

#[test]
fn after_the_maximum_number_of_passes_the_pause_is_forced_and_then_the_transfer_is_given_up() {
    let options = read(with(|p| {
        p.maximum_number_of_brownout_transfer_passes = Some(3);
        p.target_blackout_transfer_time = Some(10);
    }));
    assert_eq!(limits(options.clone(), 5, 1), [10, 10, 10, 2_000_000, 2_000_000]);
    let mut course = Course::new(options);
    let given_up = course.pass(6, Reading::default()).unwrap_err();
    assert_eq!(given_up, TooManyPasses { maximum: 3 });
    assert!(given_up.to_string().starts_with("maximum_number_of_brownout_transfer_passes: 3 "));
    let field = "maximum_number_of_brownout_transfer_passes";
    refused(with(|p| p.maximum_number_of_brownout_transfer_passes = Some(0)), field);
}

#[test]
fn a_threshold_cancels_only_with_the_flag_and_no_pause_beyond_it_is_aimed_at() {
    let field = "blackout_time_threshold_for_cancelling_migration";
    let set = |p: &mut MemoryTransferThrottleParams| {
        p.blackout_time_threshold_for_cancelling_migration = Some(100);
    };
    let after = Duration::from_millis(100);
    assert_eq!(read(with(set)).threshold(), Some(Threshold { after, cancels: false }));
    assert_eq!(limits(read(with(set)), 8, 1)[7], 300, "it is only logged");
    let flagged = |options| InitializeOptions { cancel_if_blackout_threshold_exceeds: true, ..options };
    let options = read(flagged(with(set)));
    assert_eq!(options.threshold(), Some(Threshold { after, cancels: true }));
    assert_eq!(limits(options, 8, 1), [30, 30, 30, 30, 60, 100, 100, 100]);
    let short = flagged(with(|p| p.blackout_time_threshold_for_cancelling_migration = Some(5)));
    assert_eq!(limits(read(short), 8, 1), [5; 8]);
    refused(flagged(tcp()), "cancel_if_blackout_threshold_exceeds");
    refused(with(|p| p.blackout_time_threshold_for_cancelling_migration = Some(0)), field);
    let longer = flagged(with(|p| {
        set(p);
        p.target_blackout_transfer_time = Some(101);
    }));
    refused(longer, "target_blackout_transfer_time");
}

#[test]
fn perf_tracing_is_a_matter_of_the_log() {
    let options = read(InitializeOptions { perf_tracing_enabled: true, ..tcp() });
    assert!(options.tracing);
    assert_eq!(options.qemu, read(tcp()).qemu);
}
