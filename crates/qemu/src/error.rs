//! What can go wrong, one variant for each action that failed. Each text ends in its cause's: whoever shows it shows why.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::document::{InvalidField, RootPort, Slot};
use crate::migration::{MigrationStatus, Role};
use crate::process::ExitReport;
use crate::qmp::QmpError;
use crate::version::BinaryMissing;
use crate::vfio::PciAddress;

/// Why there is no QEMU to own. Nothing is left behind: a process that did start is dead and reaped.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The document or the options do not describe a machine.
    #[error(transparent)]
    Document(#[from] InvalidField),
    /// There is no such program.
    #[error(transparent)]
    BinaryMissing(#[from] BinaryMissing),
    /// QEMU's log cannot be written.
    #[error("cannot open QEMU's log {path} for appending: {source}")]
    OpenLog {
        /// The log.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The system refused to start the process.
    #[error(
        "cannot start {binary} in a network namespace of its own: {source}; the caller needs CAP_SYS_ADMIN and the right to execute it"
    )]
    Start {
        /// The program.
        binary: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// QEMU ended before it answered; its own words are in the report.
    #[error("QEMU ended before it answered: {report}")]
    EndedEarly {
        /// How it ended.
        report: ExitReport,
    },
    /// QEMU runs but does not answer.
    #[error(
        "QEMU did not answer on its QMP socket within {after:?}: {source}; its log ends with: {stderr_tail}"
    )]
    NoAnswer {
        /// How long was waited.
        after: Duration,
        /// End of its log.
        stderr_tail: String,
        /// The last attempt.
        #[source]
        source: QmpError,
    },
}

/// Why an action on a running QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// `cont`, `stop`, `quit` and the like.
    #[error("could not {action} the VM: {source}")]
    Control {
        /// Verb of the action.
        action: &'static str,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The disk is not attached; nothing of it is left in QEMU.
    #[error("could not attach a disk at {slot} from {path}: {source}")]
    AttachDisk {
        /// Where it should have gone.
        slot: Slot,
        /// Its file on this host.
        path: PathBuf,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The disk is still attached, or its file still open.
    #[error("could not detach the disk at {slot}: {source}")]
    DetachDisk {
        /// Where it is.
        slot: Slot,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The guest keeps the device; unplugging stays requested and may still complete.
    #[error(
        "the guest did not release `{device}` within {after:?}; it must be running to do so, try again later"
    )]
    NotReleased {
        /// The device's id.
        device: String,
        /// How long was waited.
        after: Duration,
    },
    /// The NIC is not attached; the tap's descriptor is closed.
    #[error("could not attach a NIC at root port {port}: {source}")]
    AttachNic {
        /// Where it should have gone.
        port: RootPort,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The NIC is still attached, or its backend still open.
    #[error("could not detach the NIC at root port {port}: {source}")]
    DetachNic {
        /// Where it is.
        port: RootPort,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The host's device is not in the machine.
    #[error("could not pass PCI device {address} through at root port {port}: {source}")]
    AttachDevice {
        /// Where it should have gone.
        port: RootPort,
        /// The device on the host.
        address: PciAddress,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The host's device is still in the machine.
    #[error("could not take the passed-through device out of root port {port}: {source}")]
    DetachDevice {
        /// Where it is.
        port: RootPort,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// Capabilities or parameters were refused; no migration has begun.
    #[error("could not set up QEMU as the {role} of a migration: {source}")]
    PrepareMigration {
        /// Which side.
        role: Role,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The stream was not taken; no migration has begun.
    #[error("could not start the migration as its {role}: {source}")]
    StartMigration {
        /// Which side.
        role: Role,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// `query-migrate` failed.
    #[error("could not ask QEMU how the migration stands: {0}")]
    QueryMigration(#[source] QmpError),
    /// `migrate-continue` failed; the VM stays paused at the switchover.
    #[error("could not let the migration go on past the switchover point: {0}")]
    ContinueMigration(#[source] QmpError),
    /// `migrate_cancel` failed.
    #[error("could not cancel the migration: {0}")]
    CancelMigration(#[source] QmpError),
    /// The machine has left this host: cancelling would pretend otherwise.
    #[error("the migration has already completed; it can no longer be cancelled, only finalised")]
    AlreadyCompleted,
    /// The migration ended in another status than the one awaited.
    #[error("the migration ended as `{status}`: {reason}")]
    MigrationEnded {
        /// Its last status.
        status: MigrationStatus,
        /// QEMU's text, which is often empty.
        reason: String,
    },
    /// The migration is still under way.
    #[error("the migration did not reach `{wanted}` within {after:?}; it stands at `{seen}`")]
    MigrationTimeout {
        /// The status awaited.
        wanted: MigrationStatus,
        /// The status seen last.
        seen: MigrationStatus,
        /// How long was waited.
        after: Duration,
    },
    /// The NBD server did not start or stop.
    #[error("could not {action} the NBD server: {source}")]
    NbdServer {
        /// `start` or `stop`.
        action: &'static str,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// An NBD export was not made or not removed.
    #[error("could not {action} the NBD export of the disk at {slot}: {source}")]
    NbdExport {
        /// `add` or `remove`.
        action: &'static str,
        /// The disk.
        slot: Slot,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// An export that was asked to go is still there.
    #[error("the NBD export of the disk at {slot} was still in use after {after:?}")]
    NbdExportBusy {
        /// The disk.
        slot: Slot,
        /// How long was waited.
        after: Duration,
    },
    /// The mirror did not start; nothing of it is left in QEMU.
    #[error(
        "could not start to mirror the disk at {slot}: {source}; is its export there on the destination?"
    )]
    StartMirror {
        /// The disk.
        slot: Slot,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// There is one already, or what is left of one that was given up.
    #[error("the disk at {slot} has a mirror, or what is left of one; abort it first")]
    MirrorExists {
        /// The disk.
        slot: Slot,
    },
    /// A command about a mirror failed.
    #[error("could not {action} the mirror of the disk at {slot}: {source}")]
    ControlMirror {
        /// Verb of the action.
        action: &'static str,
        /// The disk.
        slot: Slot,
        /// QMP's side of it.
        #[source]
        source: QmpError,
    },
    /// The copy broke off; the source's disk is whole, the destination's is not.
    #[error("the mirror of the disk at {slot} failed: {reason}; abort it and start again")]
    MirrorFailed {
        /// The disk.
        slot: Slot,
        /// QEMU's text.
        reason: String,
    },
    /// The mirror is not where it was awaited.
    #[error(
        "the mirror of the disk at {slot} was not {wanted} within {after:?} ({status}, {copied} of {total} bytes copied)"
    )]
    MirrorTimeout {
        /// The disk.
        slot: Slot,
        /// `in step` or `finished`.
        wanted: &'static str,
        /// How long was waited.
        after: Duration,
        /// QEMU's word for the job's state.
        status: String,
        /// Bytes copied so far.
        copied: u64,
        /// Bytes to copy as known so far.
        total: u64,
    },
    /// The disk has no mirror, or none that is in step.
    #[error("the disk at {slot} has no mirror that is in step; start one and wait until it is ready")]
    MirrorNotReady {
        /// The disk.
        slot: Slot,
    },
    /// The process is gone.
    #[error("QEMU is gone: {0}")]
    Ended(ExitReport),
    /// The process's figures cannot be read.
    #[error("could not read the resource figures of QEMU's process: {0}")]
    Usage(#[source] io::Error),
    /// SIGKILL was sent and the process is still there: it hangs in the kernel.
    #[error(
        "QEMU (process {pid}) did not end within {after:?} of SIGKILL; look for blocked storage on this host"
    )]
    Unkillable {
        /// Its process id.
        pid: i32,
        /// How long was waited.
        after: Duration,
    },
}
