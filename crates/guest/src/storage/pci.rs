//! Devices that are passed through, found by the root port that they are plugged into, and the device nodes that a
//! container gets of them.
//!
//! Root port i is the PCI function `0000:00:<0x18+i>.0`; what is plugged into it is a directory below it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::StorageError;

/// Annotation of a container's spec: root ports whose devices it uses, as in `2,3`.
pub const PORTS: &str = "io.dunlin.vpci-ports";
/// Root ports a machine has.
pub const ROOT_PORTS: u8 = 4;
/// How long a device may take to appear: a port that is told by interrupt waits five seconds for an operator.
pub const APPEAR_DEADLINE: Duration = Duration::from_secs(15);

const FIRST_ADDRESS: u8 = 0x18;
const POLL: Duration = Duration::from_millis(10);
const PCI: &str = "/sys/bus/pci";
/// Directories between a PCI device and the last of its device nodes; a disk's partition is the deepest known.
const DEPTH: u32 = 8;

/// Waits for the device behind a root port. `id`: the host's name of it, for errors. Blocks up to
/// [`APPEAR_DEADLINE`].
pub fn wait(id: &str, port: Option<u8>) -> Result<PathBuf, StorageError> {
    wait_below(Path::new(PCI), id, port, APPEAR_DEADLINE)
}

fn wait_below(pci: &Path, id: &str, port: Option<u8>, within: Duration) -> Result<PathBuf, StorageError> {
    let port = port.ok_or_else(|| StorageError::NoRootPort(id.to_owned()))?;
    if port >= ROOT_PORTS {
        return Err(StorageError::BadRootPort(port));
    }
    let end = Instant::now() + within;
    let mut scanned = false;
    loop {
        if let Some(device) = device(&pci.join("devices"), port) {
            return Ok(device);
        }
        if !scanned {
            // In case the hot-plug event is late or was lost.
            scanned = fs::write(pci.join("rescan"), "1").is_ok();
        }
        if Instant::now() >= end {
            let seconds = within.as_secs();
            return Err(StorageError::DeviceMissing { id: id.to_owned(), port, seconds });
        }
        std::thread::sleep(POLL);
    }
}

fn device(devices: &Path, port: u8) -> Option<PathBuf> {
    let below = devices.join(format!("0000:00:{:02x}.0", FIRST_ADDRESS + port));
    fs::read_dir(below).ok()?.filter_map(Result::ok).find_map(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(is_address).then(|| entry.path())
    })
}

/// Gives the container the device nodes of what is in its root ports: whatever the kernel's drivers have made of it by
/// now. A device without a driver in this guest has none.
pub fn give_nodes(spec: &mut Value) {
    give_nodes_below(Path::new(PCI), spec);
}

fn give_nodes_below(pci: &Path, spec: &mut Value) {
    let Some(ports) = spec["annotations"][PORTS].as_str().map(str::to_owned) else { return };
    let ports =
        ports.split(',').filter_map(|port| port.trim().parse().ok()).filter(|port| *port < ROOT_PORTS);
    let mut found = Vec::new();
    for device in ports.filter_map(|port| device(&pci.join("devices"), port)) {
        nodes(&device, 0, &mut found);
    }
    // An absent section or list is made; one of another type is for the spec's own checks.
    if let Some(devices) = Some(&mut spec["linux"])
        .filter(|linux| linux.is_null() || linux.is_object())
        .map(|linux| &mut linux["devices"])
    {
        match devices {
            Value::Array(devices) => devices.extend(found),
            Value::Null => *devices = Value::Array(found),
            _ => {}
        }
    }
}

/// Device nodes of a device and of what is below it: its disks, its controllers.
fn nodes(directory: &Path, depth: u32, found: &mut Vec<Value>) {
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let number = read("dev");
    let name = read("uevent").lines().find_map(|line| line.strip_prefix("DEVNAME=").map(str::to_owned));
    if let (Some((major, minor)), Some(name)) = (number.trim().split_once(':'), name)
        && let (Ok(major), Ok(minor)) = (major.parse::<u32>(), minor.parse::<u32>())
    {
        let block = fs::read_link(directory.join("subsystem"))
            .is_ok_and(|subsystem| subsystem.file_name().is_some_and(|name| name == "block"));
        let kind = if block { "b" } else { "c" };
        found.push(json!({"path": format!("/dev/{name}"), "type": kind, "major": major, "minor": minor, "fileMode": 0o600, "uid": 0, "gid": 0}));
    }
    if depth == DEPTH {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok) {
        // Links lead out of the device.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            nodes(&entry.path(), depth + 1, found);
        }
    }
}

/// `dddd:bb:dd.f`, in hex.
fn is_address(name: &str) -> bool {
    let shape = |c: char, like: char| match like {
        'x' => c.is_ascii_hexdigit(),
        other => c == other,
    };
    const SHAPE: &str = "xxxx:xx:xx.x";
    name.len() == SHAPE.len() && name.chars().zip(SHAPE.chars()).all(|(c, like)| shape(c, like))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_behind_its_port() {
        let pci = tempfile::tempdir().unwrap();
        let ports = pci.path().join("devices");
        for port in ["0000:00:18.0", "0000:00:19.0"] {
            // What sysfs has beside the device: an express service, whose name is longer.
            fs::create_dir_all(ports.join(port).join(format!("{port}:pcie004"))).unwrap();
        }
        let short = Duration::from_millis(30);
        let missing = wait_below(pci.path(), "gpu", Some(1), short).unwrap_err();
        assert!(matches!(missing, StorageError::DeviceMissing { port: 1, .. }), "{missing}");
        assert_eq!(fs::read_to_string(pci.path().join("rescan")).unwrap(), "1");
        fs::create_dir(ports.join("0000:00:19.0/0000:02:00.0")).unwrap();
        let found = wait_below(pci.path(), "gpu", Some(1), short).unwrap();
        assert_eq!(found, ports.join("0000:00:19.0/0000:02:00.0"));
        assert!(matches!(
            wait_below(pci.path(), "gpu", Some(0), short),
            Err(StorageError::DeviceMissing { .. })
        ));
        assert!(matches!(wait_below(pci.path(), "gpu", Some(4), short), Err(StorageError::BadRootPort(4))));
        assert!(matches!(wait_below(pci.path(), "gpu", None, short), Err(StorageError::NoRootPort(_))));
    }

    #[test]
    fn a_container_gets_the_nodes_of_its_ports_alone() {
        let pci = tempfile::tempdir().unwrap();
        let device = |port: &str, bus: &str| pci.path().join("devices").join(port).join(bus);
        let put = |directory: PathBuf, number: &str, name: &str, subsystem: &str| {
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("dev"), format!("{number}\n")).unwrap();
            fs::write(directory.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
            std::os::unix::fs::symlink(format!("/sys/class/{subsystem}"), directory.join("subsystem"))
                .unwrap();
        };
        let nvme = device("0000:00:1b.0", "0000:04:00.0").join("nvme/nvme0");
        put(nvme.clone(), "240:0", "nvme0", "nvme");
        put(nvme.join("nvme0n1"), "259:0", "nvme0n1", "block");
        put(device("0000:00:1a.0", "0000:03:00.0").join("gpu"), "226:0", "dri/card0", "drm");
        let mut spec = json!({"annotations": {PORTS: "3"}, "linux": {"devices": [{"path": "/dev/own"}]}});
        give_nodes_below(pci.path(), &mut spec);
        let devices = spec["linux"]["devices"].as_array().unwrap();
        let told: Vec<_> =
            devices.iter().map(|device| (device["path"].as_str(), device["type"].as_str())).collect();
        let wanted =
            [(Some("/dev/own"), None), (Some("/dev/nvme0"), Some("c")), (Some("/dev/nvme0n1"), Some("b"))];
        assert_eq!(told, wanted);
        assert_eq!((&devices[2]["major"], &devices[2]["minor"]), (&json!(259), &json!(0)));
        let mut both = json!({"annotations": {PORTS: "2, 3,9,x"}});
        give_nodes_below(pci.path(), &mut both);
        assert_eq!(both["linux"]["devices"].as_array().unwrap().len(), 3);
        let mut none = json!({"linux": {}});
        give_nodes_below(pci.path(), &mut none);
        assert_eq!(none, json!({"linux": {}}));
    }
}
