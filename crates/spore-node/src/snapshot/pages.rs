//! The pages of memory that one snapshot holds: a file of packed pages, and an index of it.
//!
//! Called by the store. Pure over `Read` and `Write`: opens no file and knows no folder.
//!
//! Pages are the unit of content and chunks of 64 KiB the unit of proof: what changed between two
//! snapshots are runs of a few pages, for which whole chunks would be many times as much.
//!
//! ```text
//!   memory.pages   the stored pages of chunk 3, then those of chunk 17, …   (sealed: each chunk's
//!                  pages encrypted as one text, which adds a tag)
//!   memory.index   "SPOREIDX"  count u32  protection u32  nonce 16
//!                  count × { chunk u32, stored pages u16, zero pages u16, BLAKE3 of its bytes }
//!                  sealed: a tag over all of that
//! ```
//!
//! Numbers are little-endian. A page is stored, or zero, or not of this layer. Chunks ascend.
//! The hash is of what is in the file, encrypted or not, so that damage is found without a key; the
//! tag over the index is what keeps chunks from being left out or taken from another layer by
//! whoever can compute a hash.

use std::io::{self, Read, Write};

use spore_wire::id::SnapshotId;
use thiserror::Error;
use zeroize::Zeroizing;

use super::hash::{HASH_BYTES, Hash};
use super::key::{NONCE_BYTES, SnapshotKey, TAG_BYTES, bond};

/// One page of guest memory.
pub const PAGE_BYTES: usize = 4096;

/// What is hashed, and encrypted, as one.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// The pages of a chunk: one bit each in a mask of 16.
pub(super) const CHUNK_PAGES: u32 = 16;

const MAGIC: &[u8; 8] = b"SPOREIDX";
const PREFIX_BYTES: usize = 16;
const START_BYTES: usize = MAGIC.len() + 4 + 4 + PREFIX_BYTES;
const ENTRY_BYTES: usize = 4 + 2 + 2 + HASH_BYTES;

/// In the nonce of the index's own tag, where chunks have their number.
const INDEX_NONCE: u64 = u64::MAX;

/// Whether a layer's bytes can be read without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protection {
    Plain,
    Sealed([u8; PREFIX_BYTES]),
}

/// What a layer has of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) chunk: u32,
    pub(super) stored: u16,
    pub(super) zero: u16,
    pub(super) hash: Hash,
}

/// What a layer holds, and how that is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    protection: Protection,
    entries: Vec<Entry>,
}

/// Why a layer cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// What the file said.
    #[error("cannot write pages of memory")]
    Write(#[source] io::Error),
    /// The kernel gives no random bytes.
    #[error("the kernel gives no random bytes for a nonce")]
    Random(#[source] getrandom::Error),
    /// Pages come in ascending order, each once.
    #[error("page {page} came after page {after}: they must ascend")]
    Order {
        /// Which.
        page: u64,
        /// After which.
        after: u64,
    },
    /// There is no such page.
    #[error("page {page} is beyond the {pages} pages of the memory")]
    Range {
        /// Which.
        page: u64,
        /// How many there are.
        pages: u64,
    },
    /// Not the bytes of one page.
    #[error("{0} bytes were given for a page of {PAGE_BYTES}")]
    PageBytes(usize),
}

/// Why a layer cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The index is not what was written.
    #[error("the index of its memory is damaged")]
    Index,
    /// A chunk is not what was written.
    #[error("memory chunk {0} is damaged")]
    Chunk(u32),
    /// There is more in the file than was written.
    #[error("its file of memory pages is longer than it was written")]
    Length,
    /// The key is another snapshot's.
    #[error("the key does not open it")]
    Key,
    /// There is no key.
    #[error("it is encrypted, and there is no key")]
    NoKey,
    /// What the file said.
    #[error("cannot read pages of memory")]
    Read(#[source] io::Error),
    /// What the memory said.
    #[error("cannot fill memory")]
    Fill(#[source] io::Error),
}

/// Whether a file's chunks were found right before, and the file is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// They are hashed.
    Check,
    /// They were hashed since the host started.
    Checked,
}

/// What pages are put into.
pub trait Memory {
    /// Writes whole pages from this page on.
    ///
    /// # Errors
    /// When it cannot.
    fn write(&mut self, page: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes whole pages zero from this page on.
    ///
    /// # Errors
    /// When it cannot.
    fn zero(&mut self, page: u64, pages: u64) -> io::Result<()>;
}

/// A chunk whose pages are being given.
#[derive(Debug)]
struct Pending {
    chunk: u32,
    stored: u16,
    zero: u16,
    /// May hold a guest's secrets.
    bytes: Zeroizing<Vec<u8>>,
}

/// Takes the pages of a layer, in ascending order, and writes them as they come.
#[derive(Debug)]
pub struct LayerWriter<W> {
    pages: W,
    id: SnapshotId,
    /// How many pages the whole memory has.
    pages_max: u64,
    key: Option<SnapshotKey>,
    index: Index,
    pending: Pending,
    last: Option<u64>,
}

impl<W: Write> LayerWriter<W> {
    /// A writer of a layer of `id`, whose memory has `memory_bytes`; encrypts if there is a key.
    ///
    /// # Errors
    /// [`WriteError::Random`].
    pub fn new(
        pages: W,
        id: SnapshotId,
        memory_bytes: u64,
        key: Option<SnapshotKey>,
    ) -> Result<Self, WriteError> {
        let protection = if key.is_some() {
            let mut prefix = [0; PREFIX_BYTES];
            getrandom::fill(&mut prefix).map_err(WriteError::Random)?;
            Protection::Sealed(prefix)
        } else {
            Protection::Plain
        };
        Ok(Self {
            pages,
            id,
            pages_max: memory_bytes / PAGE_BYTES as u64,
            key,
            index: Index {
                protection,
                entries: Vec::new(),
            },
            pending: Pending {
                chunk: 0,
                stored: 0,
                zero: 0,
                bytes: Zeroizing::new(Vec::with_capacity(CHUNK_BYTES)),
            },
            last: None,
        })
    }

    /// The next page that differs from what the snapshot continues.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn page(&mut self, page: u64, bytes: &[u8]) -> Result<(), WriteError> {
        if bytes.len() != PAGE_BYTES {
            return Err(WriteError::PageBytes(bytes.len()));
        }
        if page >= self.pages_max {
            let pages = self.pages_max;
            return Err(WriteError::Range { page, pages });
        }
        if let Some(after) = self.last.filter(|last| page <= *last) {
            return Err(WriteError::Order { page, after });
        }
        let chunk = u32::try_from(page / u64::from(CHUNK_PAGES)).map_err(|_beyond| {
            let pages = u64::from(u32::MAX) * u64::from(CHUNK_PAGES);
            WriteError::Range { page, pages }
        })?;
        if chunk != self.pending.chunk {
            self.flush()?;
            self.pending.chunk = chunk;
        }
        self.last = Some(page);
        let bit = 1_u16 << (page % u64::from(CHUNK_PAGES));
        if is_zero(bytes) {
            self.pending.zero |= bit;
        } else {
            self.pending.stored |= bit;
            self.pending.bytes.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        let pending = &mut self.pending;
        if pending.stored | pending.zero == 0 {
            return Ok(());
        }
        let mut entry = Entry {
            chunk: pending.chunk,
            stored: pending.stored,
            zero: pending.zero,
            hash: Hash::of(&[]),
        };
        if pending.stored != 0 {
            let sealed = self.key.as_ref().zip(self.index.prefix());
            let sealed = sealed.map(|(key, prefix)| {
                let nonce = nonce(prefix, entry.chunk.into());
                key.seal_with(nonce, &entry.bond(self.id), &pending.bytes)
            });
            let bytes = sealed.as_deref().unwrap_or(&pending.bytes);
            entry.hash = Hash::of(bytes);
            self.pages.write_all(bytes).map_err(WriteError::Write)?;
        }
        self.index.entries.push(entry);
        zeroize::Zeroize::zeroize(&mut pending.bytes);
        (pending.stored, pending.zero) = (0, 0);
        Ok(())
    }

    /// Writes what is left; the file, and the index to be written beside it.
    ///
    /// # Errors
    /// [`WriteError::Write`].
    pub fn finish(mut self) -> Result<(W, Index, Vec<u8>), WriteError> {
        self.flush()?;
        self.pages.flush().map_err(WriteError::Write)?;
        let index = self.index.encode(self.id, self.key.as_ref());
        Ok((self.pages, self.index, index))
    }
}

impl Entry {
    /// What a chunk's encrypted pages are bound to.
    fn bond(&self, id: SnapshotId) -> Vec<u8> {
        let mut which = self.chunk.to_le_bytes().to_vec();
        which.extend(self.stored.to_le_bytes());
        which.extend(self.zero.to_le_bytes());
        bond("memory chunk", id, &which)
    }

    /// How many bytes of the file are this chunk's.
    fn bytes(&self, protection: Protection) -> usize {
        let tag = match protection {
            Protection::Sealed(_prefix) if self.stored != 0 => TAG_BYTES,
            Protection::Sealed(_) | Protection::Plain => 0,
        };
        self.stored.count_ones() as usize * PAGE_BYTES + tag
    }

    fn first_page(&self) -> u64 {
        u64::from(self.chunk) * u64::from(CHUNK_PAGES)
    }
}

impl Index {
    const fn prefix(&self) -> Option<[u8; PREFIX_BYTES]> {
        match self.protection {
            Protection::Plain => None,
            Protection::Sealed(prefix) => Some(prefix),
        }
    }

    /// How many pages are stored.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let stored = |entry: &Entry| u64::from(entry.stored.count_ones());
        self.entries.iter().map(stored).sum()
    }

    /// How many chunks have a page in the layer.
    #[must_use]
    pub const fn chunks(&self) -> usize {
        self.entries.len()
    }

    /// How long the file of pages is.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        let bytes = |entry: &Entry| entry.bytes(self.protection) as u64;
        self.entries.iter().map(bytes).sum()
    }

    /// What the layer has of each chunk, and where that begins in the file.
    pub(super) fn placed(&self) -> impl Iterator<Item = (Entry, u64)> {
        self.entries.iter().scan(0, |end, entry| {
            let at = *end;
            *end += entry.bytes(self.protection) as u64;
            Some((*entry, at))
        })
    }

    fn encode(&self, id: SnapshotId, key: Option<&SnapshotKey>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(START_BYTES + self.entries.len() * ENTRY_BYTES);
        bytes.extend(MAGIC);
        let count = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        bytes.extend(count.to_le_bytes());
        bytes.extend(u32::from(self.prefix().is_some()).to_le_bytes());
        bytes.extend(self.prefix().unwrap_or_default());
        for entry in &self.entries {
            bytes.extend(entry.chunk.to_le_bytes());
            bytes.extend(entry.stored.to_le_bytes());
            bytes.extend(entry.zero.to_le_bytes());
            bytes.extend(entry.hash.as_bytes());
        }
        if let Some((key, prefix)) = key.zip(self.prefix()) {
            let bound = bond("memory index", id, &bytes);
            bytes.extend(key.seal_with(nonce(prefix, INDEX_NONCE), &bound, &[]));
        }
        bytes
    }

    /// The index in `bytes`, for a memory of `memory_bytes`. Whether they are those that were
    /// written, the caller has seen by their hash; here nothing is believed that would not fit.
    ///
    /// # Errors
    /// [`ReadError::Index`], [`ReadError::NoKey`] and [`ReadError::Key`].
    pub fn decode(
        bytes: &[u8],
        id: SnapshotId,
        memory_bytes: u64,
        key: Option<&SnapshotKey>,
    ) -> Result<Self, ReadError> {
        let (start, rest) = bytes
            .split_first_chunk::<START_BYTES>()
            .ok_or(ReadError::Index)?;
        let mut start = Fields(start);
        if start.take()? != *MAGIC {
            return Err(ReadError::Index);
        }
        let count = u32::from_le_bytes(start.take()?) as usize;
        let is_sealed = u32::from_le_bytes(start.take()?);
        let prefix = start.take::<PREFIX_BYTES>()?;
        let protection = match is_sealed {
            0 if prefix == [0; PREFIX_BYTES] => Protection::Plain,
            1 => Protection::Sealed(prefix),
            _other => return Err(ReadError::Index),
        };
        let entries_bytes = count.checked_mul(ENTRY_BYTES).ok_or(ReadError::Index)?;
        let (list, tag) = rest
            .split_at_checked(entries_bytes)
            .ok_or(ReadError::Index)?;
        match protection {
            // A plain layer in the place of an encrypted one is not what was written.
            Protection::Plain if tag.is_empty() && key.is_none() => {}
            Protection::Sealed(prefix) if tag.len() == TAG_BYTES => {
                let key = key.ok_or(ReadError::NoKey)?;
                let bound = bond("memory index", id, &bytes[..bytes.len() - TAG_BYTES]);
                key.open_with(nonce(prefix, INDEX_NONCE), &bound, tag)
                    .ok_or(ReadError::Key)?;
            }
            Protection::Plain | Protection::Sealed(_) => return Err(ReadError::Index),
        }
        let entries = entries(list, memory_bytes.div_ceil(CHUNK_BYTES as u64))?;
        Ok(Self {
            protection,
            entries,
        })
    }

    /// Puts this layer's pages over those of `memory`, reading each byte of the file once.
    ///
    /// # Errors
    /// [`ReadError`]; the memory is then good for nothing.
    pub fn apply(
        &self,
        mut pages: impl Read,
        id: SnapshotId,
        key: Option<&SnapshotKey>,
        trust: Trust,
        memory: &mut impl Memory,
    ) -> Result<(), ReadError> {
        let mut buffer = Zeroizing::new(vec![0; CHUNK_BYTES + TAG_BYTES]);
        for entry in &self.entries {
            let bytes = buffer
                .get_mut(..entry.bytes(self.protection))
                .ok_or(ReadError::Index)?;
            pages
                .read_exact(bytes)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => ReadError::Chunk(entry.chunk),
                    _other => ReadError::Read(error),
                })?;
            if trust == Trust::Check && Hash::of(bytes) != entry.hash {
                return Err(ReadError::Chunk(entry.chunk));
            }
            match self.protection {
                Protection::Sealed(prefix) if entry.stored != 0 => {
                    let key = key.ok_or(ReadError::NoKey)?;
                    let text = key
                        .open_with(nonce(prefix, entry.chunk.into()), &entry.bond(id), bytes)
                        .ok_or(ReadError::Chunk(entry.chunk))?;
                    entry.put(&text, memory)
                }
                Protection::Sealed(_) | Protection::Plain => entry.put(bytes, memory),
            }
            .map_err(ReadError::Fill)?;
        }
        match pages.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_more) => Err(ReadError::Length),
            Err(error) => Err(ReadError::Read(error)),
        }
    }
}

impl Entry {
    fn put(&self, mut bytes: &[u8], memory: &mut impl Memory) -> io::Result<()> {
        for (first, count) in runs(self.zero) {
            memory.zero(self.first_page() + u64::from(first), count.into())?;
        }
        for (first, count) in runs(self.stored) {
            let (run, rest) = bytes.split_at(count as usize * PAGE_BYTES);
            memory.write(self.first_page() + u64::from(first), run)?;
            bytes = rest;
        }
        Ok(())
    }
}

/// The runs of set bits of a mask: the first one and how many.
fn runs(mask: u16) -> impl Iterator<Item = (u32, u32)> {
    let mut left = u32::from(mask);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros();
        let count = (left >> first).trailing_ones();
        left &= !(((1 << count) - 1) << first);
        Some((first, count))
    })
}

fn entries(list: &[u8], chunks: u64) -> Result<Vec<Entry>, ReadError> {
    let mut entries: Vec<Entry> = Vec::with_capacity(list.len() / ENTRY_BYTES);
    for fields in list.chunks_exact(ENTRY_BYTES) {
        let mut fields = Fields(fields);
        let entry = Entry {
            chunk: u32::from_le_bytes(fields.take()?),
            stored: u16::from_le_bytes(fields.take()?),
            zero: u16::from_le_bytes(fields.take()?),
            hash: Hash::from_bytes(fields.take()?),
        };
        let ascends = entries.last().is_none_or(|last| last.chunk < entry.chunk);
        let is_one_of_each = entry.stored & entry.zero == 0 && entry.stored | entry.zero != 0;
        if !ascends || !is_one_of_each || u64::from(entry.chunk) >= chunks {
            return Err(ReadError::Index);
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// Bytes that are taken from the front, piece by piece.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(ReadError::Index)?;
        self.0 = rest;
        Ok(*field)
    }
}

fn nonce(prefix: [u8; PREFIX_BYTES], number: u64) -> [u8; NONCE_BYTES] {
    let mut nonce = [0; NONCE_BYTES];
    nonce[..PREFIX_BYTES].copy_from_slice(&prefix);
    nonce[PREFIX_BYTES..].copy_from_slice(&number.to_le_bytes());
    nonce
}

/// Whether all bytes are zero; compared in words, since every page of a memory is looked at.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io;

    use proptest::prelude::*;
    use spore_wire::id::SnapshotId;

    use super::{
        CHUNK_BYTES, Index, LayerWriter, Memory, PAGE_BYTES, ReadError, Trust, WriteError, runs,
    };
    use crate::snapshot::key::SnapshotKey;

    const MEMORY_PAGES: u64 = 64;
    const MEMORY_BYTES: u64 = MEMORY_PAGES * PAGE_BYTES as u64;

    impl Memory for Vec<u8> {
        fn write(&mut self, page: u64, bytes: &[u8]) -> io::Result<()> {
            let at = usize::try_from(page).unwrap() * PAGE_BYTES;
            self[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn zero(&mut self, page: u64, pages: u64) -> io::Result<()> {
            let bytes = usize::try_from(pages).unwrap() * PAGE_BYTES;
            self.write(page, &vec![0; bytes])
        }
    }

    fn id(n: u8) -> SnapshotId {
        SnapshotId::from_bytes([n; 16])
    }

    fn page_of(value: u8) -> Vec<u8> {
        vec![value; PAGE_BYTES]
    }

    struct Layer {
        id: SnapshotId,
        key: Option<SnapshotKey>,
        pages: Vec<u8>,
        index: Vec<u8>,
    }

    fn layer(n: u8, pages: &BTreeMap<u64, u8>, key: Option<SnapshotKey>) -> Layer {
        let mut writer = LayerWriter::new(Vec::new(), id(n), MEMORY_BYTES, key.clone()).unwrap();
        for (page, value) in pages {
            writer.page(*page, &page_of(*value)).unwrap();
        }
        let (pages, index, bytes) = writer.finish().unwrap();
        assert_eq!(index.file_bytes(), pages.len() as u64);
        Layer {
            id: id(n),
            key,
            pages,
            index: bytes,
        }
    }

    fn apply(layer: &Layer, memory: &mut Vec<u8>) -> Result<(), ReadError> {
        let key = layer.key.as_ref();
        let index = Index::decode(&layer.index, layer.id, MEMORY_BYTES, key)?;
        index.apply(&layer.pages[..], layer.id, key, Trust::Check, memory)
    }

    fn some() -> BTreeMap<u64, u8> {
        BTreeMap::from([(0, 1), (3, 0), (4, 2), (17, 3), (40, 0)])
    }

    #[test]
    fn runs_are_found() {
        assert_eq!(runs(0).count(), 0);
        assert_eq!(runs(0xffff).collect::<Vec<_>>(), [(0, 16)]);
        assert_eq!(
            runs(0b1011_0001).collect::<Vec<_>>(),
            [(0, 1), (4, 2), (7, 1)]
        );
    }

    #[test]
    fn pages_must_ascend_and_exist_and_be_whole() {
        let writer = || LayerWriter::new(Vec::new(), id(1), MEMORY_BYTES, None).unwrap();
        let mut one = writer();
        one.page(5, &page_of(1)).unwrap();
        for page in [5, 4] {
            let refused = one.page(page, &page_of(1)).unwrap_err();
            assert!(
                matches!(refused, WriteError::Order { after: 5, .. }),
                "{refused}"
            );
        }
        let refused = writer().page(MEMORY_PAGES, &page_of(1)).unwrap_err();
        assert!(matches!(refused, WriteError::Range { .. }), "{refused}");
        let refused = writer().page(0, &[0; 7]).unwrap_err();
        assert!(matches!(refused, WriteError::PageBytes(7)), "{refused}");
    }

    #[test]
    fn zero_pages_take_no_room_and_hide_what_was_below() {
        let zeros = layer(1, &(0..MEMORY_PAGES).map(|page| (page, 0)).collect(), None);
        assert!(zeros.pages.is_empty());
        let mut memory = vec![9; usize::try_from(MEMORY_BYTES).unwrap()];
        apply(&zeros, &mut memory).unwrap();
        assert!(super::is_zero(&memory));
    }

    #[test]
    fn a_sealed_layer_shows_nothing_and_opens_with_its_key_only() {
        let key = SnapshotKey::from_bytes([7; 32]);
        let mut sealed = layer(1, &some(), Some(key));
        assert!(
            !sealed
                .pages
                .windows(32)
                .any(|run| run.iter().all(|b| *b == run[0]))
        );
        let mut memory = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
        apply(&sealed, &mut memory).unwrap();
        assert_eq!(memory[..PAGE_BYTES], page_of(1));
        sealed.key = Some(SnapshotKey::from_bytes([8; 32]));
        assert!(matches!(apply(&sealed, &mut memory), Err(ReadError::Key)));
        sealed.key = None;
        assert!(matches!(apply(&sealed, &mut memory), Err(ReadError::NoKey)));
    }

    #[test]
    fn a_sealed_layer_is_bound_to_its_snapshot() {
        let key = SnapshotKey::from_bytes([7; 32]);
        let mut sealed = layer(1, &some(), Some(key));
        sealed.id = id(2);
        let mut memory = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
        assert!(matches!(apply(&sealed, &mut memory), Err(ReadError::Key)));
    }

    #[test]
    fn chunks_cannot_be_left_out_of_a_sealed_index() {
        let key = SnapshotKey::from_bytes([7; 32]);
        let sealed = layer(1, &some(), Some(key.clone()));
        let mut index = Index::decode(&sealed.index, id(1), MEMORY_BYTES, Some(&key)).unwrap();
        index.entries.pop();
        let mut bytes = index.encode(id(1), None);
        bytes.extend(&sealed.index[sealed.index.len() - 16..]);
        let refused = Index::decode(&bytes, id(1), MEMORY_BYTES, Some(&key)).unwrap_err();
        assert!(matches!(refused, ReadError::Key), "{refused}");
    }

    #[test]
    fn every_flipped_byte_and_every_missing_or_added_one_is_named() {
        for key in [None, Some(SnapshotKey::from_bytes([7; 32]))] {
            let whole = layer(1, &some(), key.clone());
            let mut memory = vec![0; usize::try_from(MEMORY_BYTES).unwrap()];
            let index = Index::decode(&whole.index, id(1), MEMORY_BYTES, key.as_ref()).unwrap();
            let mut read =
                |pages: &[u8]| index.apply(pages, id(1), key.as_ref(), Trust::Check, &mut memory);
            let tag = if key.is_some() { 16 } else { 0 };
            let first = 2 * PAGE_BYTES + tag;
            for at in (0..whole.pages.len()).step_by(911) {
                let mut pages = whole.pages.clone();
                pages[at] ^= 0x10;
                let refused = read(&pages).unwrap_err();
                let chunk = u32::from(at >= first);
                assert!(
                    matches!(refused, ReadError::Chunk(n) if n == chunk),
                    "{at}: {refused}"
                );
                assert_eq!(
                    refused.to_string(),
                    format!("memory chunk {chunk} is damaged")
                );
            }
            let short = read(&whole.pages[..whole.pages.len() - 1]).unwrap_err();
            assert!(matches!(short, ReadError::Chunk(1)), "{short}");
            let long = read(&[&whole.pages[..], &[0]].concat()).unwrap_err();
            assert!(matches!(long, ReadError::Length), "{long}");
        }
    }

    #[test]
    fn an_index_that_would_not_fit_is_refused_whatever_its_hash() {
        let plain = layer(1, &some(), None);
        let decode = |bytes: &[u8]| Index::decode(bytes, id(1), MEMORY_BYTES, None);
        decode(&plain.index).unwrap();
        for end in 0..plain.index.len() {
            assert!(decode(&plain.index[..end]).is_err(), "{end}");
        }
        assert!(decode(&[&plain.index[..], &[0]].concat()).is_err());
        let smaller = Index::decode(&plain.index, id(1), CHUNK_BYTES as u64, None);
        assert!(smaller.is_err());
        let mut twice = plain.index.clone();
        twice.copy_within(32..72, 72);
        assert!(decode(&twice).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn layers_over_each_other_give_what_a_memory_would_hold(
            layers in proptest::collection::vec(
                (proptest::collection::btree_map(0..MEMORY_PAGES, 0..4_u8, 0..40), any::<bool>()),
                1..6,
            ),
        ) {
            let bytes = usize::try_from(MEMORY_BYTES).unwrap();
            let (mut model, mut memory) = (vec![0; bytes], vec![0; bytes]);
            for (number, (pages, is_sealed)) in (1..).zip(layers) {
                for (page, value) in &pages {
                    model.write(*page, &page_of(*value)).unwrap();
                }
                let key = is_sealed.then(|| SnapshotKey::from_bytes([number; 32]));
                apply(&layer(number, &pages, key), &mut memory).unwrap();
            }
            prop_assert!(model == memory);
        }

        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut start = b"SPOREIDX".to_vec();
            start.extend(bytes);
            drop(Index::decode(&start, id(1), MEMORY_BYTES, None));
        }
    }
}
