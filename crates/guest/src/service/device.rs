//! Finds the device that carries the link.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dunlin_link::guest::Device;

use crate::init::cmdline::LinkChannel;

/// Name that the machine gives the serial port of the link.
const PORT_NAME: &str = "dunlin.link.0";
const PORTS: &str = "/sys/class/virtio-ports";
const POLL: Duration = Duration::from_millis(20);
const COMPLAIN_EVERY: u32 = 500;

/// The link's device. The serial port may take a moment to get its name; it is waited for as long
/// as it takes, because without it nothing else can be done.
pub(super) async fn find(channel: LinkChannel) -> Device {
    if channel == LinkChannel::Vsock {
        return Device::Vsock { port: dunlin_link::VSOCK_PORT };
    }
    let mut tries = 0u32;
    loop {
        if let Some(path) = serial_port(Path::new(PORTS)) {
            return Device::VirtioSerial { path };
        }
        tries = tries.wrapping_add(1);
        if tries.is_multiple_of(COMPLAIN_EVERY) {
            tracing::error!(
                "the machine has no virtio-serial port {PORT_NAME}; the host cannot reach this guest"
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Without udev the port has no link by its name; sysfs tells which `vportNpM` it is.
fn serial_port(ports: &Path) -> Option<PathBuf> {
    let port = fs::read_dir(ports).ok()?.filter_map(Result::ok).find(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME)
    })?;
    Some(Path::new("/dev").join(port.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        for (port, name) in [("vport1p0", "other\n"), ("vport1p1", "dunlin.link.0\n")] {
            fs::create_dir(ports.path().join(port)).unwrap();
            fs::write(ports.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(serial_port(ports.path()).unwrap(), Path::new("/dev/vport1p1"));
        assert_eq!(serial_port(&ports.path().join("none")), None);
    }
}
