//! `containerd-shim-dunlin-v2`: containerd's runtime `io.containerd.dunlin.v2`.
//!
//! ```text
//! containerd --start--> boot::start --spawns--> boot::server
//!                                                  |
//!            ttrpc Task v2, v3 --> service::task --+--> sandbox::Sandbox --> vm, container, process, device
//!            ttrpc Migration ---> service::migration --> sandbox::moving (executes migration::session's effects)
//! ```
//!
//! `service` translates and holds no policy; `sandbox` owns all state; the other rooms are one
//! controller each: its state and its saved payload.

mod boot;
mod config;
mod container;
mod controller;
mod device;
mod hold;
mod network;
mod pod;
mod process;
mod rootfs;
mod sandbox;
mod service;
mod vm;
mod volume;

use std::io::Write;
use std::process::ExitCode;

use boot::args::{Action, Args, HELP};
use boot::bootstrap::Caller;
use config::Config;
use tracing_subscriber::filter::Targets;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // containerd shows a shim's standard error in its own error.
            eprintln!("containerd-shim-dunlin-v2: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut args = Args::parse(std::env::args().skip(1)).map_err(|error| error.to_string())?;
    match args.action {
        Some(Action::Help) => {
            print!("{HELP}");
            return Ok(());
        }
        Some(Action::Version) => {
            println!("containerd-shim-dunlin-v2 {}", env!("CARGO_PKG_VERSION"));
            return Ok(());
        }
        Some(Action::Info) => return print(&boot::bootstrap::info()),
        _ => {}
    }
    let config = Config::load().map_err(|error| error.to_string())?;
    match args.action {
        Some(Action::Start) => {
            if !nix::unistd::geteuid().is_root() {
                return Err("needs root: it makes virtual machines for containerd".to_owned());
            }
            let caller = Caller::learn(&mut args).map_err(|error| error.to_string())?;
            let address = boot::start::start(&args, &caller, &config).map_err(|error| error.to_string())?;
            print(&caller.answer(&address))
        }
        Some(Action::Delete) => print(&boot::delete::delete(&args, &config)),
        Some(Action::Serve) => serve(args, config),
        Some(Action::Help | Action::Version | Action::Info) | None => Ok(()),
    }
}

fn print(bytes: &[u8]) -> Result<(), String> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("cannot answer on standard output: {error}"))
}

/// Begins to log: what `DUNLIN_LOG` says, as in `info,dunlin_qemu=debug`, else `level`.
///
/// By target and level only: a filter for spans and fields brings a regex engine along, which is resident too.
fn log(level: &str) {
    use tracing_subscriber::prelude::*;
    let asked = std::env::var("DUNLIN_LOG").ok().and_then(|asked| asked.parse::<Targets>().ok());
    let filter = asked.or_else(|| level.parse().ok()).unwrap_or_default();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
}

/// What was freed goes back to the host: one heap for the few threads that come and go, and large buffers always in
/// mappings of their own. By itself glibc keeps an arena a thread, and once a large buffer was freed, room for the next.
fn spare_memory() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 128 * 1024)] {
        // SAFETY: a setting of the allocator, made before there is a second thread. A refused one changes nothing.
        unsafe { libc::mallopt(setting, value) };
    }
}

/// One thread for everything asynchronous: a shim waits far more than it works, QEMU's
/// parent-death signal is tied to the thread that starts it, and a thread costs memory.
fn serve(args: Args, config: Config) -> Result<(), String> {
    let level = if args.debug { "debug" } else { "info" };
    log(level);
    spare_memory();
    // A FIFO's reader that went away is an error of that write, not the end of the shim.
    // SAFETY: ignoring a signal has no handler to be unsafe.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    runtime.block_on(boot::server::serve(args, config)).map_err(|error| {
        tracing::error!("{error}");
        error.to_string()
    })
}
