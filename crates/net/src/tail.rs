//! Frames that came while nobody read them: what was sent into a tap is followed by a thread, and what was sent from
//! a given time on can be had in order to send it again, elsewhere.
//!
//! A frame is a virtio network header of 10 bytes (checksum and segmentation that are still to be done) and the
//! Ethernet frame. A VLAN tag that hardware would insert is not in it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::NetError;
use crate::namespace::Namespace;
use crate::packet;

/// Bytes before each frame.
pub const HEADER: usize = 10;
/// The longest that offloading makes, with both headers and a tag.
const LONGEST: usize = HEADER + 18 + 65_535;
/// What is kept while the time is not known yet from which on frames count: the latest.
const KEPT: usize = 2 << 20;
/// What waits in the kernel while the thread is not running.
const QUEUE: i32 = 4 << 20;
/// A socket that gives nothing but errors is given up.
const ERRORS_MAX: u32 = 10_000;

/// Follows what is sent into one tap, until it is ended or dropped.
#[derive(Debug)]
pub struct Tail {
    wake: EventFd,
    /// Dropped unsent: nobody asks.
    asks: Option<mpsc::Sender<Span>>,
    thread: Option<JoinHandle<Vec<Vec<u8>>>>,
}

/// Which frames.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// All that came since, the first that fit.
    pub since: SystemTime,
    /// Then those that came so long before it, the last that fit.
    pub before: Duration,
    /// Bytes in all, headers included.
    pub most: usize,
}

struct Frame {
    at: SystemTime,
    bytes: Vec<u8>,
}

impl Tail {
    /// Begins to follow the tap with this number in the namespace.
    pub fn follow(namespace: &Namespace, tap: u32) -> Result<Tail, NetError> {
        let socket = namespace.run(|| packet::outgoing(tap))?.map_err(NetError::Socket)?;
        packet::set_queue(&socket, QUEUE).map_err(NetError::Socket)?;
        let failed = |errno: Errno| NetError::Socket(errno.into());
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(failed)?;
        let heard = wake.as_fd().try_clone_to_owned().map_err(NetError::Socket)?;
        let (asks, asked) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("tail-{tap}"))
            .spawn(move || read_all(&socket, &heard, &asked))
            .map_err(NetError::Socket)?;
        Ok(Tail { wake, asks: Some(asks), thread: Some(thread) })
    }

    /// Ends it and gives the frames that are wanted, in the order in which they came, by the host's clock. Takes no
    /// longer than reading what has come.
    #[must_use]
    pub fn end(mut self, wanted: Span) -> Vec<Vec<u8>> {
        if let Some(sender) = self.asks.take() {
            // A thread that has ended of itself has nothing more to give than this.
            let _ = sender.send(wanted);
        }
        self.join()
    }

    fn join(&mut self) -> Vec<Vec<u8>> {
        self.asks = None;
        // A counter that cannot be raised is up already.
        let _ = self.wake.write(1);
        self.thread.take().map(|thread| thread.join().unwrap_or_default()).unwrap_or_default()
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.join();
        }
    }
}

/// Gives frames to those who were woken for them, headers before them.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
    tap: u32,
}

impl Injector {
    /// For the tap with this number in the namespace.
    pub fn open(namespace: &Namespace, tap: u32) -> Result<Injector, NetError> {
        let socket = namespace.run(packet::deaf_with_headers)?.map_err(NetError::Socket)?;
        Ok(Injector { socket, tap })
    }

    /// Sends frames, as [`Tail::end`] gave them, into the tap. Gives how many went; one that the kernel finds
    /// malformed is left out, and the first error is given with the count.
    pub fn send(&self, frames: &[Vec<u8>]) -> (usize, Option<io::Error>) {
        let (mut sent, mut first) = (0, None);
        for frame in frames {
            match packet::send(&self.socket, self.tap, frame) {
                Ok(()) => sent += 1,
                Err(error) => first = first.or(Some(error)),
            }
        }
        (sent, first)
    }
}

fn read_all(socket: &OwnedFd, wake: &OwnedFd, asked: &mpsc::Receiver<Span>) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; LONGEST];
    let (mut kept, mut bytes): (VecDeque<Frame>, usize) = (VecDeque::new(), 0);
    let mut errors = 0;
    loop {
        let mut ready =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Vec::new(),
        }
        let ending = ready[1].any().unwrap_or(false);
        // One round at a time: a flood does not keep the end out.
        for _ in 0..if ending { usize::MAX } else { 64 } {
            match receive(socket, &mut buffer) {
                Ok(Some(frame)) => {
                    bytes += frame.bytes.len();
                    kept.push_back(frame);
                }
                Ok(None) => break,
                // The tap went down or away, or a frame's kind has no header: the next may have one.
                Err(_) if errors < ERRORS_MAX => errors += 1,
                Err(_) => return Vec::new(),
            }
            while !ending && bytes > KEPT {
                bytes -= kept.pop_front().map_or(bytes, |frame| frame.bytes.len());
            }
            if ending && bytes > 4 * KEPT {
                break;
            }
        }
        if ending {
            return match asked.try_recv() {
                Ok(wanted) => chosen(kept, &wanted),
                Err(_) => Vec::new(),
            };
        }
    }
}

fn chosen(kept: VecDeque<Frame>, wanted: &Span) -> Vec<Vec<u8>> {
    let mut left = wanted.most;
    let mut fits = |frame: &Frame| {
        let fits = frame.bytes.len() <= left;
        left = left.saturating_sub(frame.bytes.len());
        fits
    };
    let earliest = wanted.since.checked_sub(wanted.before).unwrap_or(SystemTime::UNIX_EPOCH);
    let (before, since): (Vec<Frame>, Vec<Frame>) =
        kept.into_iter().filter(|frame| frame.at >= earliest).partition(|frame| frame.at < wanted.since);
    let since: Vec<Frame> = since.into_iter().take_while(&mut fits).collect();
    let mut before: Vec<Frame> = before.into_iter().rev().take_while(&mut fits).collect();
    before.reverse();
    before.into_iter().chain(since).map(|frame| frame.bytes).collect()
}

/// The next frame that has come, without waiting.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<Frame>> {
    // The C libraries differ in how wide the field for its length is.
    const CONTROL: u8 = 64;
    let mut control = [0_u64; CONTROL as usize / size_of::<u64>()];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a `msghdr` of zeros is one that points nowhere.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL.into();
    // SAFETY: the buffers are alive for the call and of the lengths given.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(length) = usize::try_from(length) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    };
    if message.msg_flags & libc::MSG_TRUNC != 0 || length <= HEADER {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let at = time_of(&message).unwrap_or_else(SystemTime::now);
    Ok(Some(Frame { at, bytes: buffer[..length].to_vec() }))
}

fn time_of(message: &libc::msghdr) -> Option<SystemTime> {
    // SAFETY: the kernel has filled the control buffer, which is aligned for its headers and alive.
    let time = unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        loop {
            let one = header.as_ref()?;
            if one.cmsg_level == libc::SOL_SOCKET && one.cmsg_type == libc::SCM_TIMESTAMPNS {
                break libc::CMSG_DATA(one).cast::<libc::timespec>().read_unaligned();
            }
            header = libc::CMSG_NXTHDR(message, one);
        }
    };
    let since = Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_since_a_time_that_fit_are_chosen_and_then_the_last_before_it() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let chosen = |since, before, most| -> Vec<u8> {
            let frame = |time: u8| Frame { at: at(time.into()), bytes: vec![time; 10] };
            let wanted = Span { since: at(since), before: Duration::from_secs(before), most };
            chosen((1..7).map(frame).collect(), &wanted).iter().map(|bytes| bytes[0]).collect()
        };
        assert_eq!(chosen(4, 0, 100), [4, 5, 6]);
        assert_eq!(chosen(4, 2, 100), [2, 3, 4, 5, 6]);
        assert_eq!(chosen(4, 2, 49), [3, 4, 5, 6]);
        assert_eq!(chosen(4, 2, 29), [4, 5]);
        assert_eq!(chosen(7, 1, 100), [6]);
        assert_eq!(chosen(0, 9, 9), []);
    }
}
