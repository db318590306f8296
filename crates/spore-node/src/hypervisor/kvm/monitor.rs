//! A VMM's control socket as the task of a VM uses it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{MemfdFlags, memfd_create};
use spore_wire::vmm::{FromVmm, ToVmm, VmmState};

use super::client::Client;
use crate::hypervisor::fork::{Below, CaptureError};
use crate::hypervisor::monitored::capture::step;
use crate::hypervisor::monitored::{Handed, Monitor, Said};

/// How long the VMM of a VM that runs may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest may take to stand still: a disk of the host's may be waited for.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);

/// More than a console's last output has.
const CONSOLE_BYTES_MAX: u64 = 256 * 1024;

/// The connection, and what was done over it.
#[derive(Debug)]
pub(super) struct KvmMonitor {
    socket: PathBuf,
    /// `None` once it hung up.
    client: Option<Client>,
    handed: Option<Handed>,
}

impl KvmMonitor {
    /// Connects to the VMM of a VM that runs.
    pub(super) async fn connect(socket: PathBuf) -> io::Result<Self> {
        Ok(Self {
            client: Some(Client::connect(&socket, GREETING_TIMEOUT).await?),
            socket,
            handed: None,
        })
    }

    /// The VMM, connected anew where the last request to it was given up.
    async fn client(&mut self) -> io::Result<&mut Client> {
        if self
            .client
            .as_ref()
            .is_some_and(|client| !client.is_in_step())
        {
            self.client = None;
            self.client = Some(Client::connect(&self.socket, GREETING_TIMEOUT).await?);
        }
        let hung_up = || io::Error::from(io::ErrorKind::NotConnected);
        self.client.as_mut().ok_or_else(hung_up)
    }

    async fn ask(&mut self, request: ToVmm, fds: &[BorrowedFd<'_>]) -> io::Result<u64> {
        let client = self.client().await?;
        client.ask(&request, fds, Duration::ZERO).await
    }
}

#[async_trait]
impl Monitor for KvmMonitor {
    async fn guest_ended(&mut self) {
        while let Some(client) = &mut self.client {
            match client.next_event().await {
                Ok(FromVmm::Ended { .. }) => return,
                Ok(_event) => {}
                // It hangs up when it ends; what else it means, the pidfd tells.
                Err(_hung_up) => self.client = None,
            }
        }
        std::future::pending().await
    }

    async fn is_over(&mut self) -> bool {
        let client = self.client.as_ref();
        client.is_some_and(|client| client.state() == VmmState::Ended)
    }

    async fn pause(&mut self) -> io::Result<()> {
        let limit_ms = u64::try_from(PAUSE_LIMIT.as_millis()).unwrap_or(u64::MAX);
        let client = self.client().await?;
        let pause = ToVmm::Pause { limit_ms };
        client.ask(&pause, &[], PAUSE_LIMIT).await.map(drop)
    }

    async fn resume(&mut self) -> io::Result<()> {
        self.ask(ToVmm::Resume, &[]).await.map(drop)
    }

    async fn console(&mut self) -> io::Result<Said> {
        let file = File::from(memfd_create(c"console", MemfdFlags::CLOEXEC)?);
        let written = self.ask(ToVmm::Console, &[file.as_fd()]).await?;
        let bytes = written.min(CONSOLE_BYTES_MAX).min(file.metadata()?.len());
        let mut said = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.read_exact_at(&mut said, 0)?;
        Ok(Said::Last(said))
    }

    async fn quit(&mut self) -> io::Result<()> {
        // It ends instead of an answer.
        let client = self.client().await?;
        match client.ask(&ToVmm::Quit, &[], Duration::ZERO).await {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done.map(drop),
        }
    }

    async fn prepare(&mut self, handed: Handed) -> io::Result<(Below, u64)> {
        if handed.scratch.is_some() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.handed = Some(handed);
        Ok((Below::Nothing, 0))
    }

    async fn capture(&mut self) -> Result<(), CaptureError> {
        let unprepared = || io::Error::other("nothing was prepared for a capture");
        let handed = self.handed.take().ok_or_else(unprepared);
        let handed = handed.map_err(step("saving its devices"))?;
        let saved = self.ask(ToVmm::Save, &[handed.state.as_fd()]).await;
        saved.map_err(step("saving its devices"))?;
        Ok(())
    }

    async fn hasten(&mut self) {}

    async fn is_copied(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    async fn forget(&mut self) -> io::Result<()> {
        self.handed = None;
        Ok(())
    }

    async fn end_old_copy(&mut self) -> io::Result<()> {
        Ok(())
    }
}
