//! Result codes of the guest bridge.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An HRESULT as it stands on the wire: a signed 32-bit number, 0 is success.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct HResult(pub i32);

impl HResult {
    /// Success.
    pub const OK: HResult = HResult(0);
    /// No handler for this message type at the negotiated version.
    pub const NOT_IMPLEMENTED: HResult = HResult::of(0x8000_4001);
    /// Any failure without a code of its own.
    pub const FAIL: HResult = HResult::of(0x8000_4005);
    /// Unknown process, or the process is gone.
    pub const NOT_FOUND: HResult = HResult::of(0x8007_0490);
    /// Invalid container id or argument.
    pub const INVALID_ARGUMENT: HResult = HResult::of(0x8007_0057);
    /// A wait with a finite time ran out of it.
    pub const TIMEOUT: HResult = HResult::of(0xC037_0109);
    /// The ranges of protocol versions do not meet.
    pub const UNSUPPORTED_PROTOCOL_VERSION: HResult = HResult::of(0xC037_010C);
    /// A JSON document cannot be decoded, or its schema is too old.
    pub const INVALID_JSON: HResult = HResult::of(0xC037_010D);
    /// Unknown container.
    pub const SYSTEM_NOT_FOUND: HResult = HResult::of(0xC037_010E);
    /// The container id is taken.
    pub const SYSTEM_ALREADY_EXISTS: HResult = HResult::of(0xC037_010F);
    /// The container is not running any more.
    pub const SYSTEM_ALREADY_STOPPED: HResult = HResult::of(0xC037_0110);
    /// The container is in a state in which this cannot be done.
    pub const INVALID_STATE: HResult = HResult::of(0x8037_0105);

    /// From the unsigned form in which the codes are documented.
    #[must_use]
    pub const fn of(code: u32) -> HResult {
        HResult(code.cast_signed())
    }

    /// The unsigned form in which the codes are documented.
    #[must_use]
    pub const fn code(self) -> u32 {
        self.0.cast_unsigned()
    }

    /// Whether this is a success.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// A name for people; codes without one are "unknown code".
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            HResult::OK => "success",
            HResult::NOT_IMPLEMENTED => "not implemented",
            HResult::FAIL => "unspecified failure",
            HResult::NOT_FOUND => "process not found",
            HResult::INVALID_ARGUMENT => "invalid argument",
            HResult::TIMEOUT => "timed out",
            HResult::UNSUPPORTED_PROTOCOL_VERSION => "unsupported protocol version",
            HResult::INVALID_JSON => "invalid JSON",
            HResult::SYSTEM_NOT_FOUND => "container not found",
            HResult::SYSTEM_ALREADY_EXISTS => "container already exists",
            HResult::SYSTEM_ALREADY_STOPPED => "container already stopped",
            HResult::INVALID_STATE => "invalid state",
            HResult(_) => "unknown code",
        }
    }
}

impl fmt::Display for HResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#010x})", self.name(), self.code())
    }
}

impl fmt::Debug for HResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HResult({:#010x} {})", self.code(), self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_documented_signed_values() {
        assert_eq!(HResult::NOT_IMPLEMENTED.0, -2_147_467_263);
        assert_eq!(HResult::FAIL.0, -2_147_467_259);
        assert_eq!(HResult::NOT_FOUND.0, -2_147_023_728);
        assert_eq!(HResult::INVALID_ARGUMENT.0, -2_147_024_809);
        assert_eq!(HResult::TIMEOUT.0, -1_070_137_079);
        assert_eq!(HResult::UNSUPPORTED_PROTOCOL_VERSION.0, -1_070_137_076);
        assert_eq!(HResult::INVALID_JSON.0, -1_070_137_075);
        assert_eq!(HResult::SYSTEM_NOT_FOUND.0, -1_070_137_074);
        assert_eq!(HResult::SYSTEM_ALREADY_EXISTS.0, -1_070_137_073);
        assert_eq!(HResult::SYSTEM_ALREADY_STOPPED.0, -1_070_137_072);
        assert_eq!(HResult::INVALID_STATE.0, -2_143_878_907);
    }
}
