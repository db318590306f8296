//! The console device with one named port, which is no console: the agent's channel (virtio 1.2,
//! section 5.3, with F_MULTIPORT).
//!
//! ```text
//!   driver                         device                          host
//!   DEVICE_READY            ──▶
//!                           ◀──    DEVICE_ADD
//!   PORT_READY              ──▶
//!                           ◀──    PORT_NAME
//!   PORT_OPEN 1             ──▶    accepts                  ◀──    connects
//!                           ◀──    PORT_OPEN 1
//!   bytes                   ◀──▶   one request at a time    ◀──▶   bytes
//!                           ◀──    PORT_OPEN 0              ◀──    closes
//!   PORT_OPEN 0             ──▶    closes                   ──▶    end
//! ```
//!
//! Nothing is kept here: bytes of the host's are read when the guest has given room for them, and
//! a request of the guest's is given back when the host has taken all of it. So nothing is lost
//! when either is slow, and neither can make us keep much.
//!
//! A connection begins for the guest with PORT_OPEN 1. What the guest sent before belongs to no
//! connection or to the last one, and is dropped before that news. A host that connects as another
//! closes is news too: first 0, then 1.

mod host;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

pub use host::{Door, Listener, Peer, Stream};

use super::queue::{self, Broken, Chain, Queues};
use super::{Handled, Interest, RestoreError, VirtioDevice, Wants, config_bytes};
use crate::clock::Clock;
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError, Sections, Writer};
use crate::snapshot::kind::Kind;

/// The driver hears of ports, and of their opening and closing.
const F_MULTIPORT: u64 = 1 << 1;

const QUEUE_SIZES: [u16; 4] = [64, 64, 16, 16];

/// The queues by number, named from the driver's side as in the specification.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// The only port.
const PORT: u32 = 0;
const PORTS: u32 = 1;

/// Events of control messages.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// Before the name, if there is one: port, event and value.
const MESSAGE_BYTES: usize = 8;

/// The most bytes of a port's name.
pub const NAME_BYTES_MAX: usize = 64;

/// The most requests of a queue in one turn: a driver on another processor can go on asking.
const REQUESTS_MAX: u16 = 64;

/// The most bytes either way in one turn, by steps of what is copied at once.
const TURN_BYTES_MAX: usize = 256 * 1024;
const STEP_BYTES: usize = 4096;

/// When to try again to let a host in, after the kernel had no descriptor or memory for it.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How far the driver is with the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Setup {
    /// It has asked for none.
    #[default]
    Unknown,
    /// It is to hear that there is one.
    Asked,
    /// It has heard that.
    Added,
    /// It has set the port up, and is to hear its name.
    Unnamed,
    /// It knows all there is, and hears of the host.
    Ready,
}

/// What is saved. The connection is the host's and not the guest's: a restored guest hears that it
/// is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How far the driver is.
    pub setup: Setup,
    /// A program of the guest's has the port open.
    pub guest_open: bool,
    /// What the driver has heard last of the host: it is connected.
    pub told_open: bool,
}

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.push(match self.setup {
            Setup::Unknown => 0,
            Setup::Asked => 1,
            Setup::Added => 2,
            Setup::Unnamed => 3,
            Setup::Ready => 4,
        });
        into.extend([u8::from(self.guest_open), u8::from(self.told_open)]);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let what = "setup of a port";
        Ok(Self {
            setup: match from.u8()? {
                0 => Setup::Unknown,
                1 => Setup::Asked,
                2 => Setup::Added,
                3 => Setup::Unnamed,
                4 => Setup::Ready,
                value => return Err(FormatError::Name { what, value }),
            },
            guest_open: from.flag("openness of a port")?,
            told_open: from.flag("openness of a port")?,
        })
    }
}

/// The device.
pub struct Console {
    name: &'static str,
    door: Box<dyn Door>,
    clock: Box<dyn Clock + Send>,
    chain: Chain,
    step: Box<[u8; STEP_BYTES]>,
    multiport: bool,
    state: State,
    connection: Option<Connection>,
    /// A connection that the driver has heard of is over, whether or not there is another.
    was_cut: bool,
    /// When a host is let in again.
    accept_at: Option<Duration>,
}

/// A host, and how far it is.
#[derive(Debug)]
struct Connection {
    peer: Box<dyn Peer>,
    /// How much of the guest's next request it has taken.
    taken: usize,
    /// It takes nothing more now.
    is_stuck: bool,
    /// It takes nothing any more: what it has sent before is still for the guest.
    is_deaf: bool,
    /// The guest gives no room for its bytes: the next kick tells.
    is_starved: bool,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the bytes: they are a tenant's.
        f.debug_struct("Console")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// News for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Add,
    Name,
    Open,
    Close,
}

/// Which way bytes may go in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToHost,
    ToGuest,
    Both,
    Neither,
}

impl Console {
    /// A device whose port has a name of at most [`NAME_BYTES_MAX`] bytes; what is longer is cut.
    pub fn new(name: &'static str, door: Box<dyn Door>, clock: Box<dyn Clock + Send>) -> Self {
        Self {
            name,
            door,
            clock,
            chain: Chain::default(),
            step: Box::new([0; STEP_BYTES]),
            multiport: false,
            state: State::default(),
            connection: None,
            was_cut: false,
            accept_at: None,
        }
    }

    /// The same as it was saved, with nobody connected.
    #[must_use]
    pub fn restore(self, state: State) -> Self {
        Self {
            state,
            was_cut: state.told_open,
            ..self
        }
    }

    /// What is saved.
    #[must_use]
    pub const fn save(&self) -> State {
        self.state
    }

    /// Bytes go both ways: a host is there, and the driver has heard of this one.
    fn is_open(&self) -> bool {
        self.connection.is_some() && self.state.told_open && !self.was_cut
    }

    fn turn(&mut self, way: Way, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut handled = self.hear(queues)?;
        self.accept();
        if !self.is_open() {
            let dropped = self.drop_sent(queues)?;
            handled = handled.and(dropped);
            if dropped.more {
                return Ok(handled);
            }
        }
        handled = handled.and(self.tell(queues)?);
        if !self.is_open() {
            return Ok(handled);
        }
        if matches!(way, Way::ToHost | Way::Both) {
            handled = handled.and(self.send(queues)?);
        }
        if matches!(way, Way::ToGuest | Way::Both) {
            handled = handled.and(self.receive(queues)?);
        }
        // That the host is gone is for the next turn to tell.
        handled.more |= self.connection.is_none();
        Ok(handled)
    }

    /// Reads what the driver has to say.
    fn hear(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut count = 0;
        while self.multiport
            && count < REQUESTS_MAX
            && queues.pop(CONTROL_TRANSMIT, &mut self.chain)?
        {
            let mut message = [0; MESSAGE_BYTES];
            let read = queues.gather(CONTROL_TRANSMIT, self.chain.readable(), 0, &mut message)?;
            if read < MESSAGE_BYTES {
                return Err(self.chain.fault(CONTROL_TRANSMIT));
            }
            let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
            let port = u32::from_le_bytes([p0, p1, p2, p3]);
            self.hear_one(
                port,
                u16::from_le_bytes([e0, e1]),
                u16::from_le_bytes([v0, v1]),
            );
            queues.push(CONTROL_TRANSMIT, self.chain.head(), 0)?;
            count += 1;
        }
        given_back(CONTROL_TRANSMIT, count, queues)
    }

    /// One message. Those about ports that are not there, and those that are not the driver's to
    /// send, say nothing.
    fn hear_one(&mut self, port: u32, event: u16, value: u16) {
        let yes = value == 1;
        match (event, port) {
            (event::DEVICE_READY, _) if yes => self.state.setup = Setup::Asked,
            (event::DEVICE_READY, _) => self.state.setup = Setup::Unknown,
            (event::PORT_READY, PORT) if yes => self.state.setup = Setup::Unnamed,
            (event::PORT_READY, PORT) => self.state.setup = Setup::Added,
            (event::PORT_OPEN, PORT) => {
                self.state.guest_open = yes;
                if !yes {
                    // The connection was with whoever had it open: the host sees that it is over.
                    self.cut();
                }
            }
            _ => {}
        }
    }

    /// Lets a host in while a program of the guest's is there to speak to.
    fn accept(&mut self) {
        if self.connection.is_some() || !self.state.guest_open {
            return;
        }
        let now = self.clock.now();
        if self.accept_at.is_some_and(|at| now < at) {
            return;
        }
        self.accept_at = None;
        match self.door.accept() {
            Ok(peer) => self.connection = peer.map(Connection::new),
            // It would be ready all the time, and fail all the time.
            Err(_) => self.accept_at = Some(now.saturating_add(ACCEPT_AGAIN)),
        }
    }

    /// Ends the connection, if there is one.
    fn cut(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            connection.peer.close();
            self.was_cut |= self.state.told_open;
        }
    }

    /// Drops what the guest has sent to nobody.
    fn drop_sent(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut count = 0;
        while count < REQUESTS_MAX && queues.pop(TRANSMIT, &mut self.chain)? {
            queues.push(TRANSMIT, self.chain.head(), 0)?;
            count += 1;
        }
        given_back(TRANSMIT, count, queues)
    }

    /// What the driver is to hear next. It never hears of the host before it has set the port up.
    fn news(&self) -> Option<News> {
        let told_open = self.state.told_open;
        match (self.state.setup, self.connection.is_some()) {
            (Setup::Unknown | Setup::Added, _) => None,
            (Setup::Asked, _) => Some(News::Add),
            (Setup::Unnamed, _) => Some(News::Name),
            (Setup::Ready, is_there) if told_open => {
                (self.was_cut || !is_there).then_some(News::Close)
            }
            (Setup::Ready, is_there) => is_there.then_some(News::Open),
        }
    }

    /// Tells the driver as much of it as it has given room for.
    fn tell(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut count = 0;
        while self.multiport
            && let Some(news) = self.news()
            && queues.pop(CONTROL_RECEIVE, &mut self.chain)?
        {
            let (event, value, name) = match news {
                News::Add => (event::DEVICE_ADD, 0, ""),
                News::Name => (event::PORT_NAME, 1, self.name),
                News::Open => (event::PORT_OPEN, 1, ""),
                News::Close => (event::PORT_OPEN, 0_u16, ""),
            };
            let name = name.as_bytes();
            let name = name.get(..NAME_BYTES_MAX).unwrap_or(name);
            let mut message = PORT.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            message.extend(name);
            let room = self.chain.writable();
            let written = queues.scatter(CONTROL_RECEIVE, room, 0, &message)?;
            if written < message.len() {
                return Err(self.chain.fault(CONTROL_RECEIVE));
            }
            let written = u32::try_from(written).unwrap_or(0);
            queues.push(CONTROL_RECEIVE, self.chain.head(), written)?;
            match news {
                News::Add => self.state.setup = Setup::Added,
                News::Name => self.state.setup = Setup::Ready,
                News::Open => self.state.told_open = true,
                News::Close => {
                    self.state.told_open = false;
                    self.was_cut = false;
                }
            }
            count += 1;
        }
        // It ends by itself: no message makes another one due.
        Ok(Handled {
            more: false,
            ..given_back(CONTROL_RECEIVE, count, queues)?
        })
    }

    /// Gives the host what the guest has sent, as much as it takes.
    fn send(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let (mut count, mut bytes) = (0, 0);
        let Some(connection) = &mut self.connection else {
            return Ok(Handled::default());
        };
        connection.is_stuck = false;
        while count < REQUESTS_MAX && queues.pop(TRANSMIT, &mut self.chain)? {
            let step = self.step.as_mut_slice();
            if !connection.send(queues, &self.chain, step, &mut bytes)? {
                queues.put_back(TRANSMIT);
                break;
            }
            queues.push(TRANSMIT, self.chain.head(), 0)?;
            connection.taken = 0;
            count += 1;
        }
        let handled = given_back(TRANSMIT, count, queues)?;
        Ok(Handled {
            more: handled.more || bytes >= TURN_BYTES_MAX,
            ..handled
        })
    }

    /// Gives the guest what the host has sent, as much as it has room for.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let mut count = 0;
        while let Some(connection) = &mut self.connection
            && count < REQUESTS_MAX
        {
            connection.is_starved = !queues.pop(RECEIVE, &mut self.chain)?;
            if connection.is_starved {
                break;
            }
            let room = queue::total(self.chain.writable());
            if room == 0 {
                return Err(self.chain.fault(RECEIVE));
            }
            let step = self.step.get_mut(..room.min(STEP_BYTES));
            let step = step.unwrap_or_default();
            match connection.peer.read(step) {
                Ok(read) if read > 0 => {
                    let bytes = step.get(..read).unwrap_or_default();
                    let written = queues.scatter(RECEIVE, self.chain.writable(), 0, bytes)?;
                    let written = u32::try_from(written).unwrap_or(0);
                    queues.push(RECEIVE, self.chain.head(), written)?;
                    count += 1;
                    continue;
                }
                Err(error) if host::is_nothing_now(&error) => {}
                Ok(_) | Err(_) => self.cut(),
            }
            queues.put_back(RECEIVE);
            break;
        }
        given_back(RECEIVE, count, queues)
    }
}

impl Connection {
    fn new(peer: Box<dyn Peer>) -> Self {
        Self {
            peer,
            taken: 0,
            is_stuck: false,
            is_deaf: false,
            is_starved: false,
        }
    }

    /// Gives the host what is left of one request, by steps; `false` when something is still left.
    fn send(
        &mut self,
        queues: &Queues<'_>,
        chain: &Chain,
        step: &mut [u8],
        bytes: &mut usize,
    ) -> Result<bool, Broken> {
        while !self.is_deaf {
            let there = queues.gather(TRANSMIT, chain.readable(), self.taken, step)?;
            if there == 0 {
                return Ok(true);
            }
            if *bytes >= TURN_BYTES_MAX {
                return Ok(false);
            }
            match self.peer.write(step.get(..there).unwrap_or_default()) {
                Ok(0) => self.is_deaf = true,
                Ok(count) => {
                    self.taken += count.min(there);
                    *bytes += count;
                }
                Err(error) if host::is_nothing_now(&error) => {
                    self.is_stuck = true;
                    return Ok(false);
                }
                Err(_) => self.is_deaf = true,
            }
        }
        // To nobody.
        Ok(true)
    }
}

/// What came of a turn in which so many requests of a queue were given back.
fn given_back(queue: u16, count: u16, queues: &Queues<'_>) -> Result<Handled, Broken> {
    Ok(Handled {
        interrupt: count > 0 && queues.wants_interrupt(queue)?,
        more: count == REQUESTS_MAX,
    })
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn id(&self) -> u32 {
        3
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        // Columns and rows, of which there are none, then how many ports there can be.
        let [p0, p1, p2, p3] = PORTS.to_le_bytes();
        config_bytes(&[0, 0, 0, 0, p0, p1, p2, p3], offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.multiport = features & F_MULTIPORT != 0;
    }

    fn reset(&mut self) {
        self.cut();
        self.state = State::default();
        self.was_cut = false;
        self.multiport = false;
    }

    fn handle(&mut self, index: u16, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        let way = match index {
            RECEIVE => Way::ToGuest,
            TRANSMIT => Way::ToHost,
            _ => Way::Neither,
        };
        self.turn(way, queues)
    }

    fn ready(&mut self, queues: &mut Queues<'_>) -> Result<Handled, Broken> {
        self.turn(Way::Both, queues)
    }

    fn wants(&self) -> Wants {
        let Some(connection) = &self.connection else {
            let open = self.state.guest_open && self.accept_at.is_none();
            return Wants {
                descriptor: open.then(|| (self.door.descriptor().clone(), Interest::Read)),
                at: self.accept_at.filter(|_| self.state.guest_open),
            };
        };
        let reads = self.is_open() && !connection.is_starved;
        let interest = match (reads, connection.is_stuck) {
            (true, true) => Some(Interest::Both),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        };
        Wants {
            descriptor: interest.map(|interest| (connection.peer.descriptor().clone(), interest)),
            at: None,
        }
    }

    fn save_into(&self, into: &mut Writer, number: u8) -> Result<(), FormatError> {
        into.put(Kind::Console.of(number), &self.save())
    }

    fn restore_from(self, from: &mut Sections<'_>, number: u8) -> Result<Self, RestoreError> {
        Ok(self.restore(from.get(Kind::Console.of(number))?))
    }
}
