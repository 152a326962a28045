//! Volumes: host files that are copied into the guest and follow the host, files of a pod, directories of a pod, disk images.
//!
//! Sources lie below `/run`, which each host of the lab has for itself.

mod devices;

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use dunlin_tests::{Container, Host, Lab, Run};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("volumes::a_copy_is_seen_and_follows", a_copy_is_seen_and_follows),
    ("volumes::a_swap_is_never_torn", a_swap_is_never_torn),
    ("volumes::the_other_hosts_files_after_a_move", the_other_hosts_files_after_a_move),
    ("volumes::files_of_a_pod", files_of_a_pod),
    ("volumes::empty_directories_go_along", empty_directories_go_along),
    ("volumes::a_disk_image_goes_along_and_back", a_disk_image_goes_along_and_back),
    ("volumes::a_block_device_goes_along_and_back", devices::a_block_device_goes_along_and_back),
    ("volumes::what_is_too_large_or_writable_says_so", what_is_too_large_or_writable_says_so),
];

const SOON: Duration = Duration::from_secs(20);
/// How soon a change on the host shows in the container, with the exec that looks for it, which takes its
/// time on a busy machine. Less than the 15 s after which a shim looks by itself: it was told.
const FOLLOWED: Duration = Duration::from_secs(12);

/// A directory of sources, on each host its own. Gone when dropped.
struct Sources<'a> {
    lab: &'a Lab,
    /// As the hosts call it.
    path: String,
}

impl<'a> Sources<'a> {
    fn new(lab: &'a Lab, name: &str) -> Sources<'a> {
        let sources = Sources { lab, path: format!("/run/e2e-{name}") };
        for host in Host::ALL {
            let _ = fs::remove_dir_all(sources.on(host, ""));
            fs::create_dir_all(sources.on(host, "")).expect("a directory");
        }
        sources
    }

    /// Where this process sees a source of a host.
    fn on(&self, host: Host, name: &str) -> PathBuf {
        self.lab.run_path(host, &self.at(name))
    }

    /// A source as the hosts call it.
    fn at(&self, name: &str) -> String {
        if name.is_empty() { self.path.clone() } else { format!("{}/{name}", self.path) }
    }

    fn write(&self, host: Host, name: &str, content: &str) {
        let path = self.on(host, name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, content).expect("writable");
    }

    fn bind(&self, name: &str, destination: &str, option: &str) -> String {
        format!("type=bind,src={},dst={destination},options=rbind:{option}", self.at(name))
    }
}

impl Drop for Sources<'_> {
    fn drop(&mut self) {
        for host in Host::ALL {
            let _ = fs::remove_dir_all(self.on(host, ""));
        }
    }
}

/// `ctr run -d` on host a, its log as usual.
fn run(lab: &Lab, id: &str, mounts: &[String], annotations: &[&str], command: &[&str]) -> Run {
    for host in Host::ALL {
        let log = Container::adopt(lab, id).log_path(host);
        fs::create_dir_all(log.parent().expect("a directory")).expect("a directory for logs");
        let _ = fs::remove_file(&log);
    }
    let log = lab.host_dir(Host::A).join("logs/containers/default").join(format!("{id}.log"));
    let uri = format!("file://{}", log.display());
    let mut arguments = vec!["run", "-d", "--log-uri", &uri];
    arguments.extend(Container::RUN);
    for mount in mounts {
        arguments.extend(["--mount", mount]);
    }
    for annotation in annotations {
        arguments.extend(["--annotation", annotation]);
    }
    arguments.extend([Container::IMAGE, id]);
    arguments.extend(command);
    lab.ctr(Host::A, &arguments)
}

fn start<'a>(lab: &'a Lab, id: &str, mounts: &[String]) -> Container<'a> {
    run(lab, id, mounts, &[], &["/bin/counter"]).ok();
    let container = Container::adopt(lab, id);
    container.await_lines(Host::A, 5, SOON);
    container
}

/// What a script says in the container.
fn sh(container: &Container<'_>, host: Host, script: &str) -> String {
    container.exec(host, &exec_id(), &["sh", "-c", script]).ok()
}

/// One that nobody had.
fn exec_id() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("v{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits in the container until a file has this content; gives how long that took from `since`.
#[track_caller]
fn await_content(
    container: &Container<'_>,
    host: Host,
    file: &str,
    content: &str,
    since: Instant,
) -> Duration {
    // Looked for in the container: an exec takes its time.
    let script = format!(
        "i=0; while [ \"$(cat {file} 2>/dev/null)\" != '{content}' ]; do i=$((i+1)); [ $i -gt 1500 ] && break; usleep 20000; done; cat {file}"
    );
    let seen = sh(container, host, &script);
    let took = since.elapsed();
    assert_eq!(seen.trim_end(), content, "{file} after {took:?}");
    took
}

/// What kubelet does to a ConfigMap's directory: a new one beside, a link swapped, the old one gone.
fn swap(root: &Path, round: u32, files: &[(&str, String)]) {
    let name = format!("..{round:04}");
    fs::create_dir(root.join(&name)).expect("a directory");
    for (file, content) in files {
        fs::write(root.join(&name).join(file), content).expect("writable");
        if round == 0 {
            symlink(format!("..data/{file}"), root.join(file)).expect("a link");
        }
    }
    symlink(&name, root.join("..data_tmp")).expect("a link");
    fs::rename(root.join("..data_tmp"), root.join("..data")).expect("the link is swapped");
    if let Some(before) = round.checked_sub(1) {
        fs::remove_dir_all(root.join(format!("..{before:04}"))).expect("the old one goes");
    }
}

fn a_copy_is_seen_and_follows(lab: &Lab) {
    let sources = Sources::new(lab, "copy");
    sources.write(Host::A, "conf/sub/key", "one\n");
    sources.write(Host::A, "conf/mode", "x");
    let on_host = sources.on(Host::A, "conf/mode");
    fs::set_permissions(&on_host, std::os::unix::fs::PermissionsExt::from_mode(0o640)).expect("a mode");
    std::os::unix::fs::chown(&on_host, Some(12), Some(34)).expect("an owner");
    symlink("sub/key", sources.on(Host::A, "conf/way")).expect("a link");
    sources.write(Host::A, "single", "alone\n");
    let mounts = [sources.bind("conf", "/conf", "ro"), sources.bind("single", "/etc/single", "ro")];
    let container = start(lab, "v-copy", &mounts);
    assert_eq!(sh(&container, Host::A, "cat /conf/way /etc/single"), "one\nalone\n");
    let meta = fs::metadata(&on_host).expect("there");
    let told = sh(&container, Host::A, "stat -c '%a %u %g %Y' /conf/mode");
    assert_eq!(told.trim(), format!("640 12 34 {}", meta.mtime()));
    for script in ["echo x >/conf/sub/key", "rm /conf/mode", "echo x >/etc/single"] {
        let text = container.exec(Host::A, &exec_id(), &["sh", "-c", script]).fails();
        assert!(text.contains("Read-only"), "{script}: {text}");
    }

    let mut slowest = Duration::ZERO;
    for round in 0..5 {
        let content = format!("round {round}");
        let since = Instant::now();
        sources.write(Host::A, "conf/sub/key", &content);
        slowest = slowest.max(await_content(&container, Host::A, "/conf/way", &content, since));
        let since = Instant::now();
        sources.write(Host::A, "single.new", &content);
        fs::rename(sources.on(Host::A, "single.new"), sources.on(Host::A, "single")).expect("renamed");
        slowest = slowest.max(await_content(&container, Host::A, "/etc/single", &content, since));
    }
    println!("    a change showed after {} ms at most, an exec included", slowest.as_millis());
    assert!(slowest < FOLLOWED, "{slowest:?}");
    fs::remove_dir_all(sources.on(Host::A, "conf/sub")).expect("removed");
    let since = Instant::now();
    while sh(&container, Host::A, "ls /conf").contains("sub") {
        assert!(since.elapsed() < FOLLOWED, "a removal does not show");
    }
    // More than it takes: the last good content stays, and it goes on when there is less again.
    sources.write(Host::A, "conf/large", &"x".repeat(1024 * 1024 + 1));
    thread::sleep(Duration::from_secs(1));
    assert!(!sh(&container, Host::A, "ls /conf").contains("large"));
    fs::remove_file(sources.on(Host::A, "conf/large")).expect("removed");
    sources.write(Host::A, "conf/small", "small");
    await_content(&container, Host::A, "/conf/small", "small", Instant::now());
    container.remove(Host::A);
}

fn a_swap_is_never_torn(lab: &Lab) {
    let sources = Sources::new(lab, "swap");
    let root = sources.on(Host::A, "map");
    fs::create_dir(&root).expect("a directory");
    let files = |round: u32| ["a", "b", "c"].map(|file| (file, format!("round {round}\n")));
    swap(&root, 0, &files(0));
    let container = start(lab, "v-swap", &[sources.bind("map", "/map", "ro")]);
    // One directory for all three, as a program does that opens `..data` once; what went meanwhile does not count.
    let script = "n=0; last=; changes=0; while [ $n -lt 1500 ]; do n=$((n+1)); d=$(readlink /map/..data) || echo gone; \
                  a=; b=; c=; read -r a </map/$d/a; read -r b </map/$d/b; read -r c </map/$d/c; \
                  [ -n \"$a\" ] && [ -n \"$b\" ] && [ -n \"$c\" ] || continue; \
                  [ \"$a\" = \"$b\" ] && [ \"$b\" = \"$c\" ] || echo torn $a $b $c; \
                  [ \"$a\" = \"$last\" ] || { last=$a; changes=$((changes+1)); }; done 2>/dev/null; echo changes $changes";
    let said = thread::scope(|scope| {
        let reading = scope.spawn(|| sh(&container, Host::A, script));
        let mut round = 0;
        while !reading.is_finished() {
            round += 1;
            swap(&root, round, &files(round));
            thread::sleep(Duration::from_millis(100));
        }
        let last = format!("round {round}");
        await_content(&container, Host::A, "/map/b", &last, Instant::now());
        reading.join().expect("the reader ends")
    });
    println!("    {}", said.trim());
    let changes: u32 = said.trim().strip_prefix("changes ").and_then(|n| n.parse().ok()).unwrap_or_default();
    assert!(changes > 3, "{said}");
    assert!(!said.contains("torn") && !said.contains("gone"), "{said}");
    container.remove(Host::A);
}

fn the_other_hosts_files_after_a_move(lab: &Lab) {
    let sources = Sources::new(lab, "move");
    sources.write(Host::A, "conf/who", "a");
    sources.write(Host::A, "conf/of-a", "a");
    let container = start(lab, "v-move", &[sources.bind("conf", "/conf", "ro")]);
    let text = lab.migrate(Host::A, "v-move", "b").fails_naming(&["/conf", &sources.at("conf"), "create it"]);
    assert!(!text.contains("9P"), "{text}");
    crate::refusals::assert_unharmed(lab, &container, "after");
    // It goes on following where it is.
    sources.write(Host::A, "conf/who", "still a");
    await_content(&container, Host::A, "/conf/who", "still a", Instant::now());

    sources.write(Host::B, "conf/who", "b");
    lab.migrate(Host::A, "v-move", "b").ok();
    let since = Instant::now();
    container.assert_only_on(Host::B);
    let took = await_content(&container, Host::B, "/conf/who", "b", since);
    println!("    the other host's content showed {} ms after the move", took.as_millis());
    assert_eq!(sh(&container, Host::B, "ls /conf"), "who\n");
    let since = Instant::now();
    sources.write(Host::B, "conf/who", "b again");
    assert!(await_content(&container, Host::B, "/conf/who", "b again", since) < FOLLOWED);
    sources.write(Host::A, "conf/who", "nobody");
    thread::sleep(Duration::from_millis(700));
    assert_eq!(sh(&container, Host::B, "cat /conf/who"), "b again");

    lab.migrate(Host::B, "v-move", "a").ok();
    await_content(&container, Host::A, "/conf/who", "nobody", Instant::now());
    assert_eq!(sh(&container, Host::A, "cat /conf/of-a"), "a");
    container.await_lines(Host::A, 5, SOON);
    container.remove(Host::A);
}

fn files_of_a_pod(lab: &Lab) {
    let sources = Sources::new(lab, "pod-files");
    for host in Host::ALL {
        for name in ["hosts", "resolv.conf", "hostname"] {
            sources.write(host, name, &format!("{name} of {host}"));
        }
        sources.write(host, "log", "");
    }
    let mounts = [
        sources.bind("hosts", "/etc/hosts", "rw"),
        sources.bind("resolv.conf", "/etc/resolv.conf", "rw"),
        sources.bind("hostname", "/etc/hostname", "ro"),
        sources.bind("log", "/dev/termination-log", "rw"),
    ];
    // Ended by a signal: an exec that asks its own container to end may be killed with it.
    let script = "trap 'echo because >/dev/termination-log; exit 3' TERM; while :; do usleep 50000; done";
    run(lab, "v-pod", &mounts, &[], &["/bin/sh", "-c", script]).ok();
    let container = Container::adopt(lab, "v-pod");
    container.await_state(Host::A, "RUNNING", SOON);
    let all =
        |host| sh(&container, host, "cat /etc/hosts; echo; cat /etc/resolv.conf; echo; cat /etc/hostname");
    assert_eq!(all(Host::A), "hosts of a\nresolv.conf of a\nhostname of a");
    // Writable in the guest, and the host's own file is not touched by it.
    sh(&container, Host::A, "echo more >>/etc/hosts; echo early >/dev/termination-log");
    assert_eq!(fs::read_to_string(sources.on(Host::A, "hosts")).expect("there"), "hosts of a");
    lab.migrate(Host::A, "v-pod", "b").ok();
    let since = Instant::now();
    await_content(&container, Host::B, "/etc/hosts", "hosts of b", since);
    await_content(&container, Host::B, "/etc/hostname", "hostname of b", since);
    assert_eq!(all(Host::B), "hosts of b\nresolv.conf of b\nhostname of b");
    assert_eq!(sh(&container, Host::B, "cat /dev/termination-log"), "early\n", "it is the container's");
    lab.ctr(Host::B, &["task", "kill", "-s", "TERM", "v-pod"]).ok();
    container.await_state(Host::B, "STOPPED", SOON);
    assert_eq!(fs::read_to_string(sources.on(Host::B, "log")).expect("there"), "because\n");
    assert_eq!(fs::read_to_string(sources.on(Host::A, "log")).expect("there"), "");
    let removed = lab.ctr(Host::B, &["task", "rm", "v-pod"]);
    assert!(removed.stderr.contains("exit code 3"), "{removed:?}");
    lab.ctr(Host::B, &["containers", "rm", "v-pod"]).ok();

    // Without any: what the guest gives by itself.
    let container = start(lab, "v-plain", &[]);
    let hosts = sh(&container, Host::A, "cat /etc/hosts");
    let hostname = sh(&container, Host::A, "hostname");
    assert_eq!(sh(&container, Host::A, "cat /etc/hostname"), hostname);
    assert!(hosts.contains("127.0.0.1\tlocalhost") && hosts.contains(hostname.trim()), "{hosts}");
    container.remove(Host::A);
}

fn empty_directories_go_along(lab: &Lab) {
    let sources = Sources::new(lab, "empty");
    let volumes = "pods/u1/volumes/kubernetes.io~empty-dir";
    let (cache, memory) = (format!("{volumes}/cache"), format!("{volumes}/memory"));
    for host in Host::ALL {
        for name in [&cache, &memory] {
            fs::create_dir_all(sources.on(host, name)).expect("a directory");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            fs::set_permissions(sources.on(host, name), mode).expect("a mode");
        }
        let at = sources.at(&memory);
        lab.on(host, &["mount", "-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs", &at]).ok();
    }
    let mounts = [sources.bind(&cache, "/cache", "rw"), sources.bind(&memory, "/memory", "rw")];
    let pod = ["io.kubernetes.cri.container-type=sandbox", "io.kubernetes.cri.sandbox-id=v-empty"];
    let member = ["io.kubernetes.cri.container-type=container", "io.kubernetes.cri.sandbox-id=v-empty"];
    run(lab, "v-empty", &[], &pod, &["/bin/counter"]).ok();
    let sandbox = Container::adopt(lab, "v-empty");
    run(lab, "v-one", &mounts, &member, &["/bin/counter"]).ok();
    let one = Container::adopt(lab, "v-one");
    run(lab, "v-two", &mounts, &member, &["/bin/counter"]).ok();
    let two = Container::adopt(lab, "v-two");
    sh(&one, Host::A, "echo kept >/cache/file; echo light >/memory/file");
    assert_eq!(sh(&two, Host::A, "cat /cache/file /memory/file"), "kept\nlight\n", "it is the pod's");
    assert_eq!(sh(&two, Host::A, "stat -c %a /cache").trim(), "777");
    assert_eq!(sh(&two, Host::A, "stat -f -c %T /memory").trim(), "tmpfs");
    assert_eq!(fs::read_dir(sources.on(Host::A, &cache)).expect("there").count(), 0, "nothing on the host");

    lab.migrate(Host::A, "v-empty", "b").ok();
    one.assert_only_on(Host::B);
    assert_eq!(sh(&one, Host::B, "cat /cache/file /memory/file"), "kept\nlight\n");
    sh(&two, Host::B, "echo more >>/cache/file");
    // A container that comes later finds the same directory.
    two.remove(Host::B);
    let log = format!("file://{}", two.log_path(Host::B).display());
    let mut again = vec!["run", "-d", "--log-uri", &log];
    again.extend(Container::RUN);
    for mount in &mounts {
        again.extend(["--mount", mount]);
    }
    for annotation in &member {
        again.extend(["--annotation", annotation]);
    }
    again.extend([Container::IMAGE, "v-three", "/bin/counter"]);
    lab.ctr(Host::B, &again).ok();
    let three = Container::adopt(lab, "v-three");
    assert_eq!(sh(&three, Host::B, "cat /cache/file /memory/file"), "kept\nmore\nlight\n");
    for container in [&three, &one, &sandbox] {
        container.remove(Host::B);
    }
    for host in Host::ALL {
        lab.on(host, &["umount", &sources.at(&memory)]).ok();
    }
}

fn a_disk_image_goes_along_and_back(lab: &Lab) {
    let sources = Sources::new(lab, "disk");
    let image = sources.at("disk.img");
    let make = format!("truncate -s 64M {image} && mkfs.ext4 -q -F {image}");
    lab.on(Host::A, &["sh", "-c", &make]).ok();
    let mount = format!("type=ext4,src={image},dst=/data,options=rw");
    let container = start(lab, "v-disk", &[mount]);
    sh(
        &container,
        Host::A,
        "echo first >/data/file; dd if=/dev/urandom of=/data/blob bs=64k count=64 2>/dev/null; sync",
    );
    let sum = sh(&container, Host::A, "md5sum </data/blob");

    // What is there on the other host is not written over.
    sources.write(Host::B, "disk.img", "something of value");
    lab.migrate(Host::A, "v-disk", "b").fails_naming(&["/data", &image]);
    crate::refusals::assert_unharmed(lab, &container, "after");
    assert_eq!(fs::read_to_string(sources.on(Host::B, "disk.img")).expect("there"), "something of value");
    fs::remove_file(sources.on(Host::B, "disk.img")).expect("removed");

    lab.migrate(Host::A, "v-disk", "b").ok();
    container.assert_only_on(Host::B);
    sh(&container, Host::B, "echo second >>/data/file; sync");
    assert_eq!(sh(&container, Host::B, "md5sum </data/blob"), sum);
    // What the source has left is not the volume any more, which its name says.
    let on_a = sources.on(Host::A, "disk.img");
    assert!(!on_a.exists(), "the source's file still looks like the volume");
    let left_on_a = left(&sources, Host::A);
    assert_eq!(cat_image(&left_on_a, "/file"), "first\n");

    // In the way back is what somebody put there, and nothing happens to it or to what was left.
    sources.write(Host::A, "disk.img", "something else of value");
    lab.migrate(Host::B, "v-disk", "a").fails_naming(&["/data", &image, "exists"]);
    assert_eq!(fs::read_to_string(&on_a).expect("there"), "something else of value");
    assert_eq!(left(&sources, Host::A), left_on_a);
    fs::remove_file(&on_a).expect("removed");
    assert_eq!(sh(&container, Host::B, "cat /data/file"), "first\nsecond\n");

    lab.migrate(Host::B, "v-disk", "a").ok();
    container.assert_only_on(Host::A);
    assert_eq!(sh(&container, Host::A, "cat /data/file"), "first\nsecond\n");
    assert_eq!(sh(&container, Host::A, "md5sum </data/blob"), sum);
    let since = Instant::now();
    while left_on_a.exists() {
        assert!(since.elapsed() < SOON, "the old content stays beside the volume");
        thread::sleep(Duration::from_millis(50));
    }
    // There again. What host b has left was changed meanwhile, and is not removed.
    let left_on_b = left(&sources, Host::B);
    fs::File::options()
        .write(true)
        .open(&left_on_b)
        .and_then(|file| file.set_modified(std::time::SystemTime::now()))
        .expect("it is changed");
    lab.migrate(Host::A, "v-disk", "b").ok();
    sh(&container, Host::B, "echo third >>/data/file; sync");
    let left_on_a = left(&sources, Host::A);
    let before = fs::metadata(&left_on_a).expect("there").modified().ok();
    container.remove(Host::B);
    assert!(left_on_b.exists(), "a changed file was removed");
    let on_b = sources.on(Host::B, "disk.img");
    let meta = fs::metadata(&on_b).expect("the image is there");
    assert_eq!(meta.len(), 64 << 20);
    assert!(meta.blocks() * 512 < 32 << 20, "it is not sparse: {} KiB", meta.blocks() / 2);
    let after = fs::metadata(&left_on_a).expect("there").modified().ok();
    assert_eq!(after, before, "the source's image was written to after the move");
    // Closed and whole: no journal to be played, and its files are there.
    let checked = Run::new(command(&["e2fsck", "-fn", &on_b.display().to_string()]), SOON).ok();
    assert!(!checked.contains("recover"), "{checked}");
    assert_eq!(cat_image(&on_b, "/file"), "first\nsecond\nthird\n");
}

/// The one file that a volume `disk.img` has left on a host.
#[track_caller]
fn left(sources: &Sources<'_>, host: Host) -> PathBuf {
    let entries = fs::read_dir(sources.on(host, "")).expect("a directory").flatten();
    let found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.display().to_string().contains("/disk.img.dunlin-left-"))
        .collect();
    let [path] = &found[..] else { panic!("one file that was left on host {host}, not {found:?}") };
    path.clone()
}

fn cat_image(image: &Path, file: &str) -> String {
    let cat = format!("cat {file}");
    Run::new(command(&["debugfs", "-R", &cat, &image.display().to_string()]), SOON).ok()
}

fn command(words: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(words[0]);
    command.args(&words[1..]);
    command
}

fn what_is_too_large_or_writable_says_so(lab: &Lab) {
    let sources = Sources::new(lab, "limits");
    sources.write(Host::A, "large/file", &"x".repeat(1024 * 1024 + 1));
    sources.write(Host::A, "small/file", &"x".repeat(2048));
    let path = lab.programs.image_dir.join("image.json");
    let has_9p = fs::read_to_string(&path).is_ok_and(|text| text.contains("\"9pnet_fd.ko\""));
    let refused = |id: &str, mount: String, why: &[&str]| {
        let started = run(lab, id, &[mount], &[], &["/bin/counter"]);
        let container = Container::adopt(lab, id);
        if has_9p {
            // It is shared, and that is what keeps the pod here.
            started.ok();
            lab.migrate(Host::A, id, "b").fails_naming(why);
            container.remove(Host::A);
        } else {
            started.fails_naming(&[&["KERNEL=generic"], why].concat());
        }
    };
    let (large, small) = (sources.at("large"), sources.at("small"));
    refused("v-large", sources.bind("large", "/data", "ro"), &[&large, "/data", "1025 KiB", "1024 KiB"]);
    refused("v-writable", sources.bind("small", "/data", "rw"), &[&small, "/data", "it is writable"]);
    let config = lab.host_dir(Host::A).join("etc/config.toml");
    let original = fs::read_to_string(&config).expect("the shim's configuration");
    fs::write(&config, format!("{original}[volumes]\nmax_file_kib = 1\n")).expect("writable");
    let by_limit = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(
            "v-limit",
            sources.bind("small", "/data", "ro"),
            &[&small, "2 KiB", "up to 1 KiB", "max_file_kib"],
        );
    }));
    fs::write(&config, original).expect("writable");
    if let Err(panic) = by_limit {
        std::panic::resume_unwind(panic);
    }
    let missing = sources.bind("absent", "/data", "ro");
    run(lab, "v-missing", &[missing], &[], &["/bin/counter"]).fails_naming(&["/data", "absent", "create it"]);
    let _gone = Container::adopt(lab, "v-missing");
}
