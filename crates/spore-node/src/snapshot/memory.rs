//! Whole memories of snapshots, as sealed memfds that VMs map: a cache with a byte budget.
//!
//! Filled by the node before a fork, or by a builder whose memory becomes its template's. The truth
//! is the snapshot's files; an image here is made from them again at any time. One is kept while
//! somebody holds it and, beyond that, as long as there is room; who waited longest goes first.
//! Each is made by one caller at a time, off the runtime's threads. Never holds more than its
//! budget but for what is adopted: memory that VMs of an earlier daemon map is taken in any case.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::fs::{fallocate, fcntl_add_seals, fcntl_get_seals, memfd_create, seek};
use rustix::io::Errno;
use spore_wire::id::SnapshotId;
use thiserror::Error;
use tokio::sync::OnceCell;
use tokio::task;

use super::pages::{Memory, PAGE_BYTES};

/// What is seen of an image in `/proc/PID/maps` of those that map it.
const MEMFD_NAME: &str = "spore-memory";

/// What keeps an image as it is for ever.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// The whole memory of a snapshot: nobody can change it any more.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    bytes: u64,
}

impl MemoryImage {
    /// The image in a memfd of `bytes` bytes, whose writer is done: it is sealed here, unless it
    /// was before.
    ///
    /// # Errors
    /// When it has another size, or cannot be sealed since somebody still maps it to write.
    pub fn from_sealed_memfd(memfd: OwnedFd, bytes: u64) -> io::Result<Self> {
        let file = File::from(memfd);
        let found = file.metadata()?.len();
        if found != bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a memory of {bytes} bytes cannot be in a memfd of {found}"),
            ));
        }
        if !fcntl_get_seals(&file)?.contains(SEALS) {
            fcntl_add_seals(&file, SEALS)?;
        }
        Ok(Self { file, bytes })
    }

    /// The memfd. Whoever maps it does so privately: it cannot be written.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The size of the guest's memory.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file, to read pages from.
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Where it has data: the rest was never written, or was zero.
    pub(super) fn extents(&self) -> Extents<'_> {
        Extents { image: self, at: 0 }
    }
}

/// The ranges of an image that are no holes, in whole pages.
#[derive(Debug)]
pub(super) struct Extents<'a> {
    image: &'a MemoryImage,
    at: u64,
}

impl Iterator for Extents<'_> {
    /// Where it starts and where it ends.
    type Item = io::Result<(u64, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.image.bytes {
            return None;
        }
        let file = &self.image.file;
        let start = match seek(file, SeekFrom::Data(self.at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => return None,
            Err(error) => return Some(Err(error.into())),
        };
        Some(seek(file, SeekFrom::Hole(start)).map_or_else(
            |error| Err(error.into()),
            |end| {
                self.at = end;
                Ok((start, end))
            },
        ))
    }
}

/// A memory on its way to an image: a memfd of holes, into which layers are put.
#[derive(Debug)]
pub(super) struct Draft {
    file: File,
    bytes: u64,
}

impl Draft {
    pub(super) fn new(bytes: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(MEMFD_NAME, flags)?);
        file.set_len(bytes)?;
        Ok(Self { file, bytes })
    }

    pub(super) fn finish(self) -> io::Result<MemoryImage> {
        MemoryImage::from_sealed_memfd(self.file.into(), self.bytes)
    }
}

impl Memory for Draft {
    fn write(&mut self, page: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, page * PAGE_BYTES as u64)
    }

    /// Leaves holes, which take no memory until a child touches them.
    fn zero(&mut self, page: u64, pages: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, bytes) = (page * PAGE_BYTES as u64, pages * PAGE_BYTES as u64);
        Ok(fallocate(&self.file, flags, at, bytes)?)
    }
}

/// Why there is no image.
#[derive(Debug, Error)]
pub enum CacheError<E: std::error::Error + 'static> {
    /// The budget is taken by images that VMs map.
    #[error(
        "a memory of {bytes} bytes does not fit: of {budget} bytes for memories of snapshots \
         {held} are in use"
    )]
    NoRoom {
        /// How large it is.
        bytes: u64,
        /// How much cannot be given up.
        held: u64,
        /// How much there may be.
        budget: u64,
    },
    /// It could not be made.
    #[error("cannot make the memory of the snapshot")]
    Build(#[source] E),
    /// The one who made it panicked: a bug.
    #[error("the memory of the snapshot was given up")]
    Lost(#[source] task::JoinError),
}

/// What the cache did and holds, for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStatus {
    /// Images that were there when they were asked for, or on their way.
    pub hits: u64,
    /// Images that had to be made.
    pub misses: u64,
    /// Images that were given up for want of room.
    pub evictions: u64,
    /// Images, and such that are being made.
    pub images: usize,
    /// The sum of their guests' memories.
    pub bytes: u64,
    /// Of it, what somebody holds.
    pub held_bytes: u64,
    /// The most that it should be.
    pub budget_bytes: u64,
}

/// The images of one node.
#[derive(Clone, Debug)]
pub struct MemoryCache {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<SnapshotId, Entry>,
    /// Counts uses: what was used at a lower count was used earlier.
    uses: u64,
    status: CacheStatus,
}

#[derive(Debug)]
struct Entry {
    /// Set once the image is made; whoever sets it holds another reference to the cell.
    cell: Arc<OnceCell<Arc<MemoryImage>>>,
    bytes: u64,
    used: u64,
}

impl Entry {
    /// Whether anybody but the cache has the image or waits for it.
    fn is_held(&self) -> bool {
        let image = self.cell.get();
        Arc::strong_count(&self.cell) > 1 || image.is_some_and(|image| Arc::strong_count(image) > 1)
    }
}

impl State {
    fn used(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    fn bytes(&self, which: impl Fn(&Entry) -> bool) -> u64 {
        let entries = self.entries.values().filter(|entry| which(entry));
        entries.map(|entry| entry.bytes).sum()
    }

    /// Gives up images that nobody holds until `bytes` more fit; whether they do.
    fn make_room(&mut self, bytes: u64) -> bool {
        let budget = self.status.budget_bytes;
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
            status: CacheStatus {
                budget_bytes,
                ..CacheStatus::default()
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
    fn reserve<E: std::error::Error>(
        &self,
        id: SnapshotId,
        bytes: u64,
    ) -> Result<Arc<OnceCell<Arc<MemoryImage>>>, CacheError<E>> {
        let mut state = self.state();
        let used = state.used();
        if let Some(entry) = state.entries.get_mut(&id) {
            entry.used = used;
            let cell = Arc::clone(&entry.cell);
            state.status.hits += 1;
            return Ok(cell);
        }
        state.status.misses += 1;
        if !state.make_room(bytes) {
            let held = state.bytes(Entry::is_held);
            let budget = state.status.budget_bytes;
            return Err(CacheError::NoRoom {
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
        };
        state.entries.insert(id, entry);
        Ok(cell)
    }

    /// Takes an image in that is there anyway: a builder's memory, or one that VMs of an earlier
    /// daemon map. If `id` has one already, that is the answer.
    pub fn adopt(&self, id: SnapshotId, image: MemoryImage) -> Arc<MemoryImage> {
        let mut state = self.state();
        let used = state.used();
        let there = state.entries.get(&id).and_then(|entry| entry.cell.get());
        if let Some(there) = there {
            return Arc::clone(there);
        }
        let image = Arc::new(image);
        // What does not fit is over the budget until somebody asks for room. One that is being made
        // at this moment is its callers' alone: they asked before anybody knew of this one.
        state.make_room(image.bytes());
        let entry = Entry {
            bytes: image.bytes(),
            cell: Arc::new(OnceCell::new_with(Some(Arc::clone(&image)))),
            used,
        };
        state.entries.insert(id, entry);
        image
    }

    /// Gives the image of a removed snapshot up, once nobody holds it: it is the first to go.
    pub fn forget(&self, id: SnapshotId) {
        let mut state = self.state();
        if let Some(entry) = state.entries.get_mut(&id) {
            entry.used = 0;
            if !entry.is_held() {
                state.entries.remove(&id);
            }
        }
    }

    /// Counters and sizes.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        let state = self.state();
        CacheStatus {
            images: state.entries.len(),
            bytes: state.bytes(|_entry| true),
            held_bytes: state.bytes(Entry::is_held),
            ..state.status
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use spore_wire::id::SnapshotId;

    use super::{CacheError, Draft, MemoryCache, MemoryImage};
    use crate::snapshot::pages::Memory as _;

    const BYTES: u64 = 64 * 1024;

    fn id(n: u8) -> SnapshotId {
        SnapshotId::from_bytes([n; 16])
    }

    fn image(value: u8) -> io::Result<MemoryImage> {
        let mut draft = Draft::new(BYTES)?;
        draft.write(1, &[value; 4096])?;
        draft.finish()
    }

    async fn get(cache: &MemoryCache, n: u8) -> Result<Arc<MemoryImage>, CacheError<io::Error>> {
        cache.get_or_build(id(n), BYTES, move || image(n)).await
    }

    #[test]
    fn an_image_cannot_be_changed_by_anybody() {
        let image = image(7).unwrap();
        let file = image.file();
        assert!(file.write_all_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err() && file.set_len(2 * BYTES).is_err());
        let extents: Vec<_> = image.extents().map(Result::unwrap).collect();
        assert_eq!(extents, [(4096, 8192)]);
        let mut bytes = [0; 3 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes[..4096], [0; 4096]);
        assert_eq!(bytes[4096..8192], [7; 4096]);
        assert_eq!(bytes[8192..], [0; 4096]);
    }

    #[test]
    fn zeroed_pages_are_holes_again() {
        let mut draft = Draft::new(BYTES).unwrap();
        draft.write(0, &[1; 8 * 4096]).unwrap();
        draft.zero(2, 3).unwrap();
        let image = draft.finish().unwrap();
        let extents: Vec<_> = image.extents().map(Result::unwrap).collect();
        assert_eq!(extents, [(0, 2 * 4096), (5 * 4096, 8 * 4096)]);
    }

    #[test]
    fn a_memfd_of_another_size_is_no_image() {
        let file = image(1).unwrap().file;
        let refused = MemoryImage::from_sealed_memfd(file.into(), BYTES + 1).unwrap_err();
        assert!(refused.to_string().contains("65537"), "{refused}");
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
        assert_eq!((cache.status().images, cache.status().bytes), (0, 0));
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
            matches!(refused, CacheError::NoRoom { held, .. } if held == 3 * BYTES),
            "{refused}"
        );
        assert_eq!(cache.status().held_bytes, 3 * BYTES);
        drop((held, others));
        get(&cache, 5).await.unwrap();
        assert_eq!(cache.status().images, 3);
    }

    #[tokio::test]
    async fn an_adopted_image_is_counted_even_beyond_the_budget() {
        let cache = MemoryCache::new(BYTES);
        let first = cache.adopt(id(1), image(1).unwrap());
        let second = cache.adopt(id(2), image(2).unwrap());
        assert_eq!(cache.status().bytes, 2 * BYTES);
        assert!(Arc::ptr_eq(&first, &cache.adopt(id(1), image(3).unwrap())));
        get(&cache, 3).await.unwrap_err();
        drop((first, second));
        get(&cache, 3).await.unwrap();
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
