//! Peak resident memory of processes.

use std::fs;

/// A process of the lab and what it costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peak {
    /// Its id.
    pub pid: i32,
    /// `VmHWM`, KiB.
    pub kib: u64,
}

/// `VmHWM` of a `/proc/<pid>/status` text, KiB.
#[must_use]
pub fn high_water(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Every process whose arguments hold all of `words`, in the order of their ids.
#[must_use]
pub fn peaks(words: &[&str]) -> Vec<Peak> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<Peak> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| has_words(*pid, words))
        .filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            Some(Peak { pid, kib: high_water(&status)? })
        })
        .collect();
    found.sort_by_key(|peak| peak.pid);
    found
}

fn has_words(pid: i32, words: &[&str]) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let arguments: Vec<String> =
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    // The program by the end of its path, the rest as they are.
    words.iter().enumerate().all(|(index, word)| {
        if index == 0 {
            arguments.first().is_some_and(|program| program.rsplit('/').next() == Some(*word))
        } else {
            arguments.iter().any(|argument| argument == word)
        }
    })
}

/// The process id namespace of a process: all processes of one lab host share it.
#[must_use]
pub fn host_of(pid: i32) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_peak_is_read() {
        let status = fs::read_to_string("/proc/self/status").expect("proc is mounted");
        assert!(high_water(&status).is_some_and(|kib| kib > 100));
        assert_eq!(high_water("Name: x\n"), None);
    }
}
