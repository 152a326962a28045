//! A reservation's id as it stands in a payload: the UUID's 16 bytes.

use crate::ids::{IdError, ReservationId};

/// Bytes of an id.
const LENGTH: usize = 16;

pub(super) fn bytes(id: &ReservationId) -> Vec<u8> {
    let digit = |byte: u8| if byte.is_ascii_digit() { byte - b'0' } else { byte - b'a' + 10 };
    let mut digits = id.as_str().bytes().filter(|byte| *byte != b'-').map(digit);
    let mut bytes = Vec::with_capacity(LENGTH);
    while let (Some(high), Some(low)) = (digits.next(), digits.next()) {
        bytes.push(high << 4 | low);
    }
    bytes
}

/// The id that these bytes are; `place` names them for the error.
pub(super) fn id(bytes: &[u8], place: &str) -> Result<ReservationId, IdError> {
    let digit = |half: u8| char::from(if half < 10 { b'0' + half } else { b'a' + half - 10 });
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().take(LENGTH).enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
    if bytes.len() != LENGTH {
        let reason = "is not the 16 bytes of a UUID";
        return Err(IdError::new(
            place,
            &text,
            reason,
            "export again with the same Dunlin version on both hosts",
        ));
    }
    ReservationId::new(text).map_err(|error| error.of(place))
}
