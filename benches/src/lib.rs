//! Figures of Dunlin beside bare QEMU, measured in one run on one machine.
//!
//! ```text
//! benches/migration ──> bare: two QEMUs and the shortest sequence of QMP commands
//! benches/footprint ──> lab:  two hosts, `ctr run`, `dunlin migrate`; observe: what their QEMUs report
//! ```
//!
//! Nothing is asserted on a time: machines are noisy, so what is printed are rounds, medians and ratios.

pub mod bare;
pub mod counter;
mod error;
pub mod figures;
pub mod lab;
pub mod memory;
pub mod observe;
pub mod programs;

pub use error::BenchError;

/// Runs a program's work on one thread until it is done or a signal asks for the end; what it holds is
/// dropped, and so taken down, in both cases.
///
/// # Errors
/// The work's, or [`BenchError::Interrupted`].
pub fn run<T>(work: impl Future<Output = Result<T, BenchError>>) -> Result<T, BenchError> {
    use tokio::signal::unix::{SignalKind, signal};
    let io = |source| BenchError::Io { what: "start the runtime".to_owned(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(io)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(io)?;
        tokio::select! {
            result = work => result,
            _ = terminate.recv() => Err(BenchError::Interrupted),
            _ = interrupt.recv() => Err(BenchError::Interrupted),
        }
    })
}
