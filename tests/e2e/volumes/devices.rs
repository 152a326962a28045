//! Block devices as volumes: nothing on them is lost to an arrival, and what a volume left is known again.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Host, Lab, Run};

use super::{SOON, command, sh, start};
use crate::rollback::{SlowNetwork, move_in_transfer};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
/// As both hosts call theirs; below `/run`, which each has for itself.
const NAME: &str = "/run/e2e-device";

/// A loop device of a host. Gone when dropped.
struct LoopDevice<'a> {
    lab: &'a Lab,
    host: Host,
    backing: PathBuf,
    path: String,
}

impl<'a> LoopDevice<'a> {
    fn new(lab: &'a Lab, host: Host) -> LoopDevice<'a> {
        let backing = lab.dir().join(format!("device-{host}.img"));
        let _ = fs::remove_file(&backing);
        File::create(&backing).and_then(|file| file.set_len(SIZE)).expect("a file for the device");
        let path = Run::new(command(&["losetup", "-f", "--show", &backing.display().to_string()]), SOON).ok();
        let device = LoopDevice { lab, host, backing, path: path.trim().to_owned() };
        lab.on(host, &["ln", "-sf", &device.path, NAME]).ok();
        device
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("the device")
    }

    fn write(&self, content: &[u8], offset: u64) {
        let file = self.open();
        file.write_all_at(content, offset).and_then(|()| file.sync_all()).expect("writable");
    }

    /// As the host sees it, which a guest with all of it in memory may not.
    fn sum(&self) -> String {
        let said = Run::new(command(&["md5sum", &self.path]), SOON).ok();
        said.split_whitespace().next().expect("a sum").to_owned()
    }

    fn read(&self, length: usize, offset: u64) -> Vec<u8> {
        let mut content = vec![0; length];
        self.open().read_exact_at(&mut content, offset).expect("readable");
        content
    }
}

impl Drop for LoopDevice<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.lab.run_path(self.host, NAME));
        let _ = Command::new("losetup").args(["-d", &self.path]).output();
        let _ = fs::remove_file(&self.backing);
    }
}

pub(super) fn a_block_device_goes_along_and_back(lab: &Lab) {
    let [on_a, on_b] = Host::ALL.map(|host| LoopDevice::new(lab, host));
    let mount = format!("type=bind,src={NAME},dst=/dev/volume,options=rbind:rw");
    let container = start(lab, "v-device", &[mount]);
    let write = |host, mib: u64, at: u64| {
        let dd = "dd if=/dev/urandom of=/dev/volume bs=1M conv=fsync,notrunc";
        sh(&container, host, &format!("{dd} count={mib} seek={at} 2>/dev/null"))
    };
    let sum = |host| {
        let said = sh(&container, host, "md5sum </dev/volume");
        said.split_whitespace().next().expect("a sum").to_owned()
    };
    write(Host::A, 24, 0);
    let first = sum(Host::A);

    // What no table of file systems knows is data all the same.
    on_b.write(b"precious", 20 * MIB);
    let wanted = ["/dev/volume", NAME, "byte 20971520", "volumes.overwrite"];
    lab.migrate(Host::A, "v-device", "b").fails_naming(&wanted);
    crate::refusals::assert_unharmed(lab, &container, "after");
    assert_eq!(on_b.read(8, 20 * MIB), b"precious");
    on_b.write(&[0; 8], 20 * MIB);

    // A copy that broke off in its middle is in nobody's way but another volume's.
    let slow = SlowNetwork::new();
    let child = move_in_transfer(lab, "v-device");
    let since = Instant::now();
    while on_b.read(4096, 0).iter().all(|byte| *byte == 0) {
        assert!(since.elapsed() < SOON, "nothing comes to the device");
        thread::sleep(Duration::from_millis(50));
    }
    lab.on(Host::A, &["dunlin", "cancel", "v-device"]).ok();
    let run = Run::finish(child, "dunlin migrate", Duration::from_secs(180));
    drop(slow);
    run.fails_naming(&["cancel"]);
    lab.migrate(Host::A, "v-device", "b").ok();
    container.assert_only_on(Host::B);
    assert_eq!([sum(Host::B), on_b.sum()], [first.clone(), first.clone()]);

    // Back to what it has left there.
    write(Host::B, 2, 30);
    let second = sum(Host::B);
    assert_ne!(first, second);
    lab.migrate(Host::B, "v-device", "a").ok();
    container.assert_only_on(Host::A);
    assert_eq!([sum(Host::A), on_a.sum()], [second.clone(), second.clone()]);

    // Not to what somebody has changed since.
    on_b.write(b"mine", 28 * MIB);
    lab.migrate(Host::A, "v-device", "b").fails_naming(&["/dev/volume", "left", "not known"]);
    assert_eq!(on_b.read(4, 28 * MIB), b"mine");
    assert_eq!(sum(Host::A), second);
    container.remove(Host::A);
}
