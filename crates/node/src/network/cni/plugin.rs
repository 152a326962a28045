//! One call of one plugin.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::CniError;

/// A plugin asks for addresses on the network at most.
const LIMIT: Duration = Duration::from_secs(30);

/// What every plugin of a chain is told in the same way.
pub(super) struct Call<'a> {
    /// ADD or DEL.
    pub(super) command: &'static str,
    /// An id that is this namespace's alone.
    pub(super) container: &'a str,
    pub(super) namespace: &'a Path,
    /// The interface's name inside.
    pub(super) interface: &'a str,
    pub(super) bin_dir: &'a Path,
}

impl Call<'_> {
    /// Runs plugin `kind`. Answers what it printed, `Null` when that was nothing.
    pub(super) async fn run(&self, kind: &str, arguments: &str, stdin: &Value) -> Result<Value, CniError> {
        let refused =
            |reason: String| CniError::Refused { plugin: kind.into(), command: self.command, reason };
        let program = self.bin_dir.join(kind);
        if kind.contains('/') || !program.is_file() {
            return Err(CniError::NoPlugin { plugin: kind.into(), dir: self.bin_dir.to_owned() });
        }
        let mut child = Command::new(&program)
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", self.container)
            .env("CNI_NETNS", self.namespace)
            .env("CNI_IFNAME", self.interface)
            .env("CNI_PATH", self.bin_dir)
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| refused(error.to_string()))?;
        let mut input = child.stdin.take();
        let text = stdin.to_string();
        let talking = async {
            if let Some(mut input) = input.take() {
                // One that refuses at once reads nothing; what it says counts.
                let _ = input.write_all(text.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let late = |_| CniError::Late { plugin: kind.into(), command: self.command, limit: LIMIT };
        let output = tokio::time::timeout(LIMIT, talking).await.map_err(late)?;
        let output = output.map_err(|error| refused(error.to_string()))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let answer: Option<Value> = match said.trim() {
            "" => Some(Value::Null),
            said => serde_json::from_str(said).ok(),
        };
        match answer {
            Some(answer) if output.status.success() => Ok(answer),
            Some(answer) if answer["msg"].is_string() => {
                let words =
                    [&answer["msg"], &answer["details"]].map(|word| word.as_str().unwrap_or_default());
                Err(refused(words.join(" ").trim().to_owned()))
            }
            _ => {
                let errors = String::from_utf8_lossy(&output.stderr);
                Err(refused(format!("{} ({}) {}", said.trim(), output.status, errors.trim())))
            }
        }
    }
}
