//! NICs of a pod in a real machine: one that is there when it boots, one that is plugged in while the pod runs. Their
//! taps are in a namespace of the test's own, whose kernel is the network behind them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use dunlin_bridge::message::{IpConfig, Neighbor, NetworkAdapter, Route};
use dunlin_net::{Namespace, Wanted, configure, view};
use dunlin_qemu::accel::Accelerator;
use dunlin_qemu::{DiskSource, Document, HostPaths, LaunchOptions, MacAddress, Mode, Qemu, RootPort, Slot};
use serde_json::json;
use tokio::time::timeout;

use super::*;

const NAMESPACE: &str = "0E4A-ns";
const MACS: [&str; 2] = ["52:54:00:11:00:01", "52:54:00:11:00:02"];
/// What the pod serves: so many bytes that an MTU which only one side knows would hold them up.
const BYTES: usize = 4 << 20;

/// A tap with the far ends' addresses on it.
async fn tap(outside: &Namespace, name: &str, mtu: u32, addresses: &[&str]) -> OwnedFd {
    let tap = outside.run(|| {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: an ifreq is plain bytes, and all zero is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags =
            i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
        // SAFETY: the descriptor is open and the kernel reads and writes no more than this ifreq.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from(file)
    });
    let handle = outside.netlink().unwrap();
    let mut interfaces = view::interfaces(&handle).await.unwrap().into_iter();
    let index = interfaces.find(|interface| interface.name == name).unwrap().index;
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    let wanted = Wanted { mtu: Some(mtu), addresses, ..Wanted::default() };
    configure::apply(&handle, index, &wanted).await.unwrap();
    tap.unwrap()
}

fn nic(number: usize, mtu: u32, addresses: &[(&str, u8)]) -> NetworkAdapter {
    let config =
        |(address, bits): &(&str, u8)| IpConfig { ip_address: (*address).into(), prefix_length: *bits };
    NetworkAdapter {
        namespace_id: NAMESPACE.into(),
        id: format!("nic-{number}"),
        mac_address: MACS[number].into(),
        ip_configs: addresses.iter().map(config).collect(),
        dunlin_name: format!("eth{number}"),
        dunlin_mtu: mtu,
        ..Default::default()
    }
}

/// Fetches the pod's file; how many bytes came, and how long it took.
fn fetch(outside: &Namespace, address: &str) -> std::io::Result<(usize, Duration)> {
    let address: SocketAddr = address.parse().unwrap();
    let fetch = || {
        let begin = Instant::now();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /blob HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap_or(0) + 4;
        Ok((answer.len().saturating_sub(head), begin.elapsed()))
    };
    outside.run(fetch).unwrap()
}

async fn launch(dir: &Path) -> Qemu {
    let image = std::env::var_os("DUNLIN_IMAGE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/image"), PathBuf::from);
    let paths = HostPaths {
        kernel: Some(image.join("vmlinuz")),
        initramfs: Some(image.join("initramfs.cpio.lz4")),
        ..HostPaths::in_directory(dir)
    };
    let mut document = Document::new(uuid::Uuid::new_v4(), 1, 256);
    document.kernel_command_line = "console=ttyS0 quiet panic=-1".to_owned();
    let options = LaunchOptions::new("qemu-system-x86_64", Accelerator::Tcg, paths);
    let qemu = Qemu::spawn(&options, &document, Mode::Boot).await.unwrap();
    for (file, slot, read_only) in [("base.erofs", (0, 0), true), ("scratch.raw", (1, 5), false)] {
        let source = DiskSource { path: dir.join(file), read_only, direct: false };
        qemu.attach_disk(Slot::new(slot.0, slot.1).unwrap(), &source).await.unwrap();
    }
    qemu
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the guest image, QEMU, root and about 20 s"]
async fn a_pods_nics_carry_its_packets() {
    let dir = tempfile::tempdir().unwrap();
    disks(dir.path());
    let outside = Namespace::fresh().unwrap();
    let qemu = launch(dir.path()).await;
    let plug = async |number: u8, tap: OwnedFd| {
        let mac: MacAddress = MACS[usize::from(number)].parse().unwrap();
        qemu.attach_nic(RootPort::new(number).unwrap(), mac, tap).await.unwrap();
    };
    plug(0, tap(&outside, "tap0", 1400, &["10.1.2.1/24", "fd00:1::1/64", "10.66.0.1/24"]).await).await;
    let begin = Instant::now();
    qemu.cont().await.unwrap();

    let socket = dir.path().join("link.sock");
    let link = HostLink::connect(Endpoint::VirtioSerial { socket }).await.unwrap();
    let mut bridges = link.listen(BRIDGE_PORT).unwrap();
    print_logs(&link);
    link.start();
    let stream = timeout(LIMIT, bridges.accept()).await.expect("the guest does not dial the bridge").unwrap();
    let bridge = Bridge::new(1);
    assert!(bridge.attach(stream).await.unwrap().speaks_dunlin());
    println!("bridge negotiated after {:?}", begin.elapsed());
    let mut host = Host { link, bridge: bridge.clone(), next_port: 0x4000_0000, streams: Vec::new() };

    let begin = Instant::now();
    let first = NetworkAdapter {
        routes: vec![Route {
            destination_prefix: "0.0.0.0/0".into(),
            next_hop: "10.1.2.1".into(),
            ..Default::default()
        }],
        dunlin_neighbors: vec![Neighbor {
            ip_address: "10.1.2.99".into(),
            mac_address: "02:00:00:00:00:99".into(),
        }],
        dns_server_list: "10.1.2.53".into(),
        ..nic(0, 1400, &[("10.1.2.3", 24), ("fd00:1::3", 64)])
    };
    host.modify(Modification::add(Resource::Network(first))).await;
    println!("NIC that was there at boot: Add took {:?}", begin.elapsed());

    for resource in [disk(0, 0), disk(1, 5), layers("net")] {
        host.modify(Modification::add(resource)).await;
    }
    let count = BYTES >> 20;
    let serve = format!(
        "ip -o addr; dd if=/dev/zero of=/mem/blob bs=1M count={count} 2>/dev/null; exec httpd -f -p 7000 -h /mem"
    );
    let mut pod = config("net", &serve);
    pod.oci_specification["windows"] = json!({"network": {"networkNamespace": NAMESPACE.to_lowercase()}});
    let begin = Instant::now();
    bridge.create("net", &pod).await.unwrap();
    println!("the pod's creation with one NIC took {:?}", begin.elapsed());
    let (_, mut lines) = host.start("net").await;
    // The program's first words: what its network was when it began.
    let mut shown = String::new();
    let v6 = loop {
        let line =
            timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().expect("the pod's program ended");
        shown += &line;
        if line.contains("fd00:1::3/64") {
            break line;
        }
    };
    assert!(shown.contains("10.1.2.3/24"), "the program began without its network: {shown}");
    assert!(!v6.contains("tentative"), "{v6}");

    let mut waited = Instant::now();
    while fetch(&outside, "10.1.2.3:7000").is_err() {
        assert!(waited.elapsed() < LIMIT, "the pod cannot be reached");
    }
    waited = Instant::now();
    for address in ["10.1.2.3:7000", "[fd00:1::3]:7000"] {
        let (bytes, took) = fetch(&outside, address).unwrap();
        println!("{bytes} bytes from {address} in {took:?}");
        assert_eq!(bytes, BYTES, "after {:?}", waited.elapsed());
    }
    let (code, text) = host
        .exec_to_end(
            "net",
            sh("ip link show eth0; ip route; ip neigh; ip link show lo; cat /etc/resolv.conf"),
            None,
        )
        .await;
    println!("{text}");
    assert_eq!(code, 0);
    for part in
        ["mtu 1400", "default via 10.1.2.1 dev eth0", "10.1.2.99", "LOOPBACK,UP", "nameserver 10.1.2.53"]
    {
        assert!(text.contains(part), "{part} is not in: {text}");
    }

    println!("== hot-plug into a pod that runs");
    let second = tap(&outside, "tap1", 9000, &["10.2.2.1/24", "fd00:2::1/64"]).await;
    let begin = Instant::now();
    plug(1, second).await;
    let plugged = begin.elapsed();
    let adapter = nic(1, 9000, &[("10.2.2.3", 24), ("fd00:2::3", 64)]);
    host.modify(Modification::add(Resource::Network(adapter.clone()))).await;
    println!("hot-plug: attach_nic took {plugged:?}, attach_nic and Add {:?}", begin.elapsed());
    for address in ["10.2.2.3:7000", "[fd00:2::3]:7000"] {
        let (bytes, took) = fetch(&outside, address).unwrap();
        println!("{bytes} bytes from {address} in {took:?}");
        assert_eq!(bytes, BYTES);
    }
    let (_, text) = host.exec_to_end("net", sh("ip link show eth1"), None).await;
    assert!(text.contains("mtu 9000"), "{text}");

    println!("== other addresses");
    let begin = Instant::now();
    let update = Modification::update(Resource::Network(nic(0, 0, &[("10.66.0.7", 24)])));
    host.modify(update).await;
    println!("Update took {:?}", begin.elapsed());
    assert_eq!(fetch(&outside, "10.66.0.7:7000").unwrap().0, BYTES);
    assert!(fetch(&outside, "10.1.2.3:7000").is_err());

    println!("== unplugged");
    host.modify(Modification::remove(Resource::Network(adapter))).await;
    let (_, text) = host.exec_to_end("net", sh("ip link show"), None).await;
    assert!(text.contains("eth0") && !text.contains("eth1"), "{text}");
    let begin = Instant::now();
    qemu.detach_nic(RootPort::new(1).unwrap(), Duration::from_secs(20)).await.unwrap();
    println!("detach_nic took {:?}", begin.elapsed());

    println!("== the pod ends, and another one of its namespace gets the NIC");
    bridge.shutdown_forced("net").await.unwrap();
    host.modify(Modification::remove(layers("net"))).await;
    bridge.delete_state("net").await.unwrap();
    assert!(fetch(&outside, "10.66.0.7:7000").is_err());
    host.modify(Modification::add(layers("net2"))).await;
    let mut pod = config("net2", &serve);
    pod.oci_specification["windows"] = json!({"network": {"networkNamespace": NAMESPACE}});
    bridge.create("net2", &pod).await.unwrap();
    let _ = host.start("net2").await;
    let begin = Instant::now();
    while fetch(&outside, "10.66.0.7:7000").map(|(bytes, _)| bytes).unwrap_or_default() != BYTES {
        assert!(begin.elapsed() < LIMIT, "the next pod cannot be reached");
    }
    bridge.shutdown_forced("net2").await.unwrap();
    host.modify(Modification::remove(layers("net2"))).await;
    bridge.delete_state("net2").await.unwrap();
    let console = std::fs::read_to_string(dir.path().join("console.log")).unwrap();
    println!("--- console ---\n{console}---------------");
    for word in ["Oops", "BUG:", "Call Trace", "WARNING:"] {
        assert!(!console.contains(word), "the guest's kernel says {word}");
    }
    qemu.shutdown(Duration::from_secs(5)).await.unwrap();
}
