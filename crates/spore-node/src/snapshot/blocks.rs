//! The proof of a disk layer's file: the hashes of its chunks of 64 KiB, holes left out.
//!
//! Called by the store. Reads the file as bytes: what format they have, and that a guest's VMM
//! wrote them, makes no difference here.
//!
//! ```text
//!   disk.N.index   "SPOREDSK"  length u64  count × { chunk u32, BLAKE3 }
//! ```
//!
//! Numbers are little-endian. A chunk that is not listed is all zero, whether or not the file
//! system has blocks for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::hash::Hash;
use super::pages::{CHUNK_BYTES, is_zero};

const MAGIC: &[u8; 8] = b"SPOREDSK";
const ENTRY_BYTES: u64 = 36;

/// What is wrong with a disk layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// Its file is longer or shorter.
    Length,
    /// This is the first chunk that is not as it was.
    Chunk(u32),
}

/// The index of `file` as it is now.
///
/// # Errors
/// What the kernel says.
pub(super) fn index(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    let mut bytes = MAGIC.to_vec();
    bytes.extend(length.to_le_bytes());
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while let Some(chunk) = next_data(file, at, length)? {
        let start = u64::from(chunk) * CHUNK_BYTES as u64;
        let end = length.min(start + CHUNK_BYTES as u64);
        let content = &mut buffer[..usize::try_from(end - start).map_err(io::Error::other)?];
        file.read_exact_at(content, start)?;
        if !is_zero(content) {
            bytes.extend(chunk.to_le_bytes());
            bytes.extend(Hash::of(content).as_bytes());
        }
        at = end;
    }
    Ok(bytes)
}

/// The chunk with the first data at or after `at`.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<u32>> {
    if at >= length {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => u32::try_from(data / CHUNK_BYTES as u64)
            .map(Some)
            .map_err(io::Error::other),
        // Only a hole is left.
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the file of which `now` is the index is not the one of which `then` is.
pub(super) fn difference(then: &[u8], now: &[u8]) -> Option<Difference> {
    if then == now {
        return None;
    }
    let start = MAGIC.len() + 8;
    if then.get(..start) != now.get(..start) {
        return Some(Difference::Length);
    }
    let (mut then, mut now) = (chunks(&then[start..]), chunks(&now[start..]));
    loop {
        match (then.next(), now.next()) {
            (Some(then), Some(now)) if then == now => {}
            (None, None) => return Some(Difference::Length),
            (then, now) => {
                let chunk = |chunk: Option<(u32, &[u8])>| chunk.map(|(number, _hash)| number);
                let first = chunk(then).into_iter().chain(chunk(now)).min();
                return Some(first.map_or(Difference::Length, Difference::Chunk));
            }
        }
    }
}

fn chunks(entries: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let entries = entries.chunks(usize::try_from(ENTRY_BYTES).unwrap_or(usize::MAX));
    entries.filter_map(|entry| {
        let (number, hash) = entry.split_first_chunk::<4>()?;
        Some((u32::from_le_bytes(*number), hash))
    })
}

/// The longest index that a file of `length` bytes can have.
pub(super) const fn index_bytes_max(length: u64) -> u64 {
    16 + length.div_ceil(CHUNK_BYTES as u64) * ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::{Difference, difference, index, index_bytes_max};

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len((1 << 30) + 100).unwrap();
        for (at, bytes) in [
            (0, vec![1; 70_000]),
            (64 << 20, vec![2; 10]),
            (1 << 30, vec![3; 100]),
        ] {
            file.write_all_at(&bytes, at).unwrap();
        }
        file
    }

    #[test]
    fn holes_are_not_read_and_not_listed() {
        let index = index(&sparse()).unwrap();
        assert_eq!(index.len(), 16 + 4 * 36);
        assert!((index.len() as u64) < index_bytes_max((1 << 30) + 100));
    }

    #[test]
    fn zeros_that_were_written_are_as_good_as_a_hole() {
        let file = sparse();
        let then = index(&file).unwrap();
        file.write_all_at(&[0; 200_000], 10 << 20).unwrap();
        assert_eq!(difference(&then, &index(&file).unwrap()), None);
    }

    #[test]
    fn every_change_is_named() {
        let file = sparse();
        let then = index(&file).unwrap();
        for (at, chunk) in [
            (0_u64, 0),
            (69_999, 1),
            // In a hole.
            (1 << 20, 16),
            (64 << 20, 1024),
            ((1 << 30) + 99, 16384),
        ] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            let now = index(&file).unwrap();
            assert_eq!(difference(&then, &now), Some(Difference::Chunk(chunk)));
            file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(difference(&then, &index(&file).unwrap()), None);
        for length in [1 << 30, (1 << 30) + 101] {
            file.set_len(length).unwrap();
            let now = index(&file).unwrap();
            assert_eq!(difference(&then, &now), Some(Difference::Length));
        }
    }
}
