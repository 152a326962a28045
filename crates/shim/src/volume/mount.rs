//! A mount of an OCI spec, read.

use serde_json::{Value, json};

/// A mount as its spec has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// In the container.
    pub(crate) destination: String,
    pub(crate) source: String,
    /// The file system's type; empty or `bind` for a bind mount.
    pub(crate) kind: String,
    pub(crate) bind: bool,
    pub(crate) read_only: bool,
}

/// File systems that the guest's kernel makes out of nothing.
const GUESTS: [&str; 9] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs"];

impl Mount {
    pub(crate) fn read(mount: &Value) -> Mount {
        let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default();
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let options: Vec<&str> = options.filter_map(Value::as_str).collect();
        let kind = text("type");
        Mount {
            destination: text("destination").to_owned(),
            source: text("source").to_owned(),
            kind: kind.to_owned(),
            bind: kind == "bind" || options.iter().any(|option| matches!(*option, "bind" | "rbind")),
            read_only: options.iter().any(|option| matches!(*option, "ro" | "rro")),
        }
    }

    /// Whether its source is something of this host: not made by the kernel, and not the guest's own, which is named by a
    /// scheme as in `sandbox://`.
    pub(crate) fn names_a_source(&self) -> bool {
        if self.bind { !self.source.contains("://") } else { !GUESTS.contains(&self.kind.as_str()) }
    }
}

/// Points a mount of a spec at a place in the guest. Of its options those stay that a bind mount has too.
pub(crate) fn point_at(mount: &mut Value, place: &str) {
    const OF_BINDS: [&str; 14] = [
        "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "private", "rprivate", "slave",
        "rslave", "shared", "rshared",
    ];
    let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
    let kept = options.filter(|option| option.as_str().is_some_and(|option| OF_BINDS.contains(&option)));
    let mut options = vec![json!("rbind")];
    options.extend(kept.cloned());
    mount["type"] = json!("bind");
    // By a scheme, so that nothing takes it for a path of this host.
    mount["source"] = json!(format!("uvm://{place}"));
    mount["options"] = Value::Array(options);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_this_host() {
        let names = |kind: &str, source: &str, options: &[&str]| {
            Mount::read(&json!({"destination": "/d", "type": kind, "source": source, "options": options}))
                .names_a_source()
        };
        assert!(names("bind", "/srv", &[]));
        assert!(names("", "/srv", &["rbind", "ro"]));
        assert!(names("none", "/srv", &["bind"]), "the options say it");
        assert!(names("ext4", "/dev/vg/x", &[]));
        assert!(!names("bind", "sandbox-tmp://shm", &[]));
        assert!(!names("tmpfs", "tmpfs", &["size=1m"]));
        assert!(!names("proc", "proc", &[]));
        let mount = Mount::read(&json!({"destination": "/d", "source": "/s", "options": ["rbind", "ro"]}));
        assert!(mount.bind && mount.read_only);
    }

    #[test]
    fn a_mount_is_pointed_at_the_guest() {
        let mut mount = json!({"destination": "/d", "type": "ext4", "source": "/dev/x", "options": ["ro", "noatime", "nosuid"]});
        point_at(&mut mount, "/run/mounts/scsi/0_1_0");
        let wanted = json!({"destination": "/d", "type": "bind", "source": "uvm:///run/mounts/scsi/0_1_0", "options": ["rbind", "ro", "nosuid"]});
        assert_eq!(mount, wanted);
        assert!(!Mount::read(&mount).names_a_source());
    }
}
