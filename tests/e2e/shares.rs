//! Directories and files of the host in a container. They need a guest image whose kernel has a 9P client
//! (`make image-generic`); with another one, the mount is refused by name, and that is what is looked at. Only what is
//! writable or large is shared: the rest is copied, see `volumes`.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use dunlin_tests::{Container, Host, Lab, Run};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("shares::a_kernel_without_9p", a_kernel_without_9p),
    ("shares::a_directory_is_read_and_written", a_directory_is_read_and_written),
    ("shares::read_only_and_single_files", read_only_and_single_files),
    ("shares::a_container_with_one_stays", a_container_with_one_stays),
    ("shares::a_pod_moves_when_they_are_gone", a_pod_moves_when_they_are_gone),
];

const SOON: Duration = Duration::from_secs(20);

/// Whether the image of this run can. A run that cannot says so loudly.
fn has_9p(lab: &Lab, case: &str) -> bool {
    let path = lab.programs.image_dir.join("image.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let has = text.contains("\"9pnet_fd.ko\"");
    if !has && case != "a_kernel_without_9p" {
        println!("    SKIPPED: {case} needs the image of `make image-generic` (DUNLIN_IMAGE_DIR)");
    }
    has
}

/// A directory of the host with something in it.
fn directory(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.host_dir(Host::A).join("shared").join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(path.join("sub")).expect("a directory");
    fs::write(path.join("greeting"), "from the host\n").expect("writable");
    path
}

fn mount(source: &std::path::Path, destination: &str, option: &str) -> String {
    format!("type=bind,src={},dst={destination},options=rbind:{option}", source.display())
}

/// `ctr run` of the counter with mounts, its log as usual.
fn run(lab: &Lab, id: &str, mounts: &[String]) -> Run {
    run_in_pod(lab, id, mounts, &[])
}

fn run_in_pod(lab: &Lab, id: &str, mounts: &[String], annotations: &[&str]) -> Run {
    let log = lab.host_dir(Host::A).join("logs/containers/default").join(format!("{id}.log"));
    fs::create_dir_all(log.parent().expect("a directory")).expect("a directory for logs");
    let _ = fs::remove_file(&log);
    let uri = format!("file://{}", log.display());
    let mut arguments = vec!["run", "-d", "--log-uri", &uri];
    arguments.extend(Container::RUN);
    for mount in mounts {
        arguments.extend(["--mount", mount]);
    }
    for annotation in annotations {
        arguments.extend(["--annotation", annotation]);
    }
    arguments.extend([Container::IMAGE, id, "/bin/counter"]);
    lab.ctr(Host::A, &arguments)
}

fn a_kernel_without_9p(lab: &Lab) {
    if has_9p(lab, "a_kernel_without_9p") {
        println!("    SKIPPED: this image's kernel has 9P");
        return;
    }
    let dir = directory(lab, "none");
    let text = run(lab, "s-none", &[mount(&dir, "/data", "rw")]).fails_naming(&["/data", "KERNEL=generic"]);
    assert!(text.contains(&dir.display().to_string()), "{text}");
    let _gone = Container::adopt(lab, "s-none");
}

fn a_directory_is_read_and_written(lab: &Lab) {
    if !has_9p(lab, "a_directory_is_read_and_written") {
        return;
    }
    let dir = directory(lab, "rw");
    run(lab, "s-rw", &[mount(&dir, "/data", "rw")]).ok();
    let container = Container::adopt(lab, "s-rw");
    container.await_lines(Host::A, 10, SOON);
    let sh = |exec: &str, script: &str| container.exec(Host::A, exec, &["sh", "-c", script]);
    assert_eq!(sh("read", "cat /data/greeting").ok(), "from the host\n");

    // Both ways, at once: what the host changes is seen without anything being opened again.
    fs::write(dir.join("greeting"), "again\n").expect("writable");
    assert_eq!(sh("again", "cat /data/greeting").ok(), "again\n");
    let script = "echo guest >/data/sub/new && mkdir /data/made && busybox mv /data/sub/new /data/made/moved \
                  && busybox ln -s moved /data/made/link && cat /data/made/link && busybox chmod 640 /data/made/moved";
    assert_eq!(sh("write", script).ok(), "guest\n");
    let made = fs::metadata(dir.join("made/moved")).expect("the file is on the host");
    assert_eq!((made.len(), made.mode() & 0o777, made.uid()), (6, 0o640, 0));

    // More than one message, and more names than one answer holds.
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=4 2>/dev/null && md5sum </data/big";
    let sum = sh("big", script).ok();
    let on_host = lab.on(Host::A, &["sh", "-c", &format!("md5sum <{}/big", dir.display())]).ok();
    assert_eq!(sum.split(' ').next(), on_host.split(' ').next());
    for number in 0..1000 {
        fs::write(dir.join("sub").join(format!("a-file-with-a-name-{number}")), "").expect("writable");
    }
    assert_eq!(sh("many", "ls /data/sub | wc -l").ok().trim(), "1000");
    assert_eq!(sh("remove", "rm -r /data/sub /data/made /data/big && ls /data").ok(), "greeting\n");
    assert_eq!(fs::read_dir(&dir).expect("readable").count(), 1);

    // Out of the share leads nothing, also not by a link that the container makes.
    let secret = dir.parent().expect("a parent").join("secret");
    fs::write(&secret, "secret").expect("writable");
    let script = "busybox ln -s ../secret /data/out; cat /data/out; ls /data/.. | grep -c secret; true";
    assert!(!sh("out", script).stdout.contains("secret"), "a link led out of the share");

    container.remove(Host::A);
    assert!(lab.processes(Host::A).iter().all(|line| !line.contains("qemu")), "the machine is left");
}

fn read_only_and_single_files(lab: &Lab) {
    if !has_9p(lab, "read_only_and_single_files") {
        return;
    }
    let dir = directory(lab, "ro");
    fs::write(dir.join("other"), "other\n").expect("writable");
    // Too large to be copied.
    fs::write(dir.join("large"), vec![0; 2 << 20]).expect("writable");
    let single = directory(lab, "single");
    fs::write(single.join("hidden"), "hidden\n").expect("writable");
    let mounts = [
        mount(&dir, "/data", "ro"),
        mount(&single.join("greeting"), "/etc/greeting", "rw"),
        mount(&dir, "/two", "ro"),
    ];
    run(lab, "s-ro", &mounts).ok();
    let container = Container::adopt(lab, "s-ro");
    container.await_lines(Host::A, 10, SOON);
    let sh = |exec: &str, script: &str| container.exec(Host::A, exec, &["sh", "-c", script]);
    assert_eq!(sh("read", "cat /data/greeting /two/other").ok(), "from the host\nother\n");
    for (exec, script) in [
        ("write", "echo x >/data/greeting"),
        ("create", "echo x >/data/new"),
        ("remove", "rm /data/greeting"),
        ("mkdir", "mkdir /data/dir"),
        ("chmod", "busybox chmod 777 /data/greeting"),
    ] {
        let text = sh(exec, script).fails();
        assert!(text.contains("Read-only"), "{script}: {text}");
    }
    assert_eq!(fs::read_to_string(dir.join("greeting")).expect("readable"), "from the host\n");
    sh("single", "echo changed >/etc/greeting").ok();
    assert_eq!(fs::read_to_string(single.join("greeting")).expect("readable"), "changed\n");
    container.remove(Host::A);

    let missing = dir.join("missing");
    run(lab, "s-missing", &[mount(&missing, "/data", "ro")]).fails_naming(&["/data", "missing", "create it"]);
    let _gone = Container::adopt(lab, "s-missing");
}

fn a_container_with_one_stays(lab: &Lab) {
    if !has_9p(lab, "a_container_with_one_stays") {
        return;
    }
    let dir = directory(lab, "stays");
    run(lab, "s-stays", &[mount(&dir, "/data", "rw")]).ok();
    let container = Container::adopt(lab, "s-stays");
    container.await_lines(Host::A, 10, SOON);
    let text = lab.migrate(Host::A, "s-stays", "b").fails_naming(&[
        "s-stays",
        "/data",
        &dir.display().to_string(),
        "it is writable",
    ]);
    assert!(text.contains("directory of this host"), "{text}");
    crate::refusals::assert_unharmed(lab, &container, "after");
    // Nothing was frozen: the share works as before, and so does the rest.
    let script = "echo still >/data/after && cat /data/after";
    assert_eq!(container.exec(Host::A, "still", &["sh", "-c", script]).ok(), "still\n");
    container.remove(Host::A);
}

/// The machine runs on when a container with a share goes: its guest lets go of the directory, and the rest can leave.
fn a_pod_moves_when_they_are_gone(lab: &Lab) {
    if !has_9p(lab, "a_pod_moves_when_they_are_gone") {
        return;
    }
    let dir = directory(lab, "pod");
    let pod = ["io.kubernetes.cri.container-type=sandbox", "io.kubernetes.cri.sandbox-id=s-pod"];
    let member = ["io.kubernetes.cri.container-type=container", "io.kubernetes.cri.sandbox-id=s-pod"];
    run_in_pod(lab, "s-pod", &[], &pod).ok();
    let sandbox = Container::adopt(lab, "s-pod");
    // Twice: the second time the same directory is another share.
    for round in ["one", "two"] {
        run_in_pod(lab, "s-member", &[mount(&dir, "/data", "rw")], &member).ok();
        let workload = Container::adopt(lab, "s-member");
        workload.await_lines(Host::A, 5, SOON);
        let script = format!("cat /data/greeting && echo {round} >/data/greeting");
        let seen = workload.exec(Host::A, round, &["sh", "-c", &script]).ok();
        assert_eq!(seen, if round == "one" { "from the host\n" } else { "one\n" });
        lab.migrate(Host::A, "s-pod", "b").fails_naming(&["s-member", "/data"]);
        workload.await_lines(Host::A, 5, SOON);
        workload.remove(Host::A);
    }
    sandbox.await_lines(Host::A, 5, SOON);
    lab.migrate(Host::A, "s-pod", "b").ok();
    sandbox.assert_only_on(Host::B);
    sandbox.await_lines(Host::B, 5, SOON);
    sandbox.remove(Host::B);
}
