//! What only PID 1 does: from the kernel's hand-over to the service, and staying alive after.
//!
//! ```text
//!  first stage (initramfs)            second stage (tmpfs)
//!  dev, proc, sys                     devpts, shm, run, tmp, cgroup2
//!  modules in load order              loopback, hostname, oom_score_adj
//!  copy itself to a tmpfs, move ───>  reaper, log, link, bridge
//!  the mounts there, chroot, exec
//! ```
//!
//! The move exists because `pivot_root`, which containers are started with, refuses to leave the
//! initramfs.

pub mod clock;
pub mod cmdline;
mod loopback;
mod modules;
mod mounts;
mod root;

use std::convert::Infallible;
use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use cmdline::CommandLine;
pub use loopback::bring_up_in_namespace_of;

use crate::log;
use crate::service;

/// First argument of the second stage.
pub const SECOND_STAGE: &str = "second-stage";

/// A step of the boot failed; the guest cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct BootError {
    /// What was being done, with its object.
    pub step: String,
    /// The system's reason.
    pub source: std::io::Error,
}

impl BootError {
    fn at(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> BootError {
        let step = step.into();
        move |source| BootError { step, source }
    }
}

/// Open files of a process: the kernel's own bound (fs.nr_open).
const FILES: u64 = 1 << 20;

/// Runs in the initramfs; ends in the second stage or in a reboot.
pub fn first_stage() -> ExitCode {
    let boot = || -> Result<Infallible, BootError> {
        mounts::early()?;
        modules::load_all()?;
        root::move_to_tmpfs()
    };
    match boot() {
        Ok(never) => match never {},
        Err(error) => give_up(&error.to_string()),
    }
}

/// Runs from the tmpfs root for as long as the guest lives.
pub fn second_stage() -> ExitCode {
    // Else the kernel drops all but ten of our lines in five seconds, failures first of all.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    let queue = log::start();
    let boot = || -> Result<(), BootError> {
        mounts::late()?;
        crate::cgroup::tree::prepare().map_err(BootError::at("prepare the cgroup tree"))?;
        shield_from_oom();
        raise_file_limit();
        if let Err(error) = loopback::bring_up() {
            tracing::warn!(%error, "loopback stays down");
        }
        if let Err(error) = nix::unistd::sethostname("dunlin") {
            tracing::warn!(%error, "hostname stays unset");
        }
        Ok(())
    };
    if let Err(error) = boot() {
        return give_up(&error.to_string());
    }
    let command_line = CommandLine::read();
    tracing::info!(
        uptime_seconds =
            fs::read_to_string("/proc/uptime").unwrap_or_default().split(' ').next().unwrap_or(""),
        "guest is up"
    );
    // A panic that reaches this point took the service along. Its state (pids, streams) is gone
    // with it, so the guest cannot be trusted to report exits any more: start over.
    match std::panic::catch_unwind(|| service::run(&command_line, queue)) {
        Ok(Ok(())) => power_off(),
        Ok(Err(error)) => give_up(&error.to_string()),
        Err(_) => give_up("the guest's service panicked"),
    }
}

/// What a container inherits whose spec names no limit: as under containerd's own service, not the kernel's 1024 of
/// which a process can make 4096 at most.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, setrlimit};
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES) {
        tracing::warn!(%error, "the limit of open files stays the kernel's");
    }
}

/// Powers the machine off.
pub fn power_off() -> ExitCode {
    nix::unistd::sync();
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    ExitCode::FAILURE
}

/// Says why on the console, then reboots; QEMU runs with `-no-reboot` and so ends.
fn give_up(reason: &str) -> ExitCode {
    let line = format!("<2>dunlin-guest: cannot go on: {reason}\n");
    if fs::write("/dev/kmsg", &line).is_err() {
        eprintln!("dunlin-guest: cannot go on: {reason}");
    }
    // Time for the console to take the line.
    std::thread::sleep(Duration::from_millis(500));
    nix::unistd::sync();
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    ExitCode::FAILURE
}

fn shield_from_oom() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(%error, "PID 1 is not shielded from the out-of-memory killer");
    }
}
