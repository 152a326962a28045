//! Generates the protobuf messages and the ttrpc stubs of `proto/` into `OUT_DIR`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    // Asked when it runs: a build directory may outlive the checkout that compiled this.
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let proto = format!("{root}/../../proto");
    let inputs = ["migration", "saved", "images"].map(|name| format!("{proto}/{name}.proto"));
    for input in &inputs {
        println!("cargo::rerun-if-changed={input}");
    }
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .inputs(&inputs)
        .include(proto)
        .rust_protobuf()
        // Ordered maps: equal messages have equal bytes.
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true).btreemaps(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()
        .expect("proto/*.proto generates");
    // The generated mod.rs lists the messages only; the stubs stand beside them.
    let modules = std::path::Path::new(&out).join("mod.rs");
    let mut text = std::fs::read_to_string(&modules).expect("the generator wrote mod.rs");
    text.push_str("pub mod migration_ttrpc;\npub mod images_ttrpc;\n");
    std::fs::write(&modules, text).expect("OUT_DIR is writable");
    // A service without a package is called `Migration` on the wire of every other ttrpc
    // implementation; this generator writes the empty package's dot in front.
    let stubs = std::path::Path::new(&out).join("migration_ttrpc.rs");
    let text = std::fs::read_to_string(&stubs).expect("the generator wrote the stubs");
    let text = text.replace(r#"".Migration""#, r#""Migration""#);
    std::fs::write(&stubs, text).expect("OUT_DIR is writable");
}
