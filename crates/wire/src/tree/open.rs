//! From messages to domain types, one payload at a time.

mod devices;
mod pods;

use protobuf::MessageField;

use super::shape::{known, missing, required};
use super::{SandboxOptions, SavedPlan9, SavedTree, SavedVm, SavedVpci, TreeError};
use crate::Any;
use crate::compat::Compat;
use crate::envelope::{Place, open};
use crate::ids::StdioPort;
use crate::saved;

pub(super) fn migration(config: &Any) -> Result<SavedTree, TreeError> {
    let message: saved::Migration = open(config, &"config")?;
    let vm = machine(required(&message.vm, &"config.vm")?, &"config.vm")?;
    let pods = message.pods.iter().enumerate();
    let pods = pods
        .map(|(at, any)| pods::pod(any, &vm.scsi, &format_args!("config.pods[{at}]")))
        .collect::<Result<_, _>>()?;
    Ok(SavedTree { vm, pods })
}

fn machine(any: &Any, place: Place<'_>) -> Result<SavedVm, TreeError> {
    let message: saved::Vm = open(any, place)?;
    let scsi_at = format_args!("{place}.scsi");
    Ok(SavedVm {
        vm_id: message.vm_id,
        stage: known(message.stage, place, "stage")?.into(),
        options: options(message.options, &format_args!("{place}.options"))?,
        next_port: StdioPort(message.next_port),
        bridge_next_id: message.bridge_next_id,
        plain_streams: message.plain_streams,
        compat: Compat::from_json(&message.compat_info)?,
        document: message.document,
        scsi: devices::scsi(required(&message.scsi, &scsi_at)?, &scsi_at)?,
        vpci: match message.vpci.as_ref() {
            Some(any) => devices::vpci(any, &format_args!("{place}.vpci"))?,
            None => SavedVpci::default(),
        },
        plan9: match message.plan9.as_ref() {
            Some(any) => devices::plan9(any, &format_args!("{place}.plan9"))?,
            None => SavedPlan9::default(),
        },
    })
}

fn options(
    message: MessageField<saved::SandboxOptions>,
    place: Place<'_>,
) -> Result<SandboxOptions, TreeError> {
    let message = message.into_option().ok_or_else(|| missing(place))?;
    Ok(SandboxOptions::from_message(message))
}
