//! The daemon as the tests run it: a binary of this package, so that building a test always builds it afresh.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    preflightd::cli::main()
}
