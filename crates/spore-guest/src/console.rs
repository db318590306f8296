//! The kernel's console: where PID 1 says what it cannot tell a host.
//!
//! Called where something of the agent's own fails. Never carries a tenant's values.

use std::io::Write as _;

/// Where the kernel's log is: in the agent's root, and before that is the root.
const LOGS: [&str; 2] = ["/dev/kmsg", "/own/dev/kmsg"];

/// Writes one line, if there is a console.
pub fn say(line: &str) {
    for path in LOGS {
        if let Ok(mut log) = std::fs::OpenOptions::new().write(true).open(path) {
            // `<3>`: an error, so that a quiet kernel still shows it.
            let text = format!("<3>spore-guest: {line}\n");
            if log.write_all(text.as_bytes()).is_ok() {
                return;
            }
        }
    }
}
