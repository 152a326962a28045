//! Every exit that either containerd announces, and every answer to a Wait.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::RecvTimeoutError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use containerd_client::{
    events::TaskExit,
    services::v1::{SubscribeRequest, events_client::EventsClient},
};
use prost::Message;

use crate::{Containerd, Ended, Host, containerd::with_namespace};

const EXIT: &str = "/tasks/exit";
const SUBSCRIBED: Duration = Duration::from_secs(60);
/// What is on its way when a move has turned back has come by then.
const LATE: Duration = Duration::from_secs(2);

/// A TaskExit event.
#[derive(Clone, Debug)]
pub struct Announced {
    /// Whose containerd announced it.
    pub host: Host,
    /// The container.
    pub container: String,
    /// The exec; empty: the init.
    pub exec: String,
    /// How it ended.
    pub ended: Ended,
    /// When the event came.
    pub heard: SystemTime,
}

/// An answer to Wait.
#[derive(Clone, Debug)]
pub struct Answered {
    /// Who answered.
    pub host: Host,
    /// The container.
    pub container: String,
    /// The exec; empty: the init.
    pub exec: String,
    /// The first Wait for this process was 1.
    pub number: usize,
    /// How it ended, or why that is not known there.
    pub ended: Result<Ended, String>,
}

#[derive(Debug, Default)]
struct Heard {
    announced: Vec<Announced>,
    /// Container and exec of each Wait.
    asked: Vec<(String, String)>,
    answered: Vec<Answered>,
    broken: Vec<String>,
}

/// What was heard of exits so far.
#[derive(Clone, Debug, Default)]
pub struct Exits {
    heard: Arc<Mutex<Heard>>,
}

impl Exits {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens to a containerd until the case ends.
    ///
    /// # Panics
    /// When it tells nothing.
    #[track_caller]
    pub fn listen(&self, containerd: &Containerd) {
        let exits = self.clone();
        let host = containerd.host;
        let channel = containerd.channel.clone();
        let (subscribed, ready) = std::sync::mpsc::channel();
        containerd.spawn(async move {
            let topics = [EXIT, "/namespaces/update"];
            let request =
                SubscribeRequest { filters: topics.map(|topic| format!("topic=={topic:?}")).to_vec() };
            let mut events = match EventsClient::new(channel).subscribe(with_namespace(request)).await {
                Ok(events) => events.into_inner(),
                Err(status) => return exits.heard().broken.push(format!("host {host}: {status}")),
            };
            let _ = subscribed.send(());
            loop {
                match events.message().await {
                    Ok(Some(envelope)) if envelope.topic != EXIT => {}
                    Ok(Some(envelope)) => {
                        let bytes = envelope.event.map(|event| event.value).unwrap_or_default();
                        let exit = TaskExit::decode(bytes.as_slice()).unwrap_or_default();
                        let exec = if exit.id == exit.container_id { String::new() } else { exit.id };
                        exits.heard().announced.push(Announced {
                            host,
                            container: exit.container_id,
                            exec,
                            ended: Ended::new(exit.exit_status, exit.exited_at),
                            heard: SystemTime::now(),
                        });
                    }
                    Ok(None) => return,
                    Err(status) => return exits.heard().broken.push(format!("host {host}: {status}")),
                }
            }
        });
        // containerd answers with the first event only, and what is sent before it listens is missed: it
        // listens as soon as a namespace's label is heard of.
        let since = Instant::now();
        for label in 1.. {
            containerd.label_namespace("heard", &label.to_string());
            // Broken off is an answer too, and told with the first exit that is asked for.
            if ready.recv_timeout(Duration::from_millis(200)) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            assert!(since.elapsed() < SUBSCRIBED, "no events of host {host}");
        }
    }

    /// Asks a containerd for the end of a process; the answer is kept whenever it comes.
    pub fn ask(&self, containerd: &Containerd, container: &str, exec: &str) {
        let exits = self.clone();
        let (host, id, exec_id) = (containerd.host, container.to_owned(), exec.to_owned());
        self.heard().asked.push((id.clone(), exec_id.clone()));
        let number = self.asked(container, exec);
        containerd.wait(container, exec, move |ended| {
            let ended = ended.map_err(|status| format!("{:?}: {}", status.code(), status.message()));
            exits.heard().answered.push(Answered { host, container: id, exec: exec_id, number, ended });
        });
    }

    /// What was announced of a process.
    ///
    /// # Panics
    /// When a containerd does not tell any more.
    pub fn announced(&self, container: &str, exec: &str) -> Vec<Announced> {
        let heard = self.heard();
        assert!(heard.broken.is_empty(), "events broke off: {:?}", heard.broken);
        let is_it = |exit: &&Announced| exit.container == container && exit.exec == exec;
        heard.announced.iter().filter(is_it).cloned().collect()
    }

    /// A move to `host` that began at `since` has turned back: its containerd saw tasks come that never ran there, and
    /// is told that they have ended with 137, so that they can be deleted. Those are no exits of the processes.
    ///
    /// # Panics
    /// When one of them was told more than once.
    #[track_caller]
    pub fn set_aside_arrivals(&self, host: Host, since: SystemTime) {
        // One that came after this would count as an exit.
        thread::sleep(LATE);
        let mut heard = self.heard();
        let aborted = |exit: &Announced| exit.host == host && exit.heard >= since && exit.ended.code == 137;
        let mut names: Vec<String> = heard
            .announced
            .iter()
            .filter(|exit| aborted(exit))
            .map(|exit| format!("{}/{}", exit.container, exit.exec))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(
            names.len(),
            all,
            "host {host} announced more than one end of an arrival: {:#?}",
            heard.announced
        );
        heard.announced.retain(|exit| !aborted(exit));
    }

    /// All that was announced.
    pub fn all_announced(&self) -> Vec<Announced> {
        self.heard().announced.clone()
    }

    /// What was answered of a process.
    pub fn answered(&self, container: &str, exec: &str) -> Vec<Answered> {
        let is_it = |exit: &&Answered| exit.container == container && exit.exec == exec;
        self.heard().answered.iter().filter(is_it).cloned().collect()
    }

    /// How often the end of a process was waited for.
    fn asked(&self, container: &str, exec: &str) -> usize {
        self.heard().asked.iter().filter(|(id, exec_id)| id == container && exec_id == exec).count()
    }

    /// Waits for the answer to the Wait that was asked last.
    ///
    /// # Panics
    /// When there is none after `deadline`.
    #[track_caller]
    pub fn await_last_answer(&self, container: &str, exec: &str, deadline: Duration) -> Answered {
        let (since, last) = (Instant::now(), self.asked(container, exec));
        loop {
            let answered = self.answered(container, exec);
            if let Some(answer) = answered.into_iter().find(|answer| answer.number == last) {
                return answer;
            }
            assert!(
                since.elapsed() < deadline,
                "Wait {last} for {container} {exec} has no answer after {deadline:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for a process's first announcement.
    ///
    /// # Panics
    /// When there is none after `deadline`.
    #[track_caller]
    pub fn await_one(&self, container: &str, exec: &str, deadline: Duration) -> Announced {
        self.await_first(container, exec, deadline, |_| true)
    }

    /// Waits for a process's first announcement by one host's containerd.
    ///
    /// # Panics
    /// When there is none after `deadline`.
    #[track_caller]
    pub fn await_one_of(&self, host: Host, container: &str, exec: &str, deadline: Duration) -> Announced {
        self.await_first(container, exec, deadline, |exit| exit.host == host)
    }

    #[track_caller]
    fn await_first(
        &self,
        container: &str,
        exec: &str,
        deadline: Duration,
        is_meant: impl Fn(&Announced) -> bool,
    ) -> Announced {
        let since = Instant::now();
        loop {
            if let Some(exit) = self.announced(container, exec).into_iter().find(&is_meant) {
                return exit;
            }
            assert!(since.elapsed() < deadline, "no exit of {container} {exec} after {deadline:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}
