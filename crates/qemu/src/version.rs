//! Which QEMU this is, which machines it has, and which pairs of versions are known to fail.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// How long a QEMU that only prints something may take.
const PRINT_DEADLINE: Duration = Duration::from_secs(10);

/// A QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
    /// The line that it prints, with the packager's suffix.
    pub text: String,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// There is no QEMU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no program {binary}; install the Debian package qemu-system-x86 or set vm.qemu to where QEMU is"
)]
pub struct BinaryMissing {
    /// The path or name that was looked for.
    pub binary: PathBuf,
}

/// A QEMU could not be asked about itself.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such program.
    #[error(transparent)]
    BinaryMissing(#[from] BinaryMissing),
    /// It could not be run.
    #[error("cannot run {binary}")]
    Run {
        /// The program.
        binary: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// It did not end.
    #[error("`{binary} {arguments}` did not end within {after:?}")]
    Slow {
        /// The program.
        binary: PathBuf,
        /// Its arguments.
        arguments: String,
        /// How long was waited.
        after: Duration,
    },
    /// It printed something else than a QEMU does.
    #[error("`{binary} {arguments}` printed no {wanted} (status {status}): {printed}")]
    Unreadable {
        /// The program.
        binary: PathBuf,
        /// Its arguments.
        arguments: String,
        /// What was looked for.
        wanted: &'static str,
        /// Its exit status.
        status: String,
        /// The beginning of what it printed.
        printed: String,
    },
}

/// The program itself: `binary` when it is a path, else the first executable of this name in `PATH`.
pub fn find_binary(binary: &Path) -> Result<PathBuf, BinaryMissing> {
    let missing = || BinaryMissing { binary: binary.to_owned() };
    let executable =
        |path: &Path| nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok() && path.is_file();
    if binary.as_os_str().is_empty() {
        return Err(missing());
    }
    if binary.components().count() > 1 || binary.is_absolute() {
        return if executable(binary) { Ok(binary.to_owned()) } else { Err(missing()) };
    }
    let path = std::env::var_os("PATH").ok_or_else(missing)?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(binary))
        .find(|path| executable(path))
        .ok_or_else(missing)
}

/// Asks a QEMU for its version.
pub async fn version(binary: &Path) -> Result<QemuVersion, ProbeError> {
    let (status, printed) = print(binary, &["--version"]).await?;
    parse_version(&printed).ok_or_else(|| unreadable(binary, &["--version"], "version", status, &printed))
}

/// Whether a QEMU has this machine type.
pub async fn machine_supported(binary: &Path, machine: &str) -> Result<bool, ProbeError> {
    let arguments = ["-machine", "help"];
    let (status, printed) = print(binary, &arguments).await?;
    let machines = parse_machines(&printed);
    if machines.is_empty() {
        return Err(unreadable(binary, &arguments, "machine types", status, &printed));
    }
    Ok(machines.contains(&machine))
}

/// Why a migration from one version to another is known to fail, or `None` when no reason is known.
pub fn known_bad_pair(
    source: &QemuVersion,
    destination: &QemuVersion,
    virtio_serial: bool,
) -> Option<&'static str> {
    let at = |version: &QemuVersion| (version.major, version.minor);
    (virtio_serial && at(source) == (10, 0) && at(destination) == (11, 1)).then_some(
        "QEMU 11.1 refuses the virtio-serial state that QEMU 10.0 sends (vring size); \
         run the same version on both hosts, or use a vsock channel",
    )
}

async fn print(binary: &Path, arguments: &[&str]) -> Result<(String, String), ProbeError> {
    let path = find_binary(binary)?;
    let running = Command::new(&path)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ProbeError::Run { binary: path.clone(), source })?
        .wait_with_output();
    let output = timeout(PRINT_DEADLINE, running)
        .await
        .map_err(|_| ProbeError::Slow {
            binary: path.clone(),
            arguments: arguments.join(" "),
            after: PRINT_DEADLINE,
        })?
        .map_err(|source| ProbeError::Run { binary: path, source })?;
    let printed = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    Ok((output.status.to_string(), String::from_utf8_lossy(&printed).into_owned()))
}

fn unreadable(
    binary: &Path,
    arguments: &[&str],
    wanted: &'static str,
    status: String,
    printed: &str,
) -> ProbeError {
    ProbeError::Unreadable {
        binary: binary.to_owned(),
        arguments: arguments.join(" "),
        wanted,
        status,
        printed: printed.chars().take(200).collect(),
    }
}

fn parse_version(printed: &str) -> Option<QemuVersion> {
    let text = printed.lines().next()?;
    let numbers = text.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    let mut numbers = numbers.split('.').map(|number| {
        let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
        number[..digits].parse::<u32>().ok()
    });
    let (major, minor) = (numbers.next()??, numbers.next()??);
    let micro = numbers.next().flatten().unwrap_or(0);
    Some(QemuVersion { major, minor, micro, text: text.to_owned() })
}

fn parse_machines(printed: &str) -> Vec<&str> {
    printed.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(major: u32, minor: u32, micro: u32) -> QemuVersion {
        QemuVersion { major, minor, micro, text: String::new() }
    }

    #[test]
    fn versions_are_read_with_and_without_a_packager() {
        let debian =
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright").unwrap();
        assert_eq!((debian.major, debian.minor, debian.micro), (7, 2, 22));
        assert!(debian.text.ends_with("deb12u18)"));
        let candidate = parse_version("QEMU emulator version 11.1.0-rc2").unwrap();
        assert_eq!((candidate.major, candidate.minor, candidate.micro), (11, 1, 0));
        assert_eq!(parse_version("bash: not found"), None);
        assert_eq!(parse_version("QEMU emulator version ten.one"), None);
    }

    #[test]
    fn the_bad_pair_is_bad_in_one_direction_and_with_virtio_serial_only() {
        assert!(known_bad_pair(&at(10, 0, 13), &at(11, 1, 3), true).is_some());
        assert!(known_bad_pair(&at(10, 0, 13), &at(11, 1, 3), false).is_none());
        assert!(known_bad_pair(&at(11, 1, 3), &at(10, 0, 13), true).is_none());
        assert!(known_bad_pair(&at(7, 2, 22), &at(11, 1, 3), true).is_none());
        assert!(known_bad_pair(&at(10, 0, 0), &at(10, 0, 13), true).is_none());
    }

    #[test]
    fn machines_are_the_first_words() {
        let printed =
            "Supported machines are:\npc-q35-7.2           Standard PC (Q35)\nnone   empty machine\n";
        assert_eq!(parse_machines(printed), ["pc-q35-7.2", "none"]);
    }

    #[test]
    fn a_missing_binary_names_the_package() {
        for name in ["/nonexistent/qemu", "no-such-qemu-anywhere", ""] {
            let error = find_binary(Path::new(name)).unwrap_err();
            assert!(error.to_string().contains("qemu-system-x86"), "{error}");
        }
        assert!(find_binary(Path::new("sh")).unwrap().is_absolute());
    }
}
