//! A call's "no": which class, about what, why, and the way out.

use dunlin_wire::ids::IdError;

/// The classes that containerd's errors and gRPC statuses share; numbers are gRPC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// 1: ended because of a Cancel.
    Canceled,
    /// 2: a failure without a class of its own.
    Unknown,
    /// 3: wrong whatever the state.
    InvalidArgument,
    /// 4: not done in time.
    DeadlineExceeded,
    /// 5: names nothing.
    NotFound,
    /// 6: is there already.
    AlreadyExists,
    /// 9: not in this state.
    FailedPrecondition,
    /// 12: never.
    Unimplemented,
}

impl Code {
    /// gRPC's number for it.
    pub fn number(self) -> i32 {
        match self {
            Code::Canceled => 1,
            Code::Unknown => 2,
            Code::InvalidArgument => 3,
            Code::DeadlineExceeded => 4,
            Code::NotFound => 5,
            Code::AlreadyExists => 6,
            Code::FailedPrecondition => 9,
            Code::Unimplemented => 12,
        }
    }
}

/// Why a call or a piece of work came to nothing. The message names the thing, the reason and
/// the way out, and goes to the caller as it stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Its class.
    pub code: Code,
    /// Thing, reason, way out.
    pub message: String,
}

impl Refusal {
    /// A refusal with its class.
    pub fn new(code: Code, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into() }
    }

    /// [`Code::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::InvalidArgument, message)
    }

    /// [`Code::FailedPrecondition`].
    pub fn precondition(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::FailedPrecondition, message)
    }

    /// [`Code::Unknown`].
    pub fn unknown(message: impl Into<String>) -> Refusal {
        Refusal::new(Code::Unknown, message)
    }
}

impl From<IdError> for Refusal {
    fn from(error: IdError) -> Refusal {
        Refusal::invalid(error.to_string())
    }
}
