//! From a VM's room to a guest in a VMM, which is one that waited for it or a new one.
//!
//! One that waited may end in the moment that it is taken. Its VM is none the worse for that: as
//! long as it has run nothing, another takes its place, once.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use spore_wire::id::VmId;
use spore_wire::vmm::ToVmm;
use tokio::time::timeout;

use super::client::Client;
use super::parked::{Parked, Size};
use super::strays::is_free;
use super::zygote::Spawned;
use super::{CONTROL_SOCKET, GREETING_TIMEOUT, LAUNCH_TIMEOUT, Shared, files};
use crate::hypervisor::fork::ForkFrom;
use crate::hypervisor::monitored::Ends as _;
use crate::hypervisor::monitored::tail::log_tail;
use crate::hypervisor::monitored::vm::ENDING;
use crate::hypervisor::process::has_ended;
use crate::hypervisor::room::blocking;
use crate::hypervisor::{BootError, Identity, Machine, Prepared, process};
use crate::sys;

/// A VMM that runs, whose root is empty, and that waits.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) identity: Identity,
    pub(super) client: Client,
    log: OwnedFd,
    /// What it was while it waited, if it did.
    waited: Option<Spawned>,
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> BootError {
    move |source| BootError::Step { what, source }
}

/// Whether an error of a connection is its end.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

impl Shared {
    /// A VMM with its guest, which is paused.
    pub(super) async fn launch(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: Option<ForkFrom>,
    ) -> Result<Started, BootError> {
        let tap = self.rooms.namespaces().open_tap(&prepared.namespace).await;
        let tap = tap.map_err(step("opening the tap"))?;
        let mut started = self.start(vm, machine, prepared).await?;
        let (this, sizes) = (Arc::clone(self), machine.clone());
        let files = blocking(move || this.open_files(vm, &sizes, tap, from.as_ref())).await;
        let (launch, files) = files.map_err(step("a worker thread"))??;
        let fds = files.iter().map(|file| file.as_fd()).collect::<Vec<_>>();
        let request = ToVmm::Launch(Box::new(launch));
        let mut launched = started.client.ask(&request, &fds, LAUNCH_TIMEOUT).await;
        if launched.as_ref().is_err_and(is_gone)
            && let Some(waited) = started.waited.take()
        {
            started = self.instead(vm, machine, prepared, waited).await?;
            launched = started.client.ask(&request, &fds, LAUNCH_TIMEOUT).await;
        }
        self.refill(Size::of(machine));
        match launched {
            Ok(_) => Ok(started),
            Err(error) => Err(self.refused(&started, &error).await),
        }
    }

    /// A VMM without a guest.
    async fn start(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Started, BootError> {
        match self.parking.collect(vm) {
            None => self.anew(vm, machine, prepared).await,
            Some(parked) => match self.take_over(vm, machine, parked) {
                Ok(started) => Ok(started),
                Err(waited) => self.instead(vm, machine, prepared, waited).await,
            },
        }
    }

    /// A new VMM in the place of one that waited and has ended.
    async fn instead(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        waited: Spawned,
    ) -> Result<Started, BootError> {
        tracing::warn!(%vm, pid = waited.pid, "a VMM that waited ended as it was taken");
        let (socket, uid) = (self.rooms.folder(vm).join(CONTROL_SOCKET), prepared.uid);
        let cleared = blocking(move || {
            waited.kill();
            // The first process of its pid namespace has the uid for a moment longer.
            if !has_ended(&waited.pidfd, ENDING) || !is_free(uid, ENDING) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match std::fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _gone => Ok(()),
            }
        });
        let cleared = cleared.await.flatten();
        cleared.map_err(step("the end of the VMM that was made ahead"))?;
        self.anew(vm, machine, prepared).await
    }

    async fn anew(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
    ) -> Result<Started, BootError> {
        let this = Arc::clone(self);
        let files = blocking(move || this.open_waiting(vm)).await;
        let (log, fds) = files.map_err(step("a worker thread"))??;
        let spawned = self.zygotes.spawn(prepared.uid, fds).await;
        let spawned = spawned.map_err(step("the zygote"))?;
        if let Err(source) = self.place(vm, machine, &spawned) {
            // Whatever ends the VM's cgroup would not end this.
            spawned.kill();
            return Err(step("putting it into its cgroup")(source));
        }
        let pid = spawned.pid;
        let identity = process::identity(pid, &vm.to_string());
        let identity = identity.map_err(|_gone| BootError::Ended(log_tail(&log)))?;
        let client = self.await_greeting(vm, &identity, &log).await?;
        Ok(Started {
            identity,
            client,
            log,
            waited: None,
        })
    }

    /// A VMM that was made ahead becomes the VM's; gives back one that cannot.
    fn take_over(&self, vm: VmId, machine: &Machine, parked: Parked) -> Result<Started, Spawned> {
        let Parked {
            spawned,
            client,
            log,
            socket,
            ..
        } = parked;
        let moved = std::fs::rename(&socket, self.rooms.folder(vm).join(CONTROL_SOCKET))
            .and_then(|()| self.place(vm, machine, &spawned))
            .and_then(|()| process::identity(spawned.pid, &vm.to_string()));
        match moved {
            Ok(identity) => Ok(Started {
                identity,
                client,
                log,
                waited: Some(spawned),
            }),
            Err(error) => {
                tracing::warn!(%vm, %error, "a VMM that waited for a guest cannot be taken");
                let _nobodys = std::fs::remove_file(socket);
                Err(spawned)
            }
        }
    }

    /// Puts the processes of a VM where they are limited, before there is a guest in them.
    fn place(&self, vm: VmId, machine: &Machine, spawned: &Spawned) -> io::Result<()> {
        let entrances = self.rooms.cgroups().entrances(&vm.to_string());
        for pid in [spawned.init, spawned.pid] {
            for path in &entrances {
                std::fs::write(path, pid.to_string())?;
            }
            let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let limit = Rlimit {
                current: Some(files::file_bytes(machine)),
                maximum: Some(files::file_bytes(machine)),
            };
            prlimit(raw, Resource::Fsize, limit)?;
        }
        Ok(())
    }

    /// Waits until the VMM greets, or ends.
    async fn await_greeting(
        &self,
        vm: VmId,
        identity: &Identity,
        log: &OwnedFd,
    ) -> Result<Client, BootError> {
        let ended = || BootError::Ended(log_tail(log));
        let pidfd = process::open(identity, self.rooms.cgroups()).map_err(|_gone| ended())?;
        let pidfd = sys::watch(pidfd).map_err(step("watching it"))?;
        let socket = self.rooms.folder(vm).join(CONTROL_SOCKET);
        tokio::select! {
            biased;
            _readable = pidfd.readable() => Err(ended()),
            client = Client::connect(&socket, GREETING_TIMEOUT) => match client {
                Ok(client) => Ok(client),
                // A VMM that ends resets the connection a moment before its pidfd tells.
                Err(source) => match timeout(ENDING, pidfd.readable()).await {
                    Ok(_readable) => Err(ended()),
                    Err(_elapsed) => Err(step("its control socket")(source)),
                },
            },
        }
    }

    /// Why there is no guest in a VMM: what it said, or how it ended.
    pub(super) async fn refused(&self, started: &Started, error: &io::Error) -> BootError {
        let mut why = error.to_string();
        if error.kind() == io::ErrorKind::NotConnected
            && let Some(how) = self.zygotes.ends().how(started.identity.pid).await
        {
            why = format!("it {how}");
        }
        let log = log_tail(&started.log);
        if !log.is_empty() {
            why = format!("{why}; {log}");
        }
        BootError::Refused(why)
    }
}
