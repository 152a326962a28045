//! The source's part in a session besides the transfer: the freeze before it, and the ways back and away after it.

use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::Cancelled;
use dunlin_qemu::{QemuError, Role};
use dunlin_wire::service::InitializeOptions;

use super::driver::Transfer;
use super::options::transfer_options;
use super::refusal;
use crate::container;
use crate::controller::Transitions;
use crate::hold::Hold;
use crate::sandbox::exits::Gate;
use crate::sandbox::{Machine, Sandbox};
use crate::vm::{StillThere, state};

impl Sandbox {
    /// Checks that the machine can move and sets QEMU up for it.
    pub(super) async fn initialize_source(&self, options: Option<InitializeOptions>) -> Result<(), Refusal> {
        let vm = self.inner().vm(&self.id).map_err(|error| refusal(&error))?;
        self.check_ties()?;
        let options = transfer_options(options)?;
        let reasons = vm.qemu.blocked_reasons().await.map_err(|error| failed("asking QEMU", &error))?;
        if let Some(reason) = reasons.first() {
            return Err(Refusal::precondition(format!(
                "QEMU cannot migrate this machine: {reason}; remove that device"
            )));
        }
        let set_up = |error| failed("setting up the migration", &error);
        vm.qemu.set_migration_capabilities(Role::Source, &options.qemu).await.map_err(set_up)?;
        vm.qemu.set_migration_parameters(Role::Source, &options.qemu).await.map_err(set_up)?;
        self.inner().transfer = Some(options);
        self.gate.send_replace(Gate::Held);
        Ok(())
    }

    /// Stops a transfer and sees the guest run again.
    pub(super) async fn cancel_source(&self, transfer: Option<Transfer>) -> Result<Cancelled, Refusal> {
        if let Some(transfer) = transfer {
            // First, also without a machine: it says whether it completed.
            transfer.cancel.cancel();
            let _ = transfer.task.await;
        }
        let vm = self.inner().vm(&self.id).map_err(|error| refusal(&error))?;
        match vm.qemu.migrate_cancel().await {
            Ok(()) => {}
            Err(QemuError::AlreadyCompleted) => return Ok(Cancelled::AlreadyCompleted),
            Err(error) => return Err(failed("cancelling the migration", &error)),
        }
        vm.run_again().await.map_err(|error| failed("letting the guest go on", &error))?;
        self.announce();
        self.release_streams();
        self.inner().blackout = false;
        Ok(Cancelled::InTime)
    }

    /// Lets the guest and its API go on. What is done stays done.
    pub(super) async fn resume_source(&self) -> Result<(), Refusal> {
        let vm = self.inner().vm(&self.id).map_err(|error| refusal(&error))?;
        vm.run_again().await.map_err(|error| failed("letting the guest go on", &error))?;
        self.announce();
        self.thaw();
        Ok(())
    }

    /// The task is another host's now: the machine ends here without an exit, or has ended without one. May be repeated.
    pub(super) async fn move_away(&self, session: String) -> Result<(), StillThere> {
        self.gate.send_replace(Gate::Shut);
        self.leave_wires();
        let machine = {
            let mut inner = self.inner();
            inner.blackout = false;
            let machine = inner.set_machine(state::Op::Leave, Machine::MovedAway { session });
            // Waiters learn that the task moved; streams end without an end of file being invented.
            for container in inner.containers.values_mut() {
                // One that is being deleted goes on being deleted.
                let _ = container.state.enter(container::Op::Leave, "");
                container.hold = Hold::Free;
                for process in container.processes.values_mut() {
                    process.leave();
                }
            }
            machine
        };
        self.end_machine(machine.ok().and_then(Machine::into_vm)).await?;
        self.leave_volumes().await;
        Ok(())
    }
}

fn failed(action: &str, error: &QemuError) -> Refusal {
    Refusal::unknown(format!("{action} failed: {error}"))
}
