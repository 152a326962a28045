//! Pods of several containers in one machine: their processes, the far ends of their streams, their exits, on
//! whichever host has them.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::sys::stat::Mode;
use serde_json::Value;

use crate::{
    Background, Chatty, Checker, Containerd, Ended, Exits, Feeder, Host, Lab, Reader, Run, Stdio, Template,
};

const MOVE: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(120);
/// How far the guest's clock may be from the host's: it is set by one message, which a busy host delivers late. A few
/// milliseconds were seen on an idle machine, 142 ms on one with eight others at work.
const CLOCK: Duration = Duration::from_secs(1);
/// SIGTERM, which ends a chatty process with its own code.
const TERMINATE: u32 = 15;

/// What a process does.
#[derive(Clone, Debug)]
pub enum Work {
    /// Prints numbered lines.
    Chatty(Chatty),
    /// The same on a terminal.
    Terminal(Chatty),
    /// `cat`, fed with numbered lines of this tag, one each time that this has passed.
    Cat(String, Duration),
}

impl Work {
    fn args(&self) -> Vec<String> {
        match self {
            Work::Chatty(chatty) | Work::Terminal(chatty) => chatty.args(),
            Work::Cat(..) => vec!["cat".to_owned()],
        }
    }

    fn code(&self) -> u32 {
        match self {
            Work::Chatty(chatty) | Work::Terminal(chatty) => chatty.code,
            Work::Cat(..) => 0,
        }
    }

    fn is_endless(&self) -> bool {
        match self {
            Work::Chatty(chatty) | Work::Terminal(chatty) => chatty.lines == Chatty::ENDLESS,
            Work::Cat(..) => true,
        }
    }

    /// It cannot have ended sooner after its start.
    fn at_least(&self) -> Duration {
        match self {
            Work::Chatty(chatty) | Work::Terminal(chatty) => {
                // Between its lines it waits; a terminated one waits less.
                let pauses = u32::try_from(chatty.lines.saturating_sub(1)).unwrap_or(u32::MAX);
                Duration::from_millis(u64::from(chatty.pause_ms.saturating_mul(pauses)))
            }
            Work::Cat(..) => Duration::ZERO,
        }
    }
}

/// One process, init or exec.
#[derive(Debug)]
pub struct Process {
    /// Its container.
    pub container: String,
    /// Its exec id; empty: the init.
    pub exec: String,
    work: Work,
    /// 0 before its start.
    pid: u32,
    /// When it cannot have ended yet.
    not_before: SystemTime,
    ended: bool,
    readers: Vec<(Output, Reader)>,
    feeder: Option<Feeder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Stdout,
    Stderr,
}

impl Process {
    /// For failures.
    pub fn name(&self) -> String {
        if self.exec.is_empty() {
            self.container.clone()
        } else {
            format!("{}/{}", self.container, self.exec)
        }
    }

    /// It runs, and until somebody ends it.
    pub fn goes_on(&self) -> bool {
        self.pid != 0 && !self.ended && self.work.is_endless()
    }

    /// Stops reading what it prints, or goes on.
    pub fn pause_reading(&self, paused: bool) {
        for (_, reader) in &self.readers {
            reader.pause(paused);
        }
    }

    /// Bytes of its output that have come.
    pub fn bytes(&self) -> u64 {
        self.readers.iter().map(|(_, reader)| reader.so_far().bytes()).sum()
    }
}

/// All pods of one machine.
pub struct Pods<'a> {
    lab: &'a Lab,
    // Before the runtime: channels end first.
    hosts: [Containerd; 2],
    template: Template,
    /// What was heard of exits.
    pub exits: Exits,
    /// Where they are.
    pub at: Host,
    containers: Vec<String>,
    processes: Vec<Process>,
    /// The furthest that an exit's time was seen before what came before it, or after what came after it.
    pub clock_off: Duration,
    _background: Background,
}

impl<'a> Pods<'a> {
    /// None yet; the first host is `at`.
    ///
    /// # Panics
    /// When a containerd does not answer.
    pub fn new(lab: &'a Lab, at: Host) -> Pods<'a> {
        let background = Background::start();
        let hosts = Host::ALL.map(|host| Containerd::connect(lab, host, &background));
        let exits = Exits::default();
        hosts.iter().for_each(|host| exits.listen(host));
        let template = hosts[index(at)].template(lab);
        fs::create_dir_all(lab.run_path(at, "/run/pods")).expect("a directory for FIFOs");
        Pods {
            lab,
            hosts,
            template,
            exits,
            at,
            containers: Vec::new(),
            processes: Vec::new(),
            clock_off: Duration::ZERO,
            _background: background,
        }
    }

    /// containerd of the host that has them.
    pub fn containerd(&self) -> &Containerd {
        &self.hosts[index(self.at)]
    }

    /// Makes a container; nothing runs in it yet.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn create(&mut self, id: &str, notes: &[(&str, &str)], work: Work) {
        let stdio = self.stdio(id, &work);
        self.containerd().create(&self.template, id, notes, &work.args(), &stdio);
        self.containers.push(id.to_owned());
        self.add(id, "", work);
    }

    /// Adds an exec and starts it.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn exec(&mut self, id: &str, exec: &str, work: Work) {
        let stdio = self.stdio(&format!("{id}-{exec}"), &work);
        self.containerd().exec(&self.template, id, exec, &work.args(), &stdio);
        self.add(id, exec, work);
        self.start(id, exec);
    }

    /// Starts a process and takes the far ends of its streams.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn start(&mut self, id: &str, exec: &str) {
        let containerd = self.containerd().clone();
        let told = containerd.process(id, exec);
        let (lab, at) = (self.lab, self.at);
        let process = self.process_mut(id, exec);
        let outputs = match &process.work {
            Work::Chatty(chatty) => {
                let errors =
                    (!chatty.errors.is_empty()).then(|| (Output::Stderr, chatty.errors.clone(), "\n"));
                Some((Output::Stdout, chatty.tag.clone(), "\n")).into_iter().chain(errors).collect()
            }
            Work::Terminal(chatty) => vec![(Output::Stdout, chatty.tag.clone(), "\r\n")],
            Work::Cat(tag, _) => vec![(Output::Stdout, tag.clone(), "\n")],
        };
        for (output, tag, end) in outputs {
            let mut reader =
                Reader::start(&format!("{} {output:?}", process.name()), Checker::new(&tag, end));
            reader.follow(&place(lab, at, output, &told));
            process.readers.push((output, reader));
        }
        process.not_before = SystemTime::now() + process.work.at_least().min(MOVE);
        process.pid = containerd.start(id, exec);
        if let Work::Cat(tag, pause) = &process.work {
            let fifo = lab.run_path(at, &told.stdin);
            process.feeder = Some(Feeder::start(&process.name(), tag, *pause, &fifo));
        }
        self.exits.ask(&containerd, id, exec);
    }

    fn add(&mut self, id: &str, exec: &str, work: Work) {
        self.processes.push(Process {
            container: id.to_owned(),
            exec: exec.to_owned(),
            work,
            pid: 0,
            not_before: SystemTime::now(),
            ended: false,
            readers: Vec::new(),
            feeder: None,
        });
    }

    /// A process by its names.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn process(&self, id: &str, exec: &str) -> &Process {
        let found = self.processes.iter().find(|process| process.container == id && process.exec == exec);
        found.unwrap_or_else(|| panic!("no process {id} {exec}"))
    }

    #[track_caller]
    fn process_mut(&mut self, id: &str, exec: &str) -> &mut Process {
        let found = self.processes.iter_mut().find(|process| process.container == id && process.exec == exec);
        found.unwrap_or_else(|| panic!("no process {id} {exec}"))
    }

    /// All processes that there are.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Waits until this much more has come of every output of `which` processes.
    ///
    /// # Panics
    /// When it has not in time, or is not what it must be; says where every stream stands.
    #[track_caller]
    pub fn await_more(&self, more: u64, which: impl Fn(&Process) -> bool) {
        let since = Instant::now();
        let chosen = self.processes.iter().filter(|process| which(process));
        let wanted: Vec<(&Process, &Reader, u64)> = chosen
            .flat_map(|process| process.readers.iter().map(move |(_, reader)| (process, reader)))
            .map(|(process, reader)| (process, reader, reader.so_far().bytes() + more))
            .collect();
        for (process, reader, bytes) in &wanted {
            while reader.so_far().bytes() < *bytes {
                let damage = reader.so_far().damage().map(str::to_owned);
                assert!(damage.is_none(), "{}: {}", reader.name, damage.unwrap_or_default());
                assert!(since.elapsed() < SOON, "{} stands still\n{}", reader.name, self.standing(process));
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Where all streams stand, and what the init of one container waits for.
    fn standing(&self, of: &Process) -> String {
        let readers = self.processes.iter().flat_map(|process| &process.readers);
        let mut all: Vec<String> = readers.map(|(_, reader)| reader.standing()).collect();
        let look =
            "for p in /proc/[0-9]*; do echo $p; cat $p/stat $p/syscall $p/wchan; grep wchar $p/io; done";
        let asked = ["task", "exec", "--exec-id", "look", &of.container, "sh", "-c", look];
        let seen = self.lab.ctr(self.at, &asked);
        all.push(format!("{}{}", seen.stdout, seen.stderr));
        all.join("\n")
    }

    /// FIFOs of our own on the present host.
    fn stdio(&self, name: &str, work: &Work) -> Stdio {
        let fifo = |wanted: bool, stream: &str| {
            if !wanted {
                return String::new();
            }
            let inside = format!("/run/pods/{name}-{stream}");
            let path = self.lab.run_path(self.at, &inside);
            let _ = fs::create_dir_all(path.parent().expect("below /run"));
            let _ = fs::remove_file(&path);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a FIFO");
            inside
        };
        let (errors, terminal) = match work {
            Work::Chatty(chatty) => (!chatty.errors.is_empty(), false),
            Work::Terminal(_) => (false, true),
            Work::Cat(..) => (false, false),
        };
        Stdio {
            stdin: fifo(matches!(work, Work::Cat(..)), "stdin"),
            stdout: fifo(true, "stdout"),
            stderr: fifo(errors, "stderr"),
            terminal,
        }
    }

    /// `dunlin migrate --output json` of one of the containers to the other host.
    ///
    /// # Panics
    /// When the command does not end in time.
    pub fn migrate_run(&self, asked: &str) -> Run {
        let to = self.at.other().name();
        let command = ["dunlin", "migrate", asked, "--to", to, "--output", "json"];
        Run::new(self.lab.command_on(self.at, &command), MOVE)
    }

    /// Moves all to the other host, asking for one of them, and goes on there. Gives the move's report.
    ///
    /// # Panics
    /// When the move fails, its report does not list every container, or a process is not as it was.
    #[track_caller]
    pub fn migrate(&mut self, asked: &str) -> Value {
        let run = self.migrate_run(asked);
        let shown = format!("{}{}", run.stdout, run.stderr);
        run.ok();
        let events = shown.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let report = events.into_iter().find(|event| event["event"] == "report");
        let report = report.unwrap_or_else(|| panic!("no report in:\n{shown}"));
        self.arrived();
        let mut listed: Vec<&str> =
            report["containers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut all: Vec<&str> = self.containers.iter().map(String::as_str).collect();
        listed.sort_unstable();
        all.sort_unstable();
        assert_eq!(listed, all, "the report's containers: {report}");
        assert_eq!(report["warnings"].as_array().map(Vec::len), Some(0), "left-overs: {report}");
        // The first made the machine.
        let sandbox = self.containers.first().expect("something moved");
        self.lab.assert_nothing_of(self.at.other(), "default", sandbox);
        report
    }

    /// Begins a move and cancels it after `delay`. True: the cancel came too late, and all are on the other host.
    ///
    /// # Panics
    /// When the move fails for another reason than its cancel, or a process is not as it was.
    #[track_caller]
    pub fn migrate_and_cancel(&mut self, asked: &str, delay: Duration) -> bool {
        let command = ["dunlin", "migrate", asked, "--to", self.at.other().name()];
        let since = SystemTime::now();
        let child = self.lab.spawn_on(self.at, &command);
        thread::sleep(delay);
        // Refused when there is no move any more, or not yet.
        let cancel = self.lab.on(self.at, &["dunlin", "cancel", asked]);
        let run = Run::finish(child, "dunlin migrate", MOVE);
        if run.code == 0 {
            self.arrived();
            return true;
        }
        assert_eq!(cancel.code, 0, "the move failed by itself: {run:?}, {cancel:?}");
        run.fails_naming(&["cancel"]);
        self.turned_back(since);
        false
    }

    /// A move that began at `since` has turned back.
    ///
    /// # Panics
    /// When the other host has told more than the end of what did not arrive.
    #[track_caller]
    pub fn turned_back(&mut self, since: SystemTime) {
        self.exits.set_aside_arrivals(self.at.other(), since);
        self.note_exits();
    }

    /// They are on the other host: streams go on there, and each process is the one that it was.
    #[track_caller]
    fn arrived(&mut self) {
        self.at = self.at.other();
        let (lab, at, containerd) = (self.lab, self.at, self.containerd().clone());
        // Streams first: whoever does not read holds the writers up.
        for process in &mut self.processes {
            let told = containerd.process(&process.container, &process.exec);
            let name = process.name();
            let state = told.status().as_str_name().to_owned();
            if process.pid == 0 {
                assert_eq!(state, "CREATED", "{name} was not started");
                continue;
            }
            assert_eq!(told.pid, process.pid, "{name} has another pid, it is {state}");
            let announced = self.exits.announced(&process.container, &process.exec);
            if let Some(exit) = announced.first().filter(|exit| exit.host != at) {
                assert_eq!((state.as_str(), told.exit_status), ("STOPPED", exit.ended.code), "{name}");
                continue;
            }
            if process.ended {
                continue;
            }
            for (output, reader) in &mut process.readers {
                reader.follow(&place(lab, at, *output, &told));
            }
            if let Some(feeder) = &process.feeder {
                feeder.follow(&lab.run_path(at, &told.stdin));
            }
            assert!(matches!(state.as_str(), "RUNNING" | "STOPPED"), "{name} is {state}");
            self.exits.ask(&containerd, &process.container, &process.exec);
        }
        self.note_exits();
    }

    /// Readers of ended processes need not wait for writers.
    fn note_exits(&mut self) {
        for process in self.processes.iter_mut().filter(|process| !process.ended) {
            if !self.exits.announced(&process.container, &process.exec).is_empty() {
                process.ended = true;
                process.readers.iter().for_each(|(_, reader)| reader.no_more_writers());
            }
        }
    }

    /// Ends a process's input, or terminates it, in the way that makes it end with its code.
    ///
    /// # Panics
    /// When it is refused.
    #[track_caller]
    pub fn end(&mut self, id: &str, exec: &str) {
        let containerd = self.containerd().clone();
        let process = self.process_mut(id, exec);
        process.not_before = SystemTime::now();
        match process.feeder.take() {
            Some(feeder) => {
                feeder.finish();
                containerd.close_stdin(id, exec);
            }
            None => containerd.kill(id, exec, TERMINATE),
        }
    }

    /// Waits for a process's end: all its output has come, byte for byte, and its exit was told once.
    /// Gives the bytes.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn ended(&mut self, id: &str, exec: &str) -> u64 {
        self.exits.await_one(id, exec, SOON);
        self.note_exits();
        let process = self.process_mut(id, exec);
        let readers = std::mem::take(&mut process.readers);
        let mut bytes = 0;
        let mut wrong = Vec::new();
        for (_, reader) in readers {
            match reader.finish(SOON) {
                Ok(whole) => bytes += whole.bytes(),
                Err(error) => wrong.push(error),
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let not_before = process.not_before;
        let ended = self.assert_one_exit(id, exec);
        let early = not_before.duration_since(ended.at).unwrap_or_default();
        self.clock_off = self.clock_off.max(early);
        bytes
    }

    /// Announced once by one containerd; every Wait that was answered says the same; code and time are true.
    #[track_caller]
    fn assert_one_exit(&self, id: &str, exec: &str) -> Ended {
        let process = self.process(id, exec);
        let name = process.name();
        let announced = self.exits.announced(id, exec);
        assert_eq!(announced.len(), 1, "exits of {name}: {announced:#?}");
        let exit = &announced[0];
        assert_eq!(exit.ended.code, process.work.code(), "{name}: {exit:?}");
        assert!(
            exit.ended.at + CLOCK >= process.not_before,
            "{name} ended before it could: {exit:?}, {process:?}"
        );
        assert!(exit.ended.at <= exit.heard + CLOCK, "{name} ended after that was heard: {exit:?}");
        // Asked anew wherever it arrived: what was asked of a host that it then left may have been cut off.
        let last = self.exits.await_last_answer(id, exec, SOON);
        assert_eq!(
            last.ended,
            Ok(exit.ended),
            "{name}: the last Wait, on host {}, against {exit:?}",
            last.host
        );
        for answer in self.exits.answered(id, exec) {
            match answer.ended {
                Ok(ended) => {
                    assert_eq!(ended, exit.ended, "{name}: Wait on host {} against {exit:?}", answer.host);
                }
                Err(reason) => {
                    let left = answer.number < last.number;
                    assert!(left && is_departure(&reason), "{name}: Wait on host {}: {reason}", answer.host);
                }
            }
        }
        exit.ended
    }

    /// Deletes an ended process, with exec id "" its container; what Delete tells is the exit.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn delete(&mut self, id: &str, exec: &str) {
        let exit = self.assert_one_exit(id, exec);
        assert_eq!(self.containerd().delete(id, exec), exit, "Delete of {id} {exec}");
        // containerd deletes execs with their task.
        self.processes.retain(|process| process.container != id || !exec.is_empty() && process.exec != exec);
        if exec.is_empty() {
            self.containers.retain(|container| container != id);
        }
    }
}

impl Drop for Pods<'_> {
    fn drop(&mut self) {
        // Only after a failure: what is left would stand in the next case's way, and its logs go with it.
        if !self.containers.is_empty() {
            self.lab.keep_logs("pods");
        }
        for id in self.containers.iter().rev() {
            for host in Host::ALL {
                for arguments in
                    [["ctr", "task", "rm", "-f", id].as_slice(), &["ctr", "containers", "rm", id]]
                {
                    let mut command = self.lab.command_on(host, &[&["timeout", "10"], arguments].concat());
                    let _ = command.output();
                }
            }
        }
    }
}

/// What containerd answers to a Wait for a task that has left: what the shim tells, or that the shim is gone.
fn is_departure(reason: &str) -> bool {
    ["runs on another host now", "ttrpc: closed"].iter().any(|words| reason.contains(words))
}

fn index(host: Host) -> usize {
    match host {
        Host::A => 0,
        Host::B => 1,
    }
}

fn place(lab: &Lab, at: Host, output: Output, told: &containerd_client::types::v1::Process) -> PathBuf {
    lab.run_path(
        at,
        match output {
            Output::Stdout => &told.stdout,
            Output::Stderr => &told.stderr,
        },
    )
}
