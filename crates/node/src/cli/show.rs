//! A move on the screen: a bar on a terminal, lines elsewhere, JSON when asked.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::{Output, complain, say};
use crate::network::contract::{EXPECTED, KEPT, REBOUND, listed as addresses};
use crate::proto::{Failure, NetworkPlan, Nic, PhaseEntered, Progress, Report, Started, Whereabouts};

/// Lines of a transfer are at least so far apart.
const LINE_EVERY: Duration = Duration::from_secs(1);
const BAR: &str = "{spinner} {msg:<44} [{bar:28}] {percent:>3}%";

/// How a move ended.
pub(crate) enum Ending<'a> {
    /// It runs there.
    Moved(&'a Report),
    /// It does not, or nobody knows.
    Failed(&'a Failure),
}

/// Shows one move.
pub(crate) struct Show {
    form: Form,
    container: String,
    names: (String, String),
    /// What moves, once the daemon has told.
    containers: Vec<String>,
}

enum Form {
    Lines { last: Option<Instant> },
    Bar(ProgressBar),
    Json,
}

impl Show {
    pub(crate) fn new(output: Output, container: &str) -> Show {
        let form = match output {
            Output::Json => Form::Json,
            Output::Text if std::io::stderr().is_terminal() => Form::Bar(bar()),
            Output::Text => Form::Lines { last: None },
        };
        Show { form, container: container.into(), names: Default::default(), containers: Vec::new() }
    }

    pub(crate) fn started(&mut self, started: &Started) {
        self.names = (started.from.clone(), started.to.clone());
        self.containers.clone_from(&started.containers);
        let mut line = format!(
            "moving {} from {} to {} (session {})",
            self.container, started.from, started.to, started.session
        );
        line.push_str(&listed(&self.container, &started.containers));
        match &self.form {
            Form::Json => json_line("started", json!(started)),
            Form::Lines { .. } => say(&line),
            Form::Bar(bar) => bar.println(line),
        }
    }

    pub(crate) fn phase(&mut self, phase: &PhaseEntered) {
        match &mut self.form {
            Form::Json => json_line("phase", json!(phase)),
            Form::Lines { last } => {
                *last = None;
                say(&format!("{:>8}  {}", seconds(phase.elapsed_ms), phase.phase));
            }
            Form::Bar(bar) => {
                bar.set_message(phase.phase.clone());
                bar.enable_steady_tick(Duration::from_millis(100));
            }
        }
    }

    pub(crate) fn progress(&mut self, progress: &Progress) {
        match &mut self.form {
            Form::Json => json_line("progress", json!(progress)),
            Form::Lines { last } => {
                if last.is_some_and(|last| last.elapsed() < LINE_EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                say(&format!("{:>8}  {}", seconds(progress.elapsed_ms), reading(progress)));
            }
            Form::Bar(bar) => {
                bar.set_position(per_mille(progress));
                bar.set_message(reading(progress));
            }
        }
    }

    /// What will become of every NIC: told before anything is touched.
    pub(crate) fn network(&mut self, plan: &NetworkPlan) {
        let lines = || plan.nics.iter().map(|nic| format!("          {}", planned(nic)));
        match &self.form {
            Form::Json => json_line("network", json!(plan)),
            Form::Lines { .. } => lines().for_each(|line| say(&line)),
            Form::Bar(bar) => lines().for_each(|line| bar.println(line)),
        }
    }

    /// Something that is no event of the move.
    pub(crate) fn note(&mut self, text: &str) {
        match &self.form {
            Form::Json => json_line("note", json!({ "message": text })),
            Form::Lines { .. } => complain(text),
            Form::Bar(bar) => bar.suspend(|| complain(text)),
        }
    }

    /// The move did not begin.
    pub(crate) fn refused(&self, reason: &str) {
        match &self.form {
            Form::Json => json_line("refused", json!({ "message": reason })),
            Form::Lines { .. } | Form::Bar(_) => complain(reason),
        }
    }

    pub(crate) fn ended(&mut self, ending: &Ending<'_>) {
        if let Form::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
        match (ending, &self.form) {
            (Ending::Moved(report), Form::Json) => json_line("report", json!(report)),
            (Ending::Moved(report), _) => say(&moved(report)),
            (Ending::Failed(failure), Form::Json) => json_line("failure", failure_json(failure)),
            (Ending::Failed(failure), _) => {
                complain(&failed(failure, &self.container, &self.containers, &self.names));
            }
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new(1000);
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    bar
}

/// One object a line: the event's name first, its fields beside it.
fn json_line(event: &str, fields: Value) {
    let mut object = json!({ "event": event });
    if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
        object.extend(fields);
    }
    say(&object.to_string());
}

fn failure_json(failure: &Failure) -> Value {
    json!({
        "session": failure.session,
        "phase": failure.phase,
        "message": failure.message,
        "container_runs": match failure.whereabouts() {
            Whereabouts::Source => "source",
            Whereabouts::Unknown | Whereabouts::Unspecified => "unknown",
        },
        "warnings": failure.warnings,
    })
}

fn reading(progress: &Progress) -> String {
    if progress.memory_passes == 0 {
        return before_memory(progress);
    }
    let mut text = format!(
        "pass {}  sent {}  left {}  {}/s",
        progress.memory_passes,
        bytes(progress.memory_sent_bytes),
        bytes(progress.memory_remaining_bytes),
        bytes(progress.bytes_per_second)
    );
    if progress.disk_sent_bytes > 0 {
        text.push_str(&format!("  disk {}", bytes(progress.disk_sent_bytes)));
    }
    text
}

/// Memory goes once the disks are in step; until then nothing of it is sent, and nothing is known of what is left.
fn before_memory(progress: &Progress) -> String {
    let mut text = match (progress.disk_total_bytes, progress.disk_sent_bytes) {
        (0, 0) => "nothing sent yet".to_owned(),
        (total, sent) => {
            let rate = bytes(progress.bytes_per_second);
            format!("disk {} of about {}  {rate}/s", bytes(sent), bytes(total.max(sent)))
        }
    };
    if progress.memory_total_bytes > 0 {
        text.push_str(&format!("  then memory {}", bytes(progress.memory_total_bytes)));
    }
    text
}

/// Share of memory and disks that is there; memory that was written again counts against it.
fn per_mille(progress: &Progress) -> u64 {
    let memory = progress.memory_total_bytes.saturating_sub(progress.memory_remaining_bytes);
    let disk = progress.disk_sent_bytes.min(progress.disk_total_bytes);
    let total = u128::from(progress.memory_total_bytes) + u128::from(progress.disk_total_bytes);
    let done = u128::from(memory) + u128::from(disk);
    u64::try_from((done * 1000).checked_div(total).unwrap_or(0)).unwrap_or(1000).min(1000)
}

/// A line that lists what moves, when that is more than what was asked for.
fn listed(asked: &str, containers: &[String]) -> String {
    match containers {
        [] => String::new(),
        [one] if one == asked => String::new(),
        several => format!("\n  containers   {}", several.join(", ")),
    }
}

fn moved(report: &Report) -> String {
    let blackout =
        if report.blackout_ms == 0 { "not measured".into() } else { format!("{} ms", report.blackout_ms) };
    let passes = if report.memory_passes == 1 { "pass" } else { "passes" };
    let containers = listed(&report.container, &report.containers);
    let mut text = format!(
        "moved {} from {} to {} in {}{containers}\n  blackout     {blackout}\n  memory sent  {} in {} {passes}\n  disk sent    {}",
        report.container,
        report.from,
        report.to,
        seconds(report.total_ms),
        bytes(report.memory_sent_bytes),
        report.memory_passes,
        bytes(report.disk_sent_bytes),
    );
    for nic in &report.nics {
        text.push_str(&format!("\n  network      {}", settled(nic)));
    }
    if report.fetched_bytes > 0 {
        text.push_str(&format!("\n  images read  {}", bytes(report.fetched_bytes)));
    }
    push_warnings(&mut text, &report.warnings);
    text
}

/// A NIC before the move.
fn planned(nic: &Nic) -> String {
    let own = addresses(&nic.addresses);
    let there = match nic.destination_addresses.as_slice() {
        [] => "what it is given there".to_owned(),
        some => addresses(some),
    };
    let (ways, ways_there) = (ways(&nic.routes, nic.mtu), ways(&nic.destination_routes, nic.destination_mtu));
    let fate = match nic.fate.as_str() {
        KEPT => format!("keeps {own}{ways}"),
        REBOUND => {
            format!("will have {there}{ways_there} in place of {own}{ways}: its connections will be LOST")
        }
        EXPECTED => format!("is to keep {own}; its namespace is made during the move and compared then"),
        other => format!("{other}: {own}"),
    };
    format!("network: {} of {} {fate}", nic.name, nic.pod)
}

/// How a NIC leads out, after its addresses: `, default by 10.1.2.1, MTU 1400`.
fn ways(routes: &[String], mtu: u32) -> String {
    let mtu = (mtu > 0).then(|| format!("MTU {mtu}"));
    routes.iter().cloned().chain(mtu).fold(String::new(), |text, way| text + ", " + &way)
}

/// A NIC after the move.
fn settled(nic: &Nic) -> String {
    let (own, there) = (addresses(&nic.addresses), addresses(&nic.destination_addresses));
    let (ways, ways_there) = (ways(&nic.routes, nic.mtu), ways(&nic.destination_routes, nic.destination_mtu));
    let fate = match nic.fate.as_str() {
        REBOUND => format!("rebound from {own} to {there}{ways_there}"),
        fate => format!("{fate} {own}{ways}"),
    };
    format!("{} of {} ({}) {fate}", nic.name, nic.pod, nic.mac)
}

fn failed(failure: &Failure, asked: &str, containers: &[String], (from, to): &(String, String)) -> String {
    // Of several, some may not run at all: stopped, or never started.
    let several = containers.len() > 1;
    let what = if several {
        format!("containers {}", containers.join(", "))
    } else {
        format!("container {}", containers.first().map_or(asked, String::as_str))
    };
    let phase = if failure.phase.is_empty() { String::new() } else { format!(" in phase {}", failure.phase) };
    // A cause begins with the work's name, which for the shorter phases is the phase's.
    let cause = failure.message.strip_prefix(&format!("{}: ", failure.phase)).unwrap_or(&failure.message);
    let mut text = format!("the move failed{phase}: {cause}\n");
    text.push_str(&match failure.whereabouts() {
        Whereabouts::Source if several => format!("{what} are still on {from}"),
        Whereabouts::Source => format!("{what} still runs on {from}"),
        Whereabouts::Unknown | Whereabouts::Unspecified => {
            let (are, it) = if several { ("are", "them") } else { ("runs", "it") };
            format!(
                "it is not known where {what} {are}: `dunlin ps` on {from} and on {to} tells; do not start {it} again before"
            )
        }
    });
    push_warnings(&mut text, &failure.warnings);
    text
}

fn push_warnings(text: &mut String, warnings: &[String]) {
    for warning in warnings {
        text.push_str("\n  needs a hand: ");
        text.push_str(warning);
    }
}

/// `3.21 s`
fn seconds(millis: u64) -> String {
    format!("{}.{:02} s", millis / 1000, millis % 1000 / 10)
}

/// `310.2 MiB`
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut tenths = u128::from(count) * 10;
    let mut unit = "B";
    for name in UNITS {
        if tenths < 10 * 1024 {
            break;
        }
        tenths /= 1024;
        unit = name;
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            container: "c1".into(),
            from: "a".into(),
            to: "b".into(),
            total_ms: 3214,
            blackout_ms: 134,
            memory_sent_bytes: 325_000_000,
            memory_passes: 3,
            disk_sent_bytes: 0,
            ..Report::default()
        }
    }

    #[test]
    fn the_report_names_both_ends_and_every_figure() {
        assert_eq!(
            moved(&report()),
            "moved c1 from a to b in 3.21 s\n  blackout     134 ms\n  memory sent  309.9 MiB in 3 passes\n  disk sent    0 B"
        );
        let pod = Report { containers: vec!["pod".into(), "c1".into()], ..report() };
        assert!(
            moved(&pod).starts_with("moved c1 from a to b in 3.21 s\n  containers   pod, c1\n  blackout")
        );
        assert_eq!(json!(pod)["containers"], json!(["pod", "c1"]));
        let left =
            Report { warnings: vec!["a snapshot".into()], blackout_ms: 0, memory_passes: 1, ..report() };
        let text = moved(&left);
        assert!(
            text.contains("needs a hand: a snapshot")
                && text.contains("not measured")
                && text.contains("1 pass\n")
        );
    }

    #[test]
    fn every_nic_has_a_line_and_lost_connections_are_told_beforehand() {
        let mut nic = Nic {
            pod: "web".into(),
            name: "eth0".into(),
            mac: "02:00:00:00:00:01".into(),
            fate: KEPT.into(),
            addresses: vec!["10.1.2.3/24".into(), "fd00::3/64".into()],
            destination_addresses: vec!["10.9.9.9/24".into()],
            routes: vec!["default by 10.1.2.1".into()],
            destination_routes: vec!["default by 10.9.9.1".into()],
            mtu: 1500,
            destination_mtu: 1400,
        };
        let text = moved(&Report { nics: vec![nic.clone()], ..report() });
        let line = "\n  network      eth0 of web (02:00:00:00:00:01) kept 10.1.2.3/24 fd00::3/64, default by 10.1.2.1, MTU 1500";
        assert!(text.ends_with(line), "{text}");
        assert!(!planned(&nic).contains("LOST"));
        nic.fate = REBOUND.into();
        let text = moved(&Report { nics: vec![nic.clone()], ..report() });
        assert!(
            text.ends_with(
                " rebound from 10.1.2.3/24 fd00::3/64 to 10.9.9.9/24, default by 10.9.9.1, MTU 1400"
            ),
            "{text}"
        );
        assert!(
            planned(&nic).contains("10.9.9.9/24, default by 10.9.9.1, MTU 1400 in place of")
                && planned(&nic).ends_with("LOST")
        );
        assert_eq!(json!(Report { nics: vec![nic], ..report() })["nics"][0]["fate"], REBOUND);
    }

    #[test]
    fn a_failure_says_where_the_container_is() {
        let names = ("a".to_owned(), "b".to_owned());
        let mut failure = Failure {
            phase: "transfer".into(),
            message: "no progress".into(),
            whereabouts: Whereabouts::Source.into(),
            ..Failure::default()
        };
        assert_eq!(
            failed(&failure, "c1", &[], &names),
            "the move failed in phase transfer: no progress\ncontainer c1 still runs on a"
        );
        failure.message = "transfer: no progress".into();
        assert!(
            failed(&failure, "c1", &[], &names)
                .starts_with("the move failed in phase transfer: no progress\n")
        );
        assert_eq!(failure_json(&failure)["container_runs"], "source");
        failure.whereabouts = Whereabouts::Unknown.into();
        let text = failed(&failure, "c1", &[], &names);
        assert!(text.contains("not known where container c1 runs: `dunlin ps` on a and on b"), "{text}");
        assert_eq!(failure_json(&failure)["container_runs"], "unknown");
        let pod = ["pod".to_owned(), "web".to_owned()];
        let text = failed(&failure, "web", &pod, &names);
        assert!(text.contains("not known where containers pod, web are: `dunlin ps`"), "{text}");
        failure.whereabouts = Whereabouts::Source.into();
        let text = failed(&failure, "web", &pod, &names);
        assert!(text.ends_with("\ncontainers pod, web are still on a"), "{text}");
        assert!(failed(&failure, "web", &pod[..1], &names).contains("container pod still runs on a"));
    }

    #[test]
    fn a_reading_says_nothing_of_memory_before_it_goes() {
        let mut progress = Progress {
            disk_total_bytes: 64 << 20,
            disk_sent_bytes: 16 << 20,
            bytes_per_second: 8 << 20,
            ..Progress::default()
        };
        assert_eq!(reading(&progress), "disk 16.0 MiB of about 64.0 MiB  8.0 MiB/s");
        progress.memory_total_bytes = 512 << 20;
        progress.memory_remaining_bytes = 512 << 20;
        assert_eq!(reading(&progress), "disk 16.0 MiB of about 64.0 MiB  8.0 MiB/s  then memory 512.0 MiB");
        assert_eq!(per_mille(&progress), 27);
        let bare = Progress { memory_total_bytes: 1 << 20, ..Progress::default() };
        assert_eq!(reading(&bare), "nothing sent yet  then memory 1.0 MiB");
        progress.memory_passes = 1;
        assert!(reading(&progress).starts_with("pass 1  sent 0 B  left 512.0 MiB"));
    }

    #[test]
    fn bytes_and_shares() {
        for (count, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB")] {
            assert_eq!(bytes(count), text);
        }
        let half = Progress { memory_total_bytes: 100, memory_remaining_bytes: 50, ..Progress::default() };
        assert_eq!(per_mille(&half), 500);
        assert_eq!(per_mille(&Progress::default()), 0);
    }
}
