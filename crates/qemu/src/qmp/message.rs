//! The four kinds of line that QEMU sends.

use serde::Deserialize;
use serde_json::Value;

/// When QEMU saw something happen, by the host's realtime clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970; -1 when QEMU could not tell.
    pub seconds: i64,
    /// Microseconds within the second; -1 when QEMU could not tell.
    pub microseconds: i64,
}

impl Timestamp {
    /// Nanoseconds since 1970, or `None` when QEMU could not tell.
    pub fn unix_nanos(self) -> Option<u64> {
        let seconds = u64::try_from(self.seconds).ok()?;
        let microseconds = u64::try_from(self.microseconds).ok()?;
        seconds.checked_mul(1_000_000_000)?.checked_add(microseconds.checked_mul(1000)?)
    }
}

/// An event as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct RawEvent {
    /// Its QMP name, such as `STOP`.
    pub name: String,
    /// Its data; null when it has none.
    pub data: Value,
    /// When QEMU emitted it.
    pub time: Timestamp,
}

#[derive(Debug)]
pub(super) enum Incoming {
    Greeting,
    Reply { id: u64, result: Result<Value, Refusal> },
    Event(RawEvent),
}

#[derive(Debug, Deserialize)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

/// Lines grow over QEMU's versions, so unknown members are ignored here.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    // An answer may be JSON null: `Option<Value>` alone would read that as no answer.
    #[serde(rename = "return", default, deserialize_with = "present")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// One line, or why it is none of the four kinds.
pub(super) fn parse(line: &[u8]) -> Result<Incoming, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if let Some(name) = line.event {
        let time = line.timestamp.ok_or_else(|| format!("event {name} has no timestamp"))?;
        return Ok(Incoming::Event(RawEvent { name, data: line.data, time }));
    }
    if line.greeting.is_some() {
        return Ok(Incoming::Greeting);
    }
    let result = match (line.answer, line.error) {
        (Some(answer), None) => Ok(answer),
        (None, Some(refusal)) => Err(refusal),
        _ => return Err("neither a greeting, an answer, a refusal nor an event".to_owned()),
    };
    match (line.id, result) {
        (Some(id), result) => Ok(Incoming::Reply { id, result }),
        // QEMU leaves the id out only when it could not read the command at all.
        (None, Err(refusal)) => Err(format!("QEMU could not read a command: {}", refusal.desc)),
        (None, Ok(_)) => Err("an answer without an id".to_owned()),
    }
}
