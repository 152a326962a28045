//! One QEMU with its link and bridge, started as the shim starts its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dunlin_bridge::host::Bridge;
use dunlin_bridge::message::{
    CombinedLayers, ContainerConfig, GuestPid, Layer, MappedVirtualDisk, Modification, ProcessParameters,
    Resource, SchemaVersion, UTILITY_VM, VsockStdioRelaySettings,
};
use dunlin_bridge::stdio::{self, Connect, Resume};
use dunlin_bridge::{BRIDGE_PORT, FIRST_STDIO_PORT, LOG_PORT};
use dunlin_link::LinkStream;
use dunlin_link::host::{Endpoint, HostLink, PortListener};
use dunlin_qemu::accel::{self, Choice};
use dunlin_qemu::{DiskSource, Document, HostPaths, LaunchOptions, Mode, Qemu, Slot};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::station::{self, Station};
use super::{Ground, disks};
use crate::BenchError;
use crate::counter::Lines;
use crate::lab::Host;

const QEMU: &str = "qemu-system-x86_64";
const KERNEL_COMMAND_LINE: &str = "console=ttyS0,115200 quiet panic=-1";
const CONTAINER: &str = "counter";
const COUNTER_PORT: u32 = FIRST_STDIO_PORT;
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(2);
/// Where the layer and the scratch disk sit: the shim gives out slots in this order.
const LAYER: u8 = 0;
const SCRATCH: u8 = 1;

/// A running or receiving machine. QEMU dies with it.
#[derive(Debug)]
pub struct Machine {
    pub(super) qemu: Qemu,
    pub(super) dir: PathBuf,
    document: Document,
    link: HostLink,
    bridge: Bridge,
    tasks: Vec<JoinHandle<()>>,
    next_port: u32,
    station: Option<Station>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct Accept(PortListener);

impl Connect for Accept {
    type Stream = LinkStream;

    async fn connect(&mut self) -> Option<LinkStream> {
        self.0.accept().await
    }
}

pub(super) fn slot(lun: u8) -> Result<Slot, BenchError> {
    Ok(Slot::new(0, lun)?)
}

/// The writable disk's slot.
pub(super) fn scratch_slot() -> Result<Slot, BenchError> {
    slot(SCRATCH)
}

impl Machine {
    /// Boots a machine with a counter in it, whose lines go to `lines`. Gives also the time from QEMU's
    /// start to the counter's.
    ///
    /// # Errors
    /// QEMU, the link or the guest.
    pub async fn boot(ground: &Ground, name: &str, lines: &Lines) -> Result<(Machine, Duration), BenchError> {
        let begin = Instant::now();
        let mut machine = Machine::start(ground, name, None).await?;
        machine.start_counter(lines).await?;
        Ok((machine, begin.elapsed()))
    }

    /// Boots a machine with [`ADDRESS`](super::ADDRESS) on the pods' segment of `host`, in which a shell runs `server`.
    ///
    /// # Errors
    /// The lab's network, QEMU, the link or the guest.
    pub async fn serve(ground: &Ground, name: &str, host: Host, server: &str) -> Result<Machine, BenchError> {
        let mut machine = Machine::start(ground, name, Some(host)).await?;
        machine.mount_layer().await?;
        let busybox = format!("{}/bin/busybox", mount_point(LAYER));
        let script = station::script(&busybox, server);
        machine.execute(vec![busybox, "sh".to_owned(), "-c".to_owned(), script]).await?;
        Ok(machine)
    }

    async fn start(ground: &Ground, name: &str, host: Option<Host>) -> Result<Machine, BenchError> {
        let document = Document {
            kernel_command_line: KERNEL_COMMAND_LINE.to_owned(),
            ..Document::new(uuid::Uuid::new_v4(), ground.shape.vcpus, ground.shape.memory_mib)
        };
        let mut machine = Machine::launch(ground, name, document, Mode::Boot, 1).await?;
        if let Some(host) = host {
            machine.plug(host).await?;
        }
        let scratch = machine.dir.join("scratch.raw");
        machine.qemu.cont().await?;
        machine.link.start();
        let (made, negotiated) =
            tokio::join!(disks::scratch(&scratch, ground.shape.scratch_mib), machine.negotiated());
        made?;
        negotiated?;
        machine.attach(ground, &scratch).await?;
        Ok(machine)
    }

    /// Puts it on the pods' segment of `host`: what is to receive a machine that is on it needs that too.
    ///
    /// # Errors
    /// The lab's network or QEMU.
    pub async fn plug(&mut self, host: Host) -> Result<(), BenchError> {
        self.station = Some(Station::plug(self, host).await?);
        Ok(())
    }

    /// Makes a machine that can receive `source`: disks attached, blank scratch disk, link connected
    /// and silent.
    ///
    /// # Errors
    /// QEMU or the link.
    pub async fn incoming(ground: &Ground, name: &str, source: &Machine) -> Result<Machine, BenchError> {
        let first_id = source.bridge.next_id() + 1000;
        let mut machine =
            Machine::launch(ground, name, source.document.clone(), Mode::Incoming, first_id).await?;
        machine.next_port = source.next_port;
        let scratch = machine.dir.join("scratch.raw");
        disks::blank(&scratch, ground.shape.scratch_mib)?;
        machine.attach(ground, &scratch).await?;
        Ok(machine)
    }

    async fn launch(
        ground: &Ground,
        name: &str,
        document: Document,
        mode: Mode,
        first_id: u64,
    ) -> Result<Machine, BenchError> {
        let dir = ground.dir.join(name);
        let fresh = if dir.exists() { fs::remove_dir_all(&dir) } else { Ok(()) };
        fresh
            .and_then(|()| fs::create_dir_all(&dir))
            .map_err(BenchError::io(format!("make {} anew", dir.display())))?;
        let chosen = accel::choose(Choice::Auto, Path::new(QEMU)).await?;
        let mut paths = HostPaths::in_directory(&dir);
        paths.kernel = Some(ground.programs.kernel());
        paths.initramfs = Some(ground.programs.initramfs());
        let options = LaunchOptions::new(QEMU, chosen.accelerator, paths);
        let qemu = Qemu::spawn(&options, &document, mode).await?;
        let link = HostLink::connect(Endpoint::VirtioSerial { socket: dir.join("link.sock") }).await?;
        let bridge = Bridge::new(first_id);
        let tasks = vec![
            tokio::spawn(accept_bridge(link.listen(BRIDGE_PORT)?, bridge.clone())),
            tokio::spawn(discard_log(link.listen(LOG_PORT)?)),
        ];
        Ok(Machine { qemu, dir, document, link, bridge, tasks, next_port: COUNTER_PORT + 1, station: None })
    }

    async fn attach(&self, ground: &Ground, scratch: &Path) -> Result<(), BenchError> {
        self.qemu.attach_disk(slot(LAYER)?, &DiskSource::read_only(ground.layer())).await?;
        self.qemu.attach_disk(slot(SCRATCH)?, &DiskSource::writable(scratch)).await?;
        Ok(())
    }

    async fn negotiated(&self) -> Result<(), BenchError> {
        let mut connected = self.bridge.connected();
        let wait = timeout(BOOT_DEADLINE, connected.wait_for(|connected| *connected)).await;
        wait.map(drop).map_err(|_| BenchError::Deadline {
            what: format!("the guest's first word (console: {})", self.dir.join("console.log").display()),
            within: BOOT_DEADLINE,
        })
    }

    /// A disk where the guest mounts its like.
    async fn mount(&self, lun: u8, read_only: bool, filesystem: &str) -> Result<(), BenchError> {
        let disk = MappedVirtualDisk {
            mount_path: mount_point(lun),
            lun,
            controller: 0,
            read_only,
            filesystem: filesystem.to_owned(),
            ..MappedVirtualDisk::default()
        };
        self.modify(Resource::MappedVirtualDisk(disk)).await
    }

    async fn mount_layer(&self) -> Result<(), BenchError> {
        self.mount(LAYER, true, "erofs").await
    }

    async fn start_counter(&mut self, lines: &Lines) -> Result<(), BenchError> {
        self.mount_layer().await?;
        self.mount(SCRATCH, false, "ext4").await?;
        let bundle = format!("/run/gcs/pods/{CONTAINER}/{CONTAINER}");
        let rootfs = format!("{bundle}/rootfs");
        let scratch = format!("{}/scratch/{CONTAINER}/{CONTAINER}", mount_point(SCRATCH));
        self.modify(Resource::CombinedLayers(CombinedLayers {
            container_id: CONTAINER.to_owned(),
            container_root_path: rootfs.clone(),
            layers: vec![Layer { path: mount_point(LAYER), ..Layer::default() }],
            scratch_path: scratch.clone(),
        }))
        .await?;
        let config = ContainerConfig {
            schema_version: SchemaVersion::V21,
            oci_bundle_path: bundle,
            oci_specification: specification(&rootfs),
            scratch_dir_path: scratch,
        };
        self.bridge.create(CONTAINER, &config).await?;
        self.listen_to_counter(lines, Resume::at(0))?;
        let parameters = ProcessParameters { create_std_out_pipe: true, ..ProcessParameters::default() };
        let settings = VsockStdioRelaySettings {
            std_out: Some(COUNTER_PORT),
            resumable: true,
            ..VsockStdioRelaySettings::default()
        };
        self.bridge.execute(CONTAINER, &parameters, Some(settings)).await?;
        Ok(())
    }

    async fn modify(&self, resource: Resource) -> Result<(), BenchError> {
        Ok(self.bridge.modify(UTILITY_VM, &Modification::add(resource)).await?)
    }

    fn listen_to_counter(&mut self, lines: &Lines, resume: Resume) -> Result<(), BenchError> {
        let output = self.receive(COUNTER_PORT, resume)?;
        let lines = lines.clone();
        self.tasks.push(tokio::spawn(async move {
            let mut output = BufReader::new(output).lines();
            while let Ok(Some(line)) = output.next_line().await {
                lines.take(&line);
            }
        }));
        Ok(())
    }

    fn receive(&mut self, port: u32, resume: Resume) -> Result<DuplexStream, BenchError> {
        let listener = Accept(self.link.listen(port)?);
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        self.tasks.push(tokio::spawn(async move {
            // Its end is seen on the other side of the pipe.
            if let Ok(ended) = stdio::receive(listener, theirs, &resume).await {
                ended.linger().await;
            }
        }));
        Ok(ours)
    }

    /// Connects to the guest of a machine that has just arrived: bridge and the output of its counter, if it has one.
    pub(super) fn adopt(&mut self, lines: Option<&Lines>) -> Result<(), BenchError> {
        if let Some(lines) = lines {
            self.listen_to_counter(lines, Resume::unknown())?;
        }
        self.link.start();
        Ok(())
    }

    /// `name`, pid and `VmHWM` in KiB of each process of the guest that has memory of its own.
    ///
    /// # Errors
    /// The guest.
    pub async fn guest_peaks(&mut self) -> Result<Vec<(String, u64)>, BenchError> {
        self.negotiated().await?;
        let busybox = format!("{}/bin/busybox", mount_point(LAYER));
        let script = format!("for s in /proc/[0-9]*/status; do echo; {busybox} cat $s 2>/dev/null; done");
        let (pid, mut output) = self.execute(vec![busybox, "sh".to_owned(), "-c".to_owned(), script]).await?;
        let mut text = String::new();
        let read = timeout(BOOT_DEADLINE, output.read_to_string(&mut text)).await;
        read.map_err(|_| BenchError::Deadline {
            what: "the end of the guest's answer".to_owned(),
            within: BOOT_DEADLINE,
        })?
        .map_err(BenchError::io("read the guest's answer"))?;
        self.bridge.wait(UTILITY_VM, pid, Some(BOOT_DEADLINE)).await?;
        let own = pid.0.to_string();
        Ok(text.split("\n\n").filter_map(|status| guest_process(status, &own)).collect())
    }

    /// Runs a program in the guest itself; what it says comes out of the stream.
    async fn execute(&mut self, arguments: Vec<String>) -> Result<(GuestPid, DuplexStream), BenchError> {
        let port = self.next_port;
        self.next_port += 1;
        let output = self.receive(port, Resume::at(0))?;
        let parameters = ProcessParameters {
            command_args: arguments,
            create_std_out_pipe: true,
            ..ProcessParameters::default()
        };
        let settings = VsockStdioRelaySettings {
            std_out: Some(port),
            resumable: true,
            ..VsockStdioRelaySettings::default()
        };
        Ok((self.bridge.execute(UTILITY_VM, &parameters, Some(settings)).await?, output))
    }

    /// Ends QEMU and waits until it is gone.
    ///
    /// # Errors
    /// A process that does not end.
    pub async fn end(self) -> Result<(), BenchError> {
        self.bridge.close();
        self.qemu.kill();
        let mut exited = self.qemu.exited();
        let gone = timeout(END, exited.wait_for(Option::is_some)).await;
        gone.map(drop).map_err(|_| BenchError::Deadline { what: "the end of a QEMU".to_owned(), within: END })
    }
}

fn guest_process(status: &str, except: &str) -> Option<(String, u64)> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let (name, pid, parent) = (field("Name:")?, field("Pid:")?, field("PPid:")?);
    if pid == except || parent == except {
        return None;
    }
    Some((format!("{name} (pid {pid})"), crate::memory::high_water(status)?))
}

fn mount_point(lun: u8) -> String {
    format!("/run/mounts/scsi/0_{lun}_0")
}

/// What ctr asks for, as far as it means anything in a guest.
fn specification(rootfs: &str) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/counter"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": rootfs},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
        ]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
    })
}

/// The guest dials the bridge at its start and after each move.
async fn accept_bridge(mut listener: PortListener, bridge: Bridge) {
    while let Some(stream) = listener.accept().await {
        if let Err(error) = bridge.attach(stream).await {
            eprintln!("a bridge connection was refused: {error}");
        }
    }
}

async fn discard_log(mut listener: PortListener) {
    while let Some(mut stream) = listener.accept().await {
        let mut buffer = [0; 4096];
        while let Ok(1..) = stream.read(&mut buffer).await {}
    }
}
