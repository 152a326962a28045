use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// A host with two devices that can be handed out, and one that a driver has.
fn host() -> (tempfile::TempDir, Devices) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::create_dir_all(path("vfio")).unwrap();
    for (address, driver, group) in
        [("0000:03:00.0", "vfio-pci", "7"), ("0000:04:00.0", "vfio-pci", "8"), ("0000:05:00.0", "nvme", "9")]
    {
        let device = path("devices").join(address);
        fs::create_dir_all(&device).unwrap();
        symlink(path("drivers").join(driver), device.join("driver")).unwrap();
        symlink(path("groups").join(group), device.join("iommu_group")).unwrap();
        fs::write(path("vfio").join(group), "").unwrap();
    }
    let devices = Devices::of(HostDevices::at(path("devices"), path("vfio")));
    (directory, devices)
}

#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    /// What to refuse, as in `plug 0000:04:00.0`.
    refuses: &'static str,
}

impl Fake {
    fn say(&self, what: String) -> Result<(), VmError> {
        let refused = !self.refuses.is_empty() && what.starts_with(self.refuses);
        self.asked.lock().unwrap().push(what);
        if refused { Err(VmError::Ended { report: "refused by the test".into() }) } else { Ok(()) }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Machine for Fake {
    fn taken_ports(&self) -> BTreeSet<u8> {
        BTreeSet::from([0])
    }

    async fn plug(&self, port: RootPort, address: PciAddress) -> Result<(), VmError> {
        self.say(format!("plug {address} into {port}"))
    }

    async fn wait_for(&self, port: RootPort, _: &str) -> Result<(), VmError> {
        self.say(format!("wait for {port}"))
    }

    async fn unplug(&self, port: RootPort) -> Result<(), VmError> {
        self.say(format!("unplug {port}"))
    }
}

fn ask(addresses: &[&str]) -> Vec<HostDevice> {
    addresses.iter().map(|address| HostDevice::parse(address).unwrap()).collect()
}

#[tokio::test]
async fn devices_come_with_their_container_and_go_with_the_last_user() {
    let ((_directory, devices), machine) = (host(), Fake::default());
    let two = devices.assign(&machine, "web", &ask(&["0000:03:00.0", "0000:04:00.0"])).await.unwrap();
    let order = ["plug 0000:03:00.0 into 3", "wait for 3", "plug 0000:04:00.0 into 2", "wait for 2"];
    assert_eq!(machine.asked(), order);
    let again = devices.assign(&machine, "db", &ask(&["0000:03:00.0"])).await.unwrap();
    assert_eq!(again[0], two[0], "it is there already");
    assert!(machine.asked().is_empty());
    let tie = devices.check_migratable().unwrap_err().to_string();
    assert!(tie.contains("0000:0") && tie.contains("web"), "{tie}");
    let ids: Vec<String> = two.into_iter().map(|one| one.id).collect();
    devices.release(&machine, "web", &ids).await.unwrap();
    assert_eq!(machine.asked(), ["unplug 2"]);
    devices.release(&machine, "db", &ids[..1]).await.unwrap();
    assert_eq!(machine.asked(), ["unplug 3"]);
    devices.check_migratable().unwrap();
}

#[tokio::test]
async fn a_host_that_cannot_is_found_out_before_anything_is_plugged() {
    let ((_directory, devices), machine) = (host(), Fake::default());
    for (bad, word) in
        [("0000:05:00.0", "nvme"), ("0000:06:00.0", "no PCI device"), ("0000:03:00.0/1", "virtual")]
    {
        let error =
            devices.assign(&machine, "web", &ask(&["0000:04:00.0", bad])).await.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(machine.asked().is_empty());
    devices.check_migratable().unwrap();
}

#[tokio::test]
async fn a_failure_half_way_takes_everything_back() {
    let (_directory, devices) = host();
    let both = ask(&["0000:03:00.0", "0000:04:00.0"]);
    let machine = Fake { refuses: "plug 0000:04", ..Fake::default() };
    let error = devices.assign(&machine, "web", &both).await.unwrap_err().to_string();
    assert!(error.contains("0000:04:00.0"), "{error}");
    assert_eq!(machine.asked().last().unwrap(), "unplug 3");
    devices.check_migratable().unwrap();

    let machine = Fake { refuses: "wait for 2", ..Fake::default() };
    devices.assign(&machine, "web", &both).await.unwrap_err();
    assert_eq!(machine.asked()[3..], ["wait for 2", "unplug 2", "unplug 3"]);
    devices.check_migratable().unwrap();
}

#[tokio::test]
async fn a_device_that_the_guest_keeps_stays_known_and_is_not_handed_on() {
    let (_directory, devices) = host();
    let machine = Fake { refuses: "unplug", ..Fake::default() };
    let one = devices.assign(&machine, "web", &ask(&["0000:03:00.0"])).await.unwrap();
    assert!(devices.release(&machine, "web", &[one[0].id.clone()]).await.is_err());
    assert!(matches!(devices.check_migratable(), Err(Tie::Left { .. })));
    let error = devices.assign(&machine, "db", &ask(&["0000:03:00.0"])).await.unwrap_err();
    assert!(matches!(error, VpciError::NotNow(_)), "{error}");
    // Another device gets another port.
    let other = devices.assign(&machine, "db", &ask(&["0000:04:00.0"])).await.unwrap();
    assert_ne!(other[0].port, one[0].port);
    devices.forget("db", &[other[0].id.clone()]).unwrap();
}
