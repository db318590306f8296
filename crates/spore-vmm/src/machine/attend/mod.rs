//! The thread of a machine's devices: it waits for their bells, descriptors and times, and gives
//! each its turns. It is one of the machine's workers.
//!
//! ```text
//!   bell of a queue ─────────▶ handle(queue) ─┐
//!   descriptor, time ────────▶ ready() ───────┴─▶ more? another turn, after the others'
//!                                               └▶ wants(): what to wait for now
//! ```
//!
//! Each that is due has one turn, then what has happened meanwhile is looked at: a driver or a host
//! that always has more does not keep the others waiting, nor an order.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use super::board::Plugged;
use crate::clock::Clock;
use crate::device::virtio::{Driven, Interest};
use crate::end::End;
use crate::fault::GuestFault;
use crate::jail::seccomp::{self, Cell};
use crate::kvm::KvmError;
use crate::kvm::bell::{Bell, Doorbell};
use crate::worker::{Kick, Order, Post, Seat, Workers};

/// How many events are taken at once. What is left comes with the next wait.
const EVENTS: usize = 32;

/// What an event is of. Bells are numbered from 0, devices from half of all numbers on.
const WAKE: u64 = u64::MAX;
const DEVICES: u64 = 1 << 63;

/// Whether the devices are as their drivers left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// No driver has touched them.
    Cold,
    /// They were restored: what was on its way is made up for.
    Restored,
}

/// One turn of a device, by its number: of a queue, or of what it waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Queue(usize, u16),
    Ready(usize),
}

impl Turn {
    const fn device(self) -> usize {
        match self {
            Self::Queue(device, _) | Self::Ready(device) => device,
        }
    }
}

/// Wakes the thread from its wait.
#[derive(Clone, Debug)]
struct Wake(Arc<Bell>);

impl Kick for Wake {
    fn kick(&self, _thread: &JoinHandle<()>) {
        self.0.ring();
    }

    fn take_back(&self) {
        let _rang = self.0.hear();
    }
}

/// Why there is no such thread.
#[derive(Debug, thiserror::Error)]
pub enum AttendError {
    /// The kernel gave no bell to wake it with.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel gave no thread, or no set of descriptors to wait for.
    #[error("the thread of the devices cannot be started")]
    Thread(#[from] io::Error),
}

/// The thread, which waits for its devices.
#[derive(Debug)]
pub struct Attendant {
    seat: Seat<(Attend, Begin)>,
    wake: Wake,
}

/// Starts the thread, which does `first` and then enters its cell.
pub fn ahead(
    workers: &Workers,
    first: impl FnOnce() + Send + 'static,
) -> Result<Attendant, AttendError> {
    let wake = Bell::new()?;
    let wake = Wake(Arc::new(wake));
    let first = || {
        first();
        Ok(seccomp::enter(Cell::Devices)?)
    };
    let work = |post: &Post, (mut attend, begin): (Attend, Begin)| {
        if let Err(end) = attend.work(post, begin) {
            post.end(end);
        }
    };
    let seat = workers.ahead("devices", wake.clone(), first, work)?;
    Ok(Attendant { seat, wake })
}

impl Attendant {
    /// Gives it its devices.
    pub fn give(
        self,
        plugged: Vec<Plugged>,
        clock: Box<dyn Clock + Send>,
        begin: Begin,
    ) -> io::Result<()> {
        let attend = Attend::new(plugged, clock, &self.wake)?;
        self.seat.give((attend, begin));
        Ok(())
    }
}

#[derive(Debug)]
struct Attended {
    device: Arc<dyn Driven>,
    /// What is in the set of descriptors for it.
    watched: Option<(Arc<OwnedFd>, Interest)>,
    at: Option<Duration>,
}

/// Whose queue a bell is of.
#[derive(Debug)]
struct Source {
    plugged: Arc<[Doorbell]>,
    device: usize,
    queue: u16,
}

impl Source {
    fn hear(&self) {
        if let Some(bell) = self.plugged.get(usize::from(self.queue)) {
            let _rang = bell.hear();
        }
    }
}

struct Attend {
    epoll: OwnedFd,
    devices: Vec<Attended>,
    bells: Vec<Source>,
    due: BTreeSet<Turn>,
    clock: Box<dyn Clock + Send>,
}

impl fmt::Debug for Attend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attend")
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

impl Attend {
    fn new(plugged: Vec<Plugged>, clock: Box<dyn Clock + Send>, wake: &Wake) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let watch = |bell: BorrowedFd<'_>, token| {
            epoll::add(&epoll, bell, EventData::new_u64(token), EventFlags::IN)
        };
        watch(wake.0.as_fd(), WAKE)?;
        let mut bells = Vec::new();
        let mut devices = Vec::new();
        for (number, plugged) in plugged.into_iter().enumerate() {
            let Plugged {
                device, bells: of, ..
            } = plugged;
            for (queue, bell) in (0..).zip(of.iter()) {
                watch(bell.as_fd(), bells.len() as u64)?;
                bells.push(Source {
                    plugged: Arc::clone(&of),
                    device: number,
                    queue,
                });
            }
            devices.push(Attended {
                device,
                watched: None,
                at: None,
            });
        }
        Ok(Self {
            epoll,
            devices,
            bells,
            due: BTreeSet::new(),
            clock,
        })
    }

    fn work(&mut self, post: &Post, begin: Begin) -> Result<(), End> {
        if post.stand() == Order::End {
            return Ok(());
        }
        self.begin(begin)?;
        loop {
            if post.is_called() && post.stand() == Order::End {
                return Ok(());
            }
            self.wait().map_err(End::Wait)?;
            for turn in std::mem::take(&mut self.due) {
                self.turn(turn)?;
            }
        }
    }

    fn begin(&mut self, begin: Begin) -> Result<(), End> {
        for number in 0..self.devices.len() {
            let device = self.devices.get(number).map(|of| Arc::clone(&of.device));
            if let (Some(device), Begin::Restored) = (device, begin) {
                let due = device.resume()?;
                self.due
                    .extend(due.into_iter().map(|queue| Turn::Queue(number, queue)));
            }
            self.watch(number).map_err(End::Wait)?;
        }
        Ok(())
    }

    /// Gives a device a turn, and looks at what it waits for then.
    fn turn(&mut self, turn: Turn) -> Result<(), End> {
        let Some(attended) = self.devices.get(turn.device()) else {
            return Ok(());
        };
        let more: Result<bool, GuestFault> = match turn {
            Turn::Queue(_, queue) => attended.device.handle(queue),
            Turn::Ready(_) => attended.device.ready(),
        };
        if more? {
            self.due.insert(turn);
        }
        self.watch(turn.device()).map_err(End::Wait)
    }

    /// Waits until something is due.
    fn wait(&mut self) -> io::Result<()> {
        let limit = if self.due.is_empty() {
            let next = self.devices.iter().filter_map(|device| device.at).min();
            next.map(|at| at.saturating_sub(self.clock.now()))
        } else {
            Some(Duration::ZERO)
        };
        // A time that cannot be said is as good as for ever.
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut events = Vec::with_capacity(EVENTS);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            limit.as_ref(),
        ) {
            // Interrupted, it looks at what it is to do and waits again.
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            self.happened(&event);
        }
        let now = self.clock.now();
        for (number, device) in self.devices.iter_mut().enumerate() {
            if device.at.is_some_and(|at| at <= now) {
                device.at = None;
                self.due.insert(Turn::Ready(number));
            }
        }
        Ok(())
    }

    fn happened(&mut self, event: &Event) {
        let token = event.data.u64();
        if token == WAKE {
            // Taken back by the worker, when it sees its order.
            return;
        }
        let number = usize::try_from(token & !DEVICES).unwrap_or(usize::MAX);
        if token & DEVICES != 0 {
            self.due.insert(Turn::Ready(number));
        } else if let Some(bell) = self.bells.get(number) {
            // Before the queue is looked at: a kick that comes later rings again.
            bell.hear();
            self.due.insert(Turn::Queue(bell.device, bell.queue));
        }
    }

    /// Waits for what a device wants now, and for nothing that it wanted before.
    fn watch(&mut self, number: usize) -> io::Result<()> {
        let Some(attended) = self.devices.get_mut(number) else {
            return Ok(());
        };
        let wants = attended.device.wants();
        attended.at = wants.at;
        let is_same = match (&attended.watched, &wants.descriptor) {
            (Some((before, of)), Some((now, wanted))) => Arc::ptr_eq(before, now) && of == wanted,
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return Ok(());
        }
        if let Some((before, _)) = attended.watched.take() {
            epoll::delete(&self.epoll, before.as_fd())?;
        }
        if let Some((descriptor, interest)) = wants.descriptor {
            let flags = match interest {
                Interest::Read => EventFlags::IN,
                Interest::Write => EventFlags::OUT,
                Interest::Both => EventFlags::IN | EventFlags::OUT,
            };
            let data = EventData::new_u64(DEVICES | number as u64);
            epoll::add(&self.epoll, descriptor.as_fd(), data, flags)?;
            attended.watched = Some((descriptor, interest));
        }
        Ok(())
    }
}
