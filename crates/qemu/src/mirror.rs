//! Disks that move with the machine: the destination exports them by NBD, the source mirrors into the exports.
//!
//! A slot's export, and the mirror's job, target and filter, are named after it: `disk-<s>`, `mirror-<s>`,
//! `mirror-target-<s>`, `mirror-filter-<s>`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout, timeout_at};

use crate::disk::node_name;
use crate::document::Slot;
use crate::error::QemuError;
use crate::event::Event;
use crate::migration::next_look;
use crate::owner::Qemu;
use crate::qmp::QmpError;
use crate::run_state::RunState;

/// For NBD's handshake, in which QEMU's main loop, and so the guest's devices, stand still.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// For the requests in flight of mirrors that are given up.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(1);
/// For an export's clients to be cut off.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);
/// For a job that was told to end. Graceful endings take milliseconds once the mirror is in step.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// The most that SO_SNDBUFFORCE takes, in bytes.
const ROOM: usize = (i32::MAX / 2) as usize;
/// QMP's `JobStatus` of a job that is over.
const CONCLUDED: &str = "concluded";
/// Why a mirror failed that gives no reason.
const EARLY: &str = "it ended before it was told to";
/// Between two queries when no event comes.
const QUERY_INTERVAL: Duration = Duration::from_millis(50);

/// A block job, from `query-block-jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// Its id: `mirror-<slot>`.
    #[serde(rename = "device")]
    pub id: String,
    /// Bytes copied.
    #[serde(rename = "offset")]
    pub copied: u64,
    /// Bytes to copy as known so far; grows while the guest writes.
    #[serde(rename = "len")]
    pub total: u64,
    /// Whether the copy is in step.
    pub ready: bool,
    /// QMP's `JobStatus`; `concluded` when it is over.
    pub status: String,
    /// Why it failed, once it is over.
    pub error: Option<String>,
    /// QMP's `BlockDeviceIoStatus`: other than `ok` once the target failed. The job then stands still until it is ended.
    #[serde(rename = "io-status")]
    pub io_status: String,
}

impl BlockJob {
    /// Why nothing more comes of it, if so.
    fn fault(&self) -> Option<String> {
        match self.io_status.as_str() {
            _ if self.status == CONCLUDED => Some(self.error.clone().unwrap_or_else(|| EARLY.to_owned())),
            "ok" => None,
            "nospace" => Some("its target has no space left".to_owned()),
            _ => Some("its target, or the connection to it, failed".to_owned()),
        }
    }
}

fn job_id(slot: Slot) -> String {
    format!("mirror-{slot}")
}

fn target_name(slot: Slot) -> String {
    format!("mirror-target-{slot}")
}

fn export_id(slot: Slot) -> String {
    format!("export-{slot}")
}

/// The destination's side.
impl Qemu {
    /// Listens for NBD clients on a unix socket.
    pub async fn nbd_server_start(&self, socket: &Path) -> Result<(), QemuError> {
        let failed = |source| QemuError::NbdServer { action: "start", source };
        let path = socket.to_str().ok_or_else(|| {
            failed(QmpError::Answer {
                command: "nbd-server-start".to_owned(),
                reason: "QMP is JSON: a path must be UTF-8".to_owned(),
            })
        })?;
        let address = json!({ "addr": { "type": "unix", "data": { "path": path } } });
        self.qmp.execute("nbd-server-start", address).await.map(drop).map_err(failed)
    }

    /// Exports the disk of a slot for writing, as `disk-<slot>`; the name is returned.
    pub async fn nbd_export_add(&self, slot: Slot) -> Result<String, QemuError> {
        let name = node_name(slot);
        let export = json!({
            "type": "nbd", "id": export_id(slot), "node-name": name, "name": name, "writable": true,
        });
        match self.qmp.execute("block-export-add", export).await {
            Ok(_) => Ok(name),
            Err(source) => Err(QemuError::NbdExport { action: "add", slot, source }),
        }
    }

    /// Removes the export of a slot and cuts off its clients. What they have been answered is kept, so do this after the
    /// source has finished its mirror, or to give the disk up.
    pub async fn nbd_export_remove(&self, slot: Slot) -> Result<(), QemuError> {
        let deadline = Instant::now() + EXPORT_DEADLINE;
        let mut events = self.events();
        let id = export_id(slot);
        let failed = |source| QemuError::NbdExport { action: "remove", slot, source };
        let request = json!({ "id": id, "mode": "hard" });
        self.qmp.execute("block-export-del", request).await.map_err(failed)?;
        loop {
            // Queried as well as awaited: the event may be lost, the export is either listed or not.
            let exports = self.qmp.execute("query-block-exports", json!({})).await.map_err(failed)?;
            let listed = exports.as_array().is_some_and(|exports| {
                exports.iter().any(|export| export.get("id").and_then(Value::as_str) == Some(&id))
            });
            if !listed {
                return Ok(());
            }
            match timeout_at(deadline, events.next()).await {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Err(QemuError::NbdExportBusy { slot, after: EXPORT_DEADLINE }),
            }
        }
    }

    /// Stops listening; exports that are left go too.
    pub async fn nbd_server_stop(&self) -> Result<(), QemuError> {
        let stopped = self.qmp.execute("nbd-server-stop", json!({})).await;
        stopped.map(drop).map_err(|source| QemuError::NbdServer { action: "stop", source })
    }
}

/// The source's side.
impl Qemu {
    /// Starts to copy the disk of a slot to an NBD export, through a socket that is connected to its server. From now on each
    /// write of the guest goes to both before it is answered.
    ///
    /// A call may be dropped, and QEMU may then have got anywhere with it: [`Qemu::mirrors_abort`] clears away what there
    /// is, and until it has no other mirror of the slot starts.
    pub async fn mirror_start(&self, slot: Slot, socket: OwnedFd, export: &str) -> Result<(), QemuError> {
        let failed = |source| QemuError::StartMirror { slot, source };
        let ours = socket.try_clone().map_err(|error| {
            failed(QmpError::Closed { reason: format!("the socket cannot be duplicated: {error}").into() })
        })?;
        // Noted before QEMU is told anything: whoever gives up from here on leaves the note.
        match self.sockets().entry(slot) {
            Entry::Vacant(place) => drop(place.insert(ours)),
            Entry::Occupied(_) => return Err(QemuError::MirrorExists { slot }),
        }
        let Err(error) = self.add_mirror(slot, socket, export).await else { return Ok(()) };
        if matches!(error, QmpError::Timeout { .. }) {
            self.hang_up(slot);
        }
        if let Err(undo) = self.mirrors_abort(&[slot]).await {
            tracing::warn!(%slot, error = %undo, "a mirror that did not start is not cleared away");
        }
        Err(failed(error))
    }

    async fn add_mirror(&self, slot: Slot, socket: OwnedFd, export: &str) -> Result<(), QmpError> {
        let fd_name = job_id(slot);
        self.qmp.pass_fd(&fd_name, socket).await?;
        let target = json!({
            "node-name": target_name(slot),
            "driver": "nbd",
            "server": { "type": "fd", "str": fd_name },
            "export": export,
            "discard": "unmap",
            "detect-zeroes": "unmap",
        });
        self.qmp.execute_within("blockdev-add", target, HANDSHAKE_DEADLINE).await?;
        let job = json!({
            "job-id": job_id(slot),
            "device": node_name(slot),
            "target": target_name(slot),
            "filter-node-name": format!("mirror-filter-{slot}"),
            "sync": "full",
            "copy-mode": "write-blocking",
            // A job whose target fails waits to be ended. One that ended by itself would do so among the guest's writes:
            // see [`Qemu::end_jobs`].
            "on-target-error": "stop",
            // A job that is over stays listed with its error until it is dismissed: no event can be missed.
            "auto-dismiss": false,
        });
        self.qmp.execute("blockdev-mirror", job).await.map(drop)
    }

    /// Waits until the mirror of a slot is in step with its disk; it stays so until it is ended.
    pub async fn mirror_ready(&self, slot: Slot, within: Duration) -> Result<(), QemuError> {
        let deadline = Instant::now() + within;
        let mut events = self.events();
        loop {
            let job = self.mirror_job(slot).await?.ok_or(QemuError::MirrorNotReady { slot })?;
            if let Some(reason) = job.fault() {
                return Err(QemuError::MirrorFailed { slot, reason });
            }
            if job.ready {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out(slot, "in step", within, &job));
            }
            next_look(&mut events, left.min(QUERY_INTERVAL)).await;
        }
    }

    /// Ends a mirror that is in step, with both copies equal, and closes its target. The guest should be paused, else it
    /// writes on to the source's disk alone. What is left of one that failed is for [`Qemu::mirrors_abort`].
    pub async fn mirror_finish(&self, slot: Slot) -> Result<(), QemuError> {
        let Some(job) = self.mirror_job(slot).await? else { return Err(QemuError::MirrorNotReady { slot }) };
        if let Some(reason) = job.fault() {
            return Err(QemuError::MirrorFailed { slot, reason });
        }
        if !job.ready {
            return Err(QemuError::MirrorNotReady { slot });
        }
        self.cancel_job(slot, "finish", false).await?;
        let ended = |job: &BlockJob| job.fault().is_some();
        let job = self.job_becomes(slot, "finished", END_DEADLINE, ended).await?;
        if job.status != CONCLUDED || job.error.is_some() {
            // The copy is not whole: nobody may take its end for a good one.
            self.hang_up(slot);
            return Err(QemuError::MirrorFailed { slot, reason: job.fault().unwrap_or_default() });
        }
        self.clear_away(slot, "finish").await
    }

    /// Ends mirrors at once, whatever their state and their peers'; the source's disks are whole. No mirror is no error. One
    /// whose start or end was given up half-way goes as well, and so does this call's own half. The peers see their
    /// connections break: of a mirror's ends only [`Qemu::mirror_finish`] is one in order.
    ///
    /// The guest stands still for some milliseconds, at most a few seconds when a peer is silent.
    pub async fn mirrors_abort(&self, slots: &[Slot]) -> Result<(), QemuError> {
        let begun = |slot: &Slot| self.sockets().contains_key(slot);
        let begun: Vec<Slot> = slots.iter().copied().filter(begun).collect();
        let (mut running, mut over) = (Vec::new(), Vec::new());
        for slot in begun {
            match self.settled_job(slot).await? {
                Some(job) if job.status == CONCLUDED => over.push((slot, true)),
                Some(_) => {
                    running.push(slot);
                    over.push((slot, true));
                }
                None => over.push((slot, false)),
            }
        }
        let ended = self.end_jobs(&running).await;
        // Whatever became of that, the guest goes on. Also when an earlier call was dropped in its middle.
        self.let_guest_go().await?;
        ended?;
        for (slot, job) in over {
            // Settled and ended, so nothing is cut short.
            self.hang_up(slot);
            match job {
                true => self.clear_away(slot, "abort").await?,
                false => self.clear_target(slot).await?,
            }
        }
        Ok(())
    }

    /// Ends jobs, and leaves the guest standing still.
    ///
    /// QEMU 7.2 frees a mirror's bitmap of requests in flight when its job is cancelled or fails, and only then waits for the
    /// writes of the guest that go through the mirror: each of them clears its bits in memory that is freed. (`mirror_run`,
    /// `active_write_settle`.) So the guest is stopped first, which waits for its writes. The job is paused before that, because
    /// stopping waits for all that is in flight, the copy's own requests included, and QEMU hears nothing meanwhile.
    async fn end_jobs(&self, slots: &[Slot]) -> Result<(), QemuError> {
        for slot in slots {
            if let Err(error) = self.qmp.execute("job-pause", json!({ "id": job_id(*slot) })).await {
                // One whose target failed stands still already; another may have ended by itself since.
                tracing::debug!(%slot, %error, "pausing the mirror");
            }
        }
        let still = |job: &BlockJob| matches!(job.status.as_str(), "paused" | "standby" | CONCLUDED);
        self.jobs_become(slots, "still", still).await?;
        self.hold_guest(slots).await?;
        for slot in slots {
            if let Err(error) = self.cancel_job(*slot, "abort", true).await {
                tracing::debug!(%slot, %error, "cancelling the mirror");
            }
        }
        self.jobs_become(slots, "ended", |job| job.status == CONCLUDED).await
    }

    /// Waits for a state of jobs that each reaches once its requests in flight are answered. A peer that is there answers
    /// them; one that is silent is hung up on.
    async fn jobs_become(
        &self,
        slots: &[Slot],
        wanted: &'static str,
        is: impl Fn(&BlockJob) -> bool,
    ) -> Result<(), QemuError> {
        let answered = Instant::now() + ANSWERS_DEADLINE;
        for slot in slots {
            let left = answered.saturating_duration_since(Instant::now());
            if matches!(
                self.job_becomes(*slot, wanted, left, &is).await,
                Err(QemuError::MirrorTimeout { .. })
            ) {
                self.hang_up(*slot);
                self.job_becomes(*slot, wanted, END_DEADLINE, &is).await?;
            }
        }
        Ok(())
    }

    /// Stops a guest that runs, and with that waits for its writes, which mirrors' silent peers may hold.
    async fn hold_guest(&self, slots: &[Slot]) -> Result<(), QemuError> {
        if slots.is_empty() || self.status().await? != RunState::Running {
            return Ok(());
        }
        // Noted before QEMU is told: whoever gives up from here on leaves the note.
        self.held.store(true, Ordering::Relaxed);
        match timeout(ANSWERS_DEADLINE, self.stop()).await {
            Ok(stopped) => stopped,
            Err(_) => {
                slots.iter().for_each(|slot| self.hang_up(*slot));
                // Answered after the first one.
                self.stop().await
            }
        }
    }

    async fn let_guest_go(&self) -> Result<(), QemuError> {
        if self.held.load(Ordering::Relaxed) {
            self.cont().await?;
            self.held.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Bytes that the mirror of a slot has put on its TCP connection so far: unlike a job's progress, holes that were not
    /// sent do not count. None without a mirror, or when it goes through another kind of socket.
    pub fn mirror_bytes_sent(&self, slot: Slot) -> Option<u64> {
        tcp_bytes_sent(self.sockets().get(&slot)?)
    }

    /// All block jobs, with their progress.
    pub async fn block_jobs(&self) -> Result<Vec<BlockJob>, QemuError> {
        let failed = |source| QemuError::Control { action: "list the block jobs of", source };
        let answer = self.qmp.execute("query-block-jobs", json!({})).await.map_err(failed)?;
        serde_json::from_value(answer).map_err(|error| {
            failed(QmpError::Answer { command: "query-block-jobs".to_owned(), reason: error.to_string() })
        })
    }

    /// The first of these mirrors of which nothing more comes although nobody ended it, and why.
    pub async fn fallen_mirror(&self, slots: &[Slot]) -> Result<Option<(Slot, String)>, QemuError> {
        let jobs = self.block_jobs().await?;
        Ok(slots.iter().find_map(|slot| {
            let id = job_id(*slot);
            let reason = match jobs.iter().find(|job| job.id == id) {
                None => "it is gone".to_owned(),
                Some(job) => job.fault()?,
            };
            Some((*slot, reason))
        }))
    }

    /// The mirror of a slot, or `None` when it has none.
    pub async fn mirror_job(&self, slot: Slot) -> Result<Option<BlockJob>, QemuError> {
        let id = job_id(slot);
        Ok(self.block_jobs().await?.into_iter().find(|job| job.id == id))
    }

    async fn cancel_job(&self, slot: Slot, action: &'static str, force: bool) -> Result<(), QemuError> {
        let request = json!({ "device": job_id(slot), "force": force });
        let cancelled = self.qmp.execute("block-job-cancel", request).await;
        cancelled.map(drop).map_err(|source| QemuError::ControlMirror { action, slot, source })
    }

    async fn job_becomes(
        &self,
        slot: Slot,
        wanted: &'static str,
        within: Duration,
        is: impl Fn(&BlockJob) -> bool,
    ) -> Result<BlockJob, QemuError> {
        let deadline = Instant::now() + within;
        let mut events = self.events();
        loop {
            let job = self.mirror_job(slot).await?.ok_or(QemuError::MirrorNotReady { slot })?;
            if is(&job) {
                return Ok(job);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out(slot, wanted, within, &job));
            }
            next_look(&mut events, left.min(QUERY_INTERVAL)).await;
        }
    }

    async fn clear_away(&self, slot: Slot, action: &'static str) -> Result<(), QemuError> {
        let failed = |source| QemuError::ControlMirror { action, slot, source };
        self.qmp.execute("job-dismiss", json!({ "id": job_id(slot) })).await.map_err(failed)?;
        self.close_node(&target_name(slot)).await.map_err(failed)?;
        self.sockets().remove(&slot);
        Ok(())
    }

    /// Takes away what there is of a mirror without a job: its descriptor, its target, or neither.
    async fn clear_target(&self, slot: Slot) -> Result<(), QemuError> {
        let failed = |source| QemuError::ControlMirror { action: "clear away", slot, source };
        self.qmp.forget_fd(&job_id(slot)).await;
        let name = target_name(slot);
        if let Err(error) = self.close_node(&name).await {
            // QEMU has no class of error for a node that is not there.
            let nodes = self.qmp.execute("query-named-block-nodes", json!({ "flat": true })).await;
            let nodes = nodes.map_err(failed)?;
            let open = |node: &Value| node.get("node-name").and_then(Value::as_str) == Some(&name);
            if nodes.as_array().is_some_and(|nodes| nodes.iter().any(open)) {
                return Err(failed(error));
            }
        }
        self.sockets().remove(&slot);
        Ok(())
    }

    /// The mirror's job, once nothing that was sent before is still being done: QEMU takes commands in turn.
    ///
    /// A start that was given up is let come to its end; a handshake is cut short only for a peer that says nothing.
    async fn settled_job(&self, slot: Slot) -> Result<Option<BlockJob>, QemuError> {
        let failed = |source| QemuError::Control { action: "list the block jobs of", source };
        match self.qmp.execute_within("query-block-jobs", json!({}), HANDSHAKE_DEADLINE).await {
            Ok(_) => {}
            Err(QmpError::Timeout { .. }) => self.hang_up(slot),
            Err(error) => return Err(failed(error)),
        }
        self.mirror_job(slot).await
    }

    /// Ends a mirror's connection, without a word to QEMU: one that waits for its peer stops waiting, and its mirror fails.
    /// What is left of it is for [`Qemu::mirrors_abort`]. No mirror is no error.
    pub fn hang_up(&self, slot: Slot) {
        if let Some(socket) = self.sockets().get(&slot) {
            hang_up(socket);
        }
    }

    fn sockets(&self) -> MutexGuard<'_, HashMap<Slot, OwnedFd>> {
        self.mirror_sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an event says against the mirror of a slot that nobody ended: it met an error, or is over before its time.
pub fn mirror_fault(event: &Event, slot: Slot) -> Option<String> {
    let mine = job_id(slot);
    match event {
        Event::BlockJobError { id, operation, action } if *id == mine && action != "ignore" => {
            Some(format!("a {operation} failed"))
        }
        Event::BlockJobCompleted { id, error } if *id == mine => {
            Some(error.clone().unwrap_or_else(|| EARLY.to_owned()))
        }
        Event::BlockJobCancelled { id } if *id == mine => Some("it was cancelled".to_owned()),
        Event::JobStatusChange { id, status } if *id == mine && status == "concluded" => {
            Some(EARLY.to_owned())
        }
        _ => None,
    }
}

fn timed_out(slot: Slot, wanted: &'static str, after: Duration, job: &BlockJob) -> QemuError {
    let BlockJob { status, copied, total, .. } = job.clone();
    QemuError::MirrorTimeout { slot, wanted, after, status, copied, total }
}

/// Bytes that TCP has sent on a socket, retransmissions left out; None for another kind of socket.
fn tcp_bytes_sent(socket: &OwnedFd) -> Option<u64> {
    // SAFETY: an all-zero `tcp_info` is a valid value of plain numbers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(std::mem::size_of_val(&info)).ok()?;
    // SAFETY: the kernel writes at most `length` bytes into `info`, which has that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    (result == 0).then(|| info.tcpi_bytes_sent.saturating_sub(info.tcpi_bytes_retrans))
}

/// Ends the connection for every holder of the socket.
pub(crate) fn hang_up(socket: &OwnedFd) {
    if let Err(error) = shutdown(socket.as_raw_fd(), Shutdown::Both) {
        tracing::debug!(%error, "shutting a socket down");
    }
    // A QEMU that waits to write on is woken by room alone. TCP has room once it is shut; a Unix socket has none while its
    // peer does not read, so it gets all there can be.
    if let Err(error) = setsockopt(socket, sockopt::SndBufForce, &ROOM) {
        tracing::debug!(%error, "making room in a socket");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_s_fault_is_told_by_its_own_events_alone() {
        let (mine, other) = (Slot::new(0, 1).unwrap(), Slot::new(0, 11).unwrap());
        let id = || "mirror-0-1".to_owned();
        let error = |action: &str| Event::BlockJobError {
            id: id(),
            operation: "write".into(),
            action: action.into(),
        };
        let status = |status: &str| Event::JobStatusChange { id: id(), status: status.into() };
        let broken = Some("Connection reset by peer".to_owned());
        for (event, wanted) in [
            (error("report"), Some("a write failed")),
            (error("stop"), Some("a write failed")),
            (error("ignore"), None),
            (Event::BlockJobCompleted { id: id(), error: broken }, Some("Connection reset by peer")),
            (Event::BlockJobCompleted { id: id(), error: None }, Some(EARLY)),
            (Event::BlockJobCancelled { id: id() }, Some("it was cancelled")),
            (status("concluded"), Some(EARLY)),
            (status("ready"), None),
            (Event::BlockJobReady { id: id() }, None),
            (Event::Stop, None),
        ] {
            assert_eq!(mirror_fault(&event, mine).as_deref(), wanted, "{event:?}");
            assert_eq!(mirror_fault(&event, other), None, "{event:?}");
        }
    }
}
