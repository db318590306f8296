//! Forks of one guest to its first output, and what they take of memory there.

use std::time::Duration;

use anyhow::Result;
use spore_vmm::clock::{Clock as _, Monotonic};
use spore_wire::vmm::ToVmm;

use crate::Report;
use crate::bare::Floor;
use crate::guest::Source;
use crate::memory;
use crate::node::{Vmm, Zygote, rest};

/// A guest as small as one may be: the size of its memory costs nothing (it is mapped).
const MEMORY_MIB: u32 = 64;

/// Rounds that are not counted: what is used first is brought in.
const WARM: usize = 2;

/// Of Linux.
const LINUX_MIB: u32 = 128;

/// Forks at once.
const MANY: usize = 100;

/// Between two that are measured: the kernel takes the last one's VM apart behind its end.
const REST: Duration = Duration::from_millis(50);

/// Times since the last look, with their names.
#[derive(Debug)]
struct Watch {
    from: Duration,
    last: Duration,
    steps: Vec<(&'static str, f64)>,
}

impl Watch {
    fn start() -> Self {
        let now = Monotonic.now();
        Self {
            from: now,
            last: now,
            steps: Vec::new(),
        }
    }

    fn over(&mut self, step: &'static str) {
        let now = Monotonic.now();
        self.steps.push((step, ms(now - self.last)));
        self.last = now;
    }

    fn all(&self) -> f64 {
        ms(self.last - self.from)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// All of one kind.
#[derive(Debug, Default)]
struct Kind {
    all: Vec<f64>,
    /// By step, in the order of the steps.
    steps: Vec<(String, Vec<f64>)>,
    private_kib: Vec<f64>,
    resident_kib: Vec<f64>,
}

impl Kind {
    fn note(&mut self, all: f64, steps: impl IntoIterator<Item = (String, f64)>) {
        self.all.push(all);
        for (step, ms) in steps {
            match self.steps.iter_mut().find(|(name, _)| *name == step) {
                Some((_, times)) => times.push(ms),
                None => self.steps.push((step, vec![ms])),
            }
        }
    }

    fn look(&mut self, pid: u32) -> Result<()> {
        let memory = memory::of(pid)?;
        self.private_kib.push(memory.private_kib);
        self.resident_kib.push(memory.own_resident_kib);
        Ok(())
    }

    /// Prints it; gives its median.
    fn tell(self, name: &str, report: &mut Report) -> Result<f64> {
        let median = report.row(&format!("{name}, ms"), self.all)?;
        for (step, times) in self.steps {
            report.row(&format!("  {name}: {step}"), times)?;
        }
        Ok(median)
    }
}

/// The floor, forks with VMMs that wait and without, turn by turn.
pub(crate) fn run(zygote: &mut Zygote, rounds: usize, report: &mut Report) -> Result<()> {
    let source = Source::small(zygote, MEMORY_MIB, true)?;
    let (mut bare, mut parked, mut fresh) = (Kind::default(), Kind::default(), Kind::default());
    let mut waiting_kib = Vec::new();
    for round in 0..WARM + rounds {
        if round == WARM {
            // What was measured so far is forgotten.
            (bare, parked, fresh) = (Kind::default(), Kind::default(), Kind::default());
            waiting_kib.clear();
        }
        floor(&source, &mut bare)?;
        let vmm = waiting(zygote)?;
        rest(REST);
        waiting_kib.push(memory::of(vmm.pid)?.own_resident_kib);
        fork(zygote, Some(vmm), &source, &mut parked)?;
        fork(zygote, None, &source, &mut fresh)?;
    }
    let private = report.row(
        "fork at its first output, private KiB",
        std::mem::take(&mut fresh.private_kib),
    )?;
    let resident = report.row(
        "its VMM without guest, resident KiB",
        std::mem::take(&mut fresh.resident_kib),
    )?;
    report.row("a VMM that waits, resident KiB", waiting_kib)?;
    report.row(
        "the floor likewise, private KiB",
        std::mem::take(&mut bare.private_kib),
    )?;
    let bare = bare.tell("floor", report)?;
    let parked = parked.tell("fork, parked", report)?;
    let fresh = fresh.tell("fork, not parked", report)?;
    report.at_most("fork with parked VMMs, times the floor", parked / bare, 1.3);
    report.at_most("fork without, times the floor", fresh / bare, 2.0);
    report.at_most(
        "private MiB of a fork at its first output",
        private / 1024.0,
        1.0,
    );
    report.at_most(
        "resident MiB of a VMM without its guest",
        resident / 1024.0,
        3.0,
    );
    Ok(())
}

fn floor(source: &Source, kind: &mut Kind) -> Result<()> {
    let mut floor = Floor::start(source)?;
    rest(REST);
    let mut watch = Watch::start();
    floor.run()?;
    watch.over("all");
    kind.look(floor.child.id())?;
    let steps = floor.end()?.into_iter();
    let steps = steps.map(|(name, us)| (name, us.as_f64().unwrap_or(f64::NAN) / 1000.0));
    kind.note(watch.all(), steps);
    rest(REST);
    Ok(())
}

/// A VMM that waits for a guest.
fn waiting(zygote: &mut Zygote) -> Result<Vmm> {
    let mut vmm = zygote.spawn()?;
    let (memory_mib, vcpus) = (MEMORY_MIB, 1);
    vmm.ask(&ToVmm::Park { memory_mib, vcpus }, &[])?;
    Ok(vmm)
}

/// A fork from the node's first word to the guest's first one, and its end.
fn fork(zygote: &mut Zygote, waits: Option<Vmm>, source: &Source, kind: &mut Kind) -> Result<()> {
    forked(zygote, waits, source, kind)?.quit(zygote)?;
    rest(REST);
    Ok(())
}

/// A fork that is at its guest's first word.
fn forked(
    zygote: &mut Zygote,
    waits: Option<Vmm>,
    source: &Source,
    kind: &mut Kind,
) -> Result<Vmm> {
    let given = source.fork()?;
    let mut watch = Watch::start();
    let mut vmm = match waits {
        Some(vmm) => vmm,
        None => {
            let vmm = zygote.spawn()?;
            watch.over("VMM in its jail");
            vmm
        }
    };
    vmm.launch(&given)?;
    watch.over("launch");
    vmm.ask(&ToVmm::Resume, &[])?;
    watch.over("resume");
    vmm.wait_end()?;
    watch.over("first output");
    kind.look(vmm.pid)?;
    let steps = watch
        .steps
        .iter()
        .map(|(step, ms)| ((*step).to_owned(), *ms));
    kind.note(watch.all(), steps);
    Ok(vmm)
}

/// A hundred forks at once, none of which was made ahead: all answer.
pub(crate) fn hundred(zygote: &mut Zygote, report: &mut Report) -> Result<()> {
    let source = Source::small(zygote, MEMORY_MIB, true)?;
    let given = (0..MANY).map(|_| source.fork());
    let given = given.collect::<Result<Vec<_>>>()?;
    let mut watch = Watch::start();
    let mut forks = Vec::new();
    for given in &given {
        let mut vmm = zygote.spawn()?;
        vmm.launch(given)?;
        vmm.ask(&ToVmm::Resume, &[])?;
        forks.push(vmm);
    }
    for vmm in &mut forks {
        vmm.wait_end()?;
    }
    watch.over("all");
    let mut private = Vec::new();
    for vmm in &forks {
        private.push(memory::of(vmm.pid)?.private_kib);
    }
    report.row("100 forks to the last first output, ms", vec![watch.all()])?;
    report.row("each of 100 forks, private KiB", private)?;
    for vmm in forks {
        vmm.quit(zygote)?;
    }
    Ok(())
}

/// Forks of Debian's kernel: what they have of their own at their first output. Another one is
/// there meanwhile: what they read of their VMMs' program would otherwise count as one's own.
pub(crate) fn linux(zygote: &mut Zygote, rounds: usize, report: &mut Report) -> Result<()> {
    let Some(source) = Source::linux(zygote, LINUX_MIB)? else {
        return Ok(());
    };
    let other = forked(zygote, None, &source, &mut Kind::default())?;
    let mut forks = Kind::default();
    for _round in 0..rounds {
        fork(zygote, None, &source, &mut forks)?;
    }
    other.quit(zygote)?;
    let private = report.row(
        "fork of Linux at its first output, private KiB",
        forks.private_kib,
    )?;
    report.row("its VMM without guest, resident KiB", forks.resident_kib)?;
    report.row("fork of Linux, not parked, ms", forks.all)?;
    report.at_most(
        "private MiB of a fork of Linux there",
        private / 1024.0,
        1.0,
    );
    Ok(())
}
