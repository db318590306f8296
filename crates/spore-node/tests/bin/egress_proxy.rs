//! The egress proxy as a program of its own, for the tests of this crate.
//!
//! Started by `tests/egress.rs` through the launcher, as `spore egress` is by the node. Never
//! installed, never used by anything else.

use std::process::ExitCode;

use spore_node::egress;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let uid = match (arguments.next().as_deref(), arguments.next()) {
        (Some("--uid"), Some(uid)) => uid.parse().unwrap_or(0),
        _ => 0,
    };
    match egress::main(uid, std::io::stdin()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            report(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the reason is what the test's log is read for"
)]
fn report(error: &egress::EgressError) {
    eprintln!("{error:?}");
}
