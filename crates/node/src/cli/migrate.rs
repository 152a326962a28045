//! `dunlin migrate`: begins a move and follows it to its end.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use super::connect::{CommandError, connect, told};
use super::show::{Ending, Show};
use super::{Daemon, FAILED, Output, UNKNOWN, complain};
use crate::proto::move_event::Event;
use crate::proto::{CancelMoveRequest, MigrateRequest, NamespaceChoice, NetworkMode, Whereabouts};

/// Move a running container, and all that shares its sandbox, to another node.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// A container's id, or a sandbox's; all containers of one sandbox move together.
    container: String,
    /// The node that it moves to: a name under [[peers]] of the daemon's configuration.
    #[arg(long, value_name = "NODE")]
    to: String,
    /// containerd's namespace.
    #[arg(long, short = 'n', default_value = "default")]
    namespace: String,
    #[command(flatten)]
    daemon: Daemon,
    /// How the move is shown.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Also write the final report, as JSON, to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Give up a transfer that takes longer: seconds, or with a unit (90s, 15m, 2h).
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
    /// Blackout to aim for, milliseconds; without it 30, raised pass by pass up to 300 for a container that
    /// writes faster than memory is sent.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..))]
    downtime_limit: Option<u32>,
    /// Disks on storage that both hosts share (`disks.shared` of the shims' configuration) are handed over; `copy`
    /// copies them like the others.
    #[arg(long, value_enum, default_value_t = Storage::Auto)]
    storage: Storage,
    /// Whether its NICs keep their addresses, and with them every connection, or get those of the destination's
    /// network namespace, which breaks its connections.
    #[arg(long, value_enum, default_value_t = Network::Keep)]
    network: Network,
    /// Where a pod's network namespace is on the destination, when not at the same path: a path, or POD=PATH for one
    /// of several pods, POD being its container. May be given again.
    #[arg(long, value_name = "[POD=]PATH", value_parser = namespace)]
    netns: Vec<NamespaceChoice>,
}

/// What becomes of disks on shared storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Storage {
    /// Handed over.
    Auto,
    /// Copied.
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Network {
    /// The same addresses on both sides, else the move is refused.
    Keep,
    /// The destination's addresses.
    Rebind,
}

impl MigrateArgs {
    /// What the daemon is asked.
    pub(crate) fn request(&self) -> MigrateRequest {
        let timeout = self.timeout.unwrap_or_default().as_millis();
        MigrateRequest {
            namespace: self.namespace.clone(),
            container: self.container.clone(),
            to: self.to.clone(),
            timeout_ms: u64::try_from(timeout).unwrap_or(u64::MAX),
            downtime_limit_ms: self.downtime_limit.unwrap_or(0),
            copy_shared_disks: self.storage == Storage::Copy,
            network: match self.network {
                Network::Keep => NetworkMode::Keep.into(),
                Network::Rebind => NetworkMode::Rebind.into(),
            },
            namespaces: self.netns.clone(),
        }
    }
}

fn namespace(text: &str) -> Result<NamespaceChoice, String> {
    let (pod, path) = match text.split_once('=') {
        Some((pod, path)) if !pod.starts_with('/') => (pod, path),
        _ => ("", text),
    };
    if !path.starts_with('/') || (pod.is_empty() && path != text) {
        return Err(format!("`{text}` is neither an absolute path nor POD=PATH, as web=/run/netns/web"));
    }
    Ok(NamespaceChoice { pod: pod.to_owned(), path: path.to_owned() })
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; use seconds or a unit: 90, 90s, 15m, 2h");
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    match number.checked_mul(seconds) {
        Some(total) if total > 0 => Ok(Duration::from_secs(total)),
        _ => Err(wrong()),
    }
}

/// Runs the command; the exit code says where the container is.
pub(crate) async fn run(arguments: MigrateArgs) -> ExitCode {
    let error = match Box::pin(follow(&arguments)).await {
        Ok(code) => return code,
        Err(error) => error,
    };
    Show::new(arguments.output, &arguments.container).refused(&error.to_string());
    // A daemon that went away while it was asked may have begun.
    ExitCode::from(if matches!(error, CommandError::Lost { .. } | CommandError::Signals(_)) {
        UNKNOWN
    } else {
        FAILED
    })
}

async fn follow(arguments: &MigrateArgs) -> Result<ExitCode, CommandError> {
    let socket = &arguments.daemon.socket;
    let mut client = connect(socket).await?;
    let mut show = Show::new(arguments.output, &arguments.container);
    let answer = client.migrate(arguments.request()).await.map_err(|status| told(socket, &status))?;
    let mut events = answer.into_inner();
    // One listener for all of it: a signal between two waits is not lost.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CommandError::Signals)?;
    let mut interrupts = 0;
    loop {
        let event = tokio::select! {
            event = events.message() => event,
            _ = interrupt.recv() => {
                interrupts += 1;
                if interrupts > 1 {
                    show.note("the daemon goes on by itself; `dunlin status` and `dunlin ps` tell how it ended");
                    return Ok(ExitCode::from(UNKNOWN));
                }
                show.note("turning back; Ctrl-C again leaves the rest to the daemon");
                let request = CancelMoveRequest {
                    namespace: arguments.namespace.clone(),
                    container: arguments.container.clone(),
                };
                // Not waited for in line: the stream must go on.
                let mut client = client.clone();
                tokio::spawn(async move {
                    if let Err(status) = client.cancel(request).await {
                        complain(status.message());
                    }
                });
                continue;
            }
        };
        let event = match event {
            Ok(Some(event)) => event.event,
            Ok(None) => return Ok(lost(&mut show, arguments, "its answer broke off")),
            Err(status) => return Ok(lost(&mut show, arguments, &told(socket, &status).to_string())),
        };
        match event {
            Some(Event::Started(started)) => show.started(&started),
            Some(Event::Phase(phase)) => show.phase(&phase),
            Some(Event::Network(plan)) => show.network(&plan),
            Some(Event::Progress(progress)) => show.progress(&progress),
            Some(Event::Report(report)) => {
                if let Some(path) = &arguments.report
                    && let Err(error) = write_report(path, &report)
                {
                    complain(&format!("cannot write {}: {error}", path.display()));
                }
                show.ended(&Ending::Moved(&report));
                return Ok(ExitCode::SUCCESS);
            }
            Some(Event::Failure(failure)) => {
                let here = failure.whereabouts() == Whereabouts::Source;
                show.ended(&Ending::Failed(&failure));
                return Ok(ExitCode::from(if here { FAILED } else { UNKNOWN }));
            }
            // A newer daemon's event; the next one may be known.
            None => {}
        }
    }
}

fn lost(show: &mut Show, arguments: &MigrateArgs, reason: &str) -> ExitCode {
    show.note(&format!(
        "lost the daemon on {} within the move: {reason}; it is not known where container {} runs: `dunlin ps` on both nodes tells",
        arguments.daemon.socket.display(),
        arguments.container
    ));
    ExitCode::from(UNKNOWN)
}

fn write_report(path: &std::path::Path, report: &crate::proto::Report) -> std::io::Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(report)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_one_pods_or_everybodys() {
        let choice = |text: &str| namespace(text).map(|choice| (choice.pod, choice.path));
        assert_eq!(choice("/run/netns/x=y"), Ok((String::new(), "/run/netns/x=y".to_owned())));
        assert_eq!(choice("web=/run/netns/x"), Ok(("web".to_owned(), "/run/netns/x".to_owned())));
        for wrong in ["", "web", "web=x", "=/run/netns/x"] {
            assert!(choice(wrong).unwrap_err().contains("POD=PATH"), "{wrong}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "s", "0", "0m", "-1", "1.5", "2d", "99999999999999999999h", "9999999999999999h"] {
            assert!(duration(text).unwrap_err().contains("90s"), "{text}");
        }
    }
}
