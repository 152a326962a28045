//! How a migration stands, as `query-migrate` tells it.

use std::fmt;

use serde::Deserialize;

/// QMP's `MigrationStatus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationStatus {
    /// None has begun.
    None,
    /// Being set up.
    Setup,
    /// Sending or receiving memory.
    Active,
    /// The source's guest is paused and the source waits to be told to go on.
    PreSwitchover,
    /// Sending or receiving device state.
    Device,
    /// Over; the machine is at the destination.
    Completed,
    /// Over; the source's guest runs again.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Over at our request; the source's guest runs again.
    Cancelled,
    /// A status that is never asked for here (post-copy, COLO) or that this version does not know. It is a failure:
    /// nothing may be concluded from it.
    Unknown(String),
}

impl From<&str> for MigrationStatus {
    fn from(text: &str) -> MigrationStatus {
        match text {
            "none" => MigrationStatus::None,
            "setup" => MigrationStatus::Setup,
            "active" => MigrationStatus::Active,
            "pre-switchover" => MigrationStatus::PreSwitchover,
            "device" => MigrationStatus::Device,
            "completed" => MigrationStatus::Completed,
            "failed" => MigrationStatus::Failed,
            "cancelling" => MigrationStatus::Cancelling,
            "cancelled" => MigrationStatus::Cancelled,
            other => MigrationStatus::Unknown(other.to_owned()),
        }
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MigrationStatus::None => "none",
            MigrationStatus::Setup => "setup",
            MigrationStatus::Active => "active",
            MigrationStatus::PreSwitchover => "pre-switchover",
            MigrationStatus::Device => "device",
            MigrationStatus::Completed => "completed",
            MigrationStatus::Failed => "failed",
            MigrationStatus::Cancelling => "cancelling",
            MigrationStatus::Cancelled => "cancelled",
            MigrationStatus::Unknown(other) => other,
        })
    }
}

/// How a migration stands, from `query-migrate`.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationInfo {
    /// Where it is. After a rollback the last status stays: ask [`Qemu::status`] too.
    pub status: MigrationStatus,
    /// Memory figures, on the source.
    pub ram: Option<RamProgress>,
    /// Since it began, milliseconds.
    pub total_time_ms: Option<u64>,
    /// From the pause to the end of sending, milliseconds; on the source, after completion.
    pub downtime_ms: Option<u64>,
    /// What the downtime would be now, milliseconds; on the source, while memory is sent.
    pub expected_downtime_ms: Option<u64>,
    /// What is taken of the guest's CPU time, percent; none while it is not slowed down.
    pub throttle_percent: Option<u8>,
    /// Why it failed; QEMU often does not say.
    pub error: Option<String>,
    /// Why this machine cannot be migrated as it is; empty when it can.
    pub blocked_reasons: Vec<String>,
}

/// Guest memory sent, bytes unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamProgress {
    /// Guest memory in all.
    pub total: u64,
    /// To be sent still.
    pub remaining: u64,
    /// Sent so far.
    pub transferred: u64,
    /// How often dirty pages were collected: passes.
    pub dirty_sync_count: u64,
    /// Pages dirtied a second.
    #[serde(default)]
    pub dirty_pages_rate: u64,
    /// Megabits sent a second.
    #[serde(default)]
    pub mbps: f64,
}

/// Members that a newer QEMU adds are not ours to refuse.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct QueryMigrate {
    status: Option<String>,
    ram: Option<RamProgress>,
    total_time: Option<u64>,
    downtime: Option<u64>,
    expected_downtime: Option<u64>,
    cpu_throttle_percentage: Option<u8>,
    error_desc: Option<String>,
    #[serde(default)]
    blocked_reasons: Vec<String>,
}

impl From<QueryMigrate> for MigrationInfo {
    fn from(answer: QueryMigrate) -> MigrationInfo {
        MigrationInfo {
            status: answer.status.as_deref().map_or(MigrationStatus::None, MigrationStatus::from),
            ram: answer.ram,
            total_time_ms: answer.total_time,
            downtime_ms: answer.downtime,
            expected_downtime_ms: answer.expected_downtime,
            throttle_percent: answer.cpu_throttle_percentage,
            error: answer.error_desc,
            blocked_reasons: answer.blocked_reasons,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn info(answer: serde_json::Value) -> MigrationInfo {
        serde_json::from_value::<QueryMigrate>(answer).unwrap().into()
    }

    #[test]
    fn an_empty_answer_is_no_migration() {
        let info = info(json!({}));
        assert_eq!((info.status, info.blocked_reasons), (MigrationStatus::None, vec![]));
    }

    #[test]
    fn an_answer_is_read_with_members_that_are_new() {
        let info = info(json!({
            "status": "completed", "total-time": 300, "downtime": 135, "setup-time": 2, "novelty": [1],
            "ram": { "total": 268_435_456_u64, "remaining": 0, "transferred": 12_345, "dirty-sync-count": 4,
                     "mbps": 812.5, "page-size": 4096, "postcopy-bytes": 0 },
        }));
        assert_eq!(info.status, MigrationStatus::Completed);
        assert_eq!((info.total_time_ms, info.downtime_ms), (Some(300), Some(135)));
        let ram = info.ram.unwrap();
        assert_eq!(
            (ram.total, ram.remaining, ram.transferred, ram.dirty_sync_count),
            (268_435_456, 0, 12_345, 4)
        );
    }

    #[test]
    fn a_status_is_written_as_it_is_read_and_an_unknown_one_keeps_its_name() {
        let known = [
            "none",
            "setup",
            "active",
            "pre-switchover",
            "device",
            "completed",
            "failed",
            "cancelling",
            "cancelled",
        ];
        for text in known {
            let status = MigrationStatus::from(text);
            assert!(!matches!(status, MigrationStatus::Unknown(_)), "{text}");
            assert_eq!(status.to_string(), text);
        }
        for text in ["postcopy-active", "wait-unplug", "teleporting"] {
            assert_eq!(MigrationStatus::from(text), MigrationStatus::Unknown(text.to_owned()));
        }
    }
}
