//! The zygote: makes VMMs for the node, and tells what became of them. Serves
//! [`spore_wire::zygote`]; one thread. What it is asked comes from the node alone, and is checked
//! all the same: a wrong request is refused with a reason.
//!
//! ```text
//!   Spawn ──▶ VMM and sleeper ──VMM ends──▶ sleeper alone ──▶ Gone, the uid is free
//! ```

use std::collections::BTreeMap;
use std::io;
use std::num::ParseIntError;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::str::FromStr;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SocketType, sockopt};
use rustix::process::{WaitOptions, WaitStatus};
use spore_wire::cause::chain;
use spore_wire::generation::GENERATION;
use spore_wire::zygote::{ExitedBy, FDS_MAX, FdRole, FromZygote, PACKET_BYTES_MAX, ToZygote};

use super::child::Plan;
use super::packet::{Node, Received};
use super::setup::{self, Held};
use super::spawn::{SpawnError, spawn};
use super::sys::Stack;
use super::{JailError, Run};

/// The least uid of a range: below are the host's own users.
const FIRST_MIN: u32 = 1000;

/// Uids and gids that a zygote has: its own first, and those of its VMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    first: u32,
    count: u32,
}

/// Why a range of ids is none.
#[derive(Debug, thiserror::Error)]
pub enum IdsError {
    /// It is not two numbers.
    #[error("a range of ids is FIRST+COUNT, not {text}")]
    Form {
        /// What it is.
        text: String,
    },
    /// One of them is none.
    #[error("a range of ids is two numbers")]
    Number(#[from] ParseIntError),
    /// It cannot be a zygote's.
    #[error("{count} ids from {first} are no zygote's: from {FIRST_MIN} on, two at least")]
    Range {
        /// Its first.
        first: u32,
        /// How many.
        count: u32,
    },
}

impl Ids {
    /// So many from the first on.
    pub fn new(first: u32, count: u32) -> Result<Self, IdsError> {
        // The last number stands for no id (`(uid_t) -1`).
        let fits = first.checked_add(count).is_some();
        if first < FIRST_MIN || count < 2 || !fits {
            return Err(IdsError::Range { first, count });
        }
        Ok(Self { first, count })
    }

    /// The zygote's own.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.first
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// A VMM's uid as the user namespace has it.
    fn inner(self, uid: u32) -> Option<u32> {
        let inner = uid.checked_sub(self.first)?;
        (1..self.count).contains(&inner).then_some(inner)
    }
}

impl FromStr for Ids {
    type Err = IdsError;

    fn from_str(text: &str) -> Result<Self, IdsError> {
        let parts = text.split_once('+');
        let (first, count) = parts.ok_or_else(|| IdsError::Form { text: text.into() })?;
        Self::new(first.parse()?, count.parse()?)
    }
}

/// Why a zygote ended before its socket was closed.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// It is not jailed.
    #[error("there is no zygote")]
    Jail(#[from] JailError),
    /// Its socket, or what tells it of its children, failed.
    #[error("the zygote cannot go on: {what}")]
    Wait {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn wait<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ZygoteError {
    move |source| ZygoteError::Wait {
        what,
        source: source.into(),
    }
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum RefuseError {
    #[error("a packet of over {PACKET_BYTES_MAX} bytes or {FDS_MAX} descriptors")]
    TooLarge,
    #[error("a packet that is no message of this generation")]
    Malformed(#[source] serde_json::Error),
    #[error("{given} descriptors came where {named} are named")]
    Count { named: usize, given: usize },
    #[error("two descriptors are {role:?}")]
    Twice { role: FdRole },
    #[error("no descriptor is the control socket")]
    NoControl,
    #[error("the control socket is no socket of packets that listens")]
    NotListening,
    #[error("uid {uid} is none of the {} from {} on", .ids.count - 1, .ids.first + 1)]
    Uid { uid: u32, ids: Ids },
    #[error("uid {uid} is that of another VM")]
    Taken { uid: u32 },
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// A VM that is not all gone.
#[derive(Debug)]
struct Vm {
    pid: u32,
    uid: u32,
}

/// Becomes a zygote and serves until its socket is closed. In a process that was just started and
/// has one thread.
pub fn main(ids: Ids, run: Run) -> Result<(), ZygoteError> {
    // Its copies are told apart from it by theirs.
    rustix::thread::set_name(c"spore-zygote").map_err(wait("its name"))?;
    let held = setup::set_up(ids)?;
    let stack = Stack::new().map_err(wait("no stack for its children"))?;
    let Held {
        null,
        socket,
        kvm,
        children,
    } = held;
    let mut zygote = Zygote {
        ids,
        null,
        kvm,
        children,
        node: Node::new(socket),
        stack,
        vms: BTreeMap::new(),
        run,
    };
    zygote.tell(&FromZygote::Ready {
        generation: GENERATION,
    })?;
    zygote.serve()
}

struct Zygote {
    ids: Ids,
    null: OwnedFd,
    kvm: Option<OwnedFd>,
    children: OwnedFd,
    node: Node,
    stack: Stack,
    /// By the pid of the sleeper.
    vms: BTreeMap<u32, Vm>,
    run: Run,
}

impl Zygote {
    fn tell(&self, message: &FromZygote) -> Result<(), ZygoteError> {
        let told = self.node.tell(message, None);
        told.map_err(wait("its socket"))
    }

    fn serve(&mut self) -> Result<(), ZygoteError> {
        loop {
            let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let mut watched = [watch(self.node.as_fd()), watch(self.children.as_fd())];
            match poll(&mut watched, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(wait("its socket")(error)),
            }
            let [asks, ended] = watched.map(|fd| !fd.revents().is_empty());
            if ended {
                self.reap()?;
            }
            if asks && !self.attend()? {
                return Ok(());
            }
        }
    }

    /// Tells of all children that have ended.
    fn reap(&mut self) -> Result<(), ZygoteError> {
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        // One for any number of them; and one may be told of that was waited for already.
        let _told = retry_on_intr(|| rustix::io::read(&self.children, &mut signal));
        loop {
            match retry_on_intr(|| rustix::process::wait(WaitOptions::NOHANG)) {
                Ok(Some((pid, status))) => self.ended(pid.as_raw_pid().cast_unsigned(), status)?,
                Ok(None) | Err(Errno::CHILD) => return Ok(()),
                Err(error) => return Err(wait("its children")(error)),
            }
        }
    }

    fn ended(&mut self, pid: u32, status: WaitStatus) -> Result<(), ZygoteError> {
        // A sleeper's end is over when all processes of its namespace are gone, the VMM too.
        if let Some(Vm { pid, uid }) = self.vms.remove(&pid) {
            return self.tell(&FromZygote::Gone { pid, uid });
        }
        // What belongs to no VM is the sleeper of one that could not be made.
        if self.vms.values().any(|vm| vm.pid == pid) {
            let by = exited_by(status);
            return self.tell(&FromZygote::Ended { pid, by });
        }
        Ok(())
    }

    /// Reads one request and answers it; `false` when there will be none.
    fn attend(&mut self) -> Result<bool, ZygoteError> {
        let (request, made) = match self.node.receive().map_err(wait("its socket"))? {
            Received::Closed => return Ok(false),
            Received::TooLarge => (None, Err(RefuseError::TooLarge)),
            Received::Packet(bytes, fds) => match serde_json::from_slice(&bytes) {
                Ok(ToZygote::Spawn {
                    request,
                    uid,
                    fds: roles,
                }) => (Some(request), self.spawn(request, uid, &roles, fds)),
                Err(error) => (None, Err(RefuseError::Malformed(error))),
            },
        };
        match made {
            Ok((message, pidfd)) => {
                let told = self.node.tell(&message, Some(pidfd.as_fd()));
                told.map_err(wait("its socket"))?;
            }
            Err(error) => {
                let why = chain(&error);
                self.tell(&FromZygote::Refused { request, why })?;
            }
        }
        Ok(true)
    }

    fn spawn(
        &mut self,
        request: u64,
        uid: u32,
        roles: &[FdRole],
        fds: Vec<OwnedFd>,
    ) -> Result<(FromZygote, OwnedFd), RefuseError> {
        let given = Given::sort(roles, fds)?;
        let ids = self.ids;
        let inner = ids.inner(uid).ok_or(RefuseError::Uid { uid, ids })?;
        if self.vms.values().any(|vm| vm.uid == uid) {
            return Err(RefuseError::Taken { uid });
        }
        let control = given.get(FdRole::Control).ok_or(RefuseError::NoControl)?;
        if !is_listening(control) {
            return Err(RefuseError::NotListening);
        }
        let plan = Plan {
            uid: inner,
            null: self.null.as_fd(),
            output: given.get(FdRole::Output).unwrap_or(self.null.as_fd()),
            control,
            kvm: self.kvm.as_ref().map(|kvm| kvm.as_fd()),
            run: self.run,
        };
        let made = spawn(&mut self.stack, &plan, given.get(FdRole::Cgroup))?;
        let (pid, init) = (made.pid, made.init);
        self.vms.insert(init, Vm { pid, uid });
        let message = FromZygote::Spawned { request, pid, init };
        Ok((message, made.pidfd))
    }
}

/// Descriptors by what they are.
struct Given(BTreeMap<FdRole, OwnedFd>);

impl Given {
    fn sort(roles: &[FdRole], fds: Vec<OwnedFd>) -> Result<Self, RefuseError> {
        let (named, given) = (roles.len(), fds.len());
        if named != given {
            return Err(RefuseError::Count { named, given });
        }
        let mut sorted = BTreeMap::new();
        for (role, fd) in roles.iter().zip(fds) {
            if sorted.insert(*role, fd).is_some() {
                return Err(RefuseError::Twice { role: *role });
            }
        }
        Ok(Self(sorted))
    }

    fn get(&self, role: FdRole) -> Option<BorrowedFd<'_>> {
        self.0.get(&role).map(|fd| fd.as_fd())
    }
}

fn is_listening(fd: BorrowedFd<'_>) -> bool {
    let kind = sockopt::socket_type(fd);
    let listens = sockopt::socket_acceptconn(fd);
    kind == Ok(SocketType::SEQPACKET) && listens == Ok(true)
}

fn exited_by(status: WaitStatus) -> ExitedBy {
    let number = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitedBy::Code { code: number(code) },
        (None, signal) => ExitedBy::Signal {
            signal: number(signal.unwrap_or(0)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::Ids;

    #[test]
    fn a_range_of_ids_is_two_numbers_above_the_hosts_own() {
        let ids: Ids = "200000+16".parse().unwrap();
        assert_eq!((ids.first(), ids.count()), (200_000, 16));
        for wrong in [
            "", "200000", "200000+", "+16", "200000+1", "0+65536", "999+2", "a+b",
        ] {
            assert!(wrong.parse::<Ids>().is_err(), "{wrong}");
        }
        assert!("4294967290+6".parse::<Ids>().is_err());
        assert!("4294967290+5".parse::<Ids>().is_ok());
    }

    #[test]
    fn a_vmm_has_none_of_the_ids_that_are_the_zygotes_or_anybody_elses() {
        let ids = Ids::new(200_000, 3).unwrap();
        let inner = [199_999, 200_000, 200_001, 200_002, 200_003].map(|uid| ids.inner(uid));
        assert_eq!(inner, [None, None, Some(1), Some(2), None]);
    }
}
