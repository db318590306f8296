//! Whole memories of snapshots, as sealed memfds that VMs map: a cache with a byte budget.
//!
//! Filled by the node before a fork, or by a builder whose memory becomes its template's. The truth
//! is the snapshot's files; an image here is made from them again at any time. One is kept while
//! somebody holds or pins it and, beyond that, as long as there is room; who waited longest goes
//! first. Each is made by one caller at a time, off the runtime's threads. Never holds more than
//! its budget but for what VMs of an earlier daemon map, which is counted and given to nobody.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use spore_wire::id::SnapshotId;
use spore_wire::node::MemoryStatus;
use thiserror::Error;
use tokio::sync::OnceCell;
use tokio::task;

use super::pages::{Memory, PAGE_BYTES};
use crate::hypervisor::memory_image::{MemoryDraft, MemoryImage};

impl Memory for MemoryDraft {
    fn write(&mut self, page: u64, bytes: &[u8]) -> io::Result<()> {
        self.file().write_all_at(bytes, page * PAGE_BYTES as u64)
    }

    /// Leaves holes, which take no memory until a child touches them.
    fn zero(&mut self, page: u64, pages: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, bytes) = (page * PAGE_BYTES as u64, pages * PAGE_BYTES as u64);
        Ok(fallocate(self.file(), flags, at, bytes)?)
    }
}

/// The budget is taken by images that VMs map.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "a memory of {bytes} bytes does not fit: of {budget} bytes for memories of snapshots {held} \
     are in use; stop VMs that began from others, or try again later"
)]
pub struct NoImageRoom {
    /// How large it is.
    pub bytes: u64,
    /// How much cannot be given up.
    pub held: u64,
    /// How much there may be.
    pub budget: u64,
}

/// Why there is no image.
#[derive(Debug, Error)]
pub enum CacheError<E: std::error::Error + 'static> {
    /// There is no room.
    #[error(transparent)]
    NoRoom(#[from] NoImageRoom),
    /// It could not be made.
    #[error("cannot make the memory of the snapshot")]
    Build(#[source] E),
    /// The one who made it panicked: a bug.
    #[error("the memory of the snapshot was given up")]
    Lost(#[source] task::JoinError),
}

/// The images of one node.
#[derive(Clone, Debug)]
pub struct MemoryCache {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<SnapshotId, Entry>,
    /// What VMs of earlier daemons map, and how many do: nobody else may begin from it, since a
    /// VMM that a guest took over could have put another memory in its place.
    strays: BTreeMap<SnapshotId, (u64, u32)>,
    /// Counts uses: what was used at a lower count was used earlier.
    uses: u64,
    status: MemoryStatus,
}

/// Where an image is put once it is made.
type Cell = Arc<OnceCell<Arc<MemoryImage>>>;

#[derive(Debug)]
struct Entry {
    /// Set once the image is made; whoever sets it holds another reference to the cell.
    cell: Cell,
    bytes: u64,
    used: u64,
    /// Whether somebody had it made, or is about to.
    wanted: bool,
}

impl Entry {
    /// Whether anybody but the cache has the image or waits for it.
    fn is_held(&self) -> bool {
        let image = self.cell.get();
        Arc::strong_count(&self.cell) > 1 || image.is_some_and(|image| Arc::strong_count(image) > 1)
    }
}

/// Keeps an image, or room for it.
#[derive(Debug)]
pub struct Pin {
    cache: MemoryCache,
    id: SnapshotId,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Place(Cell),
    Stray,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        match core::mem::replace(&mut self.held, Held::Stray) {
            Held::Place(cell) => {
                drop(cell);
                // Room that nobody made use of.
                let idle = |entry: &Entry| !entry.is_held() && !entry.cell.initialized();
                if state.entries.get(&self.id).is_some_and(idle) {
                    state.entries.remove(&self.id);
                }
            }
            Held::Stray => {
                let stray = state.strays.get_mut(&self.id);
                let last = stray.is_some_and(|(_bytes, vms)| {
                    *vms -= 1;
                    *vms == 0
                });
                if last {
                    state.strays.remove(&self.id);
                }
            }
        }
    }
}

impl State {
    fn used(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    fn bytes(&self, which: impl Fn(&Entry) -> bool) -> u64 {
        let entries = self.entries.values().filter(|entry| which(entry));
        let strays = self.strays.values().map(|(bytes, _vms)| *bytes);
        entries.map(|entry| entry.bytes).chain(strays).sum()
    }

    /// Gives up images that nobody holds until `bytes` more fit; whether they do.
    fn make_room(&mut self, bytes: u64) -> bool {
        self.shrink(self.status.budget_bytes, bytes)
    }

    fn shrink(&mut self, budget: u64, bytes: u64) -> bool {
        while self.bytes(|_entry| true).saturating_add(bytes) > budget {
            let free = self.entries.iter().filter(|(_id, entry)| !entry.is_held());
            let Some((oldest, _entry)) = free.min_by_key(|(_id, entry)| entry.used) else {
                return false;
            };
            let oldest = *oldest;
            self.entries.remove(&oldest);
            self.status.evictions += 1;
        }
        true
    }
}

impl MemoryCache {
    /// An empty cache.
    #[must_use]
    pub fn new(budget_bytes: u64) -> Self {
        let state = State {
            status: MemoryStatus {
                budget_bytes,
                ..MemoryStatus::default()
            },
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image of `id`, if it is there: whoever has it keeps it from being given up.
    #[must_use]
    pub fn get(&self, id: SnapshotId) -> Option<Arc<MemoryImage>> {
        let mut state = self.state();
        let used = state.used();
        let entry = state.entries.get_mut(&id)?;
        let image = entry.cell.get().cloned()?;
        entry.used = used;
        state.status.hits += 1;
        Some(image)
    }

    /// The image of `id`, whose guest has `bytes` of memory; made by `build` on a thread for
    /// blocking work if it is not there. Who asks while it is made waits for the same one, and
    /// tries itself should that fail. A caller that is cancelled cancels nobody else: what was
    /// begun ends.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn get_or_build<E, F>(
        &self,
        id: SnapshotId,
        bytes: u64,
        build: F,
    ) -> Result<Arc<MemoryImage>, CacheError<E>>
    where
        E: std::error::Error + Send + 'static,
        F: FnOnce() -> Result<MemoryImage, E> + Send + 'static,
    {
        let cell = self.reserve(id, bytes)?;
        self.want(id);
        let cache = self.clone();
        let built = task::spawn(async move {
            let image = cell
                .get_or_try_init(|| async {
                    task::spawn_blocking(build)
                        .await
                        .map_err(CacheError::Lost)?
                        .map(Arc::new)
                        .map_err(CacheError::Build)
                })
                .await
                .cloned();
            drop(cell);
            if image.is_err() {
                cache.forget(id);
            }
            image
        });
        built.await.map_err(CacheError::Lost)?
    }

    /// The place of `id`'s image, with room for it.
    fn reserve(&self, id: SnapshotId, bytes: u64) -> Result<Cell, NoImageRoom> {
        let mut state = self.state();
        let used = state.used();
        if let Some(entry) = state.entries.get_mut(&id) {
            entry.used = used;
            return Ok(Arc::clone(&entry.cell));
        }
        if !state.make_room(bytes) {
            let held = state.bytes(Entry::is_held);
            let budget = state.status.budget_bytes;
            return Err(NoImageRoom {
                bytes,
                held,
                budget,
            });
        }
        let cell = Arc::new(OnceCell::new());
        let entry = Entry {
            cell: Arc::clone(&cell),
            bytes,
            used,
            wanted: false,
        };
        state.entries.insert(id, entry);
        Ok(cell)
    }

    /// Counts who wants the image of `id`.
    fn want(&self, id: SnapshotId) {
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(&id) else {
            return;
        };
        match core::mem::replace(&mut entry.wanted, true) {
            true => state.status.hits += 1,
            false => state.status.misses += 1,
        }
    }

    /// Keeps the image of `id`, or room for it, until the pin is dropped.
    ///
    /// # Errors
    /// [`NoImageRoom`].
    pub fn pin(&self, id: SnapshotId, bytes: u64) -> Result<Pin, NoImageRoom> {
        let held = Held::Place(self.reserve(id, bytes)?);
        let cache = self.clone();
        Ok(Pin { cache, id, held })
    }

    /// Whether the image of `id` is there.
    #[must_use]
    pub fn has(&self, id: SnapshotId) -> bool {
        let state = self.state();
        let entry = state.entries.get(&id);
        entry.is_some_and(|entry| entry.cell.initialized())
    }

    /// Counts the memory that a VM of an earlier daemon maps, until the pin is dropped.
    #[must_use]
    pub fn pin_stray(&self, id: SnapshotId, bytes: u64) -> Pin {
        self.state().strays.entry(id).or_insert((bytes, 0)).1 += 1;
        let (cache, held) = (self.clone(), Held::Stray);
        Pin { cache, id, held }
    }

    /// Gives up images that nobody holds until all take at most `bytes`; what they take then.
    pub fn shrink(&self, bytes: u64) -> u64 {
        let mut state = self.state();
        state.shrink(bytes, 0);
        state.bytes(|_entry| true)
    }

    /// Takes an image in that is there anyway, of a VM that was captured, if there is room. If
    /// `id` has one already, that one stays.
    pub fn offer(&self, id: SnapshotId, image: &Arc<MemoryImage>) {
        let mut state = self.state();
        let used = state.used();
        if state.entries.contains_key(&id) || !state.make_room(image.bytes()) {
            return;
        }
        let entry = Entry {
            bytes: image.bytes(),
            cell: Arc::new(OnceCell::new_with(Some(Arc::clone(image)))),
            used,
            wanted: true,
        };
        state.entries.insert(id, entry);
    }

    /// Gives the image of a removed snapshot up, once nobody holds it: it is the first to go.
    pub fn forget(&self, id: SnapshotId) {
        let mut state = self.state();
        if let Some(entry) = state.entries.get_mut(&id) {
            entry.used = 0;
            entry.wanted &= entry.cell.initialized();
            if !entry.is_held() {
                state.entries.remove(&id);
            }
        }
    }

    /// Counters and sizes.
    #[must_use]
    pub fn status(&self) -> MemoryStatus {
        let state = self.state();
        MemoryStatus {
            bytes: state.bytes(|_entry| true),
            held_bytes: state.bytes(Entry::is_held),
            ..state.status
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use spore_wire::id::SnapshotId;

    use super::{CacheError, MemoryCache, MemoryDraft, MemoryImage};
    use crate::hypervisor::memory_image::Extents;
    use crate::snapshot::pages::Memory as _;

    const BYTES: u64 = 64 * 1024;

    fn id(n: u8) -> SnapshotId {
        SnapshotId::from_bytes([n; 16])
    }

    fn image(value: u8) -> io::Result<MemoryImage> {
        let mut draft = MemoryDraft::new(BYTES)?;
        draft.write(1, &[value; 4096])?;
        Ok(draft.seal()?)
    }

    async fn get(cache: &MemoryCache, n: u8) -> Result<Arc<MemoryImage>, CacheError<io::Error>> {
        cache.get_or_build(id(n), BYTES, move || image(n)).await
    }

    #[test]
    fn zeroed_pages_are_holes_again() {
        let mut draft = MemoryDraft::new(BYTES).unwrap();
        draft.write(0, &[1; 8 * 4096]).unwrap();
        draft.zero(2, 3).unwrap();
        let image = draft.seal().unwrap();
        let extents = Extents::of(image.file(), image.bytes());
        let extents: Vec<_> = extents.map(Result::unwrap).collect();
        assert_eq!(extents, [(0, 2 * 4096), (5 * 4096, 8 * 4096)]);
    }

    #[tokio::test]
    async fn many_who_ask_at_once_get_one_image_that_is_made_once() {
        let cache = MemoryCache::new(BYTES);
        let built = Arc::new(AtomicU32::new(0));
        let asks = (0..20).map(|_ask| {
            let (cache, built) = (cache.clone(), Arc::clone(&built));
            tokio::spawn(async move {
                let build = move || {
                    built.fetch_add(1, Ordering::SeqCst);
                    image(1)
                };
                cache.get_or_build(id(1), BYTES, build).await.unwrap()
            })
        });
        let images = futures_util::future::join_all(asks.collect::<Vec<_>>()).await;
        let first = images[0].as_ref().unwrap();
        assert!(
            images
                .iter()
                .all(|image| Arc::ptr_eq(image.as_ref().unwrap(), first))
        );
        assert_eq!(built.load(Ordering::SeqCst), 1);
        let status = cache.status();
        assert_eq!(
            (status.hits, status.misses, status.held_bytes),
            (19, 1, BYTES)
        );
    }

    #[tokio::test]
    async fn who_fails_to_make_one_leaves_no_trace_and_the_next_one_tries() {
        let cache = MemoryCache::new(BYTES);
        let fail = || Err(io::Error::other("damaged"));
        let refused = cache.get_or_build(id(1), BYTES, fail).await.unwrap_err();
        assert!(matches!(refused, CacheError::Build(_)), "{refused}");
        assert_eq!(cache.status().bytes, 0);
        get(&cache, 1).await.unwrap();
    }

    #[tokio::test]
    async fn who_is_cancelled_cancels_nobody_else() {
        let cache = MemoryCache::new(BYTES);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let build = move || {
            wait.recv().map_err(io::Error::other)?;
            image(1)
        };
        let first = cache.get_or_build(id(1), BYTES, build);
        tokio::time::timeout(std::time::Duration::from_millis(20), first)
            .await
            .unwrap_err();
        let second = tokio::spawn({
            let cache = cache.clone();
            async move { get(&cache, 1).await }
        });
        tokio::task::yield_now().await;
        go.send(()).unwrap();
        second.await.unwrap().unwrap();
        assert_eq!((cache.status().misses, cache.status().hits), (1, 1));
    }

    #[tokio::test]
    async fn the_least_recently_used_goes_first_and_what_is_held_stays() {
        let cache = MemoryCache::new(3 * BYTES);
        let held = get(&cache, 1).await.unwrap();
        for n in [2, 3] {
            drop(get(&cache, n).await.unwrap());
        }
        drop(get(&cache, 2).await.unwrap());
        drop(get(&cache, 4).await.unwrap());
        let is_there = |n| cache.get(id(n)).is_some();
        assert_eq!([1, 2, 3, 4].map(is_there), [true, true, false, true]);
        let others = [get(&cache, 2).await.unwrap(), get(&cache, 4).await.unwrap()];
        let refused = get(&cache, 5).await.unwrap_err();
        assert!(
            matches!(&refused, CacheError::NoRoom(room) if room.held == 3 * BYTES),
            "{refused}"
        );
        assert_eq!(cache.status().held_bytes, 3 * BYTES);
        drop((held, others));
        get(&cache, 5).await.unwrap();
        assert_eq!(cache.status().bytes, 3 * BYTES);
    }

    #[tokio::test]
    async fn an_image_that_is_there_anyway_is_taken_in_if_there_is_room() {
        let cache = MemoryCache::new(BYTES);
        let offered = Arc::new(image(1).unwrap());
        cache.offer(id(1), &offered);
        assert!(Arc::ptr_eq(&offered, &get(&cache, 1).await.unwrap()));
        cache.offer(id(1), &Arc::new(image(2).unwrap()));
        assert!(Arc::ptr_eq(&offered, &get(&cache, 1).await.unwrap()));
        cache.offer(id(2), &offered);
        assert!(cache.get(id(2)).is_none(), "the first one is held");
        drop(offered);
        cache.offer(id(3), &Arc::new(image(3).unwrap()));
        assert!(cache.get(id(1)).is_none() && cache.get(id(3)).is_some());
    }

    #[tokio::test]
    async fn what_is_pinned_stays_and_room_that_nobody_used_is_given_back() {
        let cache = MemoryCache::new(2 * BYTES);
        let first = cache.pin(id(1), BYTES).unwrap();
        let second = cache.pin(id(2), BYTES).unwrap();
        assert_eq!(cache.status().held_bytes, 2 * BYTES);
        let refused = cache.pin(id(3), BYTES).unwrap_err();
        assert_eq!((refused.held, refused.budget), (2 * BYTES, 2 * BYTES));
        drop(get(&cache, 1).await.unwrap());
        assert_eq!(cache.shrink(0), 2 * BYTES);
        drop((first, second));
        assert_eq!(cache.status().bytes, BYTES, "what was made is kept");
        let again = cache.pin(id(1), BYTES).unwrap();
        drop(get(&cache, 1).await.unwrap());
        assert_eq!((cache.status().misses, cache.status().hits), (1, 1));
        drop(again);
        assert_eq!(cache.shrink(0), 0);
    }

    #[tokio::test]
    async fn what_vms_of_an_earlier_daemon_map_counts_and_nobody_begins_from_it() {
        let cache = MemoryCache::new(2 * BYTES);
        let strays = [1, 1, 2].map(|n| cache.pin_stray(id(n), BYTES));
        assert_eq!(cache.status().held_bytes, 2 * BYTES);
        assert!(cache.get(id(1)).is_none());
        get(&cache, 1).await.unwrap_err();
        let [first, second, third] = strays;
        drop((first, third));
        assert_eq!(cache.status().held_bytes, BYTES);
        drop(get(&cache, 1).await.unwrap());
        drop(second);
        assert_eq!(cache.status().bytes, BYTES);
    }

    #[tokio::test]
    async fn what_is_forgotten_goes_once_nobody_holds_it() {
        let cache = MemoryCache::new(2 * BYTES);
        let held = get(&cache, 1).await.unwrap();
        drop(get(&cache, 2).await.unwrap());
        cache.forget(id(1));
        cache.forget(id(2));
        assert_eq!(cache.status().bytes, BYTES);
        drop(held);
        drop(get(&cache, 3).await.unwrap());
        drop(get(&cache, 4).await.unwrap());
        assert!(cache.get(id(1)).is_none());
    }
}
