//! How long a client outside both hosts hears nothing when a pod moves, beside the machine's own pause; and the same of
//! a bare QEMU on the same bridges that serves the same and is moved by hand, in turns.
//!
//! `cargo bench -p dunlin-benches --bench network -- --rounds 20`
//!
//! What follows the pause is a guest that finds its caches cold. An emulated one translates anew all that it runs:
//! then the bar of 50 ms is out of reach for bare QEMU too, and what is to be held is the ratio.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use dunlin_benches::bare::{self, Ground, Machine, Network, move_machine};
use dunlin_benches::figures::{Table, ratio};
use dunlin_benches::lab::{Host, Lab};
use dunlin_benches::observe::Observer;
use dunlin_benches::programs::{self, Programs};
use dunlin_benches::{BenchError, run};
use dunlin_tests::network::{Gap, fetch};
use dunlin_tests::{Bulk, Echo};

const CONTAINER: &str = "served";
const ADDRESS: &str = "10.88.0.5";
const BLACKOUT: Duration = Duration::from_millis(30);
const SETTLE: Duration = Duration::from_secs(2);
/// What the gap may be longer than the pause, milliseconds.
const BAR: f64 = 50.0;
const HEADINGS: [&str; 7] = ["pause", "gap", "gap - pause", "before it", "after it", "quiet gap", "MiB/s"];
/// Columns of [`HEADINGS`].
const PAUSE: usize = 0;
const GAP: usize = 1;
const EXCESS: usize = 2;
const SERVER: &str = "busybox dd if=/dev/urandom of=/dev/shm/pattern bs=65536 count=128 2>/dev/null
busybox nc -ll -p 7001 -e sh -c 'while cat /dev/shm/pattern; do :; done' &
busybox nc -ll -p 7002 -e cat /dev/shm/pattern &
exec busybox nc -ll -p 7000 -e cat";
/// The same without a container's file system around it: the layer's programs where the guest has it mounted.
const BARE_SERVER: &str = "export PATH=/run/mounts/scsi/0_0_0/bin
dd if=/dev/urandom of=/run/pattern bs=65536 count=128 2>/dev/null
busybox nc -ll -p 7001 -e sh -c 'while cat /run/pattern; do :; done' &
busybox nc -ll -p 7002 -e cat /run/pattern &
busybox nc -ll -p 7000 -e cat";

/// The gap of a 10 ms request and response while a download runs beside it.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many moves of each.
    #[arg(long, env = "DUNLIN_BENCH_ROUNDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Where the lab is made; removed at the end.
    #[arg(long, env = "DUNLIN_BENCH_DIR", default_value = "/var/tmp/dunlin-bench")]
    dir: PathBuf,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(measure(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("network: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(arguments: &Arguments) -> Result<(), BenchError> {
    let programs = Programs::find()?;
    println!("{}", programs.describe());
    let lab = Lab::up(&programs, &arguments.dir.join("lab")).await?;
    let ground = Ground::new(&arguments.dir.join("bare"), &programs, lab.shape()?).await?;
    let mut bare = Bare {
        machine: Machine::serve(&ground, "0", Host::A, BARE_SERVER).await?,
        ground: &ground,
        host: Host::A,
        moves: 0,
    };
    let mut pod = Pod::start(&lab).await?;
    let (mut pods, mut machines) = (Table::new(&HEADINGS), Table::new(&HEADINGS));
    for round in 1..=arguments.rounds {
        let client = Client::start(bare::ADDRESS).await;
        let pause = bare.move_once().await?;
        machines.row(format!("round {round}"), &client.end(Some(pause)).await);
        let client = Client::start(ADDRESS).await;
        let pause = pod.move_once().await?;
        pods.row(format!("round {round}"), &client.end(pause).await);
    }
    report(&machines, &pods);
    Ok(())
}

type Pause = (SystemTime, SystemTime);

/// A pod with a server, moved by `dunlin migrate`.
struct Pod<'a> {
    lab: &'a Lab,
    observer: Observer,
    host: Host,
}

impl<'a> Pod<'a> {
    async fn start(lab: &'a Lab) -> Result<Pod<'a>, BenchError> {
        let observer = Observer::start(lab);
        for host in Host::ALL {
            lab.lab(&["pod-net", host.name(), CONTAINER, "--silent", "--address", "10.88.0.5/16"]).await?;
        }
        let namespace = format!("network:/run/netns/{CONTAINER}");
        let runtime = [
            "ctr",
            "run",
            "-d",
            "--null-io",
            "--runtime",
            "io.containerd.dunlin.v2",
            "--with-ns",
            &namespace,
        ];
        let container = ["docker.io/dunlin/demo:latest", CONTAINER, "sh", "-c", SERVER];
        lab.on(Host::A, &[&runtime[..], &container].concat()).await?;
        Ok(Pod { lab, observer, host: Host::A })
    }

    async fn move_once(&mut self) -> Result<Option<Pause>, BenchError> {
        self.lab.migrate(self.host, CONTAINER, BLACKOUT).await?;
        let pause = self.observer.pause(self.host);
        self.host = self.host.other();
        Ok(pause)
    }
}

/// A bare QEMU with the same server.
struct Bare<'a> {
    ground: &'a Ground,
    machine: Machine,
    host: Host,
    moves: u32,
}

impl Bare<'_> {
    async fn move_once(&mut self) -> Result<Pause, BenchError> {
        self.moves += 1;
        let mut destination = Machine::incoming(self.ground, &self.moves.to_string(), &self.machine).await?;
        destination.plug(self.host.other()).await?;
        let moved = move_machine(&self.machine, &mut destination, None, Network::Lab, BLACKOUT).await?;
        std::mem::replace(&mut self.machine, destination).end().await?;
        self.host = self.host.other();
        Ok(moved.pause)
    }
}

/// The client outside both hosts, while one move lasts.
struct Client {
    echo: Echo,
    download: Bulk,
    /// What the machine does to the connection by itself.
    quiet: Duration,
    begun: (u64, Instant),
}

impl Client {
    async fn start(address: &str) -> Client {
        let at = |port: u16| format!("{address}:{port}");
        let echo = Echo::start(&at(7000));
        let download = Bulk::download(&at(7001), fetch(&at(7002)));
        // What begins is no gap.
        tokio::time::sleep(SETTLE / 4).await;
        echo.longest_gap();
        tokio::time::sleep(SETTLE).await;
        let quiet = echo.longest_gap();
        let begun = (download.bytes(), Instant::now());
        Client { echo, download, quiet, begun }
    }

    /// A row of figures.
    async fn end(self, pause: Option<Pause>) -> [f64; 7] {
        tokio::time::sleep(SETTLE / 4).await;
        let rate = mebibytes(self.download.bytes() - self.begun.0) / self.begun.1.elapsed().as_secs_f64();
        let gaps = self.echo.gaps();
        self.echo.assert_whole();
        self.download.assert_whole();
        let [pause, gap, before, after] = parts(&gaps, pause);
        [pause, gap, gap - pause, before, after, ms(self.quiet), rate]
    }
}

fn report(bare: &Table, dunlin: &Table) {
    println!("\nPause by QEMU's timestamps, gap between two responses at the client, ms");
    for (name, table) in [("Bare QEMU", bare), ("Dunlin", dunlin)] {
        let within = table.column(EXCESS).iter().filter(|excess| **excess <= BAR).count();
        println!(
            "\n{name}: gap at most pause + {BAR} ms in {within} of {} moves\n{}",
            table.column(EXCESS).len(),
            table.print(1)
        );
    }
    println!("\nDunlin / bare QEMU");
    for (name, column) in [("pause", PAUSE), ("gap", GAP), ("gap - pause", EXCESS)] {
        let ratio = ratio(&dunlin.column(column), &bare.column(column));
        println!("  {name:<12} {:.2} ({:.2} to {:.2})", ratio.paired, ratio.range.0, ratio.range.1);
    }
    println!("no connection broke and no byte was wrong");
    println!("machine's load over the last minute: {}", programs::load());
}

/// Milliseconds of the pause and of the gap that it is in, and how much of the gap lies before and after it; NaN for what
/// was not seen.
fn parts(gaps: &[Gap], pause: Option<Pause>) -> [f64; 4] {
    let Some((stop, resume)) = pause else { return [f64::NAN; 4] };
    let pause = resume.duration_since(stop).map_or(f64::NAN, ms);
    let Some(gap) = gaps.iter().find(|gap| gap.holds(resume)) else {
        return [pause, f64::NAN, f64::NAN, f64::NAN];
    };
    let after = gap.end.duration_since(resume).map_or(f64::NAN, ms);
    [pause, ms(gap.length), ms(gap.length) - pause - after, after]
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
