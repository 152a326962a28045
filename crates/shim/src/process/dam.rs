//! Keeps the writers of an input FIFO out while a move decides which host reads on.
//!
//! After the guest's pause nobody reads the FIFO here any more, and what a client wrote into it then would be accepted
//! and lost with it. So the FIFO is filled up: a writer blocks, as it would before a slow reader, until this host
//! reads on, or until the read end goes, which tells the writer (EPIPE) exactly what was not taken.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use nix::fcntl::FcntlArg;

use super::fifos::bytes_in;

/// A writer may come between the emptying and the filling; how often that is tried to be without one.
const ROUNDS: usize = 16;
const DEFAULT_CAPACITY: usize = 64 * 1024;

/// How much filler stands in the FIFO, before anything else.
#[derive(Debug, Default)]
pub(crate) struct Dam {
    filler: usize,
}

impl Dam {
    /// Takes what the FIFO holds into `taken` and fills it up. Both ends are non-blocking. False: writers were so eager
    /// that some of what they write from now on may be lost if this host does not read on.
    pub(crate) fn close(&mut self, read: &File, write: &File, taken: &mut Vec<u8>) -> bool {
        for _ in 0..ROUNDS {
            self.drop_filler(read);
            // Non-blocking: it ends with "would block".
            let _ = (&*read).read_to_end(taken);
            self.filler = fill(write);
            let late = bytes_in(read.as_raw_fd()).saturating_sub(self.filler);
            if late == 0 {
                return true;
            }
            // It was full before this and is read here only: they stand before the filler.
            let _ = read.take(u64::try_from(late).unwrap_or(0)).read_to_end(taken);
        }
        false
    }

    /// Takes the filler out again: what a writer wrote comes next. Repeats do nothing.
    pub(crate) fn open(&mut self, read: &File) {
        self.drop_filler(read);
    }

    fn drop_filler(&mut self, read: &File) {
        let filler = u64::try_from(std::mem::take(&mut self.filler)).unwrap_or(0);
        let _ = std::io::copy(&mut read.take(filler), &mut std::io::sink());
    }
}

/// Gives the bytes that fitted.
fn fill(mut write: &File) -> usize {
    let capacity = nix::fcntl::fcntl(write, FcntlArg::F_GETPIPE_SZ).ok();
    let capacity = capacity.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(DEFAULT_CAPACITY);
    // One write: nobody else's bytes come between its pages.
    write.write(&vec![0; capacity]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    struct Fifo {
        _directory: tempfile::TempDir,
        read: File,
        write: File,
        client: File,
    }

    fn fifo() -> Fifo {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stdin");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut options = File::options();
        options.custom_flags(nix::libc::O_NONBLOCK);
        let read = options.clone().read(true).open(&path).unwrap();
        let write = options.clone().write(true).open(&path).unwrap();
        let client = options.write(true).open(&path).unwrap();
        Fifo { _directory: directory, read, write, client }
    }

    fn all(read: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = (&*read).read_to_end(&mut bytes);
        bytes
    }

    #[test]
    fn a_closed_dam_takes_nothing_and_an_open_one_leaves_nothing_behind() {
        let Fifo { read, write, mut client, _directory } = fifo();
        client.write_all(b"before").unwrap();
        let (mut dam, mut taken) = (Dam::default(), Vec::new());
        assert!(dam.close(&read, &write, &mut taken));
        assert_eq!(taken, b"before");
        assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::WouldBlock);
        // A second pause: the same again.
        assert!(dam.close(&read, &write, &mut taken));
        assert_eq!(taken, b"before");
        dam.open(&read);
        dam.open(&read);
        client.write_all(b"after").unwrap();
        assert_eq!(all(&read), b"after");
    }

    #[test]
    fn a_writer_without_a_reader_learns_what_was_not_taken() {
        let Fifo { read, write, mut client, _directory } = fifo();
        let mut dam = Dam::default();
        assert!(dam.close(&read, &write, &mut Vec::new()));
        drop((read, write));
        assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn nothing_of_a_busy_writer_is_lost_over_many_pauses() {
        let Fifo { read, write, mut client, _directory } = fifo();
        let over = AtomicBool::new(false);
        let (mut taken, mut dam) = (Vec::new(), Dam::default());
        let (written, closed) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut number = 0_u32;
                while !over.load(Ordering::Relaxed) {
                    // Whole or not at all, as it is less than PIPE_BUF.
                    if client.write(&number.to_le_bytes()).is_ok() {
                        number += 1;
                    }
                }
                number
            });
            let (since, mut closed) = (Instant::now(), 0);
            while since.elapsed() < Duration::from_millis(500) {
                closed += u32::from(dam.close(&read, &write, &mut taken));
                dam.open(&read);
                let _ = (&read).read_to_end(&mut taken);
            }
            over.store(true, Ordering::Relaxed);
            (writer.join().unwrap(), closed)
        });
        let _ = (&read).read_to_end(&mut taken);
        let expected: Vec<u8> = (0..written).flat_map(u32::to_le_bytes).collect();
        assert!(taken == expected, "{} bytes of {}", taken.len(), expected.len());
        assert!(closed > 0, "it was never closed to the end");
    }
}
