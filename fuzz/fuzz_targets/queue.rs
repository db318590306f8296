//! Rings that a guest wrote as it likes: every chain that is given is inside of the guest's memory,
//! and the reader comes to an end.
#![no_main]

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use spore_vmm::device::virtio::queue::{Chain, QUEUE_SIZE_MAX, Queue, QueueState};
use spore_vmm::memory::{Gpa, GuestMemory, Region, Sharing, Space};

const MEMORY_BYTES: u64 = 0x1_0000;

#[derive(Arbitrary, Debug)]
struct Driver {
    size: u16,
    places: [u16; 3],
    next_available: u16,
    next_used: u16,
    /// Where and what it writes before the queue is made, and between any two turns.
    writes: Vec<(u16, Vec<u8>)>,
    turns: Vec<Option<(u16, Vec<u8>)>>,
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

fn write(at: u16, bytes: &[u8]) {
    // Beyond the memory a driver cannot write either.
    let _beyond = MEMORY.write(Gpa(at.into()), bytes);
}

fuzz_target!(|driver: Driver| {
    MEMORY
        .write(Gpa(0), &[0; MEMORY_BYTES as usize])
        .expect("all of it");
    for (at, bytes) in &driver.writes {
        write(*at, bytes);
    }
    let [descriptors, available, used] = driver.places.map(u64::from);
    let state = QueueState {
        size: driver.size,
        ready: true,
        descriptors,
        available,
        used,
        next_available: driver.next_available,
        next_used: driver.next_used,
    };
    let Ok(mut queue) = Queue::new(&MEMORY, &state, QUEUE_SIZE_MAX) else {
        return;
    };
    let mut chain = Chain::default();
    for turn in &driver.turns {
        if let Some((at, bytes)) = turn {
            write(*at, bytes);
        }
        match queue.pop(&MEMORY, &mut chain) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(_the_guest_ends) => return,
        }
        assert!(queue.in_flight() <= driver.size);
        for buffer in chain.readable().iter().chain(chain.writable()) {
            let inside = MEMORY.check(buffer.at, buffer.bytes.into());
            assert!(inside.is_ok(), "{buffer:?}");
        }
        if queue.push(&MEMORY, chain.head(), 0).is_err() || queue.wants_interrupt(&MEMORY).is_err()
        {
            return;
        }
    }
});
