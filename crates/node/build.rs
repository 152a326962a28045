//! Generates the messages and stubs of `proto/node.proto` and `proto/cri.proto` into `OUT_DIR`.

fn main() {
    // Asked when it runs: a build directory may outlive the checkout that compiled this.
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let proto = format!("{root}/../../proto");
    let input = format!("{proto}/node.proto");
    println!("cargo::rerun-if-changed={input}");
    let mut builder = tonic_prost_build::configure();
    // What the command line prints as JSON.
    for shown in [
        "Started",
        "PhaseEntered",
        "Progress",
        "Report",
        "NetworkPlan",
        "Nic",
        "ContainerRow",
        "StatusResponse",
        "PeerRow",
        "SessionRow",
    ] {
        builder = builder.type_attribute(format!("dunlin.node.v1.{shown}"), "#[derive(serde::Serialize)]");
    }
    builder.compile_protos(&[input], std::slice::from_ref(&proto)).expect("proto/node.proto generates");

    let input = format!("{proto}/cri.proto");
    println!("cargo::rerun-if-changed={input}");
    tonic_prost_build::configure()
        // containerd shows the configurations as JSON; what is not known in it must not go unseen.
        .message_attribute(".", "#[derive(serde::Deserialize)] #[serde(default, deny_unknown_fields)]")
        .field_attribute("Mount.uidMappings", "#[serde(rename = \"uidMappings\")]")
        .field_attribute("Mount.gidMappings", "#[serde(rename = \"gidMappings\")]")
        .field_attribute("ContainerConfig.CDI_devices", "#[serde(rename = \"CDI_devices\")]")
        .field_attribute(
            "KeyValue.value",
            "#[serde(deserialize_with = \"crate::cri::stored::text_as_bytes\")]",
        )
        .compile_protos(&[input], &[proto])
        .expect("proto/cri.proto generates");
}
