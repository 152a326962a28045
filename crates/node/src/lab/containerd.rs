//! Which containerd a lab runs, and the configuration that its version reads.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    config::quoted,
    cri::{self, FileVersion},
    error::LabError,
    layout::HostLayout,
};

/// The directory of `containerd` and `ctr`: `dir` itself, or `usr/bin` below it.
pub(crate) fn programs_of(dir: &Path) -> Result<PathBuf, LabError> {
    let dir = std::path::absolute(dir).map_err(|source| LabError::File {
        action: "resolve",
        path: dir.to_owned(),
        source,
    })?;
    let has_both = |dir: &Path| ["containerd", "ctr"].iter().all(|program| dir.join(program).is_file());
    [dir.clone(), dir.join("usr/bin")]
        .into_iter()
        .find(|dir| has_both(dir))
        .ok_or(LabError::NoContainerd(dir))
}

/// What a containerd calls its version: `1.6.20~ds1`.
pub(crate) fn version_of(program: &Path) -> Result<String, LabError> {
    let command = format!("{} --version", program.display());
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|source| LabError::Spawn { command: command.clone(), source })?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let named = version_in(&text).map(ToOwned::to_owned);
    named.ok_or(LabError::NoVersion { command, output: text })
}

/// `containerd <package> <version> [<revision>]`, as every containerd says it.
fn version_in(text: &str) -> Option<&str> {
    let version = text.split_whitespace().nth(2)?;
    let version = version.strip_prefix('v').unwrap_or(version);
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

/// containerd with CRI; everything it keeps is below the host's directory or `/run`.
pub(crate) fn config(host: &HostLayout, version: &str) -> String {
    let (number, file) = match version.split('.').next() {
        Some("1") => (2, FileVersion::Two),
        Some(_) | None => (3, FileVersion::Three),
    };
    format!(
        "version = {number}\n\
         root = {root}\n\
         state = \"/run/containerd\"\n\
         [grpc]\n\
         address = \"/run/containerd/containerd.sock\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n\
         path = {opt}\n\
         {cri}",
        root = quoted(&host.containerd()),
        opt = quoted(&host.containerd().join("opt")),
        cri = cri::tables(host, file),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{HostName, Layout};

    #[test]
    fn each_containerds_own_words_are_read() {
        for (text, version) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                Some("1.6.20~ds1"),
            ),
            ("containerd github.com/containerd/containerd/v2 2.1.9+ds1 2.1.9+ds1-5", Some("2.1.9+ds1")),
            ("containerd github.com/containerd/containerd v1.7.24", Some("1.7.24")),
            ("command not found", None),
            ("", None),
        ] {
            assert_eq!(version_in(text), version, "{text}");
        }
    }

    #[test]
    fn each_version_gets_the_file_that_it_reads() {
        let layout = Layout::new(Path::new("/var/tmp/a \"quoted\" lab")).expect("an absolute path");
        for (version, file_version, plugin) in [
            ("1.6.20", 2, "io.containerd.grpc.v1.cri"),
            ("1.7.24~ds1", 2, "io.containerd.grpc.v1.cri"),
            ("2.1.9+ds1", 3, "io.containerd.cri.v1.runtime"),
        ] {
            for name in HostName::ALL {
                let file: toml::Table = config(&layout.host(name), version).parse().expect("TOML");
                assert_eq!(file["version"].as_integer(), Some(file_version), "{version}");
                let handler = &file["plugins"][plugin]["containerd"]["runtimes"]["dunlin"];
                assert_eq!(handler["runtime_type"].as_str(), Some("io.containerd.dunlin.v2"), "{version}");
            }
        }
    }

    #[test]
    fn a_root_and_its_programs_are_the_same_choice() {
        let at = std::env::temp_dir().join(format!("dunlin-lab-containerd-{}", std::process::id()));
        let bin = at.join("usr/bin");
        std::fs::create_dir_all(&bin).expect("a directory");
        std::fs::write(bin.join("containerd"), "").expect("a file");
        assert!(matches!(programs_of(&at), Err(LabError::NoContainerd(dir)) if dir == at));
        std::fs::write(bin.join("ctr"), "").expect("a file");
        assert_eq!(programs_of(&at).expect("a root"), bin);
        assert_eq!(programs_of(&bin).expect("its programs"), bin);
        std::fs::remove_dir_all(&at).expect("removed");
    }
}
