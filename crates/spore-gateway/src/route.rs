//! Where a host leads: a table that is read by every request and changed by the daemon.
//!
//! Read by `forward.rs`, written by `feed.rs`. Never says what happens to a request.
//!
//! The table is cut into shards, each behind a lock of its own that is held for one look-up: a
//! change touches one shard and costs the same whether ten or a hundred thousand hosts are known.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use spore_wire::gateway::{AppKey, Route, RoutePolicy};
use tokio::sync::Notify;

use crate::feed::Feed;
use crate::lock;
use crate::wake::App;

const SHARDS: usize = 64;

/// Hosts and what they lead to. `T` is what a host leads to: an app, or anything in a bench.
#[derive(Debug)]
pub struct HostTable<T> {
    hasher: RandomState,
    shards: Vec<RwLock<HashMap<Box<str>, T>>>,
}

impl<T> Default for HostTable<T> {
    fn default() -> Self {
        Self {
            hasher: RandomState::new(),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        }
    }
}

impl<T: Clone> HostTable<T> {
    /// Where `host` leads, which is lower case and without port.
    #[must_use]
    pub fn get(&self, host: &str) -> Option<T> {
        let shard = self.shard(host).read();
        shard
            .unwrap_or_else(PoisonError::into_inner)
            .get(host)
            .cloned()
    }

    /// Lets `host` lead to `target`; gives back where it led before.
    pub fn insert(&self, host: &str, target: T) -> Option<T> {
        let shard = self.shard(host).write();
        shard
            .unwrap_or_else(PoisonError::into_inner)
            .insert(host.into(), target)
    }

    /// Forgets `host`; gives back where it led.
    pub fn remove(&self, host: &str) -> Option<T> {
        let shard = self.shard(host).write();
        shard.unwrap_or_else(PoisonError::into_inner).remove(host)
    }

    /// Forgets every host whose target fails the test; gives back where they led.
    pub fn remove_unless(&self, mut keep: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            removed.extend(
                shard
                    .extract_if(|_, target| !keep(target))
                    .map(|(_, target)| target),
            );
        }
        removed
    }

    fn shard(&self, host: &str) -> &RwLock<HashMap<Box<str>, T>> {
        let hash = self.hasher.hash_one(host);
        // The remainder is below the number of shards, whatever the width of a pointer.
        #[expect(clippy::cast_possible_truncation, reason = "below SHARDS")]
        let index = (hash % SHARDS as u64) as usize;
        &self.shards[index]
    }
}

/// What a host leads to.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) app: Arc<App>,
    pub(crate) host: Box<str>,
    pub(crate) policy: RoutePolicy,
    /// The table that named it last.
    table: u64,
}

/// The gateway's table.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    hosts: HostTable<Arc<Target>>,
    table: AtomicU64,
    whole: AtomicBool,
    became_whole: Notify,
}

impl Routes {
    pub(crate) fn get(&self, host: &str) -> Option<Arc<Target>> {
        self.hosts.get(host)
    }

    /// A daemon will name every route anew; until it has, the old ones hold.
    pub(crate) fn begin_table(&self) {
        self.table.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds or replaces one route.
    pub(crate) fn set(&self, route: Route, app: Arc<App>) {
        app.routes.fetch_add(1, Ordering::Relaxed);
        let target = Target {
            app,
            host: route.host.clone().into(),
            policy: route.policy,
            table: self.table.load(Ordering::Relaxed),
        };
        if let Some(old) = self.hosts.insert(&route.host, Arc::new(target)) {
            old.app.routes.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The table is whole: what it did not name is forgotten. Gives back the apps of those hosts.
    pub(crate) fn end_table(&self) -> Vec<Arc<App>> {
        let table = self.table.load(Ordering::Relaxed);
        let removed = self.hosts.remove_unless(|target| target.table == table);
        self.whole.store(true, Ordering::Release);
        self.became_whole.notify_waiters();
        removed
            .into_iter()
            .map(|target| {
                target.app.routes.fetch_sub(1, Ordering::Relaxed);
                Arc::clone(&target.app)
            })
            .collect()
    }

    /// Forgets one host; gives back its app.
    pub(crate) fn remove(&self, host: &str) -> Option<Arc<App>> {
        let target = self.hosts.remove(host)?;
        target.app.routes.fetch_sub(1, Ordering::Relaxed);
        Some(Arc::clone(&target.app))
    }

    /// Whether a daemon ever told all its routes.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// Ends when it did.
    pub(crate) async fn wait_whole(&self) {
        loop {
            let notified = self.became_whole.notified();
            if self.is_whole() {
                return;
            }
            notified.await;
        }
    }
}

/// The apps that the daemon named, by key.
#[derive(Debug, Default)]
pub(crate) struct Apps(Mutex<HashMap<AppKey, Arc<App>>>);

impl Apps {
    pub(crate) fn get(&self, key: &AppKey) -> Option<Arc<App>> {
        lock(&self.0).get(key).cloned()
    }

    /// The app of that key, made when it is new.
    pub(crate) fn obtain(&self, key: &AppKey, feed: &Arc<Feed>) -> Arc<App> {
        let mut apps = lock(&self.0);
        if let Some(app) = apps.get(key) {
            return Arc::clone(app);
        }
        let app = Arc::new(App::new(key.clone(), Arc::clone(feed)));
        apps.insert(key.clone(), Arc::clone(&app));
        app
    }

    /// All of them, as they are now.
    pub(crate) fn all(&self) -> Vec<Arc<App>> {
        lock(&self.0).values().cloned().collect()
    }

    /// Forgets an app that has neither routes nor anything alive.
    pub(crate) fn forget_blank(&self, app: &Arc<App>) {
        if app.is_blank() {
            let forgotten = lock(&self.0).remove(app.key());
            drop(forgotten);
        }
    }
}
