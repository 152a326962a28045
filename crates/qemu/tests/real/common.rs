//! What the tests with a real QEMU share: a directory, a small machine, a tap.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dunlin_qemu::accel::Accelerator;
use dunlin_qemu::{Document, HostPaths, LaunchOptions, Mode, Qemu, Slot};
use uuid::Uuid;

/// Each wait in these tests takes well under a second on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// One side: a directory that goes away with it. QEMU must be dropped first.
pub(crate) struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Host {
        Host { directory: tempfile::Builder::new().prefix("dunlin-qemu-").tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn options(&self) -> LaunchOptions {
        let paths = HostPaths::in_directory(self.directory.path());
        LaunchOptions::new("qemu-system-x86_64", Accelerator::Tcg, paths)
    }

    pub(crate) async fn spawn(&self, document: &Document, mode: Mode) -> Qemu {
        Qemu::spawn(&self.options(), document, mode).await.unwrap()
    }

    pub(crate) fn disk(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

pub(crate) fn document() -> Document {
    Document::new(Uuid::new_v4(), 1, 64)
}

pub(crate) fn slot(controller: u8, lun: u8) -> Slot {
    Slot::new(controller, lun).unwrap()
}

/// Both ends of a stream, to be handed to two QEMUs.
pub(crate) fn stream_pair() -> (OwnedFd, OwnedFd) {
    let (one, other) = UnixStream::pair().unwrap();
    (one.into(), other.into())
}

pub(crate) fn tcp_pair() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one.into(), listener.accept().unwrap().0.into())
}

pub(crate) fn dial(path: &Path) -> OwnedFd {
    UnixStream::connect(path).unwrap().into()
}

/// Bytes without a period and with a hole, so that a copy shows misplaced and skipped blocks.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if (length / 4..length / 2).contains(&at) { 0 } else { state.to_le_bytes()[3] }
        })
        .collect()
}

/// Runs forever, adds one to the byte at 0x8000 over and over: a guest that dirties memory and needs no kernel.
pub(crate) fn busy_boot_disk() -> Vec<u8> {
    let code: [u8; 11] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xfe, 0x06, 0x00, 0x80, // inc byte [0x8000]
        0xeb, 0xfa, // jmp to inc
        0xf4,
    ];
    let mut disk = vec![0; 1024 * 1024];
    disk[..code.len()].copy_from_slice(&code);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

/// Runs forever, writes to 112 pages of low memory over and over, and never empties its TLB: a guest that writes faster
/// than it can be sent when little bandwidth is allowed, and whose writes are easily overlooked.
pub(crate) fn writing_boot_disk() -> Vec<u8> {
    let code: [u8; 25] = [
        0xb8, 0x00, 0x10, // mov ax, 0x1000
        0x8e, 0xd8, // mov ds, ax
        0x31, 0xdb, // xor bx, bx
        0xfe, 0x07, // inc byte [bx]
        0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
        0x75, 0xf8, // jnz to inc
        0x05, 0x00, 0x10, // add ax, 0x1000
        0x3d, 0x00, 0x80, // cmp ax, 0x8000
        0x75, 0xec, // jne to mov ds
        0xeb, 0xe7, // jmp to mov ax
    ];
    let mut disk = vec![0; 1024 * 1024];
    disk[..code.len()].copy_from_slice(&code);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

/// Runs forever and writes a sector of its own disk, one write after the other: there is nearly always one in flight.
pub(crate) fn disk_writing_boot_disk() -> Vec<u8> {
    let code: [u8; 15] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x30, 0x7c, // mov si, 0x7c30: the packet below; the BIOS has left the drive in dl
        0xb4, 0x43, // mov ah, 0x43: write
        0xb0, 0x00, // mov al, 0
        0xcd, 0x13, // int 0x13
        0xeb, 0xf8, // jmp to mov ah
    ];
    // One sector from 0:0x8000 to sector 1, which no mirror keeps apart from the disk's first.
    let packet: [u8; 16] = [0x10, 0, 1, 0, 0x00, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let mut disk = vec![0; 1024 * 1024];
    disk[..code.len()].copy_from_slice(&code);
    disk[0x30..0x40].copy_from_slice(&packet);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

/// A tap in a network namespace that lives as long as it.
pub(crate) fn tap() -> OwnedFd {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("the tests run as root");
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: an ifreq is plain bytes, and all zero is a valid one.
        let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[0] = b't'.cast_signed();
        request.ifr_ifru.ifru_flags =
            i16::try_from(nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR).unwrap();
        // SAFETY: the descriptor is open and the kernel reads and writes no more than this ifreq.
        let result = unsafe {
            nix::libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), nix::libc::TUNSETIFF, &raw mut request)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from(file)
    })
    .join()
    .unwrap()
}
