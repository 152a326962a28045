//! A QEMU that runs no machine: a process that is started, asked over QMP and killed like one, and in the machine's
//! place a [`FakeGuest`] behind the same socket.
//!
//! The process is a shell script that says how it was started and waits. Both of its sockets are served from here.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use super::{FakeGuest, Faults, Script};

/// Between two looks at whether it was started.
const LOOK: Duration = Duration::from_millis(20);

/// The program and what runs of it: at most one at a time. Dropping it hangs up.
#[derive(Debug)]
pub struct FakeQemu {
    binary: PathBuf,
    running: Arc<Mutex<Option<Running>>>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Running {
    pid: String,
    guest: FakeGuest,
    _monitor: JoinSet<()>,
}

fn lock(running: &Mutex<Option<Running>>) -> MutexGuard<'_, Option<Running>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeQemu {
    /// Puts the program into `directory`. Each machine that is started has a fresh guest whose inits run `script`; all
    /// have these faults.
    ///
    /// # Errors
    /// When the program cannot be written.
    pub fn install(directory: &Path, script: Script, faults: &Faults) -> io::Result<FakeQemu> {
        let (binary, started) = (directory.join("fake-qemu"), directory.join("fake-qemu.started"));
        let said = started.display();
        let text = format!(
            "#!/bin/sh\n{{ echo $$; printf '%s\\n' \"$@\"; }} >{said}.new\nmv {said}.new {said}\nexec sleep 3600\n"
        );
        std::fs::write(&binary, text)?;
        std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755))?;
        let running = Arc::new(Mutex::new(None));
        let serving = tokio::spawn(serve(started, script, faults.clone(), Arc::clone(&running)));
        Ok(FakeQemu { binary, running, serving })
    }

    /// What a configuration names as QEMU.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// What the newest machine's guest was asked; see [`FakeGuest::journal`].
    #[must_use]
    pub fn journal(&self) -> Vec<String> {
        lock(&self.running).as_ref().map(|running| running.guest.journal()).unwrap_or_default()
    }

    /// The newest machine dies, and its guest with it.
    pub fn kill(&self) {
        if let Some(running) = lock(&self.running).take() {
            kill(&running.pid);
        }
    }
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        self.serving.abort();
        self.kill();
    }
}

fn kill(pid: &str) {
    // A process that is gone already is fine.
    let _ = std::process::Command::new("kill").args(["-9", pid]).stderr(std::process::Stdio::null()).status();
}

async fn serve(started: PathBuf, script: Script, faults: Faults, running: Arc<Mutex<Option<Running>>>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Ok(text) = std::fs::read_to_string(&started) else { continue };
        let _ = std::fs::remove_file(&started);
        let mut lines = text.lines();
        let pid = lines.next().unwrap_or_default().to_owned();
        let socket = |id: &str| {
            let chardev = text.lines().find(|line| line.starts_with(&format!("socket,id={id},")))?;
            chardev.split_once("path=").map(|(_, path)| PathBuf::from(path))
        };
        let (Some(qmp), Some(link)) = (socket("qmp0"), socket("link0")) else {
            panic!("a QEMU was started without a monitor or a link: {text}");
        };
        let guest = FakeGuest::start_with(&link, script.clone(), &faults);
        let listener = UnixListener::bind(qmp).expect("a monitor's socket");
        let mut monitor = JoinSet::new();
        let of = pid.clone();
        monitor.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = answer(stream, &of).await;
            }
        });
        *lock(&running) = Some(Running { pid, guest, _monitor: monitor });
    }
}

/// One monitor connection: everything is done at once.
async fn answer(stream: UnixStream, pid: &str) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let greeting = json!({ "QMP": { "version": { "qemu": { "major": 7, "minor": 2, "micro": 0 } }, "capabilities": [] } });
    write.write_all(format!("{greeting}\n").as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let command: Value = serde_json::from_str(&line)?;
        let done = match command["execute"].as_str() {
            Some("query-status") => json!({ "status": "running", "running": true }),
            _ => json!({}),
        };
        let answer = json!({ "return": done, "id": command["id"] });
        write.write_all(format!("{answer}\n").as_bytes()).await?;
        match command["execute"].as_str() {
            Some("device_del") => {
                let event = json!({
                    "event": "DEVICE_DELETED",
                    "data": { "device": command["arguments"]["id"] },
                    "timestamp": { "seconds": 0, "microseconds": 0 },
                });
                write.write_all(format!("{event}\n").as_bytes()).await?;
            }
            Some("quit") => kill(pid),
            _ => {}
        }
    }
    Ok(())
}
