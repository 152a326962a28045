//! Where everything of a lab lies on the machine.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::error::{FileContext, LabError};

/// One of the lab's two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HostName {
    /// The first host, 10.77.0.1.
    A,
    /// The second host, 10.77.0.2.
    B,
}

impl HostName {
    /// Both hosts, in order.
    pub(crate) const ALL: [HostName; 2] = [HostName::A, HostName::B];

    /// `a` or `b`: the name of its directory and of its node.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            HostName::A => "a",
            HostName::B => "b",
        }
    }

    /// The name of its network namespace.
    pub(crate) const fn netns(self) -> &'static str {
        match self {
            HostName::A => "dunlin-a",
            HostName::B => "dunlin-b",
        }
    }

    /// Its address on the lab's network, without the prefix length.
    pub(crate) fn address(self) -> &'static str {
        match self {
            HostName::A => "10.77.0.1",
            HostName::B => "10.77.0.2",
        }
    }

    /// The other host.
    pub(crate) fn other(self) -> HostName {
        match self {
            HostName::A => HostName::B,
            HostName::B => HostName::A,
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What `lab up` was asked for; later commands read it back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The directory of our programs, first in PATH inside the lab.
    pub(crate) bin_dir: PathBuf,
    /// The directory with `vmlinuz` and `initramfs.cpio.lz4`.
    pub(crate) image_dir: PathBuf,
    /// The directory of another containerd and its `ctr`, after ours in PATH; absent: the installed one.
    #[serde(default)]
    pub(crate) containerd_dir: Option<PathBuf>,
    /// What that containerd calls its version: `1.6.20~ds1`.
    #[serde(default)]
    pub(crate) containerd_version: String,
    /// Directories that the lab had to make outside its own, and that `down` removes.
    pub(crate) created: Vec<PathBuf>,
}

impl Record {
    /// PATH inside the lab: our programs, the chosen containerd, then the machine's.
    pub(crate) fn search_path(&self) -> String {
        let chosen = [Some(self.bin_dir.as_path()), self.containerd_dir.as_deref()];
        let chosen: String = chosen.into_iter().flatten().map(|dir| format!("{}:", dir.display())).collect();
        format!("{chosen}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    }
}

/// The directory of a lab.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Below `dir`, made absolute. Refuses a directory under `/run`, which the hosts hide.
    pub(crate) fn new(dir: &Path) -> Result<Self, LabError> {
        let dir = std::path::absolute(dir).file("resolve", dir)?;
        if dir.starts_with("/run") || dir.starts_with("/proc") {
            let source = std::io::Error::other("the lab's hosts have their own /run; choose another place");
            return Err(LabError::File { action: "use", path: dir, source });
        }
        Ok(Self { dir })
    }

    /// The lab's directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The record that `up` writes first.
    pub(crate) fn record_path(&self) -> PathBuf {
        self.dir.join("lab.json")
    }

    /// The demo image as an OCI tar.
    pub(crate) fn demo_image(&self) -> PathBuf {
        self.dir.join("demo.tar")
    }

    /// The same and the sandbox containers' image, for CRI.
    pub(crate) fn cri_images(&self) -> PathBuf {
        self.dir.join("cri.tar")
    }

    /// One host's part.
    pub(crate) fn host(&self, host: HostName) -> HostLayout {
        HostLayout { host, root: self.dir.join(host.as_str()) }
    }

    /// Reads the record of a lab that is up, or of what is left of one.
    pub(crate) fn read_record(&self) -> Result<Option<Record>, LabError> {
        let path = self.record_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(LabError::File { action: "read", path, source }),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| LabError::Record { path, reason: error.to_string() })
    }

    /// Writes the record.
    pub(crate) fn write_record(&self, record: &Record) -> Result<(), LabError> {
        let path = self.record_path();
        let text = serde_json::to_string_pretty(record)
            .map_err(|error| LabError::Record { path: path.clone(), reason: error.to_string() })?;
        fs::write(&path, text).file("write", path)
    }
}

/// The directory of one host.
#[derive(Clone, Debug)]
pub(crate) struct HostLayout {
    /// Whose it is.
    pub(crate) host: HostName,
    root: PathBuf,
}

impl HostLayout {
    /// Everything of this host.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Seen inside as `/run`.
    pub(crate) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Seen inside as `/etc/dunlin`.
    pub(crate) fn etc(&self) -> PathBuf {
        self.root.join("etc")
    }

    /// Seen inside as `/var/lib/dunlin`.
    pub(crate) fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// Seen inside as `/var/lib/cni`: what network plugins and their callers remember.
    pub(crate) fn cni(&self) -> PathBuf {
        self.root.join("cni")
    }

    /// containerd's root directory.
    pub(crate) fn containerd(&self) -> PathBuf {
        self.root.join("containerd")
    }

    /// Logs; they outlive the lab until the next `up`.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// One service's log.
    pub(crate) fn log(&self, service: &str) -> PathBuf {
        self.logs().join(format!("{service}.log"))
    }

    /// The shim's configuration, `/etc/dunlin/config.toml` inside.
    pub(crate) fn shim_config(&self) -> PathBuf {
        self.etc().join("config.toml")
    }

    /// The node's configuration, `/etc/dunlin/node.toml` inside.
    pub(crate) fn node_config(&self) -> PathBuf {
        self.etc().join("node.toml")
    }

    /// containerd's configuration.
    pub(crate) fn containerd_config(&self) -> PathBuf {
        self.etc().join("containerd.toml")
    }

    /// Configurations of the pods' networks, for containerd's CRI and for the node.
    pub(crate) fn cni_config(&self) -> PathBuf {
        self.etc().join("cni")
    }

    /// Where the host's first process takes requests.
    pub(crate) fn control(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// Written by the host's first process once its services answer.
    pub(crate) fn ready(&self) -> PathBuf {
        self.root.join("ready")
    }

    /// Written by the host's first process when it gives up: the reason.
    pub(crate) fn failed(&self) -> PathBuf {
        self.root.join("failed")
    }
}
