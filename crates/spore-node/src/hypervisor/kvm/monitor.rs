//! A VMM's control socket as the task of a VM uses it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{MemfdFlags, memfd_create};
use spore_wire::launch::{FdIndex, Layer};
use spore_wire::vmm::{self, CopyOf, FromVmm, ToVmm, VmmState};

use super::client::Client;
use super::files::layer_key;
use crate::disk::Disks;
use crate::disk::overlay::DiskKey;
use crate::hypervisor::fork::{Below, CaptureError};
use crate::hypervisor::monitored::capture::step;
use crate::hypervisor::monitored::{Handed, HandedScratch, Monitor, Said};

/// How long the VMM of a VM that runs may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest may take to stand still: a disk of the host's may be waited for.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);

/// More than a console's last output has.
const CONSOLE_BYTES_MAX: u64 = 256 * 1024;

/// From so many layers on a copy is of everything, so that chains do not grow beyond: each layer
/// costs a VMM a descriptor and a little time at its start.
const LAYERS_MAX: usize = 12;

/// The connection, and what was done over it.
#[derive(Debug)]
pub(super) struct KvmMonitor {
    socket: PathBuf,
    /// Where new layers are.
    disks: Disks,
    /// `None` once it hung up.
    client: Option<Client>,
    /// Whether the guest was told to stand still; `None` is not known.
    stands: Option<bool>,
    /// What the next capture is written to.
    ready: Option<Prepared>,
    copy: Copying,
}

/// What a capture is written to, and where the guest goes on.
#[derive(Debug)]
struct Prepared {
    state: File,
    scratch: Option<PreparedScratch>,
}

#[derive(Debug)]
struct PreparedScratch {
    to: HandedScratch,
    below: Below,
    /// The layer that it goes on with, and what it is encrypted with: nobody else has that.
    own: (File, DiskKey),
}

/// How far a copy of the scratch disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Copying {
    /// There is none.
    None,
    /// It is under way.
    UnderWay,
    /// It is whole, or why it is not.
    Over(Option<String>),
}

impl KvmMonitor {
    /// Connects to the VMM of a VM that runs.
    pub(super) async fn connect(socket: PathBuf, disks: Disks) -> io::Result<Self> {
        let client = Client::connect(&socket, GREETING_TIMEOUT).await?;
        Ok(Self {
            stands: Some(client.greeting().state == VmmState::Paused),
            client: Some(client),
            socket,
            disks,
            ready: None,
            copy: Copying::None,
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
            let client = Client::connect(&self.socket, GREETING_TIMEOUT).await?;
            if self.copy == Copying::UnderWay && client.greeting().copy.is_none() {
                self.copy = Copying::Over(Some("the VMM has forgotten it".to_owned()));
            }
            self.client = Some(client);
        }
        let hung_up = || io::Error::from(io::ErrorKind::NotConnected);
        self.client.as_mut().ok_or_else(hung_up)
    }

    /// Freezes the disk's layer, lets the guest go on with another over it, and begins the copy.
    async fn copy(&mut self, scratch: PreparedScratch) -> io::Result<()> {
        let first = FdIndex(0);
        let (file, key) = &scratch.own;
        let own = Layer {
            file: first,
            key: Some(layer_key(key)),
        };
        self.ask(ToVmm::Switch { own }, &[file.as_fd()]).await?;
        let to = Layer {
            file: first,
            key: scratch.to.key.as_ref().map(layer_key),
        };
        let below = match scratch.below {
            Below::Nothing => vmm::Below::Nothing,
            Below::Source => vmm::Below::Source,
        };
        let of = CopyOf::Frozen;
        let request = ToVmm::Copy { to, below, of };
        self.ask(request, &[scratch.to.file.as_fd()]).await?;
        self.copy = Copying::UnderWay;
        Ok(())
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
                Ok(FromVmm::Copied { why }) => self.copy = Copying::Over(why),
                Ok(_event) => {}
                // It hangs up when it ends; what else it means, the pidfd tells.
                Err(_hung_up) => self.client = None,
            }
        }
        std::future::pending().await
    }

    async fn is_over(&mut self) -> bool {
        let client = self.client.as_ref();
        client.is_some_and(|client| client.greeting().state == VmmState::Ended)
    }

    async fn pause(&mut self) -> io::Result<()> {
        let limit_ms = u64::try_from(PAUSE_LIMIT.as_millis()).unwrap_or(u64::MAX);
        self.stands = None;
        let client = self.client().await?;
        let pause = ToVmm::Pause { limit_ms };
        client.ask(&pause, &[], PAUSE_LIMIT).await?;
        self.stands = Some(true);
        Ok(())
    }

    async fn resume(&mut self) -> io::Result<()> {
        self.stands = None;
        self.ask(ToVmm::Resume, &[]).await?;
        self.stands = Some(false);
        Ok(())
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
        self.ready = None;
        let layers = self.client().await?.greeting().layers;
        let scratch = handed.scratch.map(|to| {
            // On an empty file system there is no copy: another host, or another version of
            // `mkfs.ext4`, has another one.
            let below = to.below.unwrap_or(match layers {
                1..LAYERS_MAX => Below::Source,
                _ => Below::Nothing,
            });
            let file = self.disks.unnamed()?;
            file.set_len(to.file.metadata()?.len())?;
            let key = DiskKey::random().map_err(io::Error::other)?;
            let own = (file, key);
            io::Result::Ok(PreparedScratch { to, below, own })
        });
        let scratch = scratch.transpose()?;
        let below = scratch
            .as_ref()
            .map_or(Below::Nothing, |scratch| scratch.below);
        let state = handed.state;
        self.ready = Some(Prepared { state, scratch });
        // What a copy needs is known when it is made, and a guest does not wait for it.
        Ok((below, 0))
    }

    async fn capture(&mut self) -> Result<(), CaptureError> {
        if self.stands == Some(false) {
            return Err(CaptureError::NotPaused("running".to_owned()));
        }
        let unprepared = || io::Error::other("nothing was prepared for a capture");
        let ready = self.ready.take().ok_or_else(unprepared);
        let ready = ready.map_err(step("saving its devices"))?;
        let saved = self.ask(ToVmm::Save, &[ready.state.as_fd()]).await;
        saved.map_err(step("saving its devices"))?;
        if let Some(scratch) = ready.scratch {
            let begun = self.copy(scratch).await;
            begun.map_err(step("copying its scratch disk"))?;
        }
        Ok(())
    }

    async fn freeze(&mut self, socket: OwnedFd, limit: Duration) -> io::Result<()> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let freeze = ToVmm::Freeze { limit_ms };
        self.ask(freeze, &[socket.as_fd()]).await.map(drop)
    }

    /// Nothing holds it back: it is made by a thread of its own.
    async fn hasten(&mut self) {}

    async fn is_copied(&mut self) -> io::Result<bool> {
        match std::mem::replace(&mut self.copy, Copying::None) {
            Copying::UnderWay => {
                self.copy = Copying::UnderWay;
                Ok(false)
            }
            Copying::Over(None) => Ok(true),
            Copying::Over(Some(why)) => Err(io::Error::other(why)),
            Copying::None => Err(io::Error::other("the copy is not there any more")),
        }
    }

    async fn forget(&mut self) -> io::Result<()> {
        self.ready = None;
        if self.copy != Copying::None {
            self.copy = Copying::None;
            self.ask(ToVmm::CancelCopy, &[]).await?;
        }
        Ok(())
    }

    async fn end_old_copy(&mut self) -> io::Result<()> {
        if !self.client().await?.greeting().copy.is_none() {
            self.ask(ToVmm::CancelCopy, &[]).await?;
        }
        Ok(())
    }
}
