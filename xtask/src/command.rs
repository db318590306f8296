//! Running other programs. Called by every task; a program that fails is an error that names it.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command with the terminal as its output.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and returns what it printed; its errors go to the terminal.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed what is not UTF-8", shown(command)))
}

/// A command that runs as root: as it is for root, through sudo for others.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    command
}

/// Whether [`as_root`] asks no question now.
pub(crate) fn root_is_free() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["--non-interactive", "--validate"]);
    sudo.stdin(Stdio::null()).stderr(Stdio::null());
    sudo.status().is_ok_and(|status| status.success())
}

/// Whether a program is found on the path.
pub(crate) fn exists(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let mut line = format!("`{}", command.get_program().to_string_lossy());
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line.push('`');
    line
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{exists, output, run};

    #[test]
    fn a_failing_program_is_named_with_its_arguments() {
        let error = run(Command::new("false").arg("--really")).unwrap_err();
        assert!(format!("{error:#}").contains("`false --really` failed"));
    }

    #[test]
    fn output_is_what_was_printed() {
        assert_eq!(
            output(Command::new("echo").arg("spore")).unwrap(),
            "spore\n"
        );
    }

    #[test]
    fn a_program_that_is_not_there_does_not_exist() {
        assert!(exists("sh"));
        assert!(!exists("no-such-program-of-spore"));
    }
}
