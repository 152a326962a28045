//! What a container costs: time from `ctr run` to its first line, and the peak memory of Dunlin's processes.
//!
//! `cargo bench -p dunlin-benches --bench footprint -- --rounds 5`
//!
//! Ends with an error when a released shim's peak is beyond its limit, at any time of a container's life.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use dunlin_benches::bare::{DOWNTIME_LIMIT, Ground, Machine, Network, move_machine};
use dunlin_benches::counter::Lines;
use dunlin_benches::figures::Table;
use dunlin_benches::lab::{Host, Lab};
use dunlin_benches::programs::{self, Programs};
use dunlin_benches::{BenchError, run};

/// A shim with one container, KiB.
const SHIM_LIMIT: u64 = 10 * 1024;
const LINES: usize = 200;
const SHIM: &str = "shim";
const LINES_DEADLINE: Duration = Duration::from_secs(60);

/// Start-up time and peak memory.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many containers are started.
    #[arg(long, env = "DUNLIN_BENCH_ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Where the lab and the machine are made; removed at the end.
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
            eprintln!("footprint: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(arguments: &Arguments) -> Result<(), BenchError> {
    let programs = Programs::find()?;
    println!("{}\n", programs.describe());
    let (shape, peak) = {
        let lab = Lab::up(&programs, &arguments.dir.join("lab")).await?;
        start_up(&lab, arguments.rounds).await?;
        let peak = hosts(&lab).await?;
        (lab.shape()?, peak)
    };
    let ground = Ground::new(&arguments.dir.join("bare"), &programs, shape).await?;
    guest(&ground).await?;
    println!("\nmachine's load over the last minute: {}", programs::load());
    let (found, limit) = (format!("{} MiB", mib(peak)), format!("{} MiB", mib(SHIM_LIMIT)));
    println!("shim's peak with one container: {found}, limit of a release build {limit}");
    if programs.as_shipped() && peak > SHIM_LIMIT {
        return Err(BenchError::Exceeded { what: "the shim's resident memory", found, limit });
    }
    Ok(())
}

/// Containers one after the other: the first finds nothing built, the others find the layer images.
async fn start_up(lab: &Lab, rounds: u32) -> Result<(), BenchError> {
    let mut table = Table::new(&["first line"]);
    for round in 1..=rounds {
        let id = format!("first-{round}");
        let lines = Lines::default();
        let following = lab.follow(&id, &lines);
        let first = lab.run(Host::A, &id, &lines).await?;
        table.row(format!("round {round}"), &[first.as_secs_f64() * 1000.0]);
        for follower in following {
            follower.abort();
        }
        lab.remove(Host::A, &id).await?;
    }
    println!(
        "`ctr run` to the first line of output, ms (round 1 builds the layer images)\n{}\n",
        table.print(0)
    );
    Ok(())
}

/// Gives the shim's highest peak, KiB.
async fn hosts(lab: &Lab) -> Result<u64, BenchError> {
    let id = "counter";
    let lines = Lines::default();
    drop(lab.follow(id, &lines));
    lab.run(Host::A, id, &lines).await?;
    lines.await_more(LINES, LINES_DEADLINE).await?;
    println!("Peak resident memory (VmHWM), MiB");
    println!("{:<34}  {:>8}  {:>8}", "", "host a", "host b");
    let mut peak = processes(lab, id, "a container runs on a")?;
    lab.migrate(Host::A, id, DOWNTIME_LIMIT).await?;
    lines.await_more(LINES, LINES_DEADLINE).await?;
    peak = peak.max(processes(lab, id, "after its move to b")?);
    lab.migrate(Host::B, id, DOWNTIME_LIMIT).await?;
    lines.await_more(LINES, LINES_DEADLINE).await?;
    Ok(peak.max(processes(lab, id, "after its move back to a")?))
}

/// Gives the shim's peak, KiB.
fn processes(lab: &Lab, id: &str, when: &str) -> Result<u64, BenchError> {
    println!("{when}");
    let mut shim = 0;
    let kinds: [(&str, Vec<&str>); 3] = [
        (SHIM, vec!["containerd-shim-dunlin-v2", "-id", id, "serve"]),
        ("node", vec!["dunlin", "node"]),
        ("QEMU (with the guest's memory)", vec!["qemu-system-x86_64"]),
    ];
    for (name, words) in kinds {
        let mut cells = String::new();
        for host in Host::ALL {
            // None: there is no such process there. More than one: the largest.
            let peak = lab.peaks(host, &words)?.into_iter().map(|peak| peak.kib).max();
            if name == SHIM {
                shim = shim.max(peak.unwrap_or(0));
            }
            let cell = peak.map_or_else(|| "-".to_owned(), mib);
            cells.push_str(&format!("  {cell:>8}"));
        }
        println!("  {name:<32}{cells}");
    }
    Ok(shim)
}

/// The guest's processes are seen only from within: the same image and container in a machine of our own.
async fn guest(ground: &Ground) -> Result<(), BenchError> {
    let lines = Lines::default();
    let (mut source, boot) = Machine::boot(ground, "0", &lines).await?;
    lines.await_more(LINES, LINES_DEADLINE).await?;
    println!("\nIn the guest (bare QEMU, counter running {:.1} s after its start), MiB", boot.as_secs_f64());
    println!("while the container runs");
    in_guest(&source.guest_peaks().await?);
    let mut destination = Machine::incoming(ground, "1", &source).await?;
    move_machine(&source, &mut destination, Some(&lines), Network::Loopback, DOWNTIME_LIMIT).await?;
    source.end().await?;
    lines.await_more(LINES, LINES_DEADLINE).await?;
    println!("after a move");
    in_guest(&destination.guest_peaks().await?);
    destination.end().await
}

fn in_guest(processes: &[(String, u64)]) {
    for (name, kib) in processes {
        println!("  {name:<32}  {:>8}", mib(*kib));
    }
}

fn mib(kib: u64) -> String {
    format!("{}.{}", kib / 1024, kib % 1024 * 10 / 1024)
}
