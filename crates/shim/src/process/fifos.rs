//! FIFOs of the shim's own, and what is left in a FIFO when its process has ended.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::io::{Ports, Stdio};

/// How often a reader of the rest is looked for.
const LOOK: Duration = Duration::from_millis(200);

nix::ioctl_read_bad!(bytes_readable, libc::FIONREAD, libc::c_int);

/// Output that an ended process left in FIFOs: their content is lost when nobody has them open any more, so they
/// are kept open until they are read empty, or until this value goes.
#[derive(Debug)]
pub(crate) struct Unread {
    task: JoinHandle<()>,
}

impl Unread {
    /// None: there is nothing unread.
    pub(crate) fn keep(fifos: Vec<File>) -> Option<Unread> {
        let mut fifos: Vec<File> = fifos.into_iter().filter(|fifo| !is_empty(fifo.as_raw_fd())).collect();
        if fifos.is_empty() {
            return None;
        }
        let task = tokio::spawn(async move {
            while !fifos.is_empty() {
                tokio::time::sleep(LOOK).await;
                fifos.retain(|fifo| !is_empty(fifo.as_raw_fd()));
            }
        });
        Some(Unread { task })
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_empty(fifo: RawFd) -> bool {
    bytes_in(fifo) == 0
}

/// How much can be read from a FIFO now.
pub(super) fn bytes_in(fifo: RawFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open for the call and the pointer is to a local integer.
    match unsafe { bytes_readable(fifo, &raw mut bytes) } {
        Ok(_) => usize::try_from(bytes).unwrap_or(0),
        Err(_) => 0,
    }
}

/// Makes FIFOs in `directory` for the streams that a process is connected to. Those that are there already stay.
pub(crate) fn make(
    directory: &Path,
    name: &str,
    ports: Ports,
    terminal: bool,
) -> Result<Stdio, (PathBuf, std::io::Error)> {
    use nix::sys::stat::Mode;
    std::fs::create_dir_all(directory).map_err(|error| (directory.to_owned(), error))?;
    let fifo = |wanted: Option<u32>, stream: &str| {
        if wanted.is_none() {
            return Ok(String::new());
        }
        let path = directory.join(format!("{name}-{stream}"));
        match nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(path.display().to_string()),
            Err(errno) => Err((path, errno.into())),
        }
    };
    Ok(Stdio {
        stdin: fifo(ports.stdin, "stdin")?,
        stdout: fifo(ports.stdout, "stdout")?,
        stderr: fifo(ports.stderr, "stderr")?,
        terminal,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn open(path: &str) -> File {
        File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    #[tokio::test]
    async fn what_nobody_has_read_stays_until_somebody_does() {
        let directory = tempfile::tempdir().unwrap();
        let ports = Ports { stdout: Some(1), ..Ports::default() };
        let stdio = make(directory.path(), "0", ports, false).unwrap();
        assert_eq!(make(directory.path(), "0", ports, false).unwrap(), stdio, "made once");
        assert!(stdio.stdin.is_empty() && stdio.stderr.is_empty());
        let mut sink = open(&stdio.stdout);
        sink.write_all(b"last words").unwrap();
        let unread = Unread::keep(vec![sink]).unwrap();
        let mut reader = open(&stdio.stdout);
        let mut text = [0; 64];
        let n = reader.read(&mut text).unwrap();
        assert_eq!(&text[..n], b"last words");
        tokio::time::timeout(Duration::from_secs(10), async {
            while !unread.task.is_finished() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap();
        assert!(Unread::keep(vec![open(&stdio.stdout)]).is_none(), "an empty one is let go");
    }
}
