//! What stands in on the destination for a stream of the source.
//!
//! Only the kind crosses the wire. A FIFO becomes a FIFO under `io_dir`, where `ctr task attach`
//! finds it through containerd; a log file becomes a log file under `log_dir`; nothing stays nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use containerd_client::types::v1::Process;
use nix::sys::stat::Mode;

use crate::proto::{Stdio, StreamKind};

/// Why a container's streams cannot be remade.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// A scheme that is not ours.
    #[error("its {stream} goes to `{uri}`, which cannot be made on another host; only FIFOs and file:// can")]
    Scheme {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// Where it goes.
        uri: String,
    },
    /// The file or FIFO could not be made.
    #[error("cannot make {path}: {reason}")]
    Make {
        /// The path.
        path: PathBuf,
        /// The system's words.
        reason: std::io::Error,
    },
    /// An id that would leave its directory.
    #[error("`{0}` cannot be part of a path; ids are letters, digits, `-`, `_` and `.`")]
    Id(String),
}

/// Where the destination's streams go: what Task.Create is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    /// Empty, or a FIFO's path.
    pub(crate) stdin: String,
    /// Empty, a FIFO's path, or a `file://` URI.
    pub(crate) stdout: String,
    /// Empty, a FIFO's path, or a `file://` URI.
    pub(crate) stderr: String,
    /// The process has a terminal.
    pub(crate) terminal: bool,
}

/// The kinds of a task's streams.
pub(crate) fn kinds(task: &Process) -> Result<Stdio, StdioError> {
    Ok(Stdio {
        stdin: kind("stdin", &task.stdin)?.into(),
        stdout: kind("stdout", &task.stdout)?.into(),
        stderr: kind("stderr", &task.stderr)?.into(),
        terminal: task.terminal,
    })
}

fn kind(stream: &'static str, uri: &str) -> Result<StreamKind, StdioError> {
    let scheme = uri.split_once("://").map(|(scheme, _)| scheme);
    match scheme {
        None if uri.is_empty() => Ok(StreamKind::None),
        None | Some("fifo") => Ok(StreamKind::Fifo),
        Some("file") if stream != "stdin" => Ok(StreamKind::File),
        Some(_) => Err(StdioError::Scheme { stream, uri: uri.to_owned() }),
    }
}

/// The directory of one container's FIFOs.
pub(crate) fn io_dir(root: &Path, namespace: &str, id: &str) -> Result<PathBuf, StdioError> {
    Ok(root.join(plain(namespace)?).join(plain(id)?))
}

/// Removes the FIFOs that were made for a container, whichever they were.
pub(crate) fn remove_fifos(root: &Path, namespace: &str, id: &str) -> Result<(), StdioError> {
    let dir = io_dir(root, namespace, id)?;
    for name in ["stdin", "stdout", "stderr"] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    let _ = std::fs::remove_dir(dir);
    Ok(())
}

/// Names the streams of an arriving container; makes nothing.
pub(crate) fn plan(
    wanted: &Stdio,
    io_root: &Path,
    log_root: &Path,
    namespace: &str,
    id: &str,
) -> Result<Streams, StdioError> {
    let fifos = io_dir(io_root, namespace, id)?;
    let log = log_root.join(plain(namespace)?).join(format!("{}.log", plain(id)?));
    let place = |kind: StreamKind, name: &str| match kind {
        StreamKind::None => String::new(),
        StreamKind::Fifo => fifos.join(name).display().to_string(),
        StreamKind::File => format!("file://{}", log.display()),
    };
    Ok(Streams {
        stdin: place(wanted.stdin(), "stdin"),
        stdout: place(wanted.stdout(), "stdout"),
        // A terminal has no stderr of its own.
        stderr: if wanted.terminal { String::new() } else { place(wanted.stderr(), "stderr") },
        terminal: wanted.terminal,
    })
}

impl Streams {
    /// Makes the FIFOs and the log file's directory. What is there already stays.
    pub(crate) fn make(&self) -> Result<(), StdioError> {
        for path in self.fifos() {
            let failed = |reason| StdioError::Make { path: path.clone(), reason };
            if let Some(parent) = path.parent() {
                private_dir(parent).map_err(failed)?;
            }
            match nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
                Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        for path in self.logs() {
            let failed = |reason| StdioError::Make { path: path.clone(), reason };
            if let Some(parent) = path.parent() {
                private_dir(parent).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Removes the FIFOs; logs are kept, they are somebody's only record.
    pub(crate) fn remove(&self) {
        for path in self.fifos() {
            let _ = std::fs::remove_file(&path);
            if let Some(parent) = path.parent() {
                let _ = std::fs::remove_dir(parent);
            }
        }
    }

    fn all(&self) -> [&String; 3] {
        [&self.stdin, &self.stdout, &self.stderr]
    }

    fn fifos(&self) -> Vec<PathBuf> {
        self.all()
            .into_iter()
            .filter(|uri| !uri.is_empty() && !uri.contains("://"))
            .map(PathBuf::from)
            .collect()
    }

    fn logs(&self) -> Vec<PathBuf> {
        self.all().into_iter().filter_map(|uri| uri.strip_prefix("file://")).map(PathBuf::from).collect()
    }
}

fn private_dir(path: &Path) -> std::io::Result<()> {
    let fresh = !path.exists();
    std::fs::create_dir_all(path)?;
    if fresh {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Ids arrive from another host and become directory names: they must not be able to climb.
pub(crate) fn plain(id: &str) -> Result<&str, StdioError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let alnum = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if id.len() > 128 || !alnum(id.chars().next()) || !id.chars().all(good) {
        return Err(StdioError::Id(id.to_owned()));
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    fn task(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Process {
        Process {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal,
            ..Process::default()
        }
    }

    #[test]
    fn the_kind_is_all_that_is_kept_of_a_source_path() {
        let stdio = kinds(&task("", "/run/x/stdout", "file:///var/log/x", false)).unwrap();
        assert_eq!(stdio.stdin(), StreamKind::None);
        assert_eq!(stdio.stdout(), StreamKind::Fifo);
        assert_eq!(stdio.stderr(), StreamKind::File);
        assert!(kinds(&task("", "binary:///bin/logger", "", false)).is_err());
        assert!(kinds(&task("file:///etc/passwd", "", "", false)).is_err());
    }

    #[test]
    fn each_kind_has_its_place() {
        let stdio = kinds(&task("/a", "/b", "file:///c", false)).unwrap();
        let streams = plan(&stdio, Path::new("/io"), Path::new("/log"), "ns", "c1").unwrap();
        assert_eq!(streams.stdin, "/io/ns/c1/stdin");
        assert_eq!(streams.stdout, "/io/ns/c1/stdout");
        assert_eq!(streams.stderr, "file:///log/ns/c1.log");
        assert!(!streams.terminal);
    }

    #[test]
    fn a_terminal_keeps_its_flag_and_has_no_stderr() {
        let stdio = kinds(&task("/a", "/b", "/c", true)).unwrap();
        let streams = plan(&stdio, Path::new("/io"), Path::new("/log"), "ns", "c1").unwrap();
        assert!(streams.terminal);
        assert_eq!(streams.stderr, "");
    }

    #[test]
    fn ids_cannot_climb() {
        for id in ["../x", "..", ".", "a/b", "", "-a", "a\0b"] {
            let refused = plan(&Stdio::default(), Path::new("/io"), Path::new("/log"), "ns", id);
            assert!(refused.is_err(), "{id:?}");
            let refused = plan(&Stdio::default(), Path::new("/io"), Path::new("/log"), id, "c1");
            assert!(refused.is_err(), "{id:?}");
        }
    }

    #[test]
    fn fifos_are_made_once_and_removed_and_logs_stay() {
        let root = std::env::temp_dir().join(format!("dunlin-node-stdio-{}", std::process::id()));
        let (io, log) = (root.join("io"), root.join("log"));
        let stdio = kinds(&task("/a", "/b", "file:///c", false)).unwrap();
        let streams = plan(&stdio, &io, &log, "ns", "c1").unwrap();
        streams.make().unwrap();
        streams.make().unwrap();
        assert!(std::fs::metadata(io.join("ns/c1/stdin")).unwrap().file_type().is_fifo());
        assert!(!io.join("ns/c1/stderr").exists());
        assert!(log.join("ns").is_dir());
        streams.remove();
        assert!(!io.join("ns/c1").exists());
        streams.make().unwrap();
        remove_fifos(&io, "ns", "c1").unwrap();
        assert!(!io.join("ns/c1").exists());
        assert!(remove_fifos(&io, "ns", "../c1").is_err());
        assert!(log.join("ns").is_dir());
        std::fs::remove_dir_all(root).unwrap();
    }
}
