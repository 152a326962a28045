//! Standard streams between a process and the host.
//!
//! ```text
//!  process ──pipe or pty──> Tap ──> relay ──dial port──> host        stdout, stderr
//!  process <──pipe or pty────────── relay <──dial port── host        stdin
//! ```
//!
//! The guest dials in every case. A relay outlives its connections: it dials again until all is
//! delivered, or until it is told that nobody will come for the rest.

mod dialer;
pub mod pty;
mod relay;
mod tap;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use dialer::{BoxedStream, Dialer};
use pty::Pty;
use tap::{Tap, TapHandle};

/// What becomes of a process's streams when a connection breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carriage {
    /// All go on where they stood: the host speaks the resumable protocol.
    Resumable,
    /// Outputs go on with a repetition, the input ends: an init, on a host that does not.
    Replaying,
    /// All end.
    #[default]
    Once,
}

/// Ports on the host for a process's streams; a stream without one leads nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Where input comes from.
    pub stdin: Option<u32>,
    /// Where output goes.
    pub stdout: Option<u32>,
    /// Where error output goes.
    pub stderr: Option<u32>,
    /// How the streams travel.
    pub carriage: Carriage,
}

/// PID 1's ends of a process's streams.
#[derive(Debug)]
pub enum ProcessIo {
    /// Three pipes, of which any may be absent.
    Pipes {
        /// Into the process.
        stdin: Option<pipe::Sender>,
        /// Out of it.
        stdout: Option<pipe::Receiver>,
        /// Out of it.
        stderr: Option<pipe::Receiver>,
    },
    /// One terminal.
    Terminal(Pty),
}

impl ProcessIo {
    /// Takes over pipe ends; must be called inside the runtime.
    pub fn pipes(
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> io::Result<ProcessIo> {
        Ok(ProcessIo::Pipes {
            stdin: stdin.map(pipe::Sender::from_owned_fd).transpose()?,
            stdout: stdout.map(pipe::Receiver::from_owned_fd).transpose()?,
            stderr: stderr.map(pipe::Receiver::from_owned_fd).transpose()?,
        })
    }

    /// Takes over a pty's master; must be called inside the runtime.
    pub fn terminal(master: OwnedFd) -> io::Result<ProcessIo> {
        Ok(ProcessIo::Terminal(Pty::new(master)?))
    }

    /// The terminal, if it is one.
    pub fn pty(&self) -> Option<Pty> {
        match self {
            ProcessIo::Terminal(pty) => Some(pty.clone()),
            ProcessIo::Pipes { .. } => None,
        }
    }
}

struct Output {
    tap: TapHandle,
    task: JoinHandle<()>,
}

/// The running relays of one process.
pub struct Relays {
    outputs: Vec<Output>,
    input: Option<JoinHandle<()>>,
}

impl Relays {
    /// Starts relaying. Once `stop` turns true, what the host has not taken is given up; a `stop`
    /// whose sender is gone counts as never.
    pub fn connect(io: ProcessIo, ports: &Ports, dialer: &Dialer, stop: watch::Receiver<bool>) -> Relays {
        let carriage = ports.carriage;
        let output = |reader: Tap<_>, tap, port| Output {
            task: relay::output(reader, port, carriage, dialer.clone(), stop.clone()),
            tap,
        };
        let mut outputs = Vec::new();
        let input = match io {
            ProcessIo::Pipes { stdin, stdout, stderr } => {
                for (pipe, port) in [(stdout, ports.stdout), (stderr, ports.stderr)] {
                    if let Some(pipe) = pipe {
                        let (reader, tap) = Tap::new(pipe);
                        outputs.push(output(reader, tap, port));
                    }
                }
                // Without a port the pipe is dropped here, which ends the process's input.
                stdin
                    .zip(ports.stdin)
                    .map(|(pipe, port)| relay::input(pipe, port, carriage, dialer.clone(), stop))
            }
            ProcessIo::Terminal(pty) => {
                let (reader, tap) = Tap::new(pty.clone());
                outputs.push(Output {
                    task: relay::output(reader, ports.stdout, carriage, dialer.clone(), stop.clone()),
                    tap,
                });
                ports.stdin.map(|port| relay::input(pty, port, carriage, dialer.clone(), stop))
            }
        };
        Relays { outputs, input }
    }

    /// Ends the input: whoever should read it is gone.
    pub fn stop_input(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }

    /// Whether every output was read to its end.
    pub fn outputs_ended(&self) -> bool {
        self.outputs.iter().all(|output| output.tap.ended() || output.task.is_finished())
    }

    /// Cuts outputs from which nothing could be read for this long.
    pub fn cut_dry_outputs(&self, quiet: Duration) {
        for output in &self.outputs {
            if !output.tap.ended() && output.tap.dry_for(quiet) {
                output.tap.cut();
            }
        }
    }

    /// Waits until the host has all output, or the relays were told to stop.
    pub async fn drained(&mut self) {
        for output in &mut self.outputs {
            if let Err(error) = (&mut output.task).await {
                tracing::error!(%error, "an output relay ended early");
            }
        }
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.stop_input();
        for output in &self.outputs {
            output.task.abort();
        }
    }
}
