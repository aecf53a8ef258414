//! The command line.
use std::process::ExitCode;

/// Runs the command line; the exit code is 0 good, 1 findings, 2 usage.
pub fn main() -> ExitCode {
    todo!()
}
