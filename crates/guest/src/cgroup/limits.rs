//! Changes a running container's limits from an OCI resources document.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

/// A limit was refused.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The kernel did not take it.
    #[error("cannot set {file} to {value:?}: {source}; give a value that the guest has room for")]
    Write {
        /// File of the cgroup.
        file: &'static str,
        /// What was written.
        value: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Writes `memory`, `cpu` and `pids` limits of OCI Linux resources; absent ones stay as they are.
/// Returns what was written, as `file=value`.
pub fn update(dir: &Path, resources: &Value) -> Result<Vec<String>, LimitError> {
    let current_max = fs::read_to_string(dir.join("cpu.max")).unwrap_or_default();
    let mut done = Vec::new();
    for (file, value) in plan(resources, &current_max) {
        fs::write(dir.join(file), &value).map_err(|source| LimitError::Write {
            file,
            value: value.clone(),
            source,
        })?;
        done.push(format!("{file}={value}"));
    }
    Ok(done)
}

/// Which files get which values.
fn plan(resources: &Value, current_cpu_max: &str) -> Vec<(&'static str, String)> {
    let number = |group: &str, key: &str| resources[group][key].as_i64();
    let mut plan = Vec::new();
    if let Some(limit) = number("memory", "limit").filter(|limit| *limit != 0) {
        plan.push(("memory.max", or_max(limit)));
    }
    if let Some(low) = number("memory", "reservation").filter(|low| *low > 0) {
        plan.push(("memory.low", low.to_string()));
    }
    if let Some(shares) = number("cpu", "shares").filter(|shares| *shares > 0) {
        plan.push(("cpu.weight", weight(shares).to_string()));
    }
    let (quota, period) = (number("cpu", "quota"), number("cpu", "period").filter(|p| *p > 0));
    if quota.is_some() || period.is_some() {
        let mut words = current_cpu_max.split_whitespace();
        let old_quota = words.next().unwrap_or("max").to_owned();
        let old_period = words.next().unwrap_or("100000").to_owned();
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => old_quota,
        };
        plan.push(("cpu.max", format!("{quota} {}", period.map_or(old_period, |p| p.to_string()))));
    }
    if let Some(limit) = number("pids", "limit").filter(|limit| *limit != 0) {
        plan.push(("pids.max", or_max(limit)));
    }
    plan
}

fn or_max(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// Version 1's shares (2..=262144) on version 2's scale (1..=10000).
fn weight(shares: i64) -> i64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_is_given_is_written() {
        assert!(plan(&json!({}), "").is_empty());
        assert_eq!(plan(&json!({"memory": {"limit": 1024}}), ""), [("memory.max", "1024".to_owned())]);
        assert_eq!(plan(&json!({"memory": {"limit": -1}}), ""), [("memory.max", "max".to_owned())]);
        assert_eq!(
            plan(&json!({"cpu": {"quota": 5000}}), "max 20000\n"),
            [("cpu.max", "5000 20000".to_owned())]
        );
        assert_eq!(
            plan(&json!({"cpu": {"quota": -1}}), "7 100000\n"),
            [("cpu.max", "max 100000".to_owned())]
        );
        assert_eq!(plan(&json!({"pids": {"limit": 9}}), ""), [("pids.max", "9".to_owned())]);
    }

    #[test]
    fn weights_span_the_scale() {
        assert_eq!((weight(2), weight(1024), weight(262_144), weight(1 << 40)), (1, 39, 10_000, 10_000));
    }

    #[test]
    fn a_refused_limit_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("gone");
        let error = update(&missing, &json!({"pids": {"limit": 3}})).unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
    }
}
