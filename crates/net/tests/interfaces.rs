//! Real namespaces with veth pairs in them, read and configured. The machine's own namespace is never touched.
//! Without root each case says so loudly and does nothing.

use std::net::IpAddr;
use std::path::Path;

use dunlin_net::configure::{self, Wanted};
use dunlin_net::{Handle, Interface, Namespace, Neighbour, NetError, Route, view};
use ipnet::IpNet;
use rtnetlink::LinkVeth;

/// A namespace with interfaces whose other ends are in a second one.
struct Bench {
    here: Namespace,
    there: Namespace,
    ours: Handle,
    theirs: Handle,
}

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: this needs root, to make network namespaces");
    }
    root
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn route(destination: &str, gateway: Option<&str>) -> Route {
    Route { destination: net(destination), gateway: gateway.map(ip), source: None, metric: 0, on_link: false }
}

impl Bench {
    async fn new(names: &[&str]) -> Bench {
        let (here, there) = (Namespace::fresh().unwrap(), Namespace::fresh().unwrap());
        let (ours, theirs) = (here.netlink().unwrap(), there.netlink().unwrap());
        for name in names {
            let peer = format!("p-{name}");
            ours.link().add(LinkVeth::new(name, &peer).build()).execute().await.unwrap();
            let index = index_of(&ours, &peer).await;
            configure::move_to(&ours, index, &there).await.unwrap();
            let index = index_of(&theirs, &peer).await;
            configure::apply(&theirs, index, &Wanted::default()).await.unwrap();
        }
        Bench { here, there, ours, theirs }
    }

    async fn find(&self, name: &str) -> Interface {
        find(&self.ours, name).await
    }

    async fn apply(&self, name: &str, wanted: &Wanted) -> Result<(), NetError> {
        configure::apply(&self.ours, index_of(&self.ours, name).await, wanted).await
    }

    fn ip(&self, arguments: &str) {
        command(&self.here, arguments);
    }
}

fn command(namespace: &Namespace, arguments: &str) {
    let status = namespace
        .run(|| std::process::Command::new("ip").args(arguments.split_whitespace()).status().unwrap())
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

async fn find(handle: &Handle, name: &str) -> Interface {
    let found = view::interfaces(handle).await.unwrap();
    found.into_iter().find(|interface| interface.name == name).unwrap_or_else(|| panic!("no {name}"))
}

async fn index_of(handle: &Handle, name: &str) -> u32 {
    find(handle, name).await.index
}

#[test]
fn what_is_no_network_namespace_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Namespace::open(&dir.path().join("none")).unwrap_err();
    assert!(matches!(missing, NetError::Open { .. }), "{missing}");
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for other in [dir.path(), &plain, &dir.path().join("fifo"), Path::new("/proc/self/ns/uts")] {
        let error = Namespace::open(other).unwrap_err();
        assert!(matches!(error, NetError::NoNamespace { .. }), "{error}");
        assert!(error.to_string().contains("/run/netns/NAME"), "{error}");
    }
    let own = Namespace::own().unwrap();
    assert_eq!(own.id(), Namespace::of_pid(std::process::id().cast_signed()).unwrap().id());
}

#[tokio::test]
async fn work_is_done_inside_and_the_caller_stays_where_it_is() {
    if !root() {
        return;
    }
    let before = Namespace::own().unwrap().id();
    let fresh = Namespace::fresh().unwrap();
    assert_eq!(fresh.run(|| Namespace::own().unwrap().id()).unwrap(), fresh.id());
    assert_ne!(fresh.id(), before);
    let names: Vec<_> = view::interfaces(&fresh.netlink().unwrap()).await.unwrap();
    assert_eq!(names.iter().map(|interface| interface.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    assert_eq!((names[0].mac, names[0].up, names[0].addresses.len()), ([0; 6], false, 0));
    assert!(matches!(fresh.run(|| panic!("on purpose")), Err(NetError::Panicked { .. })));
    assert_eq!(Namespace::own().unwrap().id(), before);
}

#[tokio::test]
async fn a_connection_ends_with_its_handles() {
    if !root() {
        return;
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let fresh = Namespace::fresh().unwrap();
    let before = open();
    for _ in 0..50 {
        let handle = fresh.netlink().unwrap();
        view::interfaces(&handle).await.unwrap();
    }
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    // Other cases of this program open and close descriptors too.
    assert!(open() < before + 40, "{before} descriptors became {}", open());
}

#[tokio::test]
async fn both_families_two_interfaces_and_what_was_there_goes() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["net1", "eth0"]).await;
    bench.ip("addr add 192.0.2.9/24 dev eth0");
    bench.ip("addr add 10.1.2.77/24 dev eth0");
    bench.ip("addr add 2001:db8:9::9/64 dev eth0 nodad");
    bench.ip("link set eth0 up");
    bench.ip("route add 198.51.100.0/24 via 192.0.2.1");
    let wanted = Wanted {
        name: None,
        mtu: Some(1400),
        addresses: ["10.1.2.3/24", "10.9.0.1/32", "10.1.2.4/24", "fd00:1::3/64", "fd00:1::1/64"]
            .map(net)
            .into(),
        routes: vec![
            Route { metric: 1024, ..route("::/0", Some("fd00:1::ff")) },
            route("0.0.0.0/0", Some("10.1.2.1")),
            Route { metric: 77, source: Some(ip("10.9.0.1")), ..route("10.7.0.0/16", None) },
            Route { metric: 30, ..route("10.8.0.0/16", Some("10.1.2.1")) },
        ],
        neighbours: vec![
            Neighbour { address: ip("10.1.2.1"), mac: [2, 0, 0, 0, 0, 1] },
            Neighbour { address: ip("fd00:1::ff"), mac: [2, 0, 0, 0, 0, 2] },
        ],
    };
    for round in 0..2 {
        bench.apply("eth0", &wanted).await.unwrap();
        let found = bench.find("eth0").await;
        assert_eq!((found.mtu, found.up, found.kind.as_deref()), (1400, true, Some("veth")), "round {round}");
        assert_eq!(found.addresses, wanted.addresses, "round {round}");
        let (mut got, mut asked) = (found.routes.clone(), wanted.routes.clone());
        got.sort();
        asked.sort();
        assert_eq!(got, asked, "round {round}");
        assert_eq!(found.neighbours, wanted.neighbours, "round {round}");
        assert_ne!(found.mac, [0; 6]);
    }
    let second = Wanted {
        mtu: Some(9000),
        addresses: vec![net("172.20.0.5/16"), net("fd00:2::5/64")],
        ..Wanted::default()
    };
    bench.apply("net1", &second).await.unwrap();
    let all = view::interfaces(&bench.ours).await.unwrap();
    let names: Vec<_> = all.iter().map(|interface| interface.name.as_str()).collect();
    assert_eq!(names, ["eth0", "lo", "net1"]);
    assert_eq!((all[2].mtu, &all[2].addresses), (9000, &second.addresses));
    assert_eq!((all[2].routes.len(), all[0].routes.len()), (0, 4));

    let text = serde_json::to_string(&all[0]).unwrap();
    assert_eq!(serde_json::from_str::<Interface>(&text).unwrap(), all[0]);

    bench.apply("eth0", &Wanted::default()).await.unwrap();
    let bare = bench.find("eth0").await;
    assert_eq!((bare.addresses, bare.routes, bare.neighbours), (vec![], vec![], vec![]));
    assert_eq!(bare.mtu, 1400);
}

/// As a pod that gets other addresses: its default route leaves one interface for another, in whichever order they come.
#[tokio::test]
async fn a_default_route_changes_its_interface() {
    if !root() {
        return;
    }
    let with = |host: u8, routes: bool| Wanted {
        addresses: vec![net(&format!("10.{host}.0.2/24")), net(&format!("fd00:{host}::2/64"))],
        routes: if routes {
            let v6 = route("::/0", Some(&format!("fd00:{host}::1")));
            vec![route("0.0.0.0/0", Some(&format!("10.{host}.0.1"))), Route { metric: 1024, ..v6 }]
        } else {
            Vec::new()
        },
        ..Wanted::default()
    };
    for order in [["eth0", "eth1"], ["eth1", "eth0"]] {
        let bench = Bench::new(&["eth0", "eth1"]).await;
        bench.apply("eth0", &with(1, false)).await.unwrap();
        bench.apply("eth1", &with(2, true)).await.unwrap();
        for name in order {
            bench.apply(name, &if name == "eth0" { with(3, true) } else { with(4, false) }).await.unwrap();
        }
        let mut found = bench.find("eth0").await.routes;
        found.sort();
        let mut wanted = with(3, true).routes;
        wanted.sort();
        assert_eq!(found, wanted, "{order:?}");
        assert_eq!(bench.find("eth1").await.routes, [], "{order:?}");
        // Both may have one; applied again, nothing changes.
        for _ in 0..2 {
            bench.apply("eth0", &with(3, true)).await.unwrap();
            bench.apply("eth1", &with(4, true)).await.unwrap();
        }
        assert_eq!((bench.find("eth0").await.routes.len(), bench.find("eth1").await.routes.len()), (2, 2));
    }
}

#[tokio::test]
async fn a_gateway_outside_of_every_subnet() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0"]).await;
    // As Calico leaves it: the gateway has a route of its own.
    let mut wanted = Wanted {
        addresses: vec![net("10.1.2.3/32"), net("fd00::3/128")],
        routes: vec![
            route("0.0.0.0/0", Some("169.254.1.1")),
            route("169.254.1.1/32", None),
            Route { metric: 1024, ..route("fd00:ffff::1/128", None) },
            Route { metric: 1024, ..route("::/0", Some("fd00:ffff::1")) },
        ],
        ..Wanted::default()
    };
    bench.apply("eth0", &wanted).await.unwrap();
    let mut found = bench.find("eth0").await;
    found.routes.sort();
    wanted.routes.sort();
    assert_eq!(found.routes, wanted.routes);
    // Without one, the gateway is taken to be on the link.
    wanted.routes.retain(|route| route.gateway.is_some());
    bench.apply("eth0", &Wanted::default()).await.unwrap();
    bench.apply("eth0", &wanted).await.unwrap();
    let found = bench.find("eth0").await;
    assert_eq!(found.routes.len(), 2, "{:?}", found.routes);
    assert!(found.routes.iter().all(|route| route.on_link), "{:?}", found.routes);
    // And what was read so can be asked for again.
    let again = Wanted { addresses: found.addresses, routes: found.routes.clone(), ..Wanted::default() };
    bench.apply("eth0", &Wanted::default()).await.unwrap();
    bench.apply("eth0", &again).await.unwrap();
    assert_eq!(bench.find("eth0").await.routes, found.routes);
}

/// The ptp plugin takes the kernel's own route to the subnet away and leads the subnet through the gateway.
#[tokio::test]
async fn a_subnet_behind_its_own_gateway_moves_as_it_is() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0", "eth1"]).await;
    for line in [
        "addr add 10.5.0.7/24 dev eth0",
        "link set eth0 up",
        "route del 10.5.0.0/24 dev eth0",
        "route add 10.5.0.1 dev eth0 scope link src 10.5.0.7",
        "route add 10.5.0.0/24 via 10.5.0.1 dev eth0 src 10.5.0.7",
        "route add default via 10.5.0.1 dev eth0",
    ] {
        bench.ip(line);
    }
    let read = bench.find("eth0").await;
    assert_eq!(read.routes.len(), 3, "{:?}", read.routes);
    bench.ip("link set eth0 down");
    bench.ip("addr flush dev eth0");
    let wanted = Wanted { addresses: read.addresses, routes: read.routes.clone(), ..Wanted::default() };
    bench.apply("eth1", &wanted).await.unwrap();
    let (mut got, mut asked) = (bench.find("eth1").await.routes, read.routes);
    got.sort();
    asked.sort();
    assert_eq!(got, asked);
    // The kernel's route comes back when nothing stands for it any more.
    let plain = Wanted { addresses: wanted.addresses, ..Wanted::default() };
    bench.apply("eth1", &Wanted::default()).await.unwrap();
    bench.apply("eth1", &plain).await.unwrap();
    assert_eq!(bench.find("eth1").await.routes, []);
    let shown =
        bench.here.run(|| std::process::Command::new("ip").args(["route"]).output().unwrap()).unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.starts_with("10.5.0.0/24 dev eth1 proto kernel"), "{shown}");
}

#[tokio::test]
async fn an_interface_moves_under_a_name_and_is_renamed_while_it_is_up() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0", "net1"]).await;
    bench.ip("link set eth0 up");
    let wanted =
        Wanted { name: Some("wan0".into()), addresses: vec![net("10.0.0.1/8")], ..Wanted::default() };
    bench.apply("eth0", &wanted).await.unwrap();
    let renamed = bench.find("wan0").await;
    assert_eq!((renamed.up, renamed.addresses), (true, wanted.addresses));
    let clash = Wanted { name: Some("net1".into()), ..Wanted::default() };
    let error = bench.apply("wan0", &clash).await.unwrap_err();
    assert_eq!(error.errno(), Some(nix::libc::EEXIST), "{error}");
    assert!(error.to_string().contains("rename interface"), "{error}");

    let third = Namespace::fresh().unwrap();
    configure::move_as(&bench.ours, renamed.index, &third, "eth0").await.unwrap();
    let moved = find(&third.netlink().unwrap(), "eth0").await;
    assert_eq!((moved.mac, moved.addresses.len()), (renamed.mac, 0));
    let error = configure::move_to(&bench.ours, 4242, &third).await.unwrap_err();
    assert_eq!(error.errno(), Some(nix::libc::ENODEV), "{error}");
}

#[tokio::test]
async fn what_was_configured_carries_packets() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0"]).await;
    let near = Wanted {
        mtu: Some(9000),
        addresses: vec![net("10.1.2.3/24"), net("fd00:1::3/64")],
        ..Wanted::default()
    };
    bench.apply("eth0", &near).await.unwrap();
    let far = Wanted {
        mtu: Some(9000),
        addresses: vec![net("10.1.2.1/24"), net("fd00:1::1/64")],
        ..Wanted::default()
    };
    configure::apply(&bench.theirs, index_of(&bench.theirs, "p-eth0").await, &far).await.unwrap();
    for address in ["10.1.2.1:0", "[fd00:1::1]:0"] {
        let listener = bench.there.run(|| std::net::TcpListener::bind(address).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let stream = bench.here.run(|| {
            std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(5)).unwrap()
        });
        assert_eq!(stream.unwrap().peer_addr().unwrap(), address);
    }
}

#[tokio::test]
async fn odd_interfaces_addresses_and_routes_are_read_for_what_they_are() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0", "eth1"]).await;
    let optional = |line: &str| {
        let run = || std::process::Command::new("ip").args(line.split(' ')).output().unwrap();
        let made = bench.here.run(run).unwrap().status.success();
        if !made {
            eprintln!("this kernel has no `ip {line}`");
        }
        made
    };
    for line in [
        "tuntap add tun0 mode tun",
        "link add br0 type bridge",
        "link add vx0 type vxlan id 5 dstport 4789",
        "link add ifb7 type ifb",
        "link add mac0 link eth0 type macvlan mode bridge",
        "link add ipip7 type ipip local 10.0.0.1 remote 10.0.0.2",
        "link add sit7 type sit local 10.0.0.1 remote 10.0.0.2",
        "link add vlan7 link eth0 type vlan id 7",
    ] {
        optional(line);
    }
    for line in [
        "link set eth0 up",
        "link set eth1 up",
        "link set tun0 up",
        "addr add 10.0.0.1/24 dev eth0",
        "addr add 10.0.1.1/24 dev eth1",
        "addr add 10.3.0.1 peer 10.3.0.2/32 dev tun0",
        "addr add 127.0.0.5/8 dev eth0",
        "addr add fe80::77/64 dev eth0",
        "route add 10.4.0.0/16 nexthop via 10.0.0.9 dev eth0 nexthop via 10.0.1.9 dev eth1",
        "route add 10.5.0.0/16 via inet6 fe80::9 dev eth0",
        "route add blackhole 10.6.0.0/16",
        "route add 10.7.0.0/16 via 10.0.0.9 table 100",
        "route add 10.8.0.0/16 tos 0x10 via 10.0.0.9",
        "route add unreachable fd00:bad::/64",
        "neigh add 10.0.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud stale",
    ] {
        bench.ip(line);
    }
    let all = view::interfaces(&bench.ours).await.unwrap();
    let by_name = |name: &str| all.iter().find(|interface| interface.name == name).unwrap();
    let (eth0, eth1, tun0) = (by_name("eth0"), by_name("eth1"), by_name("tun0"));
    assert_eq!((tun0.mac, tun0.kind.as_deref(), tun0.up), ([0; 6], Some("tun"), true));
    assert_eq!(tun0.addresses, [net("10.3.0.1/32")]);
    assert_eq!(tun0.routes[0].destination, net("10.3.0.2/32"));
    assert_eq!(eth0.addresses, [net("10.0.0.1/24")]);
    assert_eq!(eth0.neighbours, []);
    let mut routes = eth0.routes.clone();
    routes.sort();
    assert_eq!(routes, [route("10.4.0.0/16", Some("10.0.0.9")), route("10.5.0.0/16", Some("fe80::9"))]);
    assert_eq!(eth1.routes, [route("10.4.0.0/16", Some("10.0.1.9"))]);
    assert_eq!(by_name("br0").kind.as_deref(), Some("bridge"));
    // What was read of an interface, another can be.
    bench.ip("route del 10.5.0.0/16");
    bench.ip("route del 10.4.0.0/16");
    let wanted = Wanted {
        addresses: vec![net("10.0.0.1/24")],
        routes: vec![route("10.5.0.0/16", Some("fe80::9"))],
        ..Wanted::default()
    };
    bench.apply("eth1", &wanted).await.unwrap();
    assert_eq!(bench.find("eth1").await.routes, wanted.routes);
}

#[tokio::test]
async fn a_nic_is_found_by_its_address_before_what_is_on_it() {
    if !root() {
        return;
    }
    let bench = Bench::new(&["eth0"]).await;
    let mac = bench.find("eth0").await.mac;
    let text = dunlin_net::mac_text(mac);
    bench.ip("link add br0 type bridge");
    bench.ip(&format!("link set br0 address {text}"));
    let found = view::find_by_mac(&bench.ours, mac).await.unwrap().unwrap();
    assert_eq!(found.name, "eth0");
    assert_eq!(view::find_by_mac(&bench.ours, [2, 9, 9, 9, 9, 9]).await.unwrap(), None);
}
