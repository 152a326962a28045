//! `dunlin-guest`: PID 1 of the utility VM, and, called as `dunlin-guest oci`, the short-lived
//! process that PID 1 starts for each container operation.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("oci") => dunlin_guest::oci::helper::run(),
        Some(dunlin_guest::init::SECOND_STAGE) if std::process::id() == 1 => {
            dunlin_guest::init::second_stage()
        }
        _ if std::process::id() == 1 => dunlin_guest::init::first_stage(),
        _ => {
            eprintln!("dunlin-guest runs as PID 1 of a Dunlin utility VM; it does nothing elsewhere");
            ExitCode::from(2)
        }
    }
}
