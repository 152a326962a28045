//! The receiving side: a machine that waits, its disks filled through NBD, its first run.
//!
//! ```text
//!  QEMU -incoming, disks attached, NBD exports of the writable ones
//!    -> disk streams end -> exports go -> memory complete -> (decision) -> disks activated, run
//! ```
//!
//! The disks are taken for writing only at the first run (late-block-activate): until then the
//! source's are the good ones.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskCreate;
use dunlin_migration::notice::{PhaseState, Progress};
use dunlin_migration::refusal::Refusal;
use dunlin_migration::session::{Cancelled, TransferFault};
use dunlin_qemu::{Event, MigrationStatus, Role};
use dunlin_wire::Any;
use dunlin_wire::handoff::Handoff;
use dunlin_wire::handover::Stream;
use dunlin_wire::ids::Epoch;
use dunlin_wire::service::InitializeOptions;
use dunlin_wire::tree::SavedEndpoint;
use protobuf::MessageField;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::options::transfer_options;
use super::{Transfer, disk_stream, refusal};
use crate::container;
use crate::hold::Hold;
use crate::process::{self, io::Ports};
use crate::sandbox::create::task_io;
use crate::sandbox::streams::positions;
use crate::sandbox::{Inner, Machine, Sandbox, exits};
use crate::vm::{Vm, qemu_slot, state};

/// From the end of the disk streams to the end of their exports.
const EXPORT_END_DEADLINE: Duration = Duration::from_secs(10);
/// For a QEMU that has hung up to be seen dead.
const DEATH: Duration = Duration::from_secs(1);
/// For a source that has hung up to say why.
const PEER_SPEAKS_FIRST: Duration = Duration::from_millis(500);
/// A source that says nothing for this long is gone. Generous: disks are copied before memory.
const RECEIVE_DEADLINE: Duration = Duration::from_secs(4 * 3600);

impl Sandbox {
    /// Makes the machine that receives, with every disk of this host.
    pub(super) async fn create_destination(
        self: &Arc<Self>,
        options: Option<InitializeOptions>,
    ) -> Result<(), Refusal> {
        let options = transfer_options(options)?.qemu;
        let (machine, disks, writable) = {
            let mut inner = self.inner();
            let disks = inner.scsi.placed().map_err(|error| Refusal::precondition(error.to_string()))?;
            let writable = inner.scsi.mirrored();
            let imported = inner
                .imported
                .as_ref()
                .ok_or_else(|| Refusal::precondition("nothing was imported into this shim"))?;
            let all = (imported.machine.clone(), disks, writable);
            inner
                .set_machine(state::Op::Prepare, Machine::Preparing)
                .map_err(|error| Refusal::precondition(error.to_string()))?;
            all
        };
        let made = async {
            let vm = Vm::incoming(&self.config, &self.directory, machine).await?;
            for (slot, source) in disks {
                vm.attach_disk(slot, &source).await?;
            }
            for wires in self.wires.all() {
                vm.plug(&wires).await?;
            }
            vm.qemu.set_migration_capabilities(Role::Destination, &options).await?;
            vm.qemu.set_migration_parameters(Role::Destination, &options).await?;
            if !writable.is_empty() {
                vm.qemu.nbd_server_start(&self.directory.nbd_socket()).await?;
                for slot in &writable {
                    vm.qemu.nbd_export_add(qemu_slot(*slot)).await?;
                }
            }
            Ok::<_, crate::vm::VmError>(vm)
        };
        match made.await {
            Ok(vm) => {
                let receiving = self.inner().set_machine(state::Op::Up, Machine::Incoming(Arc::clone(&vm)));
                if let Err(ended) = receiving {
                    self.end_machine(Some(vm)).await.map_err(|error| Refusal::unknown(error.to_string()))?;
                    return Err(Refusal::precondition(ended.to_string()));
                }
                self.watch_machine(&vm);
                Ok(())
            }
            Err(error) => {
                // Of the next machine, should PrepareSandbox be called again, nothing is plugged in either.
                for wires in self.wires.all() {
                    wires.nics.iter().for_each(crate::network::wire::NicWire::unplugged);
                }
                // It may have been ended meanwhile, which stands.
                let _ = self.inner().set_machine(state::Op::Failed, Machine::Imported);
                Err(refusal(&error.into()))
            }
        }
    }

    /// Receives the machine.
    pub(super) async fn receive(
        &self,
        _epoch: Epoch,
        sockets: HashMap<Stream, OwnedFd>,
        stop: &CancellationToken,
    ) -> Result<Progress, TransferFault> {
        let vm = match &self.inner().machine {
            Machine::Incoming(vm) => Arc::clone(vm),
            _ => return Err(destination_failed("there is no receiving machine".to_owned())),
        };
        let received = tokio::select! {
            result = self.receive_all(&vm, sockets) => result,
            () = stop.cancelled() => Err(TransferFault {
                state: PhaseState::Cancelled,
                message: "the migration was cancelled".to_owned(),
            }),
        };
        if received.is_err() {
            self.shut_wires();
        }
        received
    }

    async fn receive_all(
        &self,
        vm: &Arc<Vm>,
        sockets: HashMap<Stream, OwnedFd>,
    ) -> Result<Progress, TransferFault> {
        let mut events = vm.qemu.events();
        let mut disks = JoinSet::new();
        let mut memory = None;
        for (stream, socket) in sockets {
            match stream {
                Stream::Memory => memory = Some(socket),
                Stream::Disk(_) => {
                    let server = self.directory.nbd_socket();
                    disks.spawn(async move { (stream, disk_stream::carry(socket, &server).await) });
                }
            }
        }
        let memory =
            memory.ok_or_else(|| destination_failed("no socket for memory was handed over".to_owned()))?;
        vm.qemu
            .incoming_from_fd(memory)
            .await
            .map_err(|error| destination_failed(format!("QEMU does not take the stream: {error}")))?;
        let loading = AtomicBool::new(false);
        let completed = async {
            loop {
                match events.next().await {
                    Some(Ok(event)) => match event.event {
                        Event::Migration(MigrationStatus::Completed) => {
                            self.open_wires();
                            return Ok(());
                        }
                        Event::Migration(MigrationStatus::Active) => loading.store(true, Ordering::Relaxed),
                        Event::Migration(MigrationStatus::Failed) => {
                            // QEMU exits after it; its last words tell more than the event.
                            return Err(destination_failed(format!(
                                "QEMU could not load the machine: {}",
                                vm.ended().await
                            )));
                        }
                        Event::Migration(MigrationStatus::Unknown(status)) => {
                            return Err(destination_failed(format!(
                                "QEMU reports the unknown migration status {status:?}"
                            )));
                        }
                        _ => {}
                    },
                    Some(Err(lost)) => return Err(destination_failed(lost.to_string())),
                    None => {
                        return Err(destination_failed(format!(
                            "QEMU ended while it received: {}",
                            vm.ended().await
                        )));
                    }
                }
            }
        };
        // The exports go while the last of memory comes: nothing of it is left for the blackout.
        let exports = async {
            let mut sent = 0;
            let any = !disks.is_empty();
            while let Some(carried) = disks.join_next().await {
                match carried {
                    Ok((_, Ok(bytes))) => sent += bytes,
                    Ok((stream, Err(broken))) => {
                        // The source's own word, or QEMU's death, says more, and the one overtakes this.
                        if broken.came_from_the_source() {
                            tokio::time::sleep(PEER_SPEAKS_FIRST).await;
                        }
                        return Err(destination_failed(
                            dead_or(vm, format!("the stream of {stream} ended too early: {broken}")).await,
                        ));
                    }
                    Err(ended) => return Err(destination_failed(format!("a disk's stream: {ended}"))),
                }
            }
            // Mirrors are finished when the guest stands still.
            if any && loading.load(Ordering::Relaxed) {
                self.open_wires();
            }
            if any {
                let end = vm.qemu.nbd_server_stop();
                match tokio::time::timeout(EXPORT_END_DEADLINE, end).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        let fault = dead_or(vm, format!("ending the disk exports failed: {error}")).await;
                        return Err(destination_failed(fault));
                    }
                    Err(_) => {
                        return Err(destination_failed("the disk exports did not end in time".to_owned()));
                    }
                }
            }
            Ok(sent)
        };
        let ended = vm.ended();
        let both = async { tokio::try_join!(completed, exports) };
        let disk_sent = tokio::select! {
            result = tokio::time::timeout(RECEIVE_DEADLINE, both) => match result {
                Ok(result) => result?.1,
                Err(_) => return Err(destination_failed("the source sent nothing complete in time".to_owned())),
            },
            report = ended => return Err(destination_failed(format!("QEMU ended while it received: {report}"))),
        };
        Ok(Progress { disk_sent, ..Progress::default() })
    }

    /// Ends the receiving machine: nothing of it ever runs.
    pub(super) async fn cancel_destination(&self, transfer: Option<Transfer>) -> Result<Cancelled, Refusal> {
        // Before the source hears of it, which then says where the guest is.
        self.shut_wires();
        if let Some(transfer) = transfer {
            transfer.cancel.cancel();
            let _ = transfer.task.await;
            // It may have been completing just then, which opens them.
            self.shut_wires();
        }
        let ended = self.stop_machine("the move to this host was cancelled").await;
        // What is not seen gone may be told to run yet: it is not called cancelled.
        ended.map(|()| Cancelled::InTime).map_err(|error| Refusal::unknown(error.to_string()))
    }

    /// Lets the machine run; the bridge and the streams are connected behind it. `handoff`: where the source's streams
    /// stood; without it what is not acknowledged to the guest comes again.
    pub(super) async fn run_destination(self: &Arc<Self>, handoff: Option<Any>) -> Result<(), Refusal> {
        // Looked at before anything runs: a handoff that is none can be passed again.
        let handoff = match &handoff {
            Some(any) => Handoff::open(any).map_err(|error| Refusal::invalid(error.to_string()))?,
            None => Handoff::default(),
        };
        let vm = match &self.inner().machine {
            Machine::Incoming(vm) | Machine::Running(vm) => Arc::clone(vm),
            _ => return Err(Refusal::precondition("the received machine is gone; it cannot run")),
        };
        self.give_volumes_to_host()?;
        // Asked without a look first, and once more when it runs already: the guest stands still meanwhile.
        vm.qemu
            .cont()
            .await
            .map_err(|error| Refusal::unknown(format!("QEMU does not run the received machine: {error}")))?;
        let adopted = {
            let mut inner = self.inner();
            if matches!(inner.machine, Machine::Running(_)) {
                return Ok(());
            }
            inner
                .set_machine(state::Op::Run, Machine::Running(Arc::clone(&vm)))
                .map_err(|error| Refusal::precondition(error.to_string()))?;
            inner.imported = None;
            let adopted = inner.adopt(&vm, &handoff);
            adopted.losses.iter().for_each(|loss| tracing::warn!("{loss}"));
            inner.losses.clone_from(&adopted.losses);
            adopted
        };
        self.open_wires();
        self.deliver(&vm, &handoff.frames, adopted.rebound);
        self.announce();
        self.take_back_shared();
        self.clear_left_volumes();
        self.free_ties();
        self.copies.follow(&vm);
        vm.link.start();
        for (guest_id, exec_id, pid) in adopted.running {
            self.watch_exit(&vm, guest_id, exec_id, pid);
        }
        for event in adopted.events {
            self.publisher.publish(&event);
        }
        Ok(())
    }

    /// What was imported will never run here: it has ended, so that containerd can delete it. Repeats do nothing.
    pub(super) fn abort_migrated(&self) {
        for (table, aborted) in [("directories", self.shares.abort()), ("devices", self.devices.abort())] {
            if let Err(error) = aborted {
                tracing::error!(table, %error, "a table of this host's stays as it is");
            }
        }
        // What the source has is spoken for there.
        self.leave_wires();
        self.copies.resume();
        let ended = self.inner().abort_migrated();
        for (id, exec_id) in ended {
            self.report_exit(&id, &exec_id, exits::killed());
        }
    }
}

/// What is to be done once the machine runs.
#[derive(Default)]
struct Adopted {
    /// Guest's container id, exec id, pid.
    running: Vec<(String, String, u32)>,
    /// By the guest's name of their namespace: NICs that have other addresses here.
    rebound: Vec<(String, BTreeMap<String, SavedEndpoint>)>,
    events: Vec<TaskCreate>,
    /// What a guest that does not resume streams could not carry on.
    losses: Vec<String>,
}

/// What the streams of a process lost, with what to do about it.
fn losses(container: &str, exec: &str, ports: Ports) -> Option<String> {
    let outputs = ports.stdout.or(ports.stderr);
    let what = match (exec == container::INIT, ports.stdin, outputs) {
        (_, None, None) => return None,
        (false, ..) => "its standard streams have ended",
        (true, None, Some(_)) => "its next output begins with a repetition, of 128 KiB at most",
        (true, Some(_), None) => "its input has ended",
        (true, Some(_), Some(_)) => {
            "its input has ended, and its next output begins with a repetition, of 128 KiB at most"
        }
    };
    let of = if exec == container::INIT { String::new() } else { format!("exec {exec} of ") };
    Some(format!(
        "{of}container {container}: {what}, because the agent in its guest does not resume streams; a sandbox that is made with \
         Dunlin's initramfs keeps them"
    ))
}

impl Inner {
    /// Every controller is free, every running process has its streams; nothing here waits for the guest.
    fn adopt(&mut self, vm: &Arc<Vm>, handoff: &Handoff) -> Adopted {
        let mut adopted = Adopted { rebound: self.free_arrived(), ..Adopted::default() };
        for container in self.containers.values_mut() {
            for process in container.processes.values_mut() {
                if process.state() != process::State::Running {
                    continue;
                }
                let positions = positions(handoff, &container.guest_id, &process.exec_id);
                process.stdin_closed |= positions.stdin.as_ref().is_some_and(|stdin| stdin.closed);
                if !vm.resumable() {
                    adopted.losses.extend(losses(&container.id, &process.exec_id, process.ports));
                }
                let init = process.exec_id == container::INIT;
                match vm.reconnect(init, &process.stdio, process.ports, positions) {
                    Ok(streams) => process.connect(streams),
                    Err(error) => {
                        tracing::error!(id = container.id, exec_id = process.exec_id, %error, "stdio is not connected");
                    }
                }
                adopted.running.push((container.guest_id.clone(), process.exec_id.clone(), process.pid()));
            }
            let init = container.processes.get(container::INIT);
            let io = init.map(|init| task_io(&init.stdio));
            adopted.events.push(TaskCreate {
                container_id: container.id.clone(),
                bundle: container.bundle.display().to_string(),
                io: io.map_or_else(MessageField::none, MessageField::some),
                pid: init.map_or(0, process::Process::pid),
                ..TaskCreate::default()
            });
        }
        adopted
    }

    /// Every controller that arrived is this host's own. Gives the NICs that have other addresses here, by the guest's
    /// name of their namespace.
    pub(in crate::sandbox) fn free_arrived(&mut self) -> Vec<(String, BTreeMap<String, SavedEndpoint>)> {
        self.scsi.resume();
        for container in self.containers.values_mut() {
            for volume in container.disk_volumes.values() {
                self.scsi.leave_to_host(volume);
            }
            container.hold = Hold::Free;
        }
        let pods = self.pods.values_mut().map(|pod| {
            pod.hold = Hold::Free;
            (pod.network.namespace_id().to_owned(), pod.network.resume())
        });
        pods.collect()
    }

    /// Frees what containerd knows, forgets what it does not. Gives what has ended: container id, exec id.
    fn abort_migrated(&mut self) -> Vec<(String, String)> {
        self.imported = None;
        self.containers.retain(|_, container| container.hold != Hold::Imported);
        // Their wires are gone already.
        let _ = self.drop_empty_pods();
        for pod in self.pods.values_mut().filter(|pod| pod.hold.arriving()) {
            pod.hold = Hold::Free;
            pod.network.abort();
        }
        let mut ended = Vec::new();
        for container in self.containers.values_mut().filter(|container| container.hold.arriving()) {
            container.hold = Hold::Free;
            container.paused = false;
            ended.extend(container.processes.keys().map(|exec| (container.id.clone(), exec.clone())));
        }
        ended
    }
}

/// QEMU's death shows first as the end of what it was asked, or served.
async fn dead_or(vm: &Vm, fault: String) -> String {
    match tokio::time::timeout(DEATH, vm.ended()).await {
        Ok(report) => format!("QEMU ended while it received: {report}"),
        Err(_) => fault,
    }
}

fn destination_failed(message: String) -> TransferFault {
    TransferFault { state: PhaseState::DestinationFailed, message }
}
