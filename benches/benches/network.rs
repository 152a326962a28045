//! How long a client outside both hosts hears nothing when a pod moves, beside the machine's own pause.
//!
//! `cargo bench -p dunlin-benches --bench network -- --rounds 20`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use dunlin_benches::figures::{Table, ratio};
use dunlin_benches::lab::{Host, Lab};
use dunlin_benches::observe::Observer;
use dunlin_benches::programs::{self, Programs};
use dunlin_benches::{BenchError, run};
use dunlin_tests::{Download, Echo, network::fetch};

const CONTAINER: &str = "served";
const ADDRESS: &str = "10.88.0.5";
const BLACKOUT: Duration = Duration::from_millis(30);
const SETTLE: Duration = Duration::from_secs(2);
/// What the gap may be longer than the pause, milliseconds.
const BAR: f64 = 50.0;
const SERVER: &str = "dd if=/dev/urandom of=/dev/shm/pattern bs=65536 count=128 2>/dev/null
busybox nc -ll -p 7001 -e sh -c 'while cat /dev/shm/pattern; do :; done' &
busybox nc -ll -p 7002 -e cat /dev/shm/pattern &
exec busybox nc -ll -p 7000 -e cat";

/// The gap of a 10 ms request and response while a download runs beside it.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many moves.
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
    let observer = Observer::start(&lab);
    for host in Host::ALL {
        lab.lab(&["pod-net", host.name(), CONTAINER, "--silent", "--address", "10.88.0.5/16"]).await?;
    }
    let namespace = format!("network:/run/netns/{CONTAINER}");
    let runtime =
        ["ctr", "run", "-d", "--null-io", "--runtime", "io.containerd.dunlin.v2", "--with-ns", &namespace];
    let container = ["docker.io/dunlin/demo:latest", CONTAINER, "sh", "-c", SERVER];
    lab.on(Host::A, &[&runtime[..], &container].concat()).await?;
    let at = |port: u16| format!("{ADDRESS}:{port}");
    let echo = Echo::start(&at(7000));
    let download = Download::start(&at(7001), fetch(&at(7002)));
    let mut table = Table::new(&["pause", "gap", "gap - pause", "quiet gap", "MiB/s"]);
    let mut host = Host::A;
    for round in 1..=arguments.rounds {
        echo.longest_gap();
        tokio::time::sleep(SETTLE).await;
        let quiet = echo.longest_gap();
        let (bytes, since) = (download.bytes(), Instant::now());
        lab.migrate(host, CONTAINER, BLACKOUT).await?;
        tokio::time::sleep(SETTLE / 4).await;
        let rate = mebibytes(download.bytes() - bytes) / since.elapsed().as_secs_f64();
        let (pause, gap) = (observer.blackout(host).map_or(f64::NAN, ms), ms(echo.longest_gap()));
        table.row(format!("round {round}"), &[pause, gap, gap - pause, ms(quiet), rate]);
        echo.assert_whole();
        download.assert_whole();
        host = host.other();
    }
    println!("\nPause by QEMU's timestamps, gap between two responses at the client, ms\n{}", table.print(1));
    let gap = ratio(&table.column(1), &table.column(0));
    println!(
        "gap / pause: {:.2} ({:.2} to {:.2}); no connection broke and no byte was wrong",
        gap.paired, gap.range.0, gap.range.1
    );
    let excess = table.column(2);
    let within = excess.iter().filter(|excess| **excess <= BAR).count();
    println!("gap at most pause + {BAR} ms in {within} of {} moves", excess.len());
    println!("machine's load over the last minute: {}", programs::load());
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
