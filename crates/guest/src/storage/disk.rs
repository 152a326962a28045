//! Finds a disk by where the machine has it, never by its `sdX` name, which is not stable.
//!
//! Controller i is the virtio-scsi function at PCI address `0000:00:<0x10+i>.0`; a disk on it is
//! target 0 with its LUN.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::StorageError;

/// Controllers a machine has.
pub const CONTROLLERS: u32 = 4;
/// LUNs a controller has.
pub const LUNS: u32 = 64;
/// How long a disk may take to appear and to become openable.
pub const APPEAR_DEADLINE: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(10);
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// A disk's place; always within bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskAddress {
    controller: u32,
    lun: u32,
}

impl DiskAddress {
    /// Checks controller (0..=3) and LUN (0..=63).
    pub fn new(controller: u32, lun: u32) -> Result<DiskAddress, StorageError> {
        if controller >= CONTROLLERS {
            return Err(StorageError::NoController(controller));
        }
        if lun >= LUNS {
            return Err(StorageError::NoLun(lun));
        }
        Ok(DiskAddress { controller, lun })
    }

    fn pci_address(self) -> String {
        format!("0000:00:{:02x}.0", 0x10 + self.controller)
    }

    /// Waits for the device node of the disk, or of its partition when that is not 0, until it
    /// can be opened. Blocks up to [`APPEAR_DEADLINE`].
    pub fn wait_for_node(self, partition: u64) -> Result<PathBuf, StorageError> {
        let end = Instant::now() + APPEAR_DEADLINE;
        let mut scanned = false;
        loop {
            if let Some(node) = self.node(Path::new(PCI_DEVICES), partition) {
                // Open once: right after the hot-plug the node exists before its capacity is known.
                if File::open(&node).is_ok() {
                    return Ok(node);
                }
            } else if !scanned {
                scanned = self.scan(Path::new(PCI_DEVICES));
            }
            if Instant::now() >= end {
                return Err(StorageError::DiskMissing {
                    controller: self.controller,
                    lun: self.lun,
                    partition,
                    seconds: APPEAR_DEADLINE.as_secs(),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes the disk out of the kernel. A disk that is not there is done already.
    pub fn remove(self) -> Result<(), StorageError> {
        let Some(device) = self.scsi_device(Path::new(PCI_DEVICES)) else { return Ok(()) };
        let file = device.join("delete");
        match fs::write(&file, "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StorageError::at("remove the disk with", file)(error))
            }
            _ => Ok(()),
        }
    }

    /// `<pci>/virtio*/host*` of the controller, and the host's name.
    fn host(self, pci: &Path) -> Option<(PathBuf, String)> {
        let virtio = child(&pci.join(self.pci_address()), |name| name.starts_with("virtio"))?;
        let host =
            child(&virtio, |name| name.strip_prefix("host").is_some_and(|n| n.parse::<u32>().is_ok()))?;
        let name = host.file_name()?.to_str()?.to_owned();
        Some((host, name))
    }

    fn scsi_device(self, pci: &Path) -> Option<PathBuf> {
        let (host, name) = self.host(pci)?;
        let number = name.strip_prefix("host")?;
        let device = host.join(format!("target{number}:0:0")).join(format!("{number}:0:0:{}", self.lun));
        device.is_dir().then_some(device)
    }

    fn node(self, pci: &Path, partition: u64) -> Option<PathBuf> {
        let block = child(&self.scsi_device(pci)?.join("block"), |_| true)?;
        let mut name = block.file_name()?.to_str()?.to_owned();
        if partition > 0 {
            name = format!("{name}{partition}");
            if !block.join(&name).is_dir() {
                return None;
            }
        }
        Some(Path::new("/dev").join(name))
    }

    /// Asks the kernel to look for the LUN, in case the hot-plug event is late or was lost.
    fn scan(self, pci: &Path) -> bool {
        let Some((host, name)) = self.host(pci) else { return false };
        fs::write(host.join("scsi_host").join(name).join("scan"), format!("0 0 {}", self.lun)).is_ok()
    }
}

fn child(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    fs::read_dir(dir)
        .ok()?
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_bounds() {
        assert!(DiskAddress::new(3, 63).is_ok());
        assert!(matches!(DiskAddress::new(4, 0), Err(StorageError::NoController(4))));
        assert!(matches!(DiskAddress::new(0, 64), Err(StorageError::NoLun(64))));
    }

    #[test]
    fn finds_node_and_partition_by_controller_and_lun() {
        let pci = tempfile::tempdir().unwrap();
        let host = pci.path().join("0000:00:11.0/virtio5/host2");
        fs::create_dir_all(host.join("target2:0:0/2:0:0:7/block/sdb/sdb1")).unwrap();
        fs::create_dir_all(host.join("target2:0:0/2:0:0:3/block/sda")).unwrap();
        fs::create_dir_all(host.join("scsi_host/host2")).unwrap();
        let disk = DiskAddress::new(1, 7).unwrap();
        assert_eq!(disk.node(pci.path(), 0).unwrap(), Path::new("/dev/sdb"));
        assert_eq!(disk.node(pci.path(), 1).unwrap(), Path::new("/dev/sdb1"));
        assert_eq!(disk.node(pci.path(), 2), None);
        assert_eq!(DiskAddress::new(0, 7).unwrap().node(pci.path(), 0), None);
        let absent = DiskAddress::new(1, 9).unwrap();
        assert_eq!(absent.node(pci.path(), 0), None);
        assert!(absent.scan(pci.path()));
        assert_eq!(fs::read_to_string(host.join("scsi_host/host2/scan")).unwrap(), "0 0 9");
    }
}
