//! A process's stdio on this host: containerd's FIFOs and files.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;
use tokio::time::{Sleep, sleep};

/// Until a full disk is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Where containerd wants a process's streams. Empty: not connected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// The link ports of a process's streams. None: not connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) stdin: Option<u32>,
    pub(crate) stdout: Option<u32>,
    pub(crate) stderr: Option<u32>,
}

/// A stream cannot be connected.
#[derive(Debug, Error)]
pub(crate) enum IoError {
    #[error("cannot open {stream} {uri}: {source}")]
    Open { stream: &'static str, uri: String, source: std::io::Error },
    #[error(
        "cannot use {uri} as {stream}: URIs of the kind {scheme:?} are not supported, use a FIFO or file://"
    )]
    Scheme { stream: &'static str, uri: String, scheme: String },
    #[error("a terminal has one output: stderr {uri} must be empty")]
    TerminalStderr { uri: String },
}

impl Stdio {
    /// Refuses what no process can have.
    pub(crate) fn check(&self) -> Result<(), IoError> {
        if self.terminal && !self.stderr.is_empty() {
            return Err(IoError::TerminalStderr { uri: self.stderr.clone() });
        }
        Ok(())
    }
}

/// What takes a process's output on this host. It never fails: a process whose output could not be handed on
/// would block, and its exit never be told. A full disk is waited for; what is broken for good takes all and keeps
/// nothing, and says so.
#[derive(Debug)]
pub(crate) struct Sink {
    to: Target,
    /// Until it is tried again.
    retry: Option<Pin<Box<Sleep>>>,
    complained: bool,
}

#[derive(Debug)]
enum Target {
    Fifo(pipe::Sender),
    /// Appended to. Writes go to the page cache: they are as quick as a copy.
    File(File),
    Nowhere,
}

impl Sink {
    /// None when the stream is not wanted.
    pub(crate) fn open(stream: &'static str, uri: &str) -> Result<Option<Sink>, IoError> {
        if uri.is_empty() {
            return Ok(None);
        }
        let failed = |source| IoError::Open { stream, uri: uri.to_owned(), source };
        let path = path_of(stream, uri)?;
        let sink = |to| Ok(Some(Sink { to, retry: None, complained: false }));
        if path.metadata().is_ok_and(|meta| meta.file_type().is_fifo()) {
            // Open for reading too: a reader that comes and goes is nobody's end of file.
            let sender = pipe::OpenOptions::new().read_write(true).open_sender(&path).map_err(failed)?;
            return sink(Target::Fifo(sender));
        }
        // A log is made. A FIFO that is gone is not: what would be in its place, nobody reads or removes.
        let is_log = uri.starts_with("file://");
        if let Some(parent) = path.parent().filter(|_| is_log) {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let file = OpenOptions::new().create(is_log).append(true).mode(0o640).open(&path).map_err(failed)?;
        sink(Target::File(file))
    }

    /// The FIFO once more, when it is one: what is in it lives as long as somebody has it open.
    pub(crate) fn fifo(&self) -> Option<File> {
        match &self.to {
            Target::Fifo(sender) => sender.as_fd().try_clone_to_owned().ok().map(File::from),
            Target::File(_) | Target::Nowhere => None,
        }
    }

    /// What becomes of a piece that could not be written.
    fn failed(
        &mut self,
        error: &io::Error,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        let passes = matches!(error.kind(), StorageFull | QuotaExceeded);
        if !self.complained {
            self.complained = true;
            let what = if passes { "waited for" } else { "thrown away" };
            tracing::warn!(%error, "a process's output cannot be written and is {what}");
        }
        if !passes {
            self.to = Target::Nowhere;
            return Poll::Ready(Ok(bytes.len()));
        }
        let mut retry = Box::pin(sleep(RETRY));
        // It has just begun; this leaves word whom to wake.
        let _ = retry.as_mut().poll(context);
        self.retry = Some(retry);
        Poll::Pending
    }
}

impl AsyncWrite for Sink {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(retry) = &mut self.retry {
            ready!(retry.as_mut().poll(context));
            self.retry = None;
        }
        let written = match &mut self.to {
            Target::Fifo(sender) => ready!(Pin::new(sender).poll_write(context, bytes)),
            Target::File(file) => file.write(bytes),
            Target::Nowhere => Ok(bytes.len()),
        };
        match written {
            Ok(written) => {
                self.complained &= matches!(self.to, Target::Nowhere);
                Poll::Ready(Ok(written))
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Err(error) => self.failed(&error, context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.to {
            Target::Fifo(sender) => Pin::new(sender).poll_flush(context),
            Target::File(_) | Target::Nowhere => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.to {
            Target::Fifo(sender) => Pin::new(sender).poll_shutdown(context),
            Target::File(_) | Target::Nowhere => Poll::Ready(Ok(())),
        }
    }
}

/// A process's input FIFO. The write end is ours too, so that a client may leave and another
/// attach; dropping it (CloseIO) is what ends the input.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) fifo: pipe::Receiver,
    pub(crate) keep_open: File,
    /// The read end once more: what the FIFO holds at a move's switchover goes along.
    pub(crate) rest: File,
}

impl Source {
    pub(crate) fn open(uri: &str) -> Result<Option<Source>, IoError> {
        if uri.is_empty() {
            return Ok(None);
        }
        let failed = |source| IoError::Open { stream: "stdin", uri: uri.to_owned(), source };
        let path = path_of("stdin", uri)?;
        let fifo = pipe::OpenOptions::new().open_receiver(&path).map_err(failed)?;
        let keep_open =
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed)?;
        let rest = File::from(fifo.as_fd().try_clone_to_owned().map_err(failed)?);
        Ok(Some(Source { fifo, keep_open, rest }))
    }
}

fn path_of(stream: &'static str, uri: &str) -> Result<PathBuf, IoError> {
    match uri.split_once("://") {
        None => Ok(PathBuf::from(uri)),
        // A log's options (`?maxsize=`) are the logging daemon's, not part of the path.
        Some(("file" | "fifo", rest)) => Ok(Path::new(rest.split('?').next().unwrap_or(rest)).to_owned()),
        Some((scheme, _)) => Err(IoError::Scheme { stream, uri: uri.to_owned(), scheme: scheme.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_file_is_appended_to_and_its_directory_made() {
        let directory = tempfile::tempdir().unwrap();
        let uri = format!("file://{}/logs/c.log?maxsize=1", directory.path().display());
        for text in ["one\n", "two\n"] {
            let mut sink = Sink::open("stdout", &uri).unwrap().unwrap();
            sink.write_all(text.as_bytes()).await.unwrap();
        }
        let text = std::fs::read_to_string(directory.path().join("logs/c.log")).unwrap();
        assert_eq!(text, "one\ntwo\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_is_waited_for_and_a_broken_one_takes_all() {
        let to = |path: &str| {
            let file = File::options().append(true).open(path).unwrap();
            Sink { to: Target::File(file), retry: None, complained: false }
        };
        let mut full = to("/dev/full");
        tokio::time::timeout(Duration::from_secs(60), full.write_all(b"kept")).await.unwrap_err();
        full.to = Target::File(tempfile::tempfile().unwrap());
        full.write_all(b"kept").await.unwrap();
        // Open for reading only: EBADF, which no time mends.
        let mut broken = Sink { to: Target::File(File::open("/dev/null").unwrap()), ..full };
        broken.write_all(b"lost").await.unwrap();
        assert!(matches!(broken.to, Target::Nowhere));
    }

    #[test]
    fn a_fifo_that_is_gone_is_not_made_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let gone = directory.path().join("stdout").display().to_string();
        assert!(matches!(Sink::open("stdout", &gone), Err(IoError::Open { .. })));
        assert!(!directory.path().join("stdout").exists());
    }

    #[test]
    fn a_logging_binary_is_refused_by_its_scheme() {
        let error = Sink::open("stdout", "binary:///bin/x").unwrap_err().to_string();
        assert!(error.contains("binary") && error.contains("file://"), "{error}");
        assert!(Sink::open("stdout", "").unwrap().is_none());
    }

    #[test]
    fn a_terminal_with_stderr_is_refused() {
        let stdio = Stdio { stderr: "/x".into(), terminal: true, ..Stdio::default() };
        assert!(stdio.check().is_err());
    }
}
