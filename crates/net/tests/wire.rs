//! A tap in an interface's place, in real namespaces: `here` has `eth0`, whose other end is `p-eth0` in `there`.
//! Without root each case says so loudly and does nothing.

use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

use dunlin_net::configure::{self, Wanted};
use dunlin_net::tail::Span;
use dunlin_net::{
    Announcer, Control, Handle, Injector, Namespace, NetError, Tail, Tap, announce, redirect, view,
};
use rtnetlink::LinkVeth;

const PATIENCE: Duration = Duration::from_secs(30);
/// An answer that there is not would have come by then.
const MOMENT: Duration = Duration::from_millis(300);
/// Before each frame that is read from a tap or written to one.
const HEADER: usize = dunlin_net::tail::HEADER;

struct Bench {
    here: Namespace,
    there: Namespace,
    ours: Handle,
    eth0: u32,
    peer: u32,
}

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: this needs root, to make network namespaces");
    }
    root
}

async fn index_of(handle: &Handle, name: &str) -> u32 {
    view::interfaces(handle).await.unwrap().into_iter().find(|one| one.name == name).unwrap().index
}

fn tc(namespace: &Namespace, arguments: &str) -> String {
    let output = namespace
        .run(|| std::process::Command::new("tc").args(arguments.split_whitespace()).output().unwrap())
        .unwrap();
    assert!(output.status.success(), "tc {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Bench {
    async fn new() -> Bench {
        let (here, there) = (Namespace::fresh().unwrap(), Namespace::fresh().unwrap());
        let (ours, theirs) = (here.netlink().unwrap(), there.netlink().unwrap());
        ours.link().add(LinkVeth::new("eth0", "p-eth0").build()).execute().await.unwrap();
        let peer = index_of(&ours, "p-eth0").await;
        configure::move_to(&ours, peer, &there).await.unwrap();
        let addresses =
            |address: &str| Wanted { addresses: vec![address.parse().unwrap()], ..Wanted::default() };
        let peer = index_of(&theirs, "p-eth0").await;
        configure::apply(&theirs, peer, &addresses("10.9.0.1/24")).await.unwrap();
        let eth0 = index_of(&ours, "eth0").await;
        configure::apply(&ours, eth0, &addresses("10.9.0.2/24")).await.unwrap();
        let bench = Bench { here, there, ours, eth0, peer };
        // Both ends are up only a moment after they were told so, and frames of before that are lost.
        assert!(bench.answers_within(PATIENCE));
        bench
    }

    async fn connected(&self) -> Tap {
        let tap = Tap::create(&self.here, &Tap::name_for(self.eth0), 1500).unwrap();
        redirect::connect(&self.ours, self.eth0, tap.index()).await.unwrap();
        tap
    }

    /// Whether the kernel of `here` answers an ARP request of `there`'s in time.
    fn answers_within(&self, limit: Duration) -> bool {
        self.there
            .run(|| {
                let _ = std::process::Command::new("ip").args(["neigh", "flush", "dev", "p-eth0"]).status();
                let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
                let end = Instant::now() + limit;
                while Instant::now() < end {
                    // Over and over: the kernel gives up asking after three times.
                    socket.send_to(b"who", "10.9.0.2:9").unwrap();
                    let shown = std::process::Command::new("ip").args(["neigh", "show"]).output().unwrap();
                    if String::from_utf8_lossy(&shown.stdout).contains("lladdr") {
                        return true;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                false
            })
            .unwrap()
    }

    /// A frame of `there`'s to nobody in particular, marked.
    fn speak(&self, mark: u8) {
        Announcer::open(&self.there, self.peer).unwrap().send(&[marked(mark)]).unwrap();
    }
}

fn since(since: SystemTime) -> Span {
    Span { since, before: Duration::ZERO, most: 1 << 20 }
}

fn marked(mark: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    // For local experiments (IEEE 802): the kernel has nothing to say to it.
    frame.extend([0x88, 0xb5]);
    frame.extend([mark; 46]);
    frame
}

/// The marks of the frames that come out of a descriptor of a tap within a moment.
fn marks(tap: &Tap, wanted: usize) -> Vec<u8> {
    let mut file = std::fs::File::from(tap.descriptor().unwrap());
    // SAFETY: plain numbers on an open descriptor.
    unsafe { nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETFL, nix::libc::O_NONBLOCK) };
    let (mut found, mut buffer) = (Vec::new(), vec![0; 70_000]);
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end && found.len() < wanted {
        match file.read(&mut buffer) {
            Ok(length) if is_marked(&buffer[HEADER..length]) => found.push(buffer[length - 1]),
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    found
}

fn is_marked(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x88, 0xb5])
}

#[tokio::test]
async fn frames_go_both_ways_and_the_kernel_hears_nothing() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    assert!(bench.answers_within(PATIENCE));
    let tap = bench.connected().await;
    assert!(redirect::connected(&bench.ours, bench.eth0).await.unwrap());
    assert!(!bench.answers_within(MOMENT), "with the tap down");
    tap.set_up(true).unwrap();
    assert!(!bench.answers_within(MOMENT), "with the tap up");
    bench.speak(7);
    assert_eq!(marks(&tap, 1), [7]);

    let heard = Tail::follow(&bench.here, bench.eth0).unwrap();
    let begun = SystemTime::now();
    let mut guest = std::fs::File::from(tap.descriptor().unwrap());
    guest.write_all(&[&[0; HEADER][..], &marked(8)].concat()).unwrap();
    // The tail is asked once only: by then it has all.
    std::thread::sleep(Duration::from_secs(1));
    let frames = heard.end(since(begun));
    assert!(
        frames.iter().any(|frame| is_marked(&frame[HEADER..]) && frame.last() == Some(&8)),
        "{frames:x?}"
    );

    drop((guest, tap));
    assert!(!bench.answers_within(MOMENT), "a redirect to a tap that is gone drops");
    redirect::disconnect(&bench.ours, bench.eth0).await.unwrap();
    assert!(!redirect::connected(&bench.ours, bench.eth0).await.unwrap());
    assert!(bench.answers_within(PATIENCE), "the interface is as it was");
    assert_eq!(tc(&bench.here, "qdisc show dev eth0"), "qdisc noqueue 0: root refcnt 2 \n");
    redirect::disconnect(&bench.ours, bench.eth0).await.unwrap();
}

#[tokio::test]
async fn what_waits_in_the_tap_is_read_later_and_what_came_while_it_was_down_is_gone() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    let tap = bench.connected().await;
    bench.speak(1);
    tap.set_up(true).unwrap();
    bench.speak(2);
    bench.speak(3);
    assert_eq!(marks(&tap, 2), [2, 3]);
    tap.set_up(false).unwrap();
    bench.speak(4);
    tap.set_up(true).unwrap();
    bench.speak(5);
    assert_eq!(marks(&tap, 1), [5]);
}

#[tokio::test]
async fn what_a_dead_one_left_is_replaced_and_what_is_anothers_is_refused() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    drop(bench.connected().await);
    let tap = bench.connected().await;
    tap.set_up(true).unwrap();
    bench.speak(6);
    assert_eq!(marks(&tap, 1), [6]);
    let twice = Tap::create(&bench.here, tap.name(), 1500).unwrap_err();
    assert!(twice.to_string().contains("another virtual machine"), "{twice}");

    drop(tap);
    redirect::disconnect(&bench.ours, bench.eth0).await.unwrap();
    tc(&bench.here, "qdisc add dev eth0 ingress");
    tc(
        &bench.here,
        "filter add dev eth0 parent ffff: protocol ip u32 match u8 0 0 action mirred egress redirect dev lo",
    );
    let tap = Tap::create(&bench.here, &Tap::name_for(bench.eth0), 1500).unwrap();
    let refused = redirect::connect(&bench.ours, bench.eth0, tap.index()).await.unwrap_err();
    assert!(matches!(&refused, NetError::Foreign { .. }), "{refused}");
    redirect::disconnect(&bench.ours, bench.eth0).await.unwrap();
    assert!(tc(&bench.here, "filter show dev eth0 ingress").contains("to device lo"), "another's stays");
}

#[tokio::test]
async fn a_taps_address_and_mtu_are_set_and_it_says_nothing_of_its_own() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    let tap = Tap::create(&bench.here, &Tap::name_for(bench.eth0), 9000).unwrap();
    let interfaces = view::interfaces(&bench.ours).await.unwrap();
    let seen = interfaces.iter().find(|one| one.index == tap.index()).unwrap();
    assert_eq!((seen.mtu, seen.up, seen.kind.as_deref()), (9000, false, Some(Tap::KIND)));
    let control = Control::open(&bench.here, bench.eth0, "eth0").unwrap();
    let mac = [2, 0, 0, 0, 7, 7];
    control.set_mac(mac).unwrap();
    assert_eq!(control.mac().unwrap(), mac);

    tap.set_up(true).unwrap();
    let mut file = std::fs::File::from(tap.descriptor().unwrap());
    // SAFETY: plain numbers on an open descriptor.
    unsafe { nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETFL, nix::libc::O_NONBLOCK) };
    // Router solicitations and the like come within the first second.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(file.read(&mut [0; 2000]).is_err());
}

#[tokio::test]
async fn frames_since_a_time_are_had_and_given_again() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    let tap = bench.connected().await;
    tap.set_up(true).unwrap();
    let tail = Tail::follow(&bench.here, tap.index()).unwrap();
    bench.speak(1);
    assert_eq!(marks(&tap, 1), [1]);
    let since = SystemTime::now();
    (2..6).for_each(|mark| bench.speak(mark));
    // What the guest says is not what was said to it.
    let mut guest = std::fs::File::from(tap.descriptor().unwrap());
    guest.write_all(&[&[0; HEADER][..], &marked(99)].concat()).unwrap();
    assert_eq!(marks(&tap, 4), [2, 3, 4, 5]);
    let mut frames = tail.end(self::since(since));
    // The peer's kernel has a word of its own to say now and then.
    frames.retain(|frame| is_marked(&frame[HEADER..]));
    let found: Vec<u8> = frames.iter().map(|frame| *frame.last().unwrap()).collect();
    assert_eq!(found, [2, 3, 4, 5]);

    let (sent, error) = Injector::open(&bench.here, tap.index()).unwrap().send(&frames);
    assert!(sent == 4 && error.is_none(), "{sent} {error:?}");
    assert_eq!(marks(&tap, 4), [2, 3, 4, 5]);
    let (sent, error) = Injector::open(&bench.here, tap.index()).unwrap().send(&[vec![0xff; 30]]);
    assert!(sent == 0 && error.is_some(), "a header that cannot be");
}

/// A large TCP segment with its checksum and its cutting left to the hardware, as a host's own kernel sends it.
#[tokio::test]
async fn a_frame_that_is_to_be_cut_keeps_its_header() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    let tap = bench.connected().await;
    tap.set_up(true).unwrap();
    // TUNSETOFFLOAD: the reader takes checksums and TCP segments as they come (CSUM, TSO4).
    let file = tap.descriptor().unwrap();
    // SAFETY: the request takes a number.
    unsafe { nix::libc::ioctl(file.as_raw_fd(), nix::libc::TUNSETOFFLOAD, 3) };
    let tail = Tail::follow(&bench.here, tap.index()).unwrap();
    let since = SystemTime::now();
    let header: [u8; HEADER] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0];
    let payload = vec![0x5a; 4000];
    let ip = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 9, 0, 1], [10, 9, 0, 2], 64)
        .tcp(1, 2, 3, 4);
    let mut frame = header.to_vec();
    ip.write(&mut frame, &payload).unwrap();
    let (sent, error) = Injector::open(&bench.there, bench.peer).unwrap().send(&[frame.clone()]);
    assert!(sent == 1 && error.is_none(), "{error:?}");
    std::thread::sleep(Duration::from_secs(1));
    let found: Vec<Vec<u8>> =
        tail.end(self::since(since)).into_iter().filter(|one| one.len() > 4000).collect();
    assert_eq!(found.len(), 1);
    // Flags, kind, size of a segment, and where the checksum goes; the length of the headers is only a hint.
    assert_eq!(found[0][..2], header[..2]);
    assert_eq!(found[0][4..HEADER], header[4..], "the header says what is left to do");
    let (sent, error) = Injector::open(&bench.here, tap.index()).unwrap().send(&found);
    assert!(sent == 1 && error.is_none(), "{error:?}");
    let mut guest = std::fs::File::from(file);
    let mut buffer = vec![0; 70_000];
    for _ in 0..2 {
        loop {
            let length = guest.read(&mut buffer).unwrap();
            if length > 4000 {
                assert_eq!(buffer[..length], found[0], "came once by wire, once by hand");
                break;
            }
        }
    }
}

#[tokio::test]
async fn an_announcement_reaches_the_other_end() {
    if !root() {
        return;
    }
    let bench = Bench::new().await;
    let tap = bench.connected().await;
    tap.set_up(true).unwrap();
    let mac = [2, 0, 0, 0, 0, 0x42];
    let address: IpAddr = "10.9.0.2".parse().unwrap();
    // Known under another address before: what was announced is believed.
    let peer = |arguments: &str| {
        let output = bench
            .there
            .run(|| std::process::Command::new("ip").args(arguments.split_whitespace()).output().unwrap())
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    peer("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:01 dev p-eth0 nud stale");
    Announcer::open(&bench.here, bench.eth0).unwrap().send(&announce::frames(mac, &[address])).unwrap();
    let end = Instant::now() + PATIENCE;
    while !peer("neigh show").contains("02:00:00:00:00:42") {
        assert!(Instant::now() < end, "{}", peer("neigh show"));
        std::thread::sleep(Duration::from_millis(10));
    }
}
