//! What two hosts must have in common for a machine to go on, and what to do where they have not.
//!
//! A newer build may add fields: it then raises `version`, and an older reader skips what it does
//! not know and says so with a warning. Within one version an unknown field is a mistake
//! and refused.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Digest;

/// The version of [`Compat`] that this build writes.
pub const COMPAT_VERSION: u32 = 1;
/// Longest encoded [`Compat`], bytes.
pub const COMPAT_MAX: usize = 64 << 10;

const FIELDS: [&str; 12] = [
    "version",
    "dunlin",
    "qemu",
    "machine",
    "cpu",
    "accelerator",
    "link",
    "kernel",
    "initramfs",
    "memory_mib",
    "vcpus",
    "vm_uuid",
];

/// Which QEMU, from `query-version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuVersion {
    /// As 7 in 7.2.22.
    pub major: u32,
    /// As 2 in 7.2.22.
    pub minor: u32,
    /// As 22 in 7.2.22.
    pub micro: u32,
    /// The distribution's name of the build; may be empty.
    pub text: String,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)?;
        if !self.text.is_empty() {
            write!(f, " ({})", self.text)?;
        }
        Ok(())
    }
}

/// What carries the link between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// One virtio-serial port.
    VirtioSerial,
    /// vhost-vsock.
    Vsock,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkKind::VirtioSerial => "virtio-serial",
            LinkKind::Vsock => "vsock",
        })
    }
}

/// A machine as its host runs it, or as a host would run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compat {
    /// [`COMPAT_VERSION`] of the writer.
    pub version: u32,
    /// Dunlin's own version, as in `0.1.0`.
    pub dunlin: String,
    /// Which QEMU.
    pub qemu: QemuVersion,
    /// Versioned machine type, as in `pc-q35-7.2`.
    pub machine: String,
    /// CPU model, as in `Nehalem-v1`.
    pub cpu: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Host-guest channel.
    pub link: LinkKind,
    /// The guest kernel's image.
    pub kernel: Digest,
    /// The guest's initramfs.
    pub initramfs: Digest,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The machine's UUID, lower-case text.
    pub vm_uuid: String,
}

/// Compatibility data that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CompatError {
    /// Refused before decoding.
    #[error("compat_info: {size} bytes are more than {COMPAT_MAX}; export again")]
    TooLong {
        /// Bytes given.
        size: usize,
    },
    /// Not the object that is asked for.
    #[error("compat_info: not readable; run the same Dunlin version on both hosts")]
    Undecodable(#[source] serde_json::Error),
    /// A field that its own version does not have.
    #[error(
        "compat_info.{field}: version {version} has no such field; run the same Dunlin version on both hosts"
    )]
    UnknownField {
        /// Its name.
        field: String,
        /// The writer's version.
        version: u32,
    },
    /// The version is missing or zero.
    #[error("compat_info.version: {given} is no version; export again")]
    NoVersion {
        /// As given.
        given: u32,
    },
}

/// What a mismatch means for the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The move may go on; show it.
    Warn,
    /// The move must not begin.
    Refuse,
}

/// One thing in which the hosts differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Which, as in `qemu` or `kernel`.
    pub field: String,
    /// The source's value.
    pub source: String,
    /// The destination's value.
    pub destination: String,
    /// What it means.
    pub severity: Severity,
    /// The way out, in words.
    pub remedy: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: the source has {}, the destination {}; {}",
            self.field, self.source, self.destination, self.remedy
        )
    }
}

impl Compat {
    /// Reads `compat_info`.
    pub fn from_json(bytes: &[u8]) -> Result<Compat, CompatError> {
        if bytes.len() > COMPAT_MAX {
            return Err(CompatError::TooLong { size: bytes.len() });
        }
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(bytes).map_err(CompatError::Undecodable)?;
        let names: Vec<String> = fields.keys().cloned().collect();
        let compat: Compat = serde_json::from_value(fields.into()).map_err(CompatError::Undecodable)?;
        if compat.version == 0 {
            return Err(CompatError::NoVersion { given: 0 });
        }
        if compat.version <= COMPAT_VERSION
            && let Some(field) = names.into_iter().find(|name| !FIELDS.contains(&name.as_str()))
        {
            return Err(CompatError::UnknownField { field, version: compat.version });
        }
        Ok(compat)
    }

    /// The bytes of `compat_info`.
    ///
    /// # Panics
    /// Never: every field has a JSON form.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields encode")
    }
}

/// Whether a move from `source` to `destination` may begin: nothing in the answer is a
/// [`Severity::Refuse`].
pub fn may_move(mismatches: &[Mismatch]) -> bool {
    mismatches.iter().all(|mismatch| mismatch.severity != Severity::Refuse)
}

/// Everything in which the two differ, refusals first.
pub fn check(source: &Compat, destination: &Compat) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let mut differ = |field: &str, a: String, b: String, severity, remedy: String| {
        if a != b {
            found.push(Mismatch { field: field.to_owned(), source: a, destination: b, severity, remedy });
        }
    };
    let refuse = Severity::Refuse;
    if source.qemu != destination.qemu {
        let (severity, remedy) = judge_qemu(&source.qemu, &destination.qemu);
        differ("qemu", source.qemu.to_string(), destination.qemu.to_string(), severity, remedy);
    }
    differ(
        "machine",
        source.machine.clone(),
        destination.machine.clone(),
        refuse,
        format!("set vm.machine = \"{}\" on the destination", source.machine),
    );
    differ(
        "cpu",
        source.cpu.clone(),
        destination.cpu.clone(),
        refuse,
        format!(
            "set vm.cpu = \"{}\" on the destination, or start the pod with a model both have",
            source.cpu
        ),
    );
    differ(
        "accelerator",
        source.accelerator.clone(),
        destination.accelerator.clone(),
        refuse,
        format!(
            "use {} on the destination too: a CPU's state does not cross accelerators",
            source.accelerator
        ),
    );
    differ(
        "link",
        source.link.to_string(),
        destination.link.to_string(),
        refuse,
        format!("choose a destination that offers {} to its guests, or restart the pod", source.link),
    );
    for (field, a, b) in [
        ("kernel", &source.kernel, &destination.kernel),
        ("initramfs", &source.initramfs, &destination.initramfs),
    ] {
        let remedy = format!("install the same guest image on the destination: the {field} {a}");
        differ(field, a.to_string(), b.to_string(), refuse, remedy);
    }
    differ(
        "memory_mib",
        source.memory_mib.to_string(),
        destination.memory_mib.to_string(),
        refuse,
        format!("give the destination's machine {} MiB", source.memory_mib),
    );
    differ(
        "vcpus",
        source.vcpus.to_string(),
        destination.vcpus.to_string(),
        refuse,
        format!("give the destination's machine {} CPUs", source.vcpus),
    );
    differ(
        "vm_uuid",
        source.vm_uuid.clone(),
        destination.vm_uuid.clone(),
        refuse,
        "build the destination's machine from the imported document".to_owned(),
    );
    if source.dunlin != destination.dunlin {
        differ(
            "dunlin",
            source.dunlin.clone(),
            destination.dunlin.clone(),
            Severity::Warn,
            "update the older host when convenient; payloads of another schema are refused by themselves"
                .to_owned(),
        );
    }
    if source.version != destination.version {
        differ(
            "version",
            source.version.to_string(),
            destination.version.to_string(),
            Severity::Warn,
            "one host may know a requirement that the other cannot check; update the older one".to_owned(),
        );
    }
    found.sort_by_key(|mismatch| mismatch.severity == Severity::Warn);
    found
}

/// Seen on 2026-11-21: 7.2, 10.0 and 11.1 move to one another, except 10.0.13 to 11.1.3, whose
/// virtio-serial control queue has grown beyond what the receiver allows.
fn judge_qemu(source: &QemuVersion, destination: &QemuVersion) -> (Severity, String) {
    let pair = ((source.major, source.minor), (destination.major, destination.minor));
    if pair == ((10, 0), (11, 1)) {
        let remedy = format!(
            "this pair is known to fail at load (virtio-serial); install QEMU {}.{} on the destination",
            source.major, source.minor
        );
        return (Severity::Refuse, remedy);
    }
    if source.major != destination.major {
        let remedy = format!(
            "another major version is not supported; install QEMU {}.{} on the destination",
            source.major, source.minor
        );
        return (Severity::Refuse, remedy);
    }
    let remedy =
        "the same build on both hosts is the supported case; this one should work, test it".to_owned();
    (Severity::Warn, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> Compat {
        Compat {
            version: 1,
            dunlin: "0.1.0".into(),
            qemu: QemuVersion { major: 7, minor: 2, micro: 22, text: "Debian 1:7.2".into() },
            machine: "pc-q35-7.2".into(),
            cpu: "Nehalem-v1".into(),
            accelerator: "tcg".into(),
            link: LinkKind::VirtioSerial,
            kernel: Digest::new(format!("sha256:{}", "a".repeat(64))).unwrap(),
            initramfs: Digest::new(format!("sha256:{}", "b".repeat(64))).unwrap(),
            memory_mib: 512,
            vcpus: 2,
            vm_uuid: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0".into(),
        }
    }

    fn qemu(major: u32, minor: u32, micro: u32) -> Compat {
        Compat { qemu: QemuVersion { major, minor, micro, text: String::new() }, ..sample() }
    }

    #[test]
    fn equal_hosts_differ_in_nothing() {
        assert_eq!(check(&sample(), &sample()), []);
    }

    #[test]
    fn qemu_pairs() {
        let verdict = |a: &Compat, b: &Compat| check(a, b).first().map(|found| found.severity);
        assert_eq!(verdict(&qemu(10, 0, 13), &qemu(11, 1, 3)), Some(Severity::Refuse));
        assert_eq!(verdict(&qemu(7, 2, 22), &qemu(7, 2, 21)), Some(Severity::Warn));
        assert_eq!(verdict(&qemu(7, 2, 0), &qemu(7, 1, 0)), Some(Severity::Warn));
        assert_eq!(verdict(&qemu(7, 2, 0), &qemu(10, 0, 0)), Some(Severity::Refuse));
        let found = check(&qemu(10, 0, 13), &qemu(11, 1, 3));
        assert!(found[0].to_string().contains("install QEMU 10.0"), "{}", found[0]);
    }

    #[test]
    fn every_difference_is_named_with_both_values_and_a_way_out() {
        let other = Compat {
            dunlin: "0.2.0".into(),
            machine: "pc-q35-8.0".into(),
            cpu: "Haswell-v1".into(),
            accelerator: "kvm".into(),
            link: LinkKind::Vsock,
            kernel: Digest::new(format!("sha256:{}", "c".repeat(64))).unwrap(),
            initramfs: Digest::new(format!("sha256:{}", "d".repeat(64))).unwrap(),
            memory_mib: 256,
            vcpus: 1,
            vm_uuid: "other".into(),
            version: 2,
            qemu: QemuVersion { major: 7, minor: 2, micro: 1, text: String::new() },
        };
        let found = check(&sample(), &other);
        assert_eq!(found.len(), 12, "{found:#?}");
        assert!(found.iter().all(|one| one.source != one.destination && !one.remedy.is_empty()));
        let kernel = found.iter().find(|one| one.field == "kernel").unwrap();
        assert!(kernel.remedy.contains(sample().kernel.as_str()));
        assert!(!may_move(&found));
        let firsts: Vec<_> = found.iter().map(|one| one.severity).collect();
        let refusals = firsts.iter().take_while(|s| **s == Severity::Refuse).count();
        assert!(firsts[refusals..].iter().all(|s| *s == Severity::Warn));
    }

    #[test]
    fn only_a_newer_version_may_have_unknown_fields() {
        let mut value = serde_json::to_value(sample()).unwrap();
        value["turbo"] = true.into();
        let error = Compat::from_json(value.to_string().as_bytes()).unwrap_err();
        assert!(matches!(&error, CompatError::UnknownField { field, .. } if field == "turbo"), "{error}");
        value["version"] = 2.into();
        let newer = Compat::from_json(value.to_string().as_bytes()).unwrap();
        assert_eq!(newer.version, 2);
        assert!(may_move(&check(&newer, &sample())));
        value["version"] = 0.into();
        assert!(Compat::from_json(value.to_string().as_bytes()).is_err());
    }

    #[test]
    fn golden_json() {
        let text = r#"{"version":1,"dunlin":"0.1.0","qemu":{"major":7,"minor":2,"micro":22,"text":"Debian 1:7.2"},"machine":"pc-q35-7.2","cpu":"Nehalem-v1","accelerator":"tcg","link":"virtio-serial","kernel":"sha256:KKKK","initramfs":"sha256:IIII","memory_mib":512,"vcpus":2,"vm_uuid":"0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"}"#
            .replace("KKKK", &"a".repeat(64))
            .replace("IIII", &"b".repeat(64));
        assert_eq!(String::from_utf8(sample().to_json()).unwrap(), text);
        assert_eq!(Compat::from_json(text.as_bytes()).unwrap(), sample());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Compat::from_json(&bytes);
        }
    }
}
