//! A move by hand: the shortest sequence of QMP commands that also takes the scratch disk along.
//!
//! ```text
//!  destination                          source
//!  capabilities, parameters             capabilities, parameters
//!  nbd-server-start, block-export-add   blockdev-add, blockdev-mirror ... BLOCK_JOB_READY
//!  cont (starts by itself at the end)
//!  migrate-incoming                     migrate ... pre-switchover (STOP)
//!                                       block-job-cancel ... BLOCK_JOB_COMPLETED
//!  nbd-server-stop                      blockdev-del, migrate-continue
//!  RESUME
//! ```

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dunlin_qemu::qmp::{QmpClient, RawEvent};
use dunlin_qemu::{MigrationOptions, Role};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpNoDelay;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use super::machine::{Machine, scratch_slot};
use crate::BenchError;
use crate::counter::Lines;
use crate::lab::Host;

const STEP: Duration = Duration::from_secs(60);
const JOB: &str = "mirror";
const TARGET: &str = "mirror-target";

/// What the bare streams go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// The machine's own loopback.
    Loopback,
    /// The lab's, from host a to host b: two pairs of virtual Ethernet and a bridge, as Dunlin's streams.
    Lab,
}

impl Network {
    fn address(self, host: Host) -> Ipv4Addr {
        match (self, host) {
            (Network::Loopback, _) => Ipv4Addr::LOCALHOST,
            (Network::Lab, Host::A) => Ipv4Addr::new(10, 77, 0, 1),
            (Network::Lab, Host::B) => Ipv4Addr::new(10, 77, 0, 2),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Network::Loopback => "the loopback",
            Network::Lab => "the lab's network",
        })
    }
}

/// One bare move's figures.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// From the first command to the destination's RESUME.
    pub total: Duration,
    /// From the source's STOP to the destination's RESUME, both by QEMU's timestamps.
    pub blackout: Duration,
    /// Of the total, until the mirror was in step.
    pub disk: Duration,
    /// From `migrate` to the source's STOP.
    pub memory: Duration,
    /// From STOP to the end of the mirror and its nodes: within the blackout.
    pub settle: Duration,
    /// Memory that was still to be sent at STOP, bytes.
    pub left: Option<u64>,
    /// When it began, for the counter's gap.
    pub begun: Instant,
    /// STOP and RESUME.
    pub pause: (SystemTime, SystemTime),
}

/// QEMU's and Dunlin's own.
pub const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// Moves `source` into `destination`, which runs afterwards and whose counter, if it has one, goes on into `lines`.
///
/// # Errors
/// QMP's, or a status that is no success.
pub async fn move_machine(
    source: &Machine,
    destination: &mut Machine,
    lines: Option<&Lines>,
    network: Network,
    downtime_limit: Duration,
) -> Result<Moved, BenchError> {
    let slot = scratch_slot()?;
    let disk = format!("disk-{slot}");
    let mut left = source.qemu.qmp().events();
    let mut arrived = destination.qemu.qmp().events();
    let (from, to) = (source.qemu.qmp(), destination.qemu.qmp());

    let begun = Instant::now();
    let begun_at = now_micros();
    let options = MigrationOptions { downtime_limit, ..MigrationOptions::default() };
    tokio::try_join!(
        source.qemu.prepare_migration(Role::Source, &options),
        destination.qemu.prepare_migration(Role::Destination, &options),
    )?;

    let (listener, dialled) = listen_and_dial(network)?;
    to.pass_fd("nbd", listener).await?;
    let address = json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } });
    to.execute("nbd-server-start", address).await?;
    let export = json!({ "type": "nbd", "id": "export", "node-name": disk, "name": disk, "writable": true });
    to.execute("block-export-add", export).await?;
    from.pass_fd("nbd", dialled).await?;
    let target = json!({
        "node-name": TARGET, "driver": "nbd", "server": { "type": "fd", "str": "nbd" }, "export": disk,
        "discard": "unmap", "detect-zeroes": "unmap",
    });
    from.execute("blockdev-add", target).await?;
    let job = json!({
        "job-id": JOB, "device": disk, "target": TARGET, "sync": "full", "copy-mode": "write-blocking",
    });
    from.execute("blockdev-mirror", job).await?;
    until(&mut left, "BLOCK_JOB_READY", None).await?;
    let in_step = begun.elapsed();

    // Said while it waits for a stream, this is what leaving out `-S` is: it runs once it has everything.
    to.execute("cont", json!({})).await?;
    let (listener, dialled) = listen_and_dial(network)?;
    let (incoming, _) = accept(listener)?;
    stream(to, "migrate-incoming", incoming).await?;
    let migrating = now_micros();
    stream(from, "migrate", dialled).await?;
    let stop = until(&mut left, "STOP", None).await?;
    let (left_to_send, waits) = tokio::join!(
        crate::observe::left_to_send(from),
        until(&mut left, "MIGRATION", Some("pre-switchover")),
    );
    migration(source, destination, waits)?;
    from.execute("block-job-cancel", json!({ "device": JOB })).await?;
    until(&mut left, "BLOCK_JOB_COMPLETED", None).await?;
    tokio::try_join!(
        from.execute("blockdev-del", json!({ "node-name": TARGET })),
        to.execute("nbd-server-stop", json!({})),
    )?;
    let settled = now_micros();
    from.execute("migrate-continue", json!({ "state": "pre-switchover" })).await?;
    let resume = migration(source, destination, until(&mut arrived, "RESUME", None).await)?;
    destination.adopt(lines)?;

    let (stop, resume) = (micros(&stop)?, micros(&resume)?);
    let span = |from: u64, to: u64| Duration::from_micros(to.saturating_sub(from));
    let at = |micros| UNIX_EPOCH + Duration::from_micros(micros);
    Ok(Moved {
        pause: (at(stop), at(resume)),
        total: span(begun_at, resume),
        blackout: span(stop, resume),
        disk: in_step,
        memory: span(migrating, stop),
        settle: span(stop, settled),
        left: left_to_send,
        begun,
    })
}

/// A listening socket and a connection to it, neither of which waits to fill its packets: NBD's handshake
/// stands still for 80 ms otherwise. What is accepted inherits it.
fn listen_and_dial(network: Network) -> Result<(OwnedFd, OwnedFd), BenchError> {
    let made = || {
        let listener = within(network, Host::B, move || {
            let address = network.address(Host::B);
            let listener = TcpListener::bind((address, 0))?;
            setsockopt(&listener, TcpNoDelay, &true)?;
            Ok(listener)
        })?;
        let address = listener.local_addr()?;
        let stream = within(network, Host::A, move || TcpStream::connect(address))?;
        stream.set_nodelay(true)?;
        Ok((listener.into(), stream.into()))
    };
    made().map_err(BenchError::io(format!("connect over {network}")))
}

/// Makes a socket in a host's network. Sockets stay in the network that they were made in.
fn within<T: Send + 'static>(
    network: Network,
    host: Host,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    if network == Network::Loopback {
        return make();
    }
    // A thread of its own: only that one enters.
    let made = std::thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/dunlin-{}", host.name()))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        make()
    });
    made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The other end of the stream that was dialled.
fn accept(listener: OwnedFd) -> Result<(OwnedFd, std::net::SocketAddr), BenchError> {
    let accepted = TcpListener::from(listener).accept();
    accepted.map(|(stream, peer)| (stream.into(), peer)).map_err(BenchError::io("accept over the loopback"))
}

async fn stream(qmp: &QmpClient, command: &str, socket: OwnedFd) -> Result<(), BenchError> {
    qmp.pass_fd(command, socket).await?;
    qmp.execute(command, json!({ "uri": format!("fd:{command}") })).await?;
    Ok(())
}

/// Waits for an event by name and, when given, by its status. A migration that fails meanwhile is an error.
async fn until(
    events: &mut Receiver<RawEvent>,
    name: &str,
    status: Option<&str>,
) -> Result<RawEvent, BenchError> {
    let wait = async {
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return Err(ended("closed")),
            };
            let seen = event.data.get("status").and_then(Value::as_str).unwrap_or_default();
            if event.name == name && status.is_none_or(|wanted| wanted == seen) {
                return Ok(event);
            }
            if event.name == "MIGRATION" && matches!(seen, "failed" | "cancelled") {
                return Err(ended(seen));
            }
            if event.name == "BLOCK_JOB_ERROR" || event.data.get("error").is_some() {
                return Err(ended(&event.data.to_string()));
            }
        }
    };
    let what = format!("QEMU's event {name}");
    timeout(STEP, wait).await.map_err(|_| BenchError::Deadline { what, within: STEP })?
}

fn ended(status: &str) -> BenchError {
    BenchError::MigrationEnded { status: status.to_owned(), logs: String::new() }
}

/// Adds what both QEMUs wrote to a failure.
fn migration<T>(
    source: &Machine,
    destination: &Machine,
    result: Result<T, BenchError>,
) -> Result<T, BenchError> {
    result.map_err(|error| match error {
        BenchError::MigrationEnded { status, .. } => {
            let log =
                |machine: &Machine| std::fs::read_to_string(machine.dir.join("qemu.log")).unwrap_or_default();
            BenchError::MigrationEnded { status, logs: log(source) + &log(destination) }
        }
        other => other,
    })
}

fn micros(event: &RawEvent) -> Result<u64, BenchError> {
    let nanos = event.time.unix_nanos().ok_or_else(|| BenchError::Unreadable {
        what: format!("the time of QEMU's event {}", event.name),
        reason: "QEMU could not tell it".to_owned(),
    })?;
    Ok(nanos / 1000)
}

/// The clock of QEMU's events.
fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
