//! On real namespaces, with veths for NICs and `sleep` for a sandbox's init. Without root each case says so loudly and
//! does nothing.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use dunlin_bridge::message::{IpConfig, Neighbor, NetworkAdapter, Route};
use dunlin_net::{Handle, Interface, Namespace, Wanted, configure, view};
use serde_json::json;

use super::*;

const MAC: &str = "52-54-00-00-00-01";

/// A guest's own namespace, the network behind its NICs, and a pod.
struct Bench {
    networks: Networks,
    own: Handle,
    outside: Namespace,
    far: Handle,
    dir: tempfile::TempDir,
}

/// A process in a network namespace of its own.
struct Init(Child, Namespace);

impl Init {
    fn start() -> Init {
        let namespace = Namespace::fresh().unwrap();
        let child = namespace.run(|| Command::new("sleep").arg("100").spawn().unwrap()).unwrap();
        Init(child, namespace)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    async fn interface(&self, name: &str) -> Option<Interface> {
        let found = view::interfaces(&self.1.netlink().unwrap()).await.unwrap();
        found.into_iter().find(|interface| interface.name == name)
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn skip() -> bool {
    let skip = !nix::unistd::geteuid().is_root();
    if skip {
        eprintln!("SKIPPED: this needs root, to make network namespaces");
    }
    skip
}

impl Bench {
    fn new() -> Bench {
        let (own, outside) = (Namespace::fresh().unwrap(), Namespace::fresh().unwrap());
        let (ours, far) = (own.netlink().unwrap(), outside.netlink().unwrap());
        let dir = tempfile::tempdir().unwrap();
        Bench { networks: Networks::new(own), own: ours, outside, far, dir }
    }

    /// Plugs a NIC in, whose cable ends in the network outside with these addresses.
    async fn plug(&self, mac: &str, far: &[&str]) {
        let peer = format!("p{}", &mac[15..]);
        let address = mac.replace('-', ":");
        let line = format!("link add name eth{}x type veth peer name {peer}", &mac[15..]);
        ip(&self.networks.shared.own, &line);
        ip(&self.networks.shared.own, &format!("link set {peer} mtu 9000"));
        ip(&self.networks.shared.own, &format!("link set eth{}x address {address}", &mac[15..]));
        let mut links = view::interfaces(&self.own).await.unwrap().into_iter();
        let index = links.find(|link| link.name == peer).unwrap().index;
        configure::move_to(&self.own, index, &self.outside).await.unwrap();
        let mut links = view::interfaces(&self.far).await.unwrap().into_iter();
        let index = links.find(|link| link.name == peer).unwrap().index;
        let wanted =
            Wanted { addresses: far.iter().map(|net| net.parse().unwrap()).collect(), ..Wanted::default() };
        configure::apply(&self.far, index, &wanted).await.unwrap();
    }

    async fn attach(&self, key: &str, container: &str, init: &Init) -> Result<(), NetworkError> {
        let id = ContainerId::parse(container).unwrap();
        let spec = json!({"windows": {"network": {"networkNamespace": key}}});
        self.networks.attach(&NamespaceKey::of(&spec, &id), &id, self.dir.path(), init.pid()).await
    }

    /// Whether a client outside reaches a server in the pod.
    fn reaches(&self, init: &Init, address: &str) -> bool {
        let Ok(listener) = init.1.run(|| TcpListener::bind((address, 0))).unwrap() else { return false };
        let address = listener.local_addr().unwrap();
        self.outside.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)).is_ok()).unwrap()
    }

    async fn in_own(&self, mac: &str) -> Option<Interface> {
        let mac = mac.split('-').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect::<Vec<_>>();
        view::interfaces(&self.own).await.unwrap().into_iter().find(|link| link.mac == *mac)
    }
}

fn ip(namespace: &Namespace, line: &str) {
    let run = || Command::new("ip").args(line.split(' ')).status().unwrap();
    assert!(namespace.run(run).unwrap().success(), "ip {line}");
}

fn nic(id: &str, mac: &str, addresses: &[(&str, u8)]) -> NetworkAdapter {
    let config =
        |(address, bits): &(&str, u8)| IpConfig { ip_address: (*address).into(), prefix_length: *bits };
    NetworkAdapter {
        namespace_id: "Pod-NS".into(),
        id: id.into(),
        mac_address: mac.into(),
        ip_configs: addresses.iter().map(config).collect(),
        ..Default::default()
    }
}

fn route(destination: &str, hop: &str) -> Route {
    Route { destination_prefix: destination.into(), next_hop: hop.into(), ..Default::default() }
}

#[tokio::test]
async fn a_nic_waits_for_its_sandbox_and_is_readdressed_and_removed() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    let far = ["10.1.2.1/24", "fd00:1::1/64", "10.66.0.1/24", "fd00:66::1/64"];
    bench.plug(MAC, &far).await;
    let adapter = NetworkAdapter {
        routes: vec![route("0.0.0.0/0", "10.1.2.1"), route("::/0", "fd00:1::1")],
        dunlin_name: "eth0".into(),
        dunlin_mtu: 1400,
        dunlin_neighbors: vec![Neighbor {
            ip_address: "10.1.2.99".into(),
            mac_address: "02:00:00:00:00:99".into(),
        }],
        dns_suffix: "pod.example".into(),
        dns_server_list: "10.1.2.53".into(),
        ..nic("NIC-1", MAC, &[("10.1.2.3", 24), ("fd00:1::3", 64)])
    };
    bench.networks.add(&adapter).await.unwrap();
    assert!(!bench.in_own(MAC).await.unwrap().up, "a NIC without a pod is down");
    assert!(matches!(bench.networks.add(&adapter).await, Err(NetworkError::Exists(_))));
    let twin = nic("other", MAC, &[]);
    assert!(matches!(bench.networks.add(&twin).await, Err(NetworkError::SameMac { .. })));

    let init = Init::start();
    bench.attach("pod-ns", "box", &init).await.unwrap();
    let found = init.interface("eth0").await.unwrap();
    assert_eq!((found.mtu, found.up, found.addresses.len()), (1400, true, 2));
    assert_eq!((found.routes.len(), found.neighbours.len()), (2, 1), "{found:?}");
    assert!(bench.in_own(MAC).await.is_none());
    assert!(bench.reaches(&init, "10.1.2.3") && bench.reaches(&init, "fd00:1::3"));
    let resolv = std::fs::read_to_string(bench.dir.path().join("resolv.conf")).unwrap();
    assert_eq!(resolv, "search pod.example\nnameserver 10.1.2.53\n");
    let second = bench.attach("POD-ns", "box2", &init).await.unwrap_err();
    assert!(matches!(second, NetworkError::Taken { .. }), "{second}");

    // As after a move: another id, the same MAC, other addresses.
    let update = NetworkAdapter {
        routes: vec![route("0.0.0.0/0", "10.66.0.1")],
        ..nic("nic-of-b", MAC, &[("10.66.0.7", 24), ("fd00:66::7", 64)])
    };
    bench.networks.update(&update).await.unwrap();
    let found = init.interface("eth0").await.unwrap();
    let addresses: Vec<_> = found.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.66.0.7/24", "fd00:66::7/64"]);
    assert_eq!((found.mtu, found.routes.len(), found.neighbours.len()), (1400, 1, 0));
    assert!(bench.reaches(&init, "10.66.0.7") && bench.reaches(&init, "fd00:66::7"));
    assert!(!bench.reaches(&init, "10.1.2.3"));
    let unknown = bench.networks.update(&NetworkAdapter { namespace_id: "x".into(), ..update.clone() }).await;
    assert_eq!(unknown.unwrap_err().hresult(), 0x8007_0490);
    let unknown = bench.networks.update(&nic("nobody", "52-54-00-00-00-77", &[])).await.unwrap_err();
    assert_eq!(unknown.hresult(), 0x8007_0490);

    bench.networks.remove(&nic("NIC-OF-B", "", &[])).await.unwrap();
    assert!(init.interface("eth0").await.is_none());
    assert!(!bench.in_own(MAC).await.unwrap().up);
    bench.networks.remove(&nic("NIC-OF-B", "", &[])).await.unwrap();
    bench.networks.add(&adapter).await.unwrap();
    bench.networks.remove(&nic("as another host calls it", MAC, &[])).await.unwrap();
    assert!(init.interface("eth0").await.is_none());
    bench.networks.add(&adapter).await.unwrap();
    assert!(bench.reaches(&init, "10.1.2.3"), "an adapter that comes to a live pod is configured at once");
}

#[tokio::test]
async fn a_live_pod_gets_nics_that_are_still_being_plugged_in() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    let init = Init::start();
    bench.attach("pod-ns", "box", &init).await.unwrap();
    let late = async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        bench.plug(MAC, &["10.1.2.1/24"]).await;
    };
    let first = nic("a", MAC, &[("10.1.2.3", 24)]);
    let (added, ()) = tokio::join!(bench.networks.add(&first), late);
    added.unwrap();
    bench.plug("52-54-00-00-00-02", &["fd00:2::1/64"]).await;
    // No address but what the link makes of itself.
    bench.networks.add(&nic("b", "52:54:00:00:00:02", &[])).await.unwrap();
    let (one, two) = (init.interface("eth0").await.unwrap(), init.interface("eth1").await.unwrap());
    assert_eq!((one.up, one.addresses.len(), two.up, two.addresses.len()), (true, 1, true, 0));
    assert!(bench.reaches(&init, "10.1.2.3"));
    assert!(!bench.dir.path().join("resolv.conf").exists(), "no word of DNS, no file");

    let started = Instant::now();
    let missing = bench.networks.add(&nic("c", "52-54-00-00-00-03", &[])).await.unwrap_err();
    assert!(matches!(missing, NetworkError::Missing { seconds: 5, .. }), "{missing}");
    assert!(started.elapsed() >= Duration::from_secs(5));
    bench.networks.remove(&nic("c", "", &[])).await.unwrap();
}

#[tokio::test]
async fn nics_outlive_their_pod() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    bench.plug(MAC, &["10.1.2.1/24"]).await;
    bench.networks.add(&nic("a", MAC, &[("10.1.2.3", 24)])).await.unwrap();
    let first = Init::start();
    bench.attach("pod-ns", "first", &first).await.unwrap();
    drop(first);
    bench.networks.release(&ContainerId::parse("first").unwrap()).await;
    let back = bench.in_own(MAC).await.unwrap();
    assert_eq!((back.up, back.addresses.len()), (false, 0));
    let second = Init::start();
    bench.attach("pod-ns", "second", &second).await.unwrap();
    assert!(bench.reaches(&second, "10.1.2.3"));
    bench.networks.release(&ContainerId::parse("first").unwrap()).await;
    assert!(bench.reaches(&second, "10.1.2.3"), "only its own container releases a namespace");
    // Unplugged under the pod's hands.
    ip(&second.1, "link del eth0");
    bench.networks.remove(&nic("A", "", &[])).await.unwrap();
    bench.networks.release(&ContainerId::parse("second").unwrap()).await;
    assert!(bench.networks.shared.pods.lock().await.is_empty());
}

#[tokio::test]
async fn a_pod_that_cannot_have_its_network_leaves_the_nic_where_it_was() {
    if skip() {
        return;
    }
    let bench = Bench::new();
    bench.plug(MAC, &["10.1.2.1/24"]).await;
    let from_elsewhere = Route { dunlin_source: "192.0.2.1".into(), ..route("10.7.0.0/16", "10.1.2.1") };
    let wrong = NetworkAdapter { routes: vec![from_elsewhere], ..nic("a", MAC, &[("10.1.2.3", 24)]) };
    bench.networks.add(&wrong).await.unwrap();
    let init = Init::start();
    let error = bench.attach("pod-ns", "box", &init).await.unwrap_err();
    assert!(error.to_string().contains("route 10.7.0.0/16 through 10.1.2.1"), "{error}");
    assert!(!bench.in_own(MAC).await.unwrap().up);
    bench.networks.update(&nic("a", MAC, &[("10.1.2.3", 24)])).await.unwrap();
    bench.attach("pod-ns", "box", &init).await.unwrap();
    assert!(bench.reaches(&init, "10.1.2.3"));
}
