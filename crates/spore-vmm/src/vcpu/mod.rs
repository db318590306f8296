//! A processor of the guest and the thread that it runs on.
//!
//! ```text
//!           ┌──────────────── an access: to its bus, and on ─────────────┐
//!   run ────┼──▶ called back: stand still if that is wanted, then on ────┴──▶ run
//!           └──▶ it cannot go on, or an access ended the machine ──▶ End
//! ```
//!
//! Before it stands still it finishes what the guest has begun: the answer to a read that came out
//! of KVM_RUN goes into the guest's registers at the next KVM_RUN only, and one that does not enter
//! the guest ([`Processor::stay_out`]) does that. What is saved of a processor is then whole.

pub mod exits;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{Bus, Effect};
use crate::end::End;
use crate::jail::seccomp::{self, Cell};
use crate::worker::{Kick, Order, Post, Seat, Workers};

/// Why a processor came back.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads from ports; what is put here is what it gets.
    PortRead(u16, &'a mut [u8]),
    /// The guest writes to ports.
    PortWrite(u16, &'a [u8]),
    /// The guest reads where there is no memory.
    Read(u64, &'a mut [u8]),
    /// The guest writes where there is no memory.
    Write(u64, &'a [u8]),
    /// It was called back, or a signal came, or there is nothing to run yet.
    Interrupted,
    /// KVM cannot go on. Which error it was is asked for.
    Internal,
    /// It cannot go on.
    Ended(End),
}

/// What runs a guest's instructions.
pub trait Processor: Send + fmt::Debug + 'static {
    /// Which one of the machine's it is.
    fn number(&self) -> u8;

    /// Runs until the guest wants something or the processor is called back.
    fn run(&mut self) -> Exit<'_>;

    /// Lets [`run`](Self::run) finish what was begun and come back as interrupted without running
    /// anything of the guest, until it is taken back.
    fn stay_out(&mut self);

    /// KVM's number, after [`Exit::Internal`].
    fn internal_error(&mut self) -> u32;
}

/// The two buses that processors reach devices by.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Places in the guest's map where there is no memory.
    pub memory: Bus,
}

/// What comes of an exit.
enum Step {
    Go,
    Back,
    End(End),
}

/// A processor and its buses. Whoever wants to look at the processor locks it while the machine is
/// paused; while it runs, the lock is its thread's.
pub type Run<P> = (Arc<Mutex<P>>, Arc<Buses>);

/// Starts the thread of a processor, which enters its cell and waits for the processor.
pub fn ahead<P: Processor>(
    workers: &Workers,
    number: u8,
    kick: impl Kick + 'static,
) -> std::io::Result<Seat<Run<P>>> {
    let first = || Ok(seccomp::enter(Cell::Vcpu)?);
    let work = |post: &Post, (processor, buses): Run<P>| work(post, &processor, &buses);
    workers.ahead(&format!("vcpu{number}"), kick, first, work)
}

fn work<P: Processor>(post: &Post, processor: &Mutex<P>, buses: &Buses) {
    // Before it is told to run, the processor is not yet what it will be.
    while post.stand() == Order::Run {
        let mut processor = processor.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = Step::Go;
        while matches!(done, Step::Go | Step::Back) && !post.is_called() {
            done = step(&mut *processor, buses);
        }
        if !matches!(done, Step::End(_)) {
            done = settle(post, &mut *processor, buses);
        }
        drop(processor);
        if let Step::End(end) = done {
            post.end(end);
        }
    }
}

/// Finishes what the guest has begun, unless the machine ends anyway.
fn settle(post: &Post, processor: &mut impl Processor, buses: &Buses) -> Step {
    processor.stay_out();
    while post.order() != Order::End {
        match step(processor, buses) {
            Step::Go => {}
            done @ (Step::Back | Step::End(_)) => return done,
        }
    }
    Step::Back
}

/// Runs once, and does what the guest wants.
fn step(processor: &mut impl Processor, buses: &Buses) -> Step {
    let number = processor.number();
    match processor.run() {
        Exit::PortRead(port, data) => {
            buses.ports.read(u64::from(port), data);
            Step::Go
        }
        Exit::PortWrite(port, data) => effect(buses.ports.write(u64::from(port), data)),
        Exit::Read(address, data) => {
            buses.memory.read(address, data);
            Step::Go
        }
        Exit::Write(address, data) => effect(buses.memory.write(address, data)),
        Exit::Interrupted => Step::Back,
        Exit::Internal => Step::End(End::Internal {
            vcpu: number,
            error: processor.internal_error(),
        }),
        Exit::Ended(end) => Step::End(end),
    }
}

/// What an access means for the machine.
fn effect(effect: Effect) -> Step {
    match effect {
        // A kick that nobody on the bus has taken is of a queue that does not exist.
        Effect::Nothing | Effect::Kick(_) => Step::Go,
        Effect::Reset => Step::End(End::Reset),
        Effect::PowerOff => Step::End(End::PowerOff),
        Effect::Fault(fault) => Step::End(End::Fault(fault)),
    }
}
