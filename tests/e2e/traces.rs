//! What a lab leaves on the machine: nothing, also after it was killed while coming up.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use dunlin_tests::{Lab, Programs, Run, Traces};

pub(crate) const KILLED_UP: &str = "traces::a_killed_up_is_cleared";
pub(crate) const NOT_ROOT: &str = "traces::root_is_asked_for";
pub(crate) const DOWN: &str = "traces::down_leaves_nothing";
pub(crate) const NAMES: &[&str] = &[KILLED_UP, NOT_ROOT, DOWN];

const SETTLE: Duration = Duration::from_secs(60);

fn lab(programs: &Programs, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = programs.dunlin();
    command.args(["lab", "--dir"]).arg(dir).args(arguments);
    command
}

/// Takes down what an earlier run may have left.
pub(crate) fn clear(programs: &Programs, dir: &Path) {
    Run::new(lab(programs, dir, &["down"]), Duration::from_secs(90)).ok();
    let _ = fs::remove_dir_all(dir);
}

pub(crate) fn a_killed_up_is_cleared(programs: &Programs, dir: &Path) {
    let before = Traces::now();
    let image = programs.image_dir.display().to_string();
    // Some of these die before the namespaces are made, some with both hosts running.
    for after in [20, 60, 120, 200, 300, 450] {
        let mut up = lab(programs, dir, &["up", "--image", &image]);
        let mut up = up.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("dunlin starts");
        thread::sleep(Duration::from_millis(after));
        up.kill().expect("it can be killed");
        up.wait().expect("it ends");
        Run::new(lab(programs, dir, &["down"]), Duration::from_secs(90)).ok();
        Traces::gone_since(&before, SETTLE)
            .unwrap_or_else(|left| panic!("`lab up` killed after {after} ms, then `lab down`, left {left}"));
    }
    // And once more on top of a wreck, without `down` between.
    let mut up = lab(programs, dir, &["up", "--image", &image]).spawn().expect("dunlin starts");
    thread::sleep(Duration::from_millis(150));
    up.kill().expect("it can be killed");
    up.wait().expect("it ends");
    Run::new(lab(programs, dir, &["up", "--image", &image]), Duration::from_secs(150)).ok();
    Run::new(lab(programs, dir, &["status"]), Duration::from_secs(30)).ok();
    Run::new(lab(programs, dir, &["down"]), Duration::from_secs(90)).ok();
    Traces::gone_since(&before, SETTLE).unwrap_or_else(|left| panic!("left {left}"));
}

pub(crate) fn root_is_asked_for(programs: &Programs) {
    // Somewhere that anyone may execute.
    let dir = Path::new("/var/tmp/dunlin-e2e-nobody");
    fs::create_dir_all(dir).expect("a directory");
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("its mode");
    let program = dir.join("dunlin");
    fs::copy(programs.bin_dir.join("dunlin"), &program).expect("a copy");
    for arguments in [["lab", "up"], ["lab", "down"]] {
        let mut command = Command::new(&program);
        command.args(arguments).uid(65534).gid(65534);
        Run::new(command, Duration::from_secs(20)).fails_naming(&["root"]);
    }
    fs::remove_dir_all(dir).expect("removed");
}

pub(crate) fn down_leaves_nothing(lab: &Lab, before: &Traces) {
    // With a container running, whose QEMU, disks and mounts must go too.
    let running = ["run", "-d", "--runtime", "io.containerd.dunlin.v2", "--null-io"];
    let image = "docker.io/dunlin/demo:latest";
    lab.ctr(dunlin_tests::Host::A, &[&running[..], &[image, "left", "/bin/counter"]].concat()).ok();
    lab.down();
    Traces::gone_since(before, SETTLE).unwrap_or_else(|left| panic!("`lab down` left {left}"));
    lab.down();
}
