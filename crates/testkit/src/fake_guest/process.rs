//! A fake process: a task that prints, copies or waits, and the real stdio protocol for its streams.

use std::time::SystemTime;

use dunlin_bridge::message::{ProcessExit, VsockStdioRelaySettings};
use dunlin_bridge::stdio::{self, Connect, Dial, Resume, Sender, plain};
use dunlin_link::LinkStream;
use dunlin_link::guest::GuestLink;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Finish, Script};

/// A pipe's capacity, bytes.
const PIPE: usize = 4096;

/// Dropping it ends its tasks; waits then fail.
#[derive(Debug)]
pub(super) struct Process {
    exit: watch::Receiver<Option<ProcessExit>>,
    signal: watch::Sender<Option<i32>>,
    give_up: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Process {
    pub(super) fn spawn(
        script: Script,
        ports: VsockStdioRelaySettings,
        init: bool,
        link: &watch::Receiver<GuestLink>,
        frozen: watch::Receiver<bool>,
    ) -> Process {
        let (exit_sender, exit) = watch::channel(None);
        let (signal, signalled) = watch::channel(None);
        let (give_up, given_up) = watch::channel(false);
        let (process_out, out) = tokio::io::duplex(PIPE);
        let (process_in, stdin) = tokio::io::duplex(PIPE);
        let (process_err, err) = tokio::io::duplex(PIPE);
        let mut tasks = JoinSet::new();
        let mut outputs = JoinSet::new();
        for (port, pipe) in [(ports.std_out, out), (ports.std_err, err)] {
            let given_up = given_up.clone();
            match port {
                Some(port) => {
                    outputs.spawn(output(pipe, dialer(link, port), ports.resumable, init, given_up))
                }
                None => outputs.spawn(discard(pipe)),
            };
        }
        if let Some(port) = ports.std_in {
            tasks.spawn(input(dialer(link, port), stdin, ports.resumable));
        } else {
            drop(stdin);
        }
        tasks.spawn(async move {
            let code = tokio::select! {
                code = run(script, process_out, process_in, frozen) => code,
                code = killed(signalled) => code,
            };
            let at = Some(SystemTime::now());
            drop(process_err);
            // As in a real guest: the exit is known when the output has been taken.
            while outputs.join_next().await.is_some() {}
            exit_sender.send_replace(Some(ProcessExit { code, at }));
        });
        Process { exit, signal, give_up, _tasks: tasks }
    }

    pub(super) fn exit(&self) -> watch::Receiver<Option<ProcessExit>> {
        self.exit.clone()
    }

    /// False: it has ended.
    pub(super) fn signal(&mut self, signal: i32) -> bool {
        if self.exit.borrow().is_some() {
            return false;
        }
        self.signal.send_replace(Some(signal));
        true
    }

    pub(super) fn give_up_output(&self) {
        self.give_up.send_replace(true);
    }
}

async fn killed(mut signalled: watch::Receiver<Option<i32>>) -> u32 {
    match signalled.wait_for(Option::is_some).await.ok().and_then(|signal| *signal) {
        Some(signal) => 128 + signal.unsigned_abs(),
        None => std::future::pending().await,
    }
}

async fn run(
    script: Script,
    mut out: DuplexStream,
    mut input: DuplexStream,
    mut frozen: watch::Receiver<bool>,
) -> u32 {
    for line in 0..script.lines {
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            break;
        }
        if out.write_all(format!("{line}\n").as_bytes()).await.is_err() {
            break;
        }
        if !script.every.is_zero() {
            tokio::time::sleep(script.every).await;
        }
    }
    match script.then {
        Finish::Exit(code) => code,
        Finish::Cat => {
            let _ = tokio::io::copy(&mut input, &mut out).await;
            0
        }
        Finish::Wait => std::future::pending().await,
    }
}

fn dialer(link: &watch::Receiver<GuestLink>, port: u32) -> impl Connect<Stream = LinkStream> + use<> {
    let link = link.clone();
    Dial(move || {
        let link = link.borrow().clone();
        async move { link.dial(port).await }
    })
}

async fn output<C: Connect>(
    pipe: DuplexStream,
    mut connect: C,
    resumable: bool,
    init: bool,
    mut given_up: watch::Receiver<bool>,
) {
    let stop = async move {
        if given_up.wait_for(|given_up| *given_up).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    if resumable {
        let drained = stdio::send(&Sender::default(), pipe, connect, stop).await;
        tracing::debug!(?drained, "an output has ended");
    } else {
        let sent = async {
            if init {
                return plain::send_replaying(pipe, connect).await.map(drop);
            }
            match connect.connect().await {
                Some(stream) => plain::send(pipe, stream).await.map(drop),
                None => Ok(()),
            }
        };
        tokio::select! {
            result = sent => tracing::debug!(?result, "an output has ended"),
            () = stop => {}
        }
    }
}

async fn input<C: Connect>(mut connect: C, pipe: DuplexStream, resumable: bool) {
    if resumable {
        let received = stdio::receive(connect, pipe, &Resume::at(0)).await;
        tracing::debug!(total = received.ok().map(|ended| ended.total), "an input has ended");
    } else if let Some(stream) = connect.connect().await {
        let received = plain::receive(stream, pipe).await;
        tracing::debug!(?received, "an input has ended");
    }
}

async fn discard(mut pipe: DuplexStream) {
    let mut waste = [0; 512];
    while matches!(pipe.read(&mut waste).await, Ok(1..)) {}
}
