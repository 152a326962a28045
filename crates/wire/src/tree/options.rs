//! What a sandbox was made with: in its saved state, and beside it for who makes it anew.

use crate::saved;

/// What a sandbox was made with and keeps for life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxOptions {
    /// No Plan9 share may be written to.
    pub no_writable_file_shares: bool,
    /// Scratch disks are encrypted in the guest.
    pub scratch_encryption: bool,
    /// Routes in the guest follow policies.
    pub policy_based_routing: bool,
    /// The guest's, `amd64` or `arm64`.
    pub architecture: String,
    /// All of the guest's memory is backed by physical memory from the start.
    pub fully_physically_backed: bool,
    /// Of a confidential machine.
    pub confidential: Option<Confidential>,
}

/// What a confidential machine was made with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Confidential {
    /// The policy, as it was given.
    pub security_policy: String,
    /// Who enforces it.
    pub security_policy_enforcer: String,
    /// The signed reference values, by file.
    pub reference_info_file: String,
}

impl SandboxOptions {
    pub(crate) fn message(&self) -> saved::SandboxOptions {
        let confidential = self.confidential.as_ref().map(|confidential| saved::Confidential {
            security_policy: confidential.security_policy.clone(),
            security_policy_enforcer: confidential.security_policy_enforcer.clone(),
            reference_info_file: confidential.reference_info_file.clone(),
            ..saved::Confidential::default()
        });
        saved::SandboxOptions {
            no_writable_file_shares: self.no_writable_file_shares,
            scratch_encryption: self.scratch_encryption,
            policy_based_routing: self.policy_based_routing,
            architecture: self.architecture.clone(),
            fully_physically_backed: self.fully_physically_backed,
            confidential: confidential.into(),
            ..saved::SandboxOptions::default()
        }
    }

    /// Whether its architecture is one.
    pub(crate) fn has_architecture(&self) -> bool {
        matches!(self.architecture.as_str(), "amd64" | "arm64")
    }

    pub(crate) fn from_message(message: saved::SandboxOptions) -> SandboxOptions {
        let confidential = message.confidential.into_option().map(|confidential| Confidential {
            security_policy: confidential.security_policy,
            security_policy_enforcer: confidential.security_policy_enforcer,
            reference_info_file: confidential.reference_info_file,
        });
        SandboxOptions {
            no_writable_file_shares: message.no_writable_file_shares,
            scratch_encryption: message.scratch_encryption,
            policy_based_routing: message.policy_based_routing,
            architecture: message.architecture,
            fully_physically_backed: message.fully_physically_backed,
            confidential,
        }
    }
}
