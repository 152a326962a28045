//! PID 1's side: starts the short-lived process, asks, takes over what came of it.

use std::io::{self, BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::{Answer, CONTROL_FD, Request};
use crate::reaper::{Reaper, Watched};

/// How long one operation may take; under emulation a create takes half a second.
const OPERATION_DEADLINE: Duration = Duration::from_secs(60);

/// A container operation failed.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The short-lived process could not be started.
    #[error(
        "cannot start the container process {program:?}: {source}; the guest is out of memory or processes"
    )]
    Spawn {
        /// What was to be started.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It ended or fell silent without an answer.
    #[error("the container process gave no answer: {0}; see the guest's log for its last words")]
    NoAnswer(io::Error),
    /// It answered something that is no answer to what was asked.
    #[error("the container process answered {0:?}, which does not fit the request")]
    WrongAnswer(String),
    /// The container runtime refused or failed.
    #[error("{0}")]
    Runtime(String),
    /// The pty's master did not arrive.
    #[error(
        "the container's terminal did not arrive: {0}; does its root file system allow a devpts on /dev/pts?"
    )]
    Console(io::Error),
}

/// Standard streams for the new process; what is absent is `/dev/null`.
#[derive(Debug, Default)]
pub struct ProcessStdio {
    /// Read end for fd 0.
    pub stdin: Option<OwnedFd>,
    /// Write end for fd 1.
    pub stdout: Option<OwnedFd>,
    /// Write end for fd 2.
    pub stderr: Option<OwnedFd>,
}

/// Starts container operations. Its calls block: use it from blocking tasks only.
#[derive(Clone)]
pub struct Client {
    program: PathBuf,
    reaper: Reaper,
}

impl Client {
    /// `program` is a `dunlin-guest`; PID 1 gives `/proc/self/exe`.
    pub fn new(program: PathBuf, reaper: Reaper) -> Client {
        Client { program, reaper }
    }

    /// Creates a container or starts a process in one. With `console`, the pty's master comes back.
    pub fn start_process(
        &self,
        request: &Request,
        stdio: ProcessStdio,
        console: Option<&mut Console>,
    ) -> Result<(Watched, Option<OwnedFd>), OciError> {
        let mut control = self.ask(request, stdio)?;
        let pid = match read_answer(&control)? {
            Answer::Process { pid } if pid > 1 => pid,
            Answer::Failed { error } => return Err(OciError::Runtime(error)),
            other => return Err(OciError::WrongAnswer(format!("{other:?}"))),
        };
        let watched = self.reaper.adopt(pid);
        // The process lives on its own from here; a lost byte only means its parent has died.
        let _ = control.write_all(b"\n");
        let master = console.map(Console::take).transpose().inspect_err(|_| {
            let _ = self.reaper.signal(&watched, libc::SIGKILL);
        })?;
        Ok((watched, master))
    }

    /// Carries out an operation of which no process comes.
    pub fn call(&self, request: &Request) -> Result<(), OciError> {
        let control = self.ask(request, ProcessStdio::default())?;
        match read_answer(&control)? {
            Answer::Done => Ok(()),
            Answer::Failed { error } => Err(OciError::Runtime(error)),
            other @ Answer::Process { .. } => Err(OciError::WrongAnswer(format!("{other:?}"))),
        }
    }

    fn ask(&self, request: &Request, stdio: ProcessStdio) -> Result<UnixStream, OciError> {
        let spawn = |source| OciError::Spawn { program: self.program.clone(), source };
        let (mut ours, theirs) = UnixStream::pair().map_err(spawn)?;
        let control = theirs.as_raw_fd();
        let mut command = Command::new(&self.program);
        command
            .arg0("dunlin-guest")
            .arg("oci")
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(stream(stdio.stdin))
            .stdout(stream(stdio.stdout))
            .stderr(stream(stdio.stderr));
        // SAFETY: between fork and exec only dup2 and fcntl are called, which are async-signal-safe.
        unsafe { command.pre_exec(move || place_control(control)) };
        let mut helper = self.reaper.spawn(&mut command).map_err(spawn)?;
        drop((theirs, command));

        let mut line = serde_json::to_vec(request).map_err(|e| OciError::NoAnswer(e.into()))?;
        line.push(b'\n');
        ours.set_read_timeout(Some(OPERATION_DEADLINE)).map_err(OciError::NoAnswer)?;
        ours.set_write_timeout(Some(OPERATION_DEADLINE)).map_err(OciError::NoAnswer)?;
        ours.write_all(&line).map_err(OciError::NoAnswer)?;
        self.kill_when_late(&mut helper, &ours);
        Ok(ours)
    }

    /// A parked container init keeps a copy of the control socket, so the socket's end cannot tell
    /// that the short-lived process died. Its exit can: it shuts the socket down, which wakes us.
    fn kill_when_late(&self, helper: &mut Watched, control: &UnixStream) {
        let Ok(control) = control.try_clone() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (mut helper, reaper) = (helper.clone(), self.reaper.clone());
        runtime.spawn(async move {
            if tokio::time::timeout(OPERATION_DEADLINE, helper.wait()).await.is_err() {
                let _ = reaper.signal(&helper, libc::SIGKILL);
            }
            // Only the reading half: what was answered before is still there to be read.
            let _ = control.shutdown(std::net::Shutdown::Write);
            let _ = control.shutdown(std::net::Shutdown::Read);
        });
    }
}

fn stream(fd: Option<OwnedFd>) -> Stdio {
    fd.map_or_else(Stdio::null, Stdio::from)
}

fn place_control(control: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls on descriptors that this process owns after the fork.
    let done = unsafe {
        if control == CONTROL_FD {
            libc::fcntl(control, libc::F_SETFD, 0)
        } else {
            libc::dup2(control, CONTROL_FD)
        }
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn read_answer(control: &UnixStream) -> Result<Answer, OciError> {
    let mut line = String::new();
    let read = BufReader::new(control).read_line(&mut line).map_err(OciError::NoAnswer)?;
    if read == 0 {
        return Err(OciError::NoAnswer(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_str(&line).map_err(|_| OciError::WrongAnswer(line.trim_end().to_owned()))
}

static CONSOLES: AtomicU64 = AtomicU64::new(0);

/// A socket that waits for one pty master, on a thread, so that the terminal has its size before
/// the process that runs on it looks.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    receiver: Option<JoinHandle<io::Result<OwnedFd>>>,
}

impl Console {
    /// Listens on a fresh socket in `dir`, which is created if need be. `size` is columns and rows.
    pub fn listen(dir: &Path, size: Option<(u16, u16)>) -> Result<Console, OciError> {
        std::fs::create_dir_all(dir).map_err(OciError::Console)?;
        let number = CONSOLES.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("console-{number}.sock"));
        let listener = UnixListener::bind(&path).map_err(OciError::Console)?;
        let receiver = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || receive_master(&listener, size))
            .map_err(OciError::Console)?;
        Ok(Console { path, receiver: Some(receiver) })
    }

    /// Path to name in the request.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The master; it was sent before the request was answered, so this does not wait for anyone.
    fn take(&mut self) -> Result<OwnedFd, OciError> {
        self.wake();
        let received = self.receiver.take().map(JoinHandle::join);
        match received {
            Some(Ok(master)) => master.map_err(OciError::Console),
            Some(Err(_)) | None => Err(OciError::Console(io::Error::other("nothing waits for it"))),
        }
    }

    /// Lets the thread go on if nobody has connected to it.
    fn wake(&self) {
        let _ = UnixStream::connect(&self.path);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if self.receiver.is_some() {
            self.wake();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive_master(listener: &UnixListener, size: Option<(u16, u16)>) -> io::Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut byte = [0u8; 256];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us alone.
            let master = unsafe { OwnedFd::from_raw_fd(fd) };
            if let Some((columns, rows)) = size {
                crate::stdio::pty::set_size(&master, columns, rows)?;
            }
            return Ok(master);
        }
    }
    Err(io::Error::other("the message carried no descriptor"))
}
