//! From domain types to messages.

mod devices;
mod pods;

use super::{SavedPlan9, SavedTree, SavedVm, SavedVpci, TreeError};
use crate::Any;
use crate::compat::Compat;
use crate::envelope::try_seal;
use crate::saved;

pub(super) fn migration(tree: SavedTree) -> Result<Any, TreeError> {
    let mut message = saved::Migration::new();
    for (at, pod) in tree.pods.into_iter().enumerate() {
        message.pods.push(pods::pod(&tree.vm.scsi, pod, &format_args!("config.pods[{at}]"))?);
    }
    message.vm = Some(machine(tree.vm)?).into();
    Ok(try_seal(message, &"config")?)
}

fn machine(vm: SavedVm) -> Result<Any, TreeError> {
    let mut message = saved::Vm::new();
    message.vm_id = vm.vm_id;
    message.stage = saved::VmStage::from(vm.stage).into();
    message.options = Some(vm.options.message()).into();
    message.next_port = vm.next_port.0;
    message.bridge_next_id = vm.bridge_next_id;
    message.plain_streams = vm.plain_streams;
    message.compat_info = vm.compat.to_json();
    Compat::from_json(&message.compat_info)?;
    message.document = vm.document;
    message.scsi = Some(devices::scsi(&vm.scsi)?).into();
    if vm.vpci != SavedVpci::default() {
        message.vpci = Some(devices::vpci(&vm.vpci)?).into();
    }
    if vm.plan9 != SavedPlan9::default() {
        message.plan9 = Some(devices::plan9(&vm.plan9)?).into();
    }
    Ok(try_seal(message, &"config.vm")?)
}
