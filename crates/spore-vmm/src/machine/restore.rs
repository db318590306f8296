//! From a saved machine to one that goes on: the path that a fork takes, top to bottom.
//!
//! ```text
//!   ahead   Bare: VM, interrupt controller, memory slots, processors, lines and bells, threads
//!   then    1. may it go on here at all
//!           2. memory, by a mapping; the guest's new generation, into it
//!           3. processors, in the order of kvm/x86_64/state.rs; then chips and clock
//!           4. devices, whose lines lead to what 3 has set
//!           5. the event that tells of the new generation; all of it to the threads, which wait
//!              to be let run
//! ```
//!
//! Memory comes before processors: KVM looks for the page of the guest's clock when the clock's MSR
//! is set, and leaves the clock off when there is none. Whatever raises a line comes after chips
//! and processors: setting them would forget it. Nothing of the guest runs before the end of 5.

use std::os::fd::BorrowedFd;

use spore_wire::launch::Incarnation;

use super::acpi::GENERATION;
use super::attend::Begin;
use super::bare::Bare;
use super::board::{Board, BoardError};
use super::saved::SavedMachine;
use super::{Machine, StartError};
use crate::clock::Monotonic;
use crate::device::power::Event;
use crate::kvm::x86_64::state::{VcpuState, reading};
use crate::kvm::x86_64::{cpuid, features, tsc};
use crate::memory::Sharing;

impl Bare {
    /// A machine that goes on where another was saved, paused. `file` is its memory as it was then,
    /// and stays as it is when it is [`Sharing::Private`]; `plug` puts the devices into the slots
    /// that they were in. `incarnation` was never given to another guest: it is how this one knows
    /// that it is a copy.
    pub fn restore(
        self,
        saved: SavedMachine<'_>,
        file: BorrowedFd<'_>,
        sharing: Sharing,
        incarnation: Incarnation,
        plug: impl FnOnce(&mut Board<'_>) -> Result<(), BoardError>,
    ) -> Result<Machine, StartError> {
        self.may_take(&saved)?;
        let memory = self.space.fill(file, sharing, &self.layout.regions())?;
        memory.write(GENERATION, &incarnation.bytes())?;

        let shift = align_tsc(&self, &saved)?;
        for (vcpu, state) in self.processors().zip(&saved.vcpus) {
            state.restore(vcpu, shift)?;
        }
        saved.vm.restore(&self.vm)?;
        for vcpu in self.processors() {
            vcpu.tell_paused()?;
        }

        let (wired, clock) = (self.wires.or(&self.vm), Box::new(Monotonic));
        let mut board = Board::restored(&wired, &memory, clock, saved.devices)?;
        plug(&mut board)?;
        let (buses, plugged, panel) = board.finish()?;

        panel.tell(Event::Generation);
        let msrs = saved
            .vcpus
            .first()
            .map_or_else(Vec::new, VcpuState::indices);
        let parts = (buses, plugged, panel);
        Machine::start(self, memory, msrs, parts, Begin::Restored)
    }

    /// Whether the guest can go on in this machine and on this host.
    fn may_take(&self, saved: &SavedMachine<'_>) -> Result<(), StartError> {
        if self.layout != saved.layout {
            return Err(StartError::Size {
                found: self.layout.clone(),
                saved: saved.layout.clone(),
            });
        }
        for ((place, _vcpu), state) in self.places().zip(&saved.vcpus) {
            let here = cpuid::guest(self.host.supported.as_slice(), place);
            features::check(&state.cpuid, &here)?;
        }
        Ok(())
    }
}

/// Gives all processors the guest's TSC rate; says by how much the offsets of their TSCs are moved,
/// for the first to read on from where it was saved and the others to stay as they were to it.
fn align_tsc(bare: &Bare, saved: &SavedMachine<'_>) -> Result<u64, StartError> {
    for vcpu in bare.processors() {
        if let Some(khz) = tsc::rate(saved.tsc_khz, vcpu.tsc_khz()?, bare.host.can_scale)? {
            vcpu.set_tsc_khz(khz)?;
        }
    }
    let (Some(vcpu), Some(state)) = (bare.processors().next(), saved.vcpus.first()) else {
        return Ok(0);
    };
    Ok(reading(vcpu)?.shift_to(state.reading()))
}
