//! The guest's first serial port: output only, into a ring that is read from outside.
//!
//! A guest may write as fast as it can. The ring keeps the last of it, and what comes faster than
//! [`OUTPUT_BYTES_PER_S`] is dropped and counted: writing must cost the host no more than the
//! guest.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};

use super::rate::Bucket;
use super::{Device, Effect, Interrupt};
use crate::clock::Clock;
use crate::snapshot::Saved;
use crate::snapshot::format::{Fields, FormatError};

/// How many ports it has.
pub const PORTS: u64 = 8;

/// How much of the output is kept: the end of it.
pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// What a guest may write without a gap in what is kept.
pub const OUTPUT_BYTES_PER_S: u64 = 1024 * 1024;

/// What it may write at once after a pause.
const OUTPUT_BURST_BYTES: u64 = 256 * 1024;

/// The most bytes in a UART's receive buffer, which only a guest that speaks to itself fills.
const FIFO_BYTES: usize = 64;

/// The last bytes that were written.
#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Ring {
    fn push(&mut self, byte: u8) {
        if self.bytes.len() == OUTPUT_BYTES_MAX {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
    }
}

/// What has come out of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The last bytes.
    pub bytes: Vec<u8>,
    /// How many are missing in between, since they came too fast.
    pub dropped: u64,
}

/// What is saved of a port. Its output is the host's and not the guest's, and is not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The eight registers that the guest has set, and the divisor.
    pub registers: [u8; 9],
    /// Bytes that the guest has sent to itself.
    pub input: Vec<u8>,
}

impl Saved for State {
    const VERSION: u16 = 1;

    fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.registers);
        let count = u32::try_from(self.input.len()).unwrap_or(u32::MAX);
        into.extend(count.to_le_bytes());
        into.extend(&self.input);
    }

    fn get(from: &mut Fields<'_>) -> Result<Self, FormatError> {
        let registers = from.array()?;
        let most = u32::try_from(FIFO_BYTES).unwrap_or(0);
        let count = from.count("bytes in a receive buffer", most)?;
        let input = from.take(usize::try_from(count).unwrap_or(usize::MAX))?;
        Ok(Self {
            registers,
            input: input.to_vec(),
        })
    }
}

/// A saved port that none can have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes in a receive buffer that holds {FIFO_BYTES}")]
pub struct BadState {
    /// How many.
    pub bytes: usize,
}

/// The port.
pub struct Serial {
    inner: Mutex<Inner>,
}

struct Inner {
    uart: Uart<Line, NoEvents, Sink>,
    rate: Bucket,
    clock: Box<dyn Clock + Send>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the output: it is a tenant's.
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// A port as it is when a machine starts.
    #[must_use]
    pub fn new(line: Arc<dyn Interrupt>, clock: Box<dyn Clock + Send>) -> Self {
        let uart = Uart::new(Line(line), Sink::default());
        Self::around(uart, clock)
    }

    /// A port as it was saved, with nothing come out of it yet.
    pub fn restore(
        state: &State,
        line: Arc<dyn Interrupt>,
        clock: Box<dyn Clock + Send>,
    ) -> Result<Self, BadState> {
        let bytes = state.input.len();
        let restored = Uart::from_state(&state.to_uart(), Line(line), NoEvents, Sink::default());
        // Its line cannot fail: the buffer is all that can be wrong.
        let uart = restored.map_err(|_error| BadState { bytes })?;
        Ok(Self::around(uart, clock))
    }

    fn around(uart: Uart<Line, NoEvents, Sink>, clock: Box<dyn Clock + Send>) -> Self {
        let rate = Bucket::new(OUTPUT_BYTES_PER_S, OUTPUT_BURST_BYTES, clock.now());
        Self {
            inner: Mutex::new(Inner { uart, rate, clock }),
        }
    }

    /// What is saved.
    #[must_use]
    pub fn save(&self) -> State {
        State::of(&self.lock().uart.state())
    }

    /// What has come out.
    #[must_use]
    pub fn output(&self) -> Output {
        let inner = self.lock();
        let ring = &inner.uart.writer().ring;
        Output {
            bytes: ring.bytes.iter().copied().collect(),
            dropped: ring.dropped,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing is left half done by a panic: each register is set at once.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.lock().uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let (Ok(offset), [byte]) = (u8::try_from(offset), data) else {
            return Effect::Nothing;
        };
        let inner = &mut *self.lock();
        let now = inner.clock.now();
        let sink = inner.uart.writer_mut();
        sink.open = inner.rate.take(1, now).is_ok();
        match inner.uart.write(offset, *byte) {
            // A full receive buffer loses bytes, as it does on a real port.
            Ok(()) | Err(vm_superio::serial::Error::FullFifo) => Effect::Nothing,
            Err(vm_superio::serial::Error::Trigger(never)) => match never {},
            // The sink takes everything.
            Err(vm_superio::serial::Error::IOError(_)) => Effect::Nothing,
        }
    }
}

impl State {
    fn of(uart: &SerialState) -> Self {
        Self {
            registers: [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            input: uart.in_buffer.clone(),
        }
    }

    fn to_uart(&self) -> SerialState {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = self.registers;
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: self.input.clone(),
        }
    }
}

/// The port's interrupt as the UART wants it.
#[derive(Debug)]
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

/// Where the UART writes to.
#[derive(Debug, Default)]
struct Sink {
    ring: Ring,
    /// Whether the next byte is kept.
    open: bool,
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if self.open {
                self.ring.push(*byte);
            } else {
                self.ring.dropped += 1;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{Device as _, OUTPUT_BURST_BYTES, OUTPUT_BYTES_MAX, OUTPUT_BYTES_PER_S, Serial};
    use crate::clock::tests::Hand;
    use crate::device::Interrupt;
    use crate::snapshot::tests::is_pinned;

    #[derive(Debug, Default)]
    struct Count(AtomicU64);

    impl Interrupt for Count {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn serial() -> (Serial, Arc<Count>, Hand) {
        let (line, hand) = (Arc::new(Count::default()), Hand::default());
        let serial = Serial::new(line.clone(), Box::new(hand.clone()));
        (serial, line, hand)
    }

    fn say(serial: &Serial, bytes: &[u8]) {
        for byte in bytes {
            let _effect = serial.write(0, &[*byte]);
        }
    }

    fn register(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn what_is_written_comes_out() {
        let (serial, ..) = serial();
        say(&serial, b"hello");
        assert_eq!(serial.output().bytes, b"hello");
        assert_eq!(register(&serial, 5) & 0x60, 0x60, "there is always room");
    }

    #[test]
    fn the_last_bytes_are_kept_and_a_flood_is_counted() {
        let (serial, _line, hand) = serial();
        say(&serial, &[b'a'; OUTPUT_BYTES_MAX]);
        say(&serial, b"end");
        let output = serial.output();
        assert_eq!(output.bytes.len(), OUTPUT_BYTES_MAX);
        assert!(output.bytes.ends_with(b"aend"));
        assert_eq!(output.dropped, 0);
        let room = usize::try_from(OUTPUT_BURST_BYTES).unwrap() - OUTPUT_BYTES_MAX - 3;
        say(&serial, &vec![b'b'; room + 10]);
        assert_eq!(serial.output().dropped, 10);
        hand.0
            .store(5 * 1000 / OUTPUT_BYTES_PER_S + 1, Ordering::SeqCst);
        say(&serial, b"later");
        assert!(serial.output().bytes.ends_with(b"blater"));
    }

    #[test]
    fn a_driver_that_wants_interrupts_gets_one_when_there_is_room() {
        let (serial, line, _hand) = serial();
        let _effect = serial.write(1, &[2]);
        assert_eq!(line.0.load(Ordering::SeqCst), 1);
        assert_eq!(register(&serial, 2) & 0xf, 2);
        say(&serial, b"x");
        assert_eq!(line.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_restored_port_has_the_registers_and_none_of_the_output() {
        let (serial, line, hand) = serial();
        let _effect = serial.write(7, &[0x5a]);
        // Loopback: what is sent is received.
        let _effect = serial.write(4, &[0x10]);
        say(&serial, b"self");
        let state = serial.save();
        let again = Serial::restore(&state, line.clone(), Box::new(hand.clone())).unwrap();
        assert_eq!(again.save(), state);
        assert_eq!(register(&again, 7), 0x5a);
        assert_eq!(register(&again, 0), b's');
        assert!(again.output().bytes.is_empty());
        let mut bytes = state.registers.to_vec();
        bytes.extend(b"\x04\0\0\0self");
        is_pinned(&state, 1, &bytes);
        let mut wrong = state;
        wrong.input = vec![0; 65];
        assert!(Serial::restore(&wrong, line, Box::new(hand)).is_err());
    }

    #[test]
    fn wide_accesses_are_none_of_a_uarts() {
        let (serial, ..) = serial();
        let _effect = serial.write(0, b"ab");
        assert!(serial.output().bytes.is_empty());
        let mut data = [0; 2];
        serial.read(5, &mut data);
        assert_eq!(data, [0xff; 2]);
    }
}
