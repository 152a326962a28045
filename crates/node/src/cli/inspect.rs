//! `dunlin ps`, `cancel` and `status`.

use clap::Args;
use serde_json::json;

use super::connect::{CommandError, connect, told};
use super::{Daemon, Output, say};
use crate::proto::{CancelMoveRequest, ListRequest, StatusRequest, StatusResponse};

/// List the containers of this host, each with the sandbox that it moves with.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Only this namespace.
    #[arg(long, short = 'n', default_value = "", hide_default_value = true)]
    namespace: String,
    #[command(flatten)]
    daemon: Daemon,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// Turn a running move back.
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// A container that moves, or the sandbox.
    container: String,
    /// containerd's namespace.
    #[arg(long, short = 'n', default_value = "default")]
    namespace: String,
    #[command(flatten)]
    daemon: Daemon,
}

/// Show this node.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    daemon: Daemon,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// Prints a row for each container.
pub(crate) async fn ps(arguments: PsArgs) -> Result<(), CommandError> {
    let socket = &arguments.daemon.socket;
    let request = ListRequest { namespace: arguments.namespace };
    let answer = connect(socket).await?.list(request).await.map_err(|status| told(socket, &status))?;
    let rows = answer.into_inner().containers;
    if arguments.output == Output::Json {
        for row in rows {
            say(&json!(row).to_string());
        }
        return Ok(());
    }
    let mut table = vec![["NAMESPACE", "ID", "STATE", "RUNTIME", "SANDBOX", "SESSION"].map(String::from)];
    table
        .extend(rows.into_iter().map(|row| {
            [row.namespace, row.id, row.state, row.runtime, dash(row.sandbox), dash(row.session)]
        }));
    say(&columns(&table));
    Ok(())
}

/// Asks the daemon to turn a move back.
pub(crate) async fn cancel(arguments: CancelArgs) -> Result<(), CommandError> {
    let socket = &arguments.daemon.socket;
    let request =
        CancelMoveRequest { namespace: arguments.namespace, container: arguments.container.clone() };
    let answer = connect(socket).await?.cancel(request).await.map_err(|status| told(socket, &status))?;
    say(&format!(
        "{} is turning back (session {}); `dunlin migrate` tells when it has",
        arguments.container,
        answer.into_inner().session
    ));
    Ok(())
}

/// Prints the daemon, its peers and its moves.
pub(crate) async fn status(arguments: StatusArgs) -> Result<(), CommandError> {
    let socket = &arguments.daemon.socket;
    let answer =
        connect(socket).await?.status(StatusRequest {}).await.map_err(|status| told(socket, &status))?;
    let status = answer.into_inner();
    match arguments.output {
        Output::Json => say(&json!(status).to_string()),
        Output::Text => say(&describe(&status)),
    }
    Ok(())
}

fn describe(status: &StatusResponse) -> String {
    let tls = if status.tls { "mutual TLS" } else { "PLAIN TEXT: no [tls] in the configuration" };
    let mut text = format!(
        "node {} (dunlin {}), peers on {} ({tls}), data on {}\ncontainerd {}",
        status.name, status.version, status.listen, status.data_listen, status.containerd_version
    );
    for peer in &status.peers {
        let state = if peer.problem.is_empty() { "answers" } else { &peer.problem };
        text.push_str(&format!("\npeer {} at {}: {state}", peer.name, peer.address));
    }
    if status.sessions.is_empty() {
        text.push_str("\nno moves");
        return text;
    }
    const TITLES: [&str; 7] = ["SESSION", "DIRECTION", "NAMESPACE", "SANDBOX", "PEER", "PHASE", "CONTAINERS"];
    let mut table = vec![TITLES.map(String::from)];
    table.extend(status.sessions.iter().cloned().map(|row| {
        let containers = dash(row.containers.join(","));
        [row.session, row.direction, row.namespace, row.sandbox, row.peer, row.phase, containers]
    }));
    text.push('\n');
    text.push_str(&columns(&table));
    text
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// Columns as wide as their widest cell, two blanks apart.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}  ", width(column)));
        cells.collect::<String>().trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{PeerRow, SessionRow};

    #[test]
    fn columns_line_up() {
        let rows = [["A", "B"], ["long", "x"]].map(|row| row.map(String::from));
        assert_eq!(columns(&rows), "A     B\nlong  x");
    }

    #[test]
    fn the_status_shows_a_peer_that_is_down_and_a_missing_key() {
        let status = StatusResponse {
            name: "a".into(),
            peers: vec![PeerRow { name: "b".into(), problem: "no answer".into(), ..PeerRow::default() }],
            sessions: vec![SessionRow {
                session: "s1".into(),
                sandbox: "pod".into(),
                containers: vec!["pod".into(), "web".into()],
                phase: "transfer".into(),
                ..SessionRow::default()
            }],
            ..StatusResponse::default()
        };
        let text = describe(&status);
        assert!(text.contains("PLAIN TEXT"), "{text}");
        assert!(text.contains("peer b at : no answer"), "{text}");
        assert!(text.contains("s1") && text.ends_with("transfer  pod,web"), "{text}");
    }
}
