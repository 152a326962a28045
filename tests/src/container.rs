//! A container that a case started, and that is gone when the case ends.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use crate::{Counted, Host, Lab, Run, count};

const IMAGE: &str = "docker.io/dunlin/demo:latest";
const RUNTIME: &str = "io.containerd.dunlin.v2";
const SOON: Duration = Duration::from_secs(30);

/// A detached container of the demo image whose output is a log file on each host.
pub struct Container<'a> {
    lab: &'a Lab,
    /// containerd's id, the same on both hosts.
    pub id: String,
}

impl<'a> Container<'a> {
    /// The runtime and the image, as `ctr run` wants them before the id.
    pub const RUN: [&'static str; 2] = ["--runtime", RUNTIME];
    /// The image's name.
    pub const IMAGE: &'static str = IMAGE;

    /// `ctr run -d` on a host.
    ///
    /// # Panics
    /// When that fails.
    pub fn start(lab: &'a Lab, host: Host, id: &str, command: &[&str]) -> Container<'a> {
        Container::start_with(lab, host, id, &[], command)
    }

    /// The same with further options of `ctr run`.
    ///
    /// # Panics
    /// When that fails.
    pub fn start_with(
        lab: &'a Lab,
        host: Host,
        id: &str,
        options: &[&str],
        command: &[&str],
    ) -> Container<'a> {
        let container = Container { lab, id: id.to_owned() };
        for host in Host::ALL {
            let log = container.log_path(host);
            let _ = fs::remove_file(&log);
            fs::create_dir_all(log.parent().expect("a log has a directory")).expect("a directory for logs");
        }
        let uri = format!("file://{}", container.log_path(host).display());
        let run = ["run", "-d", "--runtime", RUNTIME, "--log-uri", &uri];
        lab.ctr(host, &[&run, options, &[IMAGE, id], command].concat()).ok();
        container
    }

    /// A container that was started in another way, its log where [`Container::log_path`] says.
    pub fn adopt(lab: &'a Lab, id: &str) -> Container<'a> {
        Container { lab, id: id.to_owned() }
    }

    /// Where its output is on a host: the file that a node there gives an arriving container.
    pub fn log_path(&self, host: Host) -> PathBuf {
        self.lab.host_dir(host).join("logs/containers/default").join(format!("{}.log", self.id))
    }

    /// Its output on a host so far.
    pub fn log(&self, host: Host) -> String {
        fs::read(self.log_path(host))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// `ctr task exec` on a host.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn exec(&self, host: Host, exec_id: &str, command: &[&str]) -> Run {
        self.lab.ctr(host, &[&["task", "exec", "--exec-id", exec_id, &self.id], command].concat())
    }

    /// What containerd on a host says of it.
    ///
    /// # Panics
    /// When containerd does not answer.
    pub fn state(&self, host: Host) -> Option<String> {
        self.lab.state(host, &self.id)
    }

    /// Waits until it is in `state` on a host.
    ///
    /// # Panics
    /// When it is not after `deadline`.
    #[track_caller]
    pub fn await_state(&self, host: Host, state: &str, deadline: Duration) {
        let since = Instant::now();
        loop {
            let now = self.state(host);
            if now.as_deref() == Some(state) {
                return;
            }
            assert!(since.elapsed() < deadline, "{} is {now:?} on host {host}, not {state}", self.id);
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What its counter has written on a host.
    pub fn counted(&self, host: Host) -> Counted {
        count(&self.log(host))
    }

    /// Waits until its counter has written `more` further lines on a host: it runs there.
    ///
    /// # Panics
    /// When it has not after `deadline`.
    #[track_caller]
    pub fn await_lines(&self, host: Host, more: u64, deadline: Duration) {
        let (since, wanted) = (Instant::now(), self.counted(host).last + more);
        loop {
            let last = self.counted(host).last;
            if last >= wanted {
                return;
            }
            assert!(since.elapsed() < deadline, "the counter on host {host} is at {last}, not at {wanted}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `<pid> <start time>` of its counter as it sees itself: the same two are the same process.
    ///
    /// # Panics
    /// When the counter does not run on that host.
    #[track_caller]
    pub fn identity(&self, host: Host, exec_id: &str) -> String {
        let script = "read -r word pid </counter.log && cat /proc/$pid/stat";
        let stat = self.exec(host, exec_id, &["sh", "-c", script]).ok();
        let pid = stat.split(' ').next().expect("a pid").to_owned();
        let start = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(19)).expect("22 fields");
        format!("{pid} {start}")
    }

    /// Runs on `host`, is listed there and nowhere on the other, not even as a container, and has no shim, machine or
    /// disk there: it may take a moment to go.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn assert_only_on(&self, host: Host) {
        let other = host.other();
        self.await_state(host, "RUNNING", SOON);
        let since = Instant::now();
        while let Some(state) = self.state(other) {
            assert!(since.elapsed() < SOON, "a task stayed on host {other}, {state}");
            thread::sleep(Duration::from_millis(50));
        }
        while self.is_listed(other) {
            assert!(since.elapsed() < SOON, "a container stayed on host {other}");
            thread::sleep(Duration::from_millis(50));
        }
        assert!(self.is_listed(host), "no container on host {host}");
        self.lab.assert_nothing_of(other, "default", &self.id);
    }

    /// Whether a host's containerd has the container.
    #[track_caller]
    fn is_listed(&self, host: Host) -> bool {
        self.lab.ctr(host, &["containers", "ls", "-q"]).ok().lines().any(|line| line == self.id)
    }

    /// Kills and removes it on a host.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn remove(&self, host: Host) {
        self.lab.ctr(host, &["task", "kill", "-s", "SIGKILL", &self.id]).ok();
        self.await_state(host, "STOPPED", Duration::from_secs(15));
        self.lab.ctr(host, &["task", "rm", &self.id]);
        self.lab.ctr(host, &["containers", "rm", &self.id]).ok();
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        for host in Host::ALL {
            let socket = self.lab.run_path(host, "/run/containerd/containerd.sock");
            if !socket.exists() {
                continue;
            }
            for arguments in
                [["task", "rm", "-f", self.id.as_str()].as_slice(), &["containers", "rm", &self.id]]
            {
                let mut command = self.lab.command_on(host, &[&["timeout", "20", "ctr"], arguments].concat());
                let _ = command.output();
            }
        }
    }
}
