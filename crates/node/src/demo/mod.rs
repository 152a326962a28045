//! `dunlin demo`: a counter moves from host a to host b, and its lines prove that it never stopped.

mod proof;
mod watch;

use std::{
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde::Deserialize;

use self::{
    proof::{Tally, longest_gap, tally, whole_lines},
    watch::Watch,
};
use crate::lab::{self, COUNTER_FILE, DEMO_IMAGE, HostName, LabError, Layout, UpOptions};

const CONTAINER: &str = "counter";
const RUNTIME: &str = "io.containerd.dunlin.v2";
const COMMAND_WAIT: Duration = Duration::from_secs(60);
const MOVE_WAIT: Duration = Duration::from_secs(180);
const LINES_WAIT: Duration = Duration::from_secs(20);
/// Lines to wait for before the move and after it.
const LINES_BEFORE: usize = 150;
const LINES_AFTER: usize = 150;
const SHOWN: usize = 4;

/// Move a counting container between two hosts on this machine, and prove it.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Directory with the guest's vmlinuz and initramfs.cpio.lz4 [default: ../image beside the programs].
    #[arg(long, env = "DUNLIN_IMAGE_DIR")]
    image: Option<PathBuf>,
    /// The lab's directory.
    #[arg(long, env = "DUNLIN_LAB_DIR", default_value = lab::DEFAULT_DIR)]
    dir: PathBuf,
    /// Leave the lab and the container running at the end.
    #[arg(long)]
    keep: bool,
}

/// Why the demo proved nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// The lab, or a command in it, failed.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Somebody is using the lab.
    #[error("a lab is up in {}; end it with `dunlin lab down` or give the demo another --dir", .0.display())]
    LabBusy(PathBuf),
    /// The counter's lines stayed away.
    #[error("the counter on host {host} wrote {seen} lines within {:.0} s instead of {wanted}", .deadline.as_secs_f64())]
    Silent { host: HostName, seen: usize, wanted: usize, deadline: Duration },
    /// `dunlin migrate` failed; it has said why.
    #[error("dunlin migrate failed ({0})")]
    Move(ExitStatus),
    /// `dunlin migrate` did not end.
    #[error("dunlin migrate did not end within {} s", .0.as_secs())]
    MoveTime(Duration),
    /// A process could not be waited for.
    #[error("cannot wait for dunlin migrate: {0}")]
    Wait(io::Error),
    /// The report of the move is missing or unreadable.
    #[error("the report of the move in {} is unreadable: {reason}", path.display())]
    Report { path: PathBuf, reason: String },
    /// Everything ran, and the proof does not hold.
    #[error("the proof does not hold: {0}")]
    NotProven(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// `dunlin migrate --report`: milliseconds and bytes.
#[derive(Debug, Deserialize)]
struct Report {
    total_ms: u64,
    blackout_ms: u64,
    memory_sent_bytes: u64,
    memory_passes: u64,
    disk_sent_bytes: u64,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Runs the demo. Blocks. Takes the lab down at its end however it ends, unless told to keep it.
pub(crate) fn run(arguments: &DemoArgs) -> Result<(), DemoError> {
    let handler = note_interrupt as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed at any point.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    let layout = Layout::new(&arguments.dir)?;
    println!("Dunlin demo: a running container moves between two hosts");
    let since = Instant::now();
    let options = UpOptions { image_dir: arguments.image.clone(), ..UpOptions::default() };
    if !lab::up(&layout, &options)? {
        return Err(DemoError::LabBusy(layout.dir().to_owned()));
    }
    let guard = LabGuard { layout: &layout, keep: arguments.keep };
    step("two hosts on this machine, each with containerd and a node", since);
    println!("    a  10.77.0.1\n    b  10.77.0.2");
    let result = show(&layout);
    if result.is_err() {
        println!("\nlogs: {}/{{a,b}}/logs", layout.dir().display());
    }
    drop(guard);
    result
}

struct LabGuard<'a> {
    layout: &'a Layout,
    keep: bool,
}

impl Drop for LabGuard<'_> {
    fn drop(&mut self) {
        if self.keep {
            println!("\nthe lab stays up: dunlin lab exec b -- ctr tasks ls; end it with: dunlin lab down");
        } else if let Err(error) = lab::down(self.layout) {
            eprintln!("the lab could not be taken down: {error}; try `dunlin lab down`");
        }
    }
}

fn show(layout: &Layout) -> Result<(), DemoError> {
    let log = |host| layout.host(host).logs().join("containers/default").join(format!("{CONTAINER}.log"));
    let watch = Watch::start(HostName::ALL.map(|host| (host, log(host))).to_vec());

    let since = Instant::now();
    start_counter(layout, &log(HostName::A))?;
    step("a counter in a virtual machine of its own, on host a", since);
    println!("    ctr run -d --runtime {RUNTIME} ... {CONTAINER}");
    await_lines(&watch, HostName::A, LINES_BEFORE)?;
    print_lines(&watch, HostName::A, 0);
    let process = first_process(layout, HostName::A)?;
    print_tasks(layout)?;

    let before = watch.count(HostName::A);
    let since = Instant::now();
    println!("\n* dunlin migrate {CONTAINER} --to b");
    let report = migrate(layout)?;
    step("moved, while it counted", since);
    print_lines(&watch, HostName::A, before.max(watch.count(HostName::A).saturating_sub(SHOWN)));
    await_lines(&watch, HostName::B, LINES_AFTER)?;
    print_lines(&watch, HostName::B, 0);
    print_tasks(layout)?;

    let same_process = first_process(layout, HostName::B)? == process;
    let file = ctr_exec(layout, HostName::B, "proof", &["cat", COUNTER_FILE])?;
    let in_file = tally(whole_lines(&file));
    let seen = watch.lines();
    let in_log = tally(seen.iter().map(|line| line.text.as_str()));
    let arrivals: Vec<Instant> = seen.iter().map(|line| line.at).collect();
    let pid = process.split_once(' ').map_or("", |(pid, _)| pid);
    verdict(&report, in_file, in_log, longest_gap(&arrivals), same_process.then_some(pid))
}

fn step(what: &str, since: Instant) {
    println!("\n* {what}  ({:.1} s)", since.elapsed().as_secs_f64());
}

fn start_counter(layout: &Layout, log: &Path) -> Result<(), DemoError> {
    if let Some(parent) = log.parent() {
        std::fs::create_dir_all(parent).map_err(|source| LabError::File {
            action: "create",
            path: parent.to_owned(),
            source,
        })?;
    }
    let uri = format!("file://{}", log.display());
    let mut run = Command::new("ctr");
    run.args(["run", "-d", "--runtime", RUNTIME, "--log-uri", &uri, DEMO_IMAGE, CONTAINER, "/bin/counter"]);
    in_host(layout, HostName::A, run)?;
    Ok(())
}

fn in_host(layout: &Layout, host: HostName, command: Command) -> Result<String, DemoError> {
    let result = lab::run_in_host(layout, host, command, COMMAND_WAIT);
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(DemoError::Interrupted);
    }
    Ok(result?)
}

fn ctr_exec(layout: &Layout, host: HostName, exec_id: &str, command: &[&str]) -> Result<String, DemoError> {
    let mut exec = Command::new("ctr");
    exec.args(["tasks", "exec", "--exec-id", exec_id, CONTAINER]).args(command);
    in_host(layout, host, exec)
}

/// `<pid> <start time in ticks since boot>` of the counter as the container sees it: the
/// same two numbers are the same process.
fn first_process(layout: &Layout, host: HostName) -> Result<String, DemoError> {
    let script = format!("read -r word pid <{COUNTER_FILE} && cat /proc/$pid/stat");
    let stat = ctr_exec(layout, host, &format!("stat-{host}"), &["sh", "-c", &script])?;
    let pid = stat.split(' ').next().unwrap_or_default();
    // Field 22; the command's name, field 2, ends with the last parenthesis.
    let start = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(19)).unwrap_or_default();
    if pid.is_empty() || start.is_empty() {
        return Err(DemoError::NotProven(format!("the counter's process on host {host} is not there")));
    }
    Ok(format!("{pid} {start}"))
}

fn await_lines(watch: &Watch, host: HostName, wanted: usize) -> Result<(), DemoError> {
    let since = Instant::now();
    while watch.count(host) < wanted {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(DemoError::Interrupted);
        }
        if since.elapsed() > LINES_WAIT {
            return Err(DemoError::Silent { host, seen: watch.count(host), wanted, deadline: LINES_WAIT });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A few of the counter's lines on `host`, from the `skip`-th on.
fn print_lines(watch: &Watch, host: HostName, skip: usize) {
    for line in watch.lines().iter().filter(|line| line.host == host).skip(skip).take(SHOWN) {
        println!("    {host} | {}", line.text);
    }
    println!("    {host} | ...");
}

fn print_tasks(layout: &Layout) -> Result<(), DemoError> {
    for host in HostName::ALL {
        let mut list = Command::new("ctr");
        list.args(["tasks", "ls"]);
        let text = in_host(layout, host, list)?;
        let row = text.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>().join("  "));
        let rows: Vec<String> = row.collect();
        println!(
            "    {host}: ctr tasks ls   {}",
            if rows.is_empty() { "(none)".to_owned() } else { rows.join("; ") }
        );
    }
    Ok(())
}

/// Runs the command a user would, on the terminal, and reads the report it leaves.
fn migrate(layout: &Layout) -> Result<Report, DemoError> {
    let path = layout.host(HostName::A).root().join("report.json");
    let mut command = Command::new("dunlin");
    command
        .args(["migrate", CONTAINER, "--to", HostName::B.as_str(), "--report"])
        .arg(&path)
        .stdin(Stdio::null());
    let mut child = lab::spawn_in_host(layout, HostName::A, command)?;
    let status = wait(&mut child, MOVE_WAIT)?;
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(DemoError::Interrupted);
    }
    if !status.success() {
        return Err(DemoError::Move(status));
    }
    let unreadable = |reason: String| DemoError::Report { path: path.clone(), reason };
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(error.to_string()))?;
    let report = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
    let _ = std::fs::remove_file(&path);
    Ok(report)
}

fn wait(child: &mut Child, deadline: Duration) -> Result<ExitStatus, DemoError> {
    let since = Instant::now();
    loop {
        if let Some(status) = child.try_wait().map_err(DemoError::Wait)? {
            return Ok(status);
        }
        if since.elapsed() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(DemoError::MoveTime(deadline));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn verdict(
    report: &Report,
    file: Tally,
    log: Tally,
    gap: Duration,
    same_process: Option<&str>,
) -> Result<(), DemoError> {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    println!("\n* verdict");
    println!("    total time          {:.2} s", Duration::from_millis(report.total_ms).as_secs_f64());
    println!("    blackout            {} ms", report.blackout_ms);
    println!("    memory sent         {} in {} passes", mib(report.memory_sent_bytes), report.memory_passes);
    println!("    disk sent           {}", mib(report.disk_sent_bytes));
    println!("    longest silence     {} ms between two counter lines", gap.as_millis());
    println!(
        "    file in container   {} lines, {} missing, {} repeated",
        file.last, file.missing, file.repeated
    );
    println!(
        "    containerd's logs   {} lines, {} missing, {} repeated",
        log.last, log.missing, log.repeated
    );
    println!(
        "    process             {}",
        same_process.map_or("ANOTHER".to_owned(), |pid| format!("the same, pid {pid}"))
    );
    let mut faults = Vec::new();
    if !file.is_whole() || file.repeated > 0 {
        faults.push(format!("the file in the container is not 1, 2, 3, ... ({file:?})"));
    }
    if !log.is_whole() || log.repeated > 0 {
        faults.push(format!("the logs together are not 1, 2, 3, ... ({log:?})"));
    }
    if same_process.is_none() {
        faults.push("the counter on b is another process than the one on a".to_owned());
    }
    if faults.is_empty() {
        println!("\n    the container moved; nothing was lost and nothing happened twice");
        return Ok(());
    }
    Err(DemoError::NotProven(faults.join("; ")))
}
