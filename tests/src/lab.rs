//! A lab that is up, driven through the `dunlin` program, and down again when dropped.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1::{ListTasksRequest, tasks_client::TasksClient},
    tonic::{Request, transport::Channel},
};
use tokio::runtime::Runtime;

use crate::Run;

const UP: Duration = Duration::from_secs(150);
const DOWN: Duration = Duration::from_secs(90);
const COMMAND: Duration = Duration::from_secs(300);
const MOVE: Duration = Duration::from_secs(180);
/// For what a sandbox leaves behind to go.
const GONE: Duration = Duration::from_secs(20);
const STATES: Duration = Duration::from_secs(30);

/// Where the built programs and the guest's image are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Directory with `dunlin` and `containerd-shim-dunlin-v2`.
    pub bin_dir: PathBuf,
    /// Directory with `vmlinuz` and `initramfs.cpio.lz4`.
    pub image_dir: PathBuf,
    /// `target`: failed runs leave their logs below it.
    pub target_dir: PathBuf,
}

impl Programs {
    /// `$DUNLIN_BIN_DIR` and `$DUNLIN_IMAGE_DIR`, or beside the running test. An error says
    /// what is missing and how to make it.
    pub fn find() -> Result<Programs, String> {
        let test = env::current_exe().map_err(|error| format!("cannot find the test itself: {error}"))?;
        // target/debug/deps/e2e-0123
        let built = test.ancestors().nth(2).ok_or("the test has no directory")?.to_owned();
        let target_dir = built.parent().ok_or("the test has no target directory")?.to_owned();
        let from = |name: &str, default: PathBuf| env::var_os(name).map_or(default, PathBuf::from);
        let programs = Programs {
            bin_dir: from("DUNLIN_BIN_DIR", built),
            image_dir: from("DUNLIN_IMAGE_DIR", target_dir.join("image")),
            target_dir,
        };
        for (path, remedy) in [
            (programs.bin_dir.join("dunlin"), "make build"),
            (programs.bin_dir.join("containerd-shim-dunlin-v2"), "make build"),
            (programs.image_dir.join("vmlinuz"), "make image"),
            (programs.image_dir.join("initramfs.cpio.lz4"), "make image"),
        ] {
            if !path.is_file() {
                return Err(format!("{} is missing; run `{remedy}`", path.display()));
            }
        }
        Ok(programs)
    }

    /// Newer containerds by series, oldest first: the root that `tests/containerd-roots.sh` unpacked, or why
    /// there is none.
    pub fn containerds(&self) -> Vec<(&'static str, Result<PathBuf, String>)> {
        let roots = self.target_dir.join("containerd");
        let find = |series: &'static str| {
            let root = roots.join(series);
            let skipped = || fs::read_to_string(roots.join(format!("{series}.skipped"))).ok();
            let found = if root.join("version").is_file() {
                Ok(root)
            } else {
                let never = "tests/containerd-roots.sh has not been run; `make test` does";
                Err(skipped().map_or_else(|| never.to_owned(), |reason| reason.trim().to_owned()))
            };
            (series, found)
        };
        ["1.7", "2.x"].map(find).to_vec()
    }

    /// `dunlin` with no arguments yet.
    pub fn dunlin(&self) -> Command {
        Command::new(self.bin_dir.join("dunlin"))
    }
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The first.
    A,
    /// The second.
    B,
}

impl Host {
    /// Both.
    pub const ALL: [Host; 2] = [Host::A, Host::B];

    /// The name that the lab and the nodes use.
    pub fn name(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A running lab; dropping it takes it down.
pub struct Lab {
    /// What it was started with.
    pub programs: Programs,
    dir: PathBuf,
}

impl Lab {
    /// Starts a lab in `dir` with the installed containerd.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn up(programs: &Programs, dir: &Path) -> Lab {
        Lab::up_with(programs, dir, None)
    }

    /// Starts a lab in `dir` with the containerd of a root.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn up_with(programs: &Programs, dir: &Path, containerd: Option<&Path>) -> Lab {
        let lab = Lab { programs: programs.clone(), dir: dir.to_owned() };
        let mut up = lab.lab_command(&["up", "--image"]);
        up.arg(&programs.image_dir);
        if let Some(root) = containerd {
            up.arg("--containerd").arg(root);
        }
        Run::new(up, UP).ok();
        lab
    }

    /// Takes it down.
    ///
    /// # Panics
    /// When that fails.
    pub fn down(&self) {
        Run::new(self.lab_command(&["down"]), DOWN).ok();
    }

    /// The lab's directory on this machine.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A host's directory on this machine: `etc`, `data`, `run`, `logs`.
    pub fn host_dir(&self, host: Host) -> PathBuf {
        self.dir.join(host.name())
    }

    /// Where this machine sees a path below a host's `/run`.
    ///
    /// # Panics
    /// When the path is not below `/run`.
    pub fn run_path(&self, host: Host, path: &str) -> PathBuf {
        let below = path.strip_prefix("/run/").expect("a path below /run");
        self.host_dir(host).join("run").join(below)
    }

    /// `dunlin lab --dir <dir> <arguments>`.
    pub fn lab_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.programs.dunlin();
        command.args(["lab", "--dir"]).arg(&self.dir).args(arguments);
        command
    }

    /// A command that runs on a host.
    pub fn command_on(&self, host: Host, arguments: &[&str]) -> Command {
        let mut command = self.lab_command(&["exec", host.name(), "--"]);
        command.args(arguments);
        command
    }

    /// Runs a command on a host to its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn on(&self, host: Host, arguments: &[&str]) -> Run {
        Run::new(self.command_on(host, arguments), COMMAND)
    }

    /// Starts a command on a host, all three streams piped.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_on(&self, host: Host, arguments: &[&str]) -> Child {
        let mut command = self.command_on(host, arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("dunlin lab exec starts")
    }

    /// Runs `ctr` on a host.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn ctr(&self, host: Host, arguments: &[&str]) -> Run {
        self.on(host, &[&["ctr"], arguments].concat())
    }

    /// Runs `dunlin migrate` on the host that has the container.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn migrate(&self, from: Host, container: &str, to: &str) -> Run {
        Run::new(self.command_on(from, &["dunlin", "migrate", container, "--to", to]), MOVE)
    }

    /// Starts, stops or kills `node` or `containerd` of a host.
    ///
    /// # Panics
    /// When the host refuses.
    pub fn service(&self, host: Host, action: &str, service: &str) {
        Run::new(self.lab_command(&["service", host.name(), action, service]), COMMAND).ok();
    }

    /// What containerd says of a container's task: `RUNNING`, ..., or `None` where it has none.
    ///
    /// # Panics
    /// When containerd does not answer.
    pub fn state(&self, host: Host, container: &str) -> Option<String> {
        self.observer().state(host, container)
    }

    /// Asks both containerds without starting a program each time.
    ///
    /// # Panics
    /// When there can be no runtime.
    pub fn observer(&self) -> Observer {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let sockets = Host::ALL.map(|host| self.run_path(host, "/run/containerd/containerd.sock"));
        Observer { runtime, sockets }
    }

    /// What a host has of a sandbox that is not there any more: its shim, its machine, its scratch disks.
    pub fn left_of(&self, host: Host, namespace: &str, sandbox: &str) -> Vec<String> {
        let (of_shim, of_machine) = (format!("-id {sandbox} "), format!("/{namespace}/{sandbox}/"));
        let is_its = |line: &String| line.contains(&of_shim) || line.contains(&of_machine);
        let mut left: Vec<String> = self.processes(host).into_iter().filter(is_its).collect();
        let scratch = self.host_dir(host).join("data/scratch").join(namespace).join(sandbox);
        let files = fs::read_dir(scratch).into_iter().flatten().flatten();
        left.extend(files.map(|file| file.path().display().to_string()));
        left
    }

    /// Waits until a host has nothing of a sandbox.
    ///
    /// # Panics
    /// When something is left.
    #[track_caller]
    pub fn assert_nothing_of(&self, host: Host, namespace: &str, sandbox: &str) {
        let since = Instant::now();
        loop {
            let left = self.left_of(host, namespace, sandbox);
            if left.is_empty() {
                return;
            }
            assert!(since.elapsed() < GONE, "left of {namespace}/{sandbox} on host {host}: {left:#?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Commands of the processes of a host, without the kernel's.
    pub fn processes(&self, host: Host) -> Vec<String> {
        let read =
            |path: String| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
        let all: Vec<(String, PathBuf)> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).ok().map(|ns| (pid, ns)))
            .collect();
        let first = format!("lab host --dir {} --name {host} ", self.dir.display());
        let is_first =
            |pid: &String| read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains(&first));
        let Some(ns) = all.iter().find(|(pid, _)| is_first(pid)).map(|(_, ns)| ns.clone()) else {
            return Vec::new();
        };
        all.iter()
            .filter(|(_, other)| *other == ns)
            .filter_map(|(pid, _)| read(format!("/proc/{pid}/cmdline")).ok())
            .filter(|line| !line.is_empty())
            .collect()
    }

    /// Copies all logs there are to `<target>/e2e-logs/<name>`; gives that directory.
    pub fn keep_logs(&self, name: &str) -> PathBuf {
        let kept = self.programs.target_dir.join("e2e-logs").join(name);
        for host in Host::ALL {
            for part in ["logs", "run/dunlin"] {
                let from = self.host_dir(host).join(part);
                let to = kept.join(host.name()).join(part.rsplit('/').next().unwrap_or(part));
                let _ = copy_logs(&from, &to, 6);
            }
        }
        kept
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mut down = self.lab_command(&["down"]);
        if !down.stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
            eprintln!("the lab in {} could not be taken down", self.dir.display());
        }
        // Only its logs are left, and those of failed cases have been kept.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Asks containerd on both hosts, from outside, through its own API.
pub struct Observer {
    runtime: Runtime,
    sockets: [PathBuf; 2],
}

impl Observer {
    /// What containerd says of a container's task: `RUNNING`, ..., or `None` where it has none.
    ///
    /// # Panics
    /// When containerd does not answer.
    pub fn state(&self, host: Host, container: &str) -> Option<String> {
        let socket = match host {
            Host::A => &self.sockets[0],
            Host::B => &self.sockets[1],
        };
        let listed = self.runtime.block_on(async {
            let list = async {
                let channel = containerd_client::connect(socket).await.map_err(|error| error.to_string())?;
                list_tasks(channel).await
            };
            tokio::time::timeout(STATES, list).await.map_err(|_| "it did not answer".to_owned())?
        });
        let tasks = listed.unwrap_or_else(|error| panic!("containerd on host {host}: {error}"));
        tasks.into_iter().find(|(id, _)| id == container).map(|(_, state)| state)
    }
}

async fn list_tasks(channel: Channel) -> Result<Vec<(String, String)>, String> {
    let mut request = Request::new(ListTasksRequest::default());
    let namespace = "default".parse().expect("an ASCII header value");
    request.metadata_mut().insert("containerd-namespace", namespace);
    let listed = TasksClient::new(channel).list(request).await.map_err(|status| status.to_string())?;
    let name = |task: &containerd_client::types::v1::Process| task.status().as_str_name().to_owned();
    Ok(listed.into_inner().tasks.iter().map(|task| (task.id.clone(), name(task))).collect())
}

fn copy_logs(from: &Path, to: &Path, depth: usize) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let (path, target) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() && depth > 0 {
            copy_logs(&path, &target, depth - 1)?;
        } else if path.extension().is_some_and(|end| end == "log") {
            fs::create_dir_all(to)?;
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}
