//! What a VMM has written of its guest's memory, seen from outside.
//!
//! Called by `capture.rs` while the guest is paused, and by `frozen.rs` of a copy of the VMM while
//! the guest runs. The kernel knows it (proc(5), pagemap): a page
//! of a private mapping that is present and no page of the file was copied because it was written
//! to. Reads the VMM's memory and never writes it; what is read is a tenant's, and never more than
//! the size of the guest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use zeroize::Zeroizing;

use crate::hypervisor::memory_image::{CapturedPages, MEMFD_NAME, PAGE_BYTES, PageRun};
use crate::sys;

/// Pagemap entries that are read at once.
const ENTRIES: usize = 64 * 1024;

const ENTRY_BYTES: usize = 8;

/// Room for what a guest writes between the two looks at it, beyond a quarter.
const ROOM_MORE: usize = 4 << 20;

/// What is copied between two looks whether it is wanted; whole pages.
const STEP_BYTES: u64 = 16 << 20;

/// Bits of an entry: in memory, in swap, a page of a file or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// How a VMM has its guest's memory mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// What it writes is in the file.
    Shared,
    /// What it writes is its own.
    Private,
}

/// Where the guest's memory is in the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) sharing: Sharing,
}

/// Finds the memory of `bytes` bytes, the file `inode`, in the VMM `pid`.
pub(super) fn find(pid: u32, inode: u64, bytes: u64) -> io::Result<Mapping> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    parse(&maps, inode, bytes).ok_or_else(|| missing(pid, bytes))
}

/// Finds the mapping of a memory of `bytes` bytes in the VMM `pid`, as the names in its
/// `/proc/PID/map_files` have it, by the name of its file, which the node gave it.
pub(in crate::hypervisor) fn find_memory(pid: u32, bytes: u64) -> io::Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let name = format!("/memfd:{MEMFD_NAME}");
    let mut of_it = maps.lines().filter(|line| line.contains(&name));
    let found = of_it.find_map(|line| {
        let inode = line.split_whitespace().nth(4)?.parse().ok()?;
        let start = parse(line, inode, bytes)?.start;
        Some((start, start.checked_add(bytes)?))
    });
    found.ok_or_else(|| missing(pid, bytes))
}

/// The pages of its guest's memory, of `bytes` bytes, that the VMM `pid` has of its own while it
/// shares the rest. Blocks.
pub(in crate::hypervisor) fn own(pid: u32, bytes: u64) -> io::Result<Vec<PageRun>> {
    let (start, _end) = find_memory(pid, bytes)?;
    let sharing = Sharing::Private;
    Reader::open(pid, Mapping { start, sharing }, bytes)?.runs()
}

fn missing(pid: u32, bytes: u64) -> io::Error {
    io::Error::other(format!(
        "the VMM {pid} does not map the {bytes} bytes of its guest's memory"
    ))
}

/// Lines of proc(5)'s maps: `from-to rwxp offset device inode path`.
fn parse(maps: &str, inode: u64, bytes: u64) -> Option<Mapping> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        let access = fields.next()?;
        let whole = fields.next()?.bytes().all(|digit| digit == b'0');
        // Of a file without a name only the number says which it is.
        let of = fields.nth(1)?.parse::<u64>().ok()?;
        if !whole || of != inode || !fields.next()?.starts_with("/memfd:") {
            return None;
        }
        let [start, end] = [from, to].map(|text| u64::from_str_radix(text, 16).ok());
        let start = start?;
        (end?.checked_sub(start)? == bytes).then_some(Mapping {
            start,
            sharing: match access.ends_with('s') {
                true => Sharing::Shared,
                false => Sharing::Private,
            },
        })
    })
}

/// Copies the pages of a private mapping that are the VMM's own.
#[derive(Debug)]
pub(super) struct Reader {
    pid: u32,
    start: u64,
    pages: u64,
    pagemap: File,
    entries: Vec<u8>,
    room: Zeroizing<Vec<u8>>,
}

impl Reader {
    /// Of a mapping of `bytes` bytes in the VMM `pid`.
    pub(super) fn open(pid: u32, mapping: Mapping, bytes: u64) -> io::Result<Self> {
        Ok(Self {
            pid,
            start: mapping.start,
            pages: bytes / PAGE_BYTES,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            entries: vec![0; ENTRIES * ENTRY_BYTES],
            room: Zeroizing::default(),
        })
    }

    /// How many bytes the pages have as they are now. Blocks.
    pub(super) fn own_bytes(&mut self) -> io::Result<usize> {
        sum(&self.runs()?)
    }

    /// Takes room for so many bytes and some more, while the guest runs: nothing needs to be asked
    /// of the kernel once it stands still.
    pub(super) fn make_room(&mut self, own: usize) {
        // Written to, so that the kernel has given it: what is only zero it gives when it is used.
        self.room = Zeroizing::new(vec![0xff; own + more(own)]);
    }

    /// The pages as they are now, unless they are not `wanted` any more meanwhile. Blocks.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::Interrupted`] when they are not wanted.
    pub(super) fn copy(mut self, wanted: &dyn Fn() -> bool) -> io::Result<CapturedPages> {
        let runs = self.runs()?;
        let total = sum(&runs)?;
        if total > self.room.len() {
            self.room = Zeroizing::new(vec![0; total]);
        }
        self.room.truncate(total);
        let mut rest: &mut [u8] = &mut self.room;
        for ranges in steps(self.start, &runs) {
            if !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let bytes: u64 = ranges.iter().map(|(_, bytes)| bytes).sum();
            let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
            let (now, later) = rest.split_at_mut(bytes);
            sys::read_process(self.pid, &ranges, now)?;
            rest = later;
        }
        Ok(CapturedPages::new(runs, self.room))
    }

    fn runs(&mut self) -> io::Result<Vec<PageRun>> {
        let mut runs = Vec::new();
        let mut page = 0;
        while page < self.pages {
            let left = usize::try_from(self.pages - page);
            let wanted = left.map_or(ENTRIES, |left| left.min(ENTRIES));
            let entries = &mut self.entries[..wanted * ENTRY_BYTES];
            let at = (self.start / PAGE_BYTES + page) * ENTRY_BYTES as u64;
            self.pagemap.read_exact_at(entries, at)?;
            page = note(&mut runs, page, entries);
        }
        Ok(runs)
    }
}

/// The addresses of runs of pages and their bytes, so many bytes at a time, of a mapping that
/// starts there.
fn steps(start: u64, runs: &[PageRun]) -> Vec<Vec<(u64, u64)>> {
    let mut steps = vec![Vec::new()];
    let mut room = STEP_BYTES;
    for run in runs {
        let mut at = start + run.first * PAGE_BYTES;
        let end = at + run.pages * PAGE_BYTES;
        while at < end {
            if room == 0 {
                steps.push(Vec::new());
                room = STEP_BYTES;
            }
            let bytes = room.min(end - at);
            if let Some(step) = steps.last_mut() {
                step.push((at, bytes));
            }
            at += bytes;
            room -= bytes;
        }
    }
    steps
}

/// What a guest may write beyond what it has, between the two looks at it.
pub(super) const fn more(own: usize) -> usize {
    own / 4 + ROOM_MORE
}

fn sum(runs: &[PageRun]) -> io::Result<usize> {
    let total: u64 = runs.iter().map(|run| run.pages * PAGE_BYTES).sum();
    usize::try_from(total).map_err(io::Error::other)
}

/// Adds the own pages among `entries`, which are of pages from `page` on; gives the next page.
fn note(runs: &mut Vec<PageRun>, mut page: u64, entries: &[u8]) -> u64 {
    for entry in entries.as_chunks::<ENTRY_BYTES>().0 {
        let entry = u64::from_ne_bytes(*entry);
        if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
            match runs.last_mut() {
                Some(run) if run.first + run.pages == page => run.pages += 1,
                _ => runs.push(PageRun {
                    first: page,
                    pages: 1,
                }),
            }
        }
        page += 1;
    }
    page
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::ErrorKind;

    use super::{
        Mapping, OF_FILE, PRESENT, Reader, STEP_BYTES, SWAPPED, Sharing, note, parse, steps,
    };
    use crate::hypervisor::memory_image::{PAGE_BYTES, PageRun};

    #[test]
    fn pages_are_copied_in_steps_for_as_long_as_they_are_wanted() {
        let step = STEP_BYTES / PAGE_BYTES;
        let run = |first, pages| PageRun { first, pages };
        let all = steps(0, &[run(1, 2), run(5, step - 2), run(step + 9, 2 * step)]);
        let page = |number: u64| number * PAGE_BYTES;
        let expected = vec![
            vec![(page(1), page(2)), (page(5), page(step - 2))],
            vec![(page(step + 9), STEP_BYTES)],
            vec![(page(2 * step + 9), STEP_BYTES)],
        ];
        assert_eq!(all, expected);

        let text = vec![7_u8; 3 * usize::try_from(STEP_BYTES).unwrap()];
        let from = (text.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
        let reader = || {
            let mapping = Mapping {
                start: from,
                sharing: Sharing::Private,
            };
            Reader::open(std::process::id(), mapping, 2 * STEP_BYTES + PAGE_BYTES).unwrap()
        };
        let pages = reader().copy(&|| true).unwrap();
        assert_eq!(pages.len_bytes() as u64, 2 * STEP_BYTES + PAGE_BYTES);
        assert!(
            pages
                .iter()
                .all(|(_, bytes)| bytes.iter().all(|byte| *byte == 7))
        );
        let asked = Cell::new(0);
        let wanted = || asked.replace(asked.get() + 1) == 0;
        let refused = reader().copy(&wanted).unwrap_err();
        assert_eq!((refused.kind(), asked.get()), (ErrorKind::Interrupted, 2));
    }

    const MAPS: &str = "\
55d5e0000000-55d5e0400000 r--p 00000000 08:01 1 /usr/bin/qemu-system-x86_64
7f0000000000-7f0000001000 rw-s 00000000 00:01 5 /memfd:vmm-output (deleted)
7f1000000000-7f1000008000 rw-p 00000000 00:01 6 /memfd:guest-memory (deleted)
7f2000001000-7f2000009000 rw-s 00001000 00:01 7 /memfd:guest-memory (deleted)
7f3000000000-7f3000010000 rw-s 00000000 00:01 8 /memfd:guest-memory (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
";

    #[test]
    fn the_memory_is_found_by_file_size_and_beginning() {
        let private = Mapping {
            start: 0x7f10_0000_0000,
            sharing: Sharing::Private,
        };
        assert_eq!(parse(MAPS, 6, 0x8000), Some(private));
        let shared = Mapping {
            start: 0x7f30_0000_0000,
            sharing: Sharing::Shared,
        };
        assert_eq!(parse(MAPS, 8, 0x10000), Some(shared));
        for (inode, bytes) in [(6, 0x7000), (7, 0x8000), (0, 0x21000), (1, 0x400000)] {
            assert_eq!(parse(MAPS, inode, bytes), None);
        }
        assert_eq!(parse("rubbish\n\n-\n", 1, 1), None);
    }

    #[test]
    fn own_pages_are_those_in_memory_or_swap_that_are_not_the_files() {
        let of_file = PRESENT | OF_FILE;
        let first = [0, PRESENT, PRESENT | 7, of_file, SWAPPED];
        let second = [SWAPPED, of_file, OF_FILE | SWAPPED, PRESENT];
        let bytes = |entries: &[u64]| -> Vec<u8> {
            entries
                .iter()
                .flat_map(|entry| entry.to_ne_bytes())
                .collect()
        };
        let mut runs = Vec::new();
        let next = note(&mut runs, 10, &bytes(&first));
        assert_eq!(note(&mut runs, next, &bytes(&second)), 19);
        let expected = [(11, 2), (14, 2), (18, 1)];
        let expected = expected.map(|(first, pages)| PageRun { first, pages });
        assert_eq!(runs, expected);
    }
}
