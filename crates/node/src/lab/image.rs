//! The lab's images, made from the machine's static busybox without any network: one that waits, for the
//! sandbox containers of pods, and on top of it one more layer with the counter, the demo image.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    cri::PAUSE_IMAGE,
    error::{FileContext, LabError},
    tar::Archive,
};

/// The name under which both hosts know the image.
pub(crate) const DEMO_IMAGE: &str = "docker.io/dunlin/demo:latest";
/// The file inside the container to which the counter appends.
pub(crate) const COUNTER_FILE: &str = "/counter.log";

const BUSYBOX: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];

/// Commands that the image has by name.
const APPLETS: [&str; 36] = [
    "sh",
    "cat",
    "echo",
    "ls",
    "ps",
    "sleep",
    "usleep",
    "true",
    "false",
    "env",
    "id",
    "hostname",
    "mount",
    "dd",
    "rm",
    "mkdir",
    "touch",
    "sync",
    "kill",
    "wc",
    "tail",
    "head",
    "grep",
    "seq",
    "test",
    "stty",
    "tty",
    "md5sum",
    "sha256sum",
    "stat",
    "df",
    "free",
    "cut",
    "mkfifo",
    "readlink",
    "cp",
];

/// `counter [LINES [EXIT_CODE]]`: `pid <its pid>`, then about every 10 ms one line
/// `<number> <uptime>`, to its output and to [`COUNTER_FILE`]. It forks nothing: the pause
/// is the shell's own `read`, on a pipe that nobody writes.
const COUNTER: &str = r#"#!/bin/sh
mkfifo /tmp/tick.$$ || exit 125
exec 9<>/tmp/tick.$$ 8>>/counter.log
rm /tmp/tick.$$
echo "pid $$"
echo "pid $$" >&8
n=0
while [ "$n" -lt "${1:-2000000000}" ]; do
    n=$((n + 1))
    read -r up idle </proc/uptime
    echo "$n $up" >&8
    echo "$n $up"
    read -r -t 0.01 -u 9 nothing
done
exit "${2:-0}"
"#;

/// Keeps memory and disk busy until it is killed: `load [KIB]` rewrites that much of
/// `/dev/shm` and of the container's own disk, over and over.
const LOAD: &str = r#"#!/bin/sh
size=${1:-4096}
while :; do
    dd if=/dev/urandom of=/dev/shm/load bs=1024 count="$size" 2>/dev/null
    dd if=/dev/shm/load of=/load.dat bs=1024 count="$size" conv=notrunc 2>/dev/null
    sync
    usleep 50000
done
"#;

/// Writes the demo image to `demo`, and it and [`PAUSE_IMAGE`] to `cri`: each file an OCI layout in a tar,
/// which `ctr images import` takes.
pub(crate) fn write(demo: &Path, cri: &Path) -> Result<(), LabError> {
    let busybox = BUSYBOX.iter().map(Path::new).find(|path| is_static(path)).ok_or_else(|| {
        LabError::MissingProgram { program: "busybox (static)".to_owned(), package: "busybox-static" }
    })?;
    let busybox = fs::read(busybox).file("read", busybox)?;
    let (base, counter) = (base_layer(&busybox), demo_layer());
    let of_demo =
        Image { name: DEMO_IMAGE, command: &["/bin/counter"], layers: &[base.as_slice(), &counter] };
    // It writes nothing: a sandbox container's root is read-only.
    let of_pause = Image { name: PAUSE_IMAGE, command: &["/bin/sleep", "inf"], layers: &[base.as_slice()] };
    fs::write(demo, oci_tar(&[&of_demo])).file("write", demo)?;
    fs::write(cri, oci_tar(&[&of_demo, &of_pause])).file("write", cri)
}

/// An image to be written.
struct Image<'a> {
    name: &'static str,
    command: &'a [&'static str],
    /// Tars, the lowest first.
    layers: &'a [&'a [u8]],
}

/// A program without an interpreter runs in an image that has no libraries.
fn is_static(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| {
        bytes.starts_with(b"\x7fELF") && !bytes.windows(10).take(4096).any(|window| window == b"/lib64/ld-")
    })
}

fn oci_tar(images: &[&Image]) -> Vec<u8> {
    let mut blobs = BTreeMap::new();
    let manifests: Vec<Value> = images.iter().map(|image| manifest(image, &mut blobs)).collect();
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    let mut archive = Archive::default();
    archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
    archive.file("index.json", 0o644, index.to_string().as_bytes());
    archive.directory("blobs");
    archive.directory("blobs/sha256");
    for (digest, bytes) in blobs {
        archive.file(&format!("blobs/sha256/{digest}"), 0o644, &bytes);
    }
    archive.finish()
}

/// Adds an image's blobs by their digests; gives the descriptor of its manifest.
fn manifest(image: &Image, blobs: &mut BTreeMap<String, Vec<u8>>) -> Value {
    let mut keep = |bytes: &[u8], media_type: &str| {
        let digest = format!("{:x}", Sha256::digest(bytes));
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
        blobs.insert(digest, bytes.to_owned());
        descriptor
    };
    let layer_type = "application/vnd.oci.image.layer.v1.tar";
    let layers: Vec<Value> = image.layers.iter().map(|layer| keep(layer, layer_type)).collect();
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": image.command, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = keep(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers });
    let mut manifest = keep(manifest.to_string().as_bytes(), manifest_type);
    let tag = image.name.rsplit(':').next().unwrap_or_default();
    manifest["annotations"] =
        json!({ "io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag });
    manifest
}

fn base_layer(busybox: &[u8]) -> Vec<u8> {
    let mut layer = Archive::default();
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "run", "root"] {
        layer.directory(directory);
    }
    layer.file("bin/busybox", 0o755, busybox);
    for applet in APPLETS {
        layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    );
    layer.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
    layer.finish()
}

fn demo_layer() -> Vec<u8> {
    let mut layer = Archive::default();
    layer.directory("bin");
    layer.file("bin/counter", 0o755, COUNTER.as_bytes());
    layer.file("bin/load", 0o755, LOAD.as_bytes());
    layer.file("etc/dunlin-demo", 0o644, b"this file came with the image\n");
    layer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_busybox_gives_the_same_images() {
        let tar = |busybox: &[u8]| {
            let base = base_layer(busybox);
            let image = |name, layers| Image { name, command: &["/bin/sh"], layers };
            let layers = [base.as_slice()];
            oci_tar(&[&image(DEMO_IMAGE, &layers), &image(PAUSE_IMAGE, &layers)])
        };
        assert_eq!(tar(b"\x7fELF one"), tar(b"\x7fELF one"));
        assert_ne!(tar(b"\x7fELF one"), tar(b"\x7fELF two"));
    }
}
