//! Statistics in the shape that hosts expect: the cgroup version 1 metrics message, as JSON.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

/// Largest limit that stands for "none" in version 1: the largest multiple of a page.
const NO_LIMIT: u64 = 0x7FFF_FFFF_FFFF_F000;

/// Reads a cgroup directory and answers `{"pids":..,"cpu":..,"memory":..,"memory_oom_control":..}`.
/// Times are nanoseconds, sizes bytes. What the kernel does not tell is 0.
pub fn read_v1(dir: &Path) -> Value {
    let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    convert(&Files {
        cpu_stat: text("cpu.stat"),
        memory_stat: text("memory.stat"),
        memory_current: text("memory.current"),
        memory_peak: text("memory.peak"),
        memory_max: text("memory.max"),
        memory_events: text("memory.events"),
        swap_current: text("memory.swap.current"),
        swap_max: text("memory.swap.max"),
        pids_current: text("pids.current"),
        pids_max: text("pids.max"),
    })
}

#[derive(Default)]
struct Files {
    cpu_stat: String,
    memory_stat: String,
    memory_current: String,
    memory_peak: String,
    memory_max: String,
    memory_events: String,
    swap_current: String,
    swap_max: String,
    pids_current: String,
    pids_max: String,
}

fn convert(files: &Files) -> Value {
    let cpu = |key| keyed(&files.cpu_stat, key).unwrap_or(0);
    let nanos = |key| cpu(key).saturating_mul(1000);
    let current = single(&files.memory_current).unwrap_or(0);
    let limit = single(&files.memory_max).unwrap_or(NO_LIMIT);
    let swap = single(&files.swap_current).unwrap_or(0);
    let swap_limit = single(&files.swap_max).unwrap_or(NO_LIMIT);
    let failures = keyed(&files.memory_events, "max").unwrap_or(0);

    let mut memory = memory_counters(&files.memory_stat);
    memory.insert("hierarchical_memory_limit".into(), limit.into());
    memory.insert("hierarchical_swap_limit".into(), swap_limit.into());
    memory.insert(
        "usage".into(),
        json!({
            "limit": limit,
            "usage": current,
            "max": single(&files.memory_peak).unwrap_or(current),
            "failcnt": failures,
        }),
    );
    // Version 1 counts memory and swap together.
    memory.insert(
        "swap".into(),
        json!({
            "limit": swap_limit.saturating_add(limit).min(NO_LIMIT),
            "usage": current.saturating_add(swap),
            "max": 0,
            "failcnt": 0,
        }),
    );
    json!({
        "pids": {
            "current": single(&files.pids_current).unwrap_or(0),
            // 0 is version 1's word for "no limit".
            "limit": single(&files.pids_max).unwrap_or(0),
        },
        "cpu": {
            "usage": {
                "total": nanos("usage_usec"),
                "kernel": nanos("system_usec"),
                "user": nanos("user_usec"),
                // Version 2 does not tell per CPU.
                "per_cpu": [],
            },
            "throttling": {
                "periods": cpu("nr_periods"),
                "throttled_periods": cpu("nr_throttled"),
                "throttled_time": nanos("throttled_usec"),
            },
        },
        "memory": memory,
        "memory_oom_control": {
            "oom_kill_disable": 0,
            "under_oom": 0,
            "oom_kill": keyed(&files.memory_events, "oom_kill").unwrap_or(0),
        },
    })
}

fn memory_counters(stat: &str) -> Map<String, Value> {
    // (version 1, version 2); version 2's counters are hierarchical, so they serve as totals too.
    const NAMES: [(&str, &str); 14] = [
        ("cache", "file"),
        ("rss", "anon"),
        ("rss_huge", "anon_thp"),
        ("mapped_file", "file_mapped"),
        ("dirty", "file_dirty"),
        ("writeback", "file_writeback"),
        ("pg_pg_in", "pgpgin"),
        ("pg_pg_out", "pgpgout"),
        ("pg_fault", "pgfault"),
        ("pg_maj_fault", "pgmajfault"),
        ("inactive_anon", "inactive_anon"),
        ("active_anon", "active_anon"),
        ("inactive_file", "inactive_file"),
        ("active_file", "active_file"),
    ];
    let mut counters = Map::new();
    for (old, new) in NAMES.into_iter().chain([("unevictable", "unevictable")]) {
        let value = keyed(stat, new).unwrap_or(0);
        counters.insert(old.to_owned(), value.into());
        counters.insert(format!("total_{old}"), value.into());
    }
    counters
}

/// The value of a `key value` line.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The value of a one-line file; `max` and anything that is no number are none.
fn single(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_becomes_version_one() {
        let value = convert(&Files {
            cpu_stat: "usage_usec 2500\nuser_usec 2000\nsystem_usec 500\nnr_periods 4\nnr_throttled 1\nthrottled_usec 7\n".into(),
            memory_stat: "anon 4096\nfile 8192\nfile_mapped 11\nanon_thp 0\npgfault 5\n".into(),
            memory_current: "12288\n".into(),
            memory_peak: "20000\n".into(),
            memory_max: "16777216\n".into(),
            memory_events: "low 0\nmax 3\noom 1\noom_kill 1\n".into(),
            swap_current: "0\n".into(),
            swap_max: "max\n".into(),
            pids_current: "2\n".into(),
            pids_max: "max\n".into(),
        });
        assert_eq!(value["cpu"]["usage"]["total"], 2_500_000);
        assert_eq!(value["cpu"]["throttling"]["throttled_time"], 7000);
        assert_eq!(value["memory"]["usage"]["usage"], 12288);
        assert_eq!(value["memory"]["usage"]["limit"], 16_777_216);
        assert_eq!(value["memory"]["usage"]["failcnt"], 3);
        assert_eq!(value["memory"]["rss"], 4096);
        assert_eq!(value["memory"]["mapped_file"], 11);
        assert_eq!(value["memory"]["total_cache"], 8192);
        assert_eq!(value["memory"]["swap"]["limit"], NO_LIMIT);
        assert_eq!(value["memory_oom_control"]["oom_kill"], 1);
        assert_eq!(value["pids"], json!({"current": 2, "limit": 0}));
    }

    #[test]
    fn keys_match_whole_words() {
        assert_eq!(keyed("file_mapped 1\nfile 2\n", "file"), Some(2));
        assert_eq!(keyed("oom_kill 4\noom 3", "oom"), Some(3));
        assert_eq!(keyed("", "oom"), None);
    }
}
