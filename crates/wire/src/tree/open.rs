//! From messages to domain types, one payload at a time.

mod devices;
mod pods;
mod shape;

use protobuf::MessageField;

use self::shape::{contradiction, known, limit, missing, required};
use super::{PODS_MAX, SandboxOptions, SavedPlan9, SavedTree, SavedVm, SavedVpci, TreeError};
use crate::Any;
use crate::compat::Compat;
use crate::envelope::open;
use crate::ids::StdioPort;
use crate::saved;

pub(super) fn migration(config: &Any) -> Result<SavedTree, TreeError> {
    let message: saved::Migration = open(config, "config")?;
    let vm = machine(required(&message.vm, "config.vm")?, "config.vm")?;
    if message.pods.is_empty() {
        return Err(missing("config.pods"));
    }
    limit("config.pods", message.pods.len(), PODS_MAX)?;
    let pods = message.pods.iter().enumerate();
    let pods = pods
        .map(|(at, any)| pods::pod(any, &vm.scsi, &format!("config.pods[{at}]")))
        .collect::<Result<_, _>>()?;
    Ok(SavedTree { vm, pods })
}

fn machine(any: &Any, place: &str) -> Result<SavedVm, TreeError> {
    let message: saved::Vm = open(any, place)?;
    let scsi_at = format!("{place}.scsi");
    Ok(SavedVm {
        vm_id: message.vm_id,
        stage: known(message.stage, place, "stage")?.into(),
        options: options(message.options, &format!("{place}.options"))?,
        next_port: StdioPort(message.next_port),
        bridge_next_id: message.bridge_next_id,
        compat: Compat::from_json(&message.compat_info)?,
        document: message.document,
        scsi: devices::scsi(required(&message.scsi, &scsi_at)?, &scsi_at)?,
        vpci: match message.vpci.as_ref() {
            Some(any) => devices::vpci(any, &format!("{place}.vpci"))?,
            None => SavedVpci::default(),
        },
        plan9: match message.plan9.as_ref() {
            Some(any) => devices::plan9(any, &format!("{place}.plan9"))?,
            None => SavedPlan9::default(),
        },
    })
}

fn options(message: MessageField<saved::SandboxOptions>, place: &str) -> Result<SandboxOptions, TreeError> {
    let message = message.into_option().ok_or_else(|| missing(place))?;
    SandboxOptions::from_message(message).map_err(|given| {
        contradiction(
            &format!("{place}.architecture"),
            format!("{:?} is neither amd64 nor arm64", shape::shown(&given)),
        )
    })
}
