//! The ids that cross between processes and hosts. Each is a shape that is checked once, on
//! entry; whoever holds one need not look again.
//!
//! Text ids of sandboxes, containers and execs become parts of paths, so they follow
//! containerd's own rule for identifiers and cannot hold a separator or `..`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest [`SessionId`], bytes.
pub const SESSION_ID_MAX: usize = 256;
/// Longest containerd identifier, bytes (containerd `pkg/identifiers`).
pub const IDENTIFIER_MAX: usize = 76;
/// Controllers that a virtual machine has.
pub const CONTROLLERS: u8 = 4;
/// LUNs of one controller.
pub const LUNS: u8 = 64;

/// A value is not what its field asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {reason}; {remedy}")]
pub struct IdError {
    /// Which field, e.g. `session_id` or `vm.scsi.disks[300]`.
    pub field: String,
    /// What was given, shortened to 80 characters.
    pub value: String,
    /// What is wrong with it.
    pub reason: &'static str,
    /// What would be right.
    pub remedy: &'static str,
}

impl IdError {
    pub(crate) fn new(
        field: impl fmt::Display,
        value: &str,
        reason: &'static str,
        remedy: &'static str,
    ) -> IdError {
        IdError { field: field.to_string(), value: value.chars().take(80).collect(), reason, remedy }
    }

    /// The same error, told of `field`: a nested value's full path is known only to its parent.
    #[must_use]
    pub fn of(mut self, field: impl fmt::Display) -> IdError {
        self.field = field.to_string();
        self
    }
}

fn check_session(field: &'static str, text: &str) -> Result<(), IdError> {
    const REMEDY: &str =
        "give 1 to 256 bytes without blanks, e.g. a UUID, the same in every call of one move";
    if text.is_empty() {
        return Err(IdError::new(field, text, "is empty", REMEDY));
    }
    if text.len() > SESSION_ID_MAX {
        return Err(IdError::new(field, text, "is longer than 256 bytes", REMEDY));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(IdError::new(field, text, "holds a blank or a control character", REMEDY));
    }
    Ok(())
}

fn check_identifier(field: &'static str, text: &str) -> Result<(), IdError> {
    const REMEDY: &str = "give 1 to 76 letters and digits, separated by single '.', '_' or '-'";
    if text.is_empty() {
        return Err(IdError::new(field, text, "is empty", REMEDY));
    }
    if text.len() > IDENTIFIER_MAX {
        return Err(IdError::new(field, text, "is longer than 76 bytes", REMEDY));
    }
    let mut after_separator = true;
    for c in text.chars() {
        match c {
            'A'..='Z' | 'a'..='z' | '0'..='9' => after_separator = false,
            '.' | '_' | '-' if !after_separator => after_separator = true,
            _ => return Err(IdError::new(field, text, "is not a containerd identifier", REMEDY)),
        }
    }
    if after_separator {
        return Err(IdError::new(field, text, "ends in a separator", REMEDY));
    }
    Ok(())
}

/// One spelling of each.
pub(crate) fn check_uuid(field: &'static str, text: &str) -> Result<(), IdError> {
    let shaped = text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
        });
    if shaped { Ok(()) } else { Err(not_a_uuid(field, text)) }
}

fn not_a_uuid(field: &'static str, text: &str) -> IdError {
    IdError::new(field, text, "is not a UUID", "give 36 characters, lower case, 8-4-4-4-12")
}

fn check_digest(field: &'static str, text: &str) -> Result<(), IdError> {
    let hex = text.strip_prefix("sha256:").or_else(|| text.strip_prefix("sparse-sha256:")).unwrap_or("");
    if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Ok(());
    }
    let remedy = "give sha256: (or sparse-sha256:) and 64 lower-case hex digits";
    Err(IdError::new(field, text, "is not a SHA-256 digest", remedy))
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $field:literal, $check:path) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text`; the error names the field.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                $check($field, &text)?;
                Ok(Self(text))
            }

            /// The text as it crosses the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id! {
    /// One move of one sandbox, as its caller names it. 1 to 256 bytes, no blanks.
    SessionId, "session_id", check_session
}
text_id! {
    /// A sandbox: containerd's identifier.
    SandboxId, "sandbox_id", check_identifier
}
text_id! {
    /// A container: containerd's identifier on a host, or the guest's id, which never changes.
    ContainerId, "container_id", check_identifier
}
text_id! {
    /// An exec in a container: containerd's identifier. The init process has none.
    ExecId, "exec_id", check_identifier
}
text_id! {
    /// `sha256:<64 hex digits>`, of all bytes; or `sparse-sha256:<64 hex digits>`, of those that are not zeros and where
    /// they are.
    Digest, "digest", check_digest
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $field:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let number = text.parse().map_err(|_| {
                    IdError::new($field, text, "is not a number in range", "give a decimal number")
                })?;
                Ok(Self(number))
            }
        }
    };
}

number_id! {
    /// A process as the guest's kernel numbers it, in the guest's root PID namespace.
    GuestPid(u32), "guest_pid"
}
number_id! {
    /// A port of the link that carries one stdio stream.
    StdioPort(u32), "stdio_port"
}
number_id! {
    /// Which of a shim's sessions a completion belongs to; grows by one with each session.
    Epoch(u64), "epoch"
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

/// A reservation of a disk's partition or of a share: a UUID. As text, lower case and hyphenated; in payloads its 16
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ReservationId(Uuid);

impl ReservationId {
    const FIELD: &str = "reservation_id";

    /// One that no other is like.
    pub fn random() -> ReservationId {
        ReservationId(Uuid::new_v4())
    }

    /// Checks `text`; the error names the field.
    pub fn new(text: impl AsRef<str>) -> Result<ReservationId, IdError> {
        let text = text.as_ref();
        check_uuid(Self::FIELD, text)?;
        Uuid::parse_str(text).map(ReservationId).map_err(|_| not_a_uuid(Self::FIELD, text))
    }

    /// Of a payload.
    pub fn from_bytes(bytes: &[u8]) -> Result<ReservationId, IdError> {
        Uuid::from_slice(bytes).map(ReservationId).map_err(|_| {
            let given = format!("{} bytes", bytes.len());
            let remedy = "export again with the same Dunlin version on both hosts";
            IdError::new(Self::FIELD, &given, "are not the 16 bytes of a UUID", remedy)
        })
    }

    /// For a payload.
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.as_bytes().to_vec()
    }
}

impl fmt::Display for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for ReservationId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl TryFrom<String> for ReservationId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl From<ReservationId> for String {
    fn from(id: ReservationId) -> String {
        id.to_string()
    }
}

/// Where a disk is plugged in: controller 0 to 3, LUN 0 to 63. As a number: controller * 64 + LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Slot {
    controller: u8,
    lun: u8,
}

impl Slot {
    /// Refuses a controller above 3 or a LUN above 63.
    pub fn new(controller: u8, lun: u8) -> Result<Slot, IdError> {
        if controller >= CONTROLLERS || lun >= LUNS {
            let given = format!("{controller}:{lun}");
            return Err(IdError::new("slot", &given, "does not exist", "use controller 0 to 3, LUN 0 to 63"));
        }
        Ok(Slot { controller, lun })
    }

    /// Controller, 0 to 3.
    pub fn controller(self) -> u8 {
        self.controller
    }

    /// Logical unit, 0 to 63.
    pub fn lun(self) -> u8 {
        self.lun
    }

    /// controller * 64 + LUN, 0 to 255.
    pub fn number(self) -> u32 {
        u32::from(self.controller) * u32::from(LUNS) + u32::from(self.lun)
    }

    /// Every slot, in order.
    pub fn all() -> impl Iterator<Item = Slot> {
        (0..CONTROLLERS).flat_map(|controller| (0..LUNS).map(move |lun| Slot { controller, lun }))
    }
}

impl TryFrom<u32> for Slot {
    type Error = IdError;
    fn try_from(number: u32) -> Result<Slot, IdError> {
        let luns = u32::from(LUNS);
        match (u8::try_from(number / luns), u8::try_from(number % luns)) {
            (Ok(controller), Ok(lun)) if controller < CONTROLLERS => Ok(Slot { controller, lun }),
            _ => Err(IdError::new("slot", &number.to_string(), "does not exist", "use 0 to 255")),
        }
    }
}

impl From<Slot> for u32 {
    fn from(slot: Slot) -> u32 {
        slot.number()
    }
}

/// The number, decimal.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number())
    }
}

impl FromStr for Slot {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Slot, IdError> {
        // One spelling for each slot: "+7" and "007" would make two names of one stream.
        let number: u32 = text
            .parse()
            .ok()
            .filter(|number: &u32| number.to_string() == text)
            .ok_or_else(|| IdError::new("slot", text, "is not a plain number", "use 0 to 255"))?;
        Slot::try_from(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_session_is_refused_by_name() {
        let error = SessionId::new("").unwrap_err();
        assert_eq!(error.field, "session_id");
        assert!(error.to_string().contains("is empty"), "{error}");
        assert!(SessionId::new("x".repeat(256)).is_ok());
        assert!(SessionId::new("x".repeat(257)).is_err());
        assert!(SessionId::new("a b").is_err());
        assert!(SessionId::new("a\nb").is_err());
    }

    #[test]
    fn identifiers_cannot_leave_a_directory() {
        for bad in ["", "..", ".", "a/b", "../a", "a..b", "-a", "a-", "a\0", "ä"] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
            assert!(SandboxId::new(bad).is_err(), "{bad:?}");
            assert!(ExecId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "web-1", "A.b_c-9"] {
            assert_eq!(ContainerId::new(good).unwrap().to_string(), good);
        }
    }

    #[test]
    fn every_slot_has_one_number() {
        let numbers: Vec<u32> = Slot::all().map(Slot::number).collect();
        assert_eq!(numbers, (0..256).collect::<Vec<_>>());
        for slot in Slot::all() {
            assert_eq!(Slot::try_from(slot.number()), Ok(slot));
            assert_eq!(slot.to_string().parse(), Ok(slot));
        }
        assert!(Slot::try_from(256).is_err());
        assert!(Slot::try_from(u32::MAX).is_err());
        assert!(Slot::new(4, 0).is_err());
        assert!(Slot::new(0, 64).is_err());
        assert!("007".parse::<Slot>().is_err());
        assert!("+7".parse::<Slot>().is_err());
    }

    #[test]
    fn digest_and_uuid_have_one_spelling() {
        let hex = "0123456789abcdef".repeat(4);
        for scheme in ["sha256:", "sparse-sha256:"] {
            let text = format!("{scheme}{hex}");
            assert_eq!(Digest::new(text.clone()).unwrap().as_str(), text);
        }
        for scheme in ["", "sparse-", "sparse-sha256:sha256:", "sha512:"] {
            assert!(Digest::new(format!("{scheme}{hex}")).is_err(), "{scheme}");
        }
        assert!(Digest::new(format!("sha256:{}", hex.to_uppercase())).is_err());
        assert!(ReservationId::new("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0").is_ok());
        assert!(ReservationId::new("0F1E2D3C-4B5A-6978-8796-A5B4C3D2E1F0").is_err());
        assert!(ReservationId::new("").is_err());
        let id = ReservationId::random();
        assert_eq!(ReservationId::new(id.to_string()), Ok(id));
        assert_eq!(ReservationId::from_bytes(&id.to_bytes()), Ok(id));
        for length in [0, 15, 17] {
            let error = ReservationId::from_bytes(&vec![7; length]).unwrap_err().to_string();
            assert!(error.contains(&format!("{length} bytes")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_whole_or_refused(text in ".{0,300}") {
            if let Ok(id) = SessionId::new(text.clone()) { prop_assert_eq!(id.as_str(), &text); }
            if let Ok(id) = ContainerId::new(text.clone()) {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert!(!text.contains('/') && !text.contains(".."));
            }
        }
    }
}
