//! Deadlines that have passed.

use std::time::Duration;

use super::state::{Arrival, State};
use super::{Effect, Machine, Out, Session, notify, own_failure};
use crate::Moment;
use crate::notice::{Detail, Phase};
use crate::refusal::{Code, Refusal};

impl Session {
    pub(super) fn overdue(&mut self, now: Moment, out: &mut Out) {
        if self.state.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let coming = self.state.of().into_iter().flat_map(|of| &of.streams.coming);
        let stream = coming.filter(|(_, pending)| pending.deadline <= now).map(|(stream, _)| *stream).next();
        if let Some(stream) = stream {
            let what = format!("taking over the socket for {stream}");
            return self.fail(&late(&what, self.limits.adopt), None, out);
        }
        match &mut self.state {
            State::Idle
            | State::SourceExported { .. }
            | State::DestinationPrepared { .. }
            | State::SocketReady { .. }
            | State::Finalized { .. } => {}
            State::SourcePrepared { .. } => self.fail(&late("the export", self.limits.export), None, out),
            State::DestinationImported { arrival, roster, .. } => match arrival {
                Arrival::Importing(pending) if pending.deadline <= now => {
                    self.fail(&late("the import", self.limits.import), None, out);
                }
                Arrival::Creating(pending) if pending.deadline <= now => {
                    self.fail(&late("making the virtual machine", self.limits.create), None, out);
                }
                Arrival::Importing(_) | Arrival::Creating(_) | Arrival::Settled => {
                    let overdue: Vec<_> = roster
                        .patching
                        .iter()
                        .filter(|(_, (_, pending))| pending.deadline <= now)
                        .map(|(source, (_, pending))| (source.clone(), pending.call))
                        .collect();
                    for (source, call) in overdue {
                        let what = format!("the patch of container {source}");
                        roster.patching.remove(&source);
                        roster.waiting.insert(source);
                        out.push(Effect::Reply(call, Err(late(&what, self.limits.patch))));
                    }
                }
            },
            State::SocketWaiting { of, .. } => {
                let refusal = Refusal::precondition(format!(
                    "TransferSandbox: not all sockets came in time, missing: {}; hand them over, disks first, memory last",
                    missing(of.streams.missing(), &of.streams)
                ));
                self.fail(&refusal, None, out);
            }
            State::Transferring { of, .. } => {
                let refusal = late("the switchover", self.limits.blackout);
                let detail = Detail::Cause(refusal.message);
                let state = own_failure(of.side);
                notify(of, Phase::Failed, state, detail, out);
                self.cancel(now, Vec::new(), out);
            }
            State::Cancelling { of, .. } => {
                // Whether the machine still moves, or has left, is not known; only a Finalize leads on.
                of.doubt(now);
                if of.machine == Machine::Absent {
                    of.machine = Machine::Gone;
                }
                self.fail(&late("the cancellation", self.limits.cancel), None, out);
            }
            State::TransferCompleted { ending, .. }
            | State::Cancelled { ending, .. }
            | State::Failed { ending, .. } => {
                if let Some(ending) = ending.take() {
                    let refusal = late("FinalizeSandbox", self.limits.finalize);
                    out.push(Effect::Reply(ending.pending.call, Err(refusal)));
                }
            }
        }
    }
}

fn late(what: &str, limit: Duration) -> Refusal {
    Refusal::new(
        Code::DeadlineExceeded,
        format!(
            "{what} did not end within {limit:?}; look at shim.log of this sandbox, then Cancel or call again"
        ),
    )
}

fn missing(disks: String, streams: &super::state::Streams) -> String {
    use dunlin_wire::handover::Stream;
    match (disks.is_empty(), streams.here.contains(&Stream::Memory)) {
        (true, _) => Stream::Memory.to_string(),
        (false, true) => disks,
        (false, false) => format!("{disks}, {}", Stream::Memory),
    }
}
