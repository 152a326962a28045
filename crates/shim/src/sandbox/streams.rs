//! Where every stdio stream stands at a move's switchover: taken on the source, gone on from on the destination.

use dunlin_wire::Any;
use dunlin_wire::handoff::{Handoff, HandoffKey, StreamPositions};
use dunlin_wire::ids::ContainerId;

use super::{Inner, Sandbox};
use crate::process::State;

impl Sandbox {
    /// Source, at the guest's pause: from here on no byte is handed on or read. Err: why the streams cannot go along;
    /// they stand still all the same, until [`Sandbox::release_streams`].
    pub(crate) fn hold_streams(&self) -> Result<Any, String> {
        let handoff = self.inner().hold_streams()?;
        handoff.seal().map_err(|error| format!("standard streams: {error}"))
    }

    /// Source, on every way back: the streams go on here. Repeats do nothing.
    pub(crate) fn release_streams(&self) {
        let inner = self.inner();
        for process in inner.containers.values().flat_map(|container| container.processes.values()) {
            if let Some(streams) = process.streams() {
                streams.release();
            }
        }
    }
}

impl Inner {
    /// A move begins: little input may be under way.
    pub(super) fn narrow_streams(&self) {
        for process in self.containers.values().flat_map(|container| container.processes.values()) {
            if let Some(streams) = process.streams() {
                streams.narrow();
            }
        }
    }

    /// All are held in any case.
    fn hold_streams(&self) -> Result<Handoff, String> {
        let (mut handoff, mut flooded) = (Handoff::default(), None);
        for container in self.containers.values() {
            let Ok(guest_id) = ContainerId::new(container.guest_id.clone()) else { continue };
            for (exec, process) in &container.processes {
                if process.state() != State::Running {
                    continue;
                }
                let Some(streams) = process.streams() else { continue };
                let key = HandoffKey { container: guest_id.clone(), exec: exec.clone() };
                match streams.hold(process.stdin_closed) {
                    Some(positions) => drop(handoff.processes.insert(key, positions)),
                    None => flooded = Some(format!("container {}, exec {exec:?}", container.id)),
                }
            }
        }
        match flooded {
            None => Ok(handoff),
            Some(of) => Err(format!(
                "{of}: its clients write input faster than it can be kept out, and some would be lost; move again when \
                 they write less"
            )),
        }
    }
}

/// Destination: where one process's streams stood; nothing known of a process that the handoff does not name.
pub(super) fn positions(handoff: &Handoff, guest_id: &str, exec: &str) -> StreamPositions {
    let Ok(container) = ContainerId::new(guest_id.to_owned()) else { return StreamPositions::default() };
    let key = HandoffKey { container, exec: exec.to_owned() };
    handoff.processes.get(&key).cloned().unwrap_or_default()
}
