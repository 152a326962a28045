//! One virtual machine: QEMU, the link into it, and the bridge to its guest.
//!
//! ```text
//! boot:      spawn -> connect the channel -> run -> link up -> the guest dials the bridge -> negotiated
//! incoming:  spawn, receiving -> connect the channel -> ... -> run -> link up -> ... (behind the caller)
//! ```
//!
//! The guest may dial the bridge again at any time, as after a move; whoever calls it then waits.

pub(crate) mod channel;
mod devices;
pub(crate) mod guest;
pub(crate) mod image;
mod nics;
pub(crate) mod state;
pub(crate) mod stats;
mod stdio;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dunlin_bridge::host::{Bridge, BridgeError};
use dunlin_bridge::{BRIDGE_PORT, FIRST_STDIO_PORT, LOG_PORT};
use dunlin_link::host::{HostLink, LinkError, PortListener};
use dunlin_qemu::accel::{self, Choice};
use dunlin_qemu::version::BinaryMissing;
use dunlin_qemu::{
    DiskSource, Document, HostPaths, LaunchOptions, Mode, Nic, Qemu, QemuError, RunState, SpawnError,
};
use dunlin_wire::ids::Slot;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::boot::directory::StateDirectory;
use crate::config::{Accelerator, Config};
use crate::network::wire::PodWires;
use crate::process::io::IoError;
use crate::sandbox::error::Code;
use channel::{ChannelError, HostEnd};
use image::{GuestImage, ImageError};

/// From QEMU's start to the guest's first word. TCG on a loaded host needs tens of seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const STOP_GRACE: Duration = Duration::from_secs(2);
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// The guest's log starts anew when it has grown to this.
const LOG_MAX: u64 = 8 * 1024 * 1024;

/// The machine could not be made, or did not do what it was asked.
#[derive(Debug, Error)]
pub(crate) enum VmError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    NoQemu(#[from] BinaryMissing),
    #[error("QEMU: {0}")]
    Qemu(#[from] QemuError),
    #[error("the link to the guest: {0}")]
    Link(#[from] LinkError),
    #[error("the virtual machine's guest did not answer within {seconds} s; its console is in {console}")]
    Silent { seconds: u64, console: PathBuf },
    #[error("the guest that was received did not dial within {seconds} s")]
    NotDialled { seconds: u64 },
    #[error("QEMU ended before the guest answered: {report}")]
    Ended { report: String },
    #[error("{action} failed in the guest: {source}")]
    Guest { action: &'static str, source: BridgeError },
    #[error(transparent)]
    Io(#[from] IoError),
    #[error("network card {id}: its tap cannot be handed to QEMU: {source}")]
    Tap { id: String, source: std::io::Error },
    #[error("disk {slot}: cannot use {path}: {source}")]
    Disk { slot: Slot, path: PathBuf, source: std::io::Error },
}

/// QEMU was killed, and the system has not ended it.
#[derive(Debug, Error)]
#[error(
    "QEMU (process {pid}) was killed and has not ended within {} s: the system waits for something in its name, most likely \
     storage (/proc/{pid}/stack says for what); call again when that is back",
    KILL_DEADLINE.as_secs()
)]
pub(crate) struct StillThere {
    pid: i32,
}

impl VmError {
    pub(crate) fn code(&self) -> Code {
        use dunlin_bridge::hresult::HResult;
        match self {
            VmError::Guest { source: BridgeError::Guest { hresult, .. }, .. } => match *hresult {
                HResult::NOT_FOUND | HResult::SYSTEM_NOT_FOUND => Code::NotFound,
                HResult::SYSTEM_ALREADY_EXISTS => Code::AlreadyExists,
                HResult::INVALID_JSON | HResult::INVALID_ARGUMENT => Code::InvalidArgument,
                HResult::INVALID_STATE | HResult::SYSTEM_ALREADY_STOPPED => Code::FailedPrecondition,
                _ => Code::Unknown,
            },
            VmError::Guest { source: BridgeError::Deadline { .. }, .. }
            | VmError::Silent { .. }
            | VmError::NotDialled { .. } => Code::DeadlineExceeded,
            VmError::Guest { .. } | VmError::Ended { .. } => Code::Unavailable,
            VmError::Image(_) | VmError::Channel(_) | VmError::Spawn(_) | VmError::NoQemu(_) => {
                Code::FailedPrecondition
            }
            VmError::Qemu(_)
            | VmError::Link(_)
            | VmError::Io(_)
            | VmError::Tap { .. }
            | VmError::Disk { .. } => Code::Unknown,
        }
    }
}

/// A virtual machine of this shim.
pub(crate) struct Vm {
    pub(crate) qemu: Qemu,
    pub(crate) link: HostLink,
    pub(crate) bridge: Bridge,
    /// As it was built, without its NICs. What a destination builds: [`Vm::present_document`].
    pub(crate) document: Document,
    /// The NICs that are plugged in.
    nics: Mutex<Vec<Nic>>,
    /// What it booted from.
    pub(crate) image: GuestImage,
    pub(crate) accelerator: accel::Accelerator,
    _host_end: HostEnd,
    next_port: AtomicU32,
    /// Until the guest says it itself: as [`Received::plain_streams`].
    plain_streams: bool,
    guest: Arc<GuestSays>,
    ended: watch::Receiver<Option<String>>,
    tasks: Vec<JoinHandle<()>>,
}

/// What a machine begins with: a new one, or one that ran on another host.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) document: Document,
    /// The first that may be given out here.
    pub(crate) next_port: u32,
    pub(crate) bridge_next_id: u64,
    /// Its agent does not resume standard streams.
    pub(crate) plain_streams: bool,
}

/// What the guest said when the bridge was negotiated.
#[derive(Debug, Default)]
pub(super) struct GuestSays {
    /// Its kernel has a 9P client.
    has_9p: AtomicBool,
    /// It is of ours.
    dunlin: AtomicBool,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("uuid", &self.document.uuid).finish_non_exhaustive()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// QEMU's slot for ours.
pub(crate) fn qemu_slot(slot: Slot) -> dunlin_qemu::Slot {
    // Both types hold controller 0 to 3 and LUN 0 to 63 by construction.
    dunlin_qemu::Slot::new(slot.controller(), slot.lun())
        .unwrap_or_else(|_| unreachable!("{slot} is in range"))
}

impl Vm {
    /// Boots a machine that has these NICs from the start, and waits for its guest.
    pub(crate) async fn boot(
        config: &Config,
        directory: &StateDirectory,
        wires: &[Arc<PodWires>],
    ) -> Result<Arc<Vm>, VmError> {
        let image = image::read(&config.guest);
        let channel = channel::chosen(config.vm.link);
        let kernel_argument = channel::kernel_argument(channel);
        let document = Document {
            machine: config.vm.machine.clone(),
            cpu: config.vm.cpu.clone(),
            kernel_command_line: format!(
                "console=ttyS0,115200 quiet panic=-1{kernel_argument} {}",
                config.guest.kernel_arguments
            )
            .trim_end()
            .to_owned(),
            channel,
            ..Document::new(uuid::Uuid::new_v4(), config.vcpus(), config.vm.memory_mib.into())
        };
        let fresh =
            Received { document, next_port: FIRST_STDIO_PORT, bridge_next_id: 0, plain_streams: false };
        // The digests are for a later move; they are taken while the guest boots.
        let vm = Vm::launch(config, directory, fresh, Mode::Boot, image).await?;
        for wires in wires {
            vm.plug(wires).await?;
        }
        vm.qemu.cont().await?;
        vm.link.start();
        let mut ended = vm.ended.clone();
        let mut connected = vm.bridge.connected();
        tokio::select! {
            negotiated = tokio::time::timeout(BOOT_DEADLINE, connected.wait_for(|connected| *connected)) => {
                negotiated.map(drop).map_err(|_| VmError::Silent {
                    seconds: BOOT_DEADLINE.as_secs(),
                    console: directory.console_log(),
                })?;
            }
            report = ended.wait_for(Option::is_some) => {
                let report = report.ok().and_then(|report| report.clone()).unwrap_or_default();
                return Err(VmError::Ended { report });
            }
        }
        Ok(vm)
    }

    /// Makes a machine that waits for another one's state.
    pub(crate) async fn incoming(
        config: &Config,
        directory: &StateDirectory,
        received: Received,
    ) -> Result<Arc<Vm>, VmError> {
        let image = image::read(&config.guest);
        Vm::launch(config, directory, received, Mode::Incoming, image).await
    }

    async fn launch(
        config: &Config,
        directory: &StateDirectory,
        received: Received,
        mode: Mode,
        image: impl Future<Output = Result<GuestImage, ImageError>>,
    ) -> Result<Arc<Vm>, VmError> {
        let Received { document, next_port, bridge_next_id, plain_streams } = received;
        let accelerator = Vm::accelerator(config).await?;
        image::check(&config.guest)?;
        let host_end = channel::host_end(document.channel, directory, &config.state_dir)?;
        let paths = HostPaths {
            kernel: Some(config.guest.kernel.clone()),
            initramfs: Some(config.guest.initramfs.clone()),
            qmp_socket: directory.qmp_socket(),
            channel: host_end.qemu.clone(),
            console_log: directory.console_log(),
            qemu_log: directory.qemu_log(),
        };
        let options = LaunchOptions::new(config.vm.qemu.clone(), accelerator, paths);
        let (qemu, image) = tokio::join!(Qemu::spawn(&options, &document, mode), image);
        let (qemu, image) = (qemu?, image?);
        let link = HostLink::connect(host_end.link.clone()).await?;
        let bridge = Bridge::new(bridge_next_id);
        let guest = Arc::new(GuestSays::default());
        let mut tasks = Vec::new();
        let accept = accept_bridge(link.listen(BRIDGE_PORT)?, bridge.clone(), Arc::clone(&guest));
        tasks.push(tokio::spawn(accept));
        tasks.push(tokio::spawn(keep_log(link.listen(LOG_PORT)?, directory.guest_log())));
        let (sender, ended) = watch::channel(None);
        tasks.push(tokio::spawn(watch_end(qemu.exited(), bridge.clone(), sender)));
        Ok(Arc::new(Vm {
            qemu,
            link,
            bridge,
            document: Document { nics: Vec::new(), ..document },
            nics: Mutex::default(),
            image,
            accelerator,
            _host_end: host_end,
            next_port: AtomicU32::new(next_port),
            plain_streams,
            guest,
            ended,
            tasks,
        }))
    }

    /// How this host would run a machine.
    pub(crate) async fn accelerator(config: &Config) -> Result<accel::Accelerator, BinaryMissing> {
        let choice = match config.vm.accelerator {
            Accelerator::Auto => Choice::Auto,
            Accelerator::Kvm => Choice::Fixed(accel::Accelerator::Kvm),
            Accelerator::Tcg => Choice::Fixed(accel::Accelerator::Tcg),
        };
        let chosen = accel::choose(choice, &config.vm.qemu).await?;
        tracing::info!(accelerator = ?chosen.accelerator, reason = chosen.reason, "accelerator");
        Ok(chosen.accelerator)
    }

    /// The first link port that is not handed out yet.
    pub(crate) fn next_port(&self) -> u32 {
        self.next_port.load(Ordering::Relaxed)
    }

    /// Resolves when QEMU has ended, with what it left to say.
    pub(crate) async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(report) => report.clone().unwrap_or_default(),
            Err(_) => "its watcher is gone".to_owned(),
        }
    }

    /// Attaches a disk; the guest sees it at once, or when it first runs.
    pub(crate) async fn attach_disk(&self, slot: Slot, source: &DiskSource) -> Result<(), VmError> {
        tokio::fs::metadata(&source.path).await.map_err(|error| VmError::Disk {
            slot,
            path: source.path.clone(),
            source: error,
        })?;
        self.qemu.attach_disk(qemu_slot(slot), source).await?;
        Ok(())
    }

    /// QEMU lets go of a disk that the guest has ejected.
    pub(crate) async fn detach_disk(&self, slot: Slot) -> Result<(), VmError> {
        Ok(self.qemu.detach_disk(qemu_slot(slot)).await?)
    }

    /// Lets the guest run, whatever the reason that it does not. Running already is no error.
    pub(crate) async fn run_again(&self) -> Result<(), QemuError> {
        if self.qemu.status().await? != RunState::Running {
            self.qemu.cont().await?;
        }
        Ok(())
    }

    /// Ends the machine. Ok: QEMU is gone. May be repeated.
    pub(crate) async fn stop(&self) -> Result<(), StillThere> {
        self.bridge.close();
        self.link.clone().close().await;
        // A refused quit ends in a kill.
        let _ = tokio::time::timeout(STOP_GRACE, self.qemu.quit()).await;
        match see_gone(self.qemu.exited(), || self.qemu.kill()).await {
            true => Ok(()),
            false => Err(StillThere { pid: self.qemu.pid() }),
        }
    }
}

/// Waits for the end of a process that was asked to end, and kills one that does not. Whether it is gone.
async fn see_gone<R>(mut exited: watch::Receiver<Option<R>>, kill: impl FnOnce()) -> bool {
    for (wait, kill) in [(STOP_GRACE, None), (KILL_DEADLINE, Some(kill))] {
        if let Some(kill) = kill {
            kill();
        }
        // Without a sender nobody will ever say so.
        if let Ok(Ok(_)) = tokio::time::timeout(wait, exited.wait_for(Option::is_some)).await {
            return true;
        }
    }
    false
}

/// The guest dials the bridge whenever it has no connection.
async fn accept_bridge(mut listener: PortListener, bridge: Bridge, says: Arc<GuestSays>) {
    while let Some(stream) = listener.accept().await {
        match bridge.attach(stream).await {
            Ok(capabilities) => {
                let has_9p = capabilities.guest_defined_capabilities.plan9_supported;
                says.has_9p.store(has_9p, Ordering::Relaxed);
                says.dunlin.store(capabilities.speaks_dunlin(), Ordering::Relaxed);
                if capabilities.speaks_dunlin() {
                    tracing::info!(has_9p, "bridge negotiated");
                } else {
                    tracing::warn!(
                        "the guest agent does not resume streams: a move repeats output and ends inputs and execs' streams"
                    );
                }
            }
            Err(error) => tracing::warn!(%error, "bridge connection refused"),
        }
    }
}

/// Appends what the guest logs to a file of bounded size.
async fn keep_log(mut listener: PortListener, path: PathBuf) {
    use std::io::Write;
    while let Some(mut stream) = listener.accept().await {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let full = std::fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_MAX);
            let file =
                std::fs::OpenOptions::new().create(true).write(true).append(!full).truncate(full).open(&path);
            if let Err(error) = file.and_then(|mut file| file.write_all(&buffer[..read])) {
                tracing::warn!(path = %path.display(), %error, "cannot keep the guest's log");
            }
        }
    }
}

/// Without QEMU there is no guest to answer: whoever waits for it is told.
async fn watch_end(
    mut exited: watch::Receiver<Option<dunlin_qemu::ExitReport>>,
    bridge: Bridge,
    ended: watch::Sender<Option<String>>,
) {
    let report = match exited.wait_for(Option::is_some).await {
        Ok(report) => report.as_ref().map(ToString::to_string).unwrap_or_default(),
        Err(_) => "its owner is gone".to_owned(),
    };
    bridge.close();
    ended.send_replace(Some(report));
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_machine_is_gone_when_its_process_was_seen_to_end_and_not_before() {
        let kills = Cell::new(0);
        let kill = || kills.set(kills.get() + 1);
        let (sender, exited) = watch::channel(Some(()));
        assert!(see_gone(exited.clone(), kill).await);
        assert_eq!(kills.get(), 0, "it has ended by itself");

        sender.send_replace(None);
        let end = || {
            sender.send_replace(Some(()));
        };
        assert!(see_gone(exited.clone(), end).await, "it ends when it is killed");

        sender.send_replace(None);
        assert!(!see_gone(exited.clone(), kill).await, "not even then");
        assert_eq!(kills.get(), 1);

        drop(sender);
        assert!(!see_gone(exited, kill).await, "nobody has seen it end");
        let text = StillThere { pid: 7 }.to_string();
        assert!(text.contains("process 7") && text.contains("/proc/7/stack"), "{text}");
    }
}
