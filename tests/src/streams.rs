//! The far ends of a process's streams, as a careful client holds them: output is read from the FIFO of the host
//! that has the task, to its end, and then from the next host's; input goes to the FIFO that takes it.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crate::{Checker, last_line, line};

const LOOK: Duration = Duration::from_millis(50);
/// From the time that a FIFO is there to somebody at its other end.
const PEER: Duration = Duration::from_secs(60);
/// FIFOs that wait for their predecessor's end.
const QUEUED: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Events of a descriptor, within a moment.
fn poll(fd: RawFd, events: libc::c_short) -> libc::c_short {
    let mut asked = libc::pollfd { fd, events, revents: 0 };
    let wait = i32::try_from(LOOK.as_millis()).unwrap_or(50);
    // SAFETY: one valid entry, which outlives the call.
    let found = unsafe { libc::poll(&raw mut asked, 1, wait) };
    if found > 0 { asked.revents } else { 0 }
}

#[derive(Debug)]
struct Reading {
    checker: Mutex<Checker>,
    /// FIFOs that were read to their end.
    ends: Mutex<usize>,
    paused: AtomicBool,
    /// A FIFO without a writer is at its end, though none was seen.
    no_more_writers: AtomicBool,
    over: AtomicBool,
}

/// Reads one output stream of a process, wherever it comes from.
#[derive(Debug)]
pub struct Reader {
    /// For failures.
    pub name: String,
    reading: Arc<Reading>,
    fifos: mpsc::SyncSender<File>,
    given: usize,
    thread: Option<thread::JoinHandle<()>>,
}

impl Reader {
    /// A stream that is to be as `checker` says.
    pub fn start(name: &str, checker: Checker) -> Reader {
        let reading = Arc::new(Reading {
            checker: Mutex::new(checker),
            ends: Mutex::new(0),
            paused: AtomicBool::new(false),
            no_more_writers: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let (fifos, next) = mpsc::sync_channel(QUEUED);
        let thread = {
            let reading = Arc::clone(&reading);
            thread::spawn(move || {
                for fifo in next {
                    read_to_end(fifo, &reading);
                }
            })
        };
        Reader { name: name.to_owned(), reading, fifos, given: 0, thread: Some(thread) }
    }

    /// The stream goes on in this FIFO once the ones before are at their end. It is opened now, so that nothing in
    /// it is lost.
    ///
    /// # Panics
    /// When it cannot be opened.
    #[track_caller]
    pub fn follow(&mut self, fifo: &Path) {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(fifo);
        let opened = opened.unwrap_or_else(|error| panic!("{}: {}: {error}", self.name, fifo.display()));
        self.fifos.send(opened).expect("the reader reads");
        self.given += 1;
    }

    /// Stops reading, or goes on.
    pub fn pause(&self, paused: bool) {
        self.reading.paused.store(paused, Ordering::Relaxed);
    }

    /// The process has ended: nobody will begin to write to a FIFO that has no writer now.
    pub fn no_more_writers(&self) {
        self.reading.no_more_writers.store(true, Ordering::Relaxed);
    }

    /// Where it stands, for failures.
    pub fn standing(&self) -> String {
        let (ends, now) = (*lock(&self.reading.ends), self.so_far());
        format!(
            "{}: {} bytes, line {}, {ends} of {} FIFOs ended",
            self.name,
            now.bytes(),
            now.lines(),
            self.given
        )
    }

    /// What has come so far.
    pub fn so_far(&self) -> Checker {
        lock(&self.reading.checker).clone()
    }

    /// Waits until `more` further bytes have come.
    ///
    /// # Panics
    /// When they have not after `deadline`, or are not what they must be.
    #[track_caller]
    pub fn await_more(&self, more: u64, deadline: Duration) {
        let (since, from) = (Instant::now(), self.so_far().bytes());
        loop {
            let now = self.so_far();
            assert!(now.damage().is_none(), "{}: {}", self.name, now.damage().unwrap_or_default());
            if now.bytes() >= from + more {
                return;
            }
            assert!(since.elapsed() < deadline, "no more comes: {}", self.standing());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of the last FIFO; gives what came, or what is wrong with it.
    pub fn finish(mut self, deadline: Duration) -> Result<Checker, String> {
        let since = Instant::now();
        loop {
            let (ends, now) = (*lock(&self.reading.ends), self.so_far());
            if let Some(damage) = now.damage() {
                return Err(format!("{}: {damage}", self.name));
            }
            if ends == self.given {
                self.stop();
                let whole = now.is_whole();
                let lines = now.lines();
                return if whole { Ok(now) } else { Err(format!("{}: ends within line {lines}", self.name)) };
            }
            if since.elapsed() > deadline {
                return Err(format!(
                    "{}: {ends} of {} FIFOs are at their end, at line {}{}",
                    self.name,
                    self.given,
                    now.lines(),
                    if now.is_whole() { ", and all has come" } else { "" }
                ));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn stop(&mut self) {
        self.reading.over.store(true, Ordering::Relaxed);
        let (closed, _) = mpsc::sync_channel(1);
        drop(std::mem::replace(&mut self.fifos, closed));
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop();
    }
}

fn read_to_end(mut fifo: File, reading: &Reading) {
    let mut buffer = vec![0; 64 * 1024];
    while !reading.over.load(Ordering::Relaxed) {
        if reading.paused.load(Ordering::Relaxed) {
            thread::sleep(LOOK);
            continue;
        }
        // Hung up is only said once a writer has been there.
        let ready = poll(fifo.as_raw_fd(), libc::POLLIN);
        let no_more_writers = reading.no_more_writers.load(Ordering::Relaxed);
        if ready & (libc::POLLIN | libc::POLLHUP) == 0 && !no_more_writers {
            continue;
        }
        match fifo.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => lock(&reading.checker).take(&buffer[..n]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => break,
        }
    }
    *lock(&reading.ends) += 1;
}

#[derive(Debug)]
struct Feeding {
    over: AtomicBool,
    lines: Mutex<u64>,
}

/// Writes numbered lines to a process's input, wherever that is.
#[derive(Debug)]
pub struct Feeder {
    name: String,
    feeding: Arc<Feeding>,
    fifos: mpsc::SyncSender<File>,
    thread: Option<thread::JoinHandle<Result<(), String>>>,
}

impl Feeder {
    /// Begins to write to `fifo`: a line every `pause`, each byte once. A FIFO that nobody reads any more took what it
    /// took; the rest goes to the next.
    ///
    /// # Panics
    /// When nobody reads the FIFO.
    #[track_caller]
    pub fn start(name: &str, tag: &str, pause: Duration, fifo: &Path) -> Feeder {
        let feeding = Arc::new(Feeding { over: AtomicBool::new(false), lines: Mutex::new(0) });
        let (fifos, next) = mpsc::sync_channel(QUEUED);
        fifos.send(open_for_writing(name, fifo)).expect("a fresh channel");
        let thread = {
            let (feeding, tag) = (Arc::clone(&feeding), tag.to_owned());
            thread::spawn(move || feed(&feeding, &tag, pause, &next))
        };
        Feeder { name: name.to_owned(), feeding, fifos, thread: Some(thread) }
    }

    /// From now on this FIFO takes the input, when the present one takes no more.
    ///
    /// # Panics
    /// When nobody reads it.
    #[track_caller]
    pub fn follow(&self, fifo: &Path) {
        self.fifos.send(open_for_writing(&self.name, fifo)).expect("the feeder writes");
    }

    /// Writes the last line and ends; gives how many lines it wrote.
    ///
    /// # Panics
    /// When it cannot write all.
    #[track_caller]
    pub fn finish(mut self) -> u64 {
        self.feeding.over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("finished once").join().expect("feeding does not panic");
        ended.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        *lock(&self.feeding.lines)
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.feeding.over.store(true, Ordering::Relaxed);
    }
}

#[track_caller]
fn open_for_writing(name: &str, fifo: &Path) -> File {
    let since = Instant::now();
    loop {
        match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo) {
            Ok(file) => return file,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) && since.elapsed() < PEER => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{name}: nobody reads {}: {error}", fifo.display()),
        }
    }
}

fn feed(feeding: &Feeding, tag: &str, pause: Duration, next: &mpsc::Receiver<File>) -> Result<(), String> {
    let mut fifo = next.recv().map_err(|_| "there is no FIFO".to_owned())?;
    let mut number = 0;
    loop {
        let over = feeding.over.load(Ordering::Relaxed);
        let text = if over {
            last_line(number, "\n")
        } else {
            number += 1;
            line(tag, number, "\n")
        };
        let mut at = 0;
        let mut stood = Instant::now();
        while at < text.len() {
            match fifo.write(&text[at..]) {
                Ok(n) => {
                    at += n;
                    stood = Instant::now();
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    let _ = poll(fifo.as_raw_fd(), libc::POLLOUT);
                    if stood.elapsed() > PEER * 3 {
                        return Err(format!("its FIFO has taken nothing since {:?}", stood.elapsed()));
                    }
                }
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    fifo = next.recv_timeout(PEER * 3).map_err(|_| {
                        format!("at line {number}, byte {at}: its FIFO has no reader, and no other comes")
                    })?;
                }
                Err(error) => return Err(format!("at line {number}: {error}")),
            }
        }
        *lock(&feeding.lines) = number;
        if over {
            return Ok(());
        }
        thread::sleep(pause);
    }
}
