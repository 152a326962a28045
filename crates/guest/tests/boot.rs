//! Boots the real image in QEMU and drives it over the real link and bridge.
//!
//! Needs an image (`image/build.sh`) in `$DUNLIN_IMAGE` or `target/image`, QEMU, mkfs.erofs,
//! mkfs.ext4 and busybox-static; run with `cargo test -p dunlin-guest --test boot -- --ignored --nocapture`.

#[path = "boot/network.rs"]
mod network;
#[path = "boot/pods.rs"]
mod pods;
#[path = "boot/streams.rs"]
mod streams;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dunlin_bridge::BRIDGE_PORT;
use dunlin_bridge::host::{Bridge, BridgeError};
use dunlin_bridge::hresult::HResult;
use dunlin_bridge::message::{
    CombinedLayers, ContainerConfig, ContainerConstraints, GuestPid, Layer, MappedDirectory,
    MappedVirtualDisk, Modification, NotificationType, ProcessParameters, PropertyType, Resource,
    SchemaVersion, ScsiDevice, UTILITY_VM, VsockStdioRelaySettings,
};
use dunlin_bridge::stdio::{self, Resume};
use dunlin_link::LinkStream;
use dunlin_link::host::{Endpoint, HostLink, PortListener};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

struct Machine {
    qemu: Child,
    dir: tempfile::TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let console = std::fs::read_to_string(self.dir.path().join("console.log")).unwrap_or_default();
        println!("--- console ---\n{console}---------------");
    }
}

fn run(command: &mut Command) {
    let status =
        command.stdout(Stdio::null()).status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

fn disks(dir: &Path) {
    let root = dir.join("root");
    for sub in ["bin", "etc", "proc", "sys", "dev", "tmp", "mem"] {
        std::fs::create_dir_all(root.join(sub)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let applets = [
        "sh", "echo", "sleep", "cat", "id", "stty", "dd", "true", "ls", "kill", "wc", "[", "readlink", "ip",
        "httpd",
    ];
    for applet in applets {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n").unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nlogs:x:50:web\n").unwrap();
    run(Command::new("mkfs.erofs")
        .args(["-T0", "-U00000000-0000-0000-0000-000000000001"])
        .arg(dir.join("base.erofs"))
        .arg(&root));
    let layer = dir.join("layer");
    std::fs::create_dir(&layer).unwrap();
    std::fs::write(layer.join("layer.txt"), "shared layer\n").unwrap();
    run(Command::new("mkfs.erofs").arg("-T0").arg(dir.join("layer.erofs")).arg(&layer));
    for (name, _) in SCRATCH {
        let path = dir.join(name);
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path));
    }
}

/// Scratch disks: file, controller and LUN.
const SCRATCH: [(&str, (u8, u8)); 6] = [
    ("scratch.raw", (1, 5)),
    ("s0.raw", (2, 0)),
    ("s1.raw", (2, 1)),
    ("s2.raw", (2, 2)),
    ("s3.raw", (2, 3)),
    ("s4.raw", (2, 4)),
];

fn boot() -> Machine {
    let image = std::env::var_os("DUNLIN_IMAGE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/image"), PathBuf::from);
    let dir = tempfile::tempdir().unwrap();
    disks(dir.path());
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "pc-q35-7.2", "-accel", "tcg", "-cpu", "Nehalem-v1", "-m", "256", "-smp", "2"]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    qemu.arg("-serial").arg(format!("file:{}", at("console.log")));
    qemu.arg("-kernel").arg(image.join("vmlinuz")).arg("-initrd").arg(image.join("initramfs.cpio.lz4"));
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
    for n in 0..4 {
        qemu.arg("-device").arg(format!("virtio-scsi-pci,id=scsi{n},addr={:#x}", 0x10 + n));
    }
    qemu.args(["-device", "virtio-serial-pci,id=serial,addr=0x14"]);
    qemu.arg("-chardev").arg(format!("socket,id=link,path={},server=on,wait=off", at("link.sock")));
    qemu.args([
        "-device",
        "virtserialport,nr=1,chardev=link,name=dunlin.link.0",
        "-device",
        "virtio-rng-pci,addr=0x15",
    ]);
    let layers = [("base.erofs", (0, 0)), ("layer.erofs", (0, 1))];
    let disks = layers.map(|disk| (disk, "on")).into_iter().chain(SCRATCH.map(|disk| (disk, "off")));
    for ((file, (bus, lun)), read_only) in disks {
        let id = format!("d{bus}-{lun}");
        qemu.arg("-drive").arg(format!("if=none,id={id},file={},format=raw,readonly={read_only}", at(file)));
        qemu.arg("-device").arg(format!("scsi-hd,bus=scsi{bus}.0,drive={id},channel=0,scsi-id=0,lun={lun}"));
    }
    Machine { qemu: qemu.stdin(Stdio::null()).spawn().unwrap(), dir }
}

struct Host {
    link: HostLink,
    bridge: Bridge,
    next_port: u32,
    /// Where the connections of each stream go, whichever link they come on.
    streams: Vec<(u32, mpsc::Sender<LinkStream>)>,
}

fn forward(mut listener: PortListener, to: mpsc::Sender<LinkStream>) {
    tokio::spawn(async move {
        while let Some(stream) = listener.accept().await {
            if to.send(stream).await.is_err() {
                return;
            }
        }
    });
}

/// Prints the guest's log for as long as this link lives.
fn print_logs(link: &HostLink) {
    let mut logs = link.listen(dunlin_bridge::LOG_PORT).unwrap();
    tokio::spawn(async move {
        while let Some(stream) = logs.accept().await {
            let mut lines = BufReader::new(stream).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                println!("log: {line}");
                let record: Value = serde_json::from_str(&line).expect("a log line is no JSON");
                if let Some(uptime) = record["uptime_seconds"].as_str() {
                    println!("the kernel had been up for {uptime} s when /init's second stage was ready");
                }
            }
        }
    });
}

type Lines = tokio::io::Lines<BufReader<DuplexStream>>;

impl Host {
    fn port(&mut self) -> (u32, mpsc::Receiver<LinkStream>) {
        self.next_port += 1;
        let (to, from) = mpsc::channel(1);
        forward(self.link.listen(self.next_port).unwrap(), to.clone());
        self.streams.push((self.next_port, to));
        (self.next_port, from)
    }

    /// Tears the link down in the middle of everything, and comes back.
    async fn lose_the_link(&mut self, socket: &Path, away: Duration) {
        self.link.clone().close().await;
        tokio::time::sleep(away).await;
        self.link = HostLink::connect(Endpoint::VirtioSerial { socket: socket.to_owned() }).await.unwrap();
        print_logs(&self.link);
        let mut bridges = self.link.listen(BRIDGE_PORT).unwrap();
        for (port, to) in &self.streams {
            forward(self.link.listen(*port).unwrap(), to.clone());
        }
        self.link.start();
        let stream = timeout(LIMIT, bridges.accept()).await.expect("the guest does not dial again").unwrap();
        self.bridge.attach(stream).await.unwrap();
    }

    async fn modify(&self, modification: Modification) {
        self.bridge.modify(UTILITY_VM, &modification).await.unwrap();
    }

    /// Unmounts a disk and removes it.
    async fn take_away(&self, controller: u8, lun: u8) {
        self.modify(Modification::remove(disk(controller, lun))).await;
        self.modify(Modification::remove(Resource::ScsiDevice(ScsiDevice { controller, lun }))).await;
    }

    fn output(&mut self) -> (u32, DuplexStream) {
        let (port, connections) = self.port();
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move {
            if let Ok(ended) = stdio::receive(connections, theirs, &Resume::at(0)).await {
                ended.linger().await;
            }
        });
        (port, ours)
    }

    async fn start(&mut self, container: &str) -> (GuestPid, Lines) {
        let (port, output) = self.output();
        let parameters = ProcessParameters { create_std_out_pipe: true, ..Default::default() };
        let stdio = VsockStdioRelaySettings { std_out: Some(port), resumable: true, ..Default::default() };
        let pid = self.bridge.execute(container, &parameters, Some(stdio)).await.unwrap();
        (pid, BufReader::new(output).lines())
    }

    async fn exec(
        &mut self,
        container: &str,
        process: Value,
        input: Option<&'static [u8]>,
    ) -> Result<(GuestPid, DuplexStream), BridgeError> {
        let (port, output) = self.output();
        let std_in = input.map(|bytes| {
            let (port, connections) = self.port();
            tokio::spawn(async move {
                stdio::send(&stdio::Sender::default(), bytes, connections, std::future::pending()).await
            });
            port
        });
        let parameters = ProcessParameters {
            oci_process: Some(process),
            create_std_in_pipe: std_in.is_some(),
            create_std_out_pipe: true,
            console_size: Some([40, 120]),
            ..Default::default()
        };
        let stdio =
            VsockStdioRelaySettings { std_in, std_out: Some(port), resumable: true, ..Default::default() };
        let pid = self.bridge.execute(container, &parameters, Some(stdio)).await?;
        Ok((pid, output))
    }

    async fn exec_to_end(
        &mut self,
        container: &str,
        process: Value,
        input: Option<&'static [u8]>,
    ) -> (u32, String) {
        let (pid, mut output) = self.exec(container, process, input).await.unwrap();
        let code = timeout(LIMIT, self.bridge.wait(container, pid, None)).await.unwrap().unwrap().code;
        let mut text = String::new();
        timeout(LIMIT, output.read_to_string(&mut text)).await.unwrap().unwrap();
        (code, text)
    }
}

fn sh(script: &str) -> Value {
    json!({"args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}})
}

fn config(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        schema_version: SchemaVersion::V21,
        oci_bundle_path: format!("/run/gcs/pods/{name}/{name}"),
        oci_specification: json!({
            "ociVersion": "1.0.2", "process": sh(script), "root": {"path": "rootfs"}, "hostname": name,
            "hooks": {"prestart": [{"path": "/of/the/host"}]},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": "/run/netns/host"},
                    {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore"], "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
                {"destination": "/mem", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/data", "type": "bind", "source": "/var/lib/host-only", "options": ["rbind"]},
            ],
        }),
        scratch_dir_path: scratch(name),
    }
}

fn scratch(name: &str) -> String {
    format!("/run/mounts/scsi/1_5_0/scratch/{name}/{name}")
}

fn layers(name: &str) -> Resource {
    Resource::CombinedLayers(CombinedLayers {
        container_id: name.to_owned(),
        container_root_path: format!("/run/gcs/pods/{name}/{name}/rootfs"),
        layers: vec![Layer { path: "/run/mounts/scsi/0_0_0".to_owned(), ..Default::default() }],
        scratch_path: scratch(name),
    })
}

fn disk(controller: u8, lun: u8) -> Resource {
    Resource::MappedVirtualDisk(MappedVirtualDisk {
        mount_path: format!("/run/mounts/scsi/{controller}_{lun}_0"),
        controller,
        lun,
        read_only: controller == 0,
        ..Default::default()
    })
}

/// The next tick, if one comes in time.
async fn tick(lines: &mut Lines, within: Duration) -> Option<u64> {
    let line = timeout(within, lines.next_line()).await.ok()?.unwrap()?;
    Some(line.strip_prefix("tick ").unwrap_or_else(|| panic!("{line:?}")).parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the guest image, QEMU and about a minute"]
async fn the_image_runs_containers() {
    let begin = Instant::now();
    let machine = boot();
    let socket = machine.dir.path().join("link.sock");
    let link = HostLink::connect(Endpoint::VirtioSerial { socket: socket.clone() }).await.unwrap();
    let mut bridges = link.listen(BRIDGE_PORT).unwrap();
    print_logs(&link);
    link.start();
    let stream = timeout(LIMIT, bridges.accept()).await.expect("the guest does not dial the bridge").unwrap();
    let bridge = Bridge::new(1);
    let mut ends = bridge.notifications();
    assert!(bridge.attach(stream).await.unwrap().speaks_dunlin());
    println!("bridge negotiated after {:?}", begin.elapsed());
    let mut host = Host { link, bridge: bridge.clone(), next_port: 0x4000_0000, streams: Vec::new() };

    for wrong in [disk(4, 0), Resource::MappedDirectory(MappedDirectory::default())] {
        let error = bridge.modify(UTILITY_VM, &Modification::add(wrong)).await.unwrap_err();
        assert_eq!(error.hresult(), Some(HResult::FAIL), "{error}");
        println!("refused: {error}");
    }
    for resource in [disk(0, 0), disk(1, 5), layers("one")] {
        bridge.modify(UTILITY_VM, &Modification::add(resource)).await.unwrap();
    }
    let counter = "i=0; while true; do echo tick $i; i=$((i+1)); sleep 0.1; done";
    bridge.create("one", &config("one", counter)).await.unwrap();
    let again = bridge.create("one", &config("one", counter)).await.unwrap_err();
    assert_eq!(again.hresult(), Some(HResult::SYSTEM_ALREADY_EXISTS));
    bridge.start("one").await.unwrap();
    let (pid, mut ticks) = host.start("one").await;
    let first = timeout(LIMIT, ticks.next_line()).await.unwrap().unwrap();
    println!("first container output after {:?}", begin.elapsed());
    assert_eq!(first.as_deref(), Some("tick 0"));

    println!("== exec, stdin, users, errors");
    assert_eq!(host.exec_to_end("one", sh("echo out; exit 3"), None).await, (3, "out\n".to_owned()));
    assert_eq!(
        host.exec_to_end("one", sh("cat; echo end"), Some(b"typed\n")).await,
        (0, "typed\nend\n".to_owned())
    );
    let mut as_web = sh("id");
    as_web["user"] = json!({"username": "web"});
    let (_, text) = host.exec_to_end("one", as_web, None).await;
    assert_eq!(text, "uid=33(web) gid=34 groups=50(logs)\n");
    let (_, text) = host.exec_to_end("one", sh("cat /etc/hostname /proc/sys/kernel/hostname; ls /sys/class 2>/dev/null; [ -c /dev/null ] && cat /proc/1/oom_score_adj"), None).await;
    assert_eq!(text, "one\none\n0\n");
    let missing =
        json!({"args": ["/no/such/program"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    match host.exec("one", missing, None).await {
        Err(error) => println!("exec of nothing: {error}"),
        Ok((pid, _)) => panic!("started a program that does not exist as {pid}"),
    }

    println!("== a grandchild keeps the pipe open");
    let started = Instant::now();
    assert_eq!(
        host.exec_to_end("one", sh("sleep 50 & echo mine; exit 5"), None).await,
        (5, "mine\n".to_owned())
    );
    assert!(started.elapsed() < Duration::from_secs(40));

    println!("== terminal");
    let mut tty = sh("stty size; exit 4");
    tty["terminal"] = true.into();

    assert_eq!(host.exec_to_end("one", tty, None).await, (4, "40 120\r\n".to_owned()));

    println!("== signals");
    let (sleeper, _output) = host.exec("one", sh("exec sleep 100"), None).await.unwrap();
    let early = bridge.wait("one", sleeper, Some(Duration::from_millis(50))).await.unwrap_err();
    assert_eq!(early.hresult(), Some(HResult::TIMEOUT));
    bridge.signal("one", sleeper, Some(15)).await.unwrap();
    assert_eq!(bridge.wait("one", sleeper, None).await.unwrap().code, 143);
    assert_eq!(bridge.wait("one", sleeper, None).await.unwrap().code, 143, "an exit code is kept");
    assert_eq!(
        bridge.signal("one", sleeper, Some(15)).await.unwrap_err().hresult(),
        Some(HResult::NOT_FOUND)
    );
    assert_eq!(bridge.wait("two", pid, None).await.unwrap_err().hresult(), Some(HResult::SYSTEM_NOT_FOUND));

    println!("== pause and resume");
    bridge.pause("one").await.unwrap();
    // What was printed before is still on its way.
    while tick(&mut ticks, Duration::from_secs(3)).await.is_some() {}
    assert_eq!(tick(&mut ticks, Duration::from_millis(700)).await, None, "a paused container counts");
    bridge.resume("one").await.unwrap();
    let resumed = tick(&mut ticks, LIMIT).await.expect("a resumed container does not count");
    assert_eq!(tick(&mut ticks, LIMIT).await, Some(resumed + 1));

    println!("== properties and limits");
    let properties =
        bridge.properties("one", &[PropertyType::ProcessList, PropertyType::Statistics]).await.unwrap();
    let listed = properties["ProcessList"].as_array().unwrap();
    assert!(listed.iter().any(|process| process["ProcessId"] == pid.0), "{properties}");
    assert!(properties["LCOWMetrics"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
    assert!(properties["LCOWMetrics"]["cpu"]["usage"]["total"].as_u64().unwrap() > 0);
    let limit = json!({"memory": {"limit": 24 << 20}});
    let limit = Modification::add(Resource::ContainerConstraints(ContainerConstraints { linux: limit }));
    bridge.modify("one", &limit).await.unwrap();
    // Memory of the program's own, which is free again when it is killed: pages of a tmpfs would stay charged,
    // and the next fault of the init would have it killed too.
    let mut hungry = sh("exec dd if=/dev/zero of=/dev/null bs=64M count=1");
    hungry["oomScoreAdj"] = 1000.into();
    assert_eq!(host.exec_to_end("one", hungry, None).await.0, 137, "the memory limit does not bite");
    let properties = bridge.properties("one", &[PropertyType::Statistics]).await.unwrap();
    assert_eq!(properties["LCOWMetrics"]["memory"]["usage"]["limit"], 24 << 20);
    assert!(properties["LCOWMetrics"]["memory_oom_control"]["oom_kill"].as_u64().unwrap() >= 1);
    assert!(bridge.dump_stacks().await.unwrap().contains("reaper"));

    println!("== the link is lost and comes back");
    let pending = bridge.begin_wait("one", pid, None).unwrap();
    let mut before = tick(&mut ticks, LIMIT).await.unwrap();
    let (quick, mut output) = host.exec("one", sh("sleep 1; echo while away; exit 6"), None).await.unwrap();
    host.lose_the_link(&socket, Duration::from_millis(500)).await;
    for _ in 0..30 {
        let line = timeout(LIMIT, ticks.next_line()).await.unwrap().unwrap().unwrap();
        before += 1;
        assert_eq!(line, format!("tick {before}"), "a tick was lost or came twice");
    }
    assert_eq!(timeout(LIMIT, bridge.wait("one", quick, None)).await.unwrap().unwrap().code, 6);
    let mut text = String::new();
    timeout(LIMIT, output.read_to_string(&mut text)).await.unwrap().unwrap();
    assert_eq!(text, "while away\n");

    println!("== end of the init ends the container");
    let (lonely, _output) = host.exec("one", sh("exec sleep 100"), None).await.unwrap();
    bridge.signal("one", pid, Some(9)).await.unwrap();
    assert_eq!(timeout(LIMIT, pending.exit()).await.unwrap().unwrap().code, 137);
    assert_eq!(timeout(LIMIT, bridge.wait("one", lonely, None)).await.unwrap().unwrap().code, 137);
    let end = timeout(LIMIT, ends.recv()).await.unwrap().unwrap();
    assert_eq!((end.base.container_id.as_str(), end.kind), ("one", NotificationType::UnexpectedExit));
    assert_eq!(bridge.wait("one", pid, None).await.unwrap().code, 137, "an init's exit code is kept");

    println!("== teardown, and a second container on the same disks");
    let tear_down = async |name: &'static str| {
        bridge.modify(UTILITY_VM, &Modification::remove(layers(name))).await.unwrap();
        bridge.delete_state(name).await.unwrap();
        assert_eq!(bridge.delete_state(name).await.unwrap_err().hresult(), Some(HResult::SYSTEM_NOT_FOUND));
    };
    tear_down("one").await;
    bridge.modify(UTILITY_VM, &Modification::add(layers("two"))).await.unwrap();
    bridge.create("two", &config("two", "echo short; exit 7")).await.unwrap();
    let (pid, mut lines) = host.start("two").await;
    assert_eq!(timeout(LIMIT, bridge.wait("two", pid, None)).await.unwrap().unwrap().code, 7);
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("short"));
    tear_down("two").await;

    println!("== last words after a graceful shutdown");
    bridge.modify(UTILITY_VM, &Modification::add(layers("three"))).await.unwrap();
    let polite = "trap 'echo bye; exit 9' TERM; echo hello; while true; do sleep 0.1; done";
    bridge.create("three", &config("three", polite)).await.unwrap();
    let (pid, mut lines) = host.start("three").await;
    assert_eq!(timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().as_deref(), Some("hello"));
    bridge.shutdown_graceful("three").await.unwrap();
    assert_eq!(timeout(LIMIT, bridge.wait("three", pid, None)).await.unwrap().unwrap().code, 9);
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("bye"));
    let kinds = [ends.recv().await.unwrap().kind, ends.recv().await.unwrap().kind];
    assert_eq!(kinds, [NotificationType::UnexpectedExit, NotificationType::GracefulExit]);
    tear_down("three").await;

    pods::run(&mut host).await;
    while ends.try_recv().is_ok() {}
    streams::run(&mut host, &mut ends, &socket).await;
    for (controller, lun) in [(1, 5), (0, 0)] {
        host.take_away(controller, lun).await;
    }
    println!("all after {:?}", begin.elapsed());
}
