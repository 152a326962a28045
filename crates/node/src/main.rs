//! `dunlin`: moves running containers between hosts. The command line, and the daemon that
//! does the moving.

mod cli;
mod config;
mod containerd;
mod cri;
mod daemon;
mod data;
mod demo;
mod images;
mod lab;
mod network;
mod peer;
mod proto;
mod shim;

fn main() -> std::process::ExitCode {
    cli::main()
}
