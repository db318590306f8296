//! The end of a daemon, at any instant between two things that it does.
//!
//! A process that is killed does nothing more. Here its tasks cannot all be dropped at once, so
//! everything that a daemon does to the world outside passes its fuse: once blown, nothing does,
//! and who waits there waits for ever. The fuse is blown by the plan, or after so many passes.

use core::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use spore_control::store::{
    CommitError, Entry, Range, SharedStore, Store, StoreError, Transaction, Watch,
};
use spore_node::config::{KillPoint, KillPoints};
use spore_node::vm::state::VmEffect;
use spore_wire::id::VmId;
use tokio_util::sync::CancellationToken;

use crate::trace::Trace;
use crate::watch::Watcher;

/// One daemon's.
pub struct Fuse {
    blown: CancellationToken,
    /// Passes until it blows; 0 is never.
    left: AtomicU32,
    trace: Trace,
    watcher: Watcher,
}

impl fmt::Debug for Fuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fuse").finish_non_exhaustive()
    }
}

impl Fuse {
    /// A whole one. `watcher` looks at the world each time something passes.
    #[must_use]
    pub fn new(trace: Trace, watcher: Watcher) -> Self {
        Self {
            blown: CancellationToken::new(),
            left: AtomicU32::new(0),
            trace,
            watcher,
        }
    }

    /// Ends the daemon now.
    pub fn blow(&self) {
        self.blown.cancel();
    }

    /// Ends the daemon after so many passes from now.
    pub fn blow_after(&self, passes: u32) {
        self.left.store(passes.max(1), Ordering::Relaxed);
    }

    /// Whether the daemon is over.
    #[must_use]
    pub fn is_blown(&self) -> bool {
        self.blown.is_cancelled()
    }

    /// Ends when the daemon does.
    pub async fn is_over(&self) {
        self.blown.cancelled().await;
    }

    /// Whether the daemon still lives at this point.
    pub fn passes(&self, at: impl FnOnce() -> String + Send) -> bool {
        self.watcher.look();
        if self.is_blown() {
            return false;
        }
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return true;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        if left == 1 {
            self.trace.say(format!("the daemon ends at: {}", at()));
            self.blow();
        }
        left > 1
    }

    /// Goes on only while the daemon lives.
    pub async fn pass(&self, at: impl FnOnce() -> String + Send) {
        if !self.passes(at) {
            core::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl KillPoints for Fuse {
    async fn reached(&self, vm: VmId, effect: VmEffect, point: KillPoint) {
        self.pass(|| format!("{} of {vm} {point:?}", effect.name()))
            .await;
    }
}

/// The store as one daemon sees it.
#[derive(Debug)]
pub struct FusedStore {
    /// What outlives daemons.
    pub store: SharedStore,
    /// The daemon's.
    pub fuse: std::sync::Arc<Fuse>,
}

#[async_trait]
impl Store for FusedStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.fuse.pass(|| format!("get {key}")).await;
        self.store.get(key).await
    }

    async fn list(&self, range: Range) -> Result<Vec<Entry>, StoreError> {
        self.fuse.pass(|| format!("list {}", range.prefix)).await;
        self.store.list(range).await
    }

    async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        self.fuse.pass(|| format!("count {prefix}")).await;
        self.store.count(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        self.fuse.pass(|| "before a commit".to_owned()).await;
        let committed = self.store.commit(transaction).await;
        self.fuse.pass(|| "after a commit".to_owned()).await;
        committed
    }

    fn watch(&self, prefix: &str) -> Watch {
        self.store.watch(prefix)
    }
}
