//! A model of one shim: the real session, and a machine that is a word.

use std::collections::BTreeMap;

use dunlin_migration::Moment;
use dunlin_migration::session::{Answer, Call, CallId, Effect, Event, Limits, Session, Side};

/// The machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vm {
    /// Not made.
    None,
    /// Its guest executes.
    Running,
    /// The source's, in the blackout or after it.
    Paused,
    /// The destination's, receiving.
    Incoming,
    /// The destination's, complete and paused.
    Loaded,
    /// Its process is gone.
    Dead,
}

/// Whether a source tells of its tasks' ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exits {
    Told,
    Held,
    /// They are another host's.
    Dropped,
}

pub(crate) type Reply = Result<Answer, dunlin_migration::refusal::Refusal>;

pub(crate) struct Shim {
    pub(crate) session: Session,
    pub(crate) vm: Vm,
    /// The shim's process.
    pub(crate) alive: bool,
    /// A fault took the machine.
    pub(crate) crashed: bool,
    pub(crate) exits: Exits,
    pub(crate) ever_ran: bool,
    pub(crate) stopped_on_purpose: bool,
    /// This side of the transfer is complete.
    pub(crate) complete: bool,
    pub(crate) transferring: Option<dunlin_wire::ids::Epoch>,
    /// Calls without an answer yet, and the script that waits.
    pub(crate) waiting: BTreeMap<CallId, usize>,
    pub(crate) wake: Option<Moment>,
    last_call: u64,
}

impl Shim {
    pub(crate) fn new(side: Side) -> Shim {
        let seconds = std::time::Duration::from_secs;
        let limits = Limits {
            sockets: seconds(5),
            export: seconds(1),
            import: seconds(1),
            patch: seconds(1),
            create: seconds(1),
            adopt: seconds(1),
            blackout: seconds(4),
            cancel: seconds(1),
            finalize: seconds(1),
        };
        Shim {
            session: Session::new(limits),
            vm: match side {
                Side::Source => Vm::Running,
                Side::Destination => Vm::None,
            },
            alive: true,
            crashed: false,
            exits: Exits::Told,
            ever_ran: false,
            stopped_on_purpose: false,
            complete: false,
            transferring: None,
            waiting: BTreeMap::new(),
            wake: None,
            last_call: 0,
        }
    }

    pub(crate) fn thaw(&mut self) {
        if self.exits == Exits::Held {
            self.exits = Exits::Told;
        }
    }

    /// A source that lost its machine, and told everybody that its tasks have ended.
    pub(crate) fn told_the_end(&self) -> bool {
        self.alive && self.crashed && self.exits == Exits::Told
    }

    pub(crate) fn call(&mut self, now: Moment, call: Call, script: usize) -> Vec<Effect> {
        self.last_call += 1;
        let id = CallId(self.last_call);
        self.waiting.insert(id, script);
        self.session.step(now, Event::Call(id, call)).into_vec()
    }
}
