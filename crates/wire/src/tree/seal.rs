//! From domain types to messages.

mod devices;
mod pods;

use super::{SavedPlan9, SavedTree, SavedVm, SavedVpci};
use crate::Any;
use crate::envelope::seal;
use crate::saved;

pub(super) fn migration(tree: &SavedTree) -> Any {
    let mut message = saved::Migration::new();
    message.vm = Some(machine(&tree.vm)).into();
    message.pods = tree.pods.iter().map(|pod| pods::pod(tree, pod)).collect();
    seal(message)
}

fn machine(vm: &SavedVm) -> Any {
    let mut message = saved::Vm::new();
    message.vm_id.clone_from(&vm.vm_id);
    message.stage = saved::VmStage::from(vm.stage).into();
    message.options = Some(vm.options.message()).into();
    message.next_port = vm.next_port.0;
    message.bridge_next_id = vm.bridge_next_id;
    message.compat_info = vm.compat.to_json();
    message.document.clone_from(&vm.document);
    message.scsi = Some(devices::scsi(&vm.scsi)).into();
    message.vpci = (vm.vpci != SavedVpci::default()).then(|| devices::vpci(&vm.vpci)).into();
    message.plan9 = (vm.plan9 != SavedPlan9::default()).then(|| devices::plan9(&vm.plan9)).into();
    seal(message)
}
