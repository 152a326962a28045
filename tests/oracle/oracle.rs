//! Writes blocks at random offsets and never believes the disk: a stand-in for fio's verify that needs nothing
//! but a kernel. Built static by the tests' build script, put into a container, and run on the host as well, over
//! what a crash left.
//!
//! ```text
//!  oracle run   FILE BLOCKS SEED STOP    until the file STOP exists; exit 1 when a block was wrong
//!  oracle check FILE BLOCKS SEED SYNCED  after a crash: write number SYNCED and all before it must be there
//! ```
//!
//! Write number n (from 1 on) goes to block `place(n)` and says so: seed, n, block, filler made of both, checksum over
//! all. Every [`BATCH`] writes are synced, and then said on standard output: `synced <n>`. After each sync as many
//! blocks are read back, around the page cache, and must hold the last write that went to them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;

const BLOCK: usize = 4096;
/// Writes between two syncs, and blocks that are read back after each.
const BATCH: u64 = 16;
const HEADER: usize = 32;
const O_DIRECT: i32 = 0o40_000;

fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xCBF2_9CE4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(sum ^ u64::from_le_bytes(word))
    })
}

/// Which file, and which block a write goes to.
#[derive(Clone, Copy)]
struct Plan {
    blocks: u64,
    seed: u64,
}

impl Plan {
    fn place(self, number: u64) -> u64 {
        mix(self.seed ^ number.wrapping_mul(0x9E37_79B9)) % self.blocks
    }

    fn fill(self, number: u64, block: u64, into: &mut [u8]) {
        for (at, word) in into.chunks_mut(8).enumerate() {
            word.copy_from_slice(&mix(self.seed ^ number.rotate_left(17) ^ block ^ (at as u64) << 40).to_le_bytes());
        }
        into[8..16].copy_from_slice(&self.seed.to_le_bytes());
        into[16..24].copy_from_slice(&number.to_le_bytes());
        into[24..HEADER].copy_from_slice(&block.to_le_bytes());
        let sum = checksum(&into[8..]);
        into[..8].copy_from_slice(&sum.to_le_bytes());
    }

    /// The number of the write that made this block, or what is wrong with it.
    fn number(self, block: u64, bytes: &[u8]) -> Result<u64, String> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if word(0) != checksum(&bytes[8..]) {
            return Err("its checksum is wrong".to_owned());
        }
        let (seed, number, there) = (word(8), word(16), word(24));
        if seed != self.seed || there != block || (number != 0 && self.place(number) != block) {
            return Err(format!("it is write {number} to block {there} with seed {seed}"));
        }
        Ok(number)
    }
}

/// A buffer that O_DIRECT takes: its part from an aligned address on.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new() -> Aligned {
        let bytes = vec![0; 2 * BLOCK];
        let at = bytes.as_ptr().align_offset(BLOCK);
        Aligned(bytes, at)
    }

    fn get(&mut self) -> &mut [u8] {
        let at = self.1;
        &mut self.0[at..at + BLOCK]
    }
}

fn run(path: &Path, plan: Plan, stop: &Path) -> std::io::Result<ExitCode> {
    let file = OpenOptions::new().create_new(true).write(true).open(path)?;
    let direct = File::options().read(true).custom_flags(O_DIRECT).open(path);
    // A file system without it would only show its own cache.
    let direct = direct.map_err(|error| std::io::Error::other(format!("O_DIRECT: {error}")))?;
    let mut buffer = Aligned::new();
    // Write 0 of every block: from here on each block is one that was written.
    for block in 0..plan.blocks {
        plan.fill(0, block, buffer.get());
        file.write_all_at(buffer.get(), block * BLOCK as u64)?;
    }
    file.sync_all()?;
    let mut last = vec![0_u64; usize::try_from(plan.blocks).expect("it fits memory")];
    let (mut number, mut read, mut errors) = (0_u64, 0_u64, 0_u64);
    let mut out = std::io::stdout();
    writeln!(out, "synced 0")?;
    let look = |block: u64, expected: u64, buffer: &mut Aligned| {
        let found = direct.read_exact_at(buffer.get(), block * BLOCK as u64).map_err(|error| error.to_string());
        let found = found.and_then(|()| plan.number(block, buffer.get()));
        match found {
            Ok(found) if found == expected => 0,
            Ok(found) => {
                println!("ERROR block {block}: it is write {found}, the last one was {expected}");
                1
            }
            Err(reason) => {
                println!("ERROR block {block} (write {expected}): {reason}");
                1
            }
        }
    };
    while !stop.exists() {
        for _ in 0..BATCH {
            number += 1;
            let block = plan.place(number);
            plan.fill(number, block, buffer.get());
            file.write_all_at(buffer.get(), block * BLOCK as u64)?;
            last[usize::try_from(block).expect("it fits memory")] = number;
        }
        file.sync_data()?;
        writeln!(out, "synced {number}")?;
        for step in 0..BATCH {
            let block = mix(plan.seed ^ !(number + step)) % plan.blocks;
            errors += look(block, last[usize::try_from(block).expect("it fits memory")], &mut buffer);
            read += 1;
        }
    }
    for (block, expected) in (0..plan.blocks).zip(&last) {
        errors += look(block, *expected, &mut buffer);
        read += 1;
    }
    writeln!(out, "done: {number} written, {read} read, {errors} errors")?;
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check(path: &Path, plan: Plan, synced: u64) -> std::io::Result<ExitCode> {
    let mut last = vec![0_u64; usize::try_from(plan.blocks).expect("it fits memory")];
    for number in 1..=synced {
        last[usize::try_from(plan.place(number)).expect("it fits memory")] = number;
    }
    // The batch that was under way, and one that was synced but not heard of: a crash may tear such a block.
    let torn: Vec<u64> = (synced + 1..=synced + 2 * BATCH).map(|number| plan.place(number)).collect();
    let mut file = File::open(path)?;
    let (mut buffer, mut errors, mut later) = (vec![0; BLOCK], 0_u64, 0);
    for (block, expected) in (0..plan.blocks).zip(&last) {
        file.read_exact(&mut buffer)?;
        match plan.number(block, &buffer) {
            Ok(found) if found >= *expected => later += u64::from(found > *expected),
            Err(_) if torn.contains(&block) => later += 1,
            Ok(found) => {
                errors += 1;
                said(errors, &format!("block {block}: it is write {found}, and {expected} was synced"));
            }
            Err(reason) => {
                errors += 1;
                said(errors, &format!("block {block} (write {expected} was synced): {reason}"));
            }
        }
    }
    println!("checked: {} blocks, {later} later than the last sync that was heard of, {errors} errors", plan.blocks);
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The first errors tell; thousands of them hide what they tell.
fn said(errors: u64, what: &str) {
    if errors <= 20 {
        println!("ERROR {what}");
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
    let (Some(mode), Some(path), Some(blocks @ 1..), Some(seed)) =
        (words.first(), words.get(1), number(2), number(3))
    else {
        eprintln!("oracle run|check FILE BLOCKS SEED STOP|SYNCED");
        return ExitCode::from(2);
    };
    let (path, plan) = (Path::new(path), Plan { blocks, seed });
    let ended = match (mode.as_str(), words.get(4), number(4)) {
        ("run", Some(stop), _) => run(path, plan, Path::new(stop)),
        ("check", _, Some(synced)) => check(path, plan, synced),
        _ => Err(std::io::Error::other("oracle run|check FILE BLOCKS SEED STOP|SYNCED")),
    };
    ended.unwrap_or_else(|error| {
        println!("ERROR {error}");
        ExitCode::FAILURE
    })
}
