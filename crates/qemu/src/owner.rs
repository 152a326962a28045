//! The owner of one QEMU: from its start to its reaping.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::command_line::{ChannelEndpoint, LaunchOptions, Mode, command_line};
use crate::document::{Document, Slot};
use crate::error::{QemuError, SpawnError};
use crate::event::EventStream;
use crate::log_cap::LogCap;
use crate::process::{ExitReport, LogTail, Process};
use crate::qmp::{QmpClient, QmpError};
use crate::run_state::RunState;
use crate::usage::{self, Usage};
use crate::version::find_binary;

/// Between two looks at whether QEMU's socket is there.
const CONNECT_INTERVAL: Duration = Duration::from_millis(4);
/// From SIGKILL to the process's end: freeing guest memory takes a moment.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// One QEMU process. All methods take `&self` and may run concurrently; dropping it kills the process.
#[derive(Debug)]
pub struct Qemu {
    pub(crate) qmp: QmpClient,
    /// Our copies of the mirrors' sockets: shutting one down is the only sure way to wake a QEMU that waits for a silent peer.
    /// Of each slot of which QEMU may have something, from before the first command until all of it is gone.
    pub(crate) mirror_sockets: Mutex<HashMap<Slot, OwnedFd>>,
    /// The guest was stopped so that mirrors could be ended, and was not yet let go.
    pub(crate) held: AtomicBool,
    /// A migration away was begun since the last preparation: QEMU's status is that one's, and no earlier one's.
    pub(crate) leaving: AtomicBool,
    process: Process,
    _sockets: Sockets,
    _log_cap: LogCap,
}

impl Qemu {
    /// Starts QEMU and waits until it answers. The guest does not run: the state is `prelaunch` or `inmigrate`.
    ///
    /// The document's disks and NICs are not attached; that is done with [`Qemu::attach_disk`] and
    /// [`Qemu::attach_nic`], in either mode, before the guest runs or the stream comes.
    pub async fn spawn(options: &LaunchOptions, document: &Document, mode: Mode) -> Result<Qemu, SpawnError> {
        let arguments = command_line(document, options, mode)?;
        let binary = find_binary(&options.binary)?;
        let log_path = &options.paths.qemu_log;
        let open_log = |source| SpawnError::OpenLog { path: log_path.clone(), source };
        let log = OpenOptions::new().create(true).append(true).open(log_path).map_err(open_log)?;
        let tail = LogTail::of(log_path.clone(), &log).map_err(open_log)?;

        let mut sockets = Sockets::cleared(options);
        let mut command = Command::new(&binary);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(open_log)?).stderr(log);
        let process = Process::start(command, tail.clone())
            .await
            .map_err(|source| SpawnError::Start { binary, source })?;
        let qmp = connect(&process, options, &tail).await?;
        sockets.identify();
        tracing::debug!(pid = process.pid(), ?mode, "QEMU answers");
        let log_cap = LogCap::on(vec![options.paths.console_log.clone(), log_path.clone()]);
        Ok(Qemu {
            qmp,
            mirror_sockets: Mutex::default(),
            held: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            process,
            _sockets: sockets,
            _log_cap: log_cap,
        })
    }

    /// Its process id; meaningful until [`Qemu::exited`] reports.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// The QMP connection, for commands that have no method here.
    pub fn qmp(&self) -> &QmpClient {
        &self.qmp
    }

    /// Events from now on; subscribe before the action whose events are awaited.
    pub fn events(&self) -> EventStream {
        EventStream::new(&self.qmp)
    }

    /// Turns to `Some` when the process has ended and is reaped.
    pub fn exited(&self) -> watch::Receiver<Option<ExitReport>> {
        self.process.exited()
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<(), QemuError> {
        self.control("continue", "cont").await
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<(), QemuError> {
        self.control("pause", "stop").await
    }

    /// Presses the guest's power button; whether it heeds it is its own affair.
    pub async fn powerdown(&self) -> Result<(), QemuError> {
        self.control("press the power button of", "system_powerdown").await
    }

    /// Asks QEMU to exit. The process ends shortly after; see [`Qemu::shutdown`].
    pub async fn quit(&self) -> Result<(), QemuError> {
        match self.control("quit", "quit").await {
            // QEMU may be gone before its answer is.
            Err(QemuError::Control { source: QmpError::Closed { .. }, .. }) => Ok(()),
            result => result,
        }
    }

    /// Sends SIGKILL; the report follows through [`Qemu::exited`].
    pub fn kill(&self) {
        if let Err(error) = self.process.kill() {
            tracing::error!(pid = self.pid(), %error, "QEMU could not be killed");
        }
    }

    /// What the machine is doing.
    pub async fn status(&self) -> Result<RunState, QemuError> {
        let failed = |source| QemuError::Control { action: "ask for the state of", source };
        let answer = self.qmp.execute("query-status", json!({})).await.map_err(failed)?;
        match answer.get("status").and_then(Value::as_str) {
            Some(status) => Ok(status.into()),
            None => Err(failed(QmpError::Answer {
                command: "query-status".to_owned(),
                reason: "`status` is missing".to_owned(),
            })),
        }
    }

    /// What the VM costs the host.
    pub fn usage(&self) -> Result<Usage, QemuError> {
        if let Some(report) = self.exited().borrow().clone() {
            return Err(QemuError::Ended(report));
        }
        usage::of_process(self.pid()).map_err(QemuError::Usage)
    }

    /// Ends the process: `quit`, after `grace` SIGKILL. Returns when it is reaped.
    pub async fn shutdown(self, grace: Duration) -> Result<ExitReport, QemuError> {
        let begin = Instant::now();
        let quit = self.qmp.execute_within("quit", json!({}), grace).await;
        if let Err(error) = &quit
            && !matches!(error, QmpError::Closed { .. })
        {
            tracing::warn!(pid = self.pid(), %error, "QEMU does not quit in order");
        }
        let left = if quit.is_ok() { grace.saturating_sub(begin.elapsed()) } else { Duration::ZERO };
        if let Some(report) = self.process.wait(left).await {
            return Ok(report);
        }
        self.kill();
        self.process
            .wait(KILL_DEADLINE)
            .await
            .ok_or(QemuError::Unkillable { pid: self.pid(), after: KILL_DEADLINE })
    }

    async fn control(&self, action: &'static str, command: &str) -> Result<(), QemuError> {
        let answer = self.qmp.execute(command, json!({})).await;
        answer.map(drop).map_err(|source| QemuError::Control { action, source })
    }
}

async fn connect(
    process: &Process,
    options: &LaunchOptions,
    tail: &LogTail,
) -> Result<QmpClient, SpawnError> {
    let deadline = Instant::now() + options.start_deadline;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let source = match QmpClient::connect(&options.paths.qmp_socket, left).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        // QEMU that hangs up or was never there is about to exit; its last words are worth the wait.
        if let Some(report) = process.wait(CONNECT_INTERVAL).await {
            return Err(SpawnError::EndedEarly { report });
        }
        if Instant::now() >= deadline {
            // Reaped before the caller hears of it, so that its directory can be removed.
            if let Err(error) = process.kill() {
                tracing::error!(pid = process.pid(), %error, "QEMU could not be killed");
            }
            process.wait(KILL_DEADLINE).await;
            return Err(SpawnError::NoAnswer {
                after: options.start_deadline,
                stderr_tail: tail.read(),
                source,
            });
        }
    }
}

/// Socket files that QEMU makes and, when it is killed, leaves behind.
#[derive(Debug)]
struct Sockets(Vec<(PathBuf, Option<FileIdentity>)>);

/// Device, inode and time of change: an inode number is given to the next file at once.
type FileIdentity = (u64, u64, i64, i64);

impl Sockets {
    /// A socket file of an earlier process would be there at once, with nobody behind it, so it goes first.
    fn cleared(options: &LaunchOptions) -> Sockets {
        let mut paths = vec![options.paths.qmp_socket.clone()];
        if let ChannelEndpoint::VirtioSerial { socket } = &options.paths.channel {
            paths.push(socket.clone());
        }
        paths.iter().for_each(|path| remove(path));
        Sockets(paths.into_iter().map(|path| (path, None)).collect())
    }

    /// Remembers which files are this process's: by the time they are removed, the next QEMU may listen at the same paths.
    fn identify(&mut self) {
        for (path, identity) in &mut self.0 {
            *identity = identity_of(path);
        }
    }
}

fn identity_of(path: &Path) -> Option<FileIdentity> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a stale socket stays");
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for (path, identity) in &self.0 {
            if identity.is_none() || *identity == identity_of(path) {
                remove(path);
            }
        }
    }
}
