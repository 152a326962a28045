//! Packet sockets: whole frames, in and out of one interface.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

/// A virtio network header before each frame, in and out.
const PACKET_VNET_HDR: libc::c_int = 15;

/// A socket that only sends.
pub(crate) fn deaf() -> io::Result<OwnedFd> {
    open(0)
}

/// A socket whose frames begin with a virtio network header.
pub(crate) fn deaf_with_headers() -> io::Result<OwnedFd> {
    let socket = deaf()?;
    option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, &1_i32)?;
    Ok(socket)
}

/// A socket that gets the frames that are sent out of an interface, headers before them, each with its time.
pub(crate) fn outgoing(interface: u32) -> io::Result<OwnedFd> {
    // Deaf until the filter is set: nothing else is ever in its queue.
    let socket = deaf()?;
    option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, &1_i32)?;
    option(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32)?;
    only_outgoing(&socket)?;
    let every_protocol = u16::to_be(3);
    let address = address(interface, every_protocol);
    let length = length_of(&address);
    // SAFETY: the address is a `sockaddr_ll` of this length, alive for the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Sends one frame without waiting.
pub(crate) fn send(socket: &OwnedFd, interface: u32, frame: &[u8]) -> io::Result<()> {
    let address = address(interface, 0);
    let length = length_of(&address);
    // SAFETY: the frame and the address are alive for the call and of the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How much may wait in the socket for its reader, bytes.
pub(crate) fn set_queue(socket: &OwnedFd, bytes: i32) -> io::Result<()> {
    option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)
}

fn open(protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in, a new descriptor or -1 out.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
        if socket < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(socket)) }
    }
}

/// What comes from the interface's other side is not copied at all.
fn only_outgoing(socket: &OwnedFd) -> io::Result<()> {
    // Load the frame's direction; outgoing: all of it; else nothing. Offsets below zero are the kernel's own facts.
    let direction = u32::from_ne_bytes((libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE).to_ne_bytes());
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, direction),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::from(libc::PACKET_OUTGOING)),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
    option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

fn address(interface: u32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).unwrap_or(0),
        sll_protocol: protocol,
        sll_ifindex: i32::try_from(interface).unwrap_or(i32::MAX),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    }
}

fn option<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is alive for the call and of the length given.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length_of(value))
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn length_of<T>(_: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0)
}
