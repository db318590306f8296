//! A block device over a scratch disk or a file, by any driver: no panic, no end without reason,
//! and nothing written to what is read-only or beyond its end.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use spore_fuzz::{Act, Hand, Request, file, run};
use spore_vmm::device::rate::{Bucket, Limit};
use spore_vmm::device::virtio::blk::Blk;
use spore_vmm::disk::scratch::{LayerFile, Scratch};
use spore_vmm::disk::stack::Base;
use spore_vmm::disk::zeros::Zeros;
use spore_vmm::disk::{Access, Disk, Raw};
use spore_wire::launch::layer_bytes;

const DISK_BYTES: u64 = 1 << 18;

#[derive(arbitrary::Arbitrary, Debug)]
enum Kind {
    Scratch { encrypted: bool },
    File { read_only: bool },
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    kind: Kind,
    per_s: Option<u16>,
    acts: Vec<Act>,
}

/// A header, whose kind is mostly one that there is, and a place about the disk; data or room for
/// it; a status.
fn form(request: &mut Request) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 0, 1, 11, 13];
    let rest = std::mem::take(&mut request.read).concat();
    let (start, data) = rest.split_at_checked(3).unwrap_or((&[1, 0, 0], &[]));
    let kind = KINDS[usize::from(start[0] % 8)];
    let sector = u64::from(start[1]) << 2 | u64::from(start[2] & 3);
    let sectors = u16::from(start[2] >> 4) + 1;
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    request.read.push(header);
    request.written.clear();
    if kind == 1 {
        let byte = data.first().copied().unwrap_or(7);
        request.read.push(vec![byte; usize::from(sectors) * 512]);
    } else {
        // An odd length now and then.
        request
            .written
            .push(sectors * 512 + u16::from(start[2] & 12 == 12));
    }
    request.written.push(1);
}

fuzz_target!(|input: Input| {
    let clock = Hand::default();
    let bytes = file(DISK_BYTES);
    let raw = |access| Raw::new(bytes.try_clone().expect("a descriptor"), access).expect("a disk");
    let layer = || {
        let own = Raw::new(file(layer_bytes(DISK_BYTES)), Access::ReadWrite).expect("a layer");
        let key = [7; 64];
        let encrypted = matches!(input.kind, Kind::Scratch { encrypted: true });
        LayerFile::new(own, encrypted.then_some(&key))
    };
    let scratch = matches!(input.kind, Kind::Scratch { .. }).then(|| {
        let base = Base::Zeros(Zeros(DISK_BYTES));
        Scratch::new(base, Vec::new(), layer()).expect("a disk")
    });
    let read_only = matches!(input.kind, Kind::File { read_only: true });
    let make = || {
        let disk: Box<dyn Disk> = match &scratch {
            Some(scratch) => Box::new(scratch.clone()),
            None if read_only => Box::new(raw(Access::ReadOnly)),
            None => Box::new(raw(Access::ReadWrite)),
        };
        let bucket = |rate: u16| Bucket::new(rate.into(), u64::from(rate) + 1, Duration::ZERO);
        let limit = Limit {
            operations: input.per_s.map(bucket),
            ..Limit::default()
        };
        Blk::new(disk, "disk", limit, Box::new(clock.clone()))
    };
    // A host that has no room, or has taken it back: the file is shortened, and is long again.
    let host = |bytes_of: &[u8]| {
        let to = bytes_of
            .first()
            .map_or(DISK_BYTES, |part| u64::from(*part) << 12);
        rustix::fs::ftruncate(&bytes, to.min(DISK_BYTES)).expect("its length");
    };
    run(input.acts, &clock, make, form, host);
    let end = rustix::fs::fstat(&bytes).expect("its length").st_size;
    assert!(end.unsigned_abs() <= DISK_BYTES);
    if read_only {
        let mut content = vec![0; DISK_BYTES as usize];
        rustix::io::pread(&bytes, &mut content, 0).expect("it is read");
        assert!(content.iter().all(|byte| *byte == 0));
    }
});
