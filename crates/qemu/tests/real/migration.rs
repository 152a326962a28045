//! A machine moves between two real QEMUs, its disk with it.

use std::task::Poll;
use std::time::{Duration, Instant};

use crate::common::{
    Host, SOON, busy_boot_disk, dial, document, pattern, slot, stream_pair, tap, writing_boot_disk,
};
use dunlin_qemu::{
    DiskSource, Document, Event, MigrationOptions, MigrationStatus, Mode, Qemu, QemuError, Role, RootPort,
    RunState, Throttle, TimedEvent,
};
use serde_json::json;

/// Both sides prepared, nothing started.
pub(crate) struct Pair {
    pub(crate) source: Qemu,
    pub(crate) destination: Qemu,
    pub(crate) source_host: Host,
    pub(crate) destination_host: Host,
}

impl Pair {
    pub(crate) async fn new(document: &Document) -> Pair {
        let (source_host, destination_host) = (Host::new(), Host::new());
        let source = source_host.spawn(document, Mode::Boot).await;
        let destination = destination_host.spawn(document, Mode::Incoming).await;
        Pair { source, destination, source_host, destination_host }
    }

    async fn prepare(&self, options: &MigrationOptions) {
        for (qemu, role) in [(&self.source, Role::Source), (&self.destination, Role::Destination)] {
            qemu.prepare_migration(role, options).await.unwrap();
        }
    }

    async fn start(&self) {
        let (out, into) = stream_pair();
        self.destination.incoming_from_fd(into).await.unwrap();
        self.source.migrate_to_fd(out).await.unwrap();
    }
}

/// Counts what the boot disk's guest does.
async fn counter(qemu: &Qemu) -> String {
    let dump = json!({"command-line": "xp /1xb 0x8000"});
    qemu.qmp().execute("human-monitor-command", dump).await.unwrap().to_string()
}

pub(crate) async fn is_counting(qemu: &Qemu) {
    let begin = Instant::now();
    let first = counter(qemu).await;
    while counter(qemu).await == first {
        assert!(begin.elapsed() < SOON, "the guest does nothing");
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}

/// The BIOS has got to the boot disk of [`writing_boot_disk`].
pub(crate) async fn is_writing(qemu: &Qemu) {
    let written = || async {
        let dump = json!({"command-line": "xp /1xb 0x10000"});
        qemu.qmp().execute("human-monitor-command", dump).await.unwrap().to_string()
    };
    let (begin, first) = (Instant::now(), written().await);
    while written().await == first {
        assert!(begin.elapsed() < SOON, "the guest does nothing");
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
}

/// Starts a machine and lets its BIOS finish. Before, mirrors must not be played with: SeaBIOS resets the SCSI
/// controllers, and QEMU 7.2 then drains all disks inside the processor's thread, where a mirror that is just being
/// ended has been seen to hold the whole machine.
pub(crate) async fn run_past_the_bios(qemu: &Qemu, host: &Host) {
    let boot = DiskSource::read_only(host.disk("boot.raw", &busy_boot_disk()));
    qemu.attach_disk(slot(0, 0), &boot).await.unwrap();
    qemu.cont().await.unwrap();
    is_counting(qemu).await;
}

/// Waits for a state: QEMU tells a migration's end a moment before the machine's state follows.
pub(crate) async fn becomes(qemu: &Qemu, wanted: RunState) {
    let begin = Instant::now();
    loop {
        let state = qemu.status().await.unwrap();
        if state == wanted {
            return;
        }
        assert!(begin.elapsed() < SOON, "{state}, not {wanted}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_machine_moves_with_its_disk() {
    let pair = Pair::new(&document()).await;
    let Pair { source, destination, source_host, destination_host } = &pair;
    let bytes = pattern(8 << 20);
    let source_image = source_host.disk("scratch.raw", &bytes);
    let target_image = destination_host.disk("scratch.raw", &[]);
    std::fs::File::options().write(true).open(&target_image).unwrap().set_len(8 << 20).unwrap();
    let (boot, scratch) = (slot(0, 0), slot(2, 5));
    for (qemu, host, image) in
        [(source, source_host, &source_image), (destination, destination_host, &target_image)]
    {
        let boot_image = host.disk("boot.raw", &busy_boot_disk());
        qemu.attach_disk(boot, &DiskSource::read_only(boot_image)).await.unwrap();
        qemu.attach_disk(scratch, &DiskSource::writable(image)).await.unwrap();
        qemu.attach_nic(RootPort::new(1).unwrap(), "52:54:00:00:00:01".parse().unwrap(), tap())
            .await
            .unwrap();
    }
    let (mut source_events, mut destination_events) = (source.events(), destination.events());
    source.cont().await.unwrap();
    is_counting(source).await;
    assert_eq!(source.blocked_reasons().await.unwrap(), Vec::<String>::new());
    let options = MigrationOptions { throttle: Some(Throttle::default()), ..MigrationOptions::default() };
    pair.prepare(&options).await;

    let nbd = destination_host.path("nbd.sock");
    destination.nbd_server_start(&nbd).await.unwrap();
    let export = destination.nbd_export_add(scratch).await.unwrap();
    source.mirror_start(scratch, dial(&nbd), &export).await.unwrap();
    source.mirror_ready(scratch, SOON).await.unwrap();
    let job = source.mirror_job(scratch).await.unwrap().unwrap();
    assert!(job.ready && job.total >= 8 << 20 && job.copied == job.total, "{job:?}");

    pair.start().await;
    source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    source.mirror_finish(scratch).await.unwrap();
    destination.nbd_export_remove(scratch).await.unwrap();
    destination.nbd_server_stop().await.unwrap();
    source.migrate_continue().await.unwrap();
    let sent = source.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    destination.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    let ram = sent.ram.unwrap();
    assert!(ram.total >= 64 << 20 && ram.transferred > 0 && ram.dirty_sync_count >= 2, "{ram:?}");
    assert!(sent.downtime_ms.is_some() && sent.total_time_ms.is_some(), "{sent:?}");

    becomes(source, RunState::PostMigrate).await;
    becomes(destination, RunState::Paused).await;
    assert!(matches!(source.migrate_cancel().await, Err(QemuError::AlreadyCompleted)));
    destination.cont().await.unwrap();
    is_counting(destination).await;
    assert!(source.block_jobs().await.unwrap().is_empty());

    let seen = until_quiet(&mut source_events).await;
    let stop = seen.iter().position(|event| event.event == Event::Stop).expect("the source stops");
    let waits = seen
        .iter()
        .position(|event| event.event == Event::Migration(MigrationStatus::PreSwitchover))
        .expect("the source waits");
    let done = seen
        .iter()
        .position(|event| event.event == Event::Migration(MigrationStatus::Completed))
        .expect("the source is done");
    assert!(stop < waits && waits < done, "{seen:?}");
    assert!(seen.iter().any(|event| matches!(event.event, Event::MigrationPass(1))), "{seen:?}");
    assert!(
        seen.iter().any(|event| matches!(&event.event, Event::BlockJobReady { id } if id == "mirror-2-5"))
    );
    let arrived = until_quiet(&mut destination_events).await;
    let resumed = arrived.iter().find(|event| event.event == Event::Resume).expect("the destination runs");
    assert!(resumed.time > seen[stop].time);

    // The guest has not written to it: both images are what was there at the start.
    pair.source.shutdown(SOON).await.unwrap();
    pair.destination.shutdown(SOON).await.unwrap();
    assert!(std::fs::read(target_image).unwrap() == bytes, "the copy differs");
    assert!(std::fs::read(source_image).unwrap() == bytes, "the original changed");
}

async fn until_quiet(events: &mut dunlin_qemu::EventStream) -> Vec<TimedEvent> {
    let mut seen = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(100), events.next()).await {
        seen.push(event.expect("no event is lost"));
    }
    seen
}

#[tokio::test]
async fn a_cancel_at_the_switchover_leaves_the_source_running_and_a_second_try_works() {
    let document = document();
    let mut pair = Pair::new(&document).await;
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let boot = DiskSource::read_only(host.disk("boot.raw", &busy_boot_disk()));
        qemu.attach_disk(slot(0, 0), &boot).await.unwrap();
    }
    pair.source.cont().await.unwrap();
    is_counting(&pair.source).await;
    pair.source.migrate_cancel().await.expect("nothing to cancel is no error");
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    let waiting = pair.source.status().await.unwrap();
    assert!(matches!(waiting, RunState::FinishMigrate), "{waiting}");
    pair.source.migrate_cancel().await.unwrap();
    assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
    is_counting(&pair.source).await;
    let ended = pair.source.migration_reaches(MigrationStatus::Completed, SOON).await;
    assert!(
        matches!(ended, Err(QemuError::MigrationEnded { status: MigrationStatus::Cancelled, .. })),
        "{ended:?}"
    );
    let mut exited = pair.destination.exited();
    let report =
        tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert_eq!(report.status, Some(1));
    assert!(!report.stderr_tail.is_empty());

    let boot = DiskSource::read_only(pair.destination_host.path("boot.raw"));
    pair.destination = pair.destination_host.spawn(&document, Mode::Incoming).await;
    pair.destination.attach_disk(slot(0, 0), &boot).await.unwrap();
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    pair.source.migrate_continue().await.unwrap();
    pair.source.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    pair.destination.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    pair.destination.cont().await.unwrap();
    is_counting(&pair.destination).await;

    // It arrived: that is no reason to believe that it has left.
    assert_eq!(pair.destination.migration_info().await.unwrap().status, MigrationStatus::Completed);
    let options = MigrationOptions::default();
    pair.destination.prepare_migration(Role::Source, &options).await.unwrap();
    pair.destination.migrate_cancel().await.expect("nothing of it has been sent");
    // And what left once and was taken back has not left again.
    assert!(matches!(pair.source.migrate_cancel().await, Err(QemuError::AlreadyCompleted)));
    pair.source.cont().await.unwrap();
    pair.source.prepare_migration(Role::Source, &options).await.unwrap();
    assert_eq!(pair.source.migration_info().await.unwrap().status, MigrationStatus::Completed);
    pair.source.migrate_cancel().await.expect("nothing of this try has been sent");
}

#[tokio::test]
async fn a_destination_with_other_devices_fails_both_sides_and_the_source_runs_on() {
    let pair = Pair::new(&document()).await;
    let disk = DiskSource::writable(pair.source_host.disk("a.raw", &[0; 4096]));
    pair.source.attach_disk(slot(0, 0), &disk).await.unwrap();
    pair.source.cont().await.unwrap();
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    pair.source.migrate_continue().await.unwrap();
    let ended = pair.source.migration_reaches(MigrationStatus::Completed, SOON).await;
    assert!(
        matches!(ended, Err(QemuError::MigrationEnded { status: MigrationStatus::Failed, .. })),
        "{ended:?}"
    );
    becomes(&pair.source, RunState::Running).await;
    let mut exited = pair.destination.exited();
    let report =
        tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert_eq!(report.status, Some(1), "{report}");
}

/// What is taken of the guest's CPU time, once it is at least `wanted`.
async fn throttled(qemu: &Qemu, wanted: u8) -> u8 {
    let begin = Instant::now();
    loop {
        let info = qemu.migration_info().await.unwrap();
        assert!(matches!(info.status, MigrationStatus::Setup | MigrationStatus::Active), "{info:?}");
        match info.throttle_percent {
            Some(percent) if percent >= wanted => return percent,
            percent => assert!(begin.elapsed() < 3 * SOON, "{percent:?} of {wanted} percent; {info:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn limit_and_throttling_are_changed_while_memory_is_sent_and_a_long_limit_ends_it() {
    let pair = Pair::new(&document()).await;
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let boot = DiskSource::read_only(host.disk("boot.raw", &writing_boot_disk()));
        qemu.attach_disk(slot(0, 0), &boot).await.unwrap();
    }
    pair.source.cont().await.unwrap();
    // Switched on from the start, at the least that there is.
    let idle = Throttle { initial: 1, increment: 1, maximum: 1 };
    let mut options = MigrationOptions {
        max_bandwidth: 1 << 20,
        downtime_limit: Duration::from_millis(1),
        throttle: Some(idle),
        announce: false,
    };
    pair.prepare(&options).await;
    is_writing(&pair.source).await;
    pair.start().await;
    assert_eq!(throttled(&pair.source, 1).await, 1);

    // Not to be switched on or off now: that is why it is on from the start.
    let off = MigrationOptions { throttle: None, ..options.clone() };
    let refused = pair.source.set_migration_capabilities(Role::Source, &off).await;
    assert!(matches!(refused, Err(QemuError::PrepareMigration { .. })), "{refused:?}");
    // But how far it goes is: the next step leads from 1 to 40.
    options.throttle = Some(Throttle { initial: 40, increment: 39, maximum: 99 });
    pair.source.set_migration_parameters(Role::Source, &options).await.unwrap();
    // Or beyond, where it is looked at late.
    let percent = throttled(&pair.source, 2).await;
    assert!(percent >= 40, "{percent}");
    let info = pair.source.migration_info().await.unwrap();
    assert!(info.ram.unwrap().dirty_sync_count > 2 && info.expected_downtime_ms.is_some(), "{info:?}");

    options.downtime_limit = Duration::from_secs(2000);
    pair.source.set_migration_parameters(Role::Source, &options).await.unwrap();
    let begin = Instant::now();
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    options.downtime_limit = Duration::from_secs(2001);
    let beyond = pair.source.set_migration_parameters(Role::Source, &options).await;
    assert!(matches!(beyond, Err(QemuError::PrepareMigration { .. })), "{beyond:?}");
    pair.source.migrate_cancel().await.unwrap();
    assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
    assert_eq!(pair.source.migration_info().await.unwrap().throttle_percent, None);
}

#[tokio::test]
async fn another_machine_s_identity_is_refused() {
    let (source_host, destination_host) = (Host::new(), Host::new());
    let source = source_host.spawn(&document(), Mode::Boot).await;
    let destination = destination_host.spawn(&document(), Mode::Incoming).await;
    let pair = Pair { source, destination, source_host, destination_host };
    pair.source.cont().await.unwrap();
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    let mut exited = pair.destination.exited();
    let report =
        tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap().clone().unwrap();
    assert!(report.stderr_tail.to_lowercase().contains("uuid"), "{report}");
    assert!(matches!(
        pair.source.migration_reaches(MigrationStatus::Completed, SOON).await,
        Err(QemuError::MigrationEnded { status: MigrationStatus::Failed, .. })
    ));
}

#[tokio::test]
async fn a_mirror_is_aborted_in_step_out_of_step_and_with_a_silent_peer() {
    let pair = Pair::new(&document()).await;
    let bytes = pattern(4 << 20);
    let place = slot(0, 7);
    let original = pair.source_host.disk("a.raw", &bytes);
    pair.source.attach_disk(place, &DiskSource::writable(&original)).await.unwrap();
    let copy = pair.destination_host.disk("a.raw", &vec![0; 4 << 20]);
    pair.destination.attach_disk(place, &DiskSource::writable(&copy)).await.unwrap();
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    run_past_the_bios(&pair.source, &pair.source_host).await;

    pair.source.mirrors_abort(&[place]).await.expect("no mirror is no error");
    assert!(matches!(pair.source.mirror_finish(place).await, Err(QemuError::MirrorNotReady { .. })));
    let wrong = pair.source.mirror_start(place, dial(&nbd), "no-such-export").await;
    assert!(matches!(wrong, Err(QemuError::StartMirror { .. })), "{wrong:?}");

    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    pair.source.mirror_ready(place, SOON).await.unwrap();
    pair.source.mirrors_abort(&[place]).await.unwrap();

    // The destination stands still: its kernel takes what the socket holds, nothing is answered.
    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    let frozen = nix::unistd::Pid::from_raw(pair.destination.pid());
    nix::sys::signal::kill(frozen, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    pair.source.mirrors_abort(&[place]).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    nix::sys::signal::kill(frozen, nix::sys::signal::Signal::SIGCONT).unwrap();

    // And one whose peer goes away fails by itself, and is cleared away by an abort.
    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    pair.source.mirror_ready(place, SOON).await.unwrap();
    pair.destination.kill();
    pair.source.mirrors_abort(&[place]).await.unwrap();
    assert!(pair.source.block_jobs().await.unwrap().is_empty());
    assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
    pair.source.detach_disk(place).await.expect("nothing holds the disk any more");
    pair.source.shutdown(SOON).await.unwrap();
    assert!(std::fs::read(original).unwrap() == bytes);
}

/// The work's end, or nothing when it was dropped because it had waited more than `times` times.
pub(crate) async fn given_up_after<F: Future>(times: usize, work: F) -> Option<F::Output> {
    let mut work = std::pin::pin!(work);
    let mut left = times;
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(end) => Poll::Ready(Some(end)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

#[tokio::test]
async fn a_mirror_that_is_given_up_anywhere_leaves_nothing_that_the_next_one_meets() {
    let pair = Pair::new(&document()).await;
    let place = slot(0, 3);
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let image = DiskSource::writable(host.disk("a.raw", &pattern(1 << 20)));
        qemu.attach_disk(place, &image).await.unwrap();
    }
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    run_past_the_bios(&pair.source, &pair.source_host).await;

    let (mut starts, mut ends) = (0, 0);
    while given_up_after(starts, pair.source.mirror_start(place, dial(&nbd), &export)).await.is_none() {
        pair.source.mirrors_abort(&[place]).await.unwrap();
        pair.source
            .mirror_start(place, dial(&nbd), &export)
            .await
            .unwrap_or_else(|error| panic!("after a start that had waited {starts} times: {error}"));
        pair.source.mirror_ready(place, SOON).await.unwrap();
        pair.source.mirrors_abort(&[place]).await.unwrap();
        starts += 1;
    }
    pair.source.mirror_ready(place, SOON).await.unwrap();
    while given_up_after(ends, pair.source.mirror_finish(place)).await.is_none() {
        pair.source.mirrors_abort(&[place]).await.unwrap();
        pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
        pair.source.mirror_ready(place, SOON).await.unwrap();
        ends += 1;
    }
    assert!(starts >= 3 && ends >= 3, "each has that many commands: {starts}, {ends}");

    // A peer that never answers holds neither the machine nor the one who gives it up.
    let (socket, _silent) = stream_pair();
    let begin = Instant::now();
    let start = pair.source.mirror_start(place, socket, &export);
    tokio::time::timeout(Duration::from_millis(300), start).await.expect_err("nobody answers");
    let again = pair.source.mirror_start(place, dial(&nbd), &export).await;
    assert!(matches!(again, Err(QemuError::MirrorExists { .. })), "{again:?}");
    pair.source.mirrors_abort(&[place]).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(pair.source.status().await.unwrap(), RunState::Running);

    // A mirror that runs is not harmed by one too many.
    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    let again = pair.source.mirror_start(place, dial(&nbd), &export).await;
    assert!(matches!(again, Err(QemuError::MirrorExists { .. })), "{again:?}");
    pair.source.mirror_ready(place, SOON).await.unwrap();
    pair.source.mirror_finish(place).await.unwrap();
    assert!(pair.source.block_jobs().await.unwrap().is_empty());
    pair.source.detach_disk(place).await.expect("nothing holds the disk any more");
}

#[tokio::test]
async fn a_mirror_whose_peer_dies_in_step_is_not_finished_as_if_all_were_well() {
    let pair = Pair::new(&document()).await;
    let place = slot(0, 1);
    for (qemu, host) in [(&pair.source, &pair.source_host), (&pair.destination, &pair.destination_host)] {
        let image = DiskSource::writable(host.disk("a.raw", &pattern(1 << 20)));
        qemu.attach_disk(place, &image).await.unwrap();
    }
    let nbd = pair.destination_host.path("nbd.sock");
    pair.destination.nbd_server_start(&nbd).await.unwrap();
    let export = pair.destination.nbd_export_add(place).await.unwrap();
    run_past_the_bios(&pair.source, &pair.source_host).await;
    pair.source.mirror_start(place, dial(&nbd), &export).await.unwrap();
    pair.source.mirror_ready(place, SOON).await.unwrap();
    let mut exited = pair.destination.exited();
    pair.destination.kill();
    tokio::time::timeout(SOON, exited.wait_for(Option::is_some)).await.unwrap().unwrap();
    let finished = pair.source.mirror_finish(place).await;
    assert!(matches!(finished, Err(QemuError::MirrorFailed { .. })), "{finished:?}");
    pair.source.mirrors_abort(&[place]).await.unwrap();
    pair.source.detach_disk(place).await.unwrap();
}

#[tokio::test]
async fn a_shared_image_is_locked_by_the_side_that_runs() {
    let pair = Pair::new(&document()).await;
    let image = DiskSource::writable(pair.source_host.disk("shared.raw", &pattern(1 << 20)));
    for qemu in [&pair.source, &pair.destination] {
        qemu.attach_disk(slot(0, 0), &image).await.unwrap();
    }
    pair.source.cont().await.unwrap();
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    pair.source.migrate_continue().await.unwrap();
    pair.source.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    pair.destination.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    pair.destination.cont().await.unwrap();
    let second_copy = pair.source.cont().await;
    assert!(matches!(second_copy, Err(QemuError::Control { .. })), "{second_copy:?}");
    assert_eq!(pair.destination.status().await.unwrap(), RunState::Running);
    assert_ne!(pair.source.status().await.unwrap(), RunState::Running);
    // Once the destination is gone the source can have it back.
    pair.destination.shutdown(SOON).await.unwrap();
    pair.source.cont().await.unwrap();
    assert_eq!(pair.source.status().await.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_silent_nbd_server_does_not_hold_the_machine() {
    let host = Host::new();
    let qemu = host.spawn(&document(), Mode::Boot).await;
    let place = slot(1, 1);
    qemu.attach_disk(place, &DiskSource::writable(host.disk("a.raw", &[1; 4096]))).await.unwrap();
    run_past_the_bios(&qemu, &host).await;
    let (socket, _silent) = stream_pair();
    let begin = Instant::now();
    let refused = qemu.mirror_start(place, socket, "disk-1-1").await;
    assert!(matches!(refused, Err(QemuError::StartMirror { .. })), "{refused:?}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(qemu.status().await.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_refused_start_is_nothing_to_cancel() {
    let pair = Pair::new(&document()).await;
    pair.source.cont().await.unwrap();
    pair.prepare(&MigrationOptions::default()).await;
    pair.start().await;
    pair.source.migration_reaches(MigrationStatus::PreSwitchover, SOON).await.unwrap();
    pair.source.migrate_continue().await.unwrap();
    pair.source.migration_reaches(MigrationStatus::Completed, SOON).await.unwrap();
    becomes(&pair.source, RunState::PostMigrate).await;
    assert!(matches!(pair.source.migrate_cancel().await, Err(QemuError::AlreadyCompleted)));
    // It has moved; before it runs again it moves nowhere. That it did so once is no answer to the next try's end.
    pair.source.prepare_migration(Role::Source, &MigrationOptions::default()).await.unwrap();
    let refused = pair.source.migrate_to_fd(stream_pair().0).await;
    assert!(matches!(refused, Err(QemuError::StartMigration { .. })), "{refused:?}");
    pair.source.migrate_cancel().await.unwrap();
}
