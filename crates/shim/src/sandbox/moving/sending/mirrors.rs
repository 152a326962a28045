//! The disks' part of a transfer: their mirrors, from the first copy to their end in step.

use std::sync::Arc;
use std::time::Duration;

use dunlin_migration::session::TransferFault;
use dunlin_wire::ids::Slot;
use tokio::time::Instant;

use super::{PROGRESS_PERIOD, Sending, source_failed};
use crate::vm::qemu_slot;

/// The first copy of the disks: as long as it takes, but not for ever.
const MIRROR_DEADLINE: Duration = Duration::from_secs(3600);
/// Ending a mirror that is in step, guest paused.
const MIRROR_END_DEADLINE: Duration = Duration::from_secs(10);
/// For a mirror that met an error to end and say which.
const REASON_DEADLINE: Duration = Duration::from_millis(200);

impl Sending<'_> {
    /// Waits until every mirror has copied its disk once.
    pub(super) async fn mirrors_in_step(&mut self) -> Result<(), TransferFault> {
        let deadline = Instant::now() + MIRROR_DEADLINE;
        let mut period = tokio::time::interval(PROGRESS_PERIOD);
        for slot in self.disks.clone() {
            let vm = Arc::clone(self.vm);
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = vm.qemu.mirror_ready(qemu_slot(slot), left);
            tokio::pin!(ready);
            loop {
                tokio::select! {
                    result = &mut ready => {
                        result.map_err(|error| source_failed(error.to_string()))?;
                        break;
                    }
                    _ = period.tick() => {
                        // Those in step already are not waited for above.
                        self.mirrors_stand().await?;
                        self.report().await;
                    }
                }
            }
        }
        Ok(())
    }

    /// The guest writes no more: each mirror is ended in step with its disk.
    pub(super) async fn settle_disks(&mut self) -> Result<(), TransferFault> {
        while let Some(slot) = self.disks.first().copied() {
            self.count_disks();
            let end = self.vm.qemu.mirror_finish(qemu_slot(slot));
            match tokio::time::timeout(MIRROR_END_DEADLINE, end).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(source_failed(error.to_string())),
                Err(_) => {
                    return Err(source_failed(format!(
                        "the mirror of disk {slot} did not end within {} s",
                        MIRROR_END_DEADLINE.as_secs()
                    )));
                }
            }
            self.disks.remove(0);
        }
        Ok(())
    }

    /// Bytes on the disks' connections so far; a mirror that has ended keeps its last count.
    pub(super) fn count_disks(&mut self) {
        for slot in &self.disks {
            if let Some(bytes) = self.vm.qemu.mirror_bytes_sent(qemu_slot(*slot)) {
                self.sent.insert(*slot, bytes);
            }
        }
        self.progress.disk_sent = self.sent.values().sum();
    }

    /// Whether every mirror that was begun is still at work.
    pub(super) async fn mirrors_stand(&self) -> Result<(), TransferFault> {
        let slots: Vec<_> = self.disks.iter().copied().map(qemu_slot).collect();
        if slots.is_empty() {
            return Ok(());
        }
        let fallen = self.vm.qemu.fallen_mirror(&slots).await;
        match fallen.map_err(|error| source_failed(error.to_string()))? {
            None => Ok(()),
            Some((slot, reason)) => Err(mirror_failed(slot, &reason)),
        }
    }

    /// The mirror of a disk has an error, of which QEMU says more once the job is over.
    pub(super) async fn mirror_fell(&self, slot: Slot, told: String) -> TransferFault {
        let (qemu, place) = (&self.vm.qemu, qemu_slot(slot));
        let concluded = async {
            loop {
                match qemu.mirror_job(place).await {
                    Ok(Some(job)) if job.status == "concluded" => return job.error,
                    Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                    Ok(None) | Err(_) => return None,
                }
            }
        };
        let said = tokio::time::timeout(REASON_DEADLINE, concluded).await.ok().flatten();
        mirror_failed(slot, &said.unwrap_or(told))
    }
}

fn mirror_failed(slot: impl std::fmt::Display, reason: &str) -> TransferFault {
    source_failed(format!(
        "QEMU's mirror of disk {slot} failed: {reason}; look at the destination's log and at the network between, then move \
         again"
    ))
}
