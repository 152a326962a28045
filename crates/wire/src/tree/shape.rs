//! The shapes that fields may have, and how a field that has another one is refused.

use std::time::Duration;

use protobuf::well_known_types::duration::Duration as DurationMessage;
use protobuf::{Enum, EnumOrUnknown, MessageField};

use super::{DIRECTORY_MAX, TreeError};
use crate::envelope::Place;
use crate::ids::{CONTROLLERS, IdError, check_uuid};

pub(super) const SAME_VERSION: &str = "export again with the same Dunlin version on both hosts";
/// Longest path, bytes, as of Linux.
const PATH_MAX: usize = 4096;
/// Longest name of a thing outside the guest, bytes.
const LABEL_MAX: usize = 256;

pub(super) fn required<'a, T>(value: &'a MessageField<T>, place: Place<'_>) -> Result<&'a T, TreeError> {
    value.as_ref().ok_or_else(|| missing(place))
}

pub(super) fn missing(place: Place<'_>) -> TreeError {
    TreeError::Missing { place: place.to_string(), remedy: SAME_VERSION }
}

pub(super) fn contradiction(place: Place<'_>, reason: String) -> TreeError {
    TreeError::Contradiction { place: place.to_string(), reason, remedy: SAME_VERSION }
}

pub(super) fn field<T>(result: Result<T, IdError>, place: Place<'_>, name: &str) -> Result<T, TreeError> {
    result.map_err(|error| error.of(format_args!("{place}.{name}")).into())
}

pub(super) fn limit(place: Place<'_>, count: usize, limit: usize) -> Result<(), TreeError> {
    if count > limit { Err(TreeError::TooMany { place: place.to_string(), count, limit }) } else { Ok(()) }
}

pub(super) fn known<E: Enum>(value: EnumOrUnknown<E>, place: Place<'_>, name: &str) -> Result<E, TreeError> {
    value
        .enum_value()
        .map_err(|number| contradiction(&format_args!("{place}.{name}"), format!("{number} is unknown")))
}

/// A path: absolute and without a step back, so that it stays where it points.
pub(super) fn absolute(path: &str, place: Place<'_>) -> Result<(), TreeError> {
    let steps_back = || path.split('/').any(|step| step == ".." || step == ".");
    if path.starts_with('/') && path.len() <= PATH_MAX && !steps_back() && !path.contains('\0') {
        return Ok(());
    }
    Err(contradiction(place, format!("{:?} is not a plain absolute path", shown(path))))
}

pub(super) fn no_controllers(place: Place<'_>, given: u32) -> TreeError {
    let reason = format!("{given} controllers, where a machine has 1 to {CONTROLLERS}");
    contradiction(&format_args!("{place}.num_controllers"), reason)
}

/// A time that a process ended at.
pub(super) fn no_time(place: Place<'_>) -> TreeError {
    contradiction(place, "exited_at is no time".to_owned())
}

fn no_duration(place: Place<'_>, name: &str) -> TreeError {
    contradiction(&format_args!("{place}.{name}"), "is negative, or no duration".to_owned())
}

/// What is said once for all that is in it: short, however many those are.
pub(super) fn directory(path: String, place: Place<'_>) -> Result<String, TreeError> {
    if path.len() <= DIRECTORY_MAX {
        return Ok(path);
    }
    Err(contradiction(place, format!("{} bytes are more than the {DIRECTORY_MAX} of a path", path.len())))
}

/// Where a mount is in the guest: a path, or nothing while it is only asked for.
pub(super) fn mount_path(path: &str, reserved: bool, place: Place<'_>) -> Result<(), TreeError> {
    if path.is_empty() && reserved { Ok(()) } else { absolute(path, place) }
}

/// One file's name in its directory.
pub(super) fn file_name(name: &str, place: Place<'_>) -> Result<(), TreeError> {
    if name.is_empty() || name == "." || name == ".." || name.len() > 255 || name.contains(['/', '\0']) {
        return Err(contradiction(place, format!("{:?} is not a file's name", shown(name))));
    }
    Ok(())
}

/// Another system's name of a thing.
pub(super) fn label(text: &str, place: Place<'_>) -> Result<(), TreeError> {
    if text.is_empty() || text.len() > LABEL_MAX || text.chars().any(char::is_control) {
        return Err(contradiction(
            place,
            format!("{:?} is not 1 to {LABEL_MAX} bytes without control characters", shown(text)),
        ));
    }
    Ok(())
}

/// A UUID of something that is no reservation.
pub(super) fn uuid(text: &str, place: Place<'_>) -> Result<(), TreeError> {
    check_uuid("uuid", text).map_err(|error| error.of(place).into())
}

/// One station's Ethernet address, in one spelling.
pub(super) fn mac(text: &str, place: Place<'_>) -> Result<(), TreeError> {
    let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let shaped = text.len() == 17
        && text
            .bytes()
            .enumerate()
            .all(|(at, byte)| if at % 3 == 2 { byte == b':' } else { lower_hex(byte) });
    if !shaped {
        let reason = format!("{:?} is not six pairs of lower-case hex digits with ':' between", shown(text));
        return Err(contradiction(place, reason));
    }
    // The lowest bit of the first byte, the second digit's, makes a group of it.
    let group = text.as_bytes()[1];
    let group = (if group.is_ascii_digit() { group - b'0' } else { group - b'a' + 10 }) & 1 == 1;
    if group || text == "00:00:00:00:00:00" {
        return Err(contradiction(place, format!("{text} is not the address of one network card")));
    }
    Ok(())
}

pub(super) fn duration(
    message: MessageField<DurationMessage>,
    place: Place<'_>,
    name: &str,
) -> Result<Option<Duration>, TreeError> {
    let Some(message) = message.into_option() else { return Ok(None) };
    let seconds = u64::try_from(message.seconds).ok();
    let nanos = u32::try_from(message.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    match (seconds, nanos) {
        (Some(seconds), Some(nanos)) => Ok(Some(Duration::new(seconds, nanos))),
        _ => Err(no_duration(place, name)),
    }
}

/// One that a payload can say.
pub(super) fn told_duration(
    duration: Option<Duration>,
    place: Place<'_>,
    name: &str,
) -> Result<(), TreeError> {
    let told = duration.is_none_or(|duration| i64::try_from(duration.as_secs()).is_ok());
    if told { Ok(()) } else { Err(no_duration(place, name)) }
}

/// The beginning of what was given.
pub(super) fn shown(text: &str) -> &str {
    text.char_indices().nth(80).map_or(text, |(end, _)| &text[..end])
}
