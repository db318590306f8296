//! The control socket: what the node asks is done, one request after the other, and the guest's
//! end is told. Serves [`spore_wire::vmm`]; runs on the process's first thread.
//!
//! ```text
//!   Parked ─(Park)─Launch──▶ guest paused ◀──Pause, Resume──▶ guest runs ──▶ Ended ──Quit──▶ gone
//! ```
//!
//! A connection that fails or speaks nonsense is closed, and the guest goes on: the next daemon
//! connects anew. Nothing that comes here is believed to fit the state that the guest is in.

pub mod files;
pub mod launch;
pub mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use spore_wire::cause::chain;
use spore_wire::generation::GENERATION;
use spore_wire::launch::{FdIndex, Layer};
use spore_wire::vmm::{Below, CopyOf, CopyState, EndedBy, FromVmm, ToVmm, VmmState};

use self::files::{Files, FilesError};
use self::launch::{Ahead, LaunchError, Launched, layer};
use self::packet::{Connection, PacketError};
use crate::disk::Access;
use crate::disk::copies::{BeginError, Copies, Progress};
use crate::disk::scratch::{self, SwitchError, UpTo};
use crate::end::End;
use crate::jail;
use crate::jail::seccomp::{self, Cell, FilterError};
use crate::kvm::bell::Bell;
use crate::kvm::{Kvm, KvmError};
use crate::machine::save::SaveError;
use crate::memory::Sharing;
use crate::worker::PauseError;

/// How long a VMM without a guest waits for somebody to connect: longer than a node that made it
/// takes to. One whose node was killed meanwhile is nobody's.
const ALONE_MAX: Duration = Duration::from_secs(60);

/// When to look again at who could not be let in: they would be there all the time.
const ADMIT_AGAIN: Duration = Duration::from_millis(100);

/// Why a VMM cannot serve any more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its sockets cannot be waited for.
    #[error("the control socket cannot be waited for")]
    Wait(#[source] io::Error),
    /// There is no bell.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is a guest, and this thread is not in the cell for that.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("{asked} is for a VMM that {needs}, and this one {is}")]
    State {
        asked: &'static str,
        needs: &'static str,
        is: &'static str,
    },
    #[error("the guest cannot be launched")]
    Launch(#[from] LaunchError),
    #[error("this VMM was started without KVM")]
    NoKvm,
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("the guest cannot be paused")]
    Pause(#[from] PauseError),
    #[error("the machine cannot be saved")]
    Save(#[from] SaveError),
    #[error("the guest has no scratch disk")]
    NoScratch,
    #[error("the scratch disk's layer cannot be switched")]
    Switch(#[from] SwitchError),
    #[error("the scratch disk cannot be copied")]
    Copy(#[from] BeginError),
    #[error("the guest's memory is its file's own, and does not stand still in a copy")]
    Shared,
    #[error("the process cannot be copied")]
    Freeze(#[source] io::Error),
    #[error("the file for the answer cannot be written")]
    Write(#[source] io::Error),
}

/// The guest, or that there is none yet.
#[derive(Debug)]
enum Guest {
    Parked(Option<Arc<Kvm>>),
    /// Likewise, with a machine that waits for one, until a launch has failed.
    Made(Arc<Kvm>),
    There(Box<Launched>),
}

/// What comes next.
enum Next {
    Answer(FromVmm),
    Quit,
}

/// A VMM behind its control socket.
#[derive(Debug)]
pub struct Control {
    listener: OwnedFd,
    connection: Option<Connection>,
    /// Somebody waits who cannot be let in: the host gives no descriptor.
    is_full: bool,
    /// [`ALONE_MAX`].
    alone_max: Duration,
    guest: Guest,
    /// Until there is one.
    ahead: Ahead,
    /// Whether this thread is in the cell of one with a guest.
    is_confined: bool,
    /// Whether the guest was told to run.
    runs: bool,
    /// Rung when the guest has ended.
    ended: Arc<Bell>,
    /// Rung when a copy of its disk is over.
    copied: Arc<Bell>,
}

impl Control {
    /// Behind a unix `SOCK_SEQPACKET` socket that listens. Without KVM there will be no guest.
    pub fn new(listener: OwnedFd, kvm: Option<Kvm>) -> Result<Self, ServeError> {
        rustix::io::ioctl_fionbio(&listener, true)
            .map_err(|error| ServeError::Wait(error.into()))?;
        Ok(Self {
            listener,
            connection: None,
            is_full: false,
            alone_max: ALONE_MAX,
            guest: Guest::Parked(kvm.map(Arc::new)),
            ahead: Ahead::default(),
            is_confined: false,
            runs: false,
            ended: Arc::new(Bell::new()?),
            copied: Arc::new(Bell::new()?),
        })
    }

    /// Serves until it is told to quit.
    pub fn serve(mut self) -> Result<(), ServeError> {
        if let Guest::Parked(Some(kvm)) = &self.guest {
            // What KVM does takes longer than for the node to say what it wants.
            self.ahead.begin(kvm);
        }
        loop {
            let Some([ends, copied, comes, asks, rings]) = self.wait()? else {
                return Ok(());
            };
            if ends && self.ended.hear() {
                self.tell_end();
            }
            if copied && self.copied.hear() {
                self.tell_copy();
            }
            if asks && !self.attend() {
                return Ok(());
            }
            self.confine()?;
            if rings && let Guest::There(guest) = &self.guest {
                // What KVM does not take goes on as it did.
                let _hung = guest.machine.hang();
            }
            if comes {
                self.admit();
                if let Guest::Parked(Some(_)) = &self.guest {
                    // Whoever was let in asks for something meanwhile.
                    self.ahead.copier();
                }
            }
            // Nobody else knows of it.
            if matches!(self.guest, Guest::Made(_)) && self.connection.is_none() {
                return Ok(());
            }
        }
    }

    /// Waits until the guest ends, a copy is over, somebody comes, or asks, or a bell wants to be
    /// hung; `None` when there is neither a guest nor anybody, and nobody comes.
    fn wait<'a>(&'a self) -> Result<Option<[bool; 5]>, ServeError> {
        let is_alone = self.connection.is_none() && !matches!(self.guest, Guest::There(_));
        let (limit, listens) = match self.is_full {
            true => (Some(ADMIT_AGAIN), PollFlags::empty()),
            false => (is_alone.then_some(self.alone_max), PollFlags::IN),
        };
        let limit = limit.map(Timespec::try_from).and_then(Result::ok);
        let mut watched = vec![
            PollFd::from_borrowed_fd(self.listener.as_fd(), listens),
            PollFd::from_borrowed_fd(self.ended.as_fd(), PollFlags::IN),
        ];
        // No more than there are: the kernel allows no more than the limit of descriptors.
        let mut watch = |fd: Option<BorrowedFd<'a>>| {
            watched.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            fd.map(|_fd| watched.len() - 1)
        };
        let asks_at = watch(self.connection.as_ref().map(Connection::as_fd));
        let rings_at = watch(match &self.guest {
            Guest::There(guest) => Some(guest.machine.asks().as_fd()),
            Guest::Parked(_) | Guest::Made(_) => None,
        });
        let has_copy = !matches!(self.progress(), Progress::None);
        let copied_at = watch(has_copy.then(|| self.copied.as_fd()));
        match poll(&mut watched, limit.as_ref()) {
            Ok(0) if is_alone && !self.is_full => return Ok(None),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Some([false; 5])),
            Err(error) => return Err(ServeError::Wait(error.into())),
        }
        let is_ready = |at: usize| {
            let fd: Option<&PollFd<'_>> = watched.get(at);
            fd.is_some_and(|fd| !fd.revents().is_empty())
        };
        let places = [Some(1), copied_at, Some(0), asks_at, rings_at];
        let [ends, copied, comes, asks, rings] = places.map(|at| at.is_some_and(is_ready));
        Ok(Some([ends, copied, comes || self.is_full, asks, rings]))
    }

    /// Lets whoever waits take the place of whoever was there.
    fn admit(&mut self) {
        loop {
            let accepted = Connection::accept(self.listener.as_fd());
            self.is_full = accepted.is_err();
            // Whoever is gone by now was nobody.
            let Ok(Some(connection)) = accepted else {
                return;
            };
            self.connection = Some(connection);
            let copy = match self.progress() {
                Progress::None => CopyState::None,
                Progress::UnderWay => CopyState::UnderWay,
                Progress::Over(_) => {
                    // It has rung, and is told below and not once more.
                    let _rung = self.copied.hear();
                    CopyState::Over
                }
            };
            self.tell(&FromVmm::Hello {
                generation: GENERATION,
                state: self.state(),
                copy,
                layers: match &self.guest {
                    Guest::There(guest) => guest.layers,
                    Guest::Parked(_) | Guest::Made(_) => 0,
                },
            });
            if self.state() == VmmState::Ended {
                self.tell_end();
            }
            if copy == CopyState::Over {
                self.tell_copy();
            }
        }
    }

    /// Reads one request and answers it; `false` when it was the last.
    fn attend(&mut self) -> bool {
        let Some(connection) = &self.connection else {
            return true;
        };
        let (request, fds) = match connection.receive() {
            Ok(request) => request,
            Err(PacketError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return true;
            }
            // It was one request, and has one answer.
            Err(error @ PacketError::Descriptors) => {
                self.tell(&FromVmm::Failed { why: chain(&error) });
                return true;
            }
            Err(_over) => {
                self.connection = None;
                return true;
            }
        };
        let answer = match self.obey(request, fds) {
            Ok(Next::Answer(answer)) => answer,
            Ok(Next::Quit) => return false,
            Err(error) => FromVmm::Failed { why: chain(&error) },
        };
        self.tell(&answer);
        true
    }

    /// Lets this thread enter the cell of one with a guest, once there is one: after the answer to
    /// who launched it, for whom that is the time of its own next step, and before any request is
    /// read that lets the guest run.
    fn confine(&mut self) -> Result<(), FilterError> {
        if !self.is_confined && matches!(self.guest, Guest::There(_)) {
            seccomp::enter(Cell::Running)?;
            self.is_confined = true;
        }
        Ok(())
    }

    fn obey(&mut self, request: ToVmm, fds: Vec<OwnedFd>) -> Result<Next, RequestError> {
        let bytes = match request {
            ToVmm::Park { memory_mib, vcpus } => {
                Files::new(fds).finish()?;
                self.park(memory_mib, vcpus)?;
                0
            }
            ToVmm::Launch(blob) => {
                self.launch(&blob, fds)?;
                0
            }
            ToVmm::Resume => {
                Files::new(fds).finish()?;
                let guest = self.there("resume")?;
                // Before the guest writes what is being copied.
                guest.copies.iter().for_each(Copies::resume);
                guest.machine.resume();
                self.runs = true;
                0
            }
            ToVmm::Pause { limit_ms } => {
                Files::new(fds).finish()?;
                let limit = Duration::from_millis(limit_ms);
                self.there("pause")?.machine.pause(limit)?;
                self.runs = false;
                0
            }
            ToVmm::Save => {
                let state = self.paused("save")?.machine.save()?;
                answer(fds, &state)?
            }
            ToVmm::Switch { own } => {
                self.switch(&own, fds)?;
                0
            }
            ToVmm::Copy { to, below, of } => {
                self.copy(&to, below, of, fds)?;
                0
            }
            ToVmm::CancelCopy => {
                Files::new(fds).finish()?;
                let guest = self.there("cancel_copy")?;
                guest.copies.iter().for_each(Copies::cancel);
                0
            }
            ToVmm::Freeze { limit_ms } => {
                self.freeze(Duration::from_millis(limit_ms), fds)?;
                0
            }
            ToVmm::Console => {
                let output = self.there("console")?.machine.output();
                answer(fds, &output.bytes)?
            }
            ToVmm::Quit => return Ok(Next::Quit),
        };
        Ok(Next::Answer(FromVmm::Done { bytes }))
    }

    fn park(&mut self, memory_mib: u32, vcpus: u8) -> Result<(), RequestError> {
        let Guest::Parked(kvm) = &self.guest else {
            return Err(self.unfit("park", "waits for its first request"));
        };
        let kvm = Arc::clone(kvm.as_ref().ok_or(RequestError::NoKvm)?);
        self.ahead.park(&kvm, memory_mib, vcpus)?;
        self.guest = Guest::Made(kvm);
        Ok(())
    }

    fn launch(
        &mut self,
        blob: &spore_wire::launch::Launch,
        fds: Vec<OwnedFd>,
    ) -> Result<(), RequestError> {
        let kvm = match &self.guest {
            Guest::Parked(kvm) => kvm.as_ref().ok_or(RequestError::NoKvm)?,
            Guest::Made(kvm) => kvm,
            Guest::There(_) => return Err(self.unfit("launch", "is parked")),
        };
        let ahead = std::mem::take(&mut self.ahead);
        let launched = launch::launch(kvm, ahead, blob, fds, &self.copied)?;
        // Seen by operators, who look for VMs; whatever refuses that is of no consequence.
        let _unnamed = rustix::thread::set_name(c"spore-vmm");
        launched.machine.ring_at_end(Arc::clone(&self.ended));
        self.guest = Guest::There(Box::new(launched));
        Ok(())
    }

    fn switch(&self, own: &Layer, fds: Vec<OwnedFd>) -> Result<(), RequestError> {
        let guest = self.paused("switch")?;
        let copies = guest.copies.as_ref().ok_or(RequestError::NoScratch)?;
        let mut files = Files::new(fds);
        let own = layer(own, &mut files, Access::ReadWrite)?;
        files.finish()?;
        Ok(copies.switch(own)?)
    }

    fn copy(
        &self,
        to: &Layer,
        below: Below,
        of: CopyOf,
        fds: Vec<OwnedFd>,
    ) -> Result<(), RequestError> {
        let (guest, up_to) = match of {
            CopyOf::Frozen => (self.there("copy")?, UpTo::Frozen),
            CopyOf::Paused => (self.paused("copy of paused")?, UpTo::Written),
        };
        let below = match below {
            Below::Nothing => scratch::Below::Nothing,
            Below::Source => scratch::Below::Source,
        };
        let copies = guest.copies.as_ref().ok_or(RequestError::NoScratch)?;
        let mut files = Files::new(fds);
        let to = layer(to, &mut files, Access::ReadWrite)?;
        files.finish()?;
        Ok(copies.begin(&to, below, up_to)?)
    }

    fn freeze(&self, limit: Duration, fds: Vec<OwnedFd>) -> Result<(), RequestError> {
        let guest = self.paused("freeze")?;
        if guest.memory == Sharing::Shared {
            return Err(RequestError::Shared);
        }
        let mut files = Files::new(fds);
        let socket = files.take(FdIndex(0))?;
        files.finish()?;
        let made = jail::copy::freeze(socket.as_fd(), limit);
        // It is found by who it is that writes to the socket.
        let _pid = made.map_err(RequestError::Freeze)?;
        Ok(())
    }

    fn progress(&self) -> Progress {
        let Guest::There(guest) = &self.guest else {
            return Progress::None;
        };
        let copies = guest.copies.as_ref();
        copies.map_or(Progress::None, Copies::progress)
    }

    fn there(&self, asked: &'static str) -> Result<&Launched, RequestError> {
        match &self.guest {
            Guest::There(guest) => Ok(guest),
            Guest::Parked(_) | Guest::Made(_) => Err(self.unfit(asked, "has a guest")),
        }
    }

    fn paused(&self, asked: &'static str) -> Result<&Launched, RequestError> {
        let guest = self.there(asked)?;
        match self.state() {
            VmmState::Paused => Ok(guest),
            _ => Err(self.unfit(asked, "has a paused guest")),
        }
    }

    fn unfit(&self, asked: &'static str, needs: &'static str) -> RequestError {
        let is = match self.state() {
            VmmState::Parked => "has no guest",
            VmmState::Paused => "has a paused guest",
            VmmState::Running => "has a guest that runs",
            VmmState::Ended => "has a guest that has ended",
        };
        RequestError::State { asked, needs, is }
    }

    fn state(&self) -> VmmState {
        match &self.guest {
            Guest::Parked(_) | Guest::Made(_) => VmmState::Parked,
            Guest::There(guest) if guest.machine.ended().is_some() => VmmState::Ended,
            Guest::There(_) if self.runs => VmmState::Running,
            Guest::There(_) => VmmState::Paused,
        }
    }

    fn tell_end(&mut self) {
        let Guest::There(guest) = &self.guest else {
            return;
        };
        if let Some(end) = guest.machine.ended() {
            self.tell(&FromVmm::Ended {
                why: chain(&*end),
                by: ended_by(&end),
            });
        }
    }

    fn tell_copy(&mut self) {
        // Another may have been begun, or the one that is over forgotten.
        if let Progress::Over(copied) = self.progress() {
            let why = copied.err().map(|error| chain(&*error));
            self.tell(&FromVmm::Copied { why });
        }
    }

    /// Whoever does not hear it has closed, or reads nothing: it is not served any more.
    fn tell(&mut self, message: &FromVmm) {
        let Some(connection) = &self.connection else {
            return;
        };
        if connection.send(message).is_err() {
            self.connection = None;
        }
    }
}

/// Writes an answer's bytes into the one file that came with the request.
fn answer(fds: Vec<OwnedFd>, bytes: &[u8]) -> Result<u64, RequestError> {
    let mut files = Files::new(fds);
    let file = files.take(FdIndex(0))?;
    files.finish()?;
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(&file, rest, at as u64) {
            Ok(0) => return Err(RequestError::Write(io::ErrorKind::WriteZero.into())),
            Ok(count) => at += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(RequestError::Write(error.into())),
        }
    }
    Ok(bytes.len() as u64)
}

const fn ended_by(end: &End) -> EndedBy {
    match end {
        End::PowerOff | End::Reset | End::TripleFault { .. } => EndedBy::Guest,
        End::Fault(_) | End::Internal { .. } => EndedBy::Fault,
        End::Stopped => EndedBy::Asked,
        End::Refused { .. }
        | End::Unexpected { .. }
        | End::Kvm { .. }
        | End::Wait(_)
        | End::Unconfined(_)
        | End::Panic { .. } => EndedBy::Host,
    }
}
