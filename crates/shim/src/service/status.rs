//! The one place where the sandbox's errors become ttrpc statuses, and times become timestamps.

use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::timestamp::Timestamp;

use crate::sandbox::error::{Code, SandboxError};

/// The status that containerd understands for an error.
pub(crate) fn status(error: &SandboxError) -> ttrpc::Error {
    let code = match error.code() {
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Code::Cancelled => ttrpc::Code::CANCELLED,
        Code::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Code::Unavailable => ttrpc::Code::UNAVAILABLE,
        Code::Unknown => ttrpc::Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
}

/// A time on the wire; one before 1970 is 1970.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

/// A time from the wire; nonsense is 1970.
pub(crate) fn time(timestamp: &Timestamp) -> SystemTime {
    let seconds = u64::try_from(timestamp.seconds).unwrap_or(0);
    let nanos = u32::try_from(timestamp.nanos).unwrap_or(0).min(999_999_999);
    UNIX_EPOCH + std::time::Duration::new(seconds, nanos)
}
