//! The launcher of VMMs alone, for the tests of this crate: `spore jail` is the same function.

use std::process::ExitCode;

fn main() -> ExitCode {
    spore_node::jail::main()
}
