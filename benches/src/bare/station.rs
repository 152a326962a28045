//! A bare machine on the pods' segment of a lab: a tap on a host's bridge, and what the client outside talks to.

use std::path::Path;

use dunlin_net::{Namespace, Tap};
use dunlin_qemu::{MacAddress, RootPort};
use tokio::process::Command;

use super::machine::Machine;
use crate::BenchError;
use crate::lab::{Host, output_of};

/// The machine's address, beside those that the pods of benchmarks have.
pub const ADDRESS: &str = "10.88.0.6";
const PREFIX: u8 = 16;
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x06];
const MTU: u32 = 1500;
const BRIDGE: &str = "pods0";

/// The tap that a machine holds; gone when dropped.
#[derive(Debug)]
pub(super) struct Station {
    _tap: Tap,
}

impl Station {
    /// Puts the machine on the bridge of `host`. As long as it does not run, it says nothing there.
    pub(super) async fn plug(machine: &Machine, host: Host) -> Result<Station, BenchError> {
        let netns = format!("dunlin-{}", host.name());
        let namespace = Namespace::open(&Path::new("/run/netns").join(&netns))?;
        let tap = Tap::create(&namespace, "bare0", MTU)?;
        let mut join = Command::new("ip");
        join.args(["-n", &netns, "link", "set", tap.name(), "master", BRIDGE, "up"]);
        output_of(join).await?;
        let descriptor = tap.descriptor().map_err(BenchError::io("duplicate a tap's descriptor"))?;
        machine.qemu.attach_nic(RootPort::new(0)?, MacAddress::new(MAC), descriptor).await?;
        Ok(Station { _tap: tap })
    }
}

/// For a shell of `busybox`, in the guest's own network: the address, then a server as `server` says it, where `busybox`
/// stands for itself.
pub(super) fn script(busybox: &str, server: &str) -> String {
    format!(
        "busybox() {{ {busybox} \"$@\"; }}
for nic in /sys/class/net/*; do nic=${{nic##*/}}; [ $nic = lo ] || break; done
busybox ip link set $nic up && busybox ip addr add {ADDRESS}/{PREFIX} dev $nic || exit 1
{server}"
    )
}
