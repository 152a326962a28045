//! The machine's disks, made with the shim's own programs and options.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::BenchError;
use crate::lab::output_of;

/// The counter of the lab's demo image: one line to its output and one to its disk about every 10 ms.
const COUNTER: &str = r#"#!/bin/sh
mkfifo /tmp/tick.$$ || exit 125
exec 9<>/tmp/tick.$$ 8>>/counter.log
rm /tmp/tick.$$
echo "pid $$"
echo "pid $$" >&8
n=0
while :; do
    n=$((n + 1))
    read -r up idle </proc/uptime
    echo "$n $up" >&8
    echo "$n $up"
    read -r -t 0.01 -u 9 nothing
done
"#;

const BUSYBOX: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];

/// An EROFS image of busybox and the counter; `tree` is where it is put together.
pub(super) async fn layer(image: &Path, tree: &Path) -> Result<(), BenchError> {
    let busybox = BUSYBOX.iter().map(Path::new).find(|path| path.is_file());
    let busybox = busybox.ok_or_else(|| BenchError::Missing {
        path: BUSYBOX[0].into(),
        remedy: "apt-get install busybox-static",
    })?;
    lay_out(tree, busybox).map_err(BenchError::io(format!("write {}", tree.display())))?;
    let mut mkfs = tokio::process::Command::new("mkfs.erofs");
    mkfs.args(["-T0", "-U00000000-0000-0000-0000-000000000000"]).arg(image).arg(tree);
    output_of(mkfs).await.map(drop)
}

fn lay_out(tree: &Path, busybox: &Path) -> std::io::Result<()> {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "run", "root"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    let bin = tree.join("bin");
    fs::copy(busybox, bin.join("busybox"))?;
    for applet in ["sh", "mkfifo", "rm", "cat", "sleep", "dd"] {
        symlink("busybox", bin.join(applet))?;
    }
    let counter = bin.join("counter");
    fs::write(&counter, COUNTER)?;
    fs::set_permissions(&counter, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\n")
}

/// An empty sparse file: what a mirror is received into.
pub(super) fn blank(path: &Path, mib: u64) -> Result<(), BenchError> {
    let made = fs::File::create(path).and_then(|file| file.set_len(mib << 20));
    made.map_err(BenchError::io(format!("create {}", path.display())))
}

/// An empty ext4 in a sparse file.
pub(super) async fn scratch(path: &Path, mib: u64) -> Result<(), BenchError> {
    blank(path, mib)?;
    let mut mkfs = tokio::process::Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal"]);
    mkfs.args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]).arg(path);
    output_of(mkfs).await.map(drop)
}
