//! The client's other direction: bytes that the pod compares.

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

/// One connection into which a piece of known bytes is written over and over, up to a rate. The pod answers with
/// a byte for each piece that it has compared and found right, and hangs up at one that is not.
pub struct Upload {
    seen: Arc<Seen>,
    /// Bytes that the pod has found right.
    bytes: Arc<AtomicU64>,
    stream: TcpStream,
}

impl Upload {
    /// Writes no faster than this, MiB/s: the pod compares byte by byte, and what it has left is for the others.
    pub const AT_MOST: u64 = 16;
    /// No answer for so long is a broken connection.
    const PATIENCE: Duration = Duration::from_secs(60);
    const BUFFER: usize = 64 << 10;

    /// Connects and begins; `piece` is what the pod expects, over and over.
    ///
    /// # Panics
    /// When nobody listens.
    #[track_caller]
    pub fn start(address: &str, piece: Vec<u8>) -> Upload {
        let stream = connect(address);
        stream.set_read_timeout(Some(Upload::PATIENCE)).expect("an option of sockets");
        let (seen, bytes) = (Arc::new(Seen::default()), Arc::new(AtomicU64::new(0)));
        let length = piece.len() as u64;
        let writer = stream.try_clone().expect("a socket's copy");
        let noted = Arc::clone(&seen);
        thread::spawn(move || {
            if let Err(reason) = Upload::write(writer, &piece, &noted) {
                noted.note_break(reason);
            }
        });
        let reader = stream.try_clone().expect("a socket's copy");
        let (noted, counted) = (Arc::clone(&seen), Arc::clone(&bytes));
        thread::spawn(move || {
            if let Err(reason) = Upload::answers(reader, length, &noted, &counted) {
                noted.note_break(reason);
            }
        });
        Upload { seen, bytes, stream }
    }

    fn write(mut stream: TcpStream, piece: &[u8], seen: &Seen) -> Result<(), String> {
        let (mut window, mut in_window, mut total) = (Instant::now(), 0_u64, 0_u64);
        while !seen.has_ended() {
            for part in piece.chunks(Upload::BUFFER) {
                match stream.write_all(part) {
                    Err(_) if seen.has_ended() => return Ok(()),
                    written => written.map_err(|error| format!("after {total} bytes: {error}"))?,
                }
                total += part.len() as u64;
                in_window += part.len() as u64;
                // What was not taken in time is not caught up with.
                let due = Duration::from_micros(in_window * 1_000_000 / (Upload::AT_MOST << 20));
                let spent = window.elapsed();
                if due > spent {
                    thread::sleep(due - spent);
                } else if spent - due > Duration::from_millis(50) {
                    (window, in_window) = (Instant::now(), 0);
                }
            }
        }
        Ok(())
    }

    fn answers(mut stream: TcpStream, length: u64, seen: &Seen, counted: &AtomicU64) -> Result<(), String> {
        let mut buffer = [0; 64];
        loop {
            let count = match stream.read(&mut buffer) {
                _ if seen.has_ended() => return Ok(()),
                read => read.map_err(|error| format!("no word of the pod: {error}"))?,
            };
            let right = counted.load(Ordering::Relaxed);
            if count == 0 {
                return Err(format!("the pod hung up over the {length} bytes after {right}"));
            }
            counted.store(right + length * count as u64, Ordering::Relaxed);
        }
    }

    /// Bytes that the pod has found right.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// No byte was wrong, and the connection stands.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_whole(&self) {
        if let Some(reason) = self.seen.broken() {
            panic!("the upload: {reason}");
        }
    }

    /// Waits until the pod has found `more` bytes right.
    ///
    /// # Panics
    /// When it does not, or one is wrong.
    #[track_caller]
    pub fn await_more(&self, more: u64) {
        let (wanted, since) = (self.bytes() + more, Instant::now());
        while self.bytes() < wanted {
            self.assert_whole();
            assert!(since.elapsed() < Upload::PATIENCE, "the upload stands still");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.seen.end();
        // Either thread may be waiting for the pod.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
