//! The shim's configuration: one TOML file a host, every key optional.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

/// Names the file; without it [`DEFAULT_PATH`] is read when it exists.
pub(crate) const PATH_VARIABLE: &str = "DUNLIN_CONFIG";
const DEFAULT_PATH: &str = "/etc/dunlin/config.toml";

/// Sandbox annotation that overrides `vm.memory_mib`.
const MEMORY_ANNOTATION: &str = "io.microsoft.virtualmachine.computetopology.memory.sizeinmb";
/// Sandbox annotation that overrides `vm.vcpus`.
const PROCESSORS_ANNOTATION: &str = "io.microsoft.virtualmachine.computetopology.processor.count";
/// Container annotation that overrides `disks.scratch_mib`.
const SCRATCH_ANNOTATION: &str = "dev.dunlin.scratch.mib";

/// What a host's administrator decides.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Sockets and logs, one directory a sandbox.
    pub(crate) state_dir: PathBuf,
    /// Layer images and scratch disks.
    pub(crate) data_dir: PathBuf,
    pub(crate) guest: Guest,
    pub(crate) vm: Vm,
    pub(crate) disks: Disks,
    pub(crate) volumes: Volumes,
}

/// What the virtual machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// What the kernel's command line says besides.
    pub(crate) kernel_arguments: String,
}

/// The virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Vm {
    pub(crate) qemu: PathBuf,
    pub(crate) accelerator: Accelerator,
    pub(crate) link: Link,
    pub(crate) machine: String,
    pub(crate) cpu: String,
    /// Capped to the host's.
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
}

/// How QEMU executes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accelerator {
    /// KVM where the processor has it and a probe works, TCG elsewhere.
    Auto,
    Kvm,
    Tcg,
}

/// What carries the link between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Link {
    /// A virtio-serial port, which every host has.
    VirtioSerial,
    /// vhost-vsock.
    Vsock,
    /// Vsock where `/dev/vhost-vsock` exists, virtio-serial elsewhere.
    Auto,
}

/// How disks are made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Disks {
    pub(crate) mkfs_erofs: PathBuf,
    pub(crate) mkfs_ext4: PathBuf,
    /// Size of a container's writable layer; the file is sparse.
    pub(crate) scratch_mib: u64,
    /// Where the writable layers lie, instead of in `data_dir`. Below a directory of `shared` they are not copied.
    pub(crate) scratch_dir: Option<PathBuf>,
    /// Directories that other hosts have as well, under the same path or another one. A writable disk below one of
    /// them is handed over and not copied.
    pub(crate) shared: Vec<PathBuf>,
}

/// What is copied into the guest of the directories and files that a container mounts read-only, and what may be written
/// over.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Volumes {
    /// Of one file.
    pub(crate) max_file_kib: u64,
    /// Of all files of a mount.
    pub(crate) max_mount_mib: u64,
    /// Block devices that an arriving volume may write over, whatever is on them.
    pub(crate) overwrite: Vec<PathBuf>,
}

impl Volumes {
    pub(crate) fn limits(&self) -> crate::volume::Limits {
        crate::volume::Limits { file: self.max_file_kib << 10, mount: self.max_mount_mib << 20 }
    }
}

impl Default for Volumes {
    fn default() -> Self {
        Volumes { max_file_kib: 1024, max_mount_mib: 16, overwrite: Vec::new() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            state_dir: "/run/dunlin".into(),
            data_dir: "/var/lib/dunlin".into(),
            guest: Guest::default(),
            vm: Vm::default(),
            disks: Disks::default(),
            volumes: Volumes::default(),
        }
    }
}

impl Default for Guest {
    fn default() -> Self {
        Guest {
            kernel: "/usr/lib/dunlin/vmlinuz".into(),
            initramfs: "/usr/lib/dunlin/initramfs.cpio.lz4".into(),
            kernel_arguments: String::new(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        Vm {
            qemu: "qemu-system-x86_64".into(),
            accelerator: Accelerator::Auto,
            // Not `auto` yet: moves over vsock have not been tried on a host that has it.
            link: Link::VirtioSerial,
            machine: "pc-q35-7.2".into(),
            cpu: "Nehalem-v1".into(),
            vcpus: 2,
            memory_mib: 512,
        }
    }
}

impl Default for Disks {
    fn default() -> Self {
        Disks {
            mkfs_erofs: "mkfs.erofs".into(),
            mkfs_ext4: "mkfs.ext4".into(),
            scratch_mib: 10 * 1024,
            scratch_dir: None,
            shared: Vec::new(),
        }
    }
}

/// The configuration cannot be used.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error(
        "cannot read the configuration {path}: {source}; correct {PATH_VARIABLE} or the file's permissions"
    )]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path} is not valid: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{path}: {key} = {value} is out of range, it takes {range}")]
    Range { path: PathBuf, key: &'static str, value: u64, range: &'static str },
    #[error("{path}: {key}: {directory} is not an absolute path")]
    Relative { path: PathBuf, key: &'static str, directory: PathBuf },
    #[error("annotation {key}: {value:?} is not {expected}")]
    Annotation { key: &'static str, value: String, expected: &'static str },
}

impl Config {
    /// Reads `$DUNLIN_CONFIG`, else `/etc/dunlin/config.toml`, else the defaults.
    pub(crate) fn load() -> Result<Config, ConfigError> {
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) => Config::read(Path::new(&path)),
            None if Path::new(DEFAULT_PATH).exists() => Config::read(Path::new(DEFAULT_PATH)),
            None => Ok(Config::default()),
        }
    }

    fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config = Config::parse(path, &text)?;
        Ok(config)
    }

    fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string() })?;
        let range = |key, value: u64, allowed: std::ops::RangeInclusive<u64>, range| {
            if allowed.contains(&value) {
                Ok(())
            } else {
                Err(ConfigError::Range { path: path.to_owned(), key, value, range })
            }
        };
        range("vm.vcpus", config.vm.vcpus.into(), 1..=64, "1 to 64")?;
        range("vm.memory_mib", config.vm.memory_mib.into(), 128..=1 << 20, "128 to 1048576")?;
        range("volumes.max_file_kib", config.volumes.max_file_kib, 0..=1 << 20, "0 to 1048576")?;
        range("volumes.max_mount_mib", config.volumes.max_mount_mib, 0..=1024, "0 to 1024")?;
        range("disks.scratch_mib", config.disks.scratch_mib, 16..=16 << 20, "16 to 16777216")?;
        for (key, directory) in config
            .disks
            .shared
            .iter()
            .map(|directory| ("disks.shared", directory))
            .chain(config.disks.scratch_dir.iter().map(|directory| ("disks.scratch_dir", directory)))
        {
            if !directory.is_absolute() {
                let directory = directory.clone();
                return Err(ConfigError::Relative { path: path.to_owned(), key, directory });
            }
        }
        Ok(config)
    }

    /// Applies what a sandbox's annotations say about its machine.
    pub(crate) fn with_annotations(
        mut self,
        annotations: &std::collections::HashMap<String, String>,
    ) -> Result<Config, ConfigError> {
        let number = |key: &'static str, allowed: std::ops::RangeInclusive<u32>, expected| match annotations
            .get(key)
        {
            None => Ok(None),
            Some(value) => match value.parse() {
                Ok(number) if allowed.contains(&number) => Ok(Some(number)),
                _ => Err(ConfigError::Annotation { key, value: value.clone(), expected }),
            },
        };
        if let Some(mib) = number(MEMORY_ANNOTATION, 128..=1 << 20, "a number of MiB, 128 to 1048576")? {
            // The document of the reference holds even sizes only.
            self.vm.memory_mib = mib.next_multiple_of(2);
        }
        if let Some(mib) = number(SCRATCH_ANNOTATION, 16..=16 << 20, "a number of MiB, 16 to 16777216")? {
            self.disks.scratch_mib = mib.into();
        }
        if let Some(count) = number(PROCESSORS_ANNOTATION, 1..=64, "a number of processors, 1 to 64")? {
            self.vm.vcpus = count;
        }
        Ok(self)
    }

    /// The processors that a machine gets here: never more than the host has.
    pub(crate) fn vcpus(&self) -> u32 {
        let host = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.vm.vcpus.min(u32::try_from(host).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = Config::parse(Path::new("c"), "").unwrap();
        assert_eq!(config.vm.machine, "pc-q35-7.2");
        assert_eq!(config.state_dir, Path::new("/run/dunlin"));
    }

    #[test]
    fn the_packaged_example_is_the_defaults() {
        let text = include_str!("../../../packaging/config.toml");
        assert_eq!(Config::parse(Path::new("c"), text).unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = Config::parse(Path::new("c"), "[vm]\nmemory = 3").unwrap_err().to_string();
        assert!(error.contains("memory") && error.contains("memory_mib"), "{error}");
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_the_range() {
        let error = Config::parse(Path::new("c"), "[vm]\nmemory_mib = 3").unwrap_err().to_string();
        assert!(error.contains("vm.memory_mib = 3") && error.contains("128"), "{error}");
    }

    #[test]
    fn shared_directories_are_absolute() {
        let error = Config::parse(Path::new("c"), "[disks]\nshared = [\"srv\"]").unwrap_err().to_string();
        assert!(error.contains("disks.shared") && error.contains("absolute"), "{error}");
        let text = "[disks]\nshared = [\"/srv/shared\"]\nscratch_dir = \"/srv/shared/scratch\"";
        assert_eq!(Config::parse(Path::new("c"), text).unwrap().disks.shared, [Path::new("/srv/shared")]);
    }

    #[test]
    fn annotations_win_over_the_file() {
        let annotations = [
            (MEMORY_ANNOTATION.to_owned(), "321".to_owned()),
            (PROCESSORS_ANNOTATION.to_owned(), "1".to_owned()),
            (SCRATCH_ANNOTATION.to_owned(), "24".to_owned()),
        ]
        .into();
        let config = Config::default().with_annotations(&annotations).unwrap();
        assert_eq!((config.vm.memory_mib, config.vm.vcpus, config.disks.scratch_mib), (322, 1, 24));
        for (key, value) in [(MEMORY_ANNOTATION, "lots"), (SCRATCH_ANNOTATION, "15")] {
            let bad = [(key.to_owned(), value.to_owned())].into();
            let error = Config::default().with_annotations(&bad).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }
}
