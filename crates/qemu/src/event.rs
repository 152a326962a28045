//! What QEMU reports unasked, typed.

use serde_json::Value;
use tokio::sync::broadcast;

use crate::migration::MigrationStatus;
use crate::qmp::{QmpClient, RawEvent, Timestamp};

/// An event and when QEMU emitted it.
#[derive(Debug, Clone, PartialEq)]
pub struct TimedEvent {
    /// By the host's realtime clock.
    pub time: Timestamp,
    /// What happened.
    pub event: Event,
}

/// The events that Dunlin acts on; all others are [`Event::Other`].
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The guest's CPUs stand still.
    Stop,
    /// The guest's CPUs run.
    Resume,
    /// A migration, out or in, entered this status.
    Migration(MigrationStatus),
    /// Pass over guest memory, from 1.
    MigrationPass(u64),
    /// A mirror is in step.
    BlockJobReady {
        /// The job.
        id: String,
    },
    /// A block job ended by itself or after a graceful cancel.
    BlockJobCompleted {
        /// The job.
        id: String,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// A block job ended by force.
    BlockJobCancelled {
        /// The job.
        id: String,
    },
    /// A block job met an I/O error.
    BlockJobError {
        /// The job.
        id: String,
        /// `read` or `write`.
        operation: String,
        /// What QEMU did about it: `report`, `ignore` or `stop`.
        action: String,
    },
    /// A job entered this status of QMP's `JobStatus`.
    JobStatusChange {
        /// The job.
        id: String,
        /// Such as `ready` or `concluded`.
        status: String,
    },
    /// The machine is going down; the process exits next.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// QMP's `ShutdownCause`, such as `guest-reset`.
        reason: String,
    },
    /// A device was unplugged; inner devices have no id.
    DeviceDeleted {
        /// The device's id.
        device: Option<String>,
    },
    /// A block export is gone.
    BlockExportDeleted {
        /// The export.
        id: String,
    },
    /// Anything else.
    Other {
        /// Its QMP name.
        name: String,
        /// Its data.
        data: Value,
    },
}

impl TimedEvent {
    fn from_raw(raw: RawEvent) -> TimedEvent {
        TimedEvent { time: raw.time, event: Event::from_raw(raw.name, raw.data) }
    }
}

impl Event {
    fn from_raw(name: String, data: Value) -> Event {
        let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
        // Block jobs name themselves by `device`, jobs in general by `id`.
        let typed = match name.as_str() {
            "STOP" => Some(Event::Stop),
            "RESUME" => Some(Event::Resume),
            "MIGRATION" => text("status").map(|status| Event::Migration(status.as_str().into())),
            "MIGRATION_PASS" => data.get("pass").and_then(Value::as_u64).map(Event::MigrationPass),
            "BLOCK_JOB_READY" => text("device").map(|id| Event::BlockJobReady { id }),
            "BLOCK_JOB_COMPLETED" => {
                text("device").map(|id| Event::BlockJobCompleted { id, error: text("error") })
            }
            "BLOCK_JOB_CANCELLED" => text("device").map(|id| Event::BlockJobCancelled { id }),
            "BLOCK_JOB_ERROR" => text("device").map(|id| Event::BlockJobError {
                id,
                operation: text("operation").unwrap_or_default(),
                action: text("action").unwrap_or_default(),
            }),
            "JOB_STATUS_CHANGE" => {
                text("id").zip(text("status")).map(|(id, status)| Event::JobStatusChange { id, status })
            }
            "SHUTDOWN" => data
                .get("guest")
                .and_then(Value::as_bool)
                .map(|guest| Event::Shutdown { guest, reason: text("reason").unwrap_or_default() }),
            "DEVICE_DELETED" => Some(Event::DeviceDeleted { device: text("device") }),
            "BLOCK_EXPORT_DELETED" => text("id").map(|id| Event::BlockExportDeleted { id }),
            _ => None,
        };
        typed.unwrap_or(Event::Other { name, data })
    }
}

/// The reader was too slow: this many events are gone, so it must query the state that it follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} QEMU events were lost; query the state again")]
pub struct EventsLost(pub u64);

/// Events since this stream was made.
#[derive(Debug)]
pub struct EventStream(broadcast::Receiver<RawEvent>);

impl EventStream {
    pub(crate) fn new(qmp: &QmpClient) -> EventStream {
        EventStream(qmp.events())
    }

    /// The next event, or `None` when the connection to QEMU is closed. Safe to cancel.
    pub async fn next(&mut self) -> Option<Result<TimedEvent, EventsLost>> {
        match self.0.recv().await {
            Ok(raw) => Some(Ok(TimedEvent::from_raw(raw))),
            Err(broadcast::error::RecvError::Lagged(lost)) => Some(Err(EventsLost(lost))),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn typed(name: &str, data: Value) -> Event {
        Event::from_raw(name.to_owned(), data)
    }

    #[test]
    fn events_are_typed_by_name_and_data() {
        assert_eq!(typed("STOP", Value::Null), Event::Stop);
        assert_eq!(
            typed("MIGRATION", json!({"status": "pre-switchover"})),
            Event::Migration(MigrationStatus::PreSwitchover)
        );
        assert_eq!(
            typed("MIGRATION", json!({"status": "teleporting"})),
            Event::Migration(MigrationStatus::Unknown("teleporting".into()))
        );
        assert_eq!(typed("MIGRATION_PASS", json!({"pass": 3})), Event::MigrationPass(3));
        assert_eq!(
            typed(
                "BLOCK_JOB_COMPLETED",
                json!({"device": "mirror-0-1", "error": "Input/output error", "len": 1})
            ),
            Event::BlockJobCompleted { id: "mirror-0-1".into(), error: Some("Input/output error".into()) }
        );
        assert_eq!(
            typed("SHUTDOWN", json!({"guest": true, "reason": "guest-reset"})),
            Event::Shutdown { guest: true, reason: "guest-reset".into() }
        );
        assert_eq!(
            typed("DEVICE_DELETED", json!({"path": "/machine"})),
            Event::DeviceDeleted { device: None }
        );
    }

    #[test]
    fn an_event_without_its_data_is_not_guessed_at() {
        let data = json!({"len": 1});
        assert_eq!(
            typed("BLOCK_JOB_READY", data.clone()),
            Event::Other { name: "BLOCK_JOB_READY".into(), data }
        );
    }
}
