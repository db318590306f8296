//! Saves a machine that stands still: all of it but its memory, which is in its file, and its
//! disks, which are in theirs. It is as it was, and goes on when it is let run.

use std::io;
use std::sync::PoisonError;

use super::Machine;
use super::layout::Slot;
use super::saved::{Header, begin};
use crate::kvm::KvmError;
use crate::kvm::x86_64::state::{VcpuState, VmState};
use crate::snapshot::format::FormatError;
use crate::snapshot::kind::Kind;

/// Why a machine was not saved. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs, or has ended.
    #[error("a machine is saved while it is paused, and this one is not")]
    Moves,
    /// A disk's content did not become durable.
    #[error("the disk in slot {slot} cannot be flushed")]
    Flush {
        /// Where it is.
        slot: Slot,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM did not give a part of it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// It is larger than a saved machine may be.
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl Machine {
    /// What it is, but for its memory and its disks. Legal while it is paused, as often as one
    /// likes; disks are flushed. With the memory's file as it is now, it can go on elsewhere.
    pub fn save(&self) -> Result<Vec<u8>, SaveError> {
        // A thread that stands still has finished what it began, so no device has a request in
        // flight and no processor an answer on its way.
        let saved = self.workers.while_still(|| self.write());
        saved.unwrap_or(Err(SaveError::Moves))
    }

    fn write(&self) -> Result<Vec<u8>, SaveError> {
        for (slot, device) in &self.devices {
            let settled = device.settle();
            settled.map_err(|source| SaveError::Flush {
                slot: *slot,
                source,
            })?;
        }
        // With it the clock, before the TSCs: kvm/x86_64/state.rs says why.
        let vm = VmState::save(&self.vm)?;
        let mut vcpus = Vec::with_capacity(self.cores.len());
        let mut tsc_khz = 0;
        for core in &self.cores {
            let core = core.lock().unwrap_or_else(PoisonError::into_inner);
            tsc_khz = core.vcpu().tsc_khz()?;
            vcpus.push(VcpuState::save(core.vcpu(), &self.msrs)?);
        }
        let header = Header {
            memory_mib: self.layout.memory_mib(),
            vcpus: self.layout.vcpus(),
            tsc_khz,
            slots: self.devices.iter().map(|(slot, _)| *slot).collect(),
        };
        let mut writer = begin(&header, &vm, &vcpus)?;
        let (serial, power) = self.panel.save();
        writer.put(Kind::Serial.only(), &serial)?;
        writer.put(Kind::Power.only(), &power)?;
        for (slot, device) in &self.devices {
            device.save_into(&mut writer, slot.number())?;
        }
        Ok(writer.finish())
    }
}
