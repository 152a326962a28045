//! Where every stdio stream stood when the guest was paused: `dunlin.handoff.v1`.
//!
//! The source says it once its transfer is complete, the destination goes on from it: no byte twice, none
//! lost. Positions count the bytes of a stream from its beginning. Frames are those that reached the source for the
//! guest while nobody read them.

use std::collections::BTreeMap;

use crate::Any;
use crate::envelope::{self, EnvelopeError, Payload};
use crate::ids::{ContainerId, ExecId, IdError};
use crate::saved;

/// Largest encoded handoff, bytes.
pub const HANDOFF_MAX: usize = <saved::Handoff as Payload>::CAP;
/// Most input that one process may have pending, bytes: what a sender keeps, and a full FIFO or two behind it.
pub const PENDING_MAX: usize = 512 << 10;
/// Most processes of one handoff.
pub const HANDOFF_PROCESSES_MAX: usize = 1 << 14;
/// Most bytes of frames for the network cards of one handoff.
pub const FRAMES_MAX: usize = 1 << 20;
/// Bytes of the virtio network header before each frame.
pub const VNET_HEADER: usize = 10;
/// Longest frame with the header before it: the longest packet that offloading makes, and its Ethernet header.
pub const FRAME_MAX: usize = VNET_HEADER + 18 + 65_535;
/// Shortest: both headers and nothing after them.
const FRAME_MIN: usize = VNET_HEADER + 14;
/// Most network cards of one handoff.
const NICS_MAX: usize = crate::tree::ENDPOINTS_MAX * crate::tree::PODS_MAX;

const PLACE: &str = "handoff";

/// A handoff is refused. Each names the place, the reason and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandoffError {
    /// The envelope.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// An id's shape.
    #[error(transparent)]
    Field(#[from] IdError),
    /// One process stands twice.
    #[error(
        "{place}: process {exec:?} of container {container} stands twice; pass on the handoff as the source gave it"
    )]
    Twice {
        /// Where the second one is.
        place: String,
        /// The guest's id of its container.
        container: String,
        /// Its exec id.
        exec: String,
    },
    /// More of something than is allowed.
    #[error("{place}: {count} {what} are more than the {limit} allowed; {remedy}")]
    TooMany {
        /// Where.
        place: String,
        /// Processes, or bytes of pending input.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many may be.
        limit: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// A network card stands twice.
    #[error("{place}: the network card {nic:?} stands twice; pass on the handoff as the source gave it")]
    NicTwice {
        /// Where the second one is.
        place: String,
        /// Its id.
        nic: String,
    },
    /// A frame cannot be one.
    #[error(
        "{place}: {length} bytes are no frame, which has {FRAME_MIN} to {FRAME_MAX}; \
         pass on the handoff as the source gave it"
    )]
    NoFrame {
        /// Where.
        place: String,
        /// Bytes.
        length: usize,
    },
    /// A stream cannot be so long.
    #[error(
        "{place}: {pending} bytes after position {acknowledged} are beyond what a stream can hold; \
         pass on the handoff as the source gave it"
    )]
    BeyondEnd {
        /// Where.
        place: String,
        /// The position.
        acknowledged: u64,
        /// Bytes after it.
        pending: usize,
    },
}

/// The streams of every process that has some, and what came for the network cards meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Handoff {
    /// By container and exec.
    pub processes: BTreeMap<HandoffKey, StreamPositions>,
    /// Frames by the network card's id, in the order in which they came: each a virtio network header of
    /// [`VNET_HEADER`] bytes and an Ethernet frame. At most [`FRAMES_MAX`] bytes in all.
    pub frames: BTreeMap<String, Vec<Vec<u8>>>,
}

/// Which process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HandoffKey {
    /// The guest's id of its container.
    pub container: ContainerId,
    /// Its exec id; the init's is "".
    pub exec: String,
}

/// Where one process's streams stood. None: that stream is not connected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamPositions {
    /// Bytes of standard output that were taken for good.
    pub stdout: Option<u64>,
    /// Bytes of standard error that were taken for good.
    pub stderr: Option<u64>,
    /// Standard input.
    pub stdin: Option<InputPosition>,
}

/// Where a process's input stood.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InputPosition {
    /// Bytes that the guest has taken for good.
    pub acknowledged: u64,
    /// The bytes after them that were read from the client; at most [`PENDING_MAX`].
    pub pending: Vec<u8>,
    /// Nothing comes after `pending`.
    pub closed: bool,
}

impl Handoff {
    /// The payload's name, `type.dunlin.dev/dunlin.handoff.v1`.
    pub fn type_url() -> String {
        saved::Handoff::type_url()
    }

    /// Opens and checks the payload.
    pub fn open(any: &Any) -> Result<Handoff, HandoffError> {
        let message: saved::Handoff = envelope::open(any, &PLACE)?;
        let count = message.processes.len();
        if count > HANDOFF_PROCESSES_MAX {
            return Err(HandoffError::TooMany {
                place: format!("{PLACE}.processes"),
                what: "processes",
                count,
                limit: HANDOFF_PROCESSES_MAX,
                remedy: "end some before the move",
            });
        }
        let mut processes = BTreeMap::new();
        for (at, one) in message.processes.into_iter().enumerate() {
            let place = format!("{PLACE}.processes[{at}]");
            let container = ContainerId::new(one.guest_container_id)
                .map_err(|error| error.of(format_args!("{place}.guest_container_id")))?;
            if !one.exec_id.is_empty() {
                ExecId::new(one.exec_id.as_str())
                    .map_err(|error| error.of(format_args!("{place}.exec_id")))?;
            }
            let stdin = one.stdin.into_option().map(|stdin| input(stdin, &place)).transpose()?;
            let key = HandoffKey { container, exec: one.exec_id };
            let positions = StreamPositions { stdout: one.stdout, stderr: one.stderr, stdin };
            if processes.contains_key(&key) {
                return Err(HandoffError::Twice {
                    place,
                    container: key.container.to_string(),
                    exec: key.exec,
                });
            }
            processes.insert(key, positions);
        }
        Ok(Handoff { processes, frames: frames(message.nics)? })
    }

    /// Seals it, when [`Handoff::open`] would take it.
    pub fn seal(&self) -> Result<Any, HandoffError> {
        let mut message = saved::Handoff::new();
        for (key, positions) in &self.processes {
            let stdin = positions.stdin.as_ref().map(|stdin| saved::Input {
                acknowledged: stdin.acknowledged,
                pending: stdin.pending.clone(),
                closed: stdin.closed,
                ..saved::Input::default()
            });
            message.processes.push(saved::ProcessStreams {
                guest_container_id: key.container.to_string(),
                exec_id: key.exec.clone(),
                stdout: positions.stdout,
                stderr: positions.stderr,
                stdin: stdin.into(),
                ..saved::ProcessStreams::default()
            });
        }
        for (nic, frames) in &self.frames {
            message.nics.push(saved::NicFrames {
                nic_id: nic.clone(),
                frames: frames.clone(),
                ..saved::NicFrames::default()
            });
        }
        let any = envelope::seal(message);
        Handoff::open(&any)?;
        Ok(any)
    }
}

fn frames(nics: Vec<saved::NicFrames>) -> Result<BTreeMap<String, Vec<Vec<u8>>>, HandoffError> {
    let too_many = |what, count, limit| HandoffError::TooMany {
        place: format!("{PLACE}.nics"),
        what,
        count,
        limit,
        remedy: "pass on the handoff as the source gave it",
    };
    if nics.len() > NICS_MAX {
        return Err(too_many("network cards", nics.len(), NICS_MAX));
    }
    let bytes = nics.iter().flat_map(|nic| &nic.frames).map(Vec::len).sum();
    if bytes > FRAMES_MAX {
        return Err(too_many("bytes of frames", bytes, FRAMES_MAX));
    }
    let mut all = BTreeMap::new();
    for (at, nic) in nics.into_iter().enumerate() {
        let place = || format!("{PLACE}.nics[{at}]");
        for (number, frame) in nic.frames.iter().enumerate() {
            if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) {
                let place = format!("{}.frames[{number}]", place());
                return Err(HandoffError::NoFrame { place, length: frame.len() });
            }
        }
        if all.contains_key(&nic.nic_id) {
            let nic = nic.nic_id.chars().take(80).collect();
            return Err(HandoffError::NicTwice { place: place(), nic });
        }
        all.insert(nic.nic_id, nic.frames);
    }
    Ok(all)
}

fn input(message: saved::Input, place: &str) -> Result<InputPosition, HandoffError> {
    let pending = message.pending.len();
    if pending > PENDING_MAX {
        return Err(HandoffError::TooMany {
            place: format!("{place}.stdin.pending"),
            what: "bytes of pending input",
            count: pending,
            limit: PENDING_MAX,
            remedy: "wait until the process has read some of its input",
        });
    }
    if message.acknowledged.checked_add(pending as u64).is_none() {
        return Err(HandoffError::BeyondEnd {
            place: format!("{place}.stdin"),
            acknowledged: message.acknowledged,
            pending,
        });
    }
    Ok(InputPosition { acknowledged: message.acknowledged, pending: message.pending, closed: message.closed })
}

#[cfg(test)]
#[path = "handoff_tests.rs"]
mod tests;
