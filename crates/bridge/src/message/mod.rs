//! The JSON bodies of the guest bridge, keys exactly as on the wire.
//!
//! Fields that the protocol omits when empty are skipped when written; all but the identifying fields may be
//! absent when read. Failing answers are a bare [`ResponseBase`].

mod base;
mod container;
mod files;
mod modify;
mod network;
mod process;

pub use base::{ErrorRecord, NULL_ACTIVITY, RequestBase, ResponseBase, StrJson, UTILITY_VM};
pub use container::{
    ContainerConfig, ContainerNotification, CreateRequest, CreateResponse, DUNLIN_VERSION,
    DumpStacksResponse, GuestCapabilities, GuestDefinedCapabilities, NegotiateRequest, NegotiateResponse,
    NotificationType, PROTOCOL_VERSION, PropertiesRequest, PropertiesResponse, PropertyQuery, PropertyType,
    SchemaVersion,
};
pub use files::{
    Base64, ENTRIES_MAX, FileEntry, FileKind, FileOffset, FilePart, FilesAnswer, FilesList, FilesRequest,
    FilesResponse, FilesRoom, FilesStep, PodDirectory, READ_MAX, STAGE_MAX,
};
pub use modify::{
    CombinedLayers, ContainerConstraints, Layer, MappedDirectory, MappedVirtualDisk, Modification,
    ModificationError, ModificationRequest, ModifyRequest, RequestType, Resource, ScsiDevice, SecurityPolicy,
    SecurityPolicyFragment, VpciDevice,
};
pub use network::{IpConfig, Neighbor, NetworkAdapter, Route};
pub use process::{
    ExecuteProcessRequest, ExecuteProcessResponse, ExecuteProcessSettings, GuestPid, INFINITE_MS,
    ProcessExit, ProcessParameters, ResizeConsoleRequest, SignalOptions, SignalProcessRequest,
    VsockStdioRelaySettings, WaitForProcessRequest, WaitForProcessResponse,
};

use crate::frame::MessageType;

/// What a host can ask of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the protocol's")]
pub enum Request {
    Create,
    Start,
    ShutdownGraceful,
    ShutdownForced,
    ExecuteProcess,
    WaitForProcess,
    SignalProcess,
    ResizeConsole,
    GetProperties,
    ModifySettings,
    NegotiateProtocol,
    DumpStacks,
    DeleteContainerState,
    /// Dunlin's: freeze the container's cgroup.
    PauseContainer,
    /// Dunlin's: thaw it.
    ResumeContainer,
    /// Dunlin's: put files into the guest.
    Files,
}

const TYPES: [(Request, u32); 16] = [
    (Request::Create, 0x1010_0101),
    (Request::Start, 0x1010_0201),
    (Request::ShutdownGraceful, 0x1010_0301),
    (Request::ShutdownForced, 0x1010_0401),
    (Request::ExecuteProcess, 0x1010_0501),
    (Request::WaitForProcess, 0x1010_0601),
    (Request::SignalProcess, 0x1010_0701),
    (Request::ResizeConsole, 0x1010_0801),
    (Request::GetProperties, 0x1010_0901),
    (Request::ModifySettings, 0x1010_0a01),
    (Request::NegotiateProtocol, 0x1010_0b01),
    (Request::DumpStacks, 0x1010_0c01),
    (Request::DeleteContainerState, 0x1010_0d01),
    (Request::PauseContainer, 0x1010_d101),
    (Request::ResumeContainer, 0x1010_d201),
    (Request::Files, 0x1010_d301),
];

impl Request {
    /// The number in the frame's header.
    #[must_use]
    pub fn message_type(self) -> MessageType {
        let number = TYPES.iter().find(|(request, _)| *request == self).map_or(0, |(_, number)| *number);
        MessageType(number)
    }

    /// The request of this number; None for answers, notifications and what Linux guests do not serve.
    #[must_use]
    pub fn from_message_type(message: MessageType) -> Option<Request> {
        TYPES.iter().find(|(_, number)| *number == message.0).map(|(request, _)| *request)
    }
}

pub(crate) fn is_false(value: &bool) -> bool {
    !*value
}

pub(crate) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests;
