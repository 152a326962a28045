use uuid::Uuid;

use super::*;

fn options() -> LaunchOptions {
    let mut paths = HostPaths::in_directory(Path::new("/run/dunlin/default/s1"));
    paths.kernel = Some("/usr/lib/dunlin/vmlinuz".into());
    paths.initramfs = Some("/usr/lib/dunlin/initramfs".into());
    LaunchOptions::new("qemu-system-x86_64", Accelerator::Tcg, paths)
}

fn document() -> Document {
    let mut document = Document::new(Uuid::from_u128(0xabc), 2, 512);
    document.kernel_command_line = "console=ttyS0 a=b,c".into();
    document
}

fn text(arguments: Vec<OsString>) -> Vec<String> {
    arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect()
}

#[test]
fn the_whole_argument_vector() {
    let expected = "\
-nodefaults
-no-user-config
-no-reboot
-S
-display
none
-msg
timestamp=on
-name
debug-threads=on
-machine
pc-q35-7.2,memory-backend=pc.ram,usb=off,sata=off,smbus=off,vmport=off,graphics=off,dump-guest-core=off
-accel
tcg,thread=multi
-cpu
Nehalem-v1
-smp
cpus=2,maxcpus=2,sockets=1,cores=2,threads=1
-object
memory-backend-ram,id=pc.ram,size=524296K
-m
524296K
-uuid
00000000-0000-0000-0000-000000000abc
-rtc
base=utc,clock=host
-sandbox
on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-chardev
socket,id=qmp0,server=on,wait=off,path=/run/dunlin/default/s1/qmp.sock
-mon
chardev=qmp0,mode=control
-chardev
file,id=console0,append=on,path=/run/dunlin/default/s1/console.log
-serial
chardev:console0
-device
virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x10,disable-legacy=on,num_queues=2
-device
virtio-scsi-pci,id=scsi1,bus=pcie.0,addr=0x11,disable-legacy=on,num_queues=2
-device
virtio-scsi-pci,id=scsi2,bus=pcie.0,addr=0x12,disable-legacy=on,num_queues=2
-device
virtio-scsi-pci,id=scsi3,bus=pcie.0,addr=0x13,disable-legacy=on,num_queues=2
-device
virtio-serial-pci,id=serial0,bus=pcie.0,addr=0x14,disable-legacy=on,max_ports=2
-chardev
socket,id=link0,server=on,wait=off,path=/run/dunlin/default/s1/link.sock
-device
virtserialport,id=link-port0,bus=serial0.0,nr=1,chardev=link0,name=dunlin.link.0
-object
rng-builtin,id=rng0
-device
virtio-rng-pci,id=rng-device0,rng=rng0,bus=pcie.0,addr=0x15,disable-legacy=on
-device
pcie-root-port,id=rp0,bus=pcie.0,addr=0x18,chassis=1,slot=1
-device
pcie-root-port,id=rp1,bus=pcie.0,addr=0x19,chassis=2,slot=2
-device
pcie-root-port,id=rp2,bus=pcie.0,addr=0x1a,chassis=3,slot=3
-device
pcie-root-port,id=rp3,bus=pcie.0,addr=0x1b,chassis=4,slot=4
-kernel
/usr/lib/dunlin/vmlinuz
-initrd
/usr/lib/dunlin/initramfs
-append
console=ttyS0 a=b,c
-incoming
defer";
    let line = text(command_line(&document(), &options(), Mode::Incoming).unwrap());
    assert_eq!(line.join("\n"), expected);
}

#[test]
fn booting_differs_from_incoming_only_in_the_last_option() {
    let boot = text(command_line(&document(), &options(), Mode::Boot).unwrap());
    let mut incoming = text(command_line(&document(), &options(), Mode::Incoming).unwrap());
    incoming.truncate(incoming.len() - 2);
    assert_eq!(boot, incoming);
}

#[test]
fn a_comma_in_a_path_stays_part_of_the_path() {
    let mut options = options();
    options.paths.console_log = "/tmp/a,append=off".into();
    let line = text(command_line(&document(), &options, Mode::Boot).unwrap());
    assert!(line.contains(&"file,id=console0,append=on,path=/tmp/a,,append=off".to_owned()));
}

#[test]
fn vsock_takes_the_place_of_the_serial_port() {
    let mut document = document();
    document.channel = Channel::Vsock;
    let mut options = options();
    assert_eq!(command_line(&document, &options, Mode::Boot).unwrap_err().field, "channel");
    options.paths.channel = ChannelEndpoint::Vsock { cid: 2 };
    assert_eq!(command_line(&document, &options, Mode::Boot).unwrap_err().field, "paths.channel.cid");
    options.paths.channel = ChannelEndpoint::Vsock { cid: 77 };
    let line = text(command_line(&document, &options, Mode::Boot).unwrap());
    let vsock = "vhost-vsock-pci,id=vsock0,bus=pcie.0,addr=0x14,disable-legacy=on,guest-cid=77";
    assert!(line.contains(&vsock.to_owned()));
    assert!(!line.iter().any(|argument| argument.contains("serial0.0")));
}

#[test]
fn what_cannot_be_launched_is_named() {
    let refused = |change: &dyn Fn(&mut Document, &mut LaunchOptions)| {
        let (mut document, mut options) = (document(), options());
        change(&mut document, &mut options);
        command_line(&document, &options, Mode::Boot).unwrap_err().field
    };
    assert_eq!(refused(&|d, _| d.vcpus = 0), "vcpus");
    assert_eq!(refused(&|_, o| o.paths.kernel = None), "paths.initramfs");
    assert_eq!(
        refused(&|_, o| {
            o.paths.kernel = None;
            o.paths.initramfs = None;
        }),
        "kernel_command_line"
    );
    assert_eq!(refused(&|_, o| o.paths.qmp_socket = "/".repeat(108).into()), "paths.qmp_socket");
}
