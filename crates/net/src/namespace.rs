//! A network namespace held open, and work inside it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use rtnetlink::Handle;

use crate::error::NetError;

nix::ioctl_none_bad!(
    /// The CLONE_NEW… flag of a namespace's descriptor.
    namespace_type,
    libc::NS_GET_NSTYPE
);

/// A network namespace. It stays while this is held, whatever happens to the file that it was opened by.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    path: PathBuf,
    id: NamespaceId,
}

/// Which namespace: equal for two files exactly when they are the same namespace, while both are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// Opens the namespace that is bound to `path`. Refuses what is no network namespace.
    pub fn open(path: &Path) -> Result<Namespace, NetError> {
        let failed = |source| NetError::Open { path: path.to_owned(), source };
        let stranger = |found: String| NetError::NoNamespace { path: path.to_owned(), found };
        // Without O_NONBLOCK a fifo of this name would hold us until somebody writes to it.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if fstatfs(&file).map_err(|errno| failed(errno.into()))?.filesystem_type() != NSFS_MAGIC {
            let found = match metadata.file_type() {
                kind if kind.is_dir() => "a directory",
                kind if kind.is_file() => "a plain file, so nothing is bound there any more",
                _ => "something else",
            };
            return Err(stranger(found.to_owned()));
        }
        // SAFETY: the request takes no argument, and the descriptor is open.
        let kind = unsafe { namespace_type(file.as_raw_fd()) };
        let kind = kind.map_err(|errno| failed(errno.into()))?;
        if kind != CloneFlags::CLONE_NEWNET.bits() {
            return Err(stranger(format!("a namespace of another kind ({kind:#x})")));
        }
        let id = NamespaceId { device: metadata.dev(), inode: metadata.ino() };
        Ok(Namespace { file, path: path.to_owned(), id })
    }

    /// The namespace in which a process lives.
    pub fn of_pid(pid: i32) -> Result<Namespace, NetError> {
        Namespace::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The calling thread's.
    pub fn own() -> Result<Namespace, NetError> {
        Namespace::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// A new one with nothing but a `lo` that is down. It has no name: it ends with the last that holds it or lives
    /// in it.
    pub fn fresh() -> Result<Namespace, NetError> {
        let failed = |source| NetError::Enter { namespace: "(a new one)".to_owned(), source };
        let inside = move || -> Result<Namespace, NetError> {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
            Namespace::own()
        };
        let thread = thread::Builder::new().name("netns".to_owned()).spawn(inside).map_err(failed)?;
        thread.join().map_err(|_| NetError::Panicked { namespace: "(a new one)".to_owned() })?
    }

    /// Which one it is.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Does `work` inside the namespace, on a thread that ends with it, and waits for that. Sockets, taps and files
    /// below `/proc/sys/net` that are opened there are the namespace's and may be used by any thread afterwards.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let failed = |source| NetError::Enter { namespace: self.to_string(), source };
        let inside = || -> io::Result<T> {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("netns".to_owned());
            let thread = builder.spawn_scoped(scope, inside).map_err(failed)?;
            match thread.join() {
                Ok(done) => done.map_err(failed),
                Err(_) => Err(NetError::Panicked { namespace: self.to_string() }),
            }
        })
    }

    /// A netlink connection into the namespace, served by the calling task's runtime until the last clone of the
    /// handle is dropped. Must be called inside a runtime that has its I/O driver on.
    pub fn netlink(&self) -> Result<Handle, NetError> {
        let runtime = tokio::runtime::Handle::current();
        let made = self.run(|| {
            let _guard = runtime.enter();
            rtnetlink::new_connection()
        })?;
        let (connection, handle, _) = made.map_err(NetError::Socket)?;
        runtime.spawn(connection);
        Ok(handle)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}
