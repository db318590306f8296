//! VMMs made ahead: each is in its jail, under a uid of its own, with a machine of the size that
//! was used last and nothing of any guest.
//!
//! ```text
//!   start of a VM ──▶ refill (behind it): uid, VMM, Park ──▶ waiting
//!   prepare: its uid becomes the VM's ──▶ handed ──start: its socket and log too──▶ a VM's VMM
//! ```
//!
//! A VMM that waits ends by itself when its connection closes, and one that nobody has connected to
//! after a minute. The broom of the next daemon ends what is left (`strays.rs`) and frees its uid.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use spore_wire::id::VmId;
use spore_wire::vmm::ToVmm;
use spore_wire::zygote::FdRole;

use super::client::Client;
use super::files::listening;
use super::strays::is_free;
use super::zygote::Spawned;
use super::{GREETING_TIMEOUT, Shared};
use crate::hypervisor::Machine;
use crate::hypervisor::monitored::in_memory::bounded_log;
use crate::hypervisor::process::has_ended;
use crate::hypervisor::room::blocking;

/// How long one that is ended is waited for.
const ENDING: Duration = Duration::from_secs(5);

/// How long a VM that was just started has the host's processors for itself.
const REFILL_PAUSE: Duration = Duration::from_millis(100);

/// What a machine is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    memory_mib: u32,
    vcpus: u8,
}

impl Size {
    pub(super) fn of(machine: &Machine) -> Self {
        Self {
            memory_mib: machine.resources.memory_mib,
            vcpus: machine.resources.cpus,
        }
    }
}

/// A VMM that waits for a guest.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) uid: u32,
    pub(super) spawned: Spawned,
    pub(super) client: Client,
    pub(super) log: OwnedFd,
    /// Its control socket.
    pub(super) socket: PathBuf,
    size: Size,
}

impl Parked {
    fn is_alive(&self) -> bool {
        !has_ended(&self.spawned.pidfd, Duration::ZERO)
    }
}

/// All that wait.
#[derive(Debug)]
pub(super) struct Parking {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Parked>,
    /// Whose uid is a VM's already.
    handed: BTreeMap<VmId, Parked>,
    /// One task fills it at a time.
    is_filling: bool,
    is_closed: bool,
}

impl Parking {
    /// At most so many wait; 0 are none.
    pub(super) const fn new(most: usize) -> Self {
        Self {
            most,
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                handed: BTreeMap::new(),
                is_filling: false,
                is_closed: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM that a VM started with, if it was handed one.
    pub(super) fn collect(&self, vm: VmId) -> Option<Parked> {
        self.state().handed.remove(&vm)
    }

    /// Has one wait; gives it back when none are wanted any more.
    fn add(&self, parked: Parked) -> Option<Parked> {
        let mut state = self.state();
        if state.is_closed {
            return Some(parked);
        }
        state.waiting.push_back(parked);
        None
    }

    /// Takes one of a size that waits.
    fn take(&self, size: Size) -> Option<Parked> {
        let mut state = self.state();
        let at = state.waiting.iter();
        let at = at.clone().position(|parked| parked.size == size)?;
        state.waiting.remove(at)
    }

    /// Takes one that is in the way of another of this size, once as many wait as may: one that has
    /// ended, or of another size. `None` when there is room.
    fn in_the_way(state: &mut State, size: Size, most: usize) -> Option<Parked> {
        let mut waiting = state.waiting.iter();
        let at = waiting.position(|parked| !parked.is_alive()).or_else(|| {
            let is_full = state.waiting.len() >= most;
            let mut waiting = state.waiting.iter();
            is_full.then(|| waiting.position(|parked| parked.size != size))?
        })?;
        state.waiting.remove(at)
    }
}

impl Shared {
    /// Chooses a VMM for a VM; gives its uid.
    pub(super) fn hand(self: &Arc<Self>, vm: VmId, machine: &Machine) -> Option<u32> {
        loop {
            let parked = self.parking.take(Size::of(machine))?;
            if parked.is_alive() {
                let uid = parked.uid;
                self.parking.state().handed.insert(vm, parked);
                return Some(uid);
            }
            tracing::warn!(uid = parked.uid, "a VMM that waited for a guest ended");
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || this.end(parked));
        }
    }

    /// Ends one that nobody will use, and frees its uid. Blocks.
    fn end(&self, parked: Parked) {
        parked.spawned.kill();
        let Parked {
            uid,
            spawned,
            socket,
            ..
        } = parked;
        // The first process of its pid namespace has the uid for a moment longer.
        if !has_ended(&spawned.pidfd, ENDING) || !is_free(uid, ENDING) {
            // It keeps its uid until the next sweep.
            tracing::error!(uid, "a VMM that waited for a guest does not end");
            return;
        }
        let freed = self.rooms.free_parked_uid(uid);
        let removed = std::fs::remove_file(socket);
        if let Err(error) = freed.and(removed) {
            tracing::warn!(uid, %error, "what a VMM had that waited for a guest is left");
        }
    }

    /// Ends the one that a VM was to have and never started with. Its uid is the VM's, or nobody's
    /// where the VM's room was not made so far.
    pub(super) fn forgo(&self, vm: VmId) {
        let Some(parked) = self.parking.collect(vm) else {
            return;
        };
        match self.rooms.is_parked_uid(parked.uid) {
            Ok(true) => self.end(parked),
            _the_vms => {
                parked.spawned.kill();
                let _ended = has_ended(&parked.spawned.pidfd, ENDING);
                let _removed = std::fs::remove_file(parked.socket);
            }
        }
    }

    /// Makes as many as are wanted of this size, behind the caller; those of others make room.
    pub(super) fn refill(self: &Arc<Self>, size: Size) {
        {
            let mut state = self.parking.state();
            if state.is_closed || state.is_filling || self.parking.most == 0 {
                return;
            }
            state.is_filling = true;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(REFILL_PAUSE).await;
            if let Err(error) = this.fill(size).await {
                tracing::warn!(%error, "no VMM was made ahead");
            }
            this.parking.state().is_filling = false;
        });
    }

    async fn fill(self: &Arc<Self>, size: Size) -> io::Result<()> {
        loop {
            let other = {
                let mut state = self.parking.state();
                if state.is_closed {
                    return Ok(());
                }
                let other = Parking::in_the_way(&mut state, size, self.parking.most);
                if other.is_none() && state.waiting.len() >= self.parking.most {
                    return Ok(());
                }
                other
            };
            let this = Arc::clone(self);
            if let Some(other) = other {
                blocking(move || this.end(other)).await?;
                continue;
            }
            let parked = self.park(size).await?;
            if let Some(unwanted) = self.parking.add(parked) {
                let this = Arc::clone(self);
                return blocking(move || this.end(unwanted)).await;
            }
        }
    }

    async fn park(self: &Arc<Self>, size: Size) -> io::Result<Parked> {
        let this = Arc::clone(self);
        let opened = blocking(move || {
            let (uid, socket) = this.rooms.claim_parked_uid()?;
            let opened = (|| Ok::<_, io::Error>((listening(&socket)?, bounded_log()?)))();
            if opened.is_err() {
                this.rooms.free_parked_uid(uid)?;
            }
            let (control, log) = opened?;
            Ok::<_, io::Error>((uid, socket, control, log))
        });
        let (uid, socket, control, log) = opened.await.flatten()?;
        let output = log.try_clone()?;
        let fds = vec![(FdRole::Control, control), (FdRole::Output, output)];
        let spawned = match self.zygotes.spawn(uid, fds).await {
            Ok(spawned) => spawned,
            Err(error) => {
                self.rooms.free_parked_uid(uid)?;
                return Err(error);
            }
        };
        let connected = async {
            let mut client = Client::connect(&socket, GREETING_TIMEOUT).await?;
            let Size { memory_mib, vcpus } = size;
            let request = ToVmm::Park { memory_mib, vcpus };
            client.ask(&request, &[], Duration::ZERO).await?;
            Ok::<_, io::Error>(client)
        };
        match connected.await {
            Ok(client) => Ok(Parked {
                uid,
                spawned,
                client,
                log,
                socket,
                size,
            }),
            Err(error) => {
                spawned.kill();
                let this = Arc::clone(self);
                blocking(move || {
                    // A VMM that does not end keeps its uid until the next sweep.
                    if has_ended(&spawned.pidfd, ENDING) && is_free(uid, ENDING) {
                        this.rooms.free_parked_uid(uid)?;
                    }
                    std::fs::remove_file(socket)
                })
                .await
                .flatten()?;
                Err(error)
            }
        }
    }

    /// Ends all that wait, and makes no more.
    pub(super) fn empty_parking(&self) {
        let waiting = {
            let mut state = self.parking.state();
            state.is_closed = true;
            std::mem::take(&mut state.waiting)
        };
        for parked in waiting {
            self.end(parked);
        }
    }
}
