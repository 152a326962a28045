//! What the shims' work does to the machines.

use super::*;

impl World {
    pub(super) fn shim_hears(&mut self, side: Side, event: Event) {
        let now = self.now;
        let state = self.shim(side).session.view().id();
        self.note(format!("  {side:?} in {state}: {event:?}"));
        let effects = self.shim(side).session.step(now, event).into_vec();
        self.carry_all(side, effects);
    }

    pub(super) fn carry_all(&mut self, side: Side, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Reply(call, reply) => {
                    let script = self.shim(side).waiting.remove(&call).expect("each call is answered once");
                    self.replied(script, reply);
                }
                Effect::Notify { notice, .. } => {
                    let item = Item::Told(side, notice);
                    match side {
                        // The source's stream does not leave the host, and keeps its order.
                        Side::Source => self.later(ms(1), item),
                        Side::Destination => self.send(item),
                    }
                }
                Effect::WakeAt(moment) => {
                    self.shim(side).wake = Some(moment);
                    let wait = moment.since(self.now);
                    self.later(wait, Item::Tick(side));
                }
                // At once, as closing a socket is.
                Effect::CloseSockets { .. } => self.break_wire("a side closed its sockets"),
                Effect::Thaw { .. } => self.shim(side).thaw(),
                Effect::AbortMigrated { .. } | Effect::EndNotifications { .. } => {}
                work => {
                    let wait = self.delay();
                    self.later(wait, Item::Carry(side, work));
                }
            }
        }
    }

    pub(super) fn carry(&mut self, side: Side, effect: Effect) {
        if !self.shim(side).alive {
            return;
        }
        let fails = self.chance(self.plan.fail);
        let fault = || Err(Refusal::unknown("it did not work"));
        let (epoch, completion) = match effect {
            Effect::InitializeSource { epoch, .. } => {
                if !fails && self.source.vm != Vm::Dead {
                    self.source.exits = Exits::Held;
                }
                let fails = fails || self.source.vm == Vm::Dead;
                (epoch, Completion::VmInitialized(if fails { fault() } else { Ok(()) }))
            }
            Effect::Save { epoch } => {
                let saved =
                    Saved { config: Any::default(), sandbox_state: None, disks: BTreeSet::from([disk()]) };
                (
                    epoch,
                    Completion::Saved(if fails { Err(Refusal::unknown("a save failed")) } else { Ok(saved) }),
                )
            }
            Effect::Import { epoch, .. } => {
                let containers = BTreeSet::from([ContainerId::new("web").unwrap()]);
                (epoch, Completion::Imported(Ok(Imported { containers, disks: BTreeSet::from([disk()]) })))
            }
            Effect::Patch { epoch, source, .. } => {
                (epoch, Completion::ContainerPatched { source, result: Ok(GuestPid(9)) })
            }
            Effect::CreateDestinationVm { epoch, .. } => {
                if !fails && self.destination.vm == Vm::None {
                    self.destination.vm = Vm::Incoming;
                }
                (epoch, Completion::VmCreated(if fails { fault() } else { Ok(()) }))
            }
            Effect::AdoptSocket { epoch, stream, .. } => {
                (epoch, Completion::SocketAdopted { stream, result: if fails { fault() } else { Ok(()) } })
            }
            Effect::StartTransfer { epoch, side } => {
                self.shim(side).transferring = Some(epoch);
                if self.broken {
                    return self.transfer_fails(side, "the peer's end is closed");
                }
                if self.source.transferring.is_some() && self.destination.transferring.is_some() {
                    self.stage = 1;
                    let wait = self.delay();
                    self.later(wait, Item::Wire(1));
                }
                return;
            }
            Effect::CancelTransfer { epoch, side } => (epoch, Completion::CancelDone(Ok(self.cancel(side)))),
            Effect::ResumeSource { epoch, .. } => {
                let dead = self.source.vm == Vm::Dead;
                if !dead {
                    self.source.vm = Vm::Running;
                    self.source.thaw();
                }
                (epoch, Completion::Resumed(if dead || fails { fault() } else { Ok(()) }))
            }
            Effect::RunDestination { epoch, handoff } => {
                let loaded = matches!(self.destination.vm, Vm::Loaded | Vm::Running);
                // A failure here may come before the guest runs, or after.
                if loaded && (!fails || self.chance(50)) {
                    self.destination.vm = Vm::Running;
                    self.destination.ever_ran = true;
                    self.ran_with.push(handoff);
                }
                (epoch, Completion::Resumed(if !loaded || fails { fault() } else { Ok(()) }))
            }
            Effect::StopVm { epoch, side } => {
                if side == Side::Source {
                    self.source.exits = Exits::Dropped;
                }
                if !fails {
                    let shim = self.shim(side);
                    if shim.vm != Vm::Dead {
                        shim.vm = Vm::Dead;
                        shim.stopped_on_purpose = true;
                    }
                    self.break_wire("a machine was stopped");
                }
                (epoch, Completion::Stopped(if fails { fault() } else { Ok(()) }))
            }
            other => panic!("not work: {other:?}"),
        };
        self.shim_hears(side, Event::Done(epoch, completion));
    }
}
