//! `up`, `down`, `server`, and the internal verbs that the daemon starts this program as.
//!
//! They need no daemon to talk to, so they are run before a client is made. What they do is in
//! `server/`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::output::{Format, Output};
use crate::config::{ServerConfig, environment, invoker, supervisor};
use crate::log::{LogConfig, LogFormat};
use crate::server::{self, HypervisorChoice};

/// Start Spore on this host, unless it runs
#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    hypervisor: Hypervisor,
}

/// Stop every VM, the gateway and the daemon
#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    file: ConfigFile,
}

/// Run the daemon in the foreground
#[derive(Debug, Args)]
pub(crate) struct Server {
    #[command(flatten)]
    file: ConfigFile,
    /// A user besides root who may use the API's socket, and gets a copy of the token
    #[arg(long, value_name = "UID")]
    admit_uid: Option<u32>,
    #[command(flatten)]
    hypervisor: Hypervisor,
}

/// The door (started by the daemon)
#[derive(Debug, Args)]
pub(crate) struct Gateway {
    /// The uid it runs as
    #[arg(long)]
    uid: u32,
    /// What it logs
    #[arg(long)]
    log: String,
    /// How its log looks
    #[arg(long)]
    log_format: LogFormat,
    /// What it calls itself towards daemons
    #[arg(long)]
    stamp: String,
}

/// A VM's egress proxy (started by the daemon)
#[derive(Debug, Args)]
pub(crate) struct Egress {
    /// The uid it runs as
    #[arg(long)]
    uid: u32,
}

/// The writer of a user's copy of the token (started by the daemon)
#[derive(Debug, Args)]
pub(crate) struct KeepToken {
    /// The user's home folder
    home: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Hypervisor {
    /// What hosts VMs: `kvm`, `qemu`, or `auto`, which is `kvm` where KVM runs guests [default:
    /// what the configuration says]
    #[arg(
        id = "hypervisor",
        long = "hypervisor",
        value_name = "NAME",
        hide_possible_values = true
    )]
    forced: Option<HypervisorChoice>,
}

impl Hypervisor {
    fn over(&self, mut config: ServerConfig) -> ServerConfig {
        config.hypervisor = self.forced.unwrap_or(config.hypervisor);
        config
    }
}

#[derive(Debug, Args)]
pub(crate) struct ConfigFile {
    /// The configuration [default: /etc/spore/spore.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    pub(crate) fn read(&self) -> Result<ServerConfig> {
        Ok(ServerConfig::read(self.config.as_deref())?)
    }
}

impl Up {
    pub(crate) fn run(&self, output: &Output) -> Result<u8> {
        let config = self.hypervisor.over(self.file.read()?);
        let started_with = server::StartOptions {
            file: self.file.config.as_deref(),
            invoker: invoker(&environment),
            hypervisor: self.hypervisor.forced,
        };
        let up = server::up(&config, started_with)?;
        if output.format() == Format::Json {
            output.json(&json!({ "started": up.started, "status": up.status }))?;
            return Ok(0);
        }
        let now = if up.started {
            "is up"
        } else {
            "was up already"
        };
        output.line(&format!("Spore {} {now}", up.status.version))?;
        output.line(&format!(
            "  apps      http://APP.{}:{}/",
            up.status.base,
            config.gateway.port()
        ))?;
        output.line(&format!(
            "  api       {} and {}/api.sock",
            config.api,
            config.runtime_dir.display()
        ))?;
        output.line(&format!("  boundary  {}", up.status.boundary_text))?;
        Ok(0)
    }
}

impl Down {
    pub(crate) fn run(&self, output: &Output) -> Result<u8> {
        let config = self.file.read()?;
        let down = server::down(&config, self.file.config.as_deref())?;
        if output.format() == Format::Json {
            output.json(&json!({ "daemon": down.daemon, "vms": down.vms }))?;
            return Ok(0);
        }
        let daemon = if down.daemon {
            "Spore is down"
        } else {
            "Spore was not running"
        };
        output.line(&format!("{daemon}; VMs stopped: {}", down.vms))?;
        Ok(0)
    }
}

impl Server {
    pub(crate) fn run(&self) -> Result<u8> {
        let config = self.hypervisor.over(self.file.read()?);
        let options = server::ServerOptions {
            admit_uid: self.admit_uid,
            supervisor: supervisor(&environment),
        };
        server::serve(&config, &options)?;
        Ok(0)
    }
}

impl Gateway {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let log = LogConfig {
            filter: self.log,
            format: self.log_format,
        };
        server::gateway(self.uid, self.stamp, &log)
    }
}

impl Egress {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        server::egress(self.uid)
    }
}

impl KeepToken {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        server::keep_token(&self.home)
    }
}
