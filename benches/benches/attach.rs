//! What it costs to lead a pod's interface to its machine: the ways there are, in turns, between a client and a guest
//! that is a network namespace of its own, so that nothing else is measured.
//!
//! `cargo bench -p dunlin-benches --bench attach -- --rounds 5`
//!
//! ```text
//!  client ──veth── eth0 (pod's namespace) ──WAY── tap <──this program, as QEMU does──> tap (guest)
//! ```
//!
//! | way | what is between the interface and the descriptor |
//! |---|---|
//! | redirect | tc's ingress to a tap, as Dunlin does |
//! | bridge | a Linux bridge with both as its ports |
//! | macvtap | a macvtap on the interface, in passthru mode |

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use dunlin_benches::figures::{Table, ratio};
use dunlin_benches::{BenchError, run};
use dunlin_net::{Namespace, Tap, redirect, view};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const MTU: u32 = 1500;
/// A frame of 64 KiB with its headers, and the offload header before it.
const FRAME: usize = 66 << 10;
const CHUNK: usize = 256 << 10;
/// What a guest takes uncut and unsummed: TUN_F_CSUM, TSO4, TSO6.
const OFFLOADS: libc::c_int = 0x01 | 0x02 | 0x04;
const HEADINGS: [&str; 3] = ["down MiB/s", "up MiB/s", "round trip us"];

nix::ioctl_write_int_bad!(
    /// What whoever reads the descriptor does by itself.
    set_offloads,
    libc::TUNSETOFFLOAD
);

#[derive(Debug, Parser)]
struct Arguments {
    /// How often each way is measured.
    #[arg(long, env = "DUNLIN_BENCH_ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each of the three measurements.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Redirect,
    Bridge,
    Macvtap,
}

impl Way {
    const ALL: [(Way, &'static str); 3] =
        [(Way::Redirect, "redirect"), (Way::Bridge, "bridge"), (Way::Macvtap, "macvtap")];
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(measure(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("attach: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(arguments: &Arguments) -> Result<(), BenchError> {
    let each = Duration::from_secs(arguments.seconds);
    let mut tables = Way::ALL.map(|_| Table::new(&HEADINGS));
    for round in 1..=arguments.rounds {
        for ((way, _), table) in Way::ALL.iter().zip(&mut tables) {
            let path = Path::make(*way).await?;
            table.row(format!("round {round}"), &path.figures(each)?);
        }
    }
    for ((_, name), table) in Way::ALL.iter().zip(&tables) {
        println!("{name}\n{}\n", table.print(0));
    }
    for ((_, name), table) in Way::ALL.iter().zip(&tables).skip(1) {
        for (index, heading) in HEADINGS.iter().enumerate() {
            let ratio = ratio(&tables[0].column(index), &table.column(index));
            println!(
                "redirect / {name}, {heading}: {:.2} ({:.2} to {:.2})",
                ratio.paired, ratio.range.0, ratio.range.1
            );
        }
    }
    Ok(())
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.to_owned();
    move |source| BenchError::Io { what, source }
}

/// `ip` inside a namespace. Names of namespaces are not needed, so none is made.
fn ip(inside: &Namespace, words: &str) -> Result<(), BenchError> {
    let output = inside.run(|| Command::new("ip").args(words.split_whitespace()).output())?;
    let output = output.map_err(io_error("run `ip`; install iproute2"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(BenchError::Command {
        command: format!("ip {words}"),
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// From a client's namespace through a pod's to a guest's. All of it goes with its descriptors.
struct Path {
    client: Namespace,
    guest: Namespace,
    over: Arc<AtomicBool>,
    relays: Vec<JoinHandle<()>>,
    _taps: Vec<Tap>,
    _pod: Namespace,
}

impl Path {
    async fn make(way: Way) -> Result<Path, BenchError> {
        let [client, pod, guest] = [Namespace::fresh()?, Namespace::fresh()?, Namespace::fresh()?];
        // Made where both ends are, and one is sent to the pod by way of its descriptor.
        let there = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsFd::as_fd(&pod).as_raw_fd());
        ip(&client, &format!("link add c0 mtu {MTU} type veth peer name eth0 mtu {MTU} netns {there}"))?;
        ip(&client, &format!("addr add {CLIENT}/24 dev c0"))?;
        ip(&client, "link set c0 up")?;
        ip(&pod, "link set eth0 up")?;

        let mut taps = Vec::new();
        let mac = match way {
            // A bridge keeps what is for its ports' own addresses.
            Way::Bridge => "02:00:00:00:77:02".to_owned(),
            Way::Redirect | Way::Macvtap => {
                let found = view::interfaces(&pod.netlink()?).await?;
                let eth0 = found.iter().find(|found| found.name == "eth0");
                eth0.map(|eth0| dunlin_net::mac_text(eth0.mac)).unwrap_or_default()
            }
        };
        let descriptor = match way {
            Way::Redirect | Way::Bridge => {
                let tap = Tap::create(&pod, "tap0", MTU)?;
                if way == Way::Redirect {
                    let handle = pod.netlink()?;
                    let found = view::interfaces(&handle).await?;
                    let eth0 = found.iter().find(|found| found.name == "eth0").map_or(0, |eth0| eth0.index);
                    redirect::connect(&handle, eth0, tap.index()).await?;
                } else {
                    ip(&pod, "link add br0 type bridge forward_delay 0")?;
                    ip(&pod, "link set eth0 master br0")?;
                    ip(&pod, "link set tap0 master br0")?;
                    ip(&pod, "link set br0 up")?;
                }
                tap.set_up(true)?;
                let descriptor = tap.descriptor().map_err(io_error("open the pod's tap"))?;
                taps.push(tap);
                descriptor
            }
            Way::Macvtap => macvtap(&pod)?,
        };

        let tap = Tap::create(&guest, "eth0", MTU)?;
        ip(&guest, &format!("link set eth0 address {mac}"))?;
        ip(&guest, &format!("addr add {GUEST}/24 dev eth0"))?;
        tap.set_up(true)?;
        let inner = tap.descriptor().map_err(io_error("open the guest's tap"))?;
        taps.push(tap);
        for end in [&descriptor, &inner] {
            // SAFETY: the request takes a number and touches no memory of ours.
            unsafe { set_offloads(end.as_raw_fd(), OFFLOADS) }
                .map_err(|error| io_error("set a tap's offloads")(error.into()))?;
        }
        let over = Arc::new(AtomicBool::new(false));
        let copy = |end: &OwnedFd| end.try_clone().map_err(io_error("copy a descriptor"));
        let relays = vec![relay(copy(&descriptor)?, copy(&inner)?, &over), relay(inner, descriptor, &over)];
        Ok(Path { client, guest, over, relays, _taps: taps, _pod: pod })
    }

    fn figures(&self, each: Duration) -> Result<[f64; 3], BenchError> {
        let listener = self.guest.run(|| TcpListener::bind((GUEST, 7000)))?.map_err(io_error("listen"))?;
        let connect = || {
            let to = SocketAddr::from((GUEST, 7000));
            let near = self.client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))?;
            let near = near.map_err(io_error("connect to the guest"))?;
            let (far, _) = listener.accept().map_err(io_error("accept"))?;
            for end in [&near, &far] {
                end.set_nodelay(true).map_err(io_error("set an option of TCP"))?;
            }
            Ok::<_, BenchError>((near, far))
        };
        let (near, far) = connect()?;
        let down = rate(far, near, each).map_err(io_error("read what the guest sends"))?;
        let (near, far) = connect()?;
        let up = rate(near, far, each).map_err(io_error("read what the client sends"))?;
        let (near, far) = connect()?;
        let trip = round_trip(near, far, each).map_err(io_error("ask the guest"))?;
        Ok([down, up, trip])
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for relay in self.relays.drain(..) {
            let _ = relay.join();
        }
    }
}

/// A macvtap on the pod's interface. Its descriptor is that of a device, which nobody makes in a container.
fn macvtap(pod: &Namespace) -> Result<OwnedFd, BenchError> {
    ip(pod, "link add link eth0 name mac0 type macvtap mode passthru")?;
    ip(pod, "link set mac0 up")?;
    let found = pod.run(|| {
        // sysfs shows the namespace of who mounted it: a mount of this thread's own, which ends with it.
        let script = "mount -t sysfs dunlin-attach /mnt && cat /mnt/class/net/mac0/tap*/dev";
        Command::new("unshare").args(["--mount", "sh", "-c", script]).output()
    })?;
    let found = found.map_err(io_error("run `unshare`"))?;
    let text = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    let number =
        text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let Some((major, minor)) = number else {
        let reason = String::from_utf8_lossy(&found.stderr).into_owned();
        return Err(BenchError::Unreadable { what: format!("the macvtap's device `{text}`"), reason });
    };
    let path = std::env::temp_dir().join(format!("dunlin-attach-{}", std::process::id()));
    let made = mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(major, minor));
    made.map_err(|error| io_error("make the macvtap's device")(error.into()))?;
    let file = File::options().read(true).write(true).open(&path);
    let _ = std::fs::remove_file(&path);
    let file = file.map_err(io_error("open the macvtap's device"))?;
    // As a tap of Dunlin's is made: the header is there, no other.
    let mut request = empty_request()?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: the request is an `ifreq`, alive for the call.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if set != 0 {
        return Err(io_error("set up the macvtap")(io::Error::last_os_error()));
    }
    Ok(file.into())
}

fn empty_request() -> Result<libc::ifreq, BenchError> {
    let name = CString::new("mac0").map_err(|error| io_error("name an interface")(error.into()))?;
    // SAFETY: an `ifreq` of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (into, byte) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *into = libc::c_char::try_from(*byte).unwrap_or_default();
    }
    Ok(request)
}

/// Frame by frame from one descriptor to the other, with the header that says what is still to be done with each.
fn relay(from: OwnedFd, to: OwnedFd, over: &Arc<AtomicBool>) -> JoinHandle<()> {
    let over = Arc::clone(over);
    thread::spawn(move || {
        let (mut from, mut to) = (File::from(from), File::from(to));
        let mut frame = vec![0; FRAME];
        while !over.load(Ordering::Relaxed) {
            let mut asked = [PollFd::new(std::os::fd::AsFd::as_fd(&from), PollFlags::POLLIN)];
            if !poll(&mut asked, PollTimeout::from(100_u8)).is_ok_and(|ready| ready > 0) {
                continue;
            }
            let Ok(count) = from.read(&mut frame) else { continue };
            // A frame that is not taken is lost, as on any wire.
            let _ = to.write(&frame[..count]);
        }
    })
}

/// MiB/s that arrive.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn rate(mut from: TcpStream, mut to: TcpStream, each: Duration) -> io::Result<f64> {
    let sending = thread::spawn(move || {
        let chunk = vec![0x5a; CHUNK];
        while from.write_all(&chunk).is_ok() {}
    });
    let mut buffer = vec![0; CHUNK];
    // TCP finds its window first.
    let warm = Instant::now();
    let mut bytes = 0_u64;
    while warm.elapsed() < each / 4 {
        bytes += to.read(&mut buffer)? as u64;
    }
    let (since, warmed) = (Instant::now(), bytes);
    while since.elapsed() < each {
        bytes += to.read(&mut buffer)? as u64;
    }
    let bytes = bytes - warmed;
    let rate = bytes as f64 / since.elapsed().as_secs_f64() / f64::from(1 << 20);
    to.shutdown(std::net::Shutdown::Both)?;
    drop(to);
    let _ = sending.join();
    Ok(rate)
}

/// The median microseconds from a byte to its echo.
fn round_trip(mut near: TcpStream, mut far: TcpStream, each: Duration) -> io::Result<f64> {
    let echoing = thread::spawn(move || {
        let mut byte = [0; 1];
        while far.read_exact(&mut byte).and_then(|()| far.write_all(&byte)).is_ok() {}
    });
    let mut trips = Vec::new();
    let since = Instant::now();
    let mut byte = [7; 1];
    while since.elapsed() < each {
        let begun = Instant::now();
        near.write_all(&byte)?;
        near.read_exact(&mut byte)?;
        trips.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    near.shutdown(std::net::Shutdown::Both)?;
    let _ = echoing.join();
    Ok(dunlin_benches::figures::median(&trips))
}
