//! Images that the destination makes with other bytes: read from the source, by digest, no byte twice.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use dunlin_tests::{Container, Host, Lab};

use super::{SOON, counter, migrate, sh};

/// Host b's mkfs.erofs compresses: the same layers, other bytes. As before when dropped.
struct OtherBytes {
    config: PathBuf,
    text: String,
    wrapper: PathBuf,
}

impl OtherBytes {
    fn new(lab: &Lab) -> OtherBytes {
        let wrapper = lab.dir().join("mkfs.erofs.lz4");
        fs::write(&wrapper, "#!/bin/sh\nexec mkfs.erofs -zlz4 \"$@\"\n").expect("writable");
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("executable");
        let config = lab.host_dir(Host::B).join("etc/config.toml");
        let text = fs::read_to_string(&config).expect("the shim's configuration");
        let changed = text.replacen("[disks]\n", &format!("[disks]\nmkfs_erofs = {wrapper:?}\n"), 1);
        assert_ne!(text, changed, "{} has no [disks]", config.display());
        fs::write(&config, changed).expect("writable");
        OtherBytes { config, text, wrapper }
    }
}

impl Drop for OtherBytes {
    fn drop(&mut self) {
        let _ = fs::write(&self.config, &self.text);
        let _ = fs::remove_file(&self.wrapper);
    }
}

/// A read-only image on host a, and something else of its name on host b. Gone when dropped.
struct Volume<'a> {
    lab: &'a Lab,
}

impl<'a> Volume<'a> {
    /// Below `/run`, which each host has for itself.
    const DIRECTORY: &'static str = "/run/e2e-image";
    const BYTES: u64 = 2 << 20;

    fn new(lab: &'a Lab) -> Volume<'a> {
        let volume = Volume { lab };
        let (at, bytes) = (Self::DIRECTORY, Self::BYTES);
        let make = format!(
            "mkdir -p {at}/tree && echo on a >{at}/tree/file && truncate -s {bytes} {at}/image && mkfs.ext4 -q -F -d {at}/tree {at}/image"
        );
        lab.on(Host::A, &["sh", "-c", &make]).ok();
        lab.on(Host::B, &["mkdir", "-p", at]).ok();
        fs::write(volume.on(Host::B), "another").expect("writable");
        volume
    }

    fn on(&self, host: Host) -> PathBuf {
        self.lab.run_path(host, &format!("{}/image", Self::DIRECTORY))
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        for host in Host::ALL {
            let _ = fs::remove_dir_all(self.lab.run_path(host, Self::DIRECTORY));
        }
    }
}

pub(super) fn fetched(report: &serde_json::Value) -> u64 {
    report["fetched_bytes"].as_u64().unwrap_or_else(|| panic!("no fetched_bytes in {report}"))
}

/// The images of a host's store: name and bytes.
fn images(lab: &Lab, host: Host) -> Vec<(PathBuf, u64)> {
    let store = fs::read_dir(lab.host_dir(host).join("data/layers/sha256")).into_iter().flatten().flatten();
    let images =
        store.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "erofs"));
    let mut images: Vec<(PathBuf, u64)> =
        images.map(|path| (path.clone(), fs::metadata(path).expect("it is there").len())).collect();
    images.sort();
    images
}

pub(super) fn an_image_of_other_bytes_is_read_from_the_source(lab: &Lab) {
    for host in Host::ALL {
        let _ = fs::remove_dir_all(lab.host_dir(host).join("data/layers"));
    }
    let _other = OtherBytes::new(lab);
    let volume = Volume::new(lab);
    let mount = format!("type=ext4,src={}/image,dst=/volume,options=ro", Volume::DIRECTORY);
    let container = counter(lab, "d-images", &["--mount", &mount]);
    let on_a = images(lab, Host::A);
    assert_eq!(on_a.len(), 2, "{on_a:?}");
    let all: u64 = on_a.iter().map(|(_, bytes)| bytes).sum::<u64>() + Volume::BYTES;
    // A fetch that broke off in the middle of the larger one.
    let (path, bytes) = on_a.iter().max_by_key(|(_, bytes)| *bytes).expect("two images");
    let half = bytes / 2 / 4096 * 4096;
    let partial = lab.host_dir(Host::B).join("data/layers/sha256");
    fs::create_dir_all(&partial).expect("a directory");
    let partial = partial.join(path.file_name().expect("a name")).with_extension("partial");
    let original = fs::read(path).expect("the image");
    fs::write(&partial, &original[..usize::try_from(half).expect("it fits")]).expect("writable");
    let report = migrate(lab, Host::A, "d-images", &[]);
    println!(
        "    {} KiB of images, {} KiB there, {} KiB read from the source",
        all / 1024,
        half / 1024,
        fetched(&report) / 1024
    );
    // Each byte once; zeroes, which a new file system is nearly full of, are not sent.
    let layers = all - Volume::BYTES - half;
    let sent = layers + 1..layers + Volume::BYTES / 4;
    assert!(sent.contains(&fetched(&report)), "not within {sent:?}: {report}");
    assert!(!partial.exists() && images(lab, Host::B).len() >= 4, "its own images and the source's");
    container.await_lines(Host::B, 20, SOON);
    assert_eq!(sh(&container, Host::B, "read", "cat /etc/dunlin-demo"), "this file came with the image\n");
    // So did the volume's image, and what has its name here is as it was.
    assert_eq!(sh(&container, Host::B, "volume", "cat /volume/file"), "on a\n");
    assert_eq!(fs::read_to_string(volume.on(Host::B)).expect("it is there"), "another");
    // Both hosts have all of them now, whatever they would make.
    assert_eq!(fetched(&migrate(lab, Host::B, "d-images", &[])), 0);
    assert_eq!(fetched(&migrate(lab, Host::A, "d-images", &[])), 0);
    container.await_lines(Host::B, 20, SOON);
    container.remove(Host::B);
}

/// With containerd's own erofs snapshotter: nothing is built, and the other host needs not make the same bytes.
pub(crate) fn erofs_layers_are_attached_as_they_are(lab: &Lab) {
    // Its first container on a host has the image unpacked there.
    for host in Host::ALL {
        let run = ["run", "--rm", "--snapshotter", "erofs", "--runtime", "io.containerd.dunlin.v2"];
        lab.ctr(host, &[&run[..], &[Container::IMAGE, "d-unpack", "true"]].concat()).ok();
        let _ = fs::remove_dir_all(lab.host_dir(host).join("data/layers"));
    }
    let container = counter(lab, "d-erofs", &["--snapshotter", "erofs"]);
    assert_eq!(images(lab, Host::A), [], "no image was built");
    let maps = "for p in $(pidof qemu-system-x86_64); do ls -l /proc/$p/fd; done";
    let open = lab.on(Host::A, &["sh", "-c", maps]).ok();
    assert_eq!(open.matches("layer.erofs").count(), 2, "QEMU has both layers open: {open}");
    let report = migrate(lab, Host::A, "d-erofs", &[]);
    println!("    {} KiB of images were read from the source", fetched(&report) / 1024);
    container.await_lines(Host::B, 20, SOON);
    assert_eq!(sh(&container, Host::B, "read", "cat /etc/dunlin-demo"), "this file came with the image\n");
    migrate(lab, Host::B, "d-erofs", &[]);
    container.await_lines(Host::A, 20, SOON);
    container.remove(Host::A);
}
