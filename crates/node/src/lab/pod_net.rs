//! `dunlin lab pod-net`: a pod's network namespace inside a host, as a CNI plugin would leave it.

use std::{net::IpAddr, process::Command, str::FromStr, time::Duration};

use clap::{Args, ValueEnum};

use super::{
    HostName, Layout,
    error::LabError,
    lifecycle::run_in_host,
    network::{POD_BRIDGE, POD_MTU},
};

const IP_WAIT: Duration = Duration::from_secs(20);
/// With the interface's number it must be a name that Linux takes for a device: 15 bytes.
const NAME_MAX: usize = 12;
const MTUS: std::ops::RangeInclusive<i64> = 1280..=POD_MTU as i64;

/// A pod's namespace `/run/netns/NAME` of a host, on the segment that both hosts and the client share.
#[derive(Debug, Args)]
pub(crate) struct PodNetArgs {
    /// Which host.
    #[arg(value_enum)]
    host: HostName,
    /// The namespace's name, at most 12 letters, digits and `-`.
    name: String,
    /// An address with its prefix length, of eth0 or of the interface named: `10.88.0.5/16`, `eth1=10.89.0.5/16`;
    /// those in 10.88.0.0/16 and fd88::/64 get a default route by way of the client.
    #[arg(long = "address", value_name = "[NIC=]CIDR")]
    addresses: Vec<Address>,
    /// MTU of all its interfaces.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(MTUS))]
    mtu: u32,
    /// How many interfaces.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    nics: u32,
    /// What its interfaces are.
    #[arg(long, value_enum, default_value_t = Style::Bridge)]
    style: Style,
    /// The namespace's own kernel answers nobody, so that two hosts may have the same addresses at once, as
    /// before and after a move.
    #[arg(long)]
    silent: bool,
    /// Remove it instead.
    #[arg(long)]
    down: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Style {
    /// A veth whose other end is a port of the pods' bridge.
    Bridge,
    /// A veth whose other end is routed by the host, which answers for it on the segment.
    Ptp,
    /// A macvlan on the pods' bridge.
    Macvlan,
}

/// An address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    nic: String,
    ip: IpAddr,
    prefix: u8,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let wrong =
            || format!("`{text}` is no address with a prefix length, as 10.88.0.5/16 or eth1=fd89::5/64");
        let (nic, cidr) = text.split_once('=').unwrap_or(("eth0", text));
        let (ip, prefix) = cidr.split_once('/').ok_or_else(wrong)?;
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        let known = nic.strip_prefix("eth").is_some_and(|number| number.parse::<u8>().is_ok());
        if prefix > longest || !known {
            return Err(wrong());
        }
        Ok(Address { nic: nic.to_owned(), ip, prefix })
    }
}

impl Address {
    fn family(&self) -> &'static str {
        if self.ip.is_ipv4() { "-4" } else { "-6" }
    }

    /// The client's address on the same network of the segment, if it is the first of the two.
    fn gateway(&self) -> Option<&'static str> {
        match self.ip {
            IpAddr::V4(ip) => (ip.octets()[..2] == [10, 88]).then_some("10.88.0.254"),
            IpAddr::V6(ip) => (ip.segments()[..4] == [0xfd88, 0, 0, 0]).then_some("fd88::254"),
        }
    }
}

/// Makes the namespace, or removes it; one half made is removed again.
pub(crate) fn run(layout: &Layout, arguments: &PodNetArgs) -> Result<(), LabError> {
    check(arguments)?;
    if arguments.down {
        return remove(layout, arguments);
    }
    ip(layout, arguments.host, &["netns", "add", &arguments.name])?;
    make(layout, arguments).inspect_err(|_| {
        if let Err(error) = remove(layout, arguments) {
            eprintln!("and the half-made namespace could not be removed: {error}");
        }
    })
}

fn check(arguments: &PodNetArgs) -> Result<(), LabError> {
    let refused = |reason: String| LabError::PodNetwork { name: arguments.name.clone(), reason };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let name = &arguments.name;
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(plain) || name.starts_with('-') {
        return Err(refused(format!("use a name of 1 to {NAME_MAX} letters, digits and `-`")));
    }
    let nics: Vec<String> = nics(arguments).collect();
    match arguments.addresses.iter().find(|address| !nics.contains(&address.nic)) {
        Some(Address { nic, ip, .. }) => {
            Err(refused(format!("{ip} is for {nic}, and there are {} interfaces; give --nics", nics.len())))
        }
        None => Ok(()),
    }
}

fn nics(arguments: &PodNetArgs) -> impl Iterator<Item = String> {
    (0..arguments.nics).map(|number| format!("eth{number}"))
}

/// The host's end of interface `number`.
fn port(name: &str, number: usize) -> String {
    format!("{name}-{number}")
}

fn make(layout: &Layout, arguments: &PodNetArgs) -> Result<(), LabError> {
    let PodNetArgs { host, name, mtu, .. } = arguments;
    let on_host = |words: &str| ip(layout, *host, &words.split_whitespace().collect::<Vec<_>>());
    let inside = |words: &str| on_host(&format!("-n {name} {words}"));
    inside("link set lo up")?;
    if arguments.silent {
        // Without the rule that leads to the table of its own addresses, nothing is addressed to it.
        inside("-4 rule del pref 0")?;
        // IPv6 looks at its rules at all only when one was added.
        inside("-6 rule add pref 40000 lookup main")?;
        inside("-6 rule del pref 0")?;
    }
    for (number, nic) in nics(arguments).enumerate() {
        let port = port(name, number);
        match arguments.style {
            Style::Macvlan => {
                on_host(&format!("link add {port} link {POD_BRIDGE} mtu {mtu} type macvlan mode bridge"))?;
                on_host(&format!("link set {port} name {nic} netns {name}"))?;
            }
            Style::Bridge | Style::Ptp => {
                on_host(&format!(
                    "link add {port} mtu {mtu} type veth peer name {nic} mtu {mtu} netns {name}"
                ))?;
            }
        }
        match arguments.style {
            Style::Bridge => on_host(&format!("link set {port} master {POD_BRIDGE} up"))?,
            Style::Ptp => on_host(&format!("link set {port} up"))?,
            Style::Macvlan => {}
        }
        inside(&format!("link set {nic} up"))?;
        for address in arguments.addresses.iter().filter(|address| address.nic == nic) {
            match arguments.style {
                Style::Bridge | Style::Macvlan => on_segment(&inside, address)?,
                Style::Ptp => routed(layout, *host, &inside, address, &port)?,
            }
        }
    }
    Ok(())
}

type Ip<'a> = &'a dyn Fn(&str) -> Result<(), LabError>;

/// An address on the segment itself. Nobody is asked for a duplicate, and nobody is told: the same address
/// may still be at work on the other host.
fn on_segment(inside: Ip<'_>, address: &Address) -> Result<(), LabError> {
    let Address { nic, ip, prefix } = address;
    let nodad = if ip.is_ipv4() { "" } else { " nodad" };
    inside(&format!("addr add {ip}/{prefix} dev {nic}{nodad}"))?;
    match address.gateway() {
        Some(gateway) => {
            inside(&format!("{} route replace default via {gateway} dev {nic}", address.family()))
        }
        None => Ok(()),
    }
}

/// An address behind the host, which answers for it on the segment.
fn routed(
    layout: &Layout,
    host: HostName,
    inside: Ip<'_>,
    address: &Address,
    port: &str,
) -> Result<(), LabError> {
    let on_host = |words: &str| ip(layout, host, &words.split_whitespace().collect::<Vec<_>>());
    let Address { nic, ip: own, .. } = address;
    let family = address.family();
    let (longest, gateway, nodad) =
        if own.is_ipv4() { (32, "169.254.1.1", "") } else { (128, "fe80::1", " nodad") };
    inside(&format!("addr add {own}/{longest} dev {nic}{nodad}"))?;
    on_host(&format!("addr replace {gateway}/{longest} dev {port}{nodad}"))?;
    if own.is_ipv4() {
        inside(&format!("route replace {gateway} dev {nic} scope link"))?;
    }
    inside(&format!("{family} route replace default via {gateway} dev {nic}"))?;
    on_host(&format!("{family} route replace {own}/{longest} dev {port}"))?;
    forward(layout, host)?;
    on_host(&format!("neigh replace proxy {own} dev {POD_BRIDGE}"))
}

/// A host forwards, and answers for what it forwards to, only when told.
fn forward(layout: &Layout, host: HostName) -> Result<(), LabError> {
    let mut shell = Command::new("sh");
    shell.args([
        "-ec",
        "cd /proc/sys/net; for key in ipv4/ip_forward ipv6/conf/all/forwarding ipv6/conf/all/proxy_ndp; do echo 1 >$key; done",
    ]);
    run_in_host(layout, host, shell, IP_WAIT).map(drop)
}

fn remove(layout: &Layout, arguments: &PodNetArgs) -> Result<(), LabError> {
    let PodNetArgs { host, name, .. } = arguments;
    // By itself it would go with the namespace, which a machine that holds a tap of it keeps alive.
    for number in 0..8 {
        let _ = ip(layout, *host, &["link", "del", &port(name, number)]);
    }
    ip(layout, *host, &["netns", "del", name])
}

/// `ip` among a host's processes: its `/run/netns` is the host's own.
fn ip(layout: &Layout, host: HostName, arguments: &[&str]) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    command.args(arguments);
    run_in_host(layout, host, command, IP_WAIT).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_their_interface_or_mean_the_first() {
        let parse = |text: &str| text.parse::<Address>();
        let first = parse("10.88.0.5/16").expect("an address");
        assert_eq!((first.nic.as_str(), first.gateway()), ("eth0", Some("10.88.0.254")));
        let second = parse("eth1=fd89::5/64").expect("an address");
        assert_eq!((second.nic.as_str(), second.prefix, second.gateway()), ("eth1", 64, None));
        assert_eq!(parse("fd88::5/64").expect("an address").gateway(), Some("fd88::254"));
        for text in ["10.88.0.5", "10.88.0.5/33", "fd88::5/129", "br0=10.88.0.5/16", "eth1=", "x/8"] {
            assert!(parse(text).unwrap_err().contains(text), "{text}");
        }
    }
}
