//! What a lab could leave on the machine.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Mounts, loop devices, network namespaces and processes at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    mounts: BTreeSet<String>,
    loops: BTreeSet<String>,
    netns: BTreeSet<String>,
    links: BTreeSet<String>,
    processes: BTreeSet<String>,
    directories: BTreeSet<String>,
}

impl Traces {
    /// Looks now.
    pub fn now() -> Traces {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let field = |line: &str| line.split(' ').nth(4).map(ToOwned::to_owned);
        let loops = names("/sys/block").into_iter();
        let places = [
            "/etc/dunlin",
            "/var/lib/dunlin",
            "/var/lib/cni",
            "/run/netns",
            "/run/dunlin",
            "/opt/containerd",
        ];
        Traces {
            mounts: mountinfo.lines().filter_map(field).collect(),
            loops: loops
                .filter(|name| Path::new(&format!("/sys/block/{name}/loop/backing_file")).exists())
                .collect(),
            netns: names("/run/netns"),
            links: names("/sys/class/net"),
            processes: processes(),
            directories: places
                .iter()
                .filter(|path| Path::new(path).exists())
                .map(ToString::to_string)
                .collect(),
        }
    }

    /// Waits until there is nothing that was not there in `before`: the kernel takes some
    /// things away a moment after their last user. An error names what stays.
    pub fn gone_since(before: &Traces, deadline: Duration) -> Result<(), String> {
        let since = Instant::now();
        loop {
            let left = Traces::now().beyond(before);
            if left.is_empty() {
                return Ok(());
            }
            if since.elapsed() > deadline {
                return Err(left.join(", "));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn beyond(&self, before: &Traces) -> Vec<String> {
        let kinds = [
            ("mount", &self.mounts, &before.mounts),
            ("loop device", &self.loops, &before.loops),
            ("network namespace", &self.netns, &before.netns),
            ("network device", &self.links, &before.links),
            ("process", &self.processes, &before.processes),
            ("directory", &self.directories, &before.directories),
        ];
        let mut left = Vec::new();
        for (kind, now, then) in kinds {
            left.extend(now.difference(then).map(|what| format!("{kind} {what}")));
        }
        left
    }
}

fn names(directory: &str) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(directory) else { return BTreeSet::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Processes of the kinds that a lab starts, by id and command. A zombie has no command and
/// is not the lab's to remove.
fn processes() -> BTreeSet<String> {
    let kinds = ["dunlin", "containerd", "qemu-system", "ctr", "mkfs."];
    let own = std::process::id().to_string();
    names("/proc")
        .into_iter()
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && *name != own)
        .filter_map(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            let program = words.split(' ').next()?.rsplit('/').next()?.to_owned();
            let ours = kinds.iter().any(|kind| program.starts_with(kind));
            ours.then(|| format!("{pid} {words}"))
        })
        .collect()
}
