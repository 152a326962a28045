//! Every controller of a sandbox out, without its machine.
//!
//! [`check_all`] asks, [`controllers`] tells, [`freeze_all`] holds: all under one lock, so that nothing is frozen when
//! anything was refused.

use dunlin_migration::refusal::Refusal;
use dunlin_wire::tree::{SavedPlan9, SavedPod, SavedScsi, SavedVpci};

use super::tree::SetAside;
use super::{scsi, tree};
use crate::controller::Transitions;
use crate::device::plan9::Shares;
use crate::device::vpci::Devices;
use crate::hold::Step;
use crate::sandbox::Inner;
use crate::{container, pod, process};

/// Everything that is saved beside the machine itself.
pub(super) struct Controllers {
    pub(super) pods: Vec<SavedPod>,
    pub(super) scsi: SavedScsi,
    pub(super) vpci: SavedVpci,
    pub(super) plan9: SavedPlan9,
}

/// What all controllers are. `set_aside`: ports for a process that has none yet. The tables of host directories and
/// devices are frozen by it.
pub(super) fn controllers(
    inner: &Inner,
    shares: &Shares,
    devices: &Devices,
    set_aside: SetAside<'_>,
) -> Result<Controllers, Refusal> {
    Ok(Controllers {
        pods: tree::save_pods(inner, set_aside)?,
        scsi: scsi::save(&inner.scsi)?,
        vpci: devices.save().map_err(|error| Refusal::precondition(error.to_string()))?,
        plan9: shares.save().map_err(|error| Refusal::precondition(error.to_string()))?,
    })
}

/// Whether everything can be saved now. Changes nothing.
pub(super) fn check_all(inner: &Inner) -> Result<(), Refusal> {
    let precondition = |error: &dyn std::fmt::Display| Refusal::precondition(format!("{error}; retry later"));
    inner.scsi.check_save().map_err(|error| precondition(&error))?;
    for pod in inner.pods.values() {
        let (mut state, mut hold) = (pod.state, pod.hold);
        state.enter(pod::Op::Save, pod.what()).map_err(|error| precondition(&error))?;
        hold.enter(Step::Save, pod.what()).map_err(|error| precondition(&error))?;
        pod.network.check_save().map_err(|error| precondition(&error))?;
    }
    for container in inner.containers.values() {
        let (mut state, mut hold) = (container.state, container.hold);
        let what = container.what();
        state.enter(container::Op::Save, &what).map_err(|error| precondition(&error))?;
        hold.enter(Step::Save, &what).map_err(|error| precondition(&error))?;
        if container.pausing > 0 {
            // The guest may have frozen it already: what would be saved may not be so.
            return Err(precondition(&format_args!("{what}: a pause or resume of it is under way")));
        }
        for process in container.processes.values() {
            let exec = &process.exec_id;
            let what = if exec.is_empty() { what.clone() } else { format!("{what}, exec {exec}") };
            process.state().enter(process::Op::Save, what).map_err(|error| precondition(&error))?;
        }
    }
    Ok(())
}

/// Freezes what [`check_all`] has allowed, under the same lock.
pub(super) fn freeze_all(inner: &mut Inner) -> Result<(), Refusal> {
    let frozen = |error: &dyn std::fmt::Display| Refusal::unknown(error.to_string());
    inner.scsi.freeze().map_err(|error| frozen(&error))?;
    for pod in inner.pods.values_mut() {
        let what = pod.what();
        pod.hold.enter(Step::Save, &what).map_err(|error| frozen(&error))?;
        pod.network.hold.enter(Step::Save, &what).map_err(|error| frozen(&error))?;
    }
    for container in inner.containers.values_mut() {
        let what = container.what();
        container.hold.enter(Step::Save, what).map_err(|error| frozen(&error))?;
    }
    Ok(())
}
