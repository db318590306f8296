//! The program: every verb of Spore, and the composition root of its daemon.
//!
//! It reads the command line, runs one verb, prints what went wrong and ends with a code that
//! says whose fault it was. All that is printed goes through `cli/output.rs`; environment and
//! configuration are read in `config.rs` only.
#![forbid(unsafe_code)]

mod cli;
mod config;
mod document;
mod log;
mod manifest;
mod pack;
mod server;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
