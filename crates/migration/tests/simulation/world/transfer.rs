//! The stream between the two machines, in three stages, and every way in which it breaks.

use super::*;

impl World {
    pub(super) fn wire(&mut self, stage: u8) {
        if self.broken || self.stage != stage {
            return;
        }
        if self.chance(self.plan.fail) {
            return self.break_wire("the stream broke");
        }
        let wait = self.delay();
        let (side, completion) = match stage {
            1 => {
                if self.source.vm == Vm::Running {
                    self.source.vm = Vm::Paused;
                }
                (Side::Source, Completion::BlackoutStarted { already: ms(1) })
            }
            2 => {
                if self.destination.vm != Vm::Incoming {
                    return self.break_wire("the receiver is gone");
                }
                self.destination.vm = Vm::Loaded;
                self.destination.complete = true;
                let progress = Progress::default();
                (Side::Destination, Completion::TransferCompleted { progress, handoff: None })
            }
            _ => {
                self.source.complete = true;
                let token = format!("{} at {:?}", self.plan.seed, self.now);
                let handoff = Any { type_url: "handoff".into(), value: token.into(), ..Any::default() };
                self.handoff = Some(handoff.clone());
                let progress = Progress::default();
                (Side::Source, Completion::TransferCompleted { progress, handoff: Some(handoff) })
            }
        };
        self.stage = stage + 1;
        if self.stage <= 3 {
            self.later(wait, Item::Wire(self.stage));
        }
        self.transfer_tells(side, completion);
    }

    pub(super) fn transfer_tells(&mut self, side: Side, completion: Completion) {
        let shim = self.shim(side);
        if let (Some(epoch), true) = (shim.transferring, shim.alive) {
            self.shim_hears(side, Event::Done(epoch, completion));
        }
    }

    /// Both ends that are not complete fail; a sender goes on by itself, a receiver exits.
    pub(super) fn break_wire(&mut self, why: &str) {
        if self.broken || self.stage > 3 {
            return;
        }
        self.broken = true;
        self.note(format!("  WIRE {why}"));
        for side in [Side::Source, Side::Destination] {
            if !self.shim(side).complete && self.shim(side).transferring.is_some() {
                self.transfer_fails(side, why);
            }
        }
    }

    pub(super) fn transfer_fails(&mut self, side: Side, why: &str) {
        self.give_up(side);
        let state = match side {
            Side::Source => PhaseState::SourceFailed,
            Side::Destination => PhaseState::DestinationFailed,
        };
        let fault = TransferFault { state, message: why.to_owned() };
        // A source that cannot see its own cancel through says so.
        let doubt = side == Side::Source && self.chance(self.plan.fail);
        self.transfer_tells(
            side,
            match doubt {
                true => Completion::TransferInDoubt(fault),
                false => Completion::TransferFailed(fault),
            },
        );
    }

    pub(super) fn give_up(&mut self, side: Side) {
        let shim = self.shim(side);
        match (side, shim.vm) {
            (Side::Source, Vm::Paused) => shim.vm = Vm::Running,
            (Side::Destination, Vm::Incoming) => shim.vm = Vm::Dead,
            _ => {}
        }
    }

    pub(super) fn cancel(&mut self, side: Side) -> Cancelled {
        if self.shim(side).complete {
            return Cancelled::AlreadyCompleted;
        }
        self.give_up(side);
        self.break_wire("a side cancelled");
        Cancelled::InTime
    }
}
