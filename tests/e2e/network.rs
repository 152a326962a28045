//! Connections of a pod with a client outside both hosts, while the pod moves.

mod rates;

use std::{
    env, fs,
    path::PathBuf,
    process::Child,
    time::{Duration, Instant},
};

use dunlin_tests::{
    Bulk, Container, Echo, Host, Lab, PodNet, Run,
    network::{answers, connect, fetch, ping},
};
use serde_json::Value;

use self::rates::{Row, rates, summary};
use crate::{
    Case,
    rollback::{SlowNetwork, in_transfer},
};

pub(crate) const CASES: &[Case] = &[
    ("network::connections_survive_there_and_back", connections_survive_there_and_back),
    ("network::two_nics_move_together", two_nics_move_together),
    ("network::each_mtu_is_the_guests_own", each_mtu_is_the_guests_own),
    ("network::rebind_gives_the_destinations_addresses", rebind_gives_the_destinations_addresses),
    ("network::other_addresses_are_refused_by_name", other_addresses_are_refused_by_name),
    ("network::a_move_that_turns_back_breaks_no_connection", a_move_that_turns_back_breaks_no_connection),
    ("network::other_plugins_interfaces_move_too", other_plugins_interfaces_move_too),
    ("network::a_node_makes_and_removes_the_namespace", a_node_makes_and_removes_the_namespace),
];

const MOVE: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(20);
const ECHO: u16 = 7000;
const STREAM: u16 = 7001;
const PATTERN: u16 = 7002;
/// Bytes of the pattern that is streamed over and over.
const PATTERN_BYTES: usize = 8 << 20;
/// Takes the pattern's first [`PIECE_BYTES`] over and over.
const TAKES: u16 = 7003;
const PIECE_BYTES: usize = 1 << 20;
/// Answers on four ports: what is said, a pattern without end, the pattern once; the last one answers with a byte to
/// each piece that came as it should, and hangs up at one that did not.
const SERVER: &str = "dd if=/dev/urandom of=/dev/shm/pattern bs=65536 count=128 2>/dev/null
dd if=/dev/shm/pattern of=/dev/shm/piece bs=65536 count=16 2>/dev/null
busybox nc -ll -p 7001 -e sh -c 'while cat /dev/shm/pattern; do :; done' &
busybox nc -ll -p 7002 -e cat /dev/shm/pattern &
busybox nc -ll -p 7003 -e sh -c 'while dd bs=65536 count=16 iflag=fullblock 2>/dev/null | busybox cmp -s - /dev/shm/piece; do echo; done' &
exec busybox nc -ll -p 7000 -e cat";
/// No connection stands still for so long, however slow the machine is that moves its pod. What the
/// gaps are is printed.
const SANE: Duration = Duration::from_secs(15);
/// An answer comes within this; and nothing would have come within a [`MOMENT`] that should not.
const ANSWERED: Duration = Duration::from_secs(15);
const MOMENT: Duration = Duration::from_secs(2);

fn at(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// A server in the namespace of that name on host a.
fn server<'a>(lab: &'a Lab, id: &str, netns: &str) -> Container<'a> {
    let namespace = format!("network:{netns}");
    Container::start_with(lab, Host::A, id, &["--with-ns", &namespace], &["sh", "-c", SERVER])
}

/// One move with its report.
struct Moved {
    report: Value,
    /// All that the command said, an object a line.
    said: String,
    began: Instant,
}

fn migrate(lab: &Lab, from: Host, id: &str, more: &[&str]) -> Moved {
    let began = Instant::now();
    let to = from.other().name();
    let words = [&["dunlin", "migrate", id, "--to", to, "--output", "json"], more].concat();
    let run = Run::new(lab.command_on(from, &words), MOVE);
    let said = format!("{}{}", run.stdout, run.stderr);
    run.ok();
    let events = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let report = events.into_iter().find(|event| event["event"] == "report");
    let report = report.unwrap_or_else(|| panic!("no report in:\n{said}"));
    assert_eq!(report["warnings"].as_array().map(Vec::len), Some(0), "left-overs: {report}");
    Moved { report, said, began }
}

impl Moved {
    fn blackout(&self) -> Duration {
        Duration::from_millis(self.report["blackout_ms"].as_u64().expect("milliseconds"))
    }

    /// `fate` and addresses of a NIC by its name.
    fn nic(&self, name: &str) -> (String, Vec<String>, Vec<String>) {
        let nics = self.report["nics"].as_array().expect("a list");
        let nic =
            nics.iter().find(|nic| nic["name"] == name).unwrap_or_else(|| panic!("no {name} in {nics:?}"));
        let list = |key: &str| {
            nic[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        (
            nic["fate"].as_str().unwrap_or_default().to_owned(),
            list("addresses"),
            list("destination_addresses"),
        )
    }
}

/// `DUNLIN_MOVES`, or `otherwise`; even, so that it ends where it began.
fn moves(otherwise: u32) -> u32 {
    let set = env::var("DUNLIN_MOVES").ok().and_then(|text| text.parse().ok());
    set.unwrap_or(otherwise).next_multiple_of(2)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn connections_survive_there_and_back(lab: &Lab) {
    let addresses = ["--address", "10.88.0.5/16", "--address", "fd88::5/64"];
    let nets = PodNet::on_both(lab, "n-keep", &addresses);
    let container = server(lab, "n-keep", &nets[0].path());
    let pattern = fetch(&at("10.88.0.5", PATTERN));
    assert_eq!(pattern.len(), PATTERN_BYTES);
    let four = Echo::start(&at("10.88.0.5", ECHO));
    let six = Echo::start(&at("fd88::5", ECHO));
    let upload = Bulk::upload(&at("fd88::5", TAKES), pattern[..PIECE_BYTES].to_vec());
    let download = Bulk::download(&at("10.88.0.5", STREAM), pattern);
    let whole = |at: &str| {
        println!("{at}");
        four.assert_whole();
        six.assert_whole();
        download.assert_whole();
        upload.assert_whole();
    };
    let mut host = Host::A;
    let mut rows = Vec::new();
    for number in 1..=moves(20) {
        // What the machine does to the connections by itself.
        four.await_more(100);
        let (at_rest, since) = ((download.bytes(), upload.bytes()), Instant::now());
        download.await_more(16 << 20);
        upload.await_more(4 << 20);
        let at_rest = rates(at_rest, (download.bytes(), upload.bytes()), since);
        let quiet = (four.longest_gap(), six.longest_gap());
        let (bytes, since) = ((download.bytes(), upload.bytes()), Instant::now());
        let moved = migrate(lab, host, "n-keep", &[]);
        host = host.other();
        four.await_more(50);
        six.await_more(50);
        let gap = four.longest_gap().max(six.longest_gap());
        let moving = rates(bytes, (download.bytes(), upload.bytes()), since);
        rows.push(Row { pause: moved.blackout(), gap, at_rest, moving });
        whole(&format!(
            "    move {number}: pause {:.0} ms, gap {:.0} ms, {:.2} s; down {:.0} and up {:.1} MiB/s, before it {:.0} and {:.1}; quiet gaps before {:.0} and {:.0} ms",
            ms(moved.blackout()),
            ms(gap),
            (since - moved.began).as_secs_f64()
                + moved.report["total_ms"].as_f64().unwrap_or_default() / 1000.0,
            moving.0,
            moving.1,
            at_rest.0,
            at_rest.1,
            ms(quiet.0),
            ms(quiet.1)
        ));
        let kept = ["10.88.0.5/16".to_owned(), "fd88::5/64".to_owned()].to_vec();
        let (fate, here, _) = moved.nic("eth0");
        assert_eq!((fate.as_str(), here), ("kept", kept));
        assert!(moved.said.contains(r#""event":"network""#), "the plan was not told: {}", moved.said);
    }
    summary(&rows);
    container.assert_only_on(host);
    // New connections too, and of what went through nothing was wrong to the end.
    drop(connect(&at("fd88::5", ECHO)));
    download.await_more(4 << 20);
    upload.await_more(2 << 20);
    whole("    all connections stand");
    let worst = rows.iter().map(|row| row.gap).max().unwrap_or_default();
    assert!(worst < SANE, "a connection stood still for {worst:?}");
    drop((four, six, download, upload));
    container.remove(host);
}

fn two_nics_move_together(lab: &Lab) {
    let addresses = [
        "--nics",
        "2",
        "--address",
        "10.88.0.6/16",
        "--address",
        "fd88::6/64",
        "--address",
        "eth1=10.89.0.6/16",
        "--address",
        "eth1=fd89::6/64",
    ];
    let nets = PodNet::on_both(lab, "n-two", &addresses);
    let container = server(lab, "n-two", &nets[0].path());
    let connections: Vec<Echo> = ["10.88.0.6", "fd88::6", "10.89.0.6", "fd89::6"]
        .iter()
        .map(|to| Echo::start(&at(to, ECHO)))
        .collect();
    let inside = |host: Host, exec: &str| {
        let shown = container.exec(host, exec, &["busybox", "ip", "-o", "link"]).ok();
        let mac = |name: &str| {
            let line = shown.lines().find(|line| line.contains(&format!(": {name}")));
            let line = line.unwrap_or_else(|| panic!("no {name} in the container: {shown}"));
            line.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned)
        };
        [mac("eth0"), mac("eth1")]
    };
    let macs = inside(Host::A, "macs-0");
    let mut host = Host::A;
    for number in 1..=2 {
        let moved = migrate(lab, host, "n-two", &[]);
        host = host.other();
        for connection in &connections {
            connection.await_more(20);
        }
        assert_eq!(moved.nic("eth0").0, "kept");
        assert_eq!(moved.nic("eth1").1, ["10.89.0.6/16", "fd89::6/64"]);
        assert_eq!(inside(host, &format!("macs-{number}")), macs, "other MACs after move {number}");
    }
    drop(connections);
    container.remove(host);
}

fn each_mtu_is_the_guests_own(lab: &Lab) {
    for (id, mtu, last) in [("n-1400", 1400_usize, "14"), ("n-9000", 9000, "90")] {
        let text = mtu.to_string();
        // Both families on each of two NICs.
        let own =
            [("eth0", "10.88.0", 16), ("eth0", "fd88:", 64), ("eth1", "10.89.0", 16), ("eth1", "fd89:", 64)];
        let own = own.map(|(nic, net, prefix)| {
            let address = format!("{net}{}{last}", if net.ends_with(':') { ":" } else { "." });
            (format!("{nic}={address}/{prefix}"), address)
        });
        let mut options = vec!["--mtu", &text, "--nics", "2"];
        options.extend(own.iter().flat_map(|(option, _)| ["--address", option]));
        let nets = PodNet::on_both(lab, id, &options);
        let container = server(lab, id, &nets[0].path());
        let connections = own.each_ref().map(|(_, address)| Echo::start(&at(address, ECHO)));
        for (number, host) in [Host::A, Host::B, Host::A].into_iter().enumerate() {
            if number > 0 {
                migrate(lab, host.other(), id, &[]);
                connections.iter().for_each(|connection| connection.await_more(20));
            }
            let shown = ["cat", "/sys/class/net/eth0/mtu", "/sys/class/net/eth1/mtu"];
            let inside = container.exec(host, &format!("mtu-{number}"), &shown).ok();
            assert_eq!(inside, format!("{text}\n{text}\n"), "in the guest on host {host}");
            for (_, address) in &own {
                // There and back: the guest, whose MTU is that, answers with as much.
                let answered = ping(address, mtu, ANSWERED);
                assert!(answered, "a whole packet of {mtu} bytes to {address} has no answer on host {host}");
                // Which costs a moment, so it is tried on one of the hosts.
                if mtu < 9000 && host == Host::B {
                    let answered = ping(address, mtu + 100, MOMENT);
                    assert!(!answered, "{} bytes to {address} went through an MTU of {mtu}", mtu + 100);
                }
            }
        }
        drop(connections);
        container.remove(Host::A);
    }
}

fn rebind_gives_the_destinations_addresses(lab: &Lab) {
    let here =
        PodNet::make(lab, Host::A, "n-rebind", &["--address", "10.88.0.21/16", "--address", "fd88::21/64"]);
    let there = ["--address", "10.88.0.22/16", "--address", "fd88::22/64", "--mtu", "1400"];
    let _there = PodNet::make(lab, Host::B, "n-rebind", &there);
    let gateway =
        ["ip", "-n", "n-rebind", "route", "replace", "default", "via", "10.88.0.253", "dev", "eth0"];
    lab.on(Host::B, &gateway).ok();
    let container = server(lab, "n-rebind", &here.path());
    let old = Echo::start(&at("10.88.0.21", ECHO));
    old.await_more(20);
    let words = ["dunlin", "migrate", "n-rebind", "--to", "b", "--network", "rebind"];
    let text = Run::new(lab.command_on(Host::A, &words), MOVE).ok();
    let plan = text.find("LOST").unwrap_or_else(|| panic!("lost connections were not told:\n{text}"));
    assert!(plan < text.find("export").expect("a phase"), "it was told too late:\n{text}");
    assert!(text.contains("rebound from 10.88.0.21/16 fd88::21/64 to 10.88.0.22/16 fd88::22/64"), "{text}");
    assert!(text.contains("default by 10.88.0.253, IPv6 default by fd88::254, MTU 1400"), "{text}");
    container.assert_only_on(Host::B);
    for address in ["10.88.0.22", "fd88::22"] {
        Echo::start(&at(address, ECHO)).await_more(20);
    }
    assert!(!answers(&at("10.88.0.21", ECHO)), "the old address still answers");
    let shown = container.exec(Host::B, "addresses", &["busybox", "ip", "-o", "addr"]).ok();
    assert!(shown.contains("10.88.0.22/16") && !shown.contains("10.88.0.21"), "{shown}");
    let routes = container.exec(Host::B, "routes", &["busybox", "ip", "route"]).ok();
    assert!(routes.contains("default via 10.88.0.253") && !routes.contains("10.88.0.254"), "{routes}");
    drop(old);
    // And back: what it has now is not what host a would give it.
    let words = ["dunlin", "migrate", "n-rebind", "--to", "a"];
    Run::new(lab.command_on(Host::B, &words), MOVE).fails_naming(&[
        "10.88.0.22/16",
        "10.88.0.21/16",
        "rebind",
    ]);
    // A route that speaks from an address of another interface, which no guest has and so no guest takes. The pod runs
    // there all the same, so the report says what was not done, and what to do.
    let ip = |words: &str| {
        let inside = ["ip", "-n", "n-rebind"];
        lab.on(Host::A, &inside.into_iter().chain(words.split(' ')).collect::<Vec<_>>()).ok();
    };
    ip("addr add 10.99.9.9/32 dev lo");
    ip("route add 172.16.0.0/12 dev eth0 src 10.99.9.9");
    let words = ["dunlin", "migrate", "n-rebind", "--to", "a", "--network", "rebind"];
    let text = Run::new(lab.command_on(Host::B, &words), MOVE).ok();
    for part in
        ["needs a hand: on a: eth0 of pod n-rebind", "did not take them", "again with --network rebind"]
    {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    container.assert_only_on(Host::A);
    ip("route del 172.16.0.0/12");
    // Which is done: from wherever it stands it takes a host's addresses.
    migrate(lab, Host::A, "n-rebind", &["--network", "rebind"]);
    Echo::start(&at("10.88.0.22", ECHO)).await_more(20);
    let moved = migrate(lab, Host::B, "n-rebind", &["--network", "rebind"]);
    assert_eq!(moved.nic("eth0").0, "rebound");
    Echo::start(&at("10.88.0.21", ECHO)).await_more(20);
    container.remove(Host::A);
}

fn other_addresses_are_refused_by_name(lab: &Lab) {
    let here = PodNet::make(lab, Host::A, "n-other", &["--address", "10.88.0.31/16"]);
    let container = server(lab, "n-other", &here.path());
    let connection = Echo::start(&at("10.88.0.31", ECHO));
    let refused = |words: &[&str]| {
        let text = lab.migrate(Host::A, "n-other", "b").fails_naming(words);
        container.assert_only_on(Host::A);
        connection.await_more(20);
        text
    };
    refused(&["network namespace", "/run/netns/n-other", "--netns"]);
    {
        let _there = PodNet::make(lab, Host::B, "n-other", &["--address", "10.88.0.32/16"]);
        refused(&["network eth0 addresses", "10.88.0.31/16", "10.88.0.32/16", "--network rebind"]);
        // The same addresses, but the way out is another one, or none: what is open beyond the segment would end.
        let way = |words: &str| {
            let to = ["ip", "-n", "n-gateway", "route"];
            lab.on(Host::B, &to.into_iter().chain(words.split(' ')).collect::<Vec<_>>()).ok();
        };
        let gateway = PodNet::make(lab, Host::B, "n-gateway", &["--address", "10.88.0.31/16"]);
        let words = ["dunlin", "migrate", "n-other", "--to", "b", "--netns", "/run/netns/n-gateway"];
        let refused_there = |parts: &[&str]| {
            Run::new(lab.command_on(Host::A, &words), MOVE).fails_naming(parts);
            container.assert_only_on(Host::A);
            connection.await_more(20);
        };
        way("replace default via 10.88.0.253 dev eth0");
        let both = ["default by 10.88.0.254", "default by 10.88.0.253", "--network rebind"];
        refused_there(&[&["network eth0 routes"][..], &both].concat());
        way("del default");
        refused_there(&["network eth0 routes", "default by 10.88.0.254", "no routes"]);
        drop(gateway);
        // A namespace of another name that fits is taken when it is named.
        let _fits = PodNet::make(lab, Host::B, "n-fits", &["--address", "10.88.0.31/16"]);
        migrate(lab, Host::A, "n-other", &["--netns", "/run/netns/n-fits"]);
        connection.await_more(20);
        migrate(lab, Host::B, "n-other", &["--netns", "n-other=/run/netns/n-other"]);
        connection.await_more(20);
    }
    let _there = PodNet::make(lab, Host::B, "n-other", &["--address", "10.88.0.31/16", "--mtu", "1400"]);
    refused(&["network eth0 MTU", "1500", "1400"]);
    drop(connection);
    container.remove(Host::A);
}

fn a_move_that_turns_back_breaks_no_connection(lab: &Lab) {
    let addresses = ["--address", "10.88.0.41/16", "--address", "fd88::41/64"];
    let nets = PodNet::on_both(lab, "n-back", &addresses);
    let container = server(lab, "n-back", &nets[0].path());
    let four = Echo::start(&at("10.88.0.41", ECHO));
    let six = Echo::start(&at("fd88::41", ECHO));
    let download = Bulk::download(&at("10.88.0.41", STREAM), fetch(&at("10.88.0.41", PATTERN)));
    download.await_more(4 << 20);
    let stand = || {
        four.await_more(50);
        six.await_more(50);
        download.await_more(4 << 20);
        download.assert_whole();
    };
    let ended = |child: Child| Run::finish(child, "dunlin migrate", MOVE);
    for _ in 0..2 {
        let slow = SlowNetwork::new();
        let child = in_transfer(lab, lab.command_on(Host::A, &["dunlin", "migrate", "n-back", "--to", "b"]));
        lab.on(Host::A, &["dunlin", "cancel", "n-back"]).ok();
        ended(child).fails_naming(&["cancel"]);
        drop(slow);
        container.await_state(Host::A, "RUNNING", SOON);
        stand();
    }
    // Cancels that fall anywhere, late ones among them; one that comes too late is a move.
    let mut host = Host::A;
    for delay in [400, 700, 900, 1100] {
        let child = lab.spawn_on(host, &["dunlin", "migrate", "n-back", "--to", host.other().name()]);
        std::thread::sleep(Duration::from_millis(delay));
        lab.on(host, &["dunlin", "cancel", "n-back"]);
        let run = ended(child);
        if run.code == 0 {
            host = host.other();
        }
        container.await_state(host, "RUNNING", SOON);
        stand();
    }
    if host == Host::B {
        migrate(lab, host, "n-back", &[]);
        stand();
    }
    drop((four, six, download));
    // Nothing of the tries is left there.
    let left = lab.on(Host::B, &["ip", "-n", "n-back", "-br", "link"]).ok();
    assert_eq!(left.lines().count(), 2, "beside lo and eth0 on host b: {left}");
    container.remove(Host::A);
}

fn other_plugins_interfaces_move_too(lab: &Lab) {
    // A macvlan keeps its connections like a veth. Behind a router on each host only the network could follow
    // the address, so there it is asked for by the hosts themselves.
    let macvlan = ["--style", "macvlan", "--address", "10.88.0.51/16", "--address", "fd88::51/64"];
    let nets = PodNet::on_both(lab, "n-macvlan", &macvlan);
    let container = server(lab, "n-macvlan", &nets[0].path());
    let connections = ["10.88.0.51", "fd88::51"].map(|to| Echo::start(&at(to, ECHO)));
    for host in Host::ALL {
        migrate(lab, host, "n-macvlan", &[]);
        for connection in &connections {
            connection.await_more(20);
        }
    }
    drop(connections);
    container.remove(Host::A);
    drop(nets);

    let here = PodNet::make(lab, Host::A, "n-ptp", &["--style", "ptp", "--address", "10.88.0.61/16"]);
    let container = server(lab, "n-ptp", &here.path());
    let reached = Echo::start(&at("10.88.0.61", ECHO));
    reached.await_more(20);
    drop(reached);
    let _there = PodNet::make(lab, Host::B, "n-ptp", &["--style", "ptp", "--address", "10.88.0.61/16"]);
    migrate(lab, Host::A, "n-ptp", &[]);
    drop(here);
    container.assert_only_on(Host::B);
    let asked = ["busybox", "nc", "-w", "5", "10.88.0.61", "7002"];
    let piped = format!("{} | wc -c", asked.join(" "));
    let count = lab.on(Host::B, &["sh", "-c", &piped]).ok();
    assert_eq!(count.trim(), PATTERN_BYTES.to_string(), "host b does not reach it");
    container.remove(Host::B);
}

/// `[cni]` in both nodes' configurations until dropped.
struct WithCni<'a> {
    lab: &'a Lab,
    before: Vec<(Host, PathBuf, String)>,
}

impl WithCni<'_> {
    fn new(lab: &Lab) -> WithCni<'_> {
        let mut before = Vec::new();
        for host in Host::ALL {
            let path = lab.host_dir(host).join("etc/node.toml");
            let text = fs::read_to_string(&path).expect("the lab's file");
            let cni = "[cni]\nconf_dir = \"/etc/dunlin/cni\"\nbin_dir = \"/usr/lib/cni\"\nnetwork = \"moved\"\n\
                       interfaces = { eth1 = \"moved-aside\" }\n";
            fs::write(&path, format!("{text}{cni}")).expect("written");
            before.push((host, path, text));
        }
        let with = WithCni { lab, before };
        with.restart();
        with
    }

    fn restart(&self) {
        for (host, ..) in &self.before {
            self.lab.service(*host, "stop", "node");
            self.lab.service(*host, "start", "node");
        }
    }
}

impl Drop for WithCni<'_> {
    fn drop(&mut self) {
        for (_, path, text) in &self.before {
            let _ = fs::write(path, text);
        }
        self.restart();
    }
}

fn a_node_makes_and_removes_the_namespace(lab: &Lab) {
    let with = WithCni::new(lab);
    let namespaces = |host: Host| lab.on(host, &["ls", "/run/netns"]).ok();
    let addresses = [
        "--nics",
        "2",
        "--address",
        "10.88.0.71/16",
        "--address",
        "fd88::71/64",
        "--address",
        "eth1=10.89.0.71/16",
    ];
    // Made by hand where the pod begins: that one is not the node's to remove.
    let here = PodNet::make(lab, Host::A, "n-cni", &addresses);
    let container = server(lab, "n-cni", &here.path());
    let four = Echo::start(&at("10.88.0.71", ECHO));
    let six = Echo::start(&at("fd88::71", ECHO));
    // By the pod's second interface, which is of a network of its own there.
    let aside = Echo::start(&at("10.89.0.71", ECHO));
    let download = Bulk::download(&at("10.88.0.71", STREAM), fetch(&at("10.88.0.71", PATTERN)));
    let stand = || {
        four.await_more(50);
        six.await_more(50);
        aside.await_more(50);
        download.await_more(4 << 20);
        download.assert_whole();
    };
    stand();
    let mut gaps = Vec::new();
    for round in 0..2 {
        four.longest_gap();
        let moved = migrate(lab, Host::A, "n-cni", &[]);
        stand();
        gaps.push(format!("{:.0} ms (pause {:.0})", ms(four.longest_gap()), ms(moved.blackout())));
        assert!(moved.said.contains(r#""fate":"expected""#), "{}", moved.said);
        assert_eq!(moved.nic("eth0").0, "kept");
        assert_eq!(moved.nic("eth1").1, ["10.89.0.71/16"]);
        assert!(namespaces(Host::B).contains("n-cni"), "round {round}");
        migrate(lab, Host::B, "n-cni", &[]);
        stand();
        assert!(!namespaces(Host::B).contains("n-cni"), "round {round}: it stayed");
        assert!(namespaces(Host::A).contains("n-cni"), "round {round}: what was made by hand was removed");
    }
    println!("    gaps with a namespace made during the move: {}", gaps.join(", "));
    // A move that turns back leaves none, and neither does one whose node dies.
    let slow = SlowNetwork::new();
    let migrate_n = || lab.command_on(Host::A, &["dunlin", "migrate", "n-cni", "--to", "b"]);
    let child = in_transfer(lab, migrate_n());
    assert!(namespaces(Host::B).contains("n-cni"));
    lab.on(Host::A, &["dunlin", "cancel", "n-cni"]).ok();
    Run::finish(child, "dunlin migrate", MOVE).fails_naming(&["cancel"]);
    assert!(!namespaces(Host::B).contains("n-cni"), "it stayed after a roll-back");
    let child = in_transfer(lab, migrate_n());
    lab.service(Host::B, "kill", "node");
    Run::finish(child, "dunlin migrate", MOVE).fails();
    drop(slow);
    lab.service(Host::B, "start", "node");
    let since = Instant::now();
    while namespaces(Host::B).contains("n-cni") {
        assert!(since.elapsed() < Duration::from_secs(60), "it stays after the node's death");
        std::thread::sleep(Duration::from_millis(200));
    }
    stand();
    drop((four, six, aside, download));
    container.remove(Host::A);
    drop(with);
}
