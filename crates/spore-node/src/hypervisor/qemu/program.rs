//! What QEMU's program says of itself, asked once when the driver is opened. Blocks.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::tool;

/// How long `qemu --version` may take; it loads some hundred libraries.
const VERSION_LIMIT: Duration = Duration::from_secs(30);

/// The monitor's command that saves devices.
pub(super) const SAVE: &str = "xen-save-devices-state";

/// The first line of `qemu --version`.
pub(super) fn version(program: &Path) -> io::Result<String> {
    let mut command = Command::new(program);
    command.arg("--version").env_clear().stdin(Stdio::null());
    let hint = "install the package qemu-system-x86";
    let said = tool::run(command, VERSION_LIMIT, hint)?;
    let text = String::from_utf8_lossy(&said);
    text.lines()
        .next()
        .map(str::to_owned)
        .ok_or_else(|| io::Error::other("it said no version"))
}

/// Whether QEMU was built with what saves devices without memory.
pub(super) fn can_capture(program: &Path) -> io::Result<bool> {
    let mut command = Command::new(program);
    command.args(["-no-user-config", "-nodefaults", "-display", "none"]);
    command
        .args(["-machine", "none", "-qmp", "stdio"])
        .env_clear();
    let asked = ["qmp_capabilities", "query-commands", "quit"];
    let asked = asked.map(|name| format!("{}\n", json!({"execute": name})));
    command.stdin(tool::input(asked.concat().as_bytes())?);
    let hint = "install the package qemu-system-x86";
    let said = tool::run(command, VERSION_LIMIT, hint)?;
    let lines = said.split(|byte| *byte == b'\n');
    let mut answers = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let is_list = |answer: &Value| answer["return"].is_array();
    let list = answers.find(is_list);
    let list = list.ok_or_else(|| io::Error::other("it did not say what its monitor knows"))?;
    let mut commands = list["return"].as_array().into_iter().flatten();
    Ok(commands.any(|command| command["name"] == SAVE))
}
