//! A counter's virtual machine moved by bare QEMU and by Dunlin, round by round in one run.
//!
//! `cargo bench -p dunlin-benches --bench migration -- --rounds 5`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use dunlin_benches::bare::{Ground, Machine, Moved, Network, Shape, move_machine};
use dunlin_benches::counter::Lines;
use dunlin_benches::figures::{Table, ratio};
use dunlin_benches::lab::{Host, Lab, Migrated};
use dunlin_benches::observe::Observer;
use dunlin_benches::programs::{self, Programs};
use dunlin_benches::{BenchError, run};

const TARGET: f64 = 1.5;
/// Lines of the counter before a move and after it.
const LINES: usize = 100;
const LINES_DEADLINE: Duration = Duration::from_secs(60);
/// After a move, until the counter's silence has surely ended and the machine is calm again.
const SETTLE: Duration = Duration::from_secs(2);
const CONTAINER: &str = "counter";

/// Moves of a counter: bare QEMU and Dunlin, in turns.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many moves of each kind.
    #[arg(long, env = "DUNLIN_BENCH_ROUNDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Milliseconds of pause that QEMU may plan for, on both sides: it stops the guest when it expects to send
    /// the rest of memory within this. All rounds are made with each; 300 is QEMU's default; Dunlin's begins at 30.
    #[arg(long, value_delimiter = ',', default_value = "300,30", value_parser = clap::value_parser!(u32).range(1..))]
    downtime_limit: Vec<u32>,
    /// What the bare streams go through; Dunlin's always go through the lab's network.
    #[arg(long, value_enum, default_value_t = Through::Loopback)]
    network: Through,
    /// Only one side; no ratios then.
    #[arg(long, value_enum)]
    only: Option<Side>,
    /// Where labs and machines are made; removed at the end.
    #[arg(long, env = "DUNLIN_BENCH_DIR", default_value = "/var/tmp/dunlin-bench")]
    dir: PathBuf,
    /// Said by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Through {
    Loopback,
    Lab,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Side {
    Bare,
    Dunlin,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(measure(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("migration: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(arguments: &Arguments) -> Result<(), BenchError> {
    let programs = Programs::find()?;
    println!("{}", programs.describe());
    let wants = |side| arguments.only.is_none_or(|only| only == side);
    let mut dunlin = match wants(Side::Dunlin) {
        true => Some(Dunlin::start(&programs, arguments).await?),
        false => None,
    };
    let shape = dunlin.as_ref().map_or(Ok(Shape::default()), |dunlin| dunlin.lab.shape())?;
    println!(
        "machine   {} processor(s), {} MiB of memory, {} MiB scratch disk (sparse); counter every 10 ms",
        shape.vcpus, shape.memory_mib, shape.scratch_mib
    );
    // Alone there is no lab to go through.
    let network = match arguments.network {
        Through::Lab if dunlin.is_some() => Network::Lab,
        Through::Lab | Through::Loopback => Network::Loopback,
    };
    println!("network   bare: {network}; Dunlin: {}", Network::Lab);
    let ground = Ground::new(&arguments.dir.join("bare"), &programs, shape).await?;
    let mut bare = match wants(Side::Bare) {
        true => Some(Bare::start(&ground, network).await?),
        false => None,
    };
    for limit in &arguments.downtime_limit {
        println!(
            "\n=== downtime limit {limit} ms on both sides, {} round(s); the other side's counter runs on during each move",
            arguments.rounds
        );
        rounds(&mut bare, &mut dunlin, arguments.rounds, Duration::from_millis((*limit).into())).await?;
    }
    legend();
    if let Some(bare) = bare {
        println!("lines lost: bare {}", bare.lines.missing());
        bare.machine.end().await?;
    }
    if let Some(dunlin) = &dunlin {
        println!("lines lost: Dunlin {}", dunlin.lines.missing());
    }
    Ok(())
}

async fn rounds(
    bare: &mut Option<Bare<'_>>,
    dunlin: &mut Option<Dunlin>,
    count: u32,
    limit: Duration,
) -> Result<(), BenchError> {
    let mut bare_moves = Vec::new();
    let mut dunlin_moves = Vec::new();
    for round in 1..=count {
        if let Some(bare) = bare {
            bare_moves.push(bare.move_once(limit).await?);
        }
        if let Some(dunlin) = dunlin {
            dunlin_moves.push(dunlin.move_once(limit).await?);
        }
        eprintln!("round {round} of {count} done");
    }
    report(&bare_moves, &dunlin_moves);
    println!("machine's load over the last minute: {}", programs::load());
    Ok(())
}

/// One bare move and what it needed beforehand.
struct BareMove {
    moved: Moved,
    spawn: Duration,
    gap: Duration,
}

struct Bare<'a> {
    ground: &'a Ground,
    machine: Machine,
    network: Network,
    moves: u32,
    lines: Lines,
}

impl<'a> Bare<'a> {
    async fn start(ground: &'a Ground, network: Network) -> Result<Bare<'a>, BenchError> {
        let lines = Lines::default();
        let (machine, boot) = Machine::boot(ground, "0", &lines).await?;
        lines.await_more(1, LINES_DEADLINE).await?;
        println!("bare      the counter runs {:.1} s after QEMU's start", boot.as_secs_f64());
        Ok(Bare { ground, machine, network, moves: 0, lines })
    }

    async fn move_once(&mut self, limit: Duration) -> Result<BareMove, BenchError> {
        self.moves += 1;
        self.lines.await_more(LINES, LINES_DEADLINE).await?;
        let begin = std::time::Instant::now();
        let mut destination = Machine::incoming(self.ground, &self.moves.to_string(), &self.machine).await?;
        let spawn = begin.elapsed();
        let moved =
            move_machine(&self.machine, &mut destination, Some(&self.lines), self.network, limit).await?;
        let source = std::mem::replace(&mut self.machine, destination);
        source.end().await?;
        self.lines.await_more(LINES, LINES_DEADLINE).await?;
        let gap = self.lines.longest_gap(moved.begun);
        tokio::time::sleep(SETTLE).await;
        Ok(BareMove { moved, spawn, gap })
    }
}

/// One move by Dunlin.
struct DunlinMove {
    migrated: Migrated,
    /// By QEMU's timestamps.
    blackout: Option<Duration>,
    left: Option<u64>,
    gap: Duration,
}

struct Dunlin {
    // Dropped in this order: whoever looks at the lab goes before it.
    observer: Observer,
    lines: Lines,
    host: Host,
    lab: Lab,
}

impl Dunlin {
    async fn start(programs: &Programs, arguments: &Arguments) -> Result<Dunlin, BenchError> {
        let lab = Lab::up(programs, &arguments.dir.join("lab")).await?;
        let observer = Observer::start(&lab);
        let lines = Lines::default();
        drop(lab.follow(CONTAINER, &lines));
        let first = lab.run(Host::A, CONTAINER, &lines).await?;
        println!("Dunlin    first line {:.1} s after `ctr run`", first.as_secs_f64());
        Ok(Dunlin { observer, lines, host: Host::A, lab })
    }

    async fn move_once(&mut self, limit: Duration) -> Result<DunlinMove, BenchError> {
        self.lines.await_more(LINES, LINES_DEADLINE).await?;
        let migrated = self.lab.migrate(self.host, CONTAINER, limit).await?;
        self.lines.await_more(LINES, LINES_DEADLINE).await?;
        let gap = self.lines.longest_gap(migrated.begun);
        let blackout = self.observer.blackout(self.host);
        let left = self.observer.left(self.host);
        self.host = self.host.other();
        tokio::time::sleep(SETTLE).await;
        Ok(DunlinMove { migrated, blackout, left, gap })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn ms_or_nan(duration: Option<Duration>) -> f64 {
    duration.map_or(f64::NAN, ms)
}

#[allow(clippy::cast_precision_loss, reason = "memory sizes are far below 2^52")]
fn mib_or_nan(bytes: Option<u64>) -> f64 {
    bytes.map_or(f64::NAN, |bytes| bytes as f64 / f64::from(1 << 20))
}

fn report(bare: &[BareMove], dunlin: &[DunlinMove]) {
    let bare_table = (!bare.is_empty()).then(|| bare_table(bare));
    let dunlin_table = (!dunlin.is_empty()).then(|| dunlin_table(dunlin));
    if let Some(table) = &bare_table {
        println!("\nBare QEMU, ms\n{}", table.print(1));
    }
    if let Some(table) = &dunlin_table {
        println!("\nDunlin, ms\n{}", table.print(1));
        println!("\nDunlin's phases, median ms");
        for (name, median) in phases(dunlin) {
            println!("  {name:<14} {median:>8.0}");
        }
    }
    if let (Some(bare_table), Some(dunlin_table)) = (bare_table, dunlin_table) {
        ratios(&bare_table, &dunlin_table);
    }
}

/// What the columns hold.
fn legend() {
    println!("\nBare QEMU's columns");
    println!(
        "  blackout   source's STOP to destination's RESUME, QEMU's timestamps; the destination starts by\n\
         \x20            itself once it has everything (`cont` given while it waits: as without -S)\n\
         \x20 of it disk ending the mirror, its node and the NBD server, within the blackout\n\
         \x20 total      first QMP command to RESUME: setting up, mirror to `ready`, memory, blackout\n\
         \x20 spawn      before that: destination QEMU started, disks attached (not in total)\n\
         \x20 left MiB   memory still to be sent at STOP, empty pages included. QEMU stops the guest as soon as\n\
         \x20            it expects to send that within the downtime limit, and looks every 100 ms: it makes\n\
         \x20            up most of the blackout, on both sides; a small --downtime-limit shows the rest"
    );
    println!("Dunlin's columns");
    println!(
        "  blackout   as above, from the same QEMU events\n\
         \x20 reported   blackout of `dunlin migrate`: source node's clock, pause heard to answer that it runs\n\
         \x20 stream+run phases transfer, commit, run: mirror, memory, blackout (what bare's total holds)\n\
         \x20 total      the report's: also preflight, export, destination's shim, containerd objects, image\n\
         \x20            check, QEMU's start, connections before; stop of the source and clean-up after"
    );
}

fn bare_table(moves: &[BareMove]) -> Table {
    let mut table = Table::new(&[
        "blackout",
        "of it disk",
        "silence",
        "disk copy",
        "memory",
        "total",
        "spawn",
        "spawn+total",
        "left MiB",
    ]);
    for (round, BareMove { moved, spawn, gap }) in (1..).zip(moves) {
        let times = [moved.blackout, moved.settle, *gap, moved.disk, moved.memory, moved.total, *spawn];
        let figures = times.map(ms).into_iter().chain([ms(*spawn + moved.total), mib_or_nan(moved.left)]);
        table.row(format!("round {round}"), &figures.collect::<Vec<f64>>());
    }
    table
}

fn dunlin_table(moves: &[DunlinMove]) -> Table {
    let mut table =
        Table::new(&["blackout", "reported", "silence", "stream+run", "total", "command", "left MiB"]);
    let mut name = ["a -> b", "b -> a"].into_iter().cycle();
    for (round, DunlinMove { migrated, blackout, left, gap }) in (1..).zip(moves) {
        let figures = [
            ms_or_nan(*blackout),
            ms(migrated.blackout),
            ms(*gap),
            ms_or_nan(migrated.between("transfer", "stop-source")),
            ms(migrated.total),
            ms(migrated.wall),
            mib_or_nan(*left),
        ];
        table.row(format!("round {round} {}", name.next().unwrap_or_default()), &figures);
    }
    table
}

fn phases(moves: &[DunlinMove]) -> Vec<(String, f64)> {
    let all: Vec<_> = moves.iter().map(|of| of.migrated.phases()).collect();
    let names = all.first().map(|phases| phases.iter().map(|(name, _)| name.clone()).collect());
    let names: Vec<String> = names.unwrap_or_default();
    let times = |name: &String| -> Vec<f64> {
        all.iter().flatten().filter(|(phase, _)| phase == name).map(|(_, time)| ms(*time)).collect()
    };
    names.iter().map(|name| (name.clone(), dunlin_benches::figures::median(&times(name)))).collect()
}

/// Columns are those of [`bare_table`] and [`dunlin_table`].
fn ratios(bare: &Table, dunlin: &Table) {
    println!(
        "\nDunlin / bare QEMU: median of the rounds' ratios (ratio of the medians; range of the rounds), target at most {TARGET}"
    );
    let pairs = [
        ("blackout, STOP to RESUME", 0, 0),
        ("blackout as reported", 1, 0),
        ("silence of the counter", 2, 2),
        ("total, like for like: stream+run / total", 3, 5),
        ("total with start-up: total / spawn+total", 4, 7),
        ("total: total / total (QEMU ready)", 4, 5),
    ];
    for (name, ours, theirs) in pairs {
        let ratio = ratio(&dunlin.column(ours), &bare.column(theirs));
        let verdict = if ratio.paired.is_nan() {
            "not measured"
        } else if ratio.paired <= TARGET {
            "reached"
        } else {
            "NOT reached"
        };
        let (low, high) = ratio.range;
        println!(
            "  {name:<42} {:>6.2}  ({:.2}; {low:.2} to {high:.2})  {verdict}",
            ratio.paired, ratio.of_medians
        );
    }
}
