//! The transfer on the sending side: what QEMU is told, in which order, and how a transfer that fails is undone.
//!
//! ```text
//!  mirrors start ... all in step -> memory starts ... STOP (the guest stands still): streams are held
//!    -> pre-switchover -> mirrors end in step, NBD nodes go -> continue -> completed
//! ```

mod mirrors;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dunlin_migration::notice::{PhaseState, Progress};
use dunlin_migration::session::{Completion, TransferFault};
use dunlin_net::Tail;
use dunlin_net::tail::Span;
use dunlin_qemu::{
    Event, EventStream, EventsLost, MigrationStatus, QemuError, Role, TimedEvent, mirror_fault,
};
use dunlin_wire::Any;
use dunlin_wire::handoff::{FRAMES_MAX, Handoff};
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{Epoch, Slot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::options::{Course, Reading, Threshold};
use crate::sandbox::Sandbox;
use crate::vm::{Vm, qemu_slot};

/// Memory, while the guest runs: a caller's own bound comes long before.
const BROWNOUT_DEADLINE: Duration = Duration::from_secs(4 * 3600);
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);
/// From the guest's pause to the end of the transfer.
const SWITCHOVER_DEADLINE: Duration = Duration::from_secs(30);
/// QEMU reads no more for the guest from the moment at which it begins to stop the processors, and says so when they stand.
/// A frame that comes twice does no harm.
const STOP_SLACK: Duration = Duration::from_millis(20);

impl Sandbox {
    /// Sends the machine and tells how that ended, with where the standard streams stood at the pause; progress goes to
    /// the session on the way.
    pub(super) async fn send_away(
        &self,
        epoch: Epoch,
        sockets: HashMap<Stream, OwnedFd>,
        stop: &CancellationToken,
    ) -> Completion {
        let vm = match self.inner().vm(&self.id) {
            Ok(vm) => vm,
            Err(error) => return Completion::TransferFailed(source_failed(error.to_string())),
        };
        // Each lock ends with its statement: in one expression they would meet.
        let course = self.inner().transfer.clone().map(Course::new);
        let memory = vm.document.memory_mib << 20;
        let progress = Progress {
            memory_total: memory,
            memory_remaining: memory,
            disk_total: self.disk_bytes(),
            ..Progress::default()
        };
        let steps = Steps::new(course.as_ref().is_some_and(|course| course.options().tracing));
        let mut sending = Sending {
            sandbox: self,
            vm: &vm,
            epoch,
            disks: Vec::new(),
            sent: HashMap::new(),
            course,
            progress,
            memory_begun: false,
            memory: None,
            handoff: None,
            tails: Vec::new(),
            stopped: None,
            steps,
        };
        let result = tokio::select! {
            result = sending.run(sockets) => result,
            () = stop.cancelled() => Err(cancelled()),
        };
        match result {
            Ok(progress) => Completion::TransferCompleted { progress, handoff: sending.handoff },
            Err(fault) => sending.undo(fault).await,
        }
    }

    /// What the mirrored disks hold: about what their mirrors will send.
    fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let inner = self.inner();
        let writable = inner.scsi.disks().filter(|(_, disk)| disk.is_mirrored());
        let files = writable.filter_map(|(_, disk)| std::fs::metadata(disk.path.as_ref()?).ok());
        files.map(|meta| meta.blocks() * 512).sum()
    }
}

struct Sending<'a> {
    sandbox: &'a Sandbox,
    vm: &'a Arc<Vm>,
    epoch: Epoch,
    /// Mirrors that were begun and not yet ended.
    disks: Vec<Slot>,
    sent: HashMap<Slot, u64>,
    course: Option<Course>,
    progress: Progress,
    /// Before it QEMU's figures are those of an earlier try, if there are any.
    memory_begun: bool,
    /// A copy of the socket that memory goes through, to hang up on.
    memory: Option<OwnedFd>,
    /// Where the standard streams stood at the pause.
    handoff: Option<Any>,
    /// What is sent to each NIC, by its id.
    tails: Vec<(String, Tail)>,
    /// When the guest came to a stand, by QEMU's word.
    stopped: Option<SystemTime>,
    steps: Steps,
}

impl Sending<'_> {
    async fn run(&mut self, sockets: HashMap<Stream, OwnedFd>) -> Result<Progress, TransferFault> {
        let mut memory = None;
        let fault = |action: &str, error: QemuError| source_failed(format!("{action} failed: {error}"));
        let disks = sockets.keys().filter_map(|stream| match stream {
            Stream::Memory => None,
            Stream::Disk(slot) => Some(*slot),
        });
        self.disks = disks.collect();
        // Of an earlier try that could not clear them away. Counted as begun from here on: given up in the middle of this, or
        // of a start, there is something to end.
        let cleared = self.end_mirrors().await;
        cleared.map_err(|error| fault("ending a disk's former mirror", error))?;
        for (stream, socket) in sockets {
            match stream {
                Stream::Memory => memory = Some(socket),
                Stream::Disk(slot) => {
                    self.vm
                        .qemu
                        .mirror_start(qemu_slot(slot), socket, &export_name(slot))
                        .await
                        .map_err(|error| fault("starting a disk's mirror", error))?;
                }
            }
        }
        let memory =
            memory.ok_or_else(|| source_failed("no socket for memory was handed over".to_owned()))?;
        self.sandbox.hand_over_shared().map_err(source_failed)?;
        self.mirrors_in_step().await?;
        self.steps.ended("disks copied once");

        // Subscribed before the start, and before a last look at the mirrors: nothing is missed.
        let mut events = self.vm.qemu.events();
        self.mirrors_stand().await?;
        let copy = memory.try_clone();
        self.memory = Some(copy.map_err(|error| source_failed(format!("the memory's socket: {error}")))?);
        self.vm.qemu.migrate_to_fd(memory).await.map_err(|error| fault("starting the migration", error))?;
        self.memory_begun = true;
        self.tails = self.sandbox.follow_frames();
        match tokio::time::timeout(BROWNOUT_DEADLINE, self.brownout(&mut events)).await {
            Ok(result) => result?,
            Err(_) => {
                let hours = BROWNOUT_DEADLINE.as_secs() / 3600;
                return Err(source_failed(format!("memory was sent for {hours} h without coming to an end")));
            }
        }
        self.blackout(&mut events).await
    }

    /// The guest runs and memory is sent, until QEMU pauses it.
    async fn brownout(&mut self, events: &mut EventStream) -> Result<(), TransferFault> {
        let mut period = tokio::time::interval(PROGRESS_PERIOD);
        loop {
            tokio::select! {
                event = events.next() => match timed(event)? {
                    // The guest stands still from here; QEMU drains its disks before it says that it
                    // waits at the switchover.
                    TimedEvent { event: Event::Stop, time } => {
                        let since_epoch = time.unix_nanos().map(Duration::from_nanos);
                        self.stopped = since_epoch.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
                        return Ok(());
                    }
                    TimedEvent { event, .. } => match event {
                    Event::MigrationPass(pass) => {
                        self.progress.passes = pass;
                        self.steer(pass).await?;
                    }
                    event => self.ends(&event).await?,
                    }
                },
                _ = period.tick() => self.report().await,
            }
        }
    }

    /// The guest stands still: streams are held, mirrors end in step, the last of memory goes.
    async fn blackout(&mut self, events: &mut EventStream) -> Result<Progress, TransferFault> {
        let begun = Instant::now();
        self.steps.ended("memory sent while the guest ran");
        self.handoff = Some(self.sandbox.hold_streams().map_err(source_failed)?);
        self.sandbox.inner().blackout = true;
        self.sandbox.mover.done(self.epoch, Completion::BlackoutStarted { already: self.stood() });
        self.steps.ended("streams held");
        let threshold = self.course.as_ref().and_then(|course| course.options().threshold());
        let limit = match threshold {
            Some(Threshold { after, cancels: true }) => after.min(SWITCHOVER_DEADLINE),
            Some(Threshold { cancels: false, .. }) | None => SWITCHOVER_DEADLINE,
        };
        let switched = tokio::time::timeout_at(begun + limit, self.switch_over(events)).await;
        match (switched, threshold) {
            (Ok(result), threshold) => {
                let paused = begun.elapsed();
                if let Some(Threshold { after, .. }) = threshold
                    && paused > after
                {
                    tracing::warn!(?paused, threshold = ?after, "the guest stood still for longer than the threshold");
                }
                result
            }
            (Err(_), Some(Threshold { after, cancels: true })) if after < SWITCHOVER_DEADLINE => {
                Err(TransferFault {
                    state: PhaseState::Cancelled,
                    message: format!(
                        "blackout_time_threshold_for_cancelling_migration: the guest stood still for {after:?} and the rest of it \
                         was not sent; it goes on here; allow more, or move when it writes less"
                    ),
                })
            }
            (Err(_), _) => Err(source_failed(format!(
                "the switchover did not end within {} s",
                SWITCHOVER_DEADLINE.as_secs()
            ))),
        }
    }

    /// For how long the guest has stood still, by QEMU's word for when it came to a stand: both are this host's clock. One
    /// that was set meanwhile is not believed beyond what the switchover may take.
    fn stood(&self) -> Duration {
        let since = self.stopped.and_then(|stopped| SystemTime::now().duration_since(stopped).ok());
        since.unwrap_or_default().min(SWITCHOVER_DEADLINE)
    }

    async fn switch_over(&mut self, events: &mut EventStream) -> Result<Progress, TransferFault> {
        loop {
            match told(events.next().await)? {
                Event::Migration(MigrationStatus::PreSwitchover) => {
                    self.steps.ended("disks drained");
                    self.settle_disks().await?;
                    self.steps.ended("mirrors ended");
                    let went_on = self.vm.qemu.migrate_continue().await;
                    went_on.map_err(|error| {
                        source_failed(format!("continuing at the switchover failed: {error}"))
                    })?;
                }
                Event::Migration(MigrationStatus::Completed) => {
                    self.steps.ended("the last of memory and the devices sent");
                    self.hand_off_frames();
                    return Ok(self.completed().await);
                }
                event => self.ends(&event).await?,
            }
        }
    }

    /// The machine is complete elsewhere: what came for it here goes along.
    fn hand_off_frames(&mut self) {
        let tails = std::mem::take(&mut self.tails);
        let (Some(stopped), Some(handoff)) = (self.stopped, &self.handoff) else { return };
        let mut left = FRAMES_MAX;
        let mut frames = BTreeMap::new();
        for (nic, tail) in tails {
            let of_nic = tail.end(Span { since: stopped, before: STOP_SLACK, most: left });
            left -= of_nic.iter().map(Vec::len).sum::<usize>();
            if !of_nic.is_empty() {
                frames.insert(nic, of_nic);
            }
        }
        if frames.is_empty() {
            return;
        }
        let count: usize = frames.values().map(Vec::len).sum();
        tracing::info!(count, bytes = FRAMES_MAX - left, "frames that came during the pause go along");
        // Without them their senders send again; without the streams' positions output would come twice.
        let sealed = Handoff::open(handoff).and_then(|streams| Handoff { frames, ..streams }.seal());
        match sealed {
            Ok(sealed) => self.handoff = Some(sealed),
            Err(error) => tracing::warn!(%error, "frames that came during the pause are lost"),
        }
    }

    /// Events that end a transfer at any time; others are nothing to it.
    async fn ends(&self, event: &Event) -> Result<(), TransferFault> {
        let fallen = |slot: &Slot| Some((*slot, mirror_fault(event, qemu_slot(*slot))?));
        if let Some((slot, fault)) = self.disks.iter().find_map(fallen) {
            return Err(self.mirror_fell(slot, fault).await);
        }
        match event {
            Event::Migration(MigrationStatus::Failed) => Err(self.why().await),
            Event::Migration(MigrationStatus::Cancelled) => Err(cancelled()),
            Event::Migration(MigrationStatus::Unknown(status)) => {
                Err(source_failed(format!("QEMU reports the unknown migration status {status:?}")))
            }
            Event::Shutdown { guest: true, .. } => Err(TransferFault {
                state: PhaseState::GuestInitiatedCancellation,
                message: "the guest shut down during the migration".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// A pass begins: what the options say of it is set, or it is one too many.
    async fn steer(&mut self, pass: u64) -> Result<(), TransferFault> {
        let Some(course) = &mut self.course else { return Ok(()) };
        // The last pass may be about to end in the pause: nothing is asked there that nobody needs.
        let reading = match course.options().needs_reading() {
            true => reading(self.vm).await,
            false => Reading::default(),
        };
        let options = course
            .pass(pass, reading)
            .map_err(|error| TransferFault { state: PhaseState::Cancelled, message: error.to_string() })?;
        if let Some(options) = options {
            let (limit, throttle) = (options.downtime_limit, options.throttle);
            tracing::info!(
                pass,
                ?limit,
                ?throttle,
                "another limit for the guest's pause, or another throttling"
            );
            if let Err(error) = self.vm.qemu.set_migration_parameters(Role::Source, &options).await {
                tracing::warn!(%error, "it stays as it was");
            }
        }
        Ok(())
    }

    async fn report(&mut self) {
        self.read_figures().await;
        self.sandbox.mover.done(self.epoch, Completion::TransferProgressed(self.progress));
    }

    async fn completed(&mut self) -> Progress {
        self.read_figures().await;
        self.progress
    }

    async fn read_figures(&mut self) {
        if self.memory_begun
            && let Ok(info) = self.vm.qemu.migration_info().await
        {
            if let Some(ram) = info.ram {
                self.progress.memory_total = ram.total;
                self.progress.memory_remaining = ram.remaining;
                self.progress.memory_sent = ram.transferred;
                self.progress.passes = ram.dirty_sync_count;
            }
            self.progress.downtime = info.downtime_ms.map(Duration::from_millis);
        }
        self.count_disks();
    }

    async fn why(&self) -> TransferFault {
        let text = match self.vm.qemu.migration_info().await {
            Ok(info) => info.error,
            Err(error) => Some(error.to_string()),
        };
        source_failed(text.unwrap_or_else(|| {
            "QEMU gave up the migration, most likely because the destination closed the stream".to_owned()
        }))
    }

    async fn end_mirrors(&self) -> Result<(), QemuError> {
        let disks: Vec<_> = self.disks.iter().copied().map(qemu_slot).collect();
        self.vm.qemu.mirrors_abort(&disks).await
    }

    async fn give_up_mirrors(&mut self) {
        if let Err(error) = self.end_mirrors().await {
            tracing::warn!(%error, "ending the mirrors");
        }
        self.disks.clear();
    }

    /// The migration did not complete: mirrors end, the guest goes on here. Unless it completed all the same, while
    /// this side was about to give it up: then that is what is told, because the machine may run elsewhere.
    async fn undo(mut self, fault: TransferFault) -> Completion {
        if self.memory.is_none() {
            // The guest runs, and QEMU hears: they end in order, without being hung up on.
            self.give_up_mirrors().await;
        }
        // The guest may stand still meanwhile, and QEMU wait for a peer that says nothing.
        let disks: Vec<_> = self.disks.iter().copied().map(qemu_slot).collect();
        let ended = self.vm.qemu.take_back(&disks, self.memory.as_ref(), self.stopped.is_some()).await;
        self.give_up_mirrors().await;
        match ended {
            // QEMU lets a guest that ran run again by itself.
            Ok(()) => {
                // The destination may have said that the guest is there.
                self.sandbox.announce();
                self.sandbox.release_streams();
                Completion::TransferFailed(fault)
            }
            Err(QemuError::AlreadyCompleted) => {
                tracing::warn!(fault = fault.message, "the transfer completed before it could be given up");
                // The pause may have been missed; the streams stand where it left them.
                self.handoff = self
                    .sandbox
                    .hold_streams()
                    .inspect_err(|error| tracing::error!(error, "nothing is handed off"))
                    .ok();
                let progress = self.completed().await;
                self.hand_off_frames();
                Completion::TransferCompleted { progress, handoff: self.handoff.take() }
            }
            // Nobody will decide about a machine that is gone: what it had said is handed on.
            Err(_) if self.vm.qemu.exited().borrow().is_some() => {
                self.sandbox.release_streams();
                Completion::TransferFailed(fault)
            }
            Err(error) => {
                let message =
                    format!("{}; and it is not known whether it still moves: {error}", fault.message);
                Completion::TransferInDoubt(TransferFault { message, ..fault })
            }
        }
    }
}

async fn reading(vm: &Vm) -> Reading {
    match vm.qemu.migration_info().await {
        Ok(info) => Reading {
            expected_downtime: info.expected_downtime_ms.map(Duration::from_millis),
            throttle: info.throttle_percent,
        },
        Err(error) => {
            tracing::warn!(%error, "the transfer is steered without a reading");
            Reading::default()
        }
    }
}

/// What a transfer consists of, with the time that each step took, when that is to be logged.
struct Steps {
    logged: bool,
    last: Instant,
}

impl Steps {
    fn new(logged: bool) -> Steps {
        Steps { logged, last: Instant::now() }
    }

    fn ended(&mut self, step: &str) {
        if self.logged {
            tracing::info!(step, took = ?self.last.elapsed(), "transfer");
        }
        self.last = Instant::now();
    }
}

/// The next event, or why there is none.
fn told(event: Option<Result<TimedEvent, EventsLost>>) -> Result<Event, TransferFault> {
    timed(event).map(|event| event.event)
}

/// The next event and its time.
fn timed(event: Option<Result<TimedEvent, EventsLost>>) -> Result<TimedEvent, TransferFault> {
    match event {
        Some(Ok(event)) => Ok(event),
        // The reader was too slow for the queue; what was decided meanwhile is not known.
        Some(Err(lost)) => Err(source_failed(lost.to_string())),
        None => Err(source_failed("QEMU ended during the migration".to_owned())),
    }
}

/// The NBD export of a disk.
fn export_name(slot: Slot) -> String {
    format!("disk-{}-{}", slot.controller(), slot.lun())
}

fn source_failed(message: String) -> TransferFault {
    TransferFault { state: PhaseState::SourceFailed, message }
}

fn cancelled() -> TransferFault {
    TransferFault { state: PhaseState::Cancelled, message: "the migration was cancelled".to_owned() }
}
