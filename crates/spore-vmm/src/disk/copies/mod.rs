//! Copies of a scratch disk, one at a time, made by a thread while the guest goes on. Called by the
//! control socket, which is never waited for and never waits.
//!
//! ```text
//!            begin            thread                thread
//!   None ──────────▶ Waits ──────────▶ Runs ──────────────────▶ Over
//!     ▲                │                 │  resume, if it is of     │
//!     └────────────────┴──── cancel ─────┴───── what is written ────┘
//! ```
//!
//! A newer copy takes the place of the one that is there, whichever state that is in. What is
//! `Runs` when the thread comes back with it is what is told; of one that was taken away meanwhile
//! nothing is heard any more.
//!
//! The thread also merges the disk's layers, between copies and never beside one, as
//! [`Scratch::merge`] needs it. It starts before the guest, so that a VMM can be forbidden to start
//! others later.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::disk::copy::{CopyError, copy};
use crate::disk::overlay::LayerError;
use crate::disk::overlay::layer::Layer;
use crate::disk::scratch::{Below, LayerFile, Scratch, Source, SwitchError, UpTo};
use crate::jail::seccomp::{self, Cell, FilterError};
use crate::kvm::bell::Bell;

/// The lowest priority there is. The kernel takes that of its reads and writes from it
/// (ioprio_set(2) of Linux, "I/O priority").
const NICE: i32 = 19;

/// Why a copy does not begin. The one before goes on.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// What it is to be written to.
    #[error("the copy's file cannot be used")]
    To(#[source] LayerError),
    /// What the guest wrote is not on the disk.
    #[error("the disk cannot be flushed for its copy")]
    Flush(#[source] io::Error),
}

/// How far a copy is.
#[derive(Clone, Debug)]
pub enum Progress {
    /// There is none.
    None,
    /// It is not whole yet.
    UnderWay,
    /// It is whole, or never will be.
    Over(Result<(), Arc<CopyError>>),
}

/// A copy that is to be made.
#[derive(Debug)]
struct Job {
    source: Source,
    up_to: UpTo,
    to: Layer,
    /// Until somebody does not want it any more.
    wanted: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Copy {
    None,
    Waits(Box<Job>),
    Runs {
        up_to: UpTo,
        wanted: Arc<AtomicBool>,
    },
    Over(Result<(), Arc<CopyError>>),
}

impl Copy {
    const fn is_of_written(&self) -> bool {
        match self {
            Self::Waits(job) => matches!(job.up_to, UpTo::Written),
            Self::Runs { up_to, .. } => matches!(up_to, UpTo::Written),
            Self::None | Self::Over(_) => false,
        }
    }
}

#[derive(Debug)]
struct State {
    copy: Copy,
    /// The disk may have layers to be merged.
    is_deep: bool,
}

impl State {
    /// Puts something else in the place of the copy, which ends.
    fn replace(&mut self, copy: Copy) {
        if let Copy::Runs { wanted, .. } = &self.copy {
            wanted.store(false, Ordering::SeqCst);
        }
        self.copy = copy;
    }
}

#[derive(Debug)]
struct Shared {
    scratch: Scratch,
    state: Mutex<State>,
    /// Told when the thread has something to do.
    work: Condvar,
    /// Set when it has nothing to do any more.
    quits: AtomicBool,
    /// Rung when a copy is over.
    over: Arc<Bell>,
}

/// What the thread does next.
enum Work {
    Copy(Box<Job>),
    Merge,
    Quit,
}

/// The thread, without a disk so far. It ends when this is dropped.
#[derive(Debug)]
pub struct Copier {
    disk: SyncSender<Arc<Shared>>,
    confined: Receiver<Result<(), FilterError>>,
}

impl Copier {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let (disk, comes) = sync_channel::<Arc<Shared>>(1);
        let (tells, confined) = sync_channel(1);
        let thread = thread::Builder::new().name("copy".into());
        let run = move || {
            // A copy at any other priority is as good, only not as polite.
            let _as_it_was = rustix::process::setpriority_process(None, NICE);
            let entered = seccomp::enter(Cell::Disks);
            let is_confined = entered.is_ok();
            // Whoever does not want to know has no disk for it either.
            let is_heard = tells.send(entered).is_ok();
            if let (true, true, Ok(shared)) = (is_confined, is_heard, comes.recv()) {
                shared.run();
            }
        };
        // It has what it works with for itself, so nobody waits for its end.
        drop(thread.spawn(run)?);
        Ok(Self { disk, confined })
    }
}

/// The copies. The thread ends soon after this is dropped.
#[derive(Debug)]
pub struct Copies {
    shared: Arc<Shared>,
    confined: Receiver<Result<(), FilterError>>,
}

impl Copies {
    /// None of a disk, so far. The bell is rung whenever one is over.
    #[must_use]
    pub fn new(copier: Copier, scratch: Scratch, over: Arc<Bell>) -> Self {
        let shared = Arc::new(Shared {
            scratch,
            state: Mutex::new(State {
                copy: Copy::None,
                is_deep: false,
            }),
            work: Condvar::new(),
            quits: AtomicBool::new(false),
            over,
        });
        let Copier { disk, confined } = copier;
        // A thread that is gone has said why.
        let _gone = disk.send(Arc::clone(&shared));
        Self { shared, confined }
    }

    /// Waits until the thread is in its cell; called once. After an error it does nothing.
    pub fn ready(&self) -> Result<(), FilterError> {
        // What has told it once has nothing more to tell.
        self.confined.recv().unwrap_or(Ok(()))
    }

    /// Begins a copy of the disk as it is now, in the place of the one that is there.
    pub fn begin(&self, to: &LayerFile, below: Below, up_to: UpTo) -> Result<(), BeginError> {
        let scratch = &self.shared.scratch;
        let to = to.create(scratch.bytes()).map_err(BeginError::To)?;
        self.begin_in(to, below, up_to)
    }

    fn begin_in(&self, to: Layer, below: Below, up_to: UpTo) -> Result<(), BeginError> {
        let scratch = &self.shared.scratch;
        // Under the lock, so that no merge begins between the source's instant and the copy's turn.
        let mut state = self.shared.lock();
        let source = scratch.source(below, up_to).map_err(BeginError::Flush)?;
        state.replace(Copy::Waits(Box::new(Job {
            source,
            up_to,
            to,
            wanted: Arc::new(AtomicBool::new(true)),
        })));
        self.shared.work.notify_all();
        Ok(())
    }

    /// Ends the copy that is there, and forgets it.
    pub fn cancel(&self) {
        self.shared.lock().replace(Copy::None);
    }

    /// Ends a copy of what the guest writes, since the guest is about to write again.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        if state.copy.is_of_written() {
            state.replace(Copy::Over(Err(Arc::new(CopyError::Resumed))));
            self.shared.over.ring();
        }
    }

    /// Lets the disk go on with a new layer ([`Scratch::switch`]), and others be merged.
    pub fn switch(&self, own: LayerFile) -> Result<(), SwitchError> {
        let switched = self.shared.scratch.switch(own);
        // After an error too: it may be that there are too many layers.
        self.shared.lock().is_deep = true;
        self.shared.work.notify_all();
        switched
    }

    /// How far the copy is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        match &self.shared.lock().copy {
            Copy::None => Progress::None,
            Copy::Waits(_) | Copy::Runs { .. } => Progress::UnderWay,
            Copy::Over(result) => Progress::Over(result.clone()),
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        self.shared.quits.store(true, Ordering::SeqCst);
        state.replace(Copy::None);
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is whole at once.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self) {
        loop {
            match self.next() {
                Work::Copy(job) => self.copy(*job),
                Work::Merge => self.merge(),
                Work::Quit => return,
            }
        }
    }

    fn next(&self) -> Work {
        let mut state = self.lock();
        loop {
            if self.quits.load(Ordering::SeqCst) {
                return Work::Quit;
            }
            match std::mem::replace(&mut state.copy, Copy::None) {
                Copy::Waits(job) => {
                    let (up_to, wanted) = (job.up_to, Arc::clone(&job.wanted));
                    state.copy = Copy::Runs { up_to, wanted };
                    return Work::Copy(job);
                }
                other => state.copy = other,
            }
            if std::mem::take(&mut state.is_deep) && self.scratch.is_deep() {
                return Work::Merge;
            }
            let waited = self.work.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn copy(&self, mut job: Job) {
        let its = Arc::clone(&job.wanted);
        let copied = copy(&job.source, &mut job.to, || its.load(Ordering::SeqCst));
        // Whoever is told that it is over finds nobody at its file.
        drop(job);
        let mut state = self.lock();
        if matches!(&state.copy, Copy::Runs { wanted, .. } if Arc::ptr_eq(wanted, &its)) {
            state.copy = Copy::Over(copied.map_err(Arc::new));
            self.over.ring();
        }
    }

    fn merge(&self) {
        let is_wanted = || !self.quits.load(Ordering::SeqCst);
        // The reason of a failure is told by the switch for which there are too many layers, and
        // each switch is a reason to try again.
        let merged = self.scratch.merge(is_wanted);
        if merged.is_ok() {
            self.lock().is_deep = true;
        }
    }
}
