//! The coordinator's orders, and what the nodes of both hosts make of them.

use super::*;

impl World {
    pub(super) fn coordinator_hears(&mut self, news: News) {
        self.note(format!("coordinator in {}: {news}", self.coordinator.phase()));
        for order in self.coordinator.step(self.now, news) {
            match order {
                Order::Begin(step, work) => self.begin(step, work),
                // The task goes on in its node, as a dropped call does.
                Order::Abandon(_) | Order::CancelAnswer(_) => {}
                Order::Report(report) => self.report = Some(report),
                Order::WakeAt(moment) => {
                    self.wake = Some(moment);
                    let wait = moment.since(self.now);
                    self.later(wait, Item::CoordinatorTick);
                }
            }
        }
    }

    pub(super) fn begin(&mut self, step: StepId, work: Work) {
        self.note(format!("  begin {} {}", step.0, work.name()));
        match &work {
            Work::Preflight | Work::SourceRemoveContainerdObjects => {
                let wait = self.delay();
                self.later(wait, Item::Answer(step, Ok(Outcome::Done)));
            }
            Work::Record(Record::Committed { handoff }) => {
                self.committed = true;
                self.recorded_handoff.clone_from(handoff);
                self.record_step = Some(step);
                let wait = self.delay();
                let answer = match self.record_fails {
                    true => Err(Failure::new(FailureKind::Refused, "the disk is full")),
                    false => Ok(Outcome::Done),
                };
                self.later(wait, Item::Answer(step, answer));
            }
            Work::SourceExport
            | Work::SourceTransfer
            | Work::SourceStop
            | Work::SourceCleanup
            | Work::SourceCancel => {
                // One connection to a shim of this host: in order, nothing lost.
                self.arrive(Side::Source, step, work);
            }
            Work::SourceResume { .. } => {
                self.resumed_late |= self.committed;
                self.arrive(Side::Source, step, work);
            }
            Work::ConnectStreams { .. } => {
                self.arrive(Side::Source, step, work.clone());
                self.send(Item::Arrive(Side::Destination, step, work));
            }
            Work::DestinationImport { .. }
            | Work::DestinationCreateTasks
            | Work::DestinationPrepare
            | Work::DestinationTransfer
            | Work::DestinationRun { .. }
            | Work::DestinationCleanup
            | Work::DestinationAbort => self.send(Item::Arrive(Side::Destination, step, work)),
        }
    }

    pub(super) fn arrive(&mut self, side: Side, step: StepId, work: Work) {
        if side == Side::Destination && self.host_dead {
            return;
        }
        if !self.shim(side).alive {
            // Its node sees that the process, and with it the machine, is gone.
            let answer = match work {
                Work::DestinationAbort => Ok(Outcome::Done),
                _ => Err(Failure::new(FailureKind::Gone, "the shim is gone")),
            };
            return self.answer(side, step, answer);
        }
        let session = sid();
        let finalize = |action, destination_stopped| Call::Finalize {
            session: sid(),
            action,
            destination_stopped,
            handoff: None,
        };
        let adopt = |stream| Call::AdoptSocket { session: sid(), stream };
        let cid = |text| ContainerId::new(text).unwrap();
        let calls = match &work {
            Work::SourceExport => vec![Call::PrepareAndExport { session }],
            Work::DestinationImport { config } => vec![Call::Import {
                session,
                sandbox: SandboxId::new("pod-b").unwrap(),
                config: config.clone(),
            }],
            Work::DestinationCreateTasks => {
                vec![Call::PatchContainer { source: cid("web"), container: cid("web-b") }]
            }
            Work::DestinationPrepare => vec![Call::PrepareSandbox { session }],
            Work::ConnectStreams { .. } => vec![adopt(Stream::Disk(disk())), adopt(Stream::Memory)],
            Work::SourceTransfer | Work::DestinationTransfer => {
                vec![Call::Transfer { session, timeout: Duration::ZERO }]
            }
            Work::DestinationRun { handoff } => vec![Call::Finalize {
                session,
                action: Action::Resume,
                destination_stopped: false,
                handoff: handoff.clone(),
            }],
            Work::SourceStop => vec![finalize(Action::Stop, false)],
            Work::SourceResume { destination_stopped } => {
                vec![finalize(Action::Resume, *destination_stopped)]
            }
            Work::SourceCleanup | Work::DestinationCleanup => vec![Call::Cleanup { session }],
            Work::SourceCancel => vec![Call::Cancel { session }],
            Work::DestinationAbort => {
                vec![
                    Call::Cancel { session: sid() },
                    finalize(Action::Stop, false),
                    Call::Cleanup { session },
                ]
            }
            Work::Preflight | Work::Record(_) | Work::SourceRemoveContainerdObjects => Vec::new(),
        };
        self.scripts.push(Script { side, step, work, calls: calls.into() });
        self.next_call(self.scripts.len() - 1);
    }

    pub(super) fn next_call(&mut self, script: usize) {
        let Script { side, step, ref mut calls, .. } = self.scripts[script];
        match calls.pop_front() {
            Some(call) => {
                let now = self.now;
                self.note(format!("  {side:?} is called: {call:?}"));
                let effects = self.shim(side).call(now, call, script);
                self.carry_all(side, effects);
            }
            None => self.answer(side, step, Ok(Outcome::Done)),
        }
    }

    pub(super) fn answer(&mut self, side: Side, step: StepId, answer: Result<Outcome, Failure>) {
        if side == Side::Destination {
            return self.send(Item::Answer(step, answer));
        }
        let wait = ms(self.roll(3));
        self.later(wait, Item::Answer(step, answer));
    }

    pub(super) fn replied(&mut self, script: usize, reply: Reply) {
        let Script { side, step, ref work, ref calls, .. } = self.scripts[script];
        let (work, left, last) = (work.clone(), calls.len(), calls.is_empty());
        let state = self.shim(side).session.view().id();
        self.note(format!(
            "  {side:?} in {state} replies to {}: {}",
            work.name(),
            match &reply {
                Ok(_) => "ok".to_owned(),
                Err(refusal) => format!("{:?} {}", refusal.code, refusal.message),
            }
        ));
        let failure = |kind, refusal: &Refusal| Err(Failure::new(kind, refusal.message.clone()));
        match (&work, reply) {
            (Work::SourceExport, Ok(Answer::Exported { config, .. })) => {
                self.answer(side, step, Ok(Outcome::Exported { config, disks: vec![disk()] }));
            }
            (Work::ConnectStreams { .. }, Ok(_)) if last => {
                let halves = self.halves.entry(step).or_insert(0);
                *halves |= if side == Side::Source { 1 } else { 2 };
                if *halves == 3 {
                    self.answer(Side::Destination, step, Ok(Outcome::Done));
                }
            }
            (_, Ok(_)) => self.next_call(script),
            (Work::DestinationAbort, Err(refusal)) if refusal.code == Code::InvalidArgument => {
                let kind = match self.destination.vm {
                    Vm::Running => FailureKind::Runs,
                    _ => FailureKind::NoSession,
                };
                self.answer(side, step, failure(kind, &refusal));
            }
            // Cancel was refused: already complete, or decided. The STOP that follows tells.
            (Work::DestinationAbort, Err(_)) if left == 2 => self.next_call(script),
            (Work::DestinationAbort, Err(refusal)) if refusal.message.contains(ALREADY_RESUMED) => {
                self.answer(side, step, failure(FailureKind::Runs, &refusal));
            }
            (Work::SourceCancel, Err(_)) if matches!(state, StateId::Cancelled | StateId::Finalized) => {
                self.answer(side, step, Ok(Outcome::Done));
            }
            (_, Err(refusal)) if refusal.code == Code::InvalidArgument => {
                self.answer(side, step, failure(FailureKind::NoSession, &refusal));
            }
            (Work::SourceResume { .. }, Err(refusal)) if self.source.vm == Vm::Dead => {
                self.answer(side, step, failure(FailureKind::Gone, &refusal));
            }
            (_, Err(refusal)) if refusal.code == Code::DeadlineExceeded => {
                self.answer(side, step, failure(FailureKind::Silent, &refusal));
            }
            (_, Err(refusal)) => self.answer(side, step, failure(FailureKind::Refused, &refusal)),
        }
    }
}
