//! Runs one of the host's own tools, bounded in time and in what it says.
//!
//! Called on threads that may block, by whoever needs `nft`, `mkfs.ext4` or QEMU's version. A tool
//! that hangs is killed: one that waits for a lock of somebody else must not hold up every VM.
//! Never runs a shell, and never anything that a tenant wrote.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;

/// The most of a tool's output that is read.
const SAID_BYTES_MAX: u64 = 1024 * 1024;

/// Why a tool did not do its work.
#[derive(Debug, Error)]
pub(crate) enum ToolError {
    /// It is not there or cannot be run.
    #[error("cannot run `{program}`: {hint}")]
    Start {
        program: String,
        /// What to do.
        hint: &'static str,
        source: io::Error,
    },
    /// It hung.
    #[error("`{program}` took over {limit:?} and was killed: the host may be overloaded")]
    Slow { program: String, limit: Duration },
    /// It refused.
    #[error("`{program}` ended with {status}: {said}")]
    Failed {
        program: String,
        status: ExitStatus,
        said: String,
    },
    /// Its output could not be taken or its end not awaited.
    #[error("cannot follow `{program}`")]
    Follow { program: String, source: io::Error },
}

impl From<ToolError> for io::Error {
    fn from(error: ToolError) -> Self {
        match error {
            // The kind tells callers that the tool is missing.
            ToolError::Start { ref source, .. } => Self::new(source.kind(), error.to_string()),
            other => Self::other(other),
        }
    }
}

/// A file that gives `bytes`, for a tool's standard input.
pub(crate) fn input(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"tool-input", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

/// Runs a command to its end, at most for `limit`, and gives what it wrote. The caller chooses its
/// standard input; it keeps nothing else of this process but what it is given.
pub(crate) fn run(
    mut command: Command,
    limit: Duration,
    hint: &'static str,
) -> Result<Vec<u8>, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let follow = |source: io::Error| ToolError::Follow {
        program: program.clone(),
        source,
    };
    // Files and not pipes: a tool that fills a pipe would wait for a reader.
    let (mut out, mut err) = (input(b"").map_err(follow)?, input(b"").map_err(follow)?);
    command.stdout(out.try_clone().map_err(follow)?);
    command.stderr(err.try_clone().map_err(follow)?);
    let mut child = command.spawn().map_err(|source| ToolError::Start {
        program: program.clone(),
        hint,
        source,
    })?;
    let ended = await_end(&child, limit);
    if !matches!(ended, Ok(true)) {
        // One that ended by itself meanwhile is only waited for.
        drop(child.kill());
    }
    let status = child.wait().map_err(follow)?;
    if !ended.map_err(follow)? {
        return Err(ToolError::Slow { program, limit });
    }
    if !status.success() {
        let said = String::from_utf8_lossy(&said(&mut err).map_err(follow)?)
            .trim()
            .to_owned();
        return Err(ToolError::Failed {
            program,
            status,
            said,
        });
    }
    said(&mut out).map_err(follow)
}

/// Whether the child ended in time.
fn await_end(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    loop {
        let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut polled, Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn said(file: &mut File) -> io::Result<Vec<u8>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(SAID_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::{ToolError, input, run};

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_tool_that_hangs_is_killed_and_named() {
        let mut sleep = Command::new("sleep");
        sleep.arg("600").stdin(Stdio::null());
        let error = run(sleep, Duration::from_millis(50), "install it").unwrap_err();
        assert!(matches!(error, ToolError::Slow { .. }), "{error}");
        assert!(
            error.to_string().contains("`sleep` took over 50ms"),
            "{error}"
        );
    }

    #[test]
    fn what_it_reads_and_writes_goes_through() {
        let mut cat = Command::new("cat");
        let much = vec![b'x'; 300_000];
        cat.stdin(input(&much).unwrap());
        assert_eq!(run(cat, LONG, "install it").unwrap(), much);
    }

    #[test]
    fn a_refusal_says_what_the_tool_said_and_a_missing_one_what_to_do() {
        let mut cat = Command::new("cat");
        cat.arg("/no/such/file").stdin(Stdio::null());
        let error = run(cat, LONG, "install it").unwrap_err().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
        let missing = Command::new("/no/such/program");
        let error = io::Error::from(run(missing, LONG, "install it").unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("install it"), "{error}");
    }
}
