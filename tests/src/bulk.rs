//! Much on one connection of the client's, in one direction, every byte compared: a download by this program, an upload
//! by the pod.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::network::{Seen, connect};

/// No byte for so long is a broken connection.
const PATIENCE: Duration = Duration::from_secs(60);
/// A download is read no faster than this, MiB/s: what the machine has left is for the others.
const DOWN_AT_MOST: u64 = 64;
/// An upload is written no faster: the pod compares byte by byte.
const UP_AT_MOST: u64 = 16;
const READ: usize = 256 << 10;
const WRITTEN: usize = 64 << 10;

/// One connection that carries as much as it takes, up to a rate.
pub struct Bulk {
    what: &'static str,
    seen: Arc<Seen>,
    /// Bytes that arrived and were right.
    bytes: Arc<AtomicU64>,
    stream: TcpStream,
}

impl Bulk {
    /// Connects and reads; `pattern` is what comes, over and over.
    ///
    /// # Panics
    /// When nobody listens.
    #[track_caller]
    pub fn download(address: &str, pattern: Vec<u8>) -> Bulk {
        let bulk = Bulk::connect("download", address);
        let bytes = Arc::clone(&bulk.bytes);
        bulk.spawn(move |stream, seen| download(stream, &pattern, seen, &bytes));
        bulk
    }

    /// Connects and writes `piece` over and over. The pod answers with a byte for each that it has compared and
    /// found right, and hangs up at one that is not.
    ///
    /// # Panics
    /// When nobody listens.
    #[track_caller]
    pub fn upload(address: &str, piece: Vec<u8>) -> Bulk {
        let bulk = Bulk::connect("upload", address);
        let (bytes, length) = (Arc::clone(&bulk.bytes), piece.len() as u64);
        bulk.spawn(move |stream, seen| upload(stream, &piece, seen));
        bulk.spawn(move |stream, seen| answers(stream, length, seen, &bytes));
        bulk
    }

    #[track_caller]
    fn connect(what: &'static str, address: &str) -> Bulk {
        let stream = connect(address);
        stream.set_read_timeout(Some(PATIENCE)).expect("an option of sockets");
        Bulk { what, seen: Arc::default(), bytes: Arc::default(), stream }
    }

    fn spawn(&self, work: impl FnOnce(TcpStream, &Seen) -> Result<(), String> + Send + 'static) {
        let stream = self.stream.try_clone().expect("a socket's copy");
        let seen = Arc::clone(&self.seen);
        thread::spawn(move || match work(stream, &seen) {
            Err(reason) if !seen.has_ended() => seen.note_break(reason),
            _ => {}
        });
    }

    /// Bytes that have come and were right.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Every byte was the right one, and the connection stands.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_whole(&self) {
        if let Some(reason) = self.seen.broken() {
            panic!("the {}: {reason}", self.what);
        }
    }

    /// Waits for `more` bytes.
    ///
    /// # Panics
    /// When they do not come, or are wrong.
    #[track_caller]
    pub fn await_more(&self, more: u64) {
        let (wanted, since) = (self.bytes() + more, Instant::now());
        while self.bytes() < wanted {
            self.assert_whole();
            assert!(since.elapsed() < PATIENCE, "the {} stands still", self.what);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.seen.end();
        // A thread may be waiting for the pod.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Holds a stream to a rate.
struct Pace {
    /// Bytes a second.
    at_most: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(mib: u64) -> Pace {
        Pace { at_most: mib << 20, since: Instant::now(), bytes: 0 }
    }

    /// Sleeps until so many more bytes are due. What was not carried in time is not caught up with.
    fn carried(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        let due = Duration::from_micros(self.bytes * 1_000_000 / self.at_most);
        let spent = self.since.elapsed();
        if due > spent {
            thread::sleep(due - spent);
        } else if spent - due > Duration::from_millis(50) {
            (self.since, self.bytes) = (Instant::now(), 0);
        }
    }
}

fn download(mut stream: TcpStream, pattern: &[u8], seen: &Seen, counted: &AtomicU64) -> Result<(), String> {
    let mut buffer = vec![0; READ];
    let (mut total, mut at) = (0_u64, 0_usize);
    let mut pace = Pace::new(DOWN_AT_MOST);
    while !seen.has_ended() {
        let count = stream.read(&mut buffer).map_err(|error| format!("after {total} bytes: {error}"))?;
        if count == 0 {
            return Err(format!("it ended after {total} bytes"));
        }
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let part = rest.len().min(pattern.len() - at);
            if rest[..part] != pattern[at..at + part] {
                let wrong = rest.iter().zip(&pattern[at..]).take_while(|(is, should)| is == should).count();
                return Err(format!("byte {} is wrong", total + (count - rest.len() + wrong) as u64));
            }
            at = (at + part) % pattern.len();
            rest = &rest[part..];
        }
        total += count as u64;
        counted.store(total, Ordering::Relaxed);
        pace.carried(count);
    }
    Ok(())
}

fn upload(mut stream: TcpStream, piece: &[u8], seen: &Seen) -> Result<(), String> {
    let (mut pace, mut total) = (Pace::new(UP_AT_MOST), 0_u64);
    while !seen.has_ended() {
        for part in piece.chunks(WRITTEN) {
            stream.write_all(part).map_err(|error| format!("after {total} bytes: {error}"))?;
            total += part.len() as u64;
            pace.carried(part.len());
        }
    }
    Ok(())
}

fn answers(mut stream: TcpStream, length: u64, seen: &Seen, counted: &AtomicU64) -> Result<(), String> {
    let mut buffer = [0; 64];
    while !seen.has_ended() {
        let count = stream.read(&mut buffer).map_err(|error| format!("no word of the pod: {error}"))?;
        let right = counted.load(Ordering::Relaxed);
        if count == 0 {
            return Err(format!("the pod hung up over the {length} bytes after {right}"));
        }
        counted.store(right + length * count as u64, Ordering::Relaxed);
    }
    Ok(())
}
