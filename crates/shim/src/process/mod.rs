//! One process of a container: its state, its exit, its stdio.
//!
//! | state      | begin    | started | failed  | exit       | save |
//! |------------|----------|---------|---------|------------|------|
//! | Created    | Starting | -       | -       | Terminated | =    |
//! | Starting   | -        | Running | Created | Terminated | -    |
//! | Running    | -        | -       | -       | Terminated | =    |
//! | Terminated | -        | -       | -       | -          | =    |
//!
//! A move leaves the state as it is: the process runs on. A destination's process is imported in the state it was
//! saved in, is patched with streams of this host, is resumed by connecting them, and is aborted by `exit`
//! with 137. What a source holds back is the report of an exit (see `sandbox::exits`), because the side
//! that owns the task then reports it. Whether the process may be touched at all is its container's hold.

pub(crate) mod dam;
pub(crate) mod fifos;
pub(crate) mod io;
pub(crate) mod streams;

use std::path::PathBuf;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::controller::{NotNow, Transitions};
use io::{Ports, Stdio};
use streams::Streams;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255: the status, or 128 + the signal.
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
}

/// Where a process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    /// Its start is under way in the guest.
    Starting,
    Running,
    Terminated,
}

/// What changes a process's state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Begin,
    Started,
    Failed,
    Exit,
    Save,
}

impl Transitions for State {
    type Op = Op;
    const STATES: &'static [(&'static str, State)] = &[
        ("Created", State::Created),
        ("Starting", State::Starting),
        ("Running", State::Running),
        ("Terminated", State::Terminated),
    ];
    const OPS: &'static [(&'static str, Op)] = &[
        ("begin", Op::Begin),
        ("started", Op::Started),
        ("failed", Op::Failed),
        ("exit", Op::Exit),
        ("save", Op::Save),
    ];

    fn after(self, op: Op) -> Option<State> {
        match (self, op) {
            (State::Created, Op::Begin) => Some(State::Starting),
            (State::Starting, Op::Started) => Some(State::Running),
            (State::Starting, Op::Failed) => Some(State::Created),
            (State::Created | State::Starting | State::Running, Op::Exit) => Some(State::Terminated),
            (State::Created | State::Running | State::Terminated, Op::Save) => Some(self),
            _ => None,
        }
    }
}

/// A container's init (exec id "") or one of its execs.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) exec_id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) stdio: Stdio,
    /// Its OCI process, JSON: kept as it came, since only an exec's start looks into it.
    pub(crate) spec: Option<Vec<u8>>,
    state: State,
    /// The guest's; 0 before the start.
    pid: u32,
    pub(crate) ports: Ports,
    /// Frame id of the wait that is open on it; 0: none.
    pub(crate) wait_call_id: u64,
    /// Set while the streams are connected.
    streams: Option<Streams>,
    /// containerd has ended the input, maybe before there was one.
    pub(crate) stdin_closed: bool,
    exit: watch::Sender<Option<Exit>>,
    /// Output in FIFOs that nobody has read yet.
    unread: Option<fifos::Unread>,
}

impl Process {
    pub(crate) fn new(exec_id: String, bundle: PathBuf, stdio: Stdio, spec: Option<Vec<u8>>) -> Process {
        Process {
            exec_id,
            bundle,
            stdio,
            spec,
            state: State::Created,
            pid: 0,
            ports: Ports::default(),
            wait_call_id: 0,
            streams: None,
            stdin_closed: false,
            exit: watch::Sender::new(None),
            unread: None,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// The guest's pid, 0 before the start.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, when it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// For errors.
    fn what(&self) -> String {
        if self.exec_id.is_empty() { "the init process".to_owned() } else { format!("exec {}", self.exec_id) }
    }

    /// Its start is under way from now on.
    pub(crate) fn begin(&mut self) -> Result<(), NotNow> {
        let what = self.what();
        self.state.enter(Op::Begin, what)
    }

    /// It runs. Err: it was ended meanwhile.
    pub(crate) fn started(&mut self, pid: u32, ports: Ports, streams: Streams) -> Result<(), NotNow> {
        let what = self.what();
        self.state.enter(Op::Started, what)?;
        self.pid = pid;
        self.ports = ports;
        self.connect(streams);
        Ok(())
    }

    /// The guest did not start it; it can be tried again.
    pub(crate) fn failed(&mut self) {
        // It may have been ended meanwhile, which stands.
        let _ = self.state.enter(Op::Failed, "");
    }

    /// A destination's: it has the state that it was saved in.
    pub(crate) fn import(&mut self, state: State, pid: u32, exit: Option<Exit>) {
        self.state = state;
        self.pid = pid;
        self.exit.send_replace(exit);
    }

    /// The streams are connected.
    pub(crate) fn connect(&mut self, mut streams: Streams) {
        if self.stdin_closed {
            streams.close_stdin();
        }
        self.streams = Some(streams);
    }

    /// The connected streams.
    pub(crate) fn streams(&self) -> Option<&Streams> {
        self.streams.as_ref()
    }

    /// No more input comes from containerd's side. It may say so while the start is under way.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin_closed = true;
        if let Some(streams) = &mut self.streams {
            streams.close_stdin();
        }
    }

    /// Marks the process ended and wakes everyone who waits. A second end changes nothing.
    pub(crate) fn terminate(&mut self, exit: Exit) -> bool {
        if self.state.enter(Op::Exit, "").is_err() {
            return false;
        }
        // The guest tells an end only when all output was taken; what is left is in FIFOs here.
        self.unread = self.streams.take().and_then(Streams::finish);
        self.exit.send_replace(Some(exit));
        true
    }

    /// The process runs on another host: streams end here, and whoever waits is woken without an exit.
    pub(crate) fn leave(&mut self) {
        self.streams = None;
        if self.ended().is_none() {
            self.exit = watch::Sender::new(None);
        }
    }

    /// Yields the exit, at once when there is one; closed when the process is deleted or moved away.
    pub(crate) fn exits(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_code() {
        crate::controller::check_table::<State>(include_str!("mod.rs"));
    }

    #[test]
    fn input_that_was_ended_early_ends_when_it_is_connected() {
        let mut process = Process::new(String::new(), "/b".into(), Stdio::default(), None);
        process.close_stdin();
        let mut streams = Streams::default();
        streams.keep_stdin(std::fs::File::open("/dev/null").unwrap());
        process.connect(streams);
        assert!(!process.streams.unwrap().stdin_is_open());
    }

    #[test]
    fn a_process_ends_once() {
        let mut process = Process::new(String::new(), "/b".into(), Stdio::default(), None);
        process.begin().unwrap();
        process.started(7, Ports::default(), Streams::default()).unwrap();
        let first = Exit { code: 3, at: SystemTime::UNIX_EPOCH };
        assert!(process.terminate(first));
        assert!(!process.terminate(Exit { code: 9, at: SystemTime::UNIX_EPOCH }));
        assert_eq!((process.state(), process.pid(), process.ended()), (State::Terminated, 7, Some(first)));
        assert_eq!(*process.exits().borrow(), Some(first));
    }

    #[test]
    fn an_end_during_the_start_stands() {
        let mut process = Process::new("e".into(), "/b".into(), Stdio::default(), None);
        process.begin().unwrap();
        assert!(process.terminate(Exit { code: 137, at: SystemTime::UNIX_EPOCH }));
        assert!(process.started(7, Ports::default(), Streams::default()).is_err());
        process.failed();
        assert_eq!(process.state(), State::Terminated);
    }
}
