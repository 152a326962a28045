//! Taps: interfaces whose other end is a file descriptor.
//!
//! Not persistent: a tap goes with the last descriptor of it, whoever dies. It speaks no protocol of its own.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::libc;
use nix::net::if_::if_nametoindex;

use crate::device::Control;
use crate::error::NetError;
use crate::namespace::Namespace;

const DEVICE: &str = "/dev/net/tun";
/// Before the number of the interface whose place a tap takes. Together they fit into a name's 15 bytes.
const PREFIX: &str = "dunlin";
/// Refuses a name that is taken. Beyond the 16 bits of the request's flags only in old headers.
const EXCLUSIVE: libc::c_int = 0x8000;

nix::ioctl_write_ptr_bad!(
    /// Makes the descriptor the other end of an interface.
    set_interface,
    libc::TUNSETIFF,
    libc::ifreq
);

/// A tap in a namespace, with packets' offload headers before the frames.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    control: Control,
}

impl Tap {
    /// The kernel's name for the kind of interface that a tap is.
    pub const KIND: &str = "tun";

    /// The name of the tap that takes the place of interface number `interface` of its namespace.
    #[must_use]
    pub fn name_for(interface: u32) -> String {
        format!("{PREFIX}{interface}")
    }

    /// Makes the tap in the namespace, down. `mtu` in bytes. Refused when there is one of that name: then somebody
    /// else holds it.
    pub fn create(namespace: &Namespace, name: &str, mtu: u32) -> Result<Tap, NetError> {
        let failed =
            |source| NetError::Tap { name: name.to_owned(), namespace: namespace.to_string(), source };
        let (file, index) = namespace.run(|| make(name))?.map_err(failed)?;
        let tap = Tap { file, control: Control::open(namespace, index, name)? };
        tap.control.set_mtu(mtu)?;
        Ok(tap)
    }

    /// Another descriptor of the same tap: what is written to either is the guest's, and each frame goes to one reader.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Its number in its namespace.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.control.index()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.control.name()
    }

    /// Opens the way (frames wait in the tap for their reader, at most 1000 of them), or shuts it: what is sent to
    /// a tap that is down is dropped.
    pub fn set_up(&self, up: bool) -> Result<(), NetError> {
        self.control.set_up(up)
    }
}

/// In the namespace: the descriptor and the number.
fn make(name: &str) -> io::Result<(OwnedFd, u32)> {
    let file = File::options().read(true).write(true).open(DEVICE)?;
    let mut request = crate::device::request(name)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | EXCLUSIVE;
    // The field has 16 bits, of which the last is the sign's.
    request.ifr_ifru.ifru_flags = i16::from_ne_bytes(u16::try_from(flags).unwrap_or_default().to_ne_bytes());
    // SAFETY: the request is an `ifreq` with a name that ends with zero, alive for the call.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }?;
    let index = if_nametoindex(CString::new(name)?.as_c_str())?;
    // Else the kernel would speak to the guest out of it: router solicitations, multicast reports. A kernel
    // without IPv6 has no such file.
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    Ok((file.into(), index))
}
