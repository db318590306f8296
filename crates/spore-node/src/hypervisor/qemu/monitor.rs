//! QEMU's monitor as the task of a VM uses it.
//!
//! A command that QEMU does not answer in time leaves a connection on which answers would be taken
//! for those of other commands, so it is closed and the next command has a new one.

use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::arguments::{CONSOLE, CONSOLE_BYTES};
use super::qmp::Qmp;
use super::{SAVE, copy};
use crate::hypervisor::fork::{Below, CaptureError};
use crate::hypervisor::monitored::capture::step;
use crate::hypervisor::monitored::{Handed, Monitor, Said};

/// How long the monitor of a VM that runs may take to greet. Another client that is just gone
/// makes it wait a little.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// The connection, and what was done over it.
#[derive(Debug)]
pub(super) struct QemuMonitor {
    socket: PathBuf,
    /// `None` once it hung up.
    qmp: Option<Qmp>,
    /// Whether the guest was told to stand still; `None` is not known.
    stands: Option<bool>,
    /// The number of the file for what its devices are, and what the copy of its disk will be over.
    handed: Option<(u64, Option<Below>)>,
    copy: Copy,
}

/// How far a copy of the scratch disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// There is nothing of one.
    None,
    /// There may be one that nobody waits for, or what was made for it.
    MayBeThere,
    /// It is held back.
    HeldBack,
}

impl QemuMonitor {
    /// Connects to the monitor of a VM that runs.
    pub(super) async fn connect(socket: PathBuf) -> io::Result<Self> {
        Ok(Self {
            qmp: Some(Qmp::connect(&socket, GREETING_TIMEOUT).await?),
            socket,
            stands: None,
            handed: None,
            copy: Copy::MayBeThere,
        })
    }

    /// The monitor, connected anew where the last command on it was given up.
    async fn qmp(&mut self) -> io::Result<&mut Qmp> {
        if self.qmp.as_ref().is_some_and(|qmp| !qmp.is_in_step()) {
            // QEMU greets the next client once this one is gone.
            self.qmp = None;
            self.qmp = Some(Qmp::connect(&self.socket, GREETING_TIMEOUT).await?);
        }
        let hung_up = || io::Error::from(io::ErrorKind::NotConnected);
        self.qmp.as_mut().ok_or_else(hung_up)
    }

    async fn execute(&mut self, command: &str) -> io::Result<Value> {
        self.qmp().await?.execute(command, json!({})).await
    }

    async fn status(&mut self) -> io::Result<String> {
        let told = self.execute("query-status").await?;
        let status = told.get("status").and_then(Value::as_str);
        Ok(status.unwrap_or_default().to_owned())
    }
}

#[async_trait]
impl Monitor for QemuMonitor {
    async fn guest_ended(&mut self) {
        while let Some(qmp) = &mut self.qmp {
            match qmp.next_event().await {
                Ok(event) if event == "SHUTDOWN" => return,
                Ok(_event) => {}
                // It hangs up when it ends; what else it means, the pidfd tells.
                Err(_hung_up) => self.qmp = None,
            }
        }
        std::future::pending().await
    }

    async fn is_over(&mut self) -> bool {
        self.status().await.is_ok_and(|status| status == "shutdown")
    }

    async fn pause(&mut self) -> io::Result<()> {
        self.stands = None;
        self.execute("stop").await?;
        self.stands = Some(true);
        Ok(())
    }

    async fn resume(&mut self) -> io::Result<()> {
        self.stands = None;
        self.execute("cont").await?;
        self.stands = Some(false);
        Ok(())
    }

    async fn console(&mut self) -> io::Result<Said> {
        let ring = self.qmp().await?.read_ring(CONSOLE, CONSOLE_BYTES);
        ring.await.map(Said::Next)
    }

    async fn quit(&mut self) -> io::Result<()> {
        self.execute("quit").await.map(drop)
    }

    /// Files go over the connection: QEMU opens no path.
    async fn prepare(&mut self, handed: Handed) -> io::Result<(Below, u64)> {
        let left = std::mem::replace(&mut self.copy, Copy::MayBeThere);
        self.handed = None;
        let qmp = self.qmp().await?;
        if left != Copy::None {
            copy::forget(qmp).await?;
        }
        let state = qmp.add_fd(handed.state.as_fd(), copy::MARK).await?;
        let mut over = None;
        if let Some(scratch) = &handed.scratch {
            let key = scratch.passphrase();
            let key = key.as_ref().map(|key| key.as_str());
            copy::add(qmp, scratch.file.as_fd(), key).await?;
            over = Some(copy::extent(qmp, scratch.below).await?);
        }
        self.handed = Some((state, over.map(|(below, _bytes)| below)));
        Ok(over.unwrap_or((Below::Nothing, 0)))
    }

    async fn capture(&mut self) -> Result<(), CaptureError> {
        if self.stands != Some(true) {
            let status = self.status().await;
            let status = status.map_err(step("asking for its status"))?;
            if status != "paused" {
                return Err(CaptureError::NotPaused(status));
            }
        }
        let unprepared = || io::Error::other("nothing was prepared for a capture");
        let handed = self.handed.take().ok_or_else(unprepared);
        let (state, over) = handed.map_err(step("saving its devices"))?;
        let qmp = self.qmp().await.map_err(step("saving its devices"))?;
        let arguments = json!({"filename": format!("/dev/fdset/{state}"), "live": false});
        let saved = qmp.execute(SAVE, arguments).await;
        saved.map_err(step("saving its devices"))?;
        if let Some(over) = over {
            let begun = copy::begin(qmp, over).await;
            begun.map_err(step("copying its scratch disk"))?;
            self.copy = Copy::HeldBack;
        }
        Ok(())
    }

    async fn hasten(&mut self) {
        if self.copy != Copy::HeldBack {
            return;
        }
        self.copy = Copy::MayBeThere;
        let hastened = match self.qmp().await {
            Ok(qmp) => copy::hasten(qmp).await,
            Err(error) => Err(error),
        };
        if let Err(error) = hastened {
            tracing::warn!(%error, "the copy of a scratch disk is held back");
        }
    }

    async fn is_copied(&mut self) -> io::Result<bool> {
        let qmp = self.qmp().await?;
        if !copy::is_over(qmp).await? {
            return Ok(false);
        }
        copy::conclude(qmp).await?;
        self.copy = Copy::None;
        Ok(true)
    }

    async fn forget(&mut self) -> io::Result<()> {
        self.handed = None;
        let qmp = self.qmp().await?;
        copy::forget(qmp).await?;
        self.copy = Copy::None;
        Ok(())
    }

    async fn end_old_copy(&mut self) -> io::Result<()> {
        let qmp = self.qmp().await?;
        if copy::is_there(qmp).await? {
            self.forget().await?;
        }
        Ok(())
    }
}
