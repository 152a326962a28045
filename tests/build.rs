//! Generates a client of `proto/cri.proto` into `OUT_DIR`, and builds the disk oracle there: static, so that it runs in
//! an image without libraries.

use std::{env, process::Command};

fn main() {
    build_oracle();
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let proto = format!("{root}/../proto");
    let input = format!("{proto}/cri.proto");
    println!("cargo::rerun-if-changed={input}");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&[input], &[proto])
        .expect("proto/cri.proto generates");
}

fn build_oracle() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let source = format!("{}/oracle/oracle.rs", variable("CARGO_MANIFEST_DIR"));
    println!("cargo::rerun-if-changed={source}");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "-O", "-C", "panic=abort", "-C", "strip=symbols"]);
    rustc.args(["-C", "target-feature=+crt-static", "--target", &variable("TARGET"), "-o"]);
    let built = rustc.arg(format!("{}/oracle", variable("OUT_DIR"))).arg(&source).status();
    assert!(built.is_ok_and(|status| status.success()), "{source} does not build; is libc6-dev installed?");
}
