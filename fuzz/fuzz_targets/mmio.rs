//! A driver that reads and writes any register of a virtio transport in any order: no panic, and
//! what is saved in between is what can be gone on with.
#![no_main]

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use spore_vmm::device::virtio::mmio::Mmio;
use spore_vmm::device::virtio::rng::Rng;
use spore_vmm::device::{Device as _, Effect, Interrupt};
use spore_vmm::memory::{Gpa, GuestMemory, Region, Sharing, Space};

const MEMORY_BYTES: u64 = 0x1_0000;

#[derive(Arbitrary, Debug)]
enum Act {
    Read {
        offset: u16,
        count: u8,
    },
    Write {
        offset: u16,
        data: Vec<u8>,
    },
    /// What drivers do: a register of four bytes.
    Register {
        number: u8,
        value: u32,
    },
    Memory {
        at: u16,
        bytes: Vec<u8>,
    },
    Save,
}

#[derive(Debug)]
struct Line;

impl Interrupt for Line {
    fn raise(&self) {}
}

static MEMORY: LazyLock<GuestMemory> = LazyLock::new(|| {
    let file: OwnedFd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, MEMORY_BYTES).expect("its length");
    let region = Region {
        start: Gpa(0),
        offset: 0,
        bytes: MEMORY_BYTES,
    };
    let space = Space::reserve(MEMORY_BYTES).expect("addresses");
    let memory = space.fill(file.as_fd(), Sharing::Shared, &[region]);
    memory.expect("a mapping")
});

fn source(bytes: &mut [u8]) -> bool {
    bytes.fill(7);
    true
}

fuzz_target!(|acts: Vec<Act>| {
    MEMORY
        .write(Gpa(0), &[0; MEMORY_BYTES as usize])
        .expect("all of it");
    let mut mmio = Mmio::new(Rng::new(source), MEMORY.clone(), Arc::new(Line));
    for act in acts {
        let effect = match act {
            Act::Read { offset, count } => {
                let mut data = vec![0; usize::from(count)];
                mmio.read(u64::from(offset), &mut data);
                Effect::Nothing
            }
            Act::Write { offset, data } => mmio.write(u64::from(offset), &data),
            Act::Register { number, value } => {
                mmio.write(u64::from(number & 0x3f) * 4, &value.to_le_bytes())
            }
            Act::Memory { at, bytes } => {
                let _beyond = MEMORY.write(Gpa(at.into()), &bytes);
                Effect::Nothing
            }
            Act::Save => {
                let saved = mmio.save();
                let line = Arc::new(Line);
                match Mmio::restore(&saved, Rng::new(source), MEMORY.clone(), line) {
                    Ok(restored) => {
                        assert_eq!(restored.save(), saved);
                        mmio = restored;
                    }
                    // The guest broke its rings meanwhile, which ends it either way.
                    Err(_broken) => return,
                }
                Effect::Nothing
            }
        };
        match effect {
            Effect::Fault(_the_guest_ends) => return,
            Effect::Reset | Effect::PowerOff => unreachable!("a transport ends no guest"),
            _ => {}
        }
    }
});
