//! A network device by any driver, with frames from a host: no panic, and no frame of a size that
//! no network has.
#![no_main]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use spore_fuzz::{Act, Hand, Request, run};
use spore_vmm::device::rate::{Bucket, Limit};
use spore_vmm::device::virtio::net::{
    FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES_MAX, Net, Tap,
};

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    per_s: Option<u16>,
    acts: Vec<Act>,
}

/// A buffer to receive into, or a header and a frame.
fn form(request: &mut Request) {
    if request.queue == 0 {
        request.read.clear();
        request.written = vec![1530];
    } else {
        let frame = std::mem::take(&mut request.read).concat();
        request.read = vec![vec![0xff; HEADER_BYTES_MAX], frame.repeat(8)];
        request.written.clear();
    }
}

fuzz_target!(|input: Input| {
    let clock = Hand::default();
    let (tap, wire) = UnixDatagram::pair().expect("sockets");
    wire.set_nonblocking(true).expect("a socket");
    let make = || {
        let tap = OwnedFd::from(tap.try_clone().expect("a descriptor"));
        let tap = Tap::new(tap, HEADER_BYTES_MAX).expect("a tap");
        let bucket = |rate: u16| Bucket::new(rate.into(), u64::from(rate) + 1, Duration::ZERO);
        let limit = || Limit {
            operations: input.per_s.map(bucket),
            ..Limit::default()
        };
        Net::new(
            Box::new(tap),
            [2; 6],
            limit(),
            limit(),
            Box::new(clock.clone()),
        )
    };
    let host = |bytes: &[u8]| {
        // Full, or none: it comes another time.
        let _full = wire.send(bytes);
        let mut frame = [0; 4096];
        while let Ok(count) = wire.recv(&mut frame) {
            let (header, _) = frame.split_at(HEADER_BYTES_MAX);
            assert_eq!(
                header, [0; HEADER_BYTES_MAX],
                "it is ours and not the guest's"
            );
            let bytes = count.checked_sub(HEADER_BYTES_MAX).expect("a header");
            assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes));
        }
    };
    run(input.acts, &clock, make, form, host);
});
