//! A guest's driver for the targets of whole devices: it sets a device up as drivers do, offers
//! requests, and does between them what no driver does. A target brings the device and its host.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arbitrary::Arbitrary;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use spore_vmm::clock::Clock;
use spore_vmm::device::virtio::mmio::Mmio;
use spore_vmm::device::virtio::{Driven as _, VirtioDevice};
use spore_vmm::device::{Device as _, Effect, Interrupt};
use spore_vmm::memory::{Gpa, GuestMemory, Region, Sharing, Space};
use spore_vmm::snapshot::format::{Sections, Writer};

/// What each queue has of the memory, and where its parts are in that.
const QUEUE_BYTES: u32 = 0x5000;
const AVAILABLE: u32 = 0x400;
const USED: u32 = 0x800;
const BUFFERS: u32 = 0x1000;

const QUEUES: u32 = 4;
const MEMORY_BYTES: u64 = (QUEUES * QUEUE_BYTES) as u64;

/// Entries of each queue: every device takes so many.
const QUEUE_SIZE: u16 = 16;

/// The bytes that a descriptor's buffer has for itself.
const BUFFER_BYTES: u32 = 0x400;

/// More turns than any device needs for what is in its queues and on its host's side.
const TURNS_MAX: u32 = 20_000;

/// What a guest does with a device.
#[derive(Arbitrary, Debug)]
pub enum Act {
    /// Sets it up anew with these features, if it offers them, and empty rings.
    SetUp { features: u64 },
    /// Makes a request available and kicks or not.
    Offer { request: Request, kicks: bool },
    /// The same, in the form that drivers have for what the device does.
    Ask { request: Request },
    /// Writes anywhere in its memory.
    Memory { at: u32, bytes: Vec<u8> },
    /// Reads and writes a place of the registers and the configuration.
    Access {
        offset: u16,
        data: [u8; 8],
        count: u8,
    },
    /// Kicks a queue.
    Kick { queue: u8 },
    /// Is saved, and goes on in another machine.
    Save,
    /// Time passes.
    Wait { ms: u16 },
    /// Something happens on the host's side, and the device is told.
    Host { bytes: Vec<u8> },
}

/// A chain: what is read, and the lengths of what is written.
#[derive(Arbitrary, Debug)]
pub struct Request {
    pub queue: u8,
    pub read: Vec<Vec<u8>>,
    pub written: Vec<u16>,
}

/// Time, which the acts let pass.
#[derive(Clone, Debug, Default)]
pub struct Hand(Arc<AtomicU64>);

impl Clock for Hand {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

#[derive(Debug)]
struct Line;

impl Interrupt for Line {
    fn raise(&self) {}
}

static MEMORY: LazyLock<GuestMemory> = LazyLock::new(|| {
    let region = Region {
        start: Gpa(0),
        offset: 0,
        bytes: MEMORY_BYTES,
    };
    let space = Space::reserve(MEMORY_BYTES).expect("addresses");
    let file = file(MEMORY_BYTES);
    let memory = space.fill(file.as_fd(), Sharing::Shared, &[region]);
    memory.expect("a mapping")
});

/// A file in memory, of zeros.
#[must_use]
pub fn file(bytes: u64) -> OwnedFd {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, bytes).expect("its length");
    file
}

/// The guest has ended by what it did.
struct Over;

struct Guest<D: VirtioDevice> {
    device: Mmio<D>,
    /// How much was made available in each queue since it was set up.
    available: [u16; QUEUES as usize],
}

/// Lets a guest do all of it with a device that is set up. `make` gives the device, again after
/// each save; `form` gives a request the form that drivers have; `host` does something on its
/// host's side.
pub fn run<D: VirtioDevice>(
    acts: Vec<Act>,
    clock: &Hand,
    make: impl Fn() -> D,
    form: impl Fn(&mut Request),
    mut host: impl FnMut(&[u8]),
) {
    let zeros = [0; MEMORY_BYTES as usize];
    MEMORY.write(Gpa(0), &zeros).expect("all of it");
    let mut guest = Guest {
        device: Mmio::new(make(), MEMORY.clone(), Arc::new(Line)),
        available: [0; QUEUES as usize],
    };
    let mut done = guest.set_up(u64::MAX);
    for act in acts {
        if done.is_err() {
            return;
        }
        done = match act {
            Act::Ask { mut request } => {
                request.queue %= u8::try_from(guest.queues()).unwrap_or(1);
                form(&mut request);
                guest.offer(&request);
                guest.handle(request.queue)
            }
            act => guest.act(act, clock, &make, &mut host),
        };
    }
}

impl<D: VirtioDevice> Guest<D> {
    fn act(
        &mut self,
        act: Act,
        clock: &Hand,
        make: &impl Fn() -> D,
        host: &mut impl FnMut(&[u8]),
    ) -> Result<(), Over> {
        match act {
            Act::SetUp { features } => self.set_up(features),
            Act::Offer { mut request, kicks } => {
                request.queue %= u8::try_from(self.queues()).unwrap_or(1);
                self.offer(&request);
                if kicks {
                    self.handle(request.queue)
                } else {
                    Ok(())
                }
            }
            Act::Ask { .. } => Ok(()),
            Act::Memory { at, bytes } => {
                // Beyond its memory a guest writes nothing.
                let _beyond = MEMORY.write(Gpa(u64::from(at) % MEMORY_BYTES), &bytes);
                Ok(())
            }
            Act::Access {
                offset,
                mut data,
                count,
            } => {
                let count = usize::from(count) % (data.len() + 1);
                let written = self.device.write(offset.into(), &data[..count]);
                self.device.read(offset.into(), &mut data[..count]);
                over(written)
            }
            Act::Kick { queue } => self.handle(queue),
            Act::Save => self.save(make),
            Act::Wait { ms } => {
                clock.0.fetch_add(ms.into(), Ordering::SeqCst);
                self.ready()
            }
            Act::Host { bytes } => {
                host(&bytes);
                self.ready()
            }
        }
    }

    fn queues(&self) -> u32 {
        u32::from(self.device.queues())
    }

    fn register(&self, offset: u64, value: u32) -> Result<(), Over> {
        over(self.device.write(offset, &value.to_le_bytes()))
    }

    /// As drivers do it (virtio 1.2, sections 3.1.1 and 4.2.2).
    fn set_up(&mut self, features: u64) -> Result<(), Over> {
        self.available = [0; QUEUES as usize];
        for status in [0, 1, 3] {
            self.register(0x70, status)?;
        }
        for select in [0, 1] {
            self.register(0x14, select)?;
            let mut offered = [0; 4];
            self.device.read(0x10, &mut offered);
            // Its version, and of the rest what is asked for.
            let [low, high] = [features & 0xffff_ffff, features >> 32 | 1];
            let wanted = u32::try_from(if select == 0 { low } else { high }).unwrap_or(0);
            self.register(0x24, select)?;
            self.register(0x20, u32::from_le_bytes(offered) & wanted)?;
        }
        self.register(0x70, 11)?;
        for queue in 0..self.queues() {
            let place = queue * QUEUE_BYTES;
            // Of what was there before nothing is available, and nothing used.
            for part in [AVAILABLE, USED] {
                let at = Gpa(u64::from(place + part));
                MEMORY.write(at, &[0; 4]).expect("it is inside");
            }
            self.register(0x30, queue)?;
            self.register(0x38, QUEUE_SIZE.into())?;
            for (offset, part) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.register(offset, place + part)?;
                self.register(offset + 4, 0)?;
            }
            self.register(0x44, 1)?;
        }
        self.register(0x70, 15)
    }

    /// A chain from the queue's first descriptor on. What an earlier one had is overwritten.
    fn offer(&mut self, request: &Request) {
        let Request {
            queue,
            read,
            written,
        } = request;
        let place = u32::from(*queue) * QUEUE_BYTES;
        let write = |at: u32, bytes: &[u8]| {
            let _beyond = MEMORY.write(Gpa(at.into()), bytes);
        };
        let lengths = read.iter().map(|bytes| (Some(bytes), bytes.len()));
        let lengths = lengths.chain(written.iter().map(|bytes| (None, usize::from(*bytes))));
        let count = (read.len() + written.len()).min(QUEUE_SIZE.into());
        for (index, (bytes, length)) in (0..).zip(lengths.take(count)) {
            let buffer = place + BUFFERS + index * BUFFER_BYTES;
            let is_last = usize::try_from(index + 1).is_ok_and(|next| next == count);
            let flags = u16::from(!is_last) | u16::from(bytes.is_none()) << 1;
            let mut raw = u64::from(buffer).to_le_bytes().to_vec();
            raw.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend(u16::try_from(index + 1).unwrap_or(0).to_le_bytes());
            write(place + index * 16, &raw);
            if let Some(bytes) = bytes {
                write(buffer, bytes);
            }
        }
        let Some(available) = self.available.get_mut(usize::from(*queue)) else {
            return;
        };
        let slot = u32::from(*available % QUEUE_SIZE);
        write(place + AVAILABLE + 4 + slot * 2, &[0, 0]);
        *available = available.wrapping_add(1);
        write(place + AVAILABLE + 2, &available.to_le_bytes());
    }

    fn handle(&self, queue: u8) -> Result<(), Over> {
        turns(|| self.device.handle(queue.into()).map_err(|_fault| Over))
    }

    fn ready(&self) -> Result<(), Over> {
        let _wanted = self.device.wants();
        turns(|| self.device.ready().map_err(|_fault| Over))
    }

    fn save(&mut self, make: &impl Fn() -> D) -> Result<(), Over> {
        let save = |device: &Mmio<D>| {
            let mut writer = Writer::default();
            device.save_into(&mut writer, 0).expect("it is small");
            writer.finish()
        };
        let saved = save(&self.device);
        let mut sections = Sections::read(&saved).expect("it was just written");
        let line = Arc::new(Line);
        let restored = Mmio::restore_from(&mut sections, 0, make(), MEMORY.clone(), line);
        // The guest broke its rings meanwhile, which ends it either way.
        let restored = restored.map_err(|_broken| Over)?;
        sections.finish().expect("each section is somebody's");
        assert_eq!(save(&restored), saved);
        self.device = restored;
        for queue in self.device.resume().map_err(|_fault| Over)? {
            self.handle(u8::try_from(queue).unwrap_or(u8::MAX))?;
        }
        Ok(())
    }
}

/// Gives a device turns until it is done, which it is some time.
fn turns(mut turn: impl FnMut() -> Result<bool, Over>) -> Result<(), Over> {
    for _ in 0..TURNS_MAX {
        if !turn()? {
            return Ok(());
        }
    }
    unreachable!("the device is never done");
}

fn over(effect: Effect) -> Result<(), Over> {
    match effect {
        Effect::Fault(_the_guest_ends) => Err(Over),
        Effect::Reset | Effect::PowerOff => unreachable!("a transport ends no guest"),
        _ => Ok(()),
    }
}
