//! How long a checkpoint makes a guest stand still, beside a pause for nothing, with much and with
//! little memory that the guest has not changed. What happens in the pause is what a node does in
//! it: the machine is saved, its disk gets a new layer, and the pages that are the VMM's own are
//! found and read from outside.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_wire::vmm::ToVmm;

use crate::Report;
use crate::guest::{Given, Source, file, layer, own_layer};
use crate::node::{Vmm, Zygote, rest};

/// Sizes of guests.
const MIB: [u32; 2] = [128, 1024];

const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 8;

/// Bits of an entry of pagemap (proc(5)): in memory, in swap, a page of a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Between two pauses: layers are merged behind a checkpoint.
const REST: Duration = Duration::from_millis(30);

/// A fork that goes on, and what a node has open of it before the pause.
#[derive(Debug)]
struct Running {
    vmm: Vmm,
    _given: Given,
    pagemap: File,
    memory: File,
    start: u64,
    entries: Vec<u8>,
    room: Vec<u8>,
}

impl Running {
    fn start(zygote: &mut Zygote, memory_mib: u32) -> Result<Self> {
        let source = Source::small(zygote, memory_mib, false)?;
        let given = source.fork()?;
        let mut vmm = zygote.spawn()?;
        vmm.launch(&given)?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", vmm.pid))?;
        let line = maps
            .lines()
            .find(|line| line.contains("memfd:guest-memory"));
        let start = line.and_then(|line| line.split_once('-'));
        let (start, _rest) = start.context("the VMM maps no guest")?;
        let pages = usize::try_from((u64::from(memory_mib) << 20) / PAGE_BYTES)?;
        Ok(Self {
            pagemap: File::open(format!("/proc/{}/pagemap", vmm.pid))?,
            memory: File::open(format!("/proc/{}/mem", vmm.pid))?,
            start: u64::from_str_radix(start, 16)?,
            entries: vec![1; pages * ENTRY_BYTES],
            room: vec![1; 4 << 20],
            vmm,
            _given: given,
        })
    }

    /// A pause for nothing.
    fn nothing(&mut self) -> Result<f64> {
        let begun = Monotonic.now();
        self.vmm.pause()?;
        self.vmm.ask(&ToVmm::Resume, &[])?;
        Ok((Monotonic.now() - begun).as_secs_f64() * 1000.0)
    }

    /// The pause of a checkpoint.
    fn checkpoint(&mut self) -> Result<f64> {
        let (state, own) = (file("state", 0)?, own_layer()?);
        let begun = Monotonic.now();
        self.vmm.pause()?;
        self.vmm.ask(&ToVmm::Save, &[state.as_fd()])?;
        self.vmm
            .ask(&ToVmm::Switch { own: layer(0) }, &[own.as_fd()])?;
        let pages = self.own_pages()?;
        self.vmm.ask(&ToVmm::Resume, &[])?;
        let paused = Monotonic.now() - begun;
        ensure!(pages > 0, "the guest has changed nothing");
        Ok(paused.as_secs_f64() * 1000.0)
    }

    /// Reads the pages that are the VMM's own; says how many there were.
    fn own_pages(&mut self) -> Result<u64> {
        let first = self.start / PAGE_BYTES;
        let at = first * ENTRY_BYTES as u64;
        self.pagemap.read_exact_at(&mut self.entries, at)?;
        let (mut pages, mut room) = (0, self.room.chunks_exact_mut(4096));
        for (page, entry) in (0..).zip(self.entries.as_chunks::<ENTRY_BYTES>().0) {
            let entry = u64::from_ne_bytes(*entry);
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                let room = room.next().context("the guest changed much")?;
                self.memory
                    .read_exact_at(room, (first + page) * PAGE_BYTES)?;
                pages += 1;
            }
        }
        Ok(pages)
    }
}

/// Both kinds of pause at both sizes, turn by turn. Each guest stands still while the other is
/// measured: it never sleeps.
pub(crate) fn run(zygote: &mut Zygote, rounds: usize, report: &mut Report) -> Result<()> {
    let mut guests = Vec::new();
    for mib in MIB {
        let guest = Running::start(zygote, mib)?;
        guests.push((mib, guest, Vec::new(), Vec::new()));
    }
    for _round in 0..rounds {
        for (_mib, guest, empty, full) in &mut guests {
            guest.vmm.ask(&ToVmm::Resume, &[])?;
            rest(REST);
            empty.push(guest.nothing()?);
            rest(REST);
            full.push(guest.checkpoint()?);
            rest(REST);
            guest.vmm.pause()?;
        }
    }
    let mut medians = Vec::new();
    for (mib, guest, empty, full) in guests {
        let empty = report.row(&format!("pause for nothing at {mib} MiB, ms"), empty)?;
        let full = report.row(&format!("pause of a checkpoint at {mib} MiB, ms"), full)?;
        medians.push((empty, full));
        guest.vmm.quit(zygote)?;
    }
    if let [(empty, small), (_, large)] = *medians {
        report.at_most(
            "pause at 128 MiB, times one for nothing",
            small / empty,
            3.0,
        );
        report.at_most("pause at 1 GiB, times that at 128 MiB", large / small, 2.0);
    }
    Ok(())
}
