//! The channel that carries the link: a virtio-serial port, or vhost-vsock where the configuration asks for it.
//!
//! A vsock context id is the host's alone: no two machines may have the same. Each is a locked file below
//! `<state_dir>/cid/`, so that a shim that dies gives its id back.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use dunlin_link::VSOCK_PORT;
use dunlin_link::host::Endpoint;
use dunlin_qemu::{Channel, ChannelEndpoint};
use thiserror::Error;

use crate::boot::directory::StateDirectory;
use crate::config::Link;

const DEVICE: &str = "/dev/vhost-vsock";
/// Ids 0 to 2 belong to the hypervisor, the loopback and the host.
const FIRST_CID: u32 = 3;
/// More machines than a host can hold.
const CIDS: u32 = 4096;

/// The host's end of a machine's channel.
#[derive(Debug)]
pub(crate) struct HostEnd {
    pub(crate) qemu: ChannelEndpoint,
    pub(crate) link: Endpoint,
    /// Keeps the context id.
    _cid: Option<File>,
}

/// There is no channel for the machine.
#[derive(Debug, Error)]
pub(crate) enum ChannelError {
    #[error("the machine's link is vsock, and this host has no {DEVICE}; load the kernel module vhost_vsock")]
    NoVsock,
    #[error("cannot reserve a vsock context id in {path}: {source}; check state_dir in the configuration")]
    Reserve { path: PathBuf, source: std::io::Error },
    #[error("all {CIDS} vsock context ids are taken")]
    Exhausted,
}

/// Whether this host can carry a link over vsock.
pub(crate) fn has_vsock() -> bool {
    Path::new(DEVICE).exists()
}

/// The kind for a new machine.
pub(crate) fn chosen(link: Link) -> Channel {
    match link {
        Link::VirtioSerial => Channel::VirtioSerial,
        Link::Vsock => Channel::Vsock,
        Link::Auto if has_vsock() => Channel::Vsock,
        Link::Auto => Channel::VirtioSerial,
    }
}

/// What the guest's kernel is told of its channel.
pub(crate) fn kernel_argument(channel: Channel) -> &'static str {
    match channel {
        Channel::VirtioSerial => "",
        Channel::Vsock => " dunlin.link=vsock",
    }
}

/// Makes this host's end for a machine with that kind of channel.
pub(crate) fn host_end(
    channel: Channel,
    directory: &StateDirectory,
    state_dir: &Path,
) -> Result<HostEnd, ChannelError> {
    match channel {
        Channel::VirtioSerial => Ok(HostEnd {
            qemu: ChannelEndpoint::VirtioSerial { socket: directory.link_socket() },
            link: Endpoint::VirtioSerial { socket: directory.link_socket() },
            _cid: None,
        }),
        Channel::Vsock => {
            if !has_vsock() {
                return Err(ChannelError::NoVsock);
            }
            let (cid, lock) = reserve_cid(&state_dir.join("cid"))?;
            Ok(HostEnd {
                qemu: ChannelEndpoint::Vsock { cid },
                link: Endpoint::Vsock { cid, port: VSOCK_PORT },
                _cid: Some(lock),
            })
        }
    }
}

fn reserve_cid(directory: &Path) -> Result<(u32, File), ChannelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ChannelError::Reserve { path, source }
    };
    std::fs::create_dir_all(directory).map_err(failed(directory))?;
    for cid in FIRST_CID..FIRST_CID + CIDS {
        let path = directory.join(cid.to_string());
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(failed(&path))?;
        // SAFETY: `flock` on a descriptor that `file` owns.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok((cid, file));
        }
    }
    Err(ChannelError::Exhausted)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_context_id_is_one_machines_until_it_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let (one, lock) = reserve_cid(directory.path()).unwrap();
        let (two, _other) = reserve_cid(directory.path()).unwrap();
        assert_eq!((one, two), (3, 4));
        drop(lock);
        // A process that another test has just started holds on to all that was open here, until it
        // executes its program.
        let since = Instant::now();
        loop {
            let (again, _given_back) = reserve_cid(directory.path()).unwrap();
            if again == 3 {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(5), "{again}, though 3 was given back");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
