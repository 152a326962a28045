//! What an update of a running container may ask for, in OCI LinuxResources.
//!
//! The guest's cgroup takes `memory.limit`, `memory.reservation`, `cpu.shares`, `cpu.quota`, `cpu.period` and
//! `pids.limit`. Anything else is refused by its name instead of being left out: whoever changed it would take it for
//! done. Three kinds of values change nothing and pass, for clients send whole documents: what says nothing (null, zero,
//! false, empty), what the container's spec says already (CRI sends all of that back, devices too), and bounds that hold
//! in every guest.

use serde_json::{Map, Value};

/// A field of an update that cannot be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitError {
    /// It is not even an object.
    #[error("linux.resources: {value} is not OCI LinuxResources; give an object")]
    Document { value: String },
    /// It is none of those that a running container takes.
    #[error("linux.resources.{field}: {value} cannot be applied to a running container; {way_out}")]
    NotApplied { field: String, value: String, way_out: &'static str },
    /// It is one of them, and this is no value for it.
    #[error("linux.resources.{field}: {value} is no such limit; give {expected}")]
    Value { field: String, value: String, expected: &'static str },
}

/// What each applied field takes, by group.
const APPLIED: [(&str, &[(&str, Takes)]); 3] = [
    ("memory", &[("limit", Takes::Bound), ("reservation", Takes::Amount)]),
    ("cpu", &[("shares", Takes::Amount), ("quota", Takes::Bound), ("period", Takes::Amount)]),
    ("pids", &[("limit", Takes::Bound)]),
];

#[derive(Clone, Copy)]
enum Takes {
    /// Negative: none.
    Bound,
    Amount,
}

/// Refuses what of `update` would not be applied. `spec`: the resources that the container was made with.
pub(crate) fn check(update: &Value, spec: &Value) -> Result<(), LimitError> {
    let root = match update {
        Value::Object(root) => root,
        Value::Null => return Ok(()),
        other => {
            return Err(LimitError::Document { value: other.to_string() });
        }
    };
    for (group, value) in root {
        if silent(value) || *value == spec[group] {
            continue;
        }
        let applied = APPLIED.iter().find(|(name, _)| name == group).map(|(_, fields)| *fields);
        match (applied, value) {
            (Some(applied), Value::Object(fields)) => check_group(group, fields, applied, &spec[group])?,
            (Some(_), other) => {
                let (field, value) = (group.clone(), other.to_string());
                return Err(LimitError::Value { field, value, expected: "an object" });
            }
            (None, _) if group == "hugepageLimits" && no_huge_pages(value) => {}
            (None, _) => return Err(not_applied(group.clone(), value)),
        }
    }
    Ok(())
}

fn check_group(
    group: &str,
    fields: &Map<String, Value>,
    applied: &[(&str, Takes)],
    spec: &Value,
) -> Result<(), LimitError> {
    for (name, value) in fields {
        if silent(value) {
            continue;
        }
        let field = format!("{group}.{name}");
        match applied.iter().find(|(applied, _)| applied == name) {
            Some((_, takes)) => {
                let expected = match (takes, value.as_i64()) {
                    (Takes::Bound, Some(_)) | (Takes::Amount, Some(0..)) => continue,
                    (Takes::Bound, None) => "a whole number, -1 for none",
                    (Takes::Amount, _) => "a whole number that is not negative",
                };
                return Err(LimitError::Value { field, value: value.to_string(), expected });
            }
            None if *value == spec[name] || always_so(&field, value, fields) => {}
            None => return Err(not_applied(field, value)),
        }
    }
    Ok(())
}

/// What is so in every guest: it has no swap, and its cgroups are of version 2.
fn always_so(field: &str, value: &Value, group: &Map<String, Value>) -> bool {
    match field {
        // Of memory and swap together: CRI sends the memory's own limit here.
        "memory.swap" => match (value.as_i64(), group.get("limit").and_then(Value::as_i64)) {
            (Some(..0), _) => true,
            (Some(both), Some(memory)) => memory > 0 && both >= memory,
            _ => false,
        },
        "memory.useHierarchy" => value.as_bool() == Some(true),
        _ => false,
    }
}

/// kubelet names each size of the host's pages, and how many of it there may be: none.
fn no_huge_pages(value: &Value) -> bool {
    value.as_array().is_some_and(|limits| limits.iter().all(|limit| silent(&limit["limit"])))
}

/// Says nothing, as Go writes it.
fn silent(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.values().all(silent),
    }
}

fn not_applied(field: String, value: &Value) -> LimitError {
    let way_out = match field.as_str() {
        "cpu.cpus" | "cpu.mems" => {
            "the guest's CPUs are not the host's: leave it out, and bound the CPU time with cpu.quota and cpu.period"
        }
        "memory.swap" => {
            "the guest has no swap: leave it out, or send memory.limit with it and no less than that"
        }
        "unified" => "send the field of LinuxResources that stands for it, or leave it out",
        "devices" => {
            "leave it out; a container's devices are those of its spec, so make it again with others"
        }
        _ => {
            "leave it out; memory.limit, memory.reservation, cpu.shares, cpu.quota, cpu.period and pids.limit \
             can be changed"
        }
    };
    LimitError::NotApplied { field, value: value.to_string(), way_out }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As the CRI plugin writes a container's.
    fn spec() -> Value {
        json!({
            "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 5}],
            "memory": {"limit": 64 << 20, "swap": 64 << 20},
            "cpu": {"shares": 102, "quota": 20_000, "period": 100_000, "cpus": "0-3"},
            "unified": {"memory.oom.group": "1"},
        })
    }

    #[track_caller]
    fn passes(update: Value) {
        assert_eq!(check(&update, &spec()), Ok(()), "{update}");
    }

    #[track_caller]
    fn refused(update: Value, words: &[&str]) {
        let text = check(&update, &spec()).expect_err("not applied").to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
    }

    #[test]
    fn what_the_guest_applies_passes() {
        passes(json!({"memory": {"limit": -1, "reservation": 4096}, "pids": {"limit": -1}}));
        passes(json!({"cpu": {"shares": 2, "quota": -1, "period": 50_000}}));
    }

    #[test]
    fn what_says_nothing_passes() {
        passes(Value::Null);
        passes(json!({}));
        passes(json!({
            "devices": [], "memory": {"limit": 0, "swap": 0, "kernel": null, "disableOOMKiller": false},
            "cpu": {"cpus": "", "mems": "", "realtimeRuntime": 0, "idle": null}, "pids": {"limit": 0},
            "blockIO": {"weight": 0, "throttleReadBpsDevice": []}, "hugepageLimits": [], "network": {},
            "rdma": {}, "unified": {},
        }));
    }

    /// UpdateContainerResources: the spec with the new values in it.
    #[test]
    fn what_cri_sends_passes() {
        let mut update = spec();
        update["memory"] = json!({"limit": 128 << 20, "swap": 128 << 20});
        update["cpu"]["quota"] = json!(40_000);
        update["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}]);
        passes(update);
        passes(spec());
        // A limit alone, of a container that had none: the spec's swap is not the update's.
        let update = json!({"memory": {"limit": 1 << 20, "swap": 2 << 20, "useHierarchy": true}});
        assert_eq!(check(&update, &Value::Null), Ok(()));
    }

    #[test]
    fn what_would_not_be_applied_is_refused_by_its_name() {
        for (update, field) in [
            (json!({"cpu": {"cpus": "1"}}), "cpu.cpus"),
            (json!({"cpu": {"mems": "0"}}), "cpu.mems"),
            (json!({"cpu": {"burst": 5}}), "cpu.burst"),
            (json!({"cpu": {"idle": 1}}), "cpu.idle"),
            (json!({"cpu": {"realtimeRuntime": 5}}), "cpu.realtimeRuntime"),
            (json!({"memory": {"swap": 1 << 20}}), "memory.swap"),
            (json!({"memory": {"limit": 2 << 20, "swap": 1 << 20}}), "memory.swap"),
            (json!({"memory": {"swappiness": 10}}), "memory.swappiness"),
            (json!({"memory": {"disableOOMKiller": true}}), "memory.disableOOMKiller"),
            (json!({"memory": {"checkBeforeUpdate": true}}), "memory.checkBeforeUpdate"),
            (json!({"devices": [{"allow": true, "access": "rwm"}]}), "devices"),
            (json!({"blockIO": {"weight": 10}}), "blockIO"),
            (json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}), "hugepageLimits"),
            (json!({"network": {"classID": 1}}), "network"),
            (json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}), "rdma"),
            (json!({"unified": {"memory.high": "1"}}), "unified"),
            (json!({"pids": {"limit": 1, "new": 1}}), "pids.new"),
            (json!({"later": 1}), "later"),
        ] {
            refused(update, &[&format!("linux.resources.{field}: "), "cannot be applied", "; "]);
        }
    }

    #[test]
    fn what_is_no_limit_is_refused_by_its_name() {
        refused(json!({"memory": {"limit": "1g"}}), &["memory.limit", "\"1g\"", "whole number"]);
        refused(json!({"pids": {"limit": 1.5}}), &["pids.limit", "1.5"]);
        refused(json!({"cpu": {"shares": -1}}), &["cpu.shares", "not negative"]);
        refused(json!({"cpu": {"period": u64::MAX}}), &["cpu.period"]);
        refused(json!({"cpu": [1]}), &["linux.resources.cpu", "an object"]);
        refused(json!([1]), &["linux.resources: [1]", "an object"]);
    }
}
