//! One process: its exit is told only after its output is delivered.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::lock;
use crate::reaper::{Exit, Watched};
use crate::stdio::Relays;
use crate::stdio::pty::Pty;

/// How long output must be dry, and the exit past, before a stream that is still open is cut.
const QUIET: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
/// How long a killed process's output may wait for the host after its end.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(10);

/// A process that was started, running or not.
#[derive(Debug)]
pub struct Process {
    watched: Watched,
    /// Closed when the exit is told: the process itself is kept as long as its container.
    terminal: Arc<Mutex<Option<Pty>>>,
    reported: watch::Receiver<Option<Exit>>,
    killed: watch::Sender<bool>,
}

impl Process {
    /// Watches over a process and its relays. `on_exit` runs as soon as it has ended, before the
    /// output is drained; `on_report` once the exit may be told.
    pub fn supervise(
        watched: Watched,
        terminal: Option<Pty>,
        mut relays: Relays,
        on_exit: impl FnOnce() + Send + 'static,
        on_report: impl FnOnce(Exit) + Send + 'static,
    ) -> Process {
        let (report, reported) = watch::channel(None);
        let mut ending = watched.clone();
        let terminal = Arc::new(Mutex::new(terminal));
        let to_close = Arc::clone(&terminal);
        let (killed, mut told) = watch::channel(false);
        tokio::spawn(async move {
            let exit = ending.wait().await;
            on_exit();
            relays.stop_input();
            let patience = async {
                if told.wait_for(|killed| *killed).await.is_err() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(LAST_WORDS).await;
            };
            tokio::select! {
                () = deliver(&mut relays) => {}
                () = patience => tracing::warn!("nobody takes the output of a process that was killed"),
            }
            drop(relays);
            drop(lock(&to_close).take());
            report.send_replace(Some(exit));
            on_report(exit);
        });
        Process { watched, terminal, reported, killed }
    }

    /// It was told to end for good: output that nobody takes shall not hold back its exit for ever.
    pub fn kill_told(&self) {
        self.killed.send_replace(true);
    }

    /// What is known of its end.
    pub fn watched(&self) -> &Watched {
        &self.watched
    }

    /// Its terminal, until its exit is told.
    pub fn terminal(&self) -> Option<Pty> {
        lock(&self.terminal).clone()
    }

    /// When it ended, if it has.
    pub fn ended_at(&self) -> Option<SystemTime> {
        self.watched.exited_at()
    }

    /// Waits until its exit may be told.
    pub async fn wait(&self) -> Option<Exit> {
        let mut reported = self.reported.clone();
        match reported.wait_for(Option::is_some).await {
            Ok(exit) => *exit,
            Err(_) => None,
        }
    }
}

/// Until the host has all output of a process that has ended.
async fn deliver(relays: &mut Relays) {
    let ended = Instant::now();
    while !relays.outputs_ended() {
        // A process that was silent for long has its last words too.
        if ended.elapsed() >= QUIET {
            relays.cut_dry_outputs(QUIET);
        }
        tokio::time::sleep(POLL).await;
    }
    relays.drained().await;
}
