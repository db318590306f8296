//! The agent's port by any driver, and a host that comes, goes and takes what it likes: no panic,
//! and the device comes to an end.
#![no_main]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use libfuzzer_sys::fuzz_target;
use spore_fuzz::{Act, Hand, Request, file, run};
use spore_vmm::device::virtio::console::{Console, Door, Peer};

/// What a host sends at most before the guest reads.
const SENT_MAX: usize = 16 * 1024;

/// Nobody waits for it: the target gives the turns.
static DESCRIPTOR: LazyLock<Arc<OwnedFd>> = LazyLock::new(|| Arc::new(file(0)));

#[derive(Debug, Default)]
struct State {
    /// Somebody waits at the door, or the kernel refuses to let them in.
    waits: bool,
    refuses: bool,
    /// What was sent and not read, how much is taken, and whether the host is gone.
    sent: VecDeque<u8>,
    room: usize,
    gone: bool,
}

#[derive(Clone, Debug, Default)]
struct Host(Arc<Mutex<State>>);

impl Host {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let (what, rest) = bytes.split_first().unwrap_or((&0, &[]));
        state.refuses = what & 1 != 0;
        state.waits |= what & 2 != 0;
        state.gone |= what & 4 != 0;
        state.room = usize::from(what >> 4) * 100;
        let more = SENT_MAX.saturating_sub(state.sent.len());
        state.sent.extend(rest.iter().take(more));
    }
}

impl Door for Host {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &DESCRIPTOR
    }

    fn accept(&mut self) -> io::Result<Option<Box<dyn Peer>>> {
        let mut state = self.lock();
        if state.refuses {
            return Err(io::Error::from_raw_os_error(24));
        }
        if !std::mem::take(&mut state.waits) {
            return Ok(None);
        }
        state.gone = false;
        Ok(Some(Box::new(self.clone())))
    }
}

impl Peer for Host {
    fn descriptor(&self) -> &Arc<OwnedFd> {
        &DESCRIPTOR
    }

    fn close(&mut self) {
        self.lock().gone = true;
    }
}

impl Read for Host {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let count = state.sent.len().min(into.len());
        if count == 0 && !state.gone && !into.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in into.iter_mut().zip(state.sent.drain(..count)) {
            *to = from;
        }
        Ok(count)
    }
}

impl Write for Host {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        if state.gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = from.len().min(state.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.room -= count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Room for what comes, bytes that go, or a message of the only port's (virtio 1.2, 5.3.6.2).
fn form(request: &mut Request) {
    match request.queue {
        0 | 2 => {
            request.read.clear();
            request.written.push(256);
        }
        1 => {
            request.read.push(vec![7; 100]);
            request.written.clear();
        }
        _ => {
            const EVENTS: [u8; 4] = [0, 3, 6, 1];
            let start = request.read.concat();
            let event = EVENTS[usize::from(start.first().map_or(0, |byte| byte % 4))];
            let value = u8::from(start.get(1).is_none_or(|byte| *byte != 0));
            request.read = vec![vec![0, 0, 0, 0, event, 0, value, 0]];
            request.written.clear();
        }
    }
}

fuzz_target!(|acts: Vec<Act>| {
    let (clock, host) = (Hand::default(), Host::default());
    let make = || Console::new("fuzz", Box::new(host.clone()), Box::new(clock.clone()));
    run(acts, &clock, make, form, |bytes| host.act(bytes));
});
