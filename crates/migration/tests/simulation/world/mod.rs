//! The world between the shims and the coordinator.

mod machines;
mod nodes;
mod transfer;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use dunlin_migration::Moment;
use dunlin_migration::coordinator::{
    Coordinator, Deadlines, Effect as Order, Event as News, Failure, FailureKind, Outcome, Phase, Record,
    Report, StepId, Work,
};
use dunlin_migration::notice::{Notice, PhaseState, Progress};
use dunlin_migration::refusal::{Code, Refusal};
use dunlin_migration::session::{
    ALREADY_RESUMED, Action, Answer, Call, Cancelled, Completion, Effect, Event, Imported, Saved, Side,
    StateId, TransferFault,
};
use dunlin_wire::Any;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::{ContainerId, GuestPid, SandboxId, SessionId, Slot};

use crate::invariants;
use crate::shim::{Exits, Reply, Shim, Vm};

/// What a world does to those who live in it. Chances are percents.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// A message between the hosts is lost.
    pub(crate) drop: u8,
    /// It arrives twice.
    pub(crate) repeat: u8,
    /// A piece of work, or a message, takes seconds and overtakes deadlines.
    pub(crate) slow: u8,
    /// A piece of work fails.
    pub(crate) fail: u8,
    /// Before which event.
    pub(crate) faults: Vec<(u64, Fault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    SourceVmDies,
    DestinationVmDies,
    DestinationShimDies,
    /// For good; much later somebody says that it is off.
    DestinationHostDies,
    /// Nothing crosses for a while.
    Partition,
    PeerLost,
    Cancel,
    RecordFails,
}

impl Fault {
    pub(crate) const ALL: [Fault; 8] = [
        Fault::SourceVmDies,
        Fault::DestinationVmDies,
        Fault::DestinationShimDies,
        Fault::DestinationHostDies,
        Fault::Partition,
        Fault::PeerLost,
        Fault::Cancel,
        Fault::RecordFails,
    ];
}

#[derive(Debug, Clone)]
enum Item {
    /// Work reaches the node of that side.
    Arrive(Side, StepId, Work),
    /// An end of work reaches the coordinator.
    Answer(StepId, Result<Outcome, Failure>),
    Told(Side, Notice),
    /// A shim's work takes effect and ends.
    Carry(Side, Effect),
    Tick(Side),
    CoordinatorTick,
    /// The transfer reaches its next stage.
    Wire(u8),
    Heal,
    Fenced,
}

/// One piece of work as a node does it: calls, one after the other.
struct Script {
    side: Side,
    step: StepId,
    work: Work,
    calls: VecDeque<Call>,
}

pub(crate) struct World {
    plan: Plan,
    random: u64,
    now: Moment,
    queue: BinaryHeap<Reverse<(Moment, u64, usize)>>,
    items: Vec<Item>,
    coordinator: Coordinator,
    wake: Option<Moment>,
    pub(crate) source: Shim,
    pub(crate) destination: Shim,
    scripts: Vec<Script>,
    /// ConnectStreams is done when both halves are.
    halves: BTreeMap<StepId, u8>,
    partitioned: bool,
    host_dead: bool,
    record_fails: bool,
    /// A record was begun, so it may exist.
    pub(crate) committed: bool,
    /// It is durable.
    pub(crate) recorded: bool,
    record_step: Option<StepId>,
    /// What the source's transfer left for the destination.
    pub(crate) handoff: Option<Any>,
    /// What the record holds of it.
    pub(crate) recorded_handoff: Option<Any>,
    /// What the destination was given each time it was let run.
    pub(crate) ran_with: Vec<Option<Any>>,
    pub(crate) work_fails: bool,
    stage: u8,
    broken: bool,
    resumed_late: bool,
    report: Option<Report>,
    trace: Vec<String>,
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn sid() -> SessionId {
    SessionId::new("move").unwrap()
}

fn disk() -> Slot {
    Slot::new(0, 1).unwrap()
}

impl World {
    pub(crate) fn new(plan: &Plan) -> World {
        let second = Duration::from_secs(1);
        let deadlines = Deadlines {
            preflight: second,
            export: 3 * second,
            import: 2 * second,
            create_tasks: 2 * second,
            prepare: 2 * second,
            connect: 3 * second,
            begin_transfer: 2 * second,
            transfer: 20 * second,
            stall: 4 * second,
            blackout: 3 * second,
            commit: second,
            run: 2 * second,
            stop_source: 2 * second,
            clean_up: 2 * second,
            undo: 2 * second,
            abort: 4 * second,
            attempts: 8,
            resume_attempts: 30,
            backoff: ms(50),
            backoff_max: second,
        };
        World {
            plan: plan.clone(),
            random: plan.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: Moment::default(),
            queue: BinaryHeap::new(),
            items: Vec::new(),
            coordinator: Coordinator::new(deadlines),
            wake: None,
            source: Shim::new(Side::Source),
            destination: Shim::new(Side::Destination),
            scripts: Vec::new(),
            halves: BTreeMap::new(),
            partitioned: false,
            host_dead: false,
            record_fails: false,
            committed: false,
            recorded: false,
            record_step: None,
            handoff: None,
            recorded_handoff: None,
            ran_with: Vec::new(),
            work_fails: plan.fail > 0 || plan.slow > 0,
            stage: 0,
            broken: false,
            resumed_late: false,
            report: None,
            trace: Vec::new(),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.coordinator.phase()
    }

    pub(crate) fn last_report(&self) -> Report {
        self.report.clone().unwrap()
    }

    pub(crate) fn resumed_after_commit(&self) -> bool {
        self.resumed_late
    }

    pub(crate) fn trace(&self) -> String {
        format!("{:?}\n{}", self.plan, self.trace.join("\n"))
    }

    /// Runs until nothing is left to happen, asking the invariants after every event.
    pub(crate) fn run(&mut self) {
        self.coordinator_hears(News::Start);
        let mut event = 0;
        while let Some(Reverse((at, _, item))) = self.queue.pop() {
            self.now = self.now.max(at);
            let faults: Vec<Fault> =
                self.plan.faults.iter().filter(|(when, _)| *when == event).map(|(_, fault)| *fault).collect();
            for fault in faults {
                self.strike(fault);
                self.ask();
            }
            let item = self.items[item].clone();
            self.happen(item);
            self.ask();
            event += 1;
            assert!(event < 20_000, "every_wait_ends: the world does not come to rest\n{}", self.trace());
        }
        invariants::every_wait_ends(self);
        invariants::every_end_is_told(self);
        invariants::cancel_leaves_source_running(self);
        invariants::the_end_is_what_it_says(self);
    }

    fn ask(&self) {
        invariants::at_most_one_running_copy(self);
        invariants::at_least_one_copy_survives(self);
        invariants::who_runs_there_has_this_transfer_s_handoff(self);
        invariants::no_end_is_told_of_what_runs_elsewhere(self);
    }

    // Chance and time

    fn roll(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) % below
    }

    fn chance(&mut self, percent: u8) -> bool {
        self.roll(100) < u64::from(percent)
    }

    fn delay(&mut self) -> Duration {
        match self.chance(self.plan.slow) {
            true => ms(500 + self.roll(5000)),
            false => ms(1 + self.roll(60)),
        }
    }

    fn later(&mut self, wait: Duration, item: Item) {
        self.items.push(item);
        let number = self.items.len() - 1;
        self.queue.push(Reverse((self.now.after(wait), number as u64, number)));
    }

    /// Between the hosts.
    fn send(&mut self, item: Item) {
        let copies = 1 + u8::from(self.chance(self.plan.repeat));
        for _ in 0..copies {
            let lost = self.chance(self.plan.drop) || self.partitioned || self.host_dead;
            let wait = self.delay();
            if !lost {
                self.later(wait, item.clone());
            }
        }
    }

    fn note(&mut self, text: String) {
        self.trace.push(format!("{:>9.3} {text}", self.now.0.as_secs_f64()));
    }

    fn shim(&mut self, side: Side) -> &mut Shim {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    // What happens

    fn happen(&mut self, item: Item) {
        match item {
            Item::Arrive(side, step, work) => self.arrive(side, step, work),
            Item::Answer(step, Ok(outcome)) => {
                self.recorded |= self.record_step == Some(step);
                self.coordinator_hears(News::StepDone(step, outcome));
            }
            Item::Answer(step, Err(failure)) => self.coordinator_hears(News::StepFailed(step, failure)),
            Item::Told(Side::Source, notice) => self.coordinator_hears(News::SourceNotification(notice)),
            Item::Told(Side::Destination, notice) => {
                self.coordinator_hears(News::DestinationNotification(notice));
            }
            Item::Carry(side, effect) => self.carry(side, effect),
            Item::Tick(side) => {
                let now = self.now;
                let shim = self.shim(side);
                if shim.alive && shim.wake.is_some_and(|wake| wake <= now) {
                    shim.wake = None;
                    self.shim_hears(side, Event::Tick);
                }
            }
            Item::CoordinatorTick => {
                if self.wake.is_some_and(|wake| wake <= self.now) {
                    self.wake = None;
                    self.coordinator_hears(News::Tick);
                }
            }
            Item::Wire(stage) => self.wire(stage),
            Item::Heal => self.partitioned = false,
            Item::Fenced => self.coordinator_hears(News::DestinationConfirmedStopped),
        }
    }

    fn strike(&mut self, fault: Fault) {
        self.note(format!("FAULT {fault:?}"));
        match fault {
            Fault::SourceVmDies => self.vm_dies(Side::Source),
            Fault::DestinationVmDies => self.vm_dies(Side::Destination),
            Fault::DestinationShimDies => {
                self.destination.alive = false;
                self.vm_dies(Side::Destination);
            }
            Fault::DestinationHostDies => {
                self.destination.alive = false;
                self.host_dead = true;
                self.vm_dies(Side::Destination);
                self.later(Duration::from_secs(90), Item::Fenced);
            }
            Fault::Partition => {
                self.partitioned = true;
                self.break_wire("the network is cut");
                self.later(Duration::from_secs(30), Item::Heal);
            }
            Fault::PeerLost => self.coordinator_hears(News::PeerLost("no heartbeat".into())),
            Fault::Cancel => self.coordinator_hears(News::Cancel),
            Fault::RecordFails => self.record_fails = true,
        }
    }

    fn vm_dies(&mut self, side: Side) {
        let shim = self.shim(side);
        if matches!(shim.vm, Vm::None | Vm::Dead) && shim.alive {
            return;
        }
        shim.crashed = true;
        shim.vm = Vm::Dead;
        if shim.alive {
            self.shim_hears(side, Event::VmExited);
        }
        self.break_wire("a machine is gone");
    }
}
