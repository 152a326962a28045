//! A lab from `up` to `down`.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

use super::{
    HostName, Layout, config, containerd, cri,
    error::{FileContext, LabError},
    image,
    layout::Record,
    logs, network,
    spawn::{self, spawn_in_host},
};

/// containerd and the node each have 30 s to answer.
const HOST_START: Duration = Duration::from_secs(65);
const HOST_END: Duration = Duration::from_secs(20);
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// Below /run: gone with the machine that it is about.
const LOCK: &str = "/run/dunlin-lab.lock";
const CONTROL_WAIT: Duration = Duration::from_secs(40);
const IMPORT_WAIT: Duration = Duration::from_secs(60);

/// What `up` may be told.
#[derive(Clone, Debug, Default)]
pub(crate) struct UpOptions {
    /// Directory of the guest's kernel and initramfs; `../image` beside the programs if absent.
    pub(crate) image_dir: Option<PathBuf>,
    /// Do not ask for a guest image.
    pub(crate) without_image: bool,
    /// Directory of another containerd and `ctr`, or a root with them in `usr/bin`; the installed one if absent.
    pub(crate) containerd: Option<PathBuf>,
}

/// Starts the lab. `false`: it is up already. A lab half made by a crash is cleared first,
/// and one that this call cannot finish is taken down again.
pub(crate) fn up(layout: &Layout, options: &UpOptions) -> Result<bool, LabError> {
    require_root()?;
    let record = plan(options)?;
    fs::create_dir_all(layout.dir()).file("create", layout.dir())?;
    let _lock = lock()?;
    if let Some(other) = spawn::hosts().into_iter().find(|host| host.dir != layout.dir()) {
        return Err(LabError::OtherLab(other.dir));
    }
    let alive = |name| spawn::find_host(layout, name).is_some() && layout.host(name).ready().exists();
    if HostName::ALL.into_iter().all(alive) {
        let present = layout.read_record()?.and_then(|record| record.containerd_dir);
        if options.containerd.is_some() && present != record.containerd_dir {
            return Err(LabError::OtherContainerd { dir: layout.dir().to_owned(), present });
        }
        return Ok(false);
    }
    clear(layout)?;
    start(layout, record).inspect_err(|_| {
        if let Err(error) = clear(layout) {
            eprintln!("and the half-made lab could not be cleared: {error}");
        }
    })?;
    Ok(true)
}

/// Ends the lab and removes all of it but the logs. Does nothing where there is none.
pub(crate) fn down(layout: &Layout) -> Result<(), LabError> {
    require_root()?;
    if !layout.dir().exists() {
        return Ok(());
    }
    let _lock = lock()?;
    clear(layout)
}

/// One line a host; fails unless both are there.
pub(crate) fn print_status(layout: &Layout) -> Result<ExitCode, LabError> {
    let mut missing = 0;
    let version = layout.read_record()?.map(|record| record.containerd_version).unwrap_or_default();
    for name in HostName::ALL {
        match spawn::find_host(layout, name) {
            Some(pid) => {
                let services = control(layout, name, "status")?;
                println!("{name}  {}  pid {pid}  containerd {version}  {services}", name.address());
            }
            None => {
                missing += 1;
                println!("{name}  not running");
            }
        }
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Asks a host's first process for something; gives back its answer's text.
pub(crate) fn control(layout: &Layout, host: HostName, request: &str) -> Result<String, LabError> {
    let path = layout.host(host).control();
    let mut stream = UnixStream::connect(&path).map_err(|_| LabError::HostDown(host))?;
    stream.set_read_timeout(Some(CONTROL_WAIT)).file("use", &path)?;
    stream.write_all(format!("{request}\n").as_bytes()).file("write to", &path)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).file("read from", &path)?;
    match answer.trim().split_once(' ').unwrap_or((answer.trim(), "")) {
        ("ok", text) => Ok(text.to_owned()),
        (_, reason) => {
            Err(LabError::Refused { host, request: request.to_owned(), reason: reason.to_owned() })
        }
    }
}

fn require_root() -> Result<(), LabError> {
    if geteuid().is_root() { Ok(()) } else { Err(LabError::NotRoot) }
}

/// Finds the programs and the image before anything is touched.
fn plan(options: &UpOptions) -> Result<Record, LabError> {
    let own = std::env::current_exe().file("find", "/proc/self/exe")?;
    let bin_dir = own.parent().unwrap_or(Path::new("/")).to_owned();
    let shim = bin_dir.join("containerd-shim-dunlin-v2");
    let image_dir = match &options.image_dir {
        Some(dir) => std::path::absolute(dir).file("resolve", dir)?,
        None => bin_dir.parent().unwrap_or(&bin_dir).join("image"),
    };
    if !options.without_image {
        for (what, path, remedy) in [
            ("the shim", shim, "make build"),
            ("the guest kernel", image_dir.join(config::KERNEL), "make image"),
            ("the guest's initramfs", image_dir.join(config::INITRAMFS), "make image"),
        ] {
            if !path.is_file() {
                return Err(LabError::MissingFile { what, path, remedy });
            }
        }
    }
    let containerd_dir = options.containerd.as_deref().map(containerd::programs_of).transpose()?;
    let containerd_version = String::new();
    let mut record = Record { bin_dir, image_dir, containerd_dir, containerd_version, created: Vec::new() };
    let path = record.search_path();
    let find = |program: &str, package| {
        path.split(':')
            .map(|dir| Path::new(dir).join(program))
            .find(|path| path.is_file())
            .ok_or_else(|| LabError::MissingProgram { program: program.to_owned(), package })
    };
    find("ip", "iproute2")?;
    find("ctr", "containerd")?;
    record.containerd_version = containerd::version_of(&find("containerd", "containerd")?)?;
    Ok(record)
}

/// Serialises `up` and `down` of all labs on this machine: namespaces and mount points are its, whatever
/// a lab's directory.
fn lock() -> Result<File, LabError> {
    let path = PathBuf::from(LOCK);
    let file = File::create(&path).file("create", &path)?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(LabError::File { action: "lock", path, source }),
            Err(TryLockError::WouldBlock) if since.elapsed() > LOCK_WAIT => {
                return Err(LabError::Deadline {
                    what: "the end of another `lab up` or `lab down`".to_owned(),
                    deadline: LOCK_WAIT,
                });
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn start(layout: &Layout, mut record: Record) -> Result<(), LabError> {
    // Mount points that this machine lacks; written down before they are made.
    for dir in ["/etc/dunlin", "/var/lib/dunlin", "/var/lib/cni", network::NETNS_DIR].map(PathBuf::from) {
        if !dir.exists() {
            record.created.push(dir);
        }
    }
    layout.write_record(&record)?;
    for dir in &record.created {
        fs::create_dir_all(dir).file("create", dir)?;
    }
    for host in HostName::ALL.map(|name| layout.host(name)) {
        if host.logs().exists() {
            fs::remove_dir_all(host.logs()).file("remove", host.logs())?;
        }
        let own = [host.run(), host.etc(), host.data(), host.cni(), host.containerd()];
        for dir in own.into_iter().chain([host.logs().join("containers"), host.cni_config()]) {
            fs::create_dir_all(&dir).file("create", dir)?;
        }
    }
    config::write(layout, &record)?;
    image::write(&layout.demo_image(), &layout.cri_images())?;
    network::create()?;
    let mut children = Vec::new();
    for name in HostName::ALL {
        children.push((name, spawn::start_host(layout, &record, name)?));
    }
    for (name, child) in &mut children {
        await_ready(layout, *name, child)?;
    }
    for name in HostName::ALL {
        for (namespace, images) in [("default", layout.demo_image()), (cri::NAMESPACE, layout.cri_images())] {
            let mut import = Command::new("ctr");
            import.args(["-n", namespace, "images", "import"]).arg(images);
            run_in_host(layout, name, import, IMPORT_WAIT)?;
        }
    }
    Ok(())
}

fn await_ready(layout: &Layout, name: HostName, child: &mut Child) -> Result<(), LabError> {
    let host = layout.host(name);
    let failed = |reason| LabError::HostFailed { host: name, reason, logs: host.logs() };
    let since = Instant::now();
    while !host.ready().exists() {
        if let Ok(Some(status)) = child.try_wait() {
            let reason =
                fs::read_to_string(host.failed()).unwrap_or_else(|_| format!("it ended with {status}"));
            return Err(failed(reason));
        }
        if since.elapsed() > HOST_START {
            return Err(failed(format!("it was not ready after {} s", HOST_START.as_secs())));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Runs a command on a host to its end and gives back its output; its failure is an error
/// that shows what it wrote.
pub(crate) fn run_in_host(
    layout: &Layout,
    host: HostName,
    mut command: Command,
    deadline: Duration,
) -> Result<String, LabError> {
    let shown = format!("{command:?}").replace('"', "");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn_in_host(layout, host, command)?;
    let id = child.id();
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let waiter = thread::spawn(move || {
        // Received or not: the other side may have given up.
        let _ = sender.send(child.wait_with_output());
    });
    let output = receiver.recv_timeout(deadline).map_err(|_| {
        if let Ok(pid) = i32::try_from(id) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        LabError::Deadline { what: format!("the end of `{shown}` on host {host}"), deadline }
    })?;
    let _ = waiter.join();
    let output = output.map_err(|source| LabError::Spawn { command: shown.clone(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text =
        String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
    Err(LabError::Command { command: shown, status: output.status, output: text.trim().to_owned() })
}

/// Ends what runs and removes what lies about, from any state; the logs stay.
fn clear(layout: &Layout) -> Result<(), LabError> {
    for name in HostName::ALL {
        if let Some(pid) = spawn::find_host(layout, name) {
            end_host(name, pid)?;
        }
    }
    // The names are the machine's, not the directory's: another lab may be using them.
    if network::exists() && spawn::hosts().is_empty() {
        network::remove()?;
    }
    for host in HostName::ALL.map(|name| layout.host(name)) {
        logs::keep(&host)?;
        for dir in [host.run(), host.etc(), host.data(), host.cni(), host.containerd()] {
            remove_tree(&dir)?;
        }
        for file in [host.control(), host.ready(), host.failed()] {
            remove_file(&file)?;
        }
    }
    if let Ok(Some(record)) = layout.read_record() {
        for dir in record.created {
            // Not empty: someone else has begun to use it.
            let _ = fs::remove_dir(dir);
        }
    }
    remove_file(&layout.demo_image())?;
    remove_file(&layout.cri_images())?;
    remove_file(&layout.record_path())
}

/// Kills a host's first process and waits until the kernel has ended all the others.
fn end_host(name: HostName, pid: i32) -> Result<(), LabError> {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let since = Instant::now();
    while !is_gone(pid) {
        if since.elapsed() > HOST_END {
            return Err(LabError::Deadline { what: format!("the end of host {name}"), deadline: HOST_END });
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Gone, or a zombie: the first process becomes one only after the last of the others.
fn is_gone(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with(['Z', 'X']))
}

fn remove_tree(path: &Path) -> Result<(), LabError> {
    // The last mounts of a dead host go a moment after its last process.
    let since = Instant::now();
    loop {
        match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) if since.elapsed() > Duration::from_secs(3) => {
                return Err(LabError::File { action: "remove", path: path.to_owned(), source });
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn remove_file(path: &Path) -> Result<(), LabError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LabError::File { action: "remove", path: path.to_owned(), source: error })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
