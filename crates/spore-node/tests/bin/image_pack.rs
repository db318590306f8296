//! The confined image worker as a program of its own, for `tests/image.rs`. The product starts the
//! same code through an internal verb.

use std::process::ExitCode;

fn main() -> ExitCode {
    spore_node::image::worker::serve()
}
