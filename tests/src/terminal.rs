//! Terminals with somebody at them: a program on a pty of its own, and a process's streams held as an interactive
//! client holds them.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::sys::termios;

/// From what is typed to what is shown for it.
const SHOWN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

/// What came from a terminal, and the end that is typed at.
#[derive(Debug)]
pub struct Terminal {
    name: String,
    keys: File,
    shown: Arc<Mutex<Vec<u8>>>,
    /// What was looked for is found only behind what was found before.
    seen: usize,
    program: Option<Child>,
}

fn size(columns: u16, rows: u16) -> libc::winsize {
    libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// How a shell says that it waits, after [`Terminal::without_echo`].
    pub const PROMPT: &'static str = "<42> ";

    /// Starts a program on a new pty of this size; it is its controlling terminal, so that a new size is signalled.
    ///
    /// # Panics
    /// When there is no pty or the program cannot be started.
    pub fn start(mut command: Command, columns: u16, rows: u16) -> Terminal {
        let name = format!("{command:?}").replace('"', "");
        let pty = nix::pty::openpty(Some(&size(columns, rows)), None).expect("a pty");
        // `ctr` leaves this on, and the guest's terminal has done it already.
        let mut modes = termios::tcgetattr(&pty.slave).expect("the terminal's modes");
        modes.output_flags.remove(termios::OutputFlags::ONLCR);
        termios::tcsetattr(&pty.slave, termios::SetArg::TCSANOW, &modes).expect("the terminal's modes");
        let slave = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("a descriptor"));
        command.stdin(slave(&pty.slave)).stdout(slave(&pty.slave)).stderr(slave(&pty.slave));
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let program = command.spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        drop((command, pty.slave));
        let keys = File::from(pty.master);
        let screen = keys.try_clone().expect("a descriptor");
        Terminal::over(name, keys, screen, Some(program))
    }

    /// Holds the two FIFOs of a process that has a terminal, as a client does that attaches to it.
    ///
    /// # Panics
    /// When they cannot be opened.
    pub fn attach(name: &str, stdin: &Path, stdout: &Path) -> Terminal {
        let open = |options: &mut OpenOptions, path: &Path| {
            options.open(path).unwrap_or_else(|error| panic!("{name}: {}: {error}", path.display()))
        };
        // A reader first: it waits for nobody.
        let screen = open(OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK), stdout);
        let keys = open(OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK), stdin);
        for file in [&screen, &keys] {
            // SAFETY: the descriptor is open, and its only flag of this kind goes.
            assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) }, 0, "{name}: blocking");
        }
        Terminal::over(name.to_owned(), keys, screen, None)
    }

    fn over(name: String, keys: File, mut screen: File, program: Option<Child>) -> Terminal {
        let shown = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&shown);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A pty says EIO when its other side is closed.
            while let Ok(size @ 1..) = screen.read(&mut buffer) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..size]);
            }
        });
        Terminal { name, keys, shown, seen: 0, program }
    }

    /// All that was shown so far.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Types, byte for byte.
    ///
    /// # Panics
    /// When nobody takes it.
    #[track_caller]
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Waits until a text is shown, behind the text that was awaited before. Gives what stands between the two.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn await_text(&mut self, wanted: &str) -> String {
        let since = Instant::now();
        loop {
            let shown = self.shown();
            let new = &shown[self.seen.min(shown.len())..];
            if let Some(at) = new.find(wanted) {
                let between = new[..at].to_owned();
                self.seen += at + wanted.len();
                return between;
            }
            assert!(since.elapsed() < SHOWN, "{}: no `{wanted}` on the terminal, only {new:?}", self.name);
            thread::sleep(LOOK);
        }
    }

    /// Has a fresh shell show nothing but what its programs print and [`Terminal::PROMPT`]: no echo, and none of its
    /// line editor's redrawing.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn without_echo(&mut self) {
        self.press("stty -echo; PS1=\"<$((6 * 7))> \"\n");
        self.await_text(Terminal::PROMPT);
    }

    /// Types a line to a shell and gives all that is shown up to the next prompt.
    ///
    /// # Panics
    /// When no prompt comes.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> String {
        self.press(&format!("{line}\n"));
        self.await_text(Terminal::PROMPT)
    }

    /// Makes the pty's window another size; the program on it is signalled.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = size(columns, rows);
        // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
        let done = unsafe { libc::ioctl(self.keys.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(done, 0, "{}: {}", self.name, std::io::Error::last_os_error());
    }

    /// Gives a client's terminal this size until the shell behind it says so: a client that has just attached misses
    /// the signal of a change.
    ///
    /// # Panics
    /// When it does not become so.
    #[track_caller]
    pub fn become_size(&mut self, columns: u16, rows: u16) {
        let (since, wanted) = (Instant::now(), format!("{rows} {columns}\r\n"));
        loop {
            self.resize(columns, rows);
            thread::sleep(LOOK * 5);
            let now = self.ask("stty size");
            if now == wanted {
                return;
            }
            assert!(since.elapsed() < SHOWN, "{}: the window is {now:?}, not {wanted:?}", self.name);
            self.resize(columns, rows + 1);
        }
    }

    /// Asks a shell for its window's size until it is this.
    ///
    /// # Panics
    /// When it does not become so.
    #[track_caller]
    pub fn await_size(&mut self, columns: u16, rows: u16) {
        let (since, wanted) = (Instant::now(), format!("{rows} {columns}\r\n"));
        loop {
            let now = self.ask("stty size");
            if now == wanted {
                return;
            }
            assert!(since.elapsed() < SHOWN, "{}: the window is {now:?}, not {wanted:?}", self.name);
            thread::sleep(LOOK * 5);
        }
    }

    /// Waits for the program's end; its exit code, -1 when a signal ended it.
    ///
    /// # Panics
    /// When it does not end, or there is none.
    #[track_caller]
    pub fn ended(mut self) -> i32 {
        let mut program = self.program.take().expect("a program on the terminal");
        let since = Instant::now();
        loop {
            if let Some(status) = program.try_wait().expect("waited for") {
                return status.code().unwrap_or(-1);
            }
            if since.elapsed() > SHOWN {
                self.program = Some(program);
                panic!("{} does not end; on its terminal: {:?}", self.name, self.shown());
            }
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(program) = &mut self.program {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}
