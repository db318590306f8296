//! The block device (virtio 1.2, section 5.2): a disk's sectors, for a driver that may ask for
//! anything.
//!
//! ```text
//!   read by us      header: type u32, reserved u32, sector u64     data, of a write
//!   written by us   data, of a read                                status u8
//! ```
//!
//! What has no header or no place for the status is no request, and ends the guest. What is refused
//! or fails gets its status and nothing else happens: a range beyond the end, a part of a sector, a
//! write to what is read-only, more bytes than a request may have, an error of the host's.
//!
//! Not offered: discard and write-zeroes, which would make holes in files that others may be
//! reading; the writeback switch; more than one queue.
//!
//! One request after the other is done where it is found, and the host's disk is waited for: the
//! data goes through a buffer here, since a guest's memory is no reference. What the rate does not
//! allow yet stays in the ring until its time.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::time::Duration;

use super::queue::{self, Broken, Chain, Queues};
use super::{Handled, RestoreError, VirtioDevice, Wants, config_bytes};
use crate::clock::Clock;
use crate::device::rate::Limit;
use crate::disk::{Access, Disk, SECTOR_BYTES};
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError, Sections, Writer};
use crate::snapshot::kind::Kind;

/// Features: the most of segments, and of bytes in each; no writing; flushing.
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

const QUEUE_SIZES: [u16; 1] = [256];
const REQUESTS: u16 = 0;

/// The most segments of data in a request, which is asked of drivers: two such fill the queue.
const SEGMENTS_MAX: u32 = 126;

/// The most bytes in each, likewise.
const SEGMENT_BYTES_MAX: u32 = 64 * 1024;

/// The most bytes of data in a request, however they are cut: more is refused.
pub const DATA_BYTES_MAX: usize = 126 * 64 * 1024;

/// The bytes of a disk's name in a guest.
pub const ID_BYTES: usize = 20;

/// The most requests in one turn, and the bytes of data after which it ends.
const REQUESTS_MAX: u16 = 32;
const TURN_BYTES: usize = 128 * 1024;

/// What is copied at once.
const STEP_BYTES: usize = 64 * 1024;

const HEADER_BYTES: usize = 16;

/// Types of requests.
mod request {
    pub(super) const READ: u32 = 0;
    pub(super) const WRITE: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
}

/// Answers to them.
mod status {
    pub(super) const OK: u8 = 0;
    pub(super) const ERROR: u8 = 1;
    pub(super) const UNSUPPORTED: u8 = 2;
}

/// What is saved: what the driver knows of the disk. Its content is the disk's, and how much of its
/// rate is used up is not the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// How large it is.
    pub sectors: u64,
    /// Whether it can be written.
    pub access: Access,
}

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.sectors.to_le_bytes());
        into.push(match self.access {
            Access::ReadOnly => 0,
            Access::ReadWrite => 1,
        });
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            sectors: from.u64()?,
            access: match from.flag("access to a disk")? {
                false => Access::ReadOnly,
                true => Access::ReadWrite,
            },
        })
    }
}

/// Another disk than the one that a guest was saved with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a disk of {found:?} where the guest was saved with one of {saved:?}")]
pub struct BadState {
    /// What the guest knows.
    pub saved: State,
    /// What there is.
    pub found: State,
}

/// Which disks a restored guest may find in the place of the one that it was saved with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exchange {
    /// One of the same size: its driver has read that, and goes by it.
    #[default]
    SameSize,
    /// Any. Its driver goes by the old size until it takes hold of the device anew, and whoever
    /// put another disk there has the guest do that.
    AnySize,
}

/// The device.
pub struct Blk {
    disk: Box<dyn Disk>,
    id: [u8; ID_BYTES],
    limit: Limit,
    clock: Box<dyn Clock + Send>,
    chain: Chain,
    step: Vec<u8>,
    /// Whether a restored guest may find another disk here.
    exchange: Exchange,
    /// The driver flushes by itself; for others each write is flushed.
    flushes: bool,
    /// When the next request is allowed.
    wait: Option<Duration>,
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the bytes that went through: they are a tenant's.
        f.debug_struct("Blk")
            .field("disk", &self.disk)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: u32,
    sector: u64,
}

/// Why a request is not done.
#[derive(Debug)]
enum Refused {
    /// It is none that there is.
    Unsupported,
    /// It may not be, or failed.
    Error,
    /// The driver broke its queue.
    Broken(Broken),
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::Error
    }
}

impl From<Broken> for Refused {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl Blk {
    /// A disk with a name of at most [`ID_BYTES`] bytes, by which a guest finds it; what is longer
    /// is cut.
    pub fn new(disk: Box<dyn Disk>, id: &str, limit: Limit, clock: Box<dyn Clock + Send>) -> Self {
        let mut name = [0; ID_BYTES];
        for (to, from) in name.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk,
            id: name,
            limit,
            clock,
            chain: Chain::default(),
            step: Vec::new(),
            exchange: Exchange::default(),
            flushes: false,
            wait: None,
        }
    }

    /// The same, of which a restored guest may find others.
    #[must_use]
    pub const fn exchanged(mut self, exchange: Exchange) -> Self {
        self.exchange = exchange;
        self
    }

    /// The same, if it is the disk that a guest was saved with, or another that may be there
    /// instead.
    pub fn restore(self, saved: State) -> Result<Self, BadState> {
        let found = self.save();
        let fits = match self.exchange {
            Exchange::SameSize => found == saved,
            Exchange::AnySize => found.access == saved.access,
        };
        if fits {
            Ok(self)
        } else {
            Err(BadState { saved, found })
        }
    }

    /// What is saved. What the guest has flushed is on the disk; whoever saves the disk with it
    /// flushes the rest by [`flush`](Self::flush).
    #[must_use]
    pub fn save(&self) -> State {
        State {
            sectors: self.disk.bytes() / SECTOR_BYTES,
            access: self.disk.access(),
        }
    }

    /// Makes everything last that the guest has written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    /// Does requests until there are none, or the time or the turn is over.
    fn turn(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut handled = Handled::default();
        let (mut count, mut bytes) = (0, 0);
        let now = self.clock.now();
        if self.wait.is_some_and(|at| now < at) {
            return Ok(handled);
        }
        self.wait = None;
        while queues.pop(REQUESTS, &mut self.chain)? {
            let header = self.header(queues)?;
            let data = self.data_bytes(header);
            let paid = data.min(DATA_BYTES_MAX) as u64;
            if let Err(wait) = self.limit.take(paid, now) {
                queues.put_back(REQUESTS);
                self.wait = Some(now.saturating_add(wait));
                break;
            }
            let status = match self.serve(header, data, queues) {
                Ok(()) => status::OK,
                Err(Refused::Error) => status::ERROR,
                Err(Refused::Unsupported) => status::UNSUPPORTED,
                Err(Refused::Broken(broken)) => return Err(broken),
            };
            let room = queue::total(self.chain.writable());
            queues.scatter(REQUESTS, self.chain.writable(), room - 1, &[status])?;
            let written = u32::try_from(room).unwrap_or(u32::MAX);
            queues.push(REQUESTS, self.chain.head(), written)?;
            count += 1;
            bytes += data;
            if count == REQUESTS_MAX || bytes >= TURN_BYTES {
                handled.more = true;
                break;
            }
        }
        handled.interrupt = count > 0 && queues.wants_interrupt(REQUESTS)?;
        Ok(handled)
    }

    /// The header of a request that has one, and a place for the status.
    fn header(&self, queues: &Queues<'_>) -> Result<Header, Broken> {
        let mut header = [0; HEADER_BYTES];
        let read = queues.gather(REQUESTS, self.chain.readable(), 0, &mut header)?;
        if read < HEADER_BYTES || queue::total(self.chain.writable()) == 0 {
            return Err(self.chain.fault(REQUESTS));
        }
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        Ok(Header {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        })
    }

    /// How many bytes of the disk a request is about.
    fn data_bytes(&self, header: Header) -> usize {
        match header.kind {
            request::READ => queue::total(self.chain.writable()) - 1,
            request::WRITE => queue::total(self.chain.readable()) - HEADER_BYTES,
            _ => 0,
        }
    }

    fn serve(&mut self, header: Header, data: usize, queues: &Queues<'_>) -> Result<(), Refused> {
        match header.kind {
            request::READ => {
                let at = self.place(header.sector, data)?;
                self.read(at, data, queues)
            }
            request::WRITE => {
                let at = self.place(header.sector, data)?;
                self.write(at, data, queues)
            }
            request::FLUSH => Ok(self.disk.flush()?),
            request::GET_ID => {
                let room = queue::total(self.chain.writable()) - 1;
                let id = self.id.get(..room).unwrap_or(&self.id);
                queues.scatter(REQUESTS, self.chain.writable(), 0, id)?;
                Ok(())
            }
            _ => Err(Refused::Unsupported),
        }
    }

    /// Where on the disk a request is, if all of it is there.
    fn place(&self, sector: u64, data: usize) -> Result<u64, Refused> {
        let bytes = u64::try_from(data).map_err(|_error| Refused::Error)?;
        let at = sector.checked_mul(SECTOR_BYTES).ok_or(Refused::Error)?;
        let end = at.checked_add(bytes).ok_or(Refused::Error)?;
        let whole = bytes.is_multiple_of(SECTOR_BYTES);
        if whole && data <= DATA_BYTES_MAX && end <= self.disk.bytes() {
            Ok(at)
        } else {
            Err(Refused::Error)
        }
    }

    fn read(&mut self, mut at: u64, data: usize, queues: &Queues<'_>) -> Result<(), Refused> {
        let mut done = 0;
        while done < data {
            let count = (data - done).min(STEP_BYTES);
            let step = room(&mut self.step, count);
            self.disk.read(at, step)?;
            queues.scatter(REQUESTS, self.chain.writable(), done, step)?;
            done += count;
            at += count as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut at: u64, data: usize, queues: &Queues<'_>) -> Result<(), Refused> {
        if self.disk.access() == Access::ReadOnly {
            return Err(Refused::Error);
        }
        let mut done = 0;
        while done < data {
            let count = (data - done).min(STEP_BYTES);
            let step = room(&mut self.step, count);
            let readable = self.chain.readable();
            queues.gather(REQUESTS, readable, HEADER_BYTES + done, step)?;
            self.disk.write(at, step)?;
            done += count;
            at += count as u64;
        }
        if !self.flushes {
            self.disk.flush()?;
        }
        Ok(())
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let access = match self.disk.access() {
            Access::ReadOnly => F_RO,
            Access::ReadWrite => 0,
        };
        F_SIZE_MAX | F_SEG_MAX | F_FLUSH | access
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        let sectors = (self.disk.bytes() / SECTOR_BYTES).to_le_bytes();
        let limits = [SEGMENT_BYTES_MAX, SEGMENTS_MAX];
        let limits = limits.iter().flat_map(|limit| limit.to_le_bytes());
        for (to, from) in config.iter_mut().zip(sectors.into_iter().chain(limits)) {
            *to = from;
        }
        config_bytes(&config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.flushes = features & F_FLUSH != 0;
    }

    fn reset(&mut self) {
        // Not the rate: a guest would reset to have it anew.
        self.flushes = false;
    }

    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        match index {
            REQUESTS => self.turn(queues),
            _ => Ok(Handled::default()),
        }
    }

    fn ready(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        self.turn(queues)
    }

    fn wants(&self) -> Wants {
        Wants {
            descriptor: None,
            at: self.wait,
        }
    }

    fn settle(&mut self) -> io::Result<()> {
        self.flush()
    }

    fn save_into(&self, into: &mut Writer, number: u8) -> Result<(), FormatError> {
        into.put(Kind::Blk.of(number), &self.save())
    }

    fn restore_from(self, from: &mut Sections<'_>, number: u8) -> Result<Self, RestoreError> {
        let saved = from.get(Kind::Blk.of(number))?;
        Ok(self.restore(saved)?)
    }
}

/// Room for a step of so many bytes. Only as much is there as the guest has asked for at once: most
/// guests never need all of it.
fn room(step: &mut Vec<u8>, count: usize) -> &mut [u8] {
    if step.len() < count {
        step.resize(count, 0);
    }
    step.get_mut(..count).unwrap_or_default()
}
