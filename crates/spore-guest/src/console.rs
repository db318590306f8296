//! The kernel's console: where PID 1 says what it cannot tell a host.
//!
//! Called where something of the agent's own fails. Never carries a tenant's values.

use std::io::Write as _;

/// Writes one line, if there is a console.
pub fn say(line: &str) {
    let file = std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    if let Ok(mut file) = file {
        // `<4>`: a warning, so that a quiet kernel still shows it. Without a console nobody reads.
        drop(file.write_all(format!("<4>spore-guest: {line}\n").as_bytes()));
    }
}
