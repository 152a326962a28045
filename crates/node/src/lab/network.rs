//! The lab's networks: a bridge in a namespace of its own with one veth to each host, and beside it the pods'
//! segment, one layer-2 network across both hosts, with a client that is outside of both.
//!
//! ```text
//!   dunlin-a                        dunlin-net                        dunlin-b
//!   eth0 10.77.0.1/24 ------- lab-a   br0   lab-b ------- eth0 10.77.0.2/24
//!   pods0 10.88.255.1 - pods  pods-a pods0 pods-b  pods - pods0 10.88.255.2
//!                                     |client
//!                           dunlin-client: eth0 10.88.0.254
//! ```
//!
//! Nothing of it is in the machine's own namespace, so nothing can clash there, and
//! removing the four namespaces removes every device.

use std::{fs, path::PathBuf, process::Command, thread};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use super::{
    HostName,
    error::{FileContext, LabError, NamespaceContext},
};

/// Where `ip netns` looks for names.
pub(crate) const NETNS_DIR: &str = "/run/netns";
const BRIDGE_NETNS: &str = "dunlin-net";
/// The namespace of the client outside both hosts.
pub(crate) const CLIENT_NETNS: &str = "dunlin-client";
/// The pods' bridge in each host, and what joins both.
pub(crate) const POD_BRIDGE: &str = "pods0";
/// What frames of the pods' segment may be: jumbo ones pass.
pub(crate) const POD_MTU: u32 = 9000;
/// The client's addresses: on the pods' own networks, and on a second pair for pods with two NICs.
const CLIENT_ADDRESSES: [&str; 4] = ["10.88.0.254/16", "fd88::254/64", "10.89.0.254/16", "fd89::254/64"];
/// All names, the first to be removed first.
const NAMES: [&str; 4] = [HostName::A.netns(), HostName::B.netns(), CLIENT_NETNS, BRIDGE_NETNS];

/// The file that names a network namespace.
pub(crate) fn netns_path(name: &str) -> PathBuf {
    PathBuf::from(NETNS_DIR).join(name)
}

/// Makes the four namespaces and joins them. Fails if one of the names is taken.
pub(crate) fn create() -> Result<(), LabError> {
    fs::create_dir_all(NETNS_DIR).file("create", NETNS_DIR)?;
    create_netns(BRIDGE_NETNS)?;
    ip(&["-n", BRIDGE_NETNS, "link", "set", "lo", "up"])?;
    ip(&["-n", BRIDGE_NETNS, "link", "add", "br0", "type", "bridge"])?;
    ip(&["-n", BRIDGE_NETNS, "link", "set", "br0", "up"])?;
    for host in HostName::ALL {
        let (netns, port) = (host.netns(), format!("lab-{host}"));
        create_netns(netns)?;
        ip(&[
            "-n",
            BRIDGE_NETNS,
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            netns,
        ])?;
        ip(&["-n", BRIDGE_NETNS, "link", "set", &port, "master", "br0", "up"])?;
        ip(&["-n", netns, "link", "set", "lo", "up"])?;
        ip(&["-n", netns, "addr", "add", &format!("{}/24", host.address()), "dev", "eth0"])?;
        ip(&["-n", netns, "link", "set", "eth0", "up"])?;
    }
    create_pod_segment()
}

/// The pods' segment: a bridge in each host, joined by one between them, and the client on it.
fn create_pod_segment() -> Result<(), LabError> {
    create_pod_bridge(BRIDGE_NETNS)?;
    for (index, host) in (1..).zip(HostName::ALL) {
        let netns = host.netns();
        create_pod_bridge(netns)?;
        join_pod_segment(&format!("pods-{host}"), "pods", netns)?;
        ip_in(netns, &format!("link set pods master {POD_BRIDGE} up"))?;
        // The host itself can be reached there, as a cluster's hosts reach their pods.
        for address in [format!("10.88.255.{index}/16"), format!("fd88::ff:{index}/64 nodad")] {
            ip_in(netns, &format!("addr add {address} dev {POD_BRIDGE}"))?;
        }
    }
    create_netns(CLIENT_NETNS)?;
    join_pod_segment("client", "eth0", CLIENT_NETNS)?;
    ip_in(CLIENT_NETNS, "link set lo up")?;
    for address in CLIENT_ADDRESSES {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        ip_in(CLIENT_NETNS, &format!("addr add {address} dev eth0{nodad}"))?;
    }
    ip_in(CLIENT_NETNS, "link set eth0 up")
}

/// Without snooping: nobody on the segment asks who listens to which group.
fn create_pod_bridge(netns: &str) -> Result<(), LabError> {
    ip_in(netns, &format!("link add {POD_BRIDGE} type bridge mcast_snooping 0"))?;
    // Said, not inherited: a bridge whose MTU was never said follows the smallest of its ports.
    ip_in(netns, &format!("link set {POD_BRIDGE} mtu {POD_MTU} up"))
}

/// A veth from the bridge between the hosts to `far` in `netns`.
fn join_pod_segment(port: &str, far: &str, netns: &str) -> Result<(), LabError> {
    ip_in(
        BRIDGE_NETNS,
        &format!("link add {port} mtu {POD_MTU} type veth peer name {far} mtu {POD_MTU} netns {netns}"),
    )?;
    ip_in(BRIDGE_NETNS, &format!("link set {port} master {POD_BRIDGE} up"))
}

/// `ip` in a namespace; the words are ours and have no blanks in them.
fn ip_in(netns: &str, words: &str) -> Result<(), LabError> {
    let arguments: Vec<&str> = ["-n", netns].into_iter().chain(words.split_whitespace()).collect();
    ip(&arguments)
}

/// Takes the four names away; the namespaces die with their last process. Never fails on
/// a name that is not there.
pub(crate) fn remove() -> Result<(), LabError> {
    for name in NAMES {
        let path = netns_path(name);
        // A crash between the file and the mount leaves a plain file: EINVAL ends the loop.
        while path.exists() && umount2(&path, MntFlags::MNT_DETACH).is_ok() {}
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LabError::File { action: "remove", path, source: error });
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// True when any of the lab's names exists.
pub(crate) fn exists() -> bool {
    NAMES.iter().any(|name| netns_path(name).exists())
}

/// Like `ip netns add`, but leaves `/run/netns` itself alone, which that command turns
/// into a mount that outlives the namespace.
fn create_netns(name: &'static str) -> Result<(), LabError> {
    let path = netns_path(name);
    fs::File::create_new(&path).file("create", &path)?;
    // A thread of its own: unshare moves only the calling thread.
    let made = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).namespace("make a network namespace", name)?;
        let own = Some("/proc/thread-self/ns/net");
        mount(own, &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .namespace("name a network namespace", path.display().to_string())
    });
    made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn ip(arguments: &[&str]) -> Result<(), LabError> {
    let command = format!("ip {}", arguments.join(" "));
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(|source| LabError::Spawn { command: command.clone(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command, status: output.status, output: text })
}
