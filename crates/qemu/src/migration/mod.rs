//! QEMU's live migration, over a connected socket that QEMU is handed.
//!
//! The source goes `setup`, `active`, `pre-switchover` (guest paused, waiting for [`Qemu::migrate_continue`]), `device`,
//! `completed`; the destination `setup`, `active`, `completed`, and runs only at [`Qemu::cont`].

mod info;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, timeout};

use crate::document::Slot;
use crate::error::QemuError;
use crate::event::EventStream;
use crate::mirror::hang_up;
use crate::owner::Qemu;
use crate::qmp::QmpError;

use info::QueryMigrate;
pub use info::{MigrationInfo, MigrationStatus, RamProgress};

/// Between two queries when no event comes.
const QUERY_INTERVAL: Duration = Duration::from_millis(50);
/// For a source whose disks' peers are hung up on to be heard again; after it its memory's peer is hung up on as well.
const HEARING_DEADLINE: Duration = Duration::from_secs(2);
/// A cancelled source stops sending, restarts the guest and says so.
const CANCEL_DEADLINE: Duration = Duration::from_secs(10);

/// The side of a migration that a QEMU is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Sends.
    Source,
    /// Receives.
    Destination,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Source => "source",
            Role::Destination => "destination",
        })
    }
}

/// How a migration is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationOptions {
    /// Most that is sent, bytes a second.
    pub max_bandwidth: u64,
    /// The source pauses the guest when it expects to send the rest within this; whole milliseconds.
    pub downtime_limit: Duration,
    /// Slow the guest down when it writes faster than memory is sent.
    pub throttle: Option<Throttle>,
    /// QEMU tells the network where what arrives is: five times, from the first moment on. The guest is not asked to,
    /// see [`Qemu::attach_nic`].
    pub announce: bool,
}

impl Default for MigrationOptions {
    /// Practically no limit on the bandwidth, 300 ms, no throttling, announced.
    fn default() -> MigrationOptions {
        MigrationOptions {
            max_bandwidth: 100 << 30,
            downtime_limit: Duration::from_millis(300),
            throttle: None,
            announce: true,
        }
    }
}

/// How far the guest may be slowed down; percent of its CPU time that is taken away, 1 to 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// At first.
    pub initial: u8,
    /// More with each pass that does not help.
    pub increment: u8,
    /// At most.
    pub maximum: u8,
}

impl Default for Throttle {
    /// QEMU's own defaults: 20, 10 and 99.
    fn default() -> Throttle {
        Throttle { initial: 20, increment: 10, maximum: 99 }
    }
}

impl Qemu {
    /// Capabilities and parameters in one.
    pub async fn prepare_migration(&self, role: Role, options: &MigrationOptions) -> Result<(), QemuError> {
        self.set_migration_capabilities(role, options).await?;
        self.set_migration_parameters(role, options).await
    }

    /// Sets the capabilities of this side; must come before the stream, on both sides.
    pub async fn set_migration_capabilities(
        &self,
        role: Role,
        options: &MigrationOptions,
    ) -> Result<(), QemuError> {
        let source = role == Role::Source;
        let capabilities = [
            ("events", true),
            // Without it the source calls a migration complete that the destination has not loaded.
            ("return-path", true),
            ("validate-uuid", true),
            ("pause-before-switchover", source),
            // The destination takes the image locks at `cont`, so a rollback finds them free.
            ("late-block-activate", !source),
            ("auto-converge", source && options.throttle.is_some()),
        ]
        .map(|(capability, state)| json!({ "capability": capability, "state": state }));
        let set = self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).await;
        set.map_err(|source| QemuError::PrepareMigration { role, source })?;
        // QEMU refuses it while one runs, so what it says from now on is of one that is over.
        self.leaving.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Sets the parameters; on the source also while a migration runs, except that throttling cannot be switched on or
    /// off then (it is a capability): only how far it goes is changed.
    pub async fn set_migration_parameters(
        &self,
        role: Role,
        options: &MigrationOptions,
    ) -> Result<(), QemuError> {
        let milliseconds = u64::try_from(options.downtime_limit.as_millis()).unwrap_or(u64::MAX);
        let mut parameters = json!({
            "max-bandwidth": options.max_bandwidth,
            "downtime-limit": milliseconds,
        });
        if let Some(throttle) = options.throttle {
            parameters["cpu-throttle-initial"] = json!(throttle.initial);
            parameters["cpu-throttle-increment"] = json!(throttle.increment);
            parameters["max-cpu-throttle"] = json!(throttle.maximum);
        }
        if !options.announce {
            parameters["announce-rounds"] = json!(0);
        }
        let set = self.qmp.execute("migrate-set-parameters", parameters).await;
        set.map(drop).map_err(|source| QemuError::PrepareMigration { role, source })
    }

    /// Why this machine cannot be migrated as it is; empty when it can.
    pub async fn blocked_reasons(&self) -> Result<Vec<String>, QemuError> {
        Ok(self.migration_info().await?.blocked_reasons)
    }

    /// Starts to send to a connected stream socket. Returns at once; follow it with [`Qemu::migration_reaches`].
    pub async fn migrate_to_fd(&self, socket: OwnedFd) -> Result<(), QemuError> {
        self.stream("migrate", "migrate-out", socket)
            .await
            .map_err(|source| QemuError::StartMigration { role: Role::Source, source })
    }

    /// Starts to load from a connected stream socket; only in [`crate::Mode::Incoming`]. Returns at once.
    /// QEMU up to 9.x exits when loading fails.
    pub async fn incoming_from_fd(&self, socket: OwnedFd) -> Result<(), QemuError> {
        self.stream("migrate-incoming", "migrate-in", socket)
            .await
            .map_err(|source| QemuError::StartMigration { role: Role::Destination, source })
    }

    async fn stream(&self, command: &str, fd_name: &str, socket: OwnedFd) -> Result<(), QmpError> {
        self.qmp.pass_fd(fd_name, socket).await?;
        let before = self.leaving.load(Ordering::Relaxed);
        if command == "migrate" {
            // Before it is sent: whoever drops this call does not know whether it was.
            self.leaving.store(true, Ordering::Relaxed);
        }
        let started = self.qmp.execute(command, json!({ "uri": format!("fd:{fd_name}") })).await;
        if let Err(error) = started {
            if matches!(error, QmpError::Refused(_)) {
                // Nothing was begun: the status is still that of whatever was before.
                self.leaving.store(before, Ordering::Relaxed);
            }
            self.qmp.forget_fd(fd_name).await;
            return Err(error);
        }
        Ok(())
    }

    /// How the migration stands.
    pub async fn migration_info(&self) -> Result<MigrationInfo, QemuError> {
        let answer = self.qmp.execute("query-migrate", json!({})).await.map_err(QemuError::QueryMigration)?;
        let answer: QueryMigrate = serde_json::from_value(answer).map_err(|error| {
            QemuError::QueryMigration(QmpError::Answer {
                command: "query-migrate".to_owned(),
                reason: error.to_string(),
            })
        })?;
        Ok(answer.into())
    }

    /// Waits until the migration is at `wanted` and not already past it. Ends early, with an error, when it
    /// ends otherwise or comes into a status that is not known.
    pub async fn migration_reaches(
        &self,
        wanted: MigrationStatus,
        within: Duration,
    ) -> Result<MigrationInfo, QemuError> {
        let deadline = Instant::now() + within;
        let mut events = self.events();
        loop {
            let info = self.migration_info().await?;
            if info.status == wanted {
                return Ok(info);
            }
            match info.status {
                MigrationStatus::Completed
                | MigrationStatus::Failed
                | MigrationStatus::Cancelled
                | MigrationStatus::Unknown(_) => {
                    let reason =
                        info.error.unwrap_or_else(|| "QEMU gives no reason, see qemu.log".to_owned());
                    return Err(QemuError::MigrationEnded { status: info.status, reason });
                }
                MigrationStatus::None
                | MigrationStatus::Setup
                | MigrationStatus::Active
                | MigrationStatus::PreSwitchover
                | MigrationStatus::Device
                | MigrationStatus::Cancelling => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QemuError::MigrationTimeout { wanted, seen: info.status, after: within });
            }
            next_look(&mut events, left.min(QUERY_INTERVAL)).await;
        }
    }

    /// Lets a source that waits at `pre-switchover` send the rest.
    pub async fn migrate_continue(&self) -> Result<(), QemuError> {
        let go_on = self.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await;
        go_on.map(drop).map_err(QemuError::ContinueMigration)
    }

    /// Cancels an outgoing migration and waits until it is over; QEMU then lets a guest that ran run again. Nothing to cancel is
    /// no error, and neither is a migration that was over before the last [`Qemu::set_migration_capabilities`].
    /// [`QemuError::AlreadyCompleted`] when the machine has left, also when it left while this was asked.
    pub async fn migrate_cancel(&self) -> Result<(), QemuError> {
        // A machine that arrived, or left and was taken back, is still called complete.
        if !self.leaving.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut events = self.events();
        match self.migration_info().await?.status {
            MigrationStatus::Completed => return Err(QemuError::AlreadyCompleted),
            MigrationStatus::None | MigrationStatus::Failed | MigrationStatus::Cancelled => return Ok(()),
            _ => {}
        }
        // QEMU accepts this in any state, so what has become of it is only known from the status.
        self.qmp.execute("migrate_cancel", json!({})).await.map_err(QemuError::CancelMigration)?;
        let deadline = Instant::now() + CANCEL_DEADLINE;
        loop {
            let seen = self.migration_info().await?.status;
            match seen {
                MigrationStatus::Completed => return Err(QemuError::AlreadyCompleted),
                MigrationStatus::Failed | MigrationStatus::Cancelled => return Ok(()),
                _ => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let wanted = MigrationStatus::Cancelled;
                return Err(QemuError::MigrationTimeout { wanted, seen, after: CANCEL_DEADLINE });
            }
            next_look(&mut events, left.min(QUERY_INTERVAL)).await;
        }
    }

    /// Cancels an outgoing migration as [`Qemu::migrate_cancel`] does, whatever its peers do. `disks`: the mirrors that are
    /// given up with it, none of which is being started; when they fail, what is left of them is for
    /// [`Qemu::mirrors_abort`]. `memory`: the socket that the migration goes through. `at_once`: the guest may stand still.
    ///
    /// A QEMU that stops its guest waits for each write that is under way, one that sends the last of memory for the
    /// socket's other end, and in both it hears nobody. So they are hung up on: disks first when a guest waits for it,
    /// else, as memory, only when QEMU was not heard, because what is cut off fails, where what is cancelled is over in
    /// order.
    pub async fn take_back(
        &self,
        disks: &[Slot],
        memory: Option<&OwnedFd>,
        at_once: bool,
    ) -> Result<(), QemuError> {
        let hang_up_disks = || disks.iter().for_each(|slot| self.hang_up(*slot));
        if at_once {
            hang_up_disks();
        }
        match timeout(HEARING_DEADLINE, self.migrate_cancel()).await {
            Ok(Ok(())) => {
                // QEMU may still have a thread there that waits for the peer's word.
                memory.into_iter().for_each(hang_up);
                return Ok(());
            }
            Ok(end @ Err(QemuError::AlreadyCompleted)) => return end,
            Ok(Err(error)) => tracing::warn!(%error, "the migration is hung up on"),
            Err(_) => {
                tracing::warn!(after = ?HEARING_DEADLINE, "QEMU is not heard: the migration is hung up on")
            }
        }
        hang_up_disks();
        memory.into_iter().for_each(hang_up);
        // Looks first how it stands: what was asked above may have taken effect.
        self.migrate_cancel().await
    }
}

/// Until something happened, or for `at_most`. Which event it was does not matter: the state is queried next.
pub(crate) async fn next_look(events: &mut EventStream, at_most: Duration) {
    // A closed stream must not make a busy loop; the query that follows fails with the reason.
    drop(timeout(at_most, events.next()).await);
}
