//! The egress proxy as a program of its own, for the tests of this crate.
//!
//! Started by `tests/egress` through the launcher, as `spore egress` is by the node, or as a
//! stand-in for a daemon that starts one and is then killed. Never installed, never used by
//! anything else.

use std::io::{self, BufRead, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use spore_node::egress::launch::{EgressLauncher, Launch};
use spore_node::egress::{self, EgressError};
use spore_wire::egress::{DNS_FD, EgressBlob, TCP_FD};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (verb, uid) = (arguments.next(), arguments.next());
    let uid = uid.and_then(|uid| uid.parse().ok()).unwrap_or(0);
    let ended = match verb.as_deref() {
        Some("--uid") => egress::main(uid, io::stdin()).map_err(|error| shown(&error)),
        Some("daemon") => daemon(uid).map_err(|error| error.to_string()),
        _ => Err("usage: egress-proxy --uid UID | daemon UID".to_owned()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _closed = writeln!(io::stderr(), "{why}");
            ExitCode::FAILURE
        }
    }
}

fn shown(error: &EgressError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

/// Starts a proxy with its own descriptors 3 and 4, says its pid, and waits to be killed.
fn daemon(uid: u32) -> io::Result<()> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let blob = serde_json::from_str::<EgressBlob>(&line)?;
    let itself = pidfd_open(getpid(), PidfdFlags::empty())?;
    let own =
        |fd| -> io::Result<OwnedFd> { Ok(pidfd_getfd(&itself, fd, PidfdGetfdFlags::empty())?) };
    let log = std::fs::File::from(rustix::io::dup(io::stderr())?);
    let launch = Launch {
        uid,
        blob: &blob,
        tcp: own(TCP_FD)?,
        dns: own(DNS_FD)?,
        log,
    };
    let program = std::env::current_exe()?;
    let proxy = EgressLauncher::new(program, [""; 0])
        .launch(launch, |_pid| Ok(()))
        .map_err(io::Error::other)?;
    writeln!(io::stdout(), "{}", proxy.id())?;
    loop {
        std::thread::park();
    }
}
