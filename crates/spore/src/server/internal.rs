//! The internal verbs: what the daemon starts this program as, besides itself.
//!
//! Each runs in a process of its own and gives up what it does not need before it reads a byte that
//! somebody else wrote. None of them is for people; `--help` does not show them.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use spore_node::confine::limits::ProcessLimits;
use spore_node::confine::{Confinement, Network, confine, take_inherited};

use super::gateway_process::{FEED_FD, HTTP_FD, OLDER_LOG_FD};
use crate::log::{self, LogConfig, LogFile};

/// `spore gateway`: the door.
///
/// # Errors
/// When it was not started by a daemon, or cannot be confined.
pub(crate) fn gateway(uid: u32, stamp: String, log: &LogConfig) -> Result<ExitCode> {
    let http = take_inherited(HTTP_FD).context("the visitors' socket")?;
    let feed = take_inherited(FEED_FD).context("the daemon's socket")?;
    let older_log = take_inherited(OLDER_LOG_FD).context("the older log")?;
    confine(&Confinement {
        uid,
        keep: vec![http.as_raw_fd(), feed.as_raw_fd(), older_log.as_raw_fd()],
        network: Network::Empty,
        limits: ProcessLimits::GATEWAY,
    })?;
    log::to_stderr(log, Some(LogFile::inherited(older_log, log.format)?));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the gateway's runtime")?;
    let config = spore_gateway::Config {
        stamp,
        ..spore_gateway::Config::default()
    };
    runtime.block_on(spore_gateway::run(config, TcpListener::from(http), feed))?;
    Ok(ExitCode::SUCCESS)
}

/// `spore egress`: the proxy of one VM.
///
/// # Errors
/// When it was not started by a node, or cannot be confined.
pub(crate) fn egress(uid: u32) -> Result<ExitCode> {
    spore_node::egress::main(uid, std::io::stdin())?;
    Ok(ExitCode::SUCCESS)
}

/// `spore jail`: the launcher of one VMM.
pub(crate) fn jail() -> ExitCode {
    spore_node::jail::main()
}

/// `spore image-pack`: makes one image of one archive.
pub(crate) fn image_pack() -> ExitCode {
    spore_node::image::worker::serve()
}

/// `spore keep-token`: writes a user's copy of the token, with the user's rights.
///
/// # Errors
/// When it runs as root, or cannot write it.
pub(crate) fn keep_token(home: &Path) -> Result<ExitCode> {
    ensure!(
        !rustix::process::geteuid().is_root(),
        "root writes nothing below a user's home"
    );
    super::token::keep(home, std::io::stdin())?;
    Ok(ExitCode::SUCCESS)
}
