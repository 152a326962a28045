//! What the QEMUs of a lab report, heard from outside through a second monitor.
//!
//! The lab's shims are told to start QEMU through a wrapper that adds a monitor of our own and execs the
//! real one: shim and QEMU behave as ever, and STOP and RESUME carry the same QEMU's timestamps as on
//! the bare side.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dunlin_qemu::qmp::{QmpClient, RawEvent};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use crate::BenchError;
use crate::lab::{Host, Lab};

const LOOK: Duration = Duration::from_millis(20);
const GREETING: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 25;
const SOCKETS: &str = "run/bench";

/// `$$` stays QEMU's process id: the shell becomes QEMU.
const WRAPPER: &str = "#!/bin/sh\n\
    exec qemu-system-x86_64 \"$@\" -chardev socket,id=bench0,server=on,wait=off,path=/run/bench/$$.sock \
    -mon chardev=bench0,mode=control\n";

/// Puts the wrapper in place on hosts that are up: shims read their configuration when they start.
pub(crate) fn install(hosts: &[PathBuf]) -> Result<(), BenchError> {
    for host in hosts {
        let wrapper = host.join("etc/observed-qemu");
        let config = host.join("etc/config.toml");
        let put = || {
            fs::create_dir_all(host.join(SOCKETS))?;
            fs::write(&wrapper, WRAPPER)?;
            fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
            let text = fs::read_to_string(&config)?;
            fs::write(&config, text.replace("[vm]\n", "[vm]\nqemu = \"/etc/dunlin/observed-qemu\"\n"))
        };
        put().map_err(BenchError::io(format!("set up observation of {}", host.display())))?;
    }
    Ok(())
}

/// What a QEMU reported, and at a STOP how much memory it had still to send.
#[derive(Debug)]
struct Heard {
    host: Host,
    event: RawEvent,
    left: Option<u64>,
}

type Events = Arc<Mutex<Vec<Heard>>>;

/// Collects events until dropped.
#[derive(Debug)]
pub struct Observer {
    events: Events,
    looking: JoinHandle<()>,
}

impl Observer {
    /// Hears every QEMU of the lab, those to come included.
    #[must_use]
    pub fn start(lab: &Lab) -> Observer {
        let events = Arc::default();
        let directories = Host::ALL.map(|host| (host, lab.host_dir(host).join(SOCKETS)));
        let looking = tokio::spawn(look(directories, Arc::clone(&events)));
        Observer { events, looking }
    }

    /// From the latest STOP on `from` to the latest RESUME on its other host, by QEMU's timestamps. `None`
    /// while that RESUME has not come.
    #[must_use]
    pub fn blackout(&self, from: Host) -> Option<Duration> {
        let (stop, resume) = self.pause(from)?;
        resume.duration_since(stop).ok()
    }

    /// Both ends of it.
    #[must_use]
    pub fn pause(&self, from: Host) -> Option<(SystemTime, SystemTime)> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = |host: Host, name: &str| {
            let of = events.iter().filter(|heard| heard.host == host && heard.event.name == name);
            of.filter_map(|heard| heard.event.time.unix_nanos()).max()
        };
        let at = |nanos| UNIX_EPOCH.checked_add(Duration::from_nanos(nanos));
        let (stop, resume) = (at(latest(from, "STOP")?)?, at(latest(from.other(), "RESUME")?)?);
        (stop <= resume).then_some((stop, resume))
    }

    /// Memory that `from` had still to send at its latest STOP, bytes.
    #[must_use]
    pub fn left(&self, from: Host) -> Option<u64> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().rev().find(|heard| heard.host == from && heard.event.name == "STOP")?.left
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

async fn look(directories: [(Host, PathBuf); 2], events: Events) {
    let mut known = HashSet::new();
    let mut listeners = tokio::task::JoinSet::new();
    loop {
        for (host, directory) in &directories {
            for socket in fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if known.insert(socket.clone()) {
                    listeners.spawn(hear(*host, socket, Arc::clone(&events)));
                }
            }
        }
        while listeners.try_join_next().is_some() {}
        tokio::time::sleep(LOOK).await;
    }
}

async fn hear(host: Host, socket: PathBuf, events: Events) {
    let mut attempts = 0;
    let client = loop {
        match QmpClient::connect(&socket, GREETING).await {
            Ok(client) => break client,
            // Between QEMU's bind and its listen; or one that was only asked for its version.
            Err(_) if attempts < ATTEMPTS => attempts += 1,
            Err(_) => return,
        }
        tokio::time::sleep(LOOK).await;
    };
    let mut heard = client.events();
    loop {
        match heard.recv().await {
            Ok(event) => {
                let left = if event.name == "STOP" { left_to_send(&client).await } else { None };
                events.lock().unwrap_or_else(PoisonError::into_inner).push(Heard { host, event, left });
            }
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Memory that a source has still to send, bytes; `None` when it tells no such figure.
pub(crate) async fn left_to_send(client: &QmpClient) -> Option<u64> {
    let info = client.execute("query-migrate", json!({})).await.ok()?;
    info.get("ram")?.get("remaining")?.as_u64()
}
