//! The serialisable machine. It travels to other hosts, so it names no path and is checked on arrival.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// SCSI controllers that every machine has.
pub(crate) const CONTROLLERS: u8 = 4;
/// LUNs of one controller.
const LUNS: u8 = 64;
/// PCIe root ports, each for one NIC.
pub(crate) const ROOT_PORTS: u8 = 4;

const DEFAULT_MACHINE: &str = "pc-q35-7.2";
const DEFAULT_CPU: &str = "Nehalem-v1";
const MAX_VCPUS: u32 = 255;
const MIN_MEMORY_MIB: u64 = 16;
const MAX_MEMORY_MIB: u64 = 4 * 1024 * 1024;
/// x86 Linux reads at most this many bytes of command line (`COMMAND_LINE_SIZE`), its NUL included.
const MAX_KERNEL_COMMAND_LINE: usize = 2047;

/// One field of a [`Document`] or of [`crate::LaunchOptions`] that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("VM document field `{field}`: {reason}")]
pub struct InvalidField {
    /// Path of the field, such as `disks[2].slot`.
    pub field: String,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

impl InvalidField {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> InvalidField {
        InvalidField { field: field.into(), reason: reason.into() }
    }
}

/// The machine that a guest sees. Its JSON form is stable and refuses unknown fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Versioned q35 machine type, such as `pc-q35-7.2`. The alias `q35` is refused: it differs between builds.
    pub machine: String,
    /// Named CPU model, such as `Nehalem-v1`. `host` and `max` are refused: they differ between hosts.
    pub cpu: String,
    /// Virtual CPUs, 1 to 255.
    pub vcpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// The machine's identity; a migration between two different ones is refused by QEMU.
    pub uuid: Uuid,
    /// Handed to the kernel as it is; at most 2047 bytes of printable ASCII.
    pub kernel_command_line: String,
    /// Kind of the byte channel between host and guest.
    pub channel: Channel,
    /// Network cards, at most one on each root port.
    pub nics: Vec<Nic>,
    /// Disks, each in a slot of its own.
    pub disks: Vec<Disk>,
}

/// The device that carries the byte channel between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Port 1 of a virtio-serial device, named `dunlin.link.0`.
    VirtioSerial,
    /// A kernel vhost-vsock device; its context id is the host's to choose.
    Vsock,
}

/// A network card as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its hardware address.
    pub mac: MacAddress,
    /// The root port that it sits on.
    pub root_port: RootPort,
}

/// A disk as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Where it is attached.
    pub slot: Slot,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Its length, bytes; a multiple of 512.
    pub size_bytes: u64,
}

impl Document {
    /// A machine of the default type and CPU, with a virtio-serial channel and neither disks nor NICs.
    pub fn new(uuid: Uuid, vcpus: u32, memory_mib: u64) -> Document {
        Document {
            machine: DEFAULT_MACHINE.to_owned(),
            cpu: DEFAULT_CPU.to_owned(),
            vcpus,
            memory_mib,
            uuid,
            kernel_command_line: String::new(),
            channel: Channel::VirtioSerial,
            nics: Vec::new(),
            disks: Vec::new(),
        }
    }

    /// Checks every field; the first that cannot be used is named.
    pub fn validate(&self) -> Result<(), InvalidField> {
        check_model_name("machine", &self.machine)?;
        if !self.machine.starts_with("pc-q35-") {
            return Err(InvalidField::new(
                "machine",
                format!(
                    "`{}` is not a versioned q35 type; name one such as `{DEFAULT_MACHINE}`",
                    self.machine
                ),
            ));
        }
        check_model_name("cpu", &self.cpu)?;
        if matches!(self.cpu.as_str(), "host" | "max" | "base") {
            return Err(InvalidField::new(
                "cpu",
                format!("`{}` differs from host to host; name a model such as `{DEFAULT_CPU}`", self.cpu),
            ));
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(InvalidField::new("vcpus", format!("{} is outside 1..={MAX_VCPUS}", self.vcpus)));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(InvalidField::new(
                "memory_mib",
                format!("{} is outside {MIN_MEMORY_MIB}..={MAX_MEMORY_MIB}", self.memory_mib),
            ));
        }
        if self.uuid.is_nil() {
            return Err(InvalidField::new("uuid", "is all zero; generate one when the machine is made"));
        }
        self.validate_kernel_command_line()?;
        self.validate_nics()?;
        self.validate_disks()
    }

    fn validate_kernel_command_line(&self) -> Result<(), InvalidField> {
        let line = &self.kernel_command_line;
        if line.len() > MAX_KERNEL_COMMAND_LINE {
            return Err(InvalidField::new(
                "kernel_command_line",
                format!("is {} bytes long; the kernel reads {MAX_KERNEL_COMMAND_LINE}", line.len()),
            ));
        }
        if let Some(odd) = line.bytes().find(|byte| !(0x20..0x7f).contains(byte)) {
            return Err(InvalidField::new(
                "kernel_command_line",
                format!("holds the byte {odd:#04x}; only printable ASCII is taken"),
            ));
        }
        Ok(())
    }

    fn validate_nics(&self) -> Result<(), InvalidField> {
        let mut ports = HashSet::new();
        let mut macs = HashSet::new();
        for (index, nic) in self.nics.iter().enumerate() {
            if !ports.insert(nic.root_port) {
                return Err(InvalidField::new(
                    format!("nics[{index}].root_port"),
                    format!("root port {} is taken by another NIC", nic.root_port),
                ));
            }
            if !nic.mac.is_unicast() {
                return Err(InvalidField::new(
                    format!("nics[{index}].mac"),
                    format!("{} is not a unicast address; clear the lowest bit of its first byte", nic.mac),
                ));
            }
            if !macs.insert(nic.mac) {
                return Err(InvalidField::new(
                    format!("nics[{index}].mac"),
                    format!("{} is the address of another NIC", nic.mac),
                ));
            }
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<(), InvalidField> {
        let mut slots = HashSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            if !slots.insert(disk.slot) {
                return Err(InvalidField::new(
                    format!("disks[{index}].slot"),
                    format!("slot {} is taken by another disk", disk.slot),
                ));
            }
            if disk.size_bytes == 0 || disk.size_bytes % 512 != 0 {
                return Err(InvalidField::new(
                    format!("disks[{index}].size_bytes"),
                    format!("{} is not a positive multiple of 512", disk.size_bytes),
                ));
            }
        }
        Ok(())
    }
}

/// The value becomes part of a comma-separated QEMU option and comes from another host: a comma in
/// it would add options of the sender's choice.
fn check_model_name(field: &str, name: &str) -> Result<(), InvalidField> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(InvalidField::new(
            field,
            format!("{name:?} is not a model name (1 to 64 of letters, digits, `.`, `-`, `_`)"),
        ));
    }
    Ok(())
}

/// Where a disk is attached: controller 0 to 3, LUN 0 to 63; the SCSI target is always 0.
/// Written `<controller>-<lun>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "SlotFields", into = "SlotFields")]
pub struct Slot {
    controller: u8,
    lun: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotFields {
    controller: u8,
    lun: u8,
}

impl Slot {
    /// A slot, or the reason why there is none at this place.
    pub fn new(controller: u8, lun: u8) -> Result<Slot, InvalidField> {
        if controller >= CONTROLLERS {
            return Err(InvalidField::new(
                "controller",
                format!("{controller} does not exist; there are {CONTROLLERS}, from 0"),
            ));
        }
        if lun >= LUNS {
            return Err(InvalidField::new("lun", format!("{lun} does not exist; there are {LUNS}, from 0")));
        }
        Ok(Slot { controller, lun })
    }

    /// SCSI controller, 0 to 3.
    pub fn controller(self) -> u8 {
        self.controller
    }

    /// LUN on target 0 of the controller, 0 to 63.
    pub fn lun(self) -> u8 {
        self.lun
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.controller, self.lun)
    }
}

impl FromStr for Slot {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Slot, InvalidField> {
        let parsed = text.split_once('-').and_then(|(c, l)| Some((c.parse().ok()?, l.parse().ok()?)));
        match parsed {
            Some((controller, lun)) => Slot::new(controller, lun),
            None => Err(InvalidField::new("slot", format!("{text:?} is not `<controller>-<lun>`"))),
        }
    }
}

impl TryFrom<SlotFields> for Slot {
    type Error = InvalidField;

    fn try_from(fields: SlotFields) -> Result<Slot, InvalidField> {
        Slot::new(fields.controller, fields.lun)
    }
}

impl From<Slot> for SlotFields {
    fn from(slot: Slot) -> SlotFields {
        SlotFields { controller: slot.controller, lun: slot.lun }
    }
}

/// A PCIe root port for one NIC, 0 to 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct RootPort(u8);

impl RootPort {
    /// A root port, or the reason why there is none of this number.
    pub fn new(index: u8) -> Result<RootPort, InvalidField> {
        if index >= ROOT_PORTS {
            return Err(InvalidField::new(
                "root_port",
                format!("{index} does not exist; there are {ROOT_PORTS}, from 0"),
            ));
        }
        Ok(RootPort(index))
    }

    /// Its number, 0 to 3.
    pub fn index(self) -> u8 {
        self.0
    }
}

impl fmt::Display for RootPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<u8> for RootPort {
    type Error = InvalidField;

    fn try_from(index: u8) -> Result<RootPort, InvalidField> {
        RootPort::new(index)
    }
}

impl From<RootPort> for u8 {
    fn from(port: RootPort) -> u8 {
        port.0
    }
}

/// An Ethernet address. Read with `:` or `-` between the bytes and in either case; written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of these six bytes, in the order in which they are written.
    pub fn new(bytes: [u8; 6]) -> MacAddress {
        MacAddress(bytes)
    }

    /// The six bytes in the order in which they are written.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<MacAddress, InvalidField> {
        let wrong =
            || InvalidField::new("mac", format!("{text:?} is not six hexadecimal bytes joined by `:`"));
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(MacAddress(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = InvalidField;

    fn try_from(text: String) -> Result<MacAddress, InvalidField> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
