//! Logging that never blocks: kernel log until the link is up, then JSON lines to the host.
//!
//! Records wait in a bounded queue; when it is full the oldest goes and is counted. Warnings and
//! errors go to the kernel log as well, where the console shows the errors.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// Records kept while the host does not listen.
const QUEUE_BOUND: usize = 1024;
/// Longest line, in bytes; a longer message is cut.
const LINE_BOUND: usize = 8 * 1024;

#[derive(Default)]
struct Lines {
    waiting: VecDeque<String>,
    dropped: u64,
}

/// The queue between whoever logs and the task that ships to the host.
#[derive(Clone, Default)]
pub struct Queue {
    lines: Arc<Mutex<Lines>>,
    added: Arc<Notify>,
    shipping: Arc<AtomicBool>,
}

impl Queue {
    /// Adds a line; the oldest one makes room.
    pub fn push(&self, line: String) {
        {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.waiting.len() >= QUEUE_BOUND {
                lines.waiting.pop_front();
                lines.dropped += 1;
            }
            lines.waiting.push_back(line);
        }
        self.added.notify_one();
    }

    /// Waits for the next line, newline included. After a loss the first one tells how many.
    pub async fn next(&self) -> String {
        loop {
            if let Some(line) = self.take() {
                return line;
            }
            self.added.notified().await;
        }
    }

    /// From now on (or no longer) the host reads along, so the kernel log gets warnings only.
    pub fn set_shipping(&self, on: bool) {
        self.shipping.store(on, Ordering::Relaxed);
    }

    fn take(&self) -> Option<String> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.dropped > 0 {
            let dropped = std::mem::take(&mut lines.dropped);
            return Some(format!(
                "{{\"level\":\"WARN\",\"message\":\"log records were dropped while the host did not listen\",\"dropped\":{dropped}}}\n"
            ));
        }
        lines.waiting.pop_front()
    }
}

/// Starts logging to the kernel log and into the returned queue.
pub fn start() -> Queue {
    let queue = Queue::default();
    install(Records { name: "dunlin-guest", kmsg: kmsg(), queue: Some(queue.clone()) }, LevelFilter::INFO);
    queue
}

/// Starts logging of warnings to the kernel log alone, for a short-lived process.
pub fn to_kmsg_only(name: &'static str) {
    install(Records { name, kmsg: kmsg(), queue: None }, LevelFilter::WARN);
}

fn install(records: Records, level: LevelFilter) {
    // Fails only when a test has installed one already; that one serves as well.
    let subscriber = tracing_subscriber::registry().with(records.with_filter(level));
    let _ = tracing::subscriber::set_global_default(subscriber);
    let name = if std::process::id() == 1 { "PID 1" } else { "a helper process" };
    std::panic::set_hook(Box::new(move |panic| tracing::error!(%panic, "{name} panicked")));
}

fn kmsg() -> Option<Mutex<File>> {
    crate::oci::helper::kmsg().map(Mutex::new)
}

struct Records {
    name: &'static str,
    kmsg: Option<Mutex<File>>,
    queue: Option<Queue>,
}

impl<S: Subscriber> Layer<S> for Records {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let shipped = self.queue.as_ref().is_some_and(|queue| queue.shipping.load(Ordering::Relaxed));
        if !shipped || level <= Level::WARN {
            self.to_kernel(level, &fields);
        }
        if let Some(queue) = &self.queue {
            queue.push(fields.line(level, event.metadata().target()));
        }
    }
}

impl Records {
    fn to_kernel(&self, level: Level, fields: &Fields) {
        let Some(kmsg) = &self.kmsg else { return };
        let priority = match level {
            // A helper's failure is told in its answer; the console is for PID 1's.
            Level::ERROR if self.queue.is_none() => 4,
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        let mut text = format!("<{priority}>{}: {}", self.name, fields.message.replace('\n', " "));
        for (name, value) in &fields.others {
            let _ = write!(text, " {name}={value}");
        }
        text.truncate(text.floor_char_boundary(900));
        let mut kmsg = kmsg.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = kmsg.write_all(text.as_bytes());
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn line(mut self, level: Level, target: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.message.truncate(self.message.floor_char_boundary(LINE_BOUND));
        let mut record = Map::new();
        record.insert("time_unix_nanos".into(), u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).into());
        record.insert("level".into(), level.as_str().into());
        record.insert("target".into(), target.into());
        record.insert("message".into(), self.message.into());
        record.append(&mut self.others);
        let mut line = Value::Object(record).to_string();
        line.push('\n');
        line
    }

    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        } else {
            self.others.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = format!("{value:?}");
        text.truncate(text.floor_char_boundary(LINE_BOUND));
        self.put(field, text.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn full_queue_drops_the_oldest_and_says_so() {
        let queue = Queue::default();
        for n in 0..QUEUE_BOUND + 3 {
            queue.push(format!("{n}\n"));
        }
        assert!(queue.next().await.contains("\"dropped\":3"));
        assert_eq!(queue.next().await, "3\n");
    }

    #[test]
    fn records_are_one_json_line() {
        let fields = Fields { message: "two\nlines".into(), others: Map::new() };
        let line = fields.line(Level::WARN, "here");
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&value["level"], &value["message"]), (&"WARN".into(), &"two\nlines".into()));
    }
}
