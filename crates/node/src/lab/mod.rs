//! Two hosts on one machine, for the demo, the tests and for trying things out.
//!
//! ```text
//! dunlin lab up
//!  └─ dunlin lab host (PID 1 of its namespaces: PID, mount, network, host name)   twice: a, b
//!      ├─ containerd            own root, own /run/containerd
//!      │   └─ containerd-shim-dunlin-v2 ── qemu
//!      └─ dunlin node
//! ```
//!
//! The lab is disposable: the death of a host's first process ends everything in it.

mod config;
mod containerd;
mod cri;
mod error;
mod host;
mod image;
mod layout;
mod lifecycle;
mod logs;
mod network;
mod pod_net;
mod spawn;
mod tar;

use std::{
    ffi::OsString,
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
};

use clap::{Args, Subcommand};

pub(crate) use self::{
    error::LabError,
    image::{COUNTER_FILE, DEMO_IMAGE},
    layout::{HostName, Layout},
    lifecycle::{UpOptions, down, run_in_host, up},
    spawn::{spawn_in_client, spawn_in_host},
};

/// Where a lab lies unless told otherwise.
pub(crate) const DEFAULT_DIR: &str = "/var/lib/dunlin-lab";

/// Two hosts on this machine to try Dunlin with.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The lab's directory.
    #[arg(long, global = true, env = "DUNLIN_LAB_DIR", default_value = DEFAULT_DIR)]
    dir: PathBuf,
    #[command(subcommand)]
    command: LabCommand,
}

/// Where a command can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    /// The first host.
    A,
    /// The second host.
    B,
    /// The network of a client outside both hosts, 10.88.0.254; all else is this machine's.
    Client,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Start hosts a and b, each with containerd and a node, and load the demo image.
    Up {
        /// Directory with the guest's vmlinuz and initramfs.cpio.lz4 [default: ../image beside the programs].
        #[arg(long, env = "DUNLIN_IMAGE_DIR")]
        image: Option<PathBuf>,
        /// Directory of another containerd and its ctr, or a root with them in usr/bin [default: the installed one].
        #[arg(long, env = "DUNLIN_CONTAINERD_DIR")]
        containerd: Option<PathBuf>,
        /// Only containerd and the node; no guest image is needed and none is checked.
        #[arg(long, hide = true)]
        no_image: bool,
    },
    /// End the lab and remove it; its logs stay.
    Down,
    /// Show what runs.
    Status,
    /// Run a command on a host, or in the network of the client outside both: `dunlin lab exec a -- ctr tasks ls`.
    Exec {
        /// Where.
        #[arg(value_enum)]
        place: Place,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Make the network namespace of a pod inside a host, or remove it:
    /// `dunlin lab pod-net a web --address 10.88.0.5/16`.
    PodNet(pod_net::PodNetArgs),
    /// Show the end of each log; they outlive the lab until the next `up`.
    Logs {
        /// Only this host's.
        #[arg(value_enum)]
        host: Option<HostName>,
        /// Lines of each log.
        #[arg(long, short = 'n', default_value_t = 20)]
        lines: usize,
    },
    /// Start or stop a service of a host: `dunlin lab service b stop node`.
    Service {
        /// Which host.
        #[arg(value_enum)]
        host: HostName,
        /// start, stop, or kill (no farewell).
        #[arg(value_parser = ["start", "stop", "kill"])]
        action: String,
        /// node or containerd.
        #[arg(value_parser = ["node", "containerd"])]
        service: String,
    },
    /// The first process of a host.
    #[command(hide = true)]
    Host {
        #[arg(long, value_enum)]
        name: HostName,
    },
}

/// Carries out one `dunlin lab` command. Blocks; its exit code is the command's own for `exec`.
pub(crate) fn run(arguments: LabArgs) -> Result<ExitCode, LabError> {
    let layout = Layout::new(&arguments.dir)?;
    match arguments.command {
        LabCommand::Up { image, containerd, no_image } => {
            let up_options = UpOptions { image_dir: image, without_image: no_image, containerd };
            if up(&layout, &up_options)? {
                println!("lab is up in {}: hosts a (10.77.0.1) and b (10.77.0.2)", layout.dir().display());
                println!("try: dunlin lab exec a -- ctr images ls");
            } else {
                println!("lab is up already in {}", layout.dir().display());
            }
        }
        LabCommand::Down => {
            down(&layout)?;
            println!("lab is down");
        }
        LabCommand::Status => return lifecycle::print_status(&layout),
        LabCommand::PodNet(arguments) => pod_net::run(&layout, &arguments)?,
        LabCommand::Exec { place, command } => {
            let mut words = command.into_iter();
            // clap has made sure that there is one.
            let mut command = Command::new(words.next().unwrap_or_default());
            command.args(words);
            return exec(&layout, place, command);
        }
        LabCommand::Logs { host, lines } => logs::print(&layout, host, lines)?,
        LabCommand::Service { host, action, service } => {
            lifecycle::control(&layout, host, &format!("{action} {service}"))?;
        }
        LabCommand::Host { name } => host::run(&layout, name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command on a host in the foreground and takes its exit code over.
fn exec(layout: &Layout, place: Place, command: Command) -> Result<ExitCode, LabError> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let mut child = match place {
        Place::A => spawn_in_host(layout, HostName::A, command)?,
        Place::B => spawn_in_host(layout, HostName::B, command)?,
        Place::Client => spawn_in_client(command)?,
    };
    // Ctrl-C is for the command: it decides, and we report.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    let status = child.wait().map_err(|source| LabError::Spawn { command: shown, source })?;
    Ok(ExitCode::from(exit_byte(status)))
}

/// An exit status as a shell shows it: 128 + signal when killed.
fn exit_byte(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    u8::try_from(code & 0xff).unwrap_or(255)
}
