//! What is below a snapshot that is being made of a whole memory: the pages that differ from it are
//! all that the snapshot has to hold.
//!
//! Opened by the node for a VM that has its memory for itself, so that no kernel can tell which of
//! its pages were changed. Compares by the proofs of chunks, and reads from the files only those
//! that differ in something: a VM that has changed little is compared without reading what is
//! below. A chunk that cannot be read, or is damaged, is as good as one that differs.
//!
//! ```text
//!   pages of the memory, ascending ──▶ Sieve: a chunk at a time ──differ──▶ Staged::page
//! ```

use std::fs::File;
use std::iter::Peekable;
use std::os::unix::fs::FileExt as _;
use std::vec;

use zeroize::Zeroizing;

use super::hash::Hash;
use super::pages::{CHUNK_BYTES, CHUNK_PAGES, Entry, Index, PAGE_BYTES};

/// The memory of a snapshot, and of those that it continues, as far as it takes to compare with it.
/// Without any, it is zero.
#[derive(Debug, Default)]
pub struct Ground {
    /// Topmost first.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    pages: File,
    /// Each with where it begins in the file.
    entries: Peekable<vec::IntoIter<(Entry, u64)>>,
}

impl Ground {
    /// Puts a layer that can be read without a key below those that are there.
    pub(super) fn push(&mut self, index: &Index, pages: File) {
        let entries = index.placed().collect::<Vec<_>>();
        self.layers.push(Layer {
            pages,
            entries: entries.into_iter().peekable(),
        });
    }

    /// The bytes of all its pages, each of each layer.
    pub(crate) fn bytes(&self) -> u64 {
        let entries = |layer: &Layer| {
            let entries = layer.entries.clone();
            entries.map(|(entry, _at)| u64::from(entry.stored.count_ones()) * PAGE_BYTES as u64)
        };
        self.layers.iter().flat_map(entries).sum()
    }

    /// The next chunk that a layer says anything of.
    fn next(&mut self) -> Option<u32> {
        let layers = self.layers.iter_mut();
        let next = layers.filter_map(|layer| Some(layer.entries.peek()?.0.chunk));
        next.min()
    }

    /// Which pages of `chunk`, as they are `now`, differ from it; those not in `given` are zero.
    /// Chunks ascend, and none is left out that a layer says anything of.
    fn differing(&mut self, chunk: u32, now: &[u8], given: u16) -> u16 {
        // What no layer above said anything of.
        let (mut open, mut same) = (u16::MAX, 0);
        for layer in &mut self.layers {
            let Some((entry, at)) = layer.entries.next_if(|(entry, _at)| entry.chunk == chunk)
            else {
                continue;
            };
            same |= open & entry.zero & !given;
            if open & entry.stored & given != 0 {
                same |= open & same_stored(&layer.pages, &entry, at, now);
            }
            open &= !(entry.stored | entry.zero);
        }
        same |= open & !given;
        !same
    }
}

/// Which of the stored pages of a chunk are the same now.
fn same_stored(pages: &File, entry: &Entry, at: u64, now: &[u8]) -> u16 {
    let mut all = Zeroizing::new(Vec::with_capacity(CHUNK_BYTES));
    for page in numbers(entry.stored) {
        all.extend_from_slice(page_of(now, page));
    }
    if Hash::of(&all) == entry.hash {
        return entry.stored;
    }
    let mut below = Zeroizing::new(vec![0; all.len()]);
    if pages.read_exact_at(&mut below, at).is_err() || Hash::of(&below) != entry.hash {
        return 0;
    }
    let pairs = numbers(entry.stored).zip(all.chunks(PAGE_BYTES).zip(below.chunks(PAGE_BYTES)));
    let same = pairs.filter(|(_page, (now, below))| now == below);
    same.fold(0, |mask, (page, _same)| mask | 1 << page)
}

/// The numbers of the bits of a mask that are set.
fn numbers(mask: u16) -> impl Iterator<Item = usize> {
    (0..CHUNK_PAGES as usize).filter(move |page| mask >> page & 1 == 1)
}

fn page_of(chunk: &[u8], page: usize) -> &[u8] {
    &chunk[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]
}

/// Takes the pages of a memory, and gives those that differ from what is below.
#[derive(Debug)]
pub(super) struct Sieve {
    ground: Ground,
    /// Whose pages are being given; those before it are done with.
    chunk: u32,
    /// May hold a guest's secrets.
    now: Zeroizing<Vec<u8>>,
    given: u16,
}

impl Sieve {
    pub(super) fn over(ground: Ground) -> Self {
        Self {
            ground,
            chunk: 0,
            now: Zeroizing::new(vec![0; CHUNK_BYTES]),
            given: 0,
        }
    }

    /// The next page of the memory. They ascend, and those that are left out are zero.
    pub(super) fn page<E>(
        &mut self,
        page: u64,
        bytes: &[u8],
        differs: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let chunk = u32::try_from(page / u64::from(CHUNK_PAGES)).unwrap_or(u32::MAX);
        self.go_on(chunk, differs)?;
        let number = usize::try_from(page % u64::from(CHUNK_PAGES)).unwrap_or(0);
        let at = number * PAGE_BYTES;
        self.now[at..at + PAGE_BYTES].copy_from_slice(bytes);
        self.given |= 1 << number;
        Ok(())
    }

    /// There are no more.
    pub(super) fn finish<E>(
        mut self,
        differs: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.go_on(u32::MAX, differs)
    }

    /// Compares the chunks before this one, as far as there is anything of them.
    fn go_on<E>(
        &mut self,
        to: u32,
        mut differs: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.chunk < to {
            let differing = self.ground.differing(self.chunk, &self.now, self.given);
            let first = u64::from(self.chunk) * u64::from(CHUNK_PAGES);
            for page in numbers(differing) {
                differs(first + page as u64, page_of(&self.now, page))?;
            }
            if self.given != 0 {
                self.now.fill(0);
                self.given = 0;
            }
            let below = self.ground.next();
            self.chunk = below.map_or(to, |below| below.min(to));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;
    use spore_wire::id::SnapshotId;

    use super::{CHUNK_PAGES, Ground, PAGE_BYTES, Sieve};
    use crate::snapshot::pages::LayerWriter;

    const MEMORY_PAGES: u64 = 80;

    type Pages = BTreeMap<u64, u8>;

    fn page_of(value: u8) -> Vec<u8> {
        vec![value; PAGE_BYTES]
    }

    fn push(ground: &mut Ground, pages: &Pages) -> File {
        let bytes = MEMORY_PAGES * PAGE_BYTES as u64;
        let id = SnapshotId::from_bytes([1; 16]);
        let mut writer = LayerWriter::new(Vec::new(), id, bytes, None).unwrap();
        for (page, value) in pages {
            writer.page(*page, &page_of(*value)).unwrap();
        }
        let (pages, index, _bytes) = writer.finish().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&pages).unwrap();
        ground.push(&index, file.try_clone().unwrap());
        file
    }

    /// Which pages of a memory differ, and what is in them; pages that are zero may be given.
    fn sift(ground: Ground, memory: &Pages) -> Pages {
        let mut found = Pages::new();
        let mut sieve = Sieve::over(ground);
        let mut differs = |page, bytes: &[u8]| -> Result<(), Infallible> {
            assert_eq!(bytes, page_of(bytes[0]));
            assert_eq!(found.insert(page, bytes[0]), None, "page {page} twice");
            Ok(())
        };
        for (page, value) in memory {
            let Ok(()) = sieve.page(*page, &page_of(*value), &mut differs);
        }
        let Ok(()) = sieve.finish(&mut differs);
        found
    }

    #[test]
    fn only_pages_that_differ_are_kept_and_zero_ones_that_hide_something() {
        let mut ground = Ground::default();
        push(
            &mut ground,
            &Pages::from([(0, 1), (1, 2), (17, 3), (40, 4)]),
        );
        assert_eq!(ground.bytes(), 4 * PAGE_BYTES as u64);
        let memory = Pages::from([(0, 1), (1, 9), (2, 5), (17, 3), (70, 6)]);
        let expected = Pages::from([(1, 9), (2, 5), (40, 0), (70, 6)]);
        assert_eq!(sift(ground, &memory), expected);
    }

    #[test]
    fn on_nothing_every_page_that_is_given_is_kept() {
        let memory = Pages::from([(0, 1), (33, 7), (79, 2)]);
        assert_eq!(sift(Ground::default(), &memory), memory);
        assert!(sift(Ground::default(), &Pages::new()).is_empty());
    }

    #[test]
    fn a_chunk_that_is_damaged_is_kept_whole_if_anything_of_it_differs() {
        for (changed, expected) in [(2, 16), (1, 0)] {
            let mut ground = Ground::default();
            let whole: Pages = (0..u64::from(CHUNK_PAGES)).map(|page| (page, 1)).collect();
            let file = push(&mut ground, &whole);
            file.write_all_at(&[7], 5000).unwrap();
            let mut memory = whole;
            memory.insert(9, changed);
            assert_eq!(sift(ground, &memory).len(), expected);
        }
    }

    fn layers() -> impl Strategy<Value = Vec<Pages>> {
        let layer = proptest::collection::btree_map(0..MEMORY_PAGES, 0..4_u8, 0..60);
        proptest::collection::vec(layer, 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_kept_makes_the_memory_of_what_is_below_and_nothing_is_kept_that_is_the_same(
            layers in layers(),
            changes in proptest::collection::btree_map(0..MEMORY_PAGES, 0..4_u8, 0..20),
        ) {
            let mut model = Pages::new();
            let mut ground = Ground::default();
            for layer in layers.iter().rev() {
                push(&mut ground, layer);
            }
            for layer in &layers {
                model.extend(layer);
            }
            let below = model.clone();
            let value = |memory: &Pages, page| memory.get(&page).copied().unwrap_or(0);
            model.extend(changes);
            model.retain(|_page, value| *value != 0);
            let kept = sift(ground, &model);
            for page in 0..MEMORY_PAGES {
                let (is, was) = (value(&model, page), value(&below, page));
                prop_assert_eq!(kept.get(&page).copied(), (is != was).then_some(is));
            }
        }
    }
}
