//! What a shim tells its subscribers, and the coordinator hears: phases of a transfer.

use std::time::Duration;

use dunlin_wire::{Any, service};

/// How far a transfer is. Numbers as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// 1: both ends are connected.
    SetupDone,
    /// 2: memory or disks are being copied while the guest runs.
    TransferInProgress,
    /// 3: the source's guest is paused.
    BlackoutStarted,
    /// 4: the last state has left the source.
    OfflineDone,
    /// 5: a guest runs again.
    BlackoutExited,
    /// 6: this side's transfer is complete.
    Done,
    /// 7: recovered from a broken stream.
    RecoveryDone,
    /// 8: this side's transfer has failed.
    Failed,
}

/// How a phase ended. Numbers as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PhaseState {
    /// 1
    Success,
    /// 2: by a Cancel.
    Cancelled,
    /// 3: the guest shut down or reset itself.
    GuestInitiatedCancellation,
    /// 4
    SourceFailed,
    /// 5
    DestinationFailed,
    /// 6
    RecoveryFailed,
}

/// A reading of a transfer; bytes are totals since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Guest memory, bytes.
    pub memory_total: u64,
    /// Still to send, bytes.
    pub memory_remaining: u64,
    /// Sent, repeats included, bytes.
    pub memory_sent: u64,
    /// Passes over guest memory.
    pub passes: u64,
    /// Writable disks, bytes.
    pub disk_total: u64,
    /// Sent of them, bytes.
    pub disk_sent: u64,
    /// The VMM's own reading of the pause, once completed.
    pub downtime: Option<Duration>,
}

/// What comes with a phase.
#[derive(Debug, Clone, PartialEq)]
pub enum Detail {
    /// Nothing more.
    None,
    /// With [`Phase::TransferInProgress`] and [`Phase::OfflineDone`].
    Progress(Progress),
    /// With [`Phase::Done`].
    Complete {
        /// The last reading.
        progress: Progress,
        /// Of a source: for the destination's FinalizeSandbox(RESUME), unopened.
        handoff: Option<Any>,
    },
    /// With [`Phase::BlackoutExited`]: how long this side's guest was paused. With [`Phase::BlackoutStarted`]: for how long
    /// already, when that was told.
    Blackout(Duration),
    /// With [`Phase::Failed`]: the cause in words.
    Cause(String),
}

/// One thing told.
#[derive(Debug, Clone, PartialEq)]
pub struct Notice {
    /// How far.
    pub phase: Phase,
    /// How it ended.
    pub state: PhaseState,
    /// What comes with it.
    pub detail: Detail,
}

/// A notification that this build cannot read; a subscriber skips it and reads on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("notification: {field} {number} is unknown; run the same Dunlin version on both hosts")]
pub struct UnknownNotice {
    /// `phase` or `state`.
    pub field: &'static str,
    /// As given.
    pub number: i32,
}

impl Notice {
    /// A notice without details.
    pub fn plain(phase: Phase, state: PhaseState) -> Notice {
        Notice { phase, state, detail: Detail::None }
    }

    /// As the service sends it.
    pub fn to_wire(&self, origin: service::Origin) -> service::Notification {
        use service::notification::Phase_details;
        let mut wire = service::Notification::new();
        wire.origin = origin.into();
        wire.phase = match self.phase {
            Phase::SetupDone => service::Phase::PHASE_SETUP_DONE,
            Phase::TransferInProgress => service::Phase::PHASE_TRANSFER_IN_PROGRESS,
            Phase::BlackoutStarted => service::Phase::PHASE_BLACKOUT_STARTED,
            Phase::OfflineDone => service::Phase::PHASE_OFFLINE_DONE,
            Phase::BlackoutExited => service::Phase::PHASE_BLACKOUT_EXITED,
            Phase::Done => service::Phase::PHASE_DONE,
            Phase::RecoveryDone => service::Phase::PHASE_RECOVERY_DONE,
            Phase::Failed => service::Phase::PHASE_FAILED,
        }
        .into();
        wire.state = match self.state {
            PhaseState::Success => service::PhaseState::PHASE_STATE_SUCCESS,
            PhaseState::Cancelled => service::PhaseState::PHASE_STATE_CANCELLED,
            PhaseState::GuestInitiatedCancellation => {
                service::PhaseState::PHASE_STATE_GUEST_INITIATED_CANCELLATION
            }
            PhaseState::SourceFailed => service::PhaseState::PHASE_STATE_SOURCE_FAILED,
            PhaseState::DestinationFailed => service::PhaseState::PHASE_STATE_DESTINATION_FAILED,
            PhaseState::RecoveryFailed => service::PhaseState::PHASE_STATE_RECOVERY_FAILED,
        }
        .into();
        match &self.detail {
            Detail::None => {}
            Detail::Progress(progress) => {
                wire.phase_details = Some(Phase_details::Progress(progress.to_wire()));
            }
            Detail::Complete { progress, handoff } => {
                wire.phase_details = Some(Phase_details::Progress(progress.to_wire()));
                wire.handoff = handoff.clone().into();
            }
            Detail::Blackout(duration) => {
                let mut details = service::BlackoutExitedEventDetails::new();
                details.blackout_duration_milliseconds = millis(*duration);
                wire.phase_details = Some(Phase_details::BlackoutExited(details));
            }
            Detail::Cause(cause) => wire.message.clone_from(cause),
        }
        wire
    }

    /// Reads what a shim sent.
    pub fn from_wire(wire: &service::Notification) -> Result<Notice, UnknownNotice> {
        use service::notification::Phase_details;
        let phase = match wire.phase.value() {
            1 => Phase::SetupDone,
            2 => Phase::TransferInProgress,
            3 => Phase::BlackoutStarted,
            4 => Phase::OfflineDone,
            5 => Phase::BlackoutExited,
            6 => Phase::Done,
            7 => Phase::RecoveryDone,
            8 => Phase::Failed,
            number => return Err(UnknownNotice { field: "phase", number }),
        };
        let state = match wire.state.value() {
            // A shim of another make leaves a failure's state out when it does not know the side.
            0 if phase == Phase::Failed => PhaseState::RecoveryFailed,
            0 | 1 => PhaseState::Success,
            2 => PhaseState::Cancelled,
            3 => PhaseState::GuestInitiatedCancellation,
            4 => PhaseState::SourceFailed,
            5 => PhaseState::DestinationFailed,
            6 => PhaseState::RecoveryFailed,
            number => return Err(UnknownNotice { field: "state", number }),
        };
        let handoff = wire.handoff.as_ref().cloned();
        let detail = match &wire.phase_details {
            Some(Phase_details::Progress(progress)) if phase == Phase::Done => {
                Detail::Complete { progress: Progress::from_wire(progress), handoff }
            }
            Some(Phase_details::Progress(progress)) => Detail::Progress(Progress::from_wire(progress)),
            Some(Phase_details::BlackoutExited(details)) => {
                Detail::Blackout(Duration::from_millis(details.blackout_duration_milliseconds))
            }
            Some(_) => Detail::None,
            None if phase == Phase::Done && handoff.is_some() => {
                Detail::Complete { progress: Progress::default(), handoff }
            }
            None if wire.message.is_empty() => Detail::None,
            None => Detail::Cause(wire.message.clone()),
        };
        Ok(Notice { phase, state, detail })
    }
}

impl Progress {
    fn to_wire(self) -> service::TransferProgress {
        let mut wire = service::TransferProgress::new();
        wire.memory_total_bytes = self.memory_total;
        wire.memory_remaining_bytes = self.memory_remaining;
        wire.memory_sent_bytes = self.memory_sent;
        wire.memory_passes = self.passes;
        wire.disk_total_bytes = self.disk_total;
        wire.disk_sent_bytes = self.disk_sent;
        wire.downtime_milliseconds = self.downtime.map_or(0, millis);
        wire
    }

    fn from_wire(wire: &service::TransferProgress) -> Progress {
        let downtime = wire.downtime_milliseconds;
        Progress {
            memory_total: wire.memory_total_bytes,
            memory_remaining: wire.memory_remaining_bytes,
            memory_sent: wire.memory_sent_bytes,
            passes: wire.memory_passes,
            disk_total: wire.disk_total_bytes,
            disk_sent: wire.disk_sent_bytes,
            downtime: (downtime != 0).then(|| Duration::from_millis(downtime)),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_heard() {
        let progress = Progress {
            memory_total: 5,
            memory_sent: 7,
            passes: 2,
            disk_sent: 9,
            downtime: Some(Duration::from_millis(35)),
            ..Progress::default()
        };
        let handoff = Any { type_url: "h".into(), value: vec![0, 255], ..Any::default() };
        let notices = [
            Notice::plain(Phase::SetupDone, PhaseState::Success),
            Notice {
                phase: Phase::OfflineDone,
                state: PhaseState::Success,
                detail: Detail::Progress(progress),
            },
            Notice {
                phase: Phase::Done,
                state: PhaseState::Success,
                detail: Detail::Complete { progress, handoff: None },
            },
            Notice {
                phase: Phase::Done,
                state: PhaseState::Success,
                detail: Detail::Complete { progress, handoff: Some(handoff) },
            },
            Notice {
                phase: Phase::BlackoutExited,
                state: PhaseState::Success,
                detail: Detail::Blackout(Duration::from_millis(120)),
            },
            Notice {
                phase: Phase::Failed,
                state: PhaseState::DestinationFailed,
                detail: Detail::Cause("the stream broke".into()),
            },
        ];
        for notice in notices {
            let wire = notice.to_wire(service::Origin::ORIGIN_SOURCE);
            assert_eq!(Notice::from_wire(&wire), Ok(notice));
        }
    }

    #[test]
    fn unknown_numbers_are_told() {
        let mut wire = service::Notification::new();
        assert_eq!(Notice::from_wire(&wire), Err(UnknownNotice { field: "phase", number: 0 }));
        wire.phase = service::Phase::PHASE_DONE.into();
        wire.state = protobuf::EnumOrUnknown::from_i32(17);
        assert_eq!(Notice::from_wire(&wire), Err(UnknownNotice { field: "state", number: 17 }));
    }
}
