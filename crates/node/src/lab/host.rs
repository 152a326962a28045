//! The first process of a lab host: makes its mounts, starts containerd and the node,
//! reaps what is orphaned, and takes requests. When it dies, the kernel ends every process
//! of the host, and with the last of them its mounts: that is how a lab leaves nothing.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::{Pid, getpid, sethostname, setsid},
};

use super::{
    HostName,
    error::{FileContext, LabError, NamespaceContext},
    layout::{HostLayout, Layout},
};

/// containerd's socket inside a host.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// The node's local socket inside a host.
pub(crate) const NODE_SOCKET: &str = "/run/dunlin/node.sock";
const SERVICE_START: Duration = Duration::from_secs(30);
const SERVICE_STOP: Duration = Duration::from_secs(5);

/// Runs until it is killed. Returns only with the reason it could not come up, which it
/// also leaves in the host's `failed` file.
pub(crate) fn run(layout: &Layout, host: HostName) -> Result<(), LabError> {
    let layout = layout.host(host);
    let result = serve(&layout);
    if let Err(error) = &result {
        let path = layout.failed();
        fs::write(&path, error.to_string()).file("write", path)?;
    }
    result
}

fn serve(layout: &HostLayout) -> Result<(), LabError> {
    if getpid().as_raw() != 1 {
        let reason = "this command is the first process of a lab host; use `dunlin lab up`".to_owned();
        return Err(LabError::Refused { host: layout.host, request: "lab host".to_owned(), reason });
    }
    // A session of its own: the terminal's Ctrl-C is for whoever started the lab.
    let _ = setsid();
    sethostname(layout.host.netns()).namespace("set the host name", layout.host.netns())?;
    make_mounts(layout)?;
    let services = Arc::new(Mutex::new(Services::new(layout)));
    let reaped = Arc::clone(&services);
    thread::spawn(move || reap(&reaped));
    for name in ["containerd", "node"] {
        start(&services, name)?;
    }
    let control = layout.control();
    let listener = UnixListener::bind(&control).file("listen on", control)?;
    let ready = layout.ready();
    fs::write(&ready, b"").file("write", ready)?;
    for connection in listener.incoming() {
        match connection {
            Ok(connection) => answer(&services, connection),
            Err(error) => eprintln!("control connection failed: {error}"),
        }
    }
    Ok(())
}

/// Private mounts: own `/proc` and `/run`, own `/etc/dunlin`, `/var/lib/dunlin` and `/var/lib/cni`.
fn make_mounts(layout: &HostLayout) -> Result<(), LabError> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .namespace("make mounts private", "/")?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), safe, none).namespace("mount proc on", "/proc")?;
    for directory in ["lock", "containerd", "dunlin", "netns"] {
        let path = layout.run().join(directory);
        fs::create_dir_all(&path).file("create", path)?;
    }
    for (source, target) in [
        (layout.etc(), "/etc/dunlin"),
        (layout.data(), "/var/lib/dunlin"),
        (layout.cni(), "/var/lib/cni"),
        (layout.run(), "/run"),
    ] {
        mount(Some(&source), target, none, MsFlags::MS_BIND, none).namespace("bind-mount", target)?;
    }
    // On a file system that cannot carry overlayfs (another overlay, as in most CI containers)
    // containerd's snapshots live in memory.
    let root = layout.containerd();
    if !carries_overlay(&root)? {
        let options = Some("mode=0711");
        mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), options)
            .namespace("mount tmpfs on", root.display().to_string())?;
    }
    Ok(())
}

fn carries_overlay(root: &Path) -> Result<bool, LabError> {
    let probe = root.join("probe");
    for directory in ["lower", "upper", "work", "merged"] {
        let path = probe.join(directory);
        fs::create_dir_all(&path).file("create", path)?;
    }
    let at = |name: &str| probe.join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
    let merged = probe.join("merged");
    let mounted = mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .and_then(|()| {
            let writable = File::create(merged.join("file")).is_ok();
            umount2(&merged, MntFlags::MNT_DETACH).map(|()| writable)
        });
    fs::remove_dir_all(&probe).file("remove", probe)?;
    Ok(mounted.unwrap_or(false))
}

struct Service {
    arguments: Vec<String>,
    log: PathBuf,
    socket: PathBuf,
    pid: Option<Pid>,
}

struct Services {
    host: HostName,
    by_name: BTreeMap<&'static str, Service>,
}

impl Services {
    fn new(layout: &HostLayout) -> Self {
        let service = |arguments: &[&str], name: &str, socket: &str| Service {
            arguments: arguments.iter().map(ToString::to_string).collect(),
            log: layout.log(name),
            socket: PathBuf::from(socket),
            pid: None,
        };
        let containerd = ["containerd", "--config", "/etc/dunlin/containerd.toml"];
        let node = ["dunlin", "node", "--config", "/etc/dunlin/node.toml"];
        let by_name = BTreeMap::from([
            ("containerd", service(&containerd, "containerd", CONTAINERD_SOCKET)),
            ("node", service(&node, "node", NODE_SOCKET)),
        ]);
        Self { host: layout.host, by_name }
    }
}

fn lock(services: &Mutex<Services>) -> MutexGuard<'_, Services> {
    services.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the exit status of every child, ours and adopted ones, for ever.
fn reap(services: &Mutex<Services>) {
    loop {
        // Only look: the status is taken under the lock, so that a start that is under way
        // has written down its process id, and finds a child that could not exec.
        match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => {
                let mut services = lock(services);
                let Ok(status) = waitpid(pid, Some(WaitPidFlag::WNOHANG)) else { continue };
                for (name, service) in &mut services.by_name {
                    if service.pid == Some(pid) {
                        service.pid = None;
                        eprintln!("{name} ended: {status:?}");
                    }
                }
            }
            Err(Errno::ECHILD) => thread::sleep(Duration::from_millis(20)),
            Ok(_) | Err(_) => {}
        }
    }
}

/// Starts a service and waits until it takes connections.
fn start(services: &Mutex<Services>, name: &str) -> Result<(), LabError> {
    let (socket, host) = {
        let mut services = lock(services);
        let host = services.host;
        let refused = |reason: &str| LabError::Refused {
            host,
            request: format!("start {name}"),
            reason: reason.to_owned(),
        };
        let service = services.by_name.get_mut(name).ok_or_else(|| refused("there is no such service"))?;
        if service.pid.is_some() {
            return Err(refused("it runs already"));
        }
        let log =
            OpenOptions::new().create(true).append(true).open(&service.log).file("open", &service.log)?;
        let errors = log.try_clone().file("open", &service.log)?;
        let _ = fs::remove_file(&service.socket);
        let child = Command::new(&service.arguments[0])
            .args(&service.arguments[1..])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|source| LabError::Spawn { command: service.arguments.join(" "), source })?;
        service.pid = i32::try_from(child.id()).ok().map(Pid::from_raw);
        (service.socket.clone(), host)
    };
    let since = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        if lock(services).by_name.get(name).is_none_or(|service| service.pid.is_none()) {
            let reason = format!("{name} ended at once; its log tells why");
            return Err(LabError::Refused { host, request: format!("start {name}"), reason });
        }
        if since.elapsed() > SERVICE_START {
            let what = format!("an answer of {name} on {}", socket.display());
            return Err(LabError::Deadline { what, deadline: SERVICE_START });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Ends a service with SIGTERM (or SIGKILL for a crash) and waits until it is gone.
fn stop(services: &Mutex<Services>, name: &str, first: Signal) -> Result<(), LabError> {
    let since = Instant::now();
    let mut signal = first;
    loop {
        let Some(pid) = lock(services).by_name.get(name).and_then(|service| service.pid) else {
            return Ok(());
        };
        let _ = kill(pid, signal);
        for _ in 0..50 {
            thread::sleep(Duration::from_millis(20));
            if lock(services).by_name.get(name).is_none_or(|service| service.pid.is_none()) {
                return Ok(());
            }
        }
        if since.elapsed() > SERVICE_STOP {
            signal = Signal::SIGKILL;
        }
        if since.elapsed() > 2 * SERVICE_STOP {
            return Err(LabError::Deadline {
                what: format!("the end of {name}"),
                deadline: 2 * SERVICE_STOP,
            });
        }
    }
}

/// One request a connection: `status`, or `start|stop|kill <service>`. The answer is one
/// line: `ok [text]` or `error <reason>`.
fn answer(services: &Mutex<Services>, mut connection: UnixStream) {
    let _ = connection.set_read_timeout(Some(Duration::from_secs(2)));
    let mut line = String::new();
    if let Err(error) = BufReader::new(&connection).read_line(&mut line) {
        eprintln!("control request unreadable: {error}");
        return;
    }
    let mut words = line.split_whitespace();
    let result = match (words.next(), words.next()) {
        (Some("status"), None) => Ok(status(services)),
        (Some("start"), Some(name)) => start(services, name).map(|()| String::new()),
        (Some("stop"), Some(name)) => stop(services, name, Signal::SIGTERM).map(|()| String::new()),
        (Some("kill"), Some(name)) => stop(services, name, Signal::SIGKILL).map(|()| String::new()),
        _ => {
            let host = lock(services).host;
            Err(LabError::Refused {
                host,
                request: line.trim().to_owned(),
                reason: "unknown request".to_owned(),
            })
        }
    };
    let text = match result {
        Ok(text) => format!("ok {text}\n"),
        Err(error) => format!("error {error}\n"),
    };
    let _ = connection.write_all(text.as_bytes());
}

fn status(services: &Mutex<Services>) -> String {
    let services = lock(services);
    let states = services.by_name.iter().map(|(name, service)| match service.pid {
        Some(pid) => format!("{name}=running(pid {pid})"),
        None => format!("{name}=stopped"),
    });
    states.collect::<Vec<_>>().join(" ")
}
