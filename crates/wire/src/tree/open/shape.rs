//! The shapes that fields may have, and how a field that has another one is refused.

use std::time::Duration;

use protobuf::well_known_types::duration::Duration as DurationMessage;
use protobuf::{Enum, EnumOrUnknown, MessageField};

use super::super::{DIRECTORY_MAX, TreeError};
use crate::ids::{IdError, ReservationId};

pub(super) const SAME_VERSION: &str = "export again with the same Dunlin version on both hosts";
/// Longest path, bytes, as of Linux.
const PATH_MAX: usize = 4096;
/// Longest name of a thing outside the guest, bytes.
const LABEL_MAX: usize = 256;

pub(super) fn required<'a, T>(value: &'a MessageField<T>, place: &str) -> Result<&'a T, TreeError> {
    value.as_ref().ok_or_else(|| missing(place))
}

pub(super) fn missing(place: &str) -> TreeError {
    TreeError::Missing { place: place.to_owned(), remedy: SAME_VERSION }
}

pub(super) fn contradiction(place: &str, reason: String) -> TreeError {
    TreeError::Contradiction { place: place.to_owned(), reason, remedy: SAME_VERSION }
}

pub(super) fn field<T>(result: Result<T, IdError>, place: &str, name: &str) -> Result<T, TreeError> {
    result.map_err(|error| error.of(&format!("{place}.{name}")).into())
}

pub(super) fn limit(place: &str, count: usize, limit: usize) -> Result<(), TreeError> {
    if count > limit { Err(TreeError::TooMany { place: place.to_owned(), count, limit }) } else { Ok(()) }
}

pub(super) fn known<E: Enum>(value: EnumOrUnknown<E>, place: &str, name: &str) -> Result<E, TreeError> {
    value
        .enum_value()
        .map_err(|number| contradiction(&format!("{place}.{name}"), format!("{number} is unknown")))
}

/// A path: absolute and without a step back, so that it stays where it points.
pub(super) fn absolute(path: String, place: &str) -> Result<String, TreeError> {
    let steps_back = path.split('/').any(|step| step == ".." || step == ".");
    if path.starts_with('/') && path.len() <= PATH_MAX && !steps_back && !path.contains('\0') {
        return Ok(path);
    }
    Err(contradiction(place, format!("{:?} is not a plain absolute path", shown(&path))))
}

/// What is said once for all that is in it: short, however many those are.
pub(super) fn directory(path: String, place: &str) -> Result<String, TreeError> {
    if path.len() <= DIRECTORY_MAX {
        return Ok(path);
    }
    Err(contradiction(place, format!("{} bytes are more than the {DIRECTORY_MAX} of a path", path.len())))
}

/// Where a mount is in the guest: a path, or nothing while it is only asked for.
pub(super) fn mount_path(path: String, reserved: bool, place: &str) -> Result<String, TreeError> {
    if path.is_empty() && reserved { Ok(path) } else { absolute(path, place) }
}

/// One file's name in its directory.
pub(super) fn file_name(name: String, place: &str) -> Result<String, TreeError> {
    if name.is_empty() || name == "." || name == ".." || name.len() > 255 || name.contains(['/', '\0']) {
        return Err(contradiction(place, format!("{:?} is not a file's name", shown(&name))));
    }
    Ok(name)
}

/// Another system's name of a thing.
pub(super) fn label(text: String, place: &str) -> Result<String, TreeError> {
    if text.is_empty() || text.len() > LABEL_MAX || text.chars().any(char::is_control) {
        return Err(contradiction(
            place,
            format!("{:?} is not 1 to {LABEL_MAX} bytes without control characters", shown(&text)),
        ));
    }
    Ok(text)
}

/// A UUID of something that is no reservation: same shape.
pub(super) fn uuid(text: String, place: &str) -> Result<String, TreeError> {
    Ok(ReservationId::new(text).map_err(|error| error.of(place))?.into())
}

/// One station's Ethernet address, in one spelling.
pub(super) fn mac(text: String, place: &str) -> Result<String, TreeError> {
    let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let shaped = text.len() == 17
        && text
            .bytes()
            .enumerate()
            .all(|(at, byte)| if at % 3 == 2 { byte == b':' } else { lower_hex(byte) });
    if !shaped {
        let reason = format!("{:?} is not six pairs of lower-case hex digits with ':' between", shown(&text));
        return Err(contradiction(place, reason));
    }
    // The lowest bit of the first byte, the second digit's, makes a group of it.
    let group = text.as_bytes()[1];
    let group = (if group.is_ascii_digit() { group - b'0' } else { group - b'a' + 10 }) & 1 == 1;
    if group || text == "00:00:00:00:00:00" {
        return Err(contradiction(place, format!("{text} is not the address of one network card")));
    }
    Ok(text)
}

pub(super) fn duration(
    message: MessageField<DurationMessage>,
    place: &str,
    name: &str,
) -> Result<Option<Duration>, TreeError> {
    let Some(message) = message.into_option() else { return Ok(None) };
    let seconds = u64::try_from(message.seconds).ok();
    let nanos = u32::try_from(message.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    match (seconds, nanos) {
        (Some(seconds), Some(nanos)) => Ok(Some(Duration::new(seconds, nanos))),
        _ => Err(contradiction(&format!("{place}.{name}"), "is negative, or no duration".to_owned())),
    }
}

pub(super) fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}
