//! Two hosts on this machine, driven through the programs that are shipped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::BenchError;
use crate::bare::Shape;
use crate::counter::Lines;
use crate::memory::{self, Peak};
use crate::observe;
use crate::programs::Programs;

const RUNTIME: &str = "io.containerd.dunlin.v2";
const IMAGE: &str = "docker.io/dunlin/demo:latest";
const COMMAND: Duration = Duration::from_secs(180);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// The first.
    A,
    /// The second.
    B,
}

impl Host {
    /// Both.
    pub const ALL: [Host; 2] = [Host::A, Host::B];

    /// The name that the lab and the nodes use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }
}

/// A lab that this program has started; down again when dropped.
#[derive(Debug)]
pub struct Lab {
    programs: Programs,
    dir: PathBuf,
}

impl Lab {
    /// Starts a lab in `dir`.
    ///
    /// # Errors
    /// [`BenchError::LabBusy`] when it is up there already, the lab's own words for any other lab.
    pub async fn up(programs: &Programs, dir: &Path) -> Result<Lab, BenchError> {
        let mut up = command(programs, dir, &["up", "--image"]);
        up.arg(&programs.image_dir);
        let said = output_of(up).await.inspect_err(|_| {
            // Without hosts there is nothing in it but its lock; logs of hosts that failed stay.
            let _ = fs::remove_file(dir.join("lock"));
            remove_empty(dir);
        })?;
        if said.contains("up already") {
            return Err(BenchError::LabBusy(dir.to_owned()));
        }
        let lab = Lab { programs: programs.clone(), dir: dir.to_owned() };
        observe::install(&Host::ALL.map(|host| lab.host_dir(host)))?;
        Ok(lab)
    }

    /// A host's directory on this machine: `etc`, `run`, `logs`.
    #[must_use]
    pub fn host_dir(&self, host: Host) -> PathBuf {
        self.dir.join(host.name())
    }

    /// The size of the machines that its shims make.
    ///
    /// # Errors
    /// The lab's shim configuration.
    pub fn shape(&self) -> Result<Shape, BenchError> {
        let path = self.host_dir(Host::A).join("etc/config.toml");
        let text = fs::read_to_string(&path).map_err(BenchError::io(format!("read {}", path.display())))?;
        let unreadable = |reason: String| BenchError::Unreadable { what: path.display().to_string(), reason };
        let config: toml::Table =
            text.parse().map_err(|error: toml::de::Error| unreadable(error.to_string()))?;
        let number = |section: &str, key: &str| {
            let value =
                config.get(section).and_then(|section| section.get(key)).and_then(toml::Value::as_integer);
            value
                .and_then(|value| u64::try_from(value).ok())
                .ok_or_else(|| unreadable(format!("{section}.{key} is no number")))
        };
        Ok(Shape {
            vcpus: u32::try_from(number("vm", "vcpus")?).unwrap_or(1),
            memory_mib: number("vm", "memory_mib")?,
            scratch_mib: number("disks", "scratch_mib")?,
        })
    }

    /// Runs a command on a host to its end; its output.
    ///
    /// # Errors
    /// [`BenchError::Command`].
    pub async fn on(&self, host: Host, words: &[&str]) -> Result<String, BenchError> {
        let mut exec = command(&self.programs, &self.dir, &["exec", host.name(), "--"]);
        exec.args(words);
        output_of(exec).await
    }

    /// `dunlin lab WORDS` to its end; its output.
    ///
    /// # Errors
    /// [`BenchError::Command`].
    pub async fn lab(&self, words: &[&str]) -> Result<String, BenchError> {
        output_of(command(&self.programs, &self.dir, words)).await
    }

    /// Follows the output of a container of this id on both hosts, until the handles are aborted.
    #[must_use]
    pub fn follow(&self, id: &str, lines: &Lines) -> Vec<JoinHandle<()>> {
        Host::ALL.map(|host| lines.follow(self.log(host, id))).into()
    }

    fn log(&self, host: Host, id: &str) -> PathBuf {
        self.host_dir(host).join(format!("logs/containers/default/{id}.log"))
    }

    /// `ctr run` of a counter; the time from there to its first line.
    ///
    /// # Errors
    /// ctr's, or a counter that stays silent.
    pub async fn run(&self, host: Host, id: &str, lines: &Lines) -> Result<Duration, BenchError> {
        let log = self.log(host, id);
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent).map_err(BenchError::io(format!("create {}", parent.display())))?;
        }
        let uri = format!("file://{}", log.display());
        let begin = Instant::now();
        let run = ["ctr", "run", "-d", "--runtime", RUNTIME, "--log-uri", &uri, IMAGE, id, "/bin/counter"];
        let first = lines.await_more(1, COMMAND);
        let first = async { first.await.map(|()| begin.elapsed()) };
        let (_, first) = tokio::try_join!(self.on(host, &run), first)?;
        Ok(first)
    }

    /// Kills and removes a container.
    ///
    /// # Errors
    /// ctr's.
    pub async fn remove(&self, host: Host, id: &str) -> Result<(), BenchError> {
        self.on(host, &["ctr", "task", "rm", "--force", id]).await?;
        self.on(host, &["ctr", "container", "rm", id]).await.map(drop)
    }

    /// Moves a container off `from`.
    ///
    /// # Errors
    /// A move that failed, with the program's words.
    pub async fn migrate(
        &self,
        from: Host,
        id: &str,
        downtime_limit: Duration,
    ) -> Result<Migrated, BenchError> {
        let begun = Instant::now();
        let to = from.other().name();
        let limit = downtime_limit.as_millis().to_string();
        let words = ["dunlin", "migrate", id, "--to", to, "--output", "json", "--downtime-limit", &limit];
        let said = self.on(from, &words).await?;
        let wall = begun.elapsed();
        Migrated::read(&said, begun, wall)
    }

    /// Peaks of a host's processes with these words in their arguments, the program's name first.
    ///
    /// # Errors
    /// A host that is gone.
    pub fn peaks(&self, host: Host, words: &[&str]) -> Result<Vec<Peak>, BenchError> {
        let dir = self.dir.display().to_string();
        let first = memory::peaks(&["dunlin", "lab", "host", "--dir", &dir, "--name", host.name()]);
        let host_of_first = first.first().and_then(|peak| memory::host_of(peak.pid)).ok_or_else(|| {
            let what = format!("the first process of lab host {}", host.name());
            BenchError::Unreadable { what, reason: "it is not there".to_owned() }
        })?;
        let here = |peak: &Peak| memory::host_of(peak.pid).as_ref() == Some(&host_of_first);
        Ok(memory::peaks(words).into_iter().filter(here).collect())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mut down = std::process::Command::new(self.programs.bin_dir.join("dunlin"));
        down.args(["lab", "--dir"]).arg(&self.dir).arg("down").stdout(Stdio::null());
        if !down.status().is_ok_and(|status| status.success()) {
            eprintln!("the lab could not be taken down: dunlin lab --dir {} down", self.dir.display());
            return;
        }
        // Only its logs are left.
        let _ = fs::remove_dir_all(&self.dir);
        remove_empty(&self.dir);
    }
}

/// Removes a directory and the one above it, if nothing is in them.
pub(crate) fn remove_empty(dir: &Path) {
    for dir in dir.ancestors().take(2) {
        let _ = fs::remove_dir(dir);
    }
}

/// What `dunlin migrate --output json` told.
#[derive(Debug, Clone)]
pub struct Migrated {
    /// `total_ms` of its report.
    pub total: Duration,
    /// `blackout_ms` of its report: source node's clock, from the pause heard to the answer that it runs.
    pub blackout: Duration,
    /// The command, from its start to its end.
    pub wall: Duration,
    /// When it began.
    pub begun: Instant,
    /// Memory sent, bytes.
    pub memory_sent: u64,
    /// Phases and when each began.
    phases: Vec<(String, Duration)>,
}

impl Migrated {
    fn read(said: &str, begun: Instant, wall: Duration) -> Result<Migrated, BenchError> {
        let unreadable = |reason: String| BenchError::Unreadable {
            what: "what `dunlin migrate --output json` printed".to_owned(),
            reason,
        };
        let mut phases = Vec::new();
        for line in said.lines() {
            let event: Value = serde_json::from_str(line).map_err(|error| unreadable(error.to_string()))?;
            let number = |key: &str| {
                let number = event.get(key).and_then(Value::as_u64);
                number.ok_or_else(|| unreadable(format!("no {key} in {line}")))
            };
            match event.get("event").and_then(Value::as_str) {
                Some("phase") => {
                    let name = event.get("phase").and_then(Value::as_str).unwrap_or_default();
                    phases.push((name.to_owned(), Duration::from_millis(number("elapsed_ms")?)));
                }
                Some("report") => {
                    return Ok(Migrated {
                        total: Duration::from_millis(number("total_ms")?),
                        blackout: Duration::from_millis(number("blackout_ms")?),
                        memory_sent: number("memory_sent_bytes")?,
                        wall,
                        begun,
                        phases,
                    });
                }
                _ => {}
            }
        }
        Err(unreadable(format!("it holds no report: {said}")))
    }

    /// From the beginning of one phase to that of another; `None` when one was not told.
    #[must_use]
    pub fn between(&self, from: &str, to: &str) -> Option<Duration> {
        let at = |name: &str| self.phases.iter().find(|(phase, _)| phase == name).map(|(_, at)| *at);
        at(to)?.checked_sub(at(from)?)
    }

    /// Each phase and how long it took.
    #[must_use]
    pub fn phases(&self) -> Vec<(String, Duration)> {
        let ends = self.phases.iter().skip(1).map(|(_, at)| *at).chain([self.total]);
        let each = self.phases.iter().zip(ends);
        each.map(|((name, begin), end)| (name.clone(), end.saturating_sub(*begin))).collect()
    }
}

fn command(programs: &Programs, dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(programs.bin_dir.join("dunlin"));
    command.args(["lab", "--dir"]).arg(dir).args(words);
    command
}

/// Runs a program to its end; what it wrote.
///
/// # Errors
/// [`BenchError::Command`] with both outputs, [`BenchError::Deadline`] after three minutes.
pub async fn output_of(mut command: Command) -> Result<String, BenchError> {
    let shown = format!("{:?}", command.as_std()).replace('"', "");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ran = timeout(COMMAND, command.output()).await;
    let late = |_| BenchError::Deadline { what: format!("the end of `{shown}`"), within: COMMAND };
    let output = ran.map_err(late)?.map_err(BenchError::io(format!("start `{shown}`")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = [text(&output.stdout), text(&output.stderr)].join("\n").trim().to_owned();
    Err(BenchError::Command { command: shown, status: output.status.to_string(), output: said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_with_its_phases() {
        let said = concat!(
            r#"{"event":"started","session":"s"}"#,
            "\n",
            r#"{"event":"phase","phase":"transfer","elapsed_ms":700}"#,
            "\n",
            r#"{"event":"phase","phase":"stop-source","elapsed_ms":1500}"#,
            "\n",
            r#"{"event":"report","total_ms":1600,"blackout_ms":90,"memory_sent_bytes":5}"#,
        );
        let migrated = Migrated::read(said, Instant::now(), Duration::ZERO).expect("readable");
        assert_eq!(migrated.between("transfer", "stop-source"), Some(Duration::from_millis(800)));
        assert_eq!(migrated.between("transfer", "run"), None);
        assert_eq!(migrated.phases()[1], ("stop-source".to_owned(), Duration::from_millis(100)));
        assert!(Migrated::read("{}", Instant::now(), Duration::ZERO).is_err());
    }
}
