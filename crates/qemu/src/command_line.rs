//! From a document and this host's paths to QEMU's argument vector: every device at a fixed address.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::accel::Accelerator;
use crate::document::{CONTROLLERS, Channel, Document, InvalidField, ROOT_PORTS};

/// Name of the virtio-serial port that the guest opens.
const LINK_PORT_NAME: &str = "dunlin.link.0";
/// PCI device numbers on pcie.0. The guest finds controller `i` at `0000:00:<0x10+i>.0`.
const FIRST_SCSI_ADDRESS: u8 = 0x10;
const CHANNEL_ADDRESS: u8 = 0x14;
const RNG_ADDRESS: u8 = 0x15;
const FIRST_ROOT_PORT_ADDRESS: u8 = 0x18;
/// `sun_path` holds 108 bytes, its NUL included.
const MAX_SOCKET_PATH: usize = 107;
/// Context ids 0 to 2 belong to the hypervisor, the loopback and the host.
const FIRST_GUEST_CID: u32 = 3;

/// What this host adds to a document.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// QEMU: a path, or a name that is looked up in `PATH`.
    pub binary: PathBuf,
    /// How guest code runs. Source and destination must use the same: their CPU state differs.
    pub accelerator: Accelerator,
    /// Files and sockets of this host.
    pub paths: HostPaths,
    /// Further directories with firmware files (`-L`), for a QEMU that runs outside its installation.
    pub firmware_dirs: Vec<PathBuf>,
    /// How long QEMU may take from its start to its first answer on QMP.
    pub start_deadline: Duration,
}

impl LaunchOptions {
    /// Options with a deadline of 20 s and no further firmware directories.
    pub fn new(binary: impl Into<PathBuf>, accelerator: Accelerator, paths: HostPaths) -> LaunchOptions {
        LaunchOptions {
            binary: binary.into(),
            accelerator,
            paths,
            firmware_dirs: Vec::new(),
            start_deadline: Duration::from_secs(20),
        }
    }
}

/// Files and sockets of this host. Disks and NICs are not among them: they are hot-plugged.
#[derive(Debug, Clone)]
pub struct HostPaths {
    /// Kernel image; without one the firmware finds nothing to boot.
    pub kernel: Option<PathBuf>,
    /// Initramfs; only with a kernel.
    pub initramfs: Option<PathBuf>,
    /// QEMU listens here for QMP; at most 107 bytes.
    pub qmp_socket: PathBuf,
    /// The host's end of the channel to the guest.
    pub channel: ChannelEndpoint,
    /// The guest's serial console is appended to this file; beyond 8 MiB it begins anew.
    pub console_log: PathBuf,
    /// QEMU's own stdout and stderr are appended to this file; beyond 8 MiB it begins anew.
    pub qemu_log: PathBuf,
}

impl HostPaths {
    /// The usual names in a sandbox's directory, with a virtio-serial channel and no kernel.
    pub fn in_directory(directory: &Path) -> HostPaths {
        HostPaths {
            kernel: None,
            initramfs: None,
            qmp_socket: directory.join("qmp.sock"),
            channel: ChannelEndpoint::VirtioSerial { socket: directory.join("link.sock") },
            console_log: directory.join("console.log"),
            qemu_log: directory.join("qemu.log"),
        }
    }
}

/// The host's end of the channel; its kind must be the document's.
#[derive(Debug, Clone)]
pub enum ChannelEndpoint {
    /// QEMU listens on this unix socket; at most 107 bytes.
    VirtioSerial {
        /// The socket's path.
        socket: PathBuf,
    },
    /// vhost-vsock with this context id, unique on the host, 3 or above.
    Vsock {
        /// The guest's context id.
        cid: u32,
    },
}

/// What QEMU does once it is up. In both modes the guest waits for `cont`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Run state `prelaunch`.
    Boot,
    /// Run state `inmigrate`, waiting for a stream.
    Incoming,
}

/// QEMU's arguments, without the program's name. Refuses a document or options that do not hold together.
pub fn command_line(
    document: &Document,
    options: &LaunchOptions,
    mode: Mode,
) -> Result<Vec<OsString>, InvalidField> {
    document.validate()?;
    let paths = &options.paths;
    check_socket("paths.qmp_socket", &paths.qmp_socket)?;

    let mut line = Arguments::default();
    line.words(["-nodefaults", "-no-user-config", "-no-reboot", "-S"]);
    line.option("-display", "none");
    // Times in qemu.log can then be laid beside the times of QMP events.
    line.option("-msg", "timestamp=on");
    line.option("-name", "debug-threads=on");
    for directory in &options.firmware_dirs {
        line.option("-L", directory);
    }
    line.option(
        "-machine",
        format!(
            "{},memory-backend=pc.ram,usb=off,sata=off,smbus=off,vmport=off,graphics=off,dump-guest-core=off",
            document.machine
        ),
    );
    line.option("-accel", options.accelerator.argument());
    line.option("-cpu", &document.cpu);
    line.option("-smp", format!("cpus={n},maxcpus={n},sockets=1,cores={n},threads=1", n = document.vcpus));
    // Anonymous memory gets transparent huge pages, a memfd mostly does not, and nothing here shares guest
    // memory yet. The id is the name under which q35 sends its RAM, so another backend of the same
    // name can take the place of this one later and old streams still load.
    let kib = document.memory_mib * 1024 + odd_kib(options.accelerator);
    line.option("-object", format!("memory-backend-ram,id=pc.ram,size={kib}K"));
    line.option("-m", format!("{kib}K"));
    line.option("-uuid", document.uuid.to_string());
    line.option("-rtc", "base=utc,clock=host");
    line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");

    line.option("-chardev", socket_chardev("qmp0", &paths.qmp_socket));
    line.option("-mon", "chardev=qmp0,mode=control");
    let mut console = OsString::from("file,id=console0,append=on,path=");
    console.push(escaped(paths.console_log.as_os_str()));
    line.option("-chardev", console);
    line.option("-serial", "chardev:console0");

    devices(&mut line, document, paths)?;
    kernel(&mut line, document, paths)?;
    if mode == Mode::Incoming {
        line.option("-incoming", "defer");
    }
    Ok(line.0)
}

fn devices(line: &mut Arguments, document: &Document, paths: &HostPaths) -> Result<(), InvalidField> {
    for controller in 0..CONTROLLERS {
        line.option(
            "-device",
            format!(
                "virtio-scsi-pci,id=scsi{controller},bus=pcie.0,addr={:#x},disable-legacy=on,num_queues={}",
                FIRST_SCSI_ADDRESS + controller,
                document.vcpus
            ),
        );
    }
    match (document.channel, &paths.channel) {
        (Channel::VirtioSerial, ChannelEndpoint::VirtioSerial { socket }) => {
            check_socket("paths.channel.socket", socket)?;
            line.option(
                "-device",
                format!(
                    "virtio-serial-pci,id=serial0,bus=pcie.0,addr={CHANNEL_ADDRESS:#x},disable-legacy=on,max_ports=2"
                ),
            );
            line.option("-chardev", socket_chardev("link0", socket));
            line.option(
                "-device",
                format!(
                    "virtserialport,id=link-port0,bus=serial0.0,nr=1,chardev=link0,name={LINK_PORT_NAME}"
                ),
            );
        }
        (Channel::Vsock, ChannelEndpoint::Vsock { cid }) => {
            if *cid < FIRST_GUEST_CID {
                return Err(InvalidField::new(
                    "paths.channel.cid",
                    format!("{cid} is reserved; guests start at {FIRST_GUEST_CID}"),
                ));
            }
            line.option(
                "-device",
                format!(
                    "vhost-vsock-pci,id=vsock0,bus=pcie.0,addr={CHANNEL_ADDRESS:#x},disable-legacy=on,guest-cid={cid}"
                ),
            );
        }
        (wanted, _) => {
            return Err(InvalidField::new(
                "channel",
                format!("the document has {wanted:?}, this host prepared the other kind"),
            ));
        }
    }
    line.option("-object", "rng-builtin,id=rng0");
    line.option(
        "-device",
        format!("virtio-rng-pci,id=rng-device0,rng=rng0,bus=pcie.0,addr={RNG_ADDRESS:#x},disable-legacy=on"),
    );
    for port in 0..ROOT_PORTS {
        line.option(
            "-device",
            format!(
                "pcie-root-port,id=rp{port},bus=pcie.0,addr={:#x},chassis={n},slot={n}",
                FIRST_ROOT_PORT_ADDRESS + port,
                n = port + 1
            ),
        );
    }
    Ok(())
}

fn kernel(line: &mut Arguments, document: &Document, paths: &HostPaths) -> Result<(), InvalidField> {
    let Some(kernel) = &paths.kernel else {
        if paths.initramfs.is_some() {
            return Err(InvalidField::new("paths.initramfs", "is given without paths.kernel"));
        }
        if !document.kernel_command_line.is_empty() {
            return Err(InvalidField::new("kernel_command_line", "is given without paths.kernel"));
        }
        return Ok(());
    };
    line.option("-kernel", kernel);
    if let Some(initramfs) = &paths.initramfs {
        line.option("-initrd", initramfs);
    }
    if !document.kernel_command_line.is_empty() {
        line.option("-append", &document.kernel_command_line);
    }
    Ok(())
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn words<const N: usize>(&mut self, words: [&str; N]) {
        self.0.extend(words.map(OsString::from));
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
    }
}

/// What is added to the guest's memory, KiB. QEMU 7.2 collects dirty pages 64 at a time, and then TCG does not see
/// writes through the TLB entries that it holds: they are missing at the destination. A memory whose size is no
/// multiple of 64 pages is looked at page by page, which is right.
fn odd_kib(accelerator: Accelerator) -> u64 {
    match accelerator {
        Accelerator::Tcg => 8,
        Accelerator::Kvm => 0,
    }
}

fn socket_chardev(id: &str, path: &Path) -> OsString {
    let mut value = OsString::from(format!("socket,id={id},server=on,wait=off,path="));
    value.push(escaped(path.as_os_str()));
    value
}

/// QEMU's option parser reads `,,` as one comma of the value.
fn escaped(value: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

fn check_socket(field: &str, path: &Path) -> Result<(), InvalidField> {
    let length = path.as_os_str().len();
    if length == 0 || length > MAX_SOCKET_PATH {
        return Err(InvalidField::new(
            field,
            format!(
                "{} is {length} bytes long; a unix socket's path has 1 to {MAX_SOCKET_PATH}: use a shorter state_dir",
                path.display()
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "command_line_tests.rs"]
mod tests;
