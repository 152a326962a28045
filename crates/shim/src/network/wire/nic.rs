//! One NIC's wire: the tap in an interface's place, and what is done to it when there is no time.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use dunlin_net::{
    Announcer, Control, Handle, Injector, Interface, Namespace, NetError, Tail, Tap, announce, redirect,
};
use dunlin_qemu::{MacAddress, RootPort};

/// Kinds of interfaces that only let frames for their own address in: a switch that is theirs alone sorts them.
const SWITCHED: [&str; 2] = ["macvlan", "macvtap"];

/// A tap that is connected to an interface. Silent and deaf until its gate is opened.
#[derive(Debug)]
pub(crate) struct NicWire {
    /// The guest's name of the NIC.
    pub(crate) id: String,
    pub(crate) mac: MacAddress,
    pub(crate) port: RootPort,
    tap: Tap,
    interface: Control,
    /// The interface must have the NIC's address.
    sorted: bool,
    /// By a switch in this host, which keeps frames for its addresses from going further.
    switched: bool,
    /// The interface's own address, when it is another.
    lent: Option<[u8; 6]>,
    announcer: Announcer,
    injector: Injector,
    /// The machine has it.
    plugged: AtomicBool,
    /// Frames go through.
    open: Mutex<bool>,
}

impl NicWire {
    /// Puts a tap, down, in the interface's place. On a failure nothing is left.
    pub(super) async fn connect(
        namespace: &Namespace,
        handle: &Handle,
        interface: &Interface,
        id: String,
        mac: MacAddress,
        port: RootPort,
    ) -> Result<NicWire, NetError> {
        let tap = Tap::create(namespace, &Tap::name_for(interface.index), interface.mtu)?;
        let control = Control::open(namespace, interface.index, &interface.name)?;
        let announcer = Announcer::open(namespace, interface.index)?;
        let injector = Injector::open(namespace, tap.index())?;
        if let Err(error) = redirect::connect(handle, interface.index, tap.index()).await {
            if let Err(left) = redirect::disconnect(handle, interface.index).await {
                tracing::warn!(interface = interface.name, error = %left, "it stays silent");
            }
            return Err(error);
        }
        let switched = interface.kind.as_deref().is_some_and(|kind| SWITCHED.contains(&kind));
        // Hardware, which has no kind, drops what is not for it.
        let sorted = switched || interface.kind.is_none();
        let lent = (interface.mac != mac.bytes()).then_some(interface.mac);
        Ok(NicWire {
            id,
            mac,
            port,
            tap,
            interface: control,
            sorted,
            switched,
            lent,
            announcer,
            injector,
            plugged: AtomicBool::new(false),
            open: Mutex::new(false),
        })
    }

    /// Takes the redirect away: the interface hears again.
    pub(super) async fn disconnect(&self, handle: &Handle) {
        if let Err(error) = redirect::disconnect(handle, self.interface.index()).await {
            tracing::warn!(interface = self.interface.name(), %error, "an interface stays silent");
        }
    }

    /// For QEMU.
    pub(crate) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.tap.descriptor()
    }

    /// True for the one who is to plug it in.
    pub(crate) fn claim_plug(&self) -> bool {
        !self.plugged.swap(true, Ordering::Relaxed)
    }

    /// It is not in the machine after all.
    pub(crate) fn unplugged(&self) {
        self.plugged.store(false, Ordering::Relaxed);
    }

    pub(crate) fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Relaxed)
    }

    /// Lets frames through, both ways. Repeats do nothing.
    pub(crate) fn open(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if *open {
            return;
        }
        if self.sorted
            && self.lent.is_some()
            && let Err(error) = self.interface.set_mac(self.mac.bytes())
        {
            tracing::error!(nic = self.id, %error, "frames for the guest may not reach it");
        }
        match self.tap.set_up(true) {
            Ok(()) => *open = true,
            Err(error) => tracing::error!(nic = self.id, %error, "the guest is cut off"),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nothing through. Repeats do nothing.
    pub(crate) fn shut(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut *open) {
            return;
        }
        if let Err(error) = self.tap.set_up(false) {
            tracing::error!(nic = self.id, %error, "the guest may still be heard");
        }
        if self.sorted
            && let Some(own) = self.lent
            && let Err(error) = self.interface.set_mac(own)
        {
            tracing::warn!(nic = self.id, %error, "the interface keeps the guest's address");
        }
    }

    /// Its address is another host's: as [`NicWire::shut`], and the switch that this interface is a part of forgets it.
    pub(super) fn leave(&self) {
        self.shut();
        if !self.switched || self.lent.is_some() {
            return;
        }
        let mut other = *uuid::Uuid::new_v4().as_bytes().first_chunk().unwrap_or(&[0; 6]);
        // Of one station, and nobody's by right.
        other[0] = other[0] & 0xfc | 2;
        if let Err(error) = self.interface.set_mac(other) {
            tracing::warn!(nic = self.id, %error, "neighbours on this host may not find the guest on the other one");
        }
    }

    /// Tells the network that the NIC is here. Does not wait.
    pub(crate) fn announce(&self, addresses: &[IpAddr]) {
        if let Err(error) = self.announcer.send(&announce::frames(self.mac.bytes(), addresses)) {
            tracing::warn!(nic = self.id, %error, "an announcement was not sent");
        }
    }

    /// Begins to note what is sent to the guest.
    pub(crate) fn follow(&self, namespace: &Namespace) -> Result<Tail, NetError> {
        Tail::follow(namespace, self.tap.index())
    }

    /// Gives the guest what came for it elsewhere.
    pub(crate) fn inject(&self, frames: &[Vec<u8>]) {
        let (sent, error) = self.injector.send(frames);
        match error {
            None => tracing::info!(nic = self.id, sent, "frames that came during the move"),
            Some(error) => {
                tracing::warn!(nic = self.id, sent, of = frames.len(), %error, "frames that came during the move are lost");
            }
        }
    }
}
