use super::*;

fn full() -> Document {
    let mut document = Document::new(Uuid::from_u128(0x1111_2222), 2, 512);
    document.kernel_command_line = "console=ttyS0 quiet".to_owned();
    document
        .nics
        .push(Nic { mac: "52-54-00-AB-cd-01".parse().unwrap(), root_port: RootPort::new(3).unwrap() });
    document.disks.push(Disk { slot: Slot::new(3, 63).unwrap(), read_only: true, size_bytes: 4096 });
    document
}

fn refused_field(change: impl FnOnce(&mut Document)) -> String {
    let mut document = full();
    change(&mut document);
    document.validate().expect_err("the document is wrong").field
}

#[test]
fn json_form_is_stable() {
    let json = serde_json::to_string(&full()).unwrap();
    assert_eq!(
        json,
        concat!(
            r#"{"machine":"pc-q35-7.2","cpu":"Nehalem-v1","vcpus":2,"memory_mib":512,"#,
            r#""uuid":"00000000-0000-0000-0000-000011112222","kernel_command_line":"console=ttyS0 quiet","#,
            r#""channel":"virtio-serial","nics":[{"mac":"52:54:00:ab:cd:01","root_port":3}],"#,
            r#""disks":[{"slot":{"controller":3,"lun":63},"read_only":true,"size_bytes":4096}]}"#
        )
    );
    let back: Document = serde_json::from_str(&json).unwrap();
    assert_eq!(back, full());
    back.validate().unwrap();
}

#[test]
fn unknown_and_missing_fields_are_refused() {
    let json = serde_json::to_string(&full()).unwrap();
    let extra = json.replacen('{', r#"{"firmware":"x","#, 1);
    assert!(serde_json::from_str::<Document>(&extra).unwrap_err().to_string().contains("firmware"));
    let missing = json.replacen(r#""vcpus":2,"#, "", 1);
    assert!(serde_json::from_str::<Document>(&missing).unwrap_err().to_string().contains("vcpus"));
}

#[test]
fn places_that_do_not_exist_are_refused_on_reading() {
    let json = serde_json::to_string(&full()).unwrap();
    for (from, to, named) in [
        (r#""controller":3"#, r#""controller":4"#, "controller"),
        (r#""lun":63"#, r#""lun":64"#, "lun"),
        (r#""root_port":3"#, r#""root_port":4"#, "root_port"),
        ("52:54:00:ab:cd:01", "52:54:00:ab:cd", "mac"),
    ] {
        let changed = json.replacen(from, to, 1);
        assert_ne!(changed, json);
        let error = serde_json::from_str::<Document>(&changed).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn the_wrong_field_is_named() {
    assert_eq!(refused_field(|d| d.machine = "q35".into()), "machine");
    assert_eq!(refused_field(|d| d.machine = "pc-q35-7.2,firmware=/etc/shadow".into()), "machine");
    assert_eq!(refused_field(|d| d.cpu = "host".into()), "cpu");
    assert_eq!(refused_field(|d| d.cpu = "Nehalem-v1,+vmx".into()), "cpu");
    assert_eq!(refused_field(|d| d.vcpus = 0), "vcpus");
    assert_eq!(refused_field(|d| d.vcpus = 256), "vcpus");
    assert_eq!(refused_field(|d| d.memory_mib = 1), "memory_mib");
    assert_eq!(refused_field(|d| d.memory_mib = u64::MAX), "memory_mib");
    assert_eq!(refused_field(|d| d.uuid = Uuid::nil()), "uuid");
    assert_eq!(refused_field(|d| d.kernel_command_line = "a\nb".into()), "kernel_command_line");
    assert_eq!(refused_field(|d| d.kernel_command_line = "a".repeat(2048)), "kernel_command_line");
    assert_eq!(refused_field(|d| d.nics.push(d.nics[0].clone())), "nics[1].root_port");
    assert_eq!(refused_field(|d| d.nics[0].mac = MacAddress::new([1, 0, 0, 0, 0, 1])), "nics[0].mac");
    assert_eq!(
        refused_field(|d| {
            let mac = d.nics[0].mac;
            d.nics.push(Nic { mac, root_port: RootPort::new(0).unwrap() });
        }),
        "nics[1].mac"
    );
    assert_eq!(refused_field(|d| d.disks.push(d.disks[0].clone())), "disks[1].slot");
    assert_eq!(refused_field(|d| d.disks[0].size_bytes = 1000), "disks[0].size_bytes");
}

#[test]
fn a_slot_is_read_as_it_is_written() {
    let slot = Slot::new(2, 17).unwrap();
    assert_eq!(slot.to_string(), "2-17");
    assert_eq!("2-17".parse::<Slot>().unwrap(), slot);
    for wrong in ["", "2", "2-", "2-64", "4-0", "-1-0", "2-17-1", "256-0"] {
        assert!(wrong.parse::<Slot>().is_err(), "{wrong}");
    }
}
