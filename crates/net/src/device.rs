//! One interface's switches, at hand from any thread: a socket that lives in the interface's namespace.
//!
//! No netlink: what stands between a pause and a run is one system call.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::NetError;
use crate::interface::mac_text;
use crate::namespace::Namespace;

nix::ioctl_readwrite_bad!(
    /// Reads an interface's flags.
    get_flags,
    libc::SIOCGIFFLAGS, libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets them.
    set_flags,
    libc::SIOCSIFFLAGS, libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets its MTU.
    set_mtu,
    libc::SIOCSIFMTU, libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets its hardware address.
    set_address,
    libc::SIOCSIFHWADDR, libc::ifreq
);
nix::ioctl_readwrite_bad!(
    /// Reads it.
    get_address,
    libc::SIOCGIFHWADDR, libc::ifreq
);

/// An interface of a namespace, by name.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    name: String,
    index: u32,
}

impl Control {
    /// Of the interface with this number and name.
    pub fn open(namespace: &Namespace, index: u32, name: &str) -> Result<Control, NetError> {
        let opened = namespace
            .run(|| socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None))?;
        let socket = opened.map_err(|errno| NetError::Socket(errno.into()))?;
        Ok(Control { socket, name: name.to_owned(), index })
    }

    /// Its number in its namespace.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Switches it on or off.
    pub fn set_up(&self, up: bool) -> Result<(), NetError> {
        let action = if up { "switch it on" } else { "switch it off" };
        self.asked(action, || {
            let mut request = request(&self.name)?;
            // SAFETY: an `ifreq` that lives for the call, on a socket that is open.
            unsafe { get_flags(self.socket.as_raw_fd(), &raw mut request) }?;
            // SAFETY: the kernel has just written this member.
            let flags = unsafe { request.ifr_ifru.ifru_flags };
            let on = i16::try_from(libc::IFF_UP).unwrap_or_default();
            request.ifr_ifru.ifru_flags = if up { flags | on } else { flags & !on };
            // SAFETY: as above.
            unsafe { set_flags(self.socket.as_raw_fd(), &raw const request) }?;
            Ok(())
        })
    }

    /// The longest packet, bytes.
    pub fn set_mtu(&self, mtu: u32) -> Result<(), NetError> {
        self.asked("set its MTU", || {
            let mut request = request(&self.name)?;
            request.ifr_ifru.ifru_mtu = i32::try_from(mtu).unwrap_or(i32::MAX);
            // SAFETY: an `ifreq` that lives for the call, on a socket that is open.
            unsafe { set_mtu(self.socket.as_raw_fd(), &raw const request) }?;
            Ok(())
        })
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> Result<[u8; 6], NetError> {
        self.asked("read its address", || {
            let mut request = request(&self.name)?;
            // SAFETY: an `ifreq` that lives for the call, on a socket that is open.
            unsafe { get_address(self.socket.as_raw_fd(), &raw mut request) }?;
            // SAFETY: the kernel has just written this member.
            let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
            let mut mac = [0; 6];
            for (byte, found) in mac.iter_mut().zip(data) {
                *byte = found.to_ne_bytes()[0];
            }
            Ok(mac)
        })
    }

    /// Gives it another Ethernet address.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<(), NetError> {
        self.asked(&format!("give it the address {}", mac_text(mac)), || {
            let mut request = request(&self.name)?;
            let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
            for (place, byte) in address.sa_data.iter_mut().zip(mac) {
                *place = libc::c_char::from_ne_bytes([byte]);
            }
            request.ifr_ifru.ifru_hwaddr = address;
            // SAFETY: an `ifreq` that lives for the call, on a socket that is open.
            unsafe { set_address(self.socket.as_raw_fd(), &raw const request) }?;
            Ok(())
        })
    }

    fn asked<T>(&self, action: &str, ask: impl FnOnce() -> io::Result<T>) -> Result<T, NetError> {
        ask().map_err(|source| NetError::Device {
            name: self.name.clone(),
            action: action.to_owned(),
            source,
        })
    }
}

/// A request about the interface of this name, all else zero.
pub(crate) fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an `ifreq` of zeros is one: numbers, and a pointer that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    Ok(request)
}
