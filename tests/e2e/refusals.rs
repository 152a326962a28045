//! Moves that cannot be: each is refused with a sentence that names the cause, and the
//! container runs on where it was.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("refusals::an_unknown_container", an_unknown_container),
    ("refusals::an_unknown_node", an_unknown_node),
    ("refusals::a_node_that_is_down", a_node_that_is_down),
    ("refusals::a_name_that_is_taken", a_name_that_is_taken),
    ("refusals::another_guest_image", another_guest_image),
    ("refusals::an_image_that_is_missing", an_image_that_is_missing),
    ("refusals::a_layer_that_was_tampered_with", a_layer_that_was_tampered_with),
    ("refusals::a_layer_of_other_content", a_layer_of_other_content),
    ("refusals::a_layer_that_is_missing", a_layer_that_is_missing),
    ("refusals::qemu_that_is_not_installed", qemu_that_is_not_installed),
];

const SOON: Duration = Duration::from_secs(20);

/// Runs on host a as before, all APIs back, and nothing of it is on host b.
#[track_caller]
pub(crate) fn assert_unharmed(lab: &Lab, container: &Container<'_>, exec_id: &str) {
    container.assert_only_on(Host::A);
    container.await_lines(Host::A, 30, SOON);
    assert_eq!(container.exec(Host::A, exec_id, &["echo", "here"]).ok(), "here\n");
    let since = Instant::now();
    loop {
        let left: Vec<String> = lab
            .processes(Host::B)
            .into_iter()
            .filter(|line| line.contains("qemu") || line.contains("shim-dunlin"))
            .collect();
        if left.is_empty() {
            break;
        }
        assert!(since.elapsed() < SOON, "left on host b: {left:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let scratch = lab.on(Host::B, &["find", "/var/lib/dunlin/scratch", "-type", "f"]).stdout;
    assert!(scratch.is_empty(), "left on host b: {scratch}");
}

/// A file with other content until dropped.
pub(crate) struct Changed {
    path: PathBuf,
    original: Vec<u8>,
}

impl Changed {
    pub(crate) fn new(path: &Path, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Changed {
        let original = fs::read(path).expect("readable");
        let changed = change(&original);
        assert!(changed != original, "{} was not changed", path.display());
        fs::write(path, changed).expect("writable");
        Changed { path: path.to_owned(), original }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.original);
    }
}

fn replace_line(text: &[u8], start: &str, line: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(|old| if old.starts_with(start) { line } else { old });
    (lines.collect::<Vec<_>>().join("\n") + "\n").into_bytes()
}

fn an_unknown_container(lab: &Lab) {
    let no = "there is no container or sandbox `there-is-none` in namespace `default`";
    lab.migrate(Host::A, "there-is-none", "b").fails_naming(&[no]);
}

fn an_unknown_node(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-node", &["/bin/counter"]);
    lab.migrate(Host::A, "r-node", "nowhere").fails_naming(&["unknown node nowhere; known: b"]);
    lab.migrate(Host::A, "r-node", "a").fails_naming(&["container `r-node` is on a already"]);
    assert_unharmed(lab, &container, "after");
}

fn a_node_that_is_down(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-down", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    lab.service(Host::B, "stop", "node");
    let run = lab.migrate(Host::A, "r-down", "b");
    lab.service(Host::B, "start", "node");
    assert!(run.took < Duration::from_secs(30), "it took {:?} to say so", run.took);
    run.fails_naming(&["node b does not answer at ", "check that `dunlin node` runs there"]);
    assert_unharmed(lab, &container, "after");
    lab.migrate(Host::A, "r-down", "b").ok();
    container.assert_only_on(Host::B);
    container.remove(Host::B);
}

fn a_name_that_is_taken(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-taken", &["/bin/counter"]);
    lab.ctr(Host::B, &["containers", "create", Container::IMAGE, "r-taken", "true"]).ok();
    lab.migrate(Host::A, "r-taken", "b").fails_naming(&["r-taken exists already in namespace default"]);
    let listed = lab.ctr(Host::B, &["containers", "ls", "-q"]).ok();
    assert!(listed.lines().any(|line| line == "r-taken"), "the other container of that name was removed");
    lab.ctr(Host::B, &["containers", "rm", "r-taken"]).ok();
    assert_unharmed(lab, &container, "after");
}

fn another_guest_image(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-image", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let other = lab.host_dir(Host::B).join("other-initramfs");
    for (file, key) in [("initramfs.cpio.lz4", "initramfs"), ("vmlinuz", "kernel")] {
        let mut bytes = fs::read(lab.programs.image_dir.join(file)).expect("readable");
        bytes.extend_from_slice(b"another");
        fs::write(&other, bytes).expect("writable");
        let line = format!("{key} = \"{}\"", other.display());
        let changed = Changed::new(&lab.host_dir(Host::B).join("etc/config.toml"), |text| {
            replace_line(text, key, &line)
        });
        let run = lab.migrate(Host::A, "r-image", "b");
        drop(changed);
        run.fails_naming(&[key]);
        assert_unharmed(lab, &container, key);
    }
    container.remove(Host::A);
}

fn an_image_that_is_missing(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-pull", &["/bin/counter"]);
    lab.ctr(Host::B, &["images", "rm", "--sync", Container::IMAGE]).ok();
    let run = lab.migrate(Host::A, "r-pull", "b");
    let archive = lab.dir().join("demo.tar").display().to_string();
    lab.ctr(Host::B, &["images", "import", &archive]).ok();
    run.fails_naming(&["dunlin/demo"]);
    assert_unharmed(lab, &container, "after");
    lab.migrate(Host::A, "r-pull", "b").ok();
    container.remove(Host::B);
}

fn a_layer_that_was_tampered_with(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-layer", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    // Host b has the layers in its cache once a container has run there.
    lab.ctr(
        Host::B,
        &["run", "--rm", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, "r-warm", "true"],
    )
    .ok();
    let layers = fs::read_dir(lab.host_dir(Host::B).join("data/layers/sha256")).expect("a layer cache");
    let images: Vec<PathBuf> = layers
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "erofs"))
        .collect();
    assert_eq!(images.len(), 2, "{images:?}");
    let changed: Vec<Changed> = images
        .iter()
        .map(|path| {
            Changed::new(path, |bytes| {
                let mut bytes = bytes.to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0xff;
                bytes
            })
        })
        .collect();
    let run = lab.migrate(Host::A, "r-layer", "b");
    // Either the change is found and refused, or the layer is made anew; never is it used.
    let used = run.code == 0
        && changed.iter().any(|layer| fs::read(&layer.path).ok().is_none_or(|now| now != layer.original));
    assert!(!used, "the container moved onto a layer with other bytes");
    if run.code == 0 {
        container.assert_only_on(Host::B);
        container.remove(Host::B);
        return;
    }
    drop(changed);
    run.fails_naming(&["layer"]);
    assert_unharmed(lab, &container, "after");
    container.remove(Host::A);
}

/// The directories of host b's lowest layer, as its snapshotter keeps them: one in each of containerd's namespaces,
/// and another one when the image was imported again.
fn layer_directories(lab: &Lab) -> Vec<PathBuf> {
    let snapshots = lab.host_dir(Host::B).join("containerd/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let entries = fs::read_dir(&snapshots).expect("host b has snapshots").flatten();
    let mut layers: Vec<PathBuf> =
        entries.map(|entry| entry.path().join("fs")).filter(|fs| fs.join("bin/busybox").exists()).collect();
    layers.sort();
    assert!(!layers.is_empty(), "no layers below {}", snapshots.display());
    layers
}

fn a_layer_of_other_content(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-content", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    // Nothing in host b's store: it must make its images, and one of them comes out differently.
    let _ = fs::remove_dir_all(lab.host_dir(Host::B).join("data/layers"));
    let added = layer_directories(lab).into_iter().map(|layer| layer.join("added-by-somebody"));
    let added: Vec<PathBuf> = added.collect();
    added.iter().for_each(|file| fs::write(file, "x").expect("writable"));
    let run = lab.migrate(Host::A, "r-content", "b");
    added.iter().for_each(|file| fs::remove_file(file).expect("removable"));
    // It was read from the source, and is the source's.
    let said = run.ok();
    assert!(said.contains("images read"), "{said}");
    container.assert_only_on(Host::B);
    container.exec(Host::B, "added", &["cat", "/added-by-somebody"]).fails_naming(&["No such file"]);
    container.remove(Host::B);
}

fn a_layer_that_is_missing(lab: &Lab) {
    let container = Container::start(lab, Host::A, "r-gone", &["/bin/counter"]);
    container.await_lines(Host::A, 20, SOON);
    let _ = fs::remove_dir_all(lab.host_dir(Host::B).join("data/layers"));
    let layers = layer_directories(lab);
    let aside = |layer: &PathBuf| layer.with_file_name("aside");
    layers.iter().for_each(|layer| fs::rename(layer, aside(layer)).expect("movable"));
    let run = lab.migrate(Host::A, "r-gone", "b");
    layers.iter().for_each(|layer| fs::rename(aside(layer), layer).expect("movable back"));
    run.fails_naming(&["cannot read layer", "No such file"]);
    assert_unharmed(lab, &container, "after");
    container.remove(Host::A);
}

fn qemu_that_is_not_installed(lab: &Lab) {
    let config = lab.host_dir(Host::B).join("etc/config.toml");
    let with = |text: &[u8]| {
        String::from_utf8_lossy(text).replace("[vm]\n", "[vm]\nqemu = \"/nonexistent/qemu\"\n").into_bytes()
    };
    let changed = Changed::new(&config, with);
    let run = lab.ctr(
        Host::B,
        &["run", "--rm", "--runtime", "io.containerd.dunlin.v2", Container::IMAGE, "r-qemu", "true"],
    );
    drop(changed);
    let _ = lab.ctr(Host::B, &["containers", "rm", "r-qemu"]);
    run.fails_naming(&["/nonexistent/qemu"]);
}
