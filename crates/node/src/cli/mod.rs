//! The command line: arguments in, text or JSON and an exit code out.
//!
//! Exit codes: 0 done, 1 refused or failed (a container that was to move runs where it was),
//! 2 usage, 3 it is not known where the container runs.

mod connect;
mod inspect;
mod migrate;
mod show;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::config::{DEFAULT_SOCKET, NodeConfig};
use crate::{daemon, demo, lab};

/// Refused or failed; nothing has moved.
pub(crate) const FAILED: u8 = 1;
/// Nobody can say where the container runs.
pub(crate) const UNKNOWN: u8 = 3;

/// Moves running containers between hosts without stopping them.
#[derive(Debug, Parser)]
#[command(name = "dunlin", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon of this host.
    Node(NodeArgs),
    /// Move a running container, and all that shares its sandbox, to another node.
    Migrate(migrate::MigrateArgs),
    /// List the containers of this host.
    Ps(inspect::PsArgs),
    /// Turn a running move back.
    Cancel(inspect::CancelArgs),
    /// Show this node, its peers and the moves it takes part in.
    Status(inspect::StatusArgs),
    /// Two hosts on this machine to try Dunlin with.
    Lab(lab::LabArgs),
    /// Watch a container move between two hosts of a lab.
    Demo(demo::DemoArgs),
}

#[derive(Debug, Args)]
struct NodeArgs {
    /// The daemon's configuration (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Form of the log on standard error; RUST_LOG chooses what is logged.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where the daemon is.
#[derive(Debug, Clone, Args)]
pub(crate) struct Daemon {
    /// The daemon's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "DUNLIN_SOCKET")]
    pub(crate) socket: PathBuf,
}

/// Parses the arguments and runs one command.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let (format, level) = match &cli.command {
        Command::Node(arguments) => (arguments.log_format, "info"),
        _ => (LogFormat::Text, "warn"),
    };
    log(format, level);
    match cli.command {
        // These bring their own threads and processes.
        Command::Lab(arguments) => match lab::run(arguments) {
            Ok(code) => code,
            Err(error) => fail(&error.to_string()),
        },
        Command::Demo(arguments) => match demo::run(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string()),
        },
        command => {
            let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return fail(&format!("cannot start the runtime: {error}")),
            };
            runtime.block_on(run(command))
        }
    }
}

async fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Node(arguments) => return Box::pin(node(arguments)).await,
        Command::Migrate(arguments) => return migrate::run(arguments).await,
        Command::Ps(arguments) => inspect::ps(arguments).await,
        Command::Cancel(arguments) => inspect::cancel(arguments).await,
        Command::Status(arguments) => inspect::status(arguments).await,
        // Run before there was a runtime.
        Command::Lab(_) | Command::Demo(_) => return ExitCode::SUCCESS,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

async fn node(arguments: NodeArgs) -> ExitCode {
    let config = match NodeConfig::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(&error.to_string()),
    };
    match Box::pin(daemon::serve::serve(config)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

fn log(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn fail(message: &str) -> ExitCode {
    complain(message);
    ExitCode::from(FAILED)
}

/// One message on standard error.
pub(crate) fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "dunlin: {message}");
}

/// One line on standard output; a reader that went away is no error.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;
    use crate::proto::NetworkMode;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_claps_and_exit_with_2() {
        for arguments in [
            &["dunlin", "migrate", "c1"][..],
            &["dunlin", "migrate", "--to", "b"],
            &["dunlin", "migrate", "c1", "--to", "b", "--timeout", "soon"],
            &["dunlin", "migrate", "c1", "--to", "b", "--output", "xml"],
            &["dunlin", "node"],
            &["dunlin", "move"],
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments:?}: {error}");
        }
        let help = Cli::try_parse_from(["dunlin", "--help"]).unwrap_err();
        assert_eq!(help.kind(), ErrorKind::DisplayHelp);
    }

    #[test]
    fn a_whole_migrate_line_is_understood() {
        let line = "dunlin migrate c1 --to b --namespace k8s.io --socket /s --output json --timeout 90s --downtime-limit 200 --network rebind --netns /run/netns/x";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Migrate(arguments) = cli.command else { panic!("another command") };
        let request = arguments.request();
        assert_eq!(
            (request.container.as_str(), request.to.as_str(), request.namespace.as_str()),
            ("c1", "b", "k8s.io")
        );
        assert_eq!((request.timeout_ms, request.downtime_limit_ms), (90_000, 200));
        assert_eq!((request.network(), request.namespaces.len()), (NetworkMode::Rebind, 1));
    }
}
