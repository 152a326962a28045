//! Pods on the lab's segment, and the client outside both hosts, whose sockets this program opens itself.

use std::{
    fs::File,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use nix::sched::{CloneFlags, setns};

use crate::{Host, Lab, Run};

const CLIENT: &str = "/run/netns/dunlin-client";
const CONNECT: Duration = Duration::from_secs(60);
const COMMAND: Duration = Duration::from_secs(60);
/// Bytes of one request, and of its answer.
const WORD: usize = 8;

/// A pod's network namespace on a host, until dropped.
pub struct PodNet<'a> {
    lab: &'a Lab,
    host: Host,
    name: String,
}

impl<'a> PodNet<'a> {
    /// `dunlin lab pod-net HOST NAME --silent OPTIONS`: its kernel answers nobody, so that the other host may have
    /// the same addresses.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn make(lab: &'a Lab, host: Host, name: &str, options: &[&str]) -> PodNet<'a> {
        let net = PodNet { lab, host, name: name.to_owned() };
        let command = [&["pod-net", host.name(), name, "--silent"], options].concat();
        Run::new(lab.lab_command(&command), COMMAND).ok();
        net
    }

    /// The same on both hosts.
    ///
    /// # Panics
    /// When one cannot be made.
    #[track_caller]
    pub fn on_both(lab: &'a Lab, name: &str, options: &[&str]) -> [PodNet<'a>; 2] {
        Host::ALL.map(|host| PodNet::make(lab, host, name, options))
    }

    /// As a spec names it.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

impl Drop for PodNet<'_> {
    fn drop(&mut self) {
        let _ = self.lab.lab_command(&["pod-net", self.host.name(), &self.name, "--down"]).output();
    }
}

/// Does `work` in the client's network, on a thread that ends with it.
///
/// # Panics
/// When the client is not there, or `work` panics.
pub fn at_client<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let namespace = File::open(CLIENT).unwrap_or_else(|error| panic!("{CLIENT}: {error}"));
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("the client's network can be entered");
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A connection from the client, as soon as somebody listens.
///
/// # Panics
/// When nobody does in time.
#[track_caller]
pub fn connect(address: &str) -> TcpStream {
    let address: SocketAddr = address.parse().expect("an address and a port");
    let since = Instant::now();
    loop {
        match at_client(move || TcpStream::connect_timeout(&address, Duration::from_secs(2))) {
            Ok(stream) => {
                stream.set_nodelay(true).expect("an option of TCP");
                return stream;
            }
            Err(error) => assert!(since.elapsed() < CONNECT, "{address} does not answer: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether somebody at `address` takes a connection within a second.
pub fn answers(address: &str) -> bool {
    let address: SocketAddr = address.parse().expect("an address and a port");
    at_client(move || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
}

/// One connection with a strict request and response: the next number goes every 10 ms, but never before the
/// one before has come back.
pub struct Echo {
    name: String,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

/// A long time between two responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// From the first to the second.
    pub length: Duration,
    /// When the second one came, by the clock that QEMU's events have too.
    pub end: SystemTime,
}

impl Gap {
    /// Whether it lasted at that time.
    pub fn holds(&self, time: SystemTime) -> bool {
        self.end.duration_since(time).is_ok_and(|left| left <= self.length)
    }
}

/// What the threads of a connection tell the test.
#[derive(Default)]
pub(crate) struct Seen {
    ended: AtomicBool,
    answers: AtomicU64,
    /// Since they were last asked for.
    gaps: Mutex<Vec<Gap>>,
    broken: Mutex<Option<String>>,
}

impl Seen {
    /// The test is done with the connection.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    pub(crate) fn note_break(&self, reason: String) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.get_or_insert(reason);
    }

    pub(crate) fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Echo {
    /// From one request to the next.
    pub const EVERY: Duration = Duration::from_millis(10);
    /// No answer for so long is a broken connection.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Connects and begins.
    ///
    /// # Panics
    /// When nobody listens.
    #[track_caller]
    pub fn start(address: &str) -> Echo {
        let stream = connect(address);
        stream.set_read_timeout(Some(Echo::PATIENCE)).expect("an option of sockets");
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        let thread = thread::spawn(move || {
            if let Err(reason) = Echo::ask(stream, &noted) {
                noted.note_break(reason);
            }
        });
        Echo { name: address.to_owned(), seen, thread: Some(thread) }
    }

    fn ask(mut stream: TcpStream, seen: &Seen) -> Result<(), String> {
        let (mut number, mut last) = (0_u64, Instant::now());
        while !seen.has_ended() {
            let begun = Instant::now();
            number += 1;
            let mut answer = [0; WORD];
            stream.write_all(&number.to_be_bytes()).map_err(|error| format!("request {number}: {error}"))?;
            stream.read_exact(&mut answer).map_err(|error| format!("response {number}: {error}"))?;
            let now = Instant::now();
            if u64::from_be_bytes(answer) != number {
                return Err(format!("the response to {number} is {}", u64::from_be_bytes(answer)));
            }
            let gap = now - last;
            last = now;
            seen.answers.fetch_add(1, Ordering::Relaxed);
            if gap > Echo::EVERY {
                let end = SystemTime::now();
                seen.gaps.lock().unwrap_or_else(PoisonError::into_inner).push(Gap { length: gap, end });
            }
            thread::sleep(Echo::EVERY.saturating_sub(begun.elapsed()));
        }
        Ok(())
    }

    /// The longest time between two responses since the last question.
    pub fn longest_gap(&self) -> Duration {
        self.gaps().iter().map(|gap| gap.length).max().unwrap_or_default()
    }

    /// The times between responses that were longer than [`Echo::EVERY`], since the last question.
    pub fn gaps(&self) -> Vec<Gap> {
        std::mem::take(&mut *self.seen.gaps.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for `more` responses.
    ///
    /// # Panics
    /// When the connection breaks.
    #[track_caller]
    pub fn await_more(&self, more: u64) {
        let wanted = self.seen.answers.load(Ordering::Relaxed) + more;
        let since = Instant::now();
        while self.seen.answers.load(Ordering::Relaxed) < wanted {
            self.assert_whole();
            assert!(since.elapsed() < Echo::PATIENCE, "{}: no responses any more", self.name);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Every request was answered, with itself.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_whole(&self) {
        if let Some(reason) = self.seen.broken() {
            panic!("the connection to {} broke: {reason}", self.name);
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.seen.end();
        // Not joined: it may be waiting for a peer that is gone, and ends by itself.
        drop(self.thread.take());
    }
}

/// All that a connection gives until its end.
///
/// # Panics
/// When nobody listens, or it breaks off.
#[track_caller]
pub fn fetch(address: &str) -> Vec<u8> {
    let mut stream = connect(address);
    stream.set_read_timeout(Some(CONNECT)).expect("an option of sockets");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("all of it");
    bytes
}

/// What differs between the two families in an echo that must not be fragmented.
struct Family {
    domain: libc::c_int,
    protocol: libc::c_int,
    /// Level, name and value of the options that forbid it.
    whole: &'static [(libc::c_int, libc::c_int, libc::c_int)],
    /// Types of request and reply.
    types: [u8; 2],
    /// IP's header, bytes.
    header: usize,
    /// Of it, what a raw socket hands out.
    shown: usize,
}

impl Family {
    fn of(address: IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family {
                domain: libc::AF_INET,
                protocol: libc::IPPROTO_ICMP,
                whole: &[(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)],
                types: [8, 0],
                header: 20,
                shown: 20,
            },
            IpAddr::V6(_) => Family {
                domain: libc::AF_INET6,
                protocol: libc::IPPROTO_ICMPV6,
                whole: &[
                    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
                    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1),
                ],
                types: [128, 129],
                header: 40,
                shown: 0,
            },
        }
    }

    fn socket(&self) -> std::net::UdpSocket {
        // SAFETY: no pointers; the result is checked before it is used.
        let socket = unsafe { libc::socket(self.domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, self.protocol) };
        assert!(socket >= 0, "a raw socket: {}", std::io::Error::last_os_error());
        // SAFETY: it is open, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        for (level, name, value) in self.whole {
            // SAFETY: the value is an int, as its length says, and outlives the call.
            let set = unsafe {
                libc::setsockopt(socket.as_raw_fd(), *level, *name, std::ptr::from_ref(value).cast(), 4)
            };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        }
        // Only the methods of a UDP socket are used that mean the same for a raw one.
        let socket = std::net::UdpSocket::from(socket);
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("an option of sockets");
        socket
    }
}

/// Sends ICMP echoes of `length` bytes, IP's header included, that must not be fragmented on their way;
/// says whether one came back in time.
///
/// # Panics
/// When the client has no such socket, or the packet is longer than its own MTU.
#[track_caller]
pub fn ping(to: &str, length: usize, within: Duration) -> bool {
    let to: IpAddr = to.parse().expect("an address");
    let family = Family::of(to);
    at_client(move || {
        let socket = family.socket();
        let identity = u16::try_from(length).expect("an IP packet");
        let mut packet = vec![0x5a; length - family.header];
        packet[..4].copy_from_slice(&[family.types[0], 0, 0, 0]);
        packet[4..6].copy_from_slice(&identity.to_be_bytes());
        packet[6..8].copy_from_slice(&1_u16.to_be_bytes());
        // The kernel puts ICMPv6's own sum over this one.
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        let target = SocketAddr::from((to, 0));
        let since = Instant::now();
        while since.elapsed() < within {
            let sent = socket.send_to(&packet, target);
            assert!(sent.is_ok(), "a packet of {length} bytes cannot be sent: {sent:?}");
            let mut answer = vec![0; length + 100];
            while let Ok((count, from)) = socket.recv_from(&mut answer) {
                let answer = &answer[family.shown.min(count)..count];
                let is_reply = answer.len() == packet.len()
                    && answer[0] == family.types[1]
                    && answer[4..] == packet[4..];
                if from.ip() == to && is_reply {
                    return true;
                }
            }
        }
        false
    })
}

fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum & 0xffff).unwrap_or(0)
}
