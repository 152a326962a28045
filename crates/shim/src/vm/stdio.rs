//! A process's streams over the link: ports handed out, listened on, relayed to containerd's FIFOs
//! and files. Everything listens before the guest is told to start: it dials while it serves the call.

use std::sync::atomic::Ordering;

use dunlin_bridge::message::{ProcessParameters, VsockStdioRelaySettings};
use dunlin_bridge::stdio::{self, Connect, Position, Resume, Sender, plain};
use dunlin_link::LinkStream;
use dunlin_link::host::PortListener;
use dunlin_wire::handoff::StreamPositions;
use serde_json::Value;

use super::guest::asked;
use super::{Vm, VmError};
use crate::process::io::{IoError, Ports, Sink, Source, Stdio};
use crate::process::streams::{Output, Streams};

/// A process that was started in the guest.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) ports: Ports,
    pub(crate) streams: Streams,
}

/// The guest dials; this end accepts.
struct Accept(PortListener);

impl Connect for Accept {
    type Stream = LinkStream;

    async fn connect(&mut self) -> Option<LinkStream> {
        self.0.accept().await
    }
}

/// The two ends of a process's streams on this host, open.
struct Ends {
    stdin: Option<Source>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

impl Ends {
    fn open(stdio: &Stdio) -> Result<Ends, VmError> {
        Ok(Ends {
            stdin: Source::open(&stdio.stdin)?,
            stdout: Sink::open("stdout", &stdio.stdout)?,
            stderr: Sink::open("stderr", &stdio.stderr)?,
        })
    }

    /// Of a process that runs: a stream that cannot be opened is none, so that the others go on and its writer
    /// does not block for ever.
    fn open_each(stdio: &Stdio) -> Ends {
        fn or_none<T>(opened: Result<Option<T>, IoError>) -> Option<T> {
            opened.unwrap_or_else(|error| {
                tracing::error!(%error, "a stream of a running process leads nowhere");
                None
            })
        }
        Ends {
            stdin: or_none(Source::open(&stdio.stdin)),
            stdout: or_none(Sink::open("stdout", &stdio.stdout)),
            stderr: or_none(Sink::open("stderr", &stdio.stderr)),
        }
    }
}

/// Where each stream begins, byte by byte.
struct Begin {
    stdout: Resume,
    stderr: Resume,
    stdin: Sender,
}

impl Begin {
    /// A new process's.
    fn new() -> Begin {
        Begin { stdout: Resume::at(0), stderr: Resume::at(0), stdin: Sender::default() }
    }

    /// A process's that ran elsewhere: where it stood, or on the guest's word.
    fn at(positions: StreamPositions) -> Begin {
        let output = |taken: Option<u64>| taken.map_or_else(Resume::unknown, Resume::at);
        let stdin = positions.stdin.map(|stdin| {
            Sender::at(Position {
                acknowledged: stdin.acknowledged,
                pending: stdin.pending,
                source_ended: stdin.closed,
            })
        });
        Begin {
            stdout: output(positions.stdout),
            stderr: output(positions.stderr),
            stdin: stdin.unwrap_or_default(),
        }
    }
}

impl Vm {
    /// Starts a container's init (`process` None) or another process in it, streams connected.
    pub(crate) async fn start_process(
        &self,
        container: &str,
        process: Option<Value>,
        stdio: &Stdio,
    ) -> Result<Started, VmError> {
        let ends = Ends::open(stdio)?;
        let port = |wanted: bool| wanted.then(|| self.next_port.fetch_add(1, Ordering::Relaxed));
        // In the order that the protocol gives: stdin, stdout, stderr.
        let ports = Ports {
            stdin: port(ends.stdin.is_some()),
            stdout: port(ends.stdout.is_some()),
            stderr: port(ends.stderr.is_some()),
        };
        let streams = self.relay(ends, ports, Begin::new())?;
        let parameters = ProcessParameters {
            oci_process: process,
            create_std_in_pipe: ports.stdin.is_some(),
            create_std_out_pipe: ports.stdout.is_some(),
            create_std_err_pipe: ports.stderr.is_some(),
            emulate_console: stdio.terminal,
            ..ProcessParameters::default()
        };
        let settings = VsockStdioRelaySettings {
            std_in: ports.stdin,
            std_out: ports.stdout,
            std_err: ports.stderr,
            resumable: self.resumable(),
        };
        let pid = self
            .bridge
            .execute(container, &parameters, Some(settings))
            .await
            .map_err(asked("starting the process"))?;
        Ok(Started { pid: pid.0, ports, streams })
    }

    /// Ports for streams of a process that is not started yet: they say on another host which ones it wants.
    pub(crate) fn set_aside(&self, stdio: &Stdio) -> Ports {
        let port = |uri: &str| (!uri.is_empty()).then(|| self.next_port.fetch_add(1, Ordering::Relaxed));
        Ports { stdin: port(&stdio.stdin), stdout: port(&stdio.stdout), stderr: port(&stdio.stderr) }
    }

    /// Connects a process that runs already, on the ports that its guest knows, where its streams stood. What is
    /// not known goes on after what was acknowledged to the guest. `init`: of a container.
    ///
    /// A guest that does not resume streams dials again for the output of an init, and for nothing else.
    pub(crate) fn reconnect(
        &self,
        init: bool,
        stdio: &Stdio,
        ports: Ports,
        positions: StreamPositions,
    ) -> Result<Streams, VmError> {
        let ends = Ends::open_each(stdio);
        if self.resumable() {
            return self.relay(ends, ports, Begin::at(positions));
        }
        // Closed, so that its writers are told.
        let ends = Ends { stdin: None, ..ends };
        if init {
            return self.relay(ends, Ports { stdin: None, ..ports }, Begin::new());
        }
        let mut streams = Streams::default();
        for sink in [ends.stdout, ends.stderr].iter().flatten() {
            // They end with the process, for whoever reads them.
            streams.keep_fifo(sink.fifo());
        }
        Ok(streams)
    }

    /// Whether the guest's streams can be resumed at any byte.
    pub(crate) fn resumable(&self) -> bool {
        self.bridge.capabilities().map_or(!self.plain_streams, |capabilities| capabilities.speaks_dunlin())
    }

    /// Resolves when the answer to a call that was begun before may be lost: a guest that does not resume streams drops
    /// the answers that it has for a connection that is gone.
    pub(crate) async fn answers_dropped(&self) {
        let mut connected = self.bridge.connected();
        for wanted in [true, false, true] {
            if connected.wait_for(|connected| *connected == wanted).await.is_err() {
                return std::future::pending().await;
            }
        }
        if self.resumable() {
            std::future::pending().await
        }
    }

    fn relay(&self, ends: Ends, ports: Ports, begin: Begin) -> Result<Streams, VmError> {
        let mut streams = Streams::default();
        let resumable = self.resumable();
        for (port, sink, output, taken) in [
            (ports.stdout, ends.stdout, Output::Stdout, begin.stdout),
            (ports.stderr, ends.stderr, Output::Stderr, begin.stderr),
        ] {
            let Some(port) = port else { continue };
            let listener = Accept(self.link.listen(port)?);
            streams.keep_fifo(sink.as_ref().and_then(Sink::fifo));
            if resumable {
                streams.set_output(output, taken.clone());
            }
            streams.add_task(tokio::spawn(async move {
                // A stream that nobody here wants any more is still taken, or its writer would block.
                match (sink, resumable) {
                    (Some(sink), true) => receive(port, listener, sink, taken).await,
                    (None, true) => receive(port, listener, tokio::io::sink(), taken).await,
                    (Some(sink), false) => receive_plain(port, listener, sink).await,
                    (None, false) => receive_plain(port, listener, tokio::io::sink()).await,
                }
            }));
        }
        if let Some(port) = ports.stdin {
            let mut listener = Accept(self.link.listen(port)?);
            match ends.stdin {
                Some(source) if resumable => {
                    streams.keep_stdin(source.keep_open);
                    streams.set_input(begin.stdin.clone(), source.rest);
                    streams.add_task(tokio::spawn(async move {
                        stdio::send(&begin.stdin, source.fifo, listener, std::future::pending()).await;
                    }));
                }
                Some(source) => {
                    streams.keep_stdin(source.keep_open);
                    streams.add_task(tokio::spawn(async move {
                        let Some(stream) = listener.connect().await else { return };
                        if let Err(error) = plain::send(source.fifo, stream).await {
                            tracing::debug!(port, %error, "an input stream ends");
                        }
                    }));
                }
                // The process had an input and this host's containerd gives it none: it waits, as
                // on a terminal that nobody types at.
                None => streams.add_task(tokio::spawn(async move {
                    let _listener = listener;
                    std::future::pending::<()>().await;
                })),
            }
        }
        Ok(streams)
    }
}

async fn receive<W>(port: u32, listener: Accept, sink: W, taken: Resume)
where
    W: tokio::io::AsyncWrite + Unpin + Send,
{
    match stdio::receive(listener, sink, &taken).await {
        Ok(ended) => ended.linger().await,
        Err(error) => tracing::debug!(port, %error, "an output stream ends"),
    }
}

/// A guest that cannot resume dials again with what it sent last: it may come twice.
async fn receive_plain<W>(port: u32, listener: Accept, sink: W)
where
    W: tokio::io::AsyncWrite + Unpin + Send,
{
    match plain::receive_replayed(listener, sink, &Resume::at(0)).await {
        Ok(ended) => ended.linger().await,
        Err(error) => tracing::debug!(port, %error, "an output stream ends"),
    }
}
