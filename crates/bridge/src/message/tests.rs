use serde_json::json;

use super::*;
use crate::hresult::HResult;

fn text<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap()
}

#[test]
fn a_bare_request_has_both_ids() {
    assert_eq!(
        text(&RequestBase::of("c1")),
        r#"{"ContainerId":"c1","ActivityId":"00000000-0000-0000-0000-000000000000"}"#
    );
}

#[test]
fn an_answer_without_activity_or_error_is_only_its_result() {
    assert_eq!(text(&ResponseBase::default()), r#"{"Result":0}"#);
    let failed = ResponseBase {
        result: HResult::SYSTEM_NOT_FOUND,
        error_message: "no c1".into(),
        ..ResponseBase::default()
    };
    assert_eq!(text(&failed), r#"{"Result":-1070137074,"ErrorMessage":"no c1"}"#);
}

#[test]
fn capabilities_are_upstreams_and_our_version() {
    assert_eq!(
        text(&GuestCapabilities::dunlin()),
        concat!(
            r#"{"SupportedSchemaVersions":[{"Major":2,"Minor":1}],"RuntimeOsType":"Linux","GuestDefinedCapabilities":"#,
            r#"{"NamespaceAddRequestSupported":true,"SignalProcessSupported":true,"DumpStacksSupported":true,"#,
            r#""DeleteContainerStateSupported":true,"DunlinVersion":2}}"#
        )
    );
}

#[test]
fn capabilities_without_the_guests_own_part_are_refused() {
    assert!(serde_json::from_str::<GuestCapabilities>(r#"{"RuntimeOsType":"Linux"}"#).is_err());
    let upstream: GuestCapabilities =
        serde_json::from_str(r#"{"GuestDefinedCapabilities":{"SignalProcessSupported":true}}"#).unwrap();
    assert!(!upstream.speaks_dunlin());
}

#[test]
fn negotiation_carries_our_extensions_only_when_set() {
    let mut request = NegotiateRequest {
        base: RequestBase::of(""),
        minimum_version: 4,
        maximum_version: 4,
        host_time_unix_nanos: None,
        host_instance: None,
    };
    let plain = r#"{"ContainerId":"","ActivityId":"00000000-0000-0000-0000-000000000000","MinimumVersion":4,"MaximumVersion":4}"#;
    assert_eq!(text(&request), plain);
    request.host_time_unix_nanos = Some(1_700_000_000_000_000_001);
    request.host_instance = Some("g".into());
    let back: NegotiateRequest = serde_json::from_str(&text(&request)).unwrap();
    assert_eq!(back, request);
    assert!(text(&request).contains(r#""HostTimeUnixNanos":1700000000000000001,"HostInstance":"g""#));
}

#[test]
fn the_container_document_is_a_string_in_create() {
    let request = CreateRequest {
        base: RequestBase::of("c"),
        container_config: StrJson(ContainerConfig {
            schema_version: SchemaVersion::V21,
            oci_bundle_path: "/b".into(),
            oci_specification: json!({"ociVersion": "1.0.2"}),
            scratch_dir_path: String::new(),
        }),
    };
    let value: serde_json::Value = serde_json::from_str(&text(&request)).unwrap();
    assert_eq!(
        value["ContainerConfig"],
        r#"{"SchemaVersion":{"Major":2,"Minor":1},"OciBundlePath":"/b","OciSpecification":{"ociVersion":"1.0.2"},"ScratchDirPath":""}"#
    );
    let back: CreateRequest = serde_json::from_value(value).unwrap();
    assert_eq!(back, request);
}

#[test]
fn execute_of_an_init_names_no_process() {
    let request = ExecuteProcessRequest {
        base: RequestBase::of("c"),
        settings: ExecuteProcessSettings {
            process_parameters: StrJson(ProcessParameters {
                create_std_out_pipe: true,
                ..Default::default()
            }),
            vsock_stdio_relay_settings: Some(VsockStdioRelaySettings {
                std_out: Some(0x4000_0001),
                resumable: true,
                ..Default::default()
            }),
        },
    };
    let text = text(&request);
    assert!(
        text.ends_with(
            r#""Settings":{"ProcessParameters":"{\"CreateStdOutPipe\":true}","VsockStdioRelaySettings":{"StdOut":1073741825,"Resumable":true}}}"#
        ),
        "{text}"
    );
}

#[test]
fn a_notification_never_has_an_empty_result_info() {
    let exit = ContainerNotification::exit("c", NotificationType::UnexpectedExit);
    assert_eq!(
        text(&exit),
        r#"{"ContainerId":"c","ActivityId":"00000000-0000-0000-0000-000000000000","Type":"UnexpectedExit","Operation":"None","Result":0}"#
    );
}

#[test]
fn signals_and_waits() {
    let kill = SignalProcessRequest { base: RequestBase::of("c"), process_id: GuestPid(9), options: None };
    assert!(text(&kill).ends_with(r#""ProcessId":9}"#));
    let hup = SignalProcessRequest { options: Some(SignalOptions { signal: 1 }), ..kill };
    assert!(text(&hup).ends_with(r#""ProcessId":9,"Options":{"Signal":1}}"#));
    let wait = WaitForProcessRequest {
        base: RequestBase::of("c"),
        process_id: GuestPid(9),
        timeout_in_ms: INFINITE_MS,
    };
    assert!(text(&wait).ends_with(r#""ProcessId":9,"TimeoutInMs":4294967295}"#));
}

#[test]
fn modifications_omit_zeros_and_keep_odd_names() {
    let disk = Modification::add(Resource::MappedVirtualDisk(MappedVirtualDisk {
        mount_path: "/run/mounts/scsi/0_0_0".into(),
        read_only: true,
        ..Default::default()
    }));
    let request = ModificationRequest::try_from(&disk).unwrap();
    assert_eq!(
        text(&request),
        r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/0_0_0","ReadOnly":true}}"#
    );
    assert_eq!(Modification::try_from(request).unwrap(), disk);

    let nic = NetworkAdapter {
        namespace_id: "n".into(),
        id: "i".into(),
        ip_configs: vec![IpConfig { ip_address: "10.0.0.2".into(), prefix_length: 24 }],
        dns_server_list: "10.0.0.1".into(),
        ..Default::default()
    };
    assert_eq!(
        text(&nic),
        r#"{"NamespaceID":"n","ID":"i","DNSServerList":"10.0.0.1","IPConfigs":[{"IPAddress":"10.0.0.2","PrefixLength":24}]}"#
    );
    let nic = NetworkAdapter {
        mac_address: "52-54-00-00-00-01".into(),
        routes: vec![Route {
            next_hop: "fd00::1".into(),
            destination_prefix: "::/0".into(),
            metric: 70_000,
            dunlin_source: "fd00::2".into(),
            dunlin_on_link: true,
        }],
        dunlin_name: "eth0".into(),
        dunlin_mtu: 1400,
        dunlin_neighbors: vec![Neighbor {
            ip_address: "fd00::1".into(),
            mac_address: "02:00:00:00:00:01".into(),
        }],
        ..Default::default()
    };
    let update = Modification::update(Resource::Network(nic));
    let request = ModificationRequest::try_from(&update).unwrap();
    assert_eq!(
        text(&request),
        concat!(
            r#"{"RequestType":"Update","ResourceType":"Network","Settings":{"DunlinMtu":1400,"DunlinName":"eth0","#,
            r#""DunlinNeighbors":[{"IPAddress":"fd00::1","MacAddress":"02:00:00:00:00:01"}],"#,
            r#""MacAddress":"52-54-00-00-00-01","Routes":[{"DestinationPrefix":"::/0","DunlinOnLink":true,"#,
            r#""DunlinSource":"fd00::2","Metric":70000,"NextHop":"fd00::1"}]}}"#
        )
    );
    assert_eq!(Modification::try_from(request).unwrap(), update);
    let layers = CombinedLayers { container_id: "c".into(), ..Default::default() };
    assert_eq!(text(&layers), r#"{"ContainerID":"c"}"#);
}

#[test]
fn a_modification_without_type_adds_and_an_unknown_one_is_named() {
    let request: ModificationRequest = serde_json::from_str(r#"{"ResourceType":"SCSIDevice"}"#).unwrap();
    let scsi = Modification::try_from(request).unwrap();
    assert_eq!(scsi, Modification::add(Resource::ScsiDevice(ScsiDevice::default())));
    let request: ModificationRequest = serde_json::from_str(r#"{"ResourceType":"HvSocket"}"#).unwrap();
    assert!(Modification::try_from(request).unwrap_err().to_string().contains("HvSocket"));
}

#[test]
fn message_numbers_go_both_ways() {
    assert_eq!(Request::PauseContainer.message_type().response().0, 0x2010_d101);
    for (request, number) in TYPES {
        assert_eq!(Request::from_message_type(request.message_type()), Some(request));
        assert_eq!(request.message_type().0, number);
    }
    assert_eq!(Request::from_message_type(crate::frame::MessageType(0x1010_0e01)), None);
}

#[test]
fn unknown_properties_are_read() {
    let query: PropertyQuery = serde_json::from_str(r#"{"PropertyTypes":["Statistics","Memory"]}"#).unwrap();
    assert_eq!(query.property_types, [PropertyType::Statistics, PropertyType::Unknown]);
}
