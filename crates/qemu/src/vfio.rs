//! Devices of the host, passed through with VFIO and hot-plugged into the PCIe root ports. A port's device is
//! `vfio-<n>`. A machine that has one cannot migrate, which QEMU says too.
//!
//! Which driver a device has on the host is the administrator's decision: nothing is bound or unbound here.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::document::RootPort;
use crate::error::QemuError;
use crate::owner::Qemu;

/// The driver that hands a device out.
const DRIVER: &str = "vfio-pci";
/// Drivers of bridges, which may share a group with a device that is handed out.
const BRIDGE_DRIVER: &str = "pcieport";

/// A PCI function of the host, written `0000:03:00.0`. Read also without the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u16,
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = VfioError;

    fn from_str(text: &str) -> Result<PciAddress, VfioError> {
        let wrong = || VfioError::Address { text: text.to_owned() };
        let hex = |part: &str, digits: usize| {
            let fits = part.len() == digits && part.chars().all(|c| c.is_ascii_hexdigit());
            fits.then(|| u16::from_str_radix(part, 16).ok()).flatten().ok_or_else(wrong)
        };
        let byte = |part: &str, digits: usize| u8::try_from(hex(part, digits)?).map_err(|_| wrong());
        let (place, function) = text.rsplit_once('.').ok_or_else(wrong)?;
        let mut parts = place.rsplit(':');
        let device = byte(parts.next().unwrap_or_default(), 2)?;
        let bus = byte(parts.next().unwrap_or_default(), 2)?;
        let domain = parts.next().map_or(Ok(0), |domain| hex(domain, 4))?;
        let function = byte(function, 1)?;
        if parts.next().is_some() || device > 0x1f || function > 7 {
            return Err(wrong());
        }
        Ok(PciAddress { domain, bus, device, function })
    }
}

/// A device of the host cannot be passed through.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VfioError {
    /// Not the address of a PCI function.
    #[error(
        "{text:?} is not the address of a PCI function; write it as `lspci -D` does, for example 0000:03:00.0"
    )]
    Address {
        /// What was given.
        text: String,
    },
    /// The host has no such device.
    #[error("this host has no PCI device {address}; `lspci -D` lists those that it has")]
    Missing {
        /// The device.
        address: PciAddress,
    },
    /// The device has no virtual function of that number.
    #[error(
        "PCI device {address} has no virtual function {index}; raise its sriov_numvfs, or ask for another"
    )]
    NoFunction {
        /// The physical function.
        address: PciAddress,
        /// From 1.
        index: u32,
    },
    /// A driver of the host has it, or none has.
    #[error(
        "PCI device {address} is {held} on this host and not with {DRIVER}; hand it over with `driverctl set-override {address} {DRIVER}`"
    )]
    NotBound {
        /// The device.
        address: PciAddress,
        /// `without a driver`, or `with the driver x`.
        held: String,
    },
    /// The host does not isolate it.
    #[error(
        "PCI device {address} is in no IOMMU group; turn the IOMMU on in the firmware and with intel_iommu=on or amd_iommu=on on the host's kernel command line"
    )]
    NoIommu {
        /// The device.
        address: PciAddress,
    },
    /// Its group is not VFIO's.
    #[error(
        "IOMMU group {group} of PCI device {address} has no {path}; load the host's kernel module {DRIVER}"
    )]
    NoGroup {
        /// The device.
        address: PciAddress,
        /// Its group.
        group: String,
        /// Where the group's device node is expected.
        path: PathBuf,
    },
    /// The host uses another device of its group, so neither can be handed out alone.
    #[error(
        "PCI device {address} shares IOMMU group {group} with {other}, which the host uses with the driver {driver}; hand that one over too, or put the device into another slot"
    )]
    GroupInUse {
        /// The device.
        address: PciAddress,
        /// Its group.
        group: String,
        /// The other device.
        other: String,
        /// Its driver.
        driver: String,
    },
}

/// Where a host tells of its devices.
#[derive(Debug, Clone)]
pub struct HostDevices {
    sysfs: PathBuf,
    vfio: PathBuf,
}

impl Default for HostDevices {
    /// This host's.
    fn default() -> HostDevices {
        HostDevices::at("/sys/bus/pci/devices", "/dev/vfio")
    }
}

impl HostDevices {
    /// A host that has its PCI devices and its VFIO groups in these directories.
    pub fn at(sysfs: impl Into<PathBuf>, vfio: impl Into<PathBuf>) -> HostDevices {
        HostDevices { sysfs: sysfs.into(), vfio: vfio.into() }
    }

    /// The function to hand out for a device and the number of a virtual function of it: 0 is the device itself, n the
    /// n-th that it made.
    ///
    /// # Errors
    /// [`VfioError::Missing`], [`VfioError::NoFunction`].
    pub fn function(&self, address: PciAddress, index: u32) -> Result<PciAddress, VfioError> {
        let device = self.sysfs.join(address.to_string());
        if !device.exists() {
            return Err(VfioError::Missing { address });
        }
        let Some(number) = index.checked_sub(1) else { return Ok(address) };
        let target = link_name(&device.join(format!("virtfn{number}")));
        target.and_then(|name| name.parse().ok()).ok_or(VfioError::NoFunction { address, index })
    }

    /// Whether the function can be handed to a virtual machine: bound to vfio-pci, isolated, and nothing of its group
    /// in the host's use.
    ///
    /// # Errors
    /// Names what is missing and how to get it.
    pub fn check(&self, address: PciAddress) -> Result<(), VfioError> {
        let device = self.sysfs.join(address.to_string());
        if !device.exists() {
            return Err(VfioError::Missing { address });
        }
        let driver = link_name(&device.join("driver"));
        if driver.as_deref() != Some(DRIVER) {
            let held = driver.map_or("without a driver".to_owned(), |name| format!("with the driver {name}"));
            return Err(VfioError::NotBound { address, held });
        }
        let group_link = device.join("iommu_group");
        let Some(group) = link_name(&group_link) else { return Err(VfioError::NoIommu { address }) };
        let path = self.vfio.join(&group);
        if !path.exists() {
            return Err(VfioError::NoGroup { address, group, path });
        }
        for member in fs::read_dir(group_link.join("devices")).into_iter().flatten().flatten() {
            let other = member.file_name().to_string_lossy().into_owned();
            match link_name(&member.path().join("driver")) {
                Some(driver) if driver != DRIVER && driver != BRIDGE_DRIVER => {
                    return Err(VfioError::GroupInUse { address, group, other, driver });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Last component of a link's target.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn device_id(port: RootPort) -> String {
    format!("vfio-{port}")
}

fn device(port: RootPort, address: PciAddress) -> Value {
    json!({
        "driver": DRIVER,
        "id": device_id(port),
        "bus": format!("rp{port}"),
        "addr": "0x0",
        "host": address.to_string(),
    })
}

impl Qemu {
    /// Plugs a device of the host into a root port. From then on the machine cannot migrate.
    ///
    /// # Errors
    /// [`QemuError::AttachDevice`]; nothing of it is left.
    pub async fn attach_host_device(&self, port: RootPort, address: PciAddress) -> Result<(), QemuError> {
        let added = self.qmp.execute("device_add", device(port, address)).await;
        added.map(drop).map_err(|source| QemuError::AttachDevice { port, address, source })
    }

    /// Unplugs the device of a root port. The running guest has to let go of it within `deadline`.
    ///
    /// # Errors
    /// [`QemuError::DetachDevice`], [`QemuError::NotReleased`].
    pub async fn detach_host_device(&self, port: RootPort, deadline: Duration) -> Result<(), QemuError> {
        let failed = |source| QemuError::DetachDevice { port, source };
        self.unplug(&device_id(port), deadline, failed).await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Fake {
        directory: tempfile::TempDir,
        host: HostDevices,
    }

    impl Fake {
        fn new() -> Fake {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            for name in ["devices", "vfio", "drivers", "groups/7/devices"] {
                fs::create_dir_all(path(name)).unwrap();
            }
            let host = HostDevices::at(path("devices"), path("vfio"));
            Fake { directory, host }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn device(&self, address: &str, driver: Option<&str>) {
            let device = self.path("devices").join(address);
            fs::create_dir(&device).unwrap();
            if let Some(driver) = driver {
                symlink(self.path("drivers").join(driver), device.join("driver")).unwrap();
            }
        }

        fn group(&self, address: &str) {
            let device = self.path("devices").join(address);
            symlink(self.path("groups/7"), device.join("iommu_group")).unwrap();
            symlink(&device, self.path("groups/7/devices").join(address)).unwrap();
        }
    }

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_read_as_lspci_writes_them() {
        assert_eq!(address("0000:03:00.0").to_string(), "0000:03:00.0");
        assert_eq!(address("3a:1f.7").to_string(), "0000:3a:1f.7");
        assert_eq!(address("ABCD:00:02.1").to_string(), "abcd:00:02.1");
        for bad in [
            "",
            "03:00",
            "3:0.0",
            "0000:03:20.0",
            "0000:03:00.8",
            "1:0000:03:00.0",
            "0000:03:00.0,x-no=1",
            "+3:00.0",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_out() {
        let (fake, gpu) = (Fake::new(), address("0000:03:00.0"));
        let check = || fake.host.check(gpu).unwrap_err().to_string();
        assert!(check().contains("no PCI device 0000:03:00.0"), "{}", check());
        fake.device("0000:03:00.0", None);
        assert!(check().contains("without a driver") && check().contains("driverctl"), "{}", check());
        let driver = fake.path("devices/0000:03:00.0/driver");
        symlink(fake.path("drivers/nvme"), &driver).unwrap();
        assert!(check().contains("with the driver nvme"), "{}", check());
        fs::remove_file(&driver).unwrap();
        symlink(fake.path("drivers/vfio-pci"), &driver).unwrap();
        assert!(check().contains("iommu=on"), "{}", check());
        fake.group("0000:03:00.0");
        assert!(check().contains("group 7") && check().contains("vfio/7"), "{}", check());
        fs::write(fake.path("vfio/7"), "").unwrap();
        fake.host.check(gpu).unwrap();
        // A bridge in its group is no hindrance, a network card that the host uses is.
        fake.device("0000:00:01.0", Some("pcieport"));
        fake.group("0000:00:01.0");
        fake.host.check(gpu).unwrap();
        fake.device("0000:03:00.1", Some("e1000e"));
        fake.group("0000:03:00.1");
        assert!(check().contains("0000:03:00.1") && check().contains("e1000e"), "{}", check());
    }

    #[test]
    fn virtual_functions_are_counted_from_one() {
        let (fake, nic) = (Fake::new(), address("0000:05:00.0"));
        assert_eq!(fake.host.function(nic, 0), Err(VfioError::Missing { address: nic }));
        fake.device("0000:05:00.0", Some("ixgbe"));
        symlink("../0000:05:10.0", fake.path("devices/0000:05:00.0/virtfn0")).unwrap();
        assert_eq!(fake.host.function(nic, 0).unwrap(), nic);
        assert_eq!(fake.host.function(nic, 1).unwrap(), address("0000:05:10.0"));
        assert_eq!(fake.host.function(nic, 2), Err(VfioError::NoFunction { address: nic, index: 2 }));
    }

    #[test]
    fn qemu_is_told_port_and_device() {
        let arguments = device(RootPort::new(2).unwrap(), address("0000:03:00.0"));
        let wanted = json!({"driver": "vfio-pci", "id": "vfio-2", "bus": "rp2", "addr": "0x0", "host": "0000:03:00.0"});
        assert_eq!(arguments, wanted);
    }
}
