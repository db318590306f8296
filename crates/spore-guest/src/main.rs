//! One static program, four lives: PID 1, the start of a tenant's process, the relay, the tenant's
//! command.
//!
//! Run by the kernel, by itself and by tenants. Decides by its process id and first argument which
//! of them it lives, and nothing else.

use std::ffi::OsString;
use std::process::ExitCode;

use spore_guest::{face, forward, init, launch};

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
        return ExitCode::FAILURE;
    }
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let first = arguments.first().and_then(|argument| argument.to_str());
    let code = match first {
        Some(launch::VERB) => launch::become_tenant(&arguments[1..]),
        Some(forward::VERB) => relay(&arguments[1..]),
        _ => {
            let words: Vec<String> = arguments
                .iter()
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect();
            face::ask(&words)
        }
    };
    ExitCode::from(code)
}

fn relay(arguments: &[OsString]) -> u8 {
    let text = |at: usize| arguments.get(at).and_then(|argument| argument.to_str());
    let listener = text(0).and_then(|text| text.parse().ok());
    let inside = text(1).and_then(|text| text.parse().ok());
    match (listener, inside) {
        (Some(listener), Some(inside)) => forward::run(listener, inside),
        _ => 126,
    }
}
