//! KVM or TCG: a device file that opens proves nothing, so a guest has to run.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::version::{BinaryMissing, find_binary};

/// A guest of one sector is through the firmware well within this.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// The firmware cannot boot from a disk that is smaller than a cylinder of its made-up geometry.
const PROBE_DISK: u64 = 1024 * 1024;
/// Written to the exit port by the probe's guest; QEMU exits with `value << 1 | 1`.
const PROBE_VALUE: u8 = 0x2a;
const PROBE_STATUS: i32 = (PROBE_VALUE as i32) << 1 | 1;

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By translation; works everywhere, slowly.
    Tcg,
}

impl Accelerator {
    pub(crate) fn argument(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// KVM when it works, else TCG.
    #[default]
    Auto,
    /// This one, unprobed.
    Fixed(Accelerator),
}

/// A word other than `auto`, `kvm` and `tcg`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an accelerator; use `auto`, `kvm` or `tcg`")]
pub struct UnknownAccelerator(pub String);

impl FromStr for Choice {
    type Err = UnknownAccelerator;

    fn from_str(text: &str) -> Result<Choice, UnknownAccelerator> {
        match text {
            "auto" => Ok(Choice::Auto),
            "kvm" => Ok(Choice::Fixed(Accelerator::Kvm)),
            "tcg" => Ok(Choice::Fixed(Accelerator::Tcg)),
            other => Err(UnknownAccelerator(other.to_owned())),
        }
    }
}

/// An accelerator and, for the log, the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Hand this to [`crate::LaunchOptions`].
    pub accelerator: Accelerator,
    /// One sentence.
    pub reason: String,
}

/// Settles a choice on this host. Takes up to 2 s when the processor offers virtualisation, else no time.
pub async fn choose(choice: Choice, binary: &Path) -> Result<Chosen, BinaryMissing> {
    let chosen = |accelerator, reason: &str| Ok(Chosen { accelerator, reason: reason.to_owned() });
    if let Choice::Fixed(accelerator) = choice {
        return chosen(accelerator, "the configuration asks for it");
    }
    let cpuinfo = tokio::fs::read_to_string("/proc/cpuinfo").await.unwrap_or_default();
    if !has_virtualisation(&cpuinfo) {
        return chosen(Accelerator::Tcg, "/proc/cpuinfo shows neither vmx nor svm");
    }
    match probe(Accelerator::Kvm, binary).await {
        Ok(()) => chosen(Accelerator::Kvm, "a small guest ran on it"),
        Err(ProbeFailure::BinaryMissing(missing)) => Err(missing),
        Err(failure) => chosen(Accelerator::Tcg, &format!("KVM does not work here: {failure}")),
    }
}

/// Why an accelerator cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProbeFailure {
    /// There is no QEMU.
    #[error(transparent)]
    BinaryMissing(#[from] BinaryMissing),
    /// QEMU could not be run.
    #[error("the probe could not be run: {0}")]
    Run(#[from] std::io::Error),
    /// QEMU ended before the guest had run.
    #[error("QEMU ended with {status}: {stderr}")]
    Refused {
        /// Its exit status.
        status: String,
        /// What it wrote.
        stderr: String,
    },
    /// The guest did not get to its end.
    #[error("a one-sector guest did not get to its end within {0:?}")]
    Hung(Duration),
}

/// Runs the firmware and a guest of one boot sector, which leaves through an exit port, within 2 s.
pub async fn probe(accelerator: Accelerator, binary: &Path) -> Result<(), ProbeFailure> {
    probe_within(accelerator, binary, PROBE_DEADLINE).await
}

async fn probe_within(accelerator: Accelerator, binary: &Path, limit: Duration) -> Result<(), ProbeFailure> {
    let binary = find_binary(binary)?;
    let running = Command::new(binary)
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", "32M"])
        .args(["-machine", "q35", "-accel", accelerator.argument()])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
        // The sector comes in as standard input: nothing to clean up.
        .args(["-blockdev", "driver=file,node-name=boot,read-only=on,locking=off,filename=/proc/self/fd/0"])
        .args(["-device", "virtio-blk-pci,drive=boot"])
        .stdin(Stdio::from(boot_sector_file()?))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?
        .wait_with_output();
    let output = timeout(limit, running).await.map_err(|_| ProbeFailure::Hung(limit))??;
    if output.status.code() == Some(PROBE_STATUS) {
        return Ok(());
    }
    Err(ProbeFailure::Refused {
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().chars().take(400).collect(),
    })
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

fn boot_sector_file() -> std::io::Result<OwnedFd> {
    let fd = nix::sys::memfd::memfd_create(c"dunlin-probe", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(&boot_sector())?;
    file.set_len(PROBE_DISK)?;
    Ok(file.into())
}

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let code = [
        0xba,
        0x01,
        0x05, // mov dx, 0x501
        0xb0,
        PROBE_VALUE, // mov al, PROBE_VALUE
        0xee,        // out dx, al
        0xf4,        // hlt
        0xeb,
        0xfd, // jmp to hlt
    ];
    sector[..code.len()].copy_from_slice(&code);
    sector[510] = 0x55;
    sector[511] = 0xaa;
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm"));
        assert!(!has_virtualisation("flags : fpu svm_lock novmx\nmodel name : vmx"));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn choices_are_the_three_words() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("kvm".parse(), Ok(Choice::Fixed(Accelerator::Kvm)));
        assert_eq!("tcg".parse(), Ok(Choice::Fixed(Accelerator::Tcg)));
        assert_eq!("KVM".parse::<Choice>(), Err(UnknownAccelerator("KVM".into())));
    }

    #[tokio::test]
    async fn the_probe_guest_gets_to_its_end_and_a_wrong_program_is_found_out() {
        // The firmware takes its time where it is translated on a busy machine.
        let limit = Duration::from_secs(30);
        probe_within(Accelerator::Tcg, Path::new("qemu-system-x86_64"), limit).await.unwrap();
        let wrong = probe_within(Accelerator::Tcg, Path::new("false"), limit).await;
        assert!(matches!(wrong, Err(ProbeFailure::Refused { .. })), "{wrong:?}");
    }

    #[tokio::test]
    async fn a_fixed_choice_is_taken_as_it_is() {
        let chosen = choose(Choice::Fixed(Accelerator::Kvm), Path::new("/nonexistent")).await.unwrap();
        assert_eq!(chosen.accelerator, Accelerator::Kvm);
    }
}
