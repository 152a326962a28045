//! One envelope for every saved-state payload: a `google.protobuf.Any` whose URL and schema
//! version are judged before its contents are decoded.
//!
//! What an [`open`] refuses, in this order: too many bytes, a URL that is not the expected one,
//! a schema version that this build does not know, too many fields, bytes that do not decode, leftovers
//! (fields or enum values, at any depth, that this build does not know), and a payload that was cut
//! short between two fields. Either would be state lost on the way, so it is never skipped.
//!
//! Maps are ordered, so equal payloads have equal bytes. Children are `Any`s too and stay closed: who opens the parent opens them by name.

use protobuf::descriptor::field_descriptor_proto::Type;
use protobuf::reflect::{MessageRef, ReflectFieldRef, ReflectValueRef};
use protobuf::rt::uint32_size;
use protobuf::{CodedInputStream, MessageDyn, MessageFull};

use crate::Any;
use crate::saved;

/// Where something stands, e.g. `config.pods[0].containers[1]`: put into words only when it is refused.
pub type Place<'a> = &'a dyn std::fmt::Display;

/// Before the controller's name in each type URL.
pub const URL_PREFIX: &str = "type.dunlin.dev/dunlin.";
/// After it. The version in the URL is the family's; a payload's own is `schema_version`.
pub const URL_SUFFIX: &str = ".v1";
/// Largest payload of any kind, bytes.
pub const PAYLOAD_MAX: usize = 16 << 20;
/// Most fields that stand side by side in one payload, each entry of a list or map being one: a field of two
/// bytes may take a hundred once it is decoded.
pub const FIELDS_MAX: usize = 1 << 16;
/// The number of each payload's last field.
pub const SEALED_BYTES: u32 = 100;

/// A saved message that travels in an envelope of its own.
pub trait Payload: MessageFull + Default {
    /// The controller whose state this is, as in the type URL.
    const CONTROLLER: &'static str;
    /// The schema version that this build writes, and the only one that it reads.
    const VERSION: u32;
    /// Largest encoded size, bytes.
    const CAP: usize;

    /// Field 1.
    fn schema_version(&self) -> u32;
    /// Sets field 1.
    fn set_schema_version(&mut self, version: u32);
    /// Field [`SEALED_BYTES`], the last: how many bytes stand before it.
    fn sealed_bytes(&self) -> u32;
    /// Sets it.
    fn set_sealed_bytes(&mut self, bytes: u32);

    /// `type.dunlin.dev/dunlin.<controller>.v1`.
    fn type_url() -> String {
        format!("{URL_PREFIX}{}{URL_SUFFIX}", Self::CONTROLLER)
    }

    /// Whether `url` is [`Payload::type_url`].
    fn is_type_url(url: &str) -> bool {
        named_in(url) == Some(Self::CONTROLLER)
    }
}

macro_rules! payloads {
    ($($message:ident = $controller:literal, version $version:literal, at most $cap:expr;)*) => {
        $(impl Payload for saved::$message {
            const CONTROLLER: &'static str = $controller;
            const VERSION: u32 = $version;
            const CAP: usize = $cap;
            fn schema_version(&self) -> u32 { self.schema_version }
            fn set_schema_version(&mut self, version: u32) { self.schema_version = version; }
            fn sealed_bytes(&self) -> u32 { self.sealed_bytes }
            fn set_sealed_bytes(&mut self, bytes: u32) { self.sealed_bytes = bytes; }
        })*
        /// Every name that a payload's URL may hold: the controllers', and those of the two payloads
        /// that are not in the tree.
        pub const CONTROLLERS: &[&str] = &[$($controller),*];
    };
}

payloads! {
    Migration = "migration", version 1, at most PAYLOAD_MAX;
    Vm = "vm", version 2, at most 4 << 20;
    Pod = "pod", version 2, at most PAYLOAD_MAX;
    Container = "container", version 2, at most 8 << 20;
    Process = "process", version 1, at most 4 << 20;
    Scsi = "scsi", version 2, at most 2 << 20;
    Network = "network", version 1, at most 1 << 20;
    Plan9 = "plan9", version 1, at most 2 << 20;
    Vpci = "vpci", version 1, at most 1 << 20;
    Handoff = "handoff", version 1, at most 3 << 20;
    SandboxState = "sandboxstate", version 2, at most 4 << 20;
}

/// An envelope is refused. `field` is where it stands, e.g. `config.pods[0].containers[1]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Refused before decoding.
    #[error("{field}: {size} bytes are more than the {cap} a {controller} payload may have; export again")]
    TooLarge {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// Bytes given.
        size: usize,
        /// Bytes allowed.
        cap: usize,
    },
    /// Refused before decoding.
    #[error("{field}: the {controller} payload has more than {limit} fields; export again")]
    TooManyFields {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// Fields allowed.
        limit: usize,
    },
    /// Another payload, or none of ours.
    #[error("{field}: expected {expected}, got {given}; {remedy}")]
    WrongType {
        /// Where the envelope stands.
        field: String,
        /// The expected URL.
        expected: String,
        /// The URL given (shortened) and whose it is.
        given: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Written by a build with another schema.
    #[error(
        "{field}: schema version {given} of the {controller} payload is unknown, this build reads {known}; \
         run the same Dunlin version on both hosts"
    )]
    UnknownVersion {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// As given; 0 when it has none.
        given: u32,
        /// What this build reads.
        known: u32,
    },
    /// Bytes that are not the message.
    #[error("{field}: the {controller} payload does not decode ({reason}); export again")]
    Undecodable {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// The decoder's words.
        reason: String,
    },
    /// Bytes that are the beginning of the message.
    #[error(
        "{field}: the {controller} payload was cut short ({sealed} bytes were sealed, {found} came); export again"
    )]
    CutShort {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// As it says of itself; 0: what says it is cut off too.
        sealed: u32,
        /// Bytes that came, besides what says it.
        found: u64,
    },
    /// State that this build does not know and would lose.
    #[error(
        "{field}: {leftover} of the {controller} payload is unknown to this build and would be lost; \
         run the same Dunlin version on both hosts"
    )]
    Leftover {
        /// Where the envelope stands.
        field: String,
        /// The expected controller.
        controller: &'static str,
        /// Path inside the payload and what is left over.
        leftover: String,
    },
}

/// Encodes `payload` with this build's schema version.
///
/// # Panics
/// Never: an in-memory message of these types always encodes.
pub fn seal<T: Payload>(mut payload: T) -> Any {
    payload.set_schema_version(T::VERSION);
    payload.set_sealed_bytes(0);
    // Beyond u32 it is beyond every cap too.
    payload.set_sealed_bytes(u32::try_from(payload.compute_size()).unwrap_or(u32::MAX));
    let value = payload.write_to_bytes().expect("a message without required fields encodes");
    Any { type_url: T::type_url(), value, ..Any::default() }
}

/// [`seal`], refused where [`open`] would be; `field` names the place for the error.
pub fn try_seal<T: Payload>(payload: T, field: Place<'_>) -> Result<Any, EnvelopeError> {
    let any = seal(payload);
    check_size::<T>(&any, field)?;
    check_fields::<T>(&any, field)?;
    Ok(any)
}

fn check_size<T: Payload>(any: &Any, field: Place<'_>) -> Result<(), EnvelopeError> {
    let size = any.value.len();
    if size <= T::CAP {
        return Ok(());
    }
    Err(EnvelopeError::TooLarge { field: field.to_string(), controller: T::CONTROLLER, size, cap: T::CAP })
}

fn check_fields<T: Payload>(any: &Any, field: Place<'_>) -> Result<(), EnvelopeError> {
    // A field takes two bytes at least.
    if any.value.len() / 2 <= FIELDS_MAX {
        return Ok(());
    }
    if count_fields(&any.value).map_err(|error| undecodable::<T>(field, &error))? <= FIELDS_MAX {
        return Ok(());
    }
    let (field, controller) = (field.to_string(), T::CONTROLLER);
    Err(EnvelopeError::TooManyFields { field, controller, limit: FIELDS_MAX })
}

fn undecodable<T: Payload>(field: Place<'_>, error: &protobuf::Error) -> EnvelopeError {
    EnvelopeError::Undecodable {
        field: field.to_string(),
        controller: T::CONTROLLER,
        reason: error.to_string(),
    }
}

/// Decodes the payload that `any` must hold; `field` names the place for the error.
pub fn open<T: Payload>(any: &Any, field: Place<'_>) -> Result<T, EnvelopeError> {
    check_size::<T>(any, field)?;
    if !T::is_type_url(&any.type_url) {
        let (given, remedy) = describe_url(&any.type_url);
        let expected = T::type_url();
        return Err(EnvelopeError::WrongType { field: field.to_string(), expected, given, remedy });
    }
    if let Some(number) = any.special_fields.unknown_fields().iter().map(|(number, _)| number).next() {
        return Err(leftover::<T>(field, format!("field {number} of its envelope")));
    }
    let undecodable = |error: protobuf::Error| undecodable::<T>(field, &error);
    let given = peek_version(&any.value).map_err(undecodable)?;
    if given != T::VERSION {
        return Err(EnvelopeError::UnknownVersion {
            field: field.to_string(),
            controller: T::CONTROLLER,
            given,
            known: T::VERSION,
        });
    }
    check_fields::<T>(any, field)?;
    let mut payload = T::parse_from_bytes(&any.value).map_err(undecodable)?;
    if payload.schema_version() != given {
        return Err(leftover::<T>(field, "a second schema version".to_owned()));
    }
    if let Some(found) = find_leftover(&payload) {
        return Err(leftover::<T>(field, found));
    }
    // Fields that stand twice, and unknown fields of a map's entries, vanish in the decoder: they show
    // as bytes that the decoded message would not write.
    let (given, accounted) = (any.value.len() as u64, payload.compute_size());
    if given != accounted {
        return Err(leftover::<T>(
            field,
            format!("{given} bytes, of which its fields account for {accounted},"),
        ));
    }
    let sealed = payload.sealed_bytes();
    let found = given - if sealed == 0 { 0 } else { uint32_size(SEALED_BYTES, sealed) };
    if found != u64::from(sealed) {
        let field = field.to_string();
        return Err(EnvelopeError::CutShort { field, controller: T::CONTROLLER, sealed, found });
    }
    payload.set_sealed_bytes(0);
    Ok(payload)
}

fn leftover<T: Payload>(field: Place<'_>, leftover: String) -> EnvelopeError {
    EnvelopeError::Leftover { field: field.to_string(), controller: T::CONTROLLER, leftover }
}

/// The controller's name in one of our URLs.
fn named_in(url: &str) -> Option<&str> {
    url.strip_prefix(URL_PREFIX)?.strip_suffix(URL_SUFFIX)
}

/// Whose URL it is, in words, and what to do about it.
fn describe_url(url: &str) -> (String, &'static str) {
    let shown: String = url.chars().take(120).collect();
    if let Some(controller) = CONTROLLERS.iter().find(|known| Some(**known) == named_in(url)) {
        return (format!("{shown}, the {controller} payload"), "put each payload in its own place");
    }
    if url.is_empty() {
        return ("nothing".to_owned(), "fill the field with the payload that the source exported");
    }
    if url.starts_with(URL_PREFIX) {
        return (
            format!("{shown}, which this build does not know"),
            "run the same Dunlin version on both hosts",
        );
    }
    if url.starts_with("type.microsoft.com/hcsshim.") {
        return (
            format!("{shown}, saved by another shim"),
            "move between hosts whose sandboxes run under Dunlin's shim",
        );
    }
    (format!("{shown:?}, which is none of ours"), "pass on unchanged what PrepareAndExportSandbox returned")
}

/// The first value of field 1 that is a varint; 0 when there is none. Looks at top-level tags
/// only, so that a payload of another schema is told by its version and not by a decoding error.
fn peek_version(bytes: &[u8]) -> protobuf::Result<u32> {
    let mut stream = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = stream.read_raw_tag_or_eof()? {
        if tag == 1 << 3 {
            return stream.read_uint32();
        }
        protobuf::rt::skip_field_for_tag(tag, &mut stream)?;
    }
    Ok(0)
}

/// Top-level fields, up to one more than may be.
fn count_fields(bytes: &[u8]) -> protobuf::Result<usize> {
    let mut stream = CodedInputStream::from_bytes(bytes);
    let mut count = 0;
    while count <= FIELDS_MAX {
        let Some(tag) = stream.read_raw_tag_or_eof()? else { break };
        protobuf::rt::skip_field_for_tag(tag, &mut stream)?;
        count += 1;
    }
    Ok(count)
}

/// The first field or enum value, depth first, that the schema does not have.
fn find_leftover(message: &dyn MessageDyn) -> Option<String> {
    if let Some((number, _)) = message.special_fields_dyn().unknown_fields().iter().next() {
        return Some(format!("field {number}"));
    }
    for field in message.descriptor_dyn().fields() {
        // Only these can have something left over, and most fields are others.
        if !matches!(field.proto().type_(), Type::TYPE_MESSAGE | Type::TYPE_ENUM) {
            continue;
        }
        let found = match field.get_reflect(message) {
            ReflectFieldRef::Optional(value) => value.value().and_then(|value| leftover_in(&value)),
            ReflectFieldRef::Repeated(values) => values
                .into_iter()
                .enumerate()
                .find_map(|(at, value)| leftover_in(&value).map(|found| format!("[{at}] {found}"))),
            ReflectFieldRef::Map(map) => map
                .into_iter()
                .find_map(|(key, value)| leftover_in(&value).map(|found| format!("[{key}] {found}"))),
        };
        if let Some(found) = found {
            return Some(format!("{}: {found}", field.name()));
        }
    }
    None
}

fn leftover_in(value: &ReflectValueRef<'_>) -> Option<String> {
    match value {
        ReflectValueRef::Message(message) => {
            let message: &MessageRef<'_> = message;
            find_leftover(&**message)
        }
        ReflectValueRef::Enum(kind, number) if kind.value_by_number(*number).is_none() => {
            Some(format!("value {number} of {}", kind.name()))
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "envelope_tests.rs"]
mod tests;
