//! The network device (virtio 1.2, section 5.1): whole frames between a driver and a tap.
//!
//! ```text
//!   queue 0, received     12 bytes of header, frame      written by us, in one request each
//!   queue 1, transmitted  12 bytes of header, frame      read by us
//! ```
//!
//! Offered are an address and an MTU. No offloads: a guest's header would be the host kernel's
//! to believe, a restored guest would need a tap that is set up as its first one was, and a frame
//! would be 64 KiB where it is now 1.5. No merged buffers, which without offloads nobody needs, and
//! no control queue.
//!
//! A frame is taken from the tap when the guest has room for it and its rate allows it, so that the
//! tap's own queue is what fills up. One that has come before its rate allows it is held; that is
//! all that is kept. A frame of the guest's stays in the ring until the tap takes it and the rate
//! allows it. Frames of sizes that no network has are dropped and counted, as are those that the
//! host does not take.

#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::io;
use std::time::Duration;

pub use wire::{HEADER_BYTES_MAX, Received, Tap, Wire};

use super::queue::{self, Broken, Chain, Queues};
use super::{Handled, Interest, RestoreError, VirtioDevice, Wants, config_bytes};
use crate::clock::Clock;
use crate::device::rate::Limit;
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError, Sections, Writer};
use crate::snapshot::kind::Kind;

/// Features: the MTU and the address are in the configuration.
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;

const QUEUE_SIZES: [u16; 2] = [256, 256];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The most bytes of a packet in a frame.
pub const MTU_BYTES: u16 = 1500;

/// The least and the most bytes of a frame: addresses and type, and a VLAN's tag at most.
pub const FRAME_BYTES_MIN: usize = 14;
/// See above.
pub const FRAME_BYTES_MAX: usize = 14 + 4 + MTU_BYTES as usize;

/// Before each frame. Only its last number is not 0 in what a guest receives: one buffer.
const HEADER_BYTES: usize = 12;
const HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// The most frames each way in one turn.
const FRAMES_MAX: u16 = 64;

/// When to look at a wire again that has failed: it would be ready all the time.
const FAILED_AGAIN: Duration = Duration::from_millis(100);

/// What is saved: what the driver knows. A frame that is held is lost, as on a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The guest's address.
    pub mac: [u8; 6],
}

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.mac);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let mac = from.array()?;
        Ok(Self { mac })
    }
}

/// Another device than the one that a guest was saved with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a network device {found:x?} where the guest was saved with {saved:x?}")]
pub struct BadState {
    /// The address that the guest knows.
    pub saved: [u8; 6],
    /// The one that there is.
    pub found: [u8; 6],
}

/// What has gone through, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The guest received.
    pub received: u64,
    /// The guest sent.
    pub sent: u64,
    /// Came for the guest, and were of a bad size or fit in no buffer of its.
    pub receive_drops: u64,
    /// Came from the guest, and were of a bad size or not taken by the host.
    pub send_drops: u64,
}

/// One direction.
#[derive(Debug)]
struct Way {
    limit: Limit,
    /// Nothing is done before.
    wait: Option<Duration>,
}

impl Way {
    const fn new(limit: Limit) -> Self {
        Self { limit, wait: None }
    }

    /// Whether its time has come.
    fn may_go(&mut self, now: Duration) -> bool {
        self.wait = self.wait.filter(|at| now < *at);
        self.wait.is_none()
    }

    fn wait_for(&mut self, now: Duration, wait: Duration) {
        self.wait = Some(now.saturating_add(wait));
    }
}

/// The device.
pub struct Net {
    wire: Box<dyn Wire>,
    mac: [u8; 6],
    clock: Box<dyn Clock + Send>,
    chain: Chain,
    /// A frame on its way out, then the one on its way in, with one byte more than any has.
    out: Box<[u8]>,
    incoming: Box<[u8]>,
    /// How long the frame is that came and is not given on yet.
    held: Option<usize>,
    receive: Way,
    send: Way,
    /// The guest gives no room: the next kick tells.
    is_starved: bool,
    /// The tap takes nothing more now.
    is_stuck: bool,
    counts: Counts,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the frames: they are a tenant's.
        f.debug_struct("Net")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// A device with an address, and limits of what it receives and sends.
    pub fn new(
        wire: Box<dyn Wire>,
        mac: [u8; 6],
        receive: Limit,
        send: Limit,
        clock: Box<dyn Clock + Send>,
    ) -> Self {
        Self {
            wire,
            mac,
            clock,
            chain: Chain::default(),
            out: vec![0; FRAME_BYTES_MAX].into(),
            incoming: vec![0; FRAME_BYTES_MAX + 1].into(),
            held: None,
            receive: Way::new(receive),
            send: Way::new(send),
            is_starved: true,
            is_stuck: false,
            counts: Counts::default(),
        }
    }

    /// The same, if it is the device that a guest was saved with.
    pub fn restore(self, state: State) -> Result<Self, BadState> {
        let (saved, found) = (state.mac, self.mac);
        if saved == found {
            Ok(self)
        } else {
            Err(BadState { saved, found })
        }
    }

    /// What is saved.
    #[must_use]
    pub const fn save(&self) -> State {
        State { mac: self.mac }
    }

    /// What has gone through.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Sends what the guest gives, as much as the wire and the rate take.
    fn send(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let now = self.clock.now();
        self.is_stuck = false;
        if !self.send.may_go(now) {
            return Ok(Handled::default());
        }
        let mut count = 0;
        while count < FRAMES_MAX && queues.pop(TRANSMIT, &mut self.chain)? {
            if !self.send_one(now, queues)? {
                queues.put_back(TRANSMIT);
                break;
            }
            queues.push(TRANSMIT, self.chain.head(), 0)?;
            count += 1;
        }
        given_back(TRANSMIT, count, queues)
    }

    /// Sends or drops one frame; `false` when it is too early.
    fn send_one(&mut self, now: Duration, queues: &Queues<'_>) -> Result<bool, Broken> {
        let readable = self.chain.readable();
        let bytes = queue::total(readable).checked_sub(HEADER_BYTES);
        let Some(bytes) = bytes else {
            return Err(self.chain.fault(TRANSMIT));
        };
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes) {
            self.counts.send_drops += 1;
            return Ok(true);
        }
        let before = self.send.limit;
        if let Err(wait) = self.send.limit.take(bytes as u64, now) {
            self.send.wait_for(now, wait);
            return Ok(false);
        }
        let frame = self.out.get_mut(..bytes).unwrap_or_default();
        queues.gather(TRANSMIT, readable, HEADER_BYTES, frame)?;
        match self.wire.send(frame) {
            Ok(()) => self.counts.sent += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.send.limit = before;
                self.is_stuck = true;
                return Ok(false);
            }
            // A tap that is down or gone.
            Err(_) => self.counts.send_drops += 1,
        }
        Ok(true)
    }

    /// Gives the guest what has come, as much as it has room for and its rate allows.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let now = self.clock.now();
        if !self.receive.may_go(now) {
            return Ok(Handled::default());
        }
        let (mut count, mut turns) = (0, 0);
        while turns < FRAMES_MAX {
            turns += 1;
            self.is_starved = !queues.pop(RECEIVE, &mut self.chain)?;
            if self.is_starved {
                break;
            }
            let room = queue::total(self.chain.writable());
            if room < HEADER_BYTES {
                return Err(self.chain.fault(RECEIVE));
            }
            let Some(bytes) = self.next(now) else {
                queues.put_back(RECEIVE);
                break;
            };
            let fits = (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes)
                && HEADER_BYTES + bytes <= room;
            if !fits {
                self.counts.receive_drops += 1;
                queues.put_back(RECEIVE);
                continue;
            }
            let frame = self.incoming.get(..bytes).unwrap_or_default();
            let writable = self.chain.writable();
            let mut written = queues.scatter(RECEIVE, writable, 0, &HEADER)?;
            written += queues.scatter(RECEIVE, writable, HEADER_BYTES, frame)?;
            let written = u32::try_from(written).unwrap_or(0);
            queues.push(RECEIVE, self.chain.head(), written)?;
            self.counts.received += 1;
            count += 1;
        }
        Ok(Handled {
            more: turns == FRAMES_MAX,
            ..given_back(RECEIVE, count, queues)?
        })
    }

    /// The next frame's length, if there is one and the rate allows it now. One that nobody has
    /// finished is none of any length.
    fn next(&mut self, now: Duration) -> Option<usize> {
        let bytes = match self.held.take() {
            Some(bytes) => bytes,
            None => match self.wire.receive(&mut self.incoming) {
                Ok(Received::Frame(bytes)) => bytes,
                Ok(Received::Unfinished) => 0,
                Err(error) => {
                    if !is_nothing_now(&error) {
                        self.receive.wait_for(now, FAILED_AGAIN);
                    }
                    return None;
                }
            },
        };
        if let Err(wait) = self.receive.limit.take(bytes as u64, now) {
            self.receive.wait_for(now, wait);
            self.held = Some(bytes);
            return None;
        }
        Some(bytes)
    }
}

/// Whether an error only says to come back when the wire is ready.
fn is_nothing_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// What came of a turn in which so many frames of a queue were given back.
fn given_back(queue: u16, count: u16, queues: &Queues<'_>) -> Result<Handled, Broken> {
    Ok(Handled {
        interrupt: count > 0 && queues.wants_interrupt(queue)?,
        more: count == FRAMES_MAX,
    })
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn id(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        F_MTU | F_MAC
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        // Address, status and pairs of queues, which are not offered, and the MTU.
        let mut config = [0; 12];
        let (mac, rest) = config.split_at_mut(6);
        mac.copy_from_slice(&self.mac);
        if let [_, _, _, _, mtu @ ..] = rest {
            mtu.copy_from_slice(&MTU_BYTES.to_le_bytes());
        }
        config_bytes(&config, offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        // Not the rates: a guest would reset to have them anew.
        self.held = None;
        self.is_starved = true;
        self.is_stuck = false;
    }

    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        match index {
            RECEIVE => self.receive(queues),
            TRANSMIT => self.send(queues),
            _ => Ok(Handled::default()),
        }
    }

    fn ready(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let sent = self.send(queues)?;
        Ok(sent.and(self.receive(queues)?))
    }

    fn wants(&self) -> Wants {
        let reads = !self.is_starved && self.receive.wait.is_none();
        let interest = match (reads, self.is_stuck) {
            (true, true) => Some(Interest::Both),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        };
        Wants {
            descriptor: interest.map(|interest| (self.wire.descriptor().clone(), interest)),
            at: [self.receive.wait, self.send.wait]
                .into_iter()
                .flatten()
                .min(),
        }
    }

    fn save_into(&self, into: &mut Writer, number: u8) -> Result<(), FormatError> {
        into.put(Kind::Net.of(number), &self.save())
    }

    fn restore_from(self, from: &mut Sections<'_>, number: u8) -> Result<Self, RestoreError> {
        let saved = from.get(Kind::Net.of(number))?;
        Ok(self.restore(saved)?)
    }
}
