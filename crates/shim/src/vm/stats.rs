//! The guest's cgroup figures in containerd's message, `io.containerd.cgroups.v1.Metrics`.

use containerd_shim_protos::cgroups::metrics::{
    CPUStat, CPUUsage, MemoryEntry, MemoryStat, Metrics, PidsStat, Throttle,
};
use dunlin_qemu::Usage;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::Value;

/// The name that containerd registers the message under.
const TYPE: &str = "io.containerd.cgroups.v1.Metrics";

/// Takes the guest's properties (`{"LCOWMetrics": ..}`); figures that the guest left out are zero.
pub(crate) fn metrics(properties: &Value) -> Result<Any, String> {
    let figures = properties.get("LCOWMetrics").ok_or("the guest's statistics have no LCOWMetrics")?;
    let number = |path: &str| figures.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let entry = |path: &str| {
        MessageField::some(MemoryEntry {
            limit: number(&format!("{path}/limit")),
            usage: number(&format!("{path}/usage")),
            max: number(&format!("{path}/max")),
            failcnt: number(&format!("{path}/failcnt")),
            ..MemoryEntry::default()
        })
    };
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: number("/pids/current"),
            limit: number("/pids/limit"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total: number("/cpu/usage/total"),
                kernel: number("/cpu/usage/kernel"),
                user: number("/cpu/usage/user"),
                ..CPUUsage::default()
            }),
            throttling: MessageField::some(Throttle {
                periods: number("/cpu/throttling/periods"),
                throttled_periods: number("/cpu/throttling/throttled_periods"),
                throttled_time: number("/cpu/throttling/throttled_time"),
                ..Throttle::default()
            }),
            ..CPUStat::default()
        }),
        memory: MessageField::some(MemoryStat {
            cache: number("/memory/cache"),
            rss: number("/memory/rss"),
            mapped_file: number("/memory/mapped_file"),
            pg_fault: number("/memory/pg_fault"),
            pg_maj_fault: number("/memory/pg_maj_fault"),
            total_inactive_file: number("/memory/total_inactive_file"),
            usage: entry("/memory/usage"),
            swap: entry("/memory/swap"),
            kernel: entry("/memory/kernel"),
            ..MemoryStat::default()
        }),
        ..Metrics::default()
    };
    any(&metrics)
}

/// What a machine costs its host: QEMU's processor time and resident memory, against the memory that it was given.
pub(crate) fn of_machine(usage: Usage, memory_limit: u64) -> Result<Any, String> {
    let memory = MemoryEntry { limit: memory_limit, usage: usage.resident_bytes, ..MemoryEntry::default() };
    let cpu = CPUUsage { total: usage.cpu_time_nanos, ..CPUUsage::default() };
    any(&Metrics {
        cpu: MessageField::some(CPUStat { usage: MessageField::some(cpu), ..CPUStat::default() }),
        memory: MessageField::some(MemoryStat { usage: MessageField::some(memory), ..MemoryStat::default() }),
        ..Metrics::default()
    })
}

fn any(metrics: &Metrics) -> Result<Any, String> {
    let value = metrics.write_to_bytes().map_err(|error| format!("statistics cannot be encoded: {error}"))?;
    Ok(Any { type_url: TYPE.to_owned(), value, ..Any::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_keep_their_places() {
        let any = metrics(&json!({"LCOWMetrics": {
            "cpu": {"usage": {"total": 7, "user": 4}},
            "memory": {"usage": {"usage": 100, "limit": 200}},
            "pids": {"current": 3},
        }}))
        .unwrap();
        assert_eq!(any.type_url, TYPE);
        let read = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((read.cpu.usage.total, read.cpu.usage.user), (7, 4));
        assert_eq!((read.memory.usage.usage, read.memory.usage.limit), (100, 200));
        assert_eq!(read.pids.current, 3);
        assert!(metrics(&json!({})).is_err());
    }
}
