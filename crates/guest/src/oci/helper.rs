//! The short-lived process: one request, one libcontainer call, one answer.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;

use super::{Answer, CONTROL_FD, Request, STATE_ROOT};

/// Entry of `dunlin-guest oci`: serves the one request on [`CONTROL_FD`].
pub fn run() -> ExitCode {
    // Rust's runtime ignores it, and what is ignored stays so through exec: no `yes | head` would end.
    // SAFETY: the default action is no handler; no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    crate::log::to_kmsg_only("dunlin-oci");
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "control socket failed");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> std::io::Result<()> {
    // SAFETY: PID 1 put the control socket there and nothing else in this process has used it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    close_on_exec(&control)?;
    let mut control = UnixStream::from(control);
    let mut line = String::new();
    BufReader::new(control.try_clone()?).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let answer = match carry_out(request) {
        Ok(answer) => answer,
        Err(error) => Answer::Failed { error: with_causes(&error) },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    control.write_all(&text)?;
    if matches!(answer, Answer::Process { .. }) {
        // Held until PID 1 watches the pid; its end of the socket closing counts as well.
        let _ = control.read(&mut [0u8; 1])?;
    }
    Ok(())
}

fn carry_out(request: Request) -> Result<Answer, LibcontainerError> {
    match request {
        Request::Create { id, bundle, console } => {
            let container =
                builder(id, console)?.as_init(&bundle).with_systemd(false).with_detach(true).build()?;
            let pid = container.pid().ok_or_else(|| {
                LibcontainerError::Other("the container was created without an init".to_owned())
            })?;
            Ok(Answer::Process { pid: pid.as_raw() })
        }
        Request::Start { id } => {
            Container::load(Path::new(STATE_ROOT).join(id))?.start()?;
            Ok(Answer::Done)
        }
        Request::Exec { id, process, console } => {
            let pid =
                builder(id, console)?.as_tenant().with_process(Some(process)).with_detach(true).build()?;
            Ok(Answer::Process { pid: pid.as_raw() })
        }
    }
}

fn builder(id: String, console: Option<PathBuf>) -> Result<ContainerBuilder, LibcontainerError> {
    ContainerBuilder::new(id, SyscallType::Linux)
        .with_root_path(STATE_ROOT)
        .map(|builder| builder.with_console_socket(console))
}

fn close_on_exec(fd: &OwnedFd) -> std::io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map(drop).map_err(Into::into)
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = inner.source();
    }
    text
}

/// Opens `/dev/kmsg` for logging; absent outside of a VM, and then nothing is logged.
pub(crate) fn kmsg() -> Option<File> {
    File::options().write(true).open("/dev/kmsg").ok()
}
