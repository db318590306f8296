//! The overlay against a model, over a store that loses what was not flushed.

use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::layer::{
    CLUSTER_BYTES, DISK_BYTES_MAX, HEADER_BYTES, Layer, LayerError, data_start, header, layer_bytes,
};
use super::map::Map;
use super::{Access, Disk, Overlay};
use crate::disk::Raw;
use crate::disk::tests::file;

/// Five clusters and a part of one.
const BYTES: u64 = 5 * CLUSTER_BYTES + 3 * 512;
const NAME: super::BaseName = [7; 32];

#[test]
fn a_layer_is_as_long_as_the_wire_says() {
    for bytes in [
        1,
        512,
        CLUSTER_BYTES,
        CLUSTER_BYTES + 1,
        BYTES,
        1 << 30,
        DISK_BYTES_MAX,
    ] {
        assert_eq!(layer_bytes(bytes), spore_wire::launch::layer_bytes(bytes));
    }
}

/// What a store has, and what it would have after a loss of power.
#[derive(Debug)]
struct Inner {
    now: Vec<u8>,
    stable: Vec<u8>,
    /// How many flushes succeed until one fails.
    flushes: u32,
    writes_fail: bool,
}

/// A store in memory; all clones are the same.
#[derive(Clone, Debug)]
struct Store(Arc<Mutex<Inner>>, Access);

impl Store {
    fn new(content: Vec<u8>) -> Self {
        let inner = Inner {
            stable: content.clone(),
            now: content,
            flushes: u32::MAX,
            writes_fail: false,
        };
        Self(Arc::new(Mutex::new(inner)), Access::ReadWrite)
    }

    fn with<R>(&self, work: impl FnOnce(&mut Inner) -> R) -> R {
        work(&mut self.0.lock().unwrap())
    }

    /// Each sector that was not flushed is there or not, by chance.
    fn crash(&self, mut seed: u64) {
        self.with(|inner| {
            inner.flushes = u32::MAX;
            let sectors = inner.stable.chunks_mut(512).zip(inner.now.chunks(512));
            for (stable, now) in sectors.filter(|(stable, now)| stable != now) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                if seed & 1 == 1 {
                    stable.copy_from_slice(now);
                }
            }
            inner.now.clone_from(&inner.stable);
        });
    }
}

fn range(at: u64, bytes: usize) -> std::ops::Range<usize> {
    let at = usize::try_from(at).unwrap();
    at..at + bytes
}

impl Disk for Store {
    fn bytes(&self) -> u64 {
        self.with(|inner| inner.now.len() as u64)
    }

    fn access(&self) -> Access {
        self.1
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(|inner| into.copy_from_slice(&inner.now[range(at, into.len())]));
        Ok(())
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        self.with(|inner| {
            if inner.writes_fail {
                return Err(io::Error::from_raw_os_error(28));
            }
            inner.now[range(at, from.len())].copy_from_slice(from);
            Ok(())
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(|inner| {
            let left = inner.flushes.checked_sub(1);
            inner.flushes = left.ok_or(io::Error::from_raw_os_error(5))?;
            inner.stable.clone_from(&inner.now);
            Ok(())
        })
    }
}

/// A base whose sectors are all different.
fn base() -> Vec<u8> {
    (1..=BYTES / 512)
        .flat_map(|number| [number.to_le_bytes(); 64])
        .flatten()
        .collect()
}

fn layer() -> Store {
    Store::new(vec![0; usize::try_from(layer_bytes(BYTES)).unwrap()])
}

fn create(layer: &Store) -> Overlay<Store> {
    let layer = Layer::create(Box::new(layer.clone()), BYTES, &NAME);
    Overlay::new(Store::new(base()), layer.unwrap())
}

fn open(layer: &Store) -> Result<Overlay<Store>, LayerError> {
    let layer = Layer::open(Box::new(layer.clone()), BYTES, &NAME)?;
    Ok(Overlay::new(Store::new(base()), layer))
}

/// How many clusters are in the layer.
fn written(overlay: &Overlay<impl Disk>) -> usize {
    let map = overlay.layer().map();
    (0..6).filter(|cluster| map.has(*cluster)).count()
}

fn whole(disk: &mut impl Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(disk.bytes()).unwrap()];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_disk_is_its_base_until_it_is_written() {
    let layer = layer();
    let mut overlay = create(&layer);
    assert_eq!(overlay.bytes(), BYTES);
    assert_eq!(whole(&mut overlay), base());
    overlay.write(CLUSTER_BYTES - 512, &[9; 1024]).unwrap();
    let mut expected = base();
    expected[range(CLUSTER_BYTES - 512, 1024)].fill(9);
    assert_eq!(whole(&mut overlay), expected);
    assert_eq!(written(&overlay), 2);
    overlay.flush().unwrap();
    let mut again = open(&layer).unwrap();
    assert_eq!(whole(&mut again), expected);
}

#[test]
fn the_last_cluster_is_as_long_as_the_disk() {
    let layer = layer();
    let mut overlay = create(&layer);
    let last = 5 * CLUSTER_BYTES;
    overlay.write(last + 512, &[1; 512]).unwrap();
    overlay.write(last, &[2; 512]).unwrap();
    let mut expected = base();
    expected[range(last, 512)].fill(2);
    expected[range(last + 512, 512)].fill(1);
    assert_eq!(whole(&mut overlay), expected);
    assert!(overlay.write(last + 1024, &[3; 1024]).is_err());
    assert!(overlay.read(BYTES, &mut [0]).is_err());
    assert!(overlay.read(u64::MAX, &mut [0]).is_err());
    assert_eq!(whole(&mut overlay), expected);
}

#[test]
fn a_layer_that_nobody_writes_any_more_is_a_base() {
    let first = layer();
    let mut overlay = create(&first);
    overlay.write(0, &[1; 512]).unwrap();
    overlay.write(CLUSTER_BYTES, &[1; 512]).unwrap();
    overlay.flush().unwrap();
    let frozen = Store(first.0.clone(), Access::ReadOnly);
    let mut frozen = open(&frozen).unwrap();
    assert_eq!(frozen.access(), Access::ReadOnly);
    frozen.flush().unwrap();
    let over = Layer::create(Box::new(layer()), BYTES, &[8; 32]).unwrap();
    let mut fork = Overlay::new(frozen, over);
    fork.write(512, &[2; 512]).unwrap();
    let mut expected = base();
    expected[..512].fill(1);
    expected[512..1024].fill(2);
    expected[range(CLUSTER_BYTES, 512)].fill(1);
    assert_eq!(whole(&mut fork), expected);
    assert_eq!(written(&fork), 1);
}

#[test]
fn a_write_that_fails_leaves_the_base_to_be_read() {
    let layer = layer();
    let mut overlay = create(&layer);
    layer.with(|inner| inner.writes_fail = true);
    assert!(overlay.write(0, &[1; 512]).is_err());
    assert_eq!(written(&overlay), 0);
    layer.with(|inner| inner.writes_fail = false);
    assert_eq!(whole(&mut overlay), base());
}

#[test]
fn a_flush_that_failed_is_never_followed_by_one_that_succeeds() {
    for flushes in [0, 1] {
        let layer = layer();
        let mut overlay = create(&layer);
        overlay.write(0, &[1; 512]).unwrap();
        layer.with(|inner| inner.flushes = flushes);
        assert!(overlay.flush().is_err());
        layer.with(|inner| inner.flushes = 9);
        assert!(overlay.flush().is_err());
    }
}

#[test]
fn a_cluster_is_on_the_disk_before_its_bit_is() {
    let layer = layer();
    let mut overlay = create(&layer);
    overlay.flush().unwrap();
    overlay.write(0, &[1; 512]).unwrap();
    layer.with(|inner| inner.flushes = 0);
    assert!(overlay.flush().is_err());
    let bits = |inner: &mut Inner| inner.now[range(HEADER_BYTES, 1)][0];
    assert_eq!(layer.with(bits), 0, "not even on its way");
    // Nothing is flushed twice that did not change.
    layer.with(|inner| inner.flushes = 2);
    let mut again = open(&layer).unwrap();
    again.flush().unwrap();
    assert_eq!(layer.with(|inner| inner.flushes), 1);
}

#[test]
fn what_is_no_layer_of_this_disk_is_refused() {
    let refused = |change: fn(&mut Vec<u8>)| {
        let layer = layer();
        create(&layer).flush().unwrap();
        layer.with(|inner| change(&mut inner.now));
        open(&layer).map(drop).unwrap_err()
    };
    assert!(matches!(refused(|f| f[0] = 0), LayerError::Header));
    let error = refused(|file| file[4] = 2);
    assert!(matches!(error, LayerError::Format { found: 2 }));
    assert!(matches!(refused(|f| f[40] ^= 1), LayerError::Header));
    assert!(matches!(refused(|f| f[56] ^= 1), LayerError::Header));
    for (bytes, name) in [(BYTES - 512, NAME), (BYTES, [8; 32])] {
        let layer = layer();
        create(&layer).flush().unwrap();
        let other = header(bytes, &name);
        layer.with(|inner| inner.now[..other.len()].copy_from_slice(&other));
        assert!(matches!(open(&layer), Err(LayerError::Base)));
    }
    let behind = refused(|file| file[range(HEADER_BYTES, 1)][0] = 1 << 6);
    assert!(matches!(behind, LayerError::Map));
    let behind = refused(|file| file[range(HEADER_BYTES + 4095, 1)][0] = 1);
    assert!(matches!(behind, LayerError::Map));
    let short = refused(|file| file.truncate(file.len() - 512));
    assert!(matches!(short, LayerError::Length { .. }));
    assert!(matches!(open(&layer()), Err(LayerError::Header)));
}

#[test]
fn sizes_are_bounded() {
    #[derive(Debug)]
    struct Large(u64);
    impl Disk for Large {
        fn bytes(&self) -> u64 {
            self.0
        }
        fn access(&self) -> Access {
            Access::ReadOnly
        }
        fn read(&mut self, _at: u64, _into: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn write(&mut self, _at: u64, _from: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let create = |bytes, layer| Layer::create(Box::new(Large(layer)), bytes, &NAME);
    for bytes in [0, DISK_BYTES_MAX + 512, u64::MAX] {
        let error = create(bytes, 0);
        assert!(matches!(error, Err(LayerError::Disk { .. })));
    }
    let most = layer_bytes(DISK_BYTES_MAX);
    let layer = create(DISK_BYTES_MAX, most).unwrap();
    assert_eq!(layer.map().bytes().len(), 2 * 1024 * 1024);
    assert_eq!(data_start(512), CLUSTER_BYTES);
    assert_eq!(layer_bytes(512), 2 * CLUSTER_BYTES);
}

#[test]
fn a_layer_is_a_file_with_holes() {
    let (ours, other) = file(layer_bytes(BYTES));
    let layer = Raw::new(ours, Access::ReadWrite).unwrap();
    let layer = Layer::create(Box::new(layer), BYTES, &NAME).unwrap();
    let mut overlay = Overlay::new(Store::new(base()), layer);
    overlay.write(2 * CLUSTER_BYTES, &[5; 512]).unwrap();
    overlay.flush().unwrap();
    let stat = rustix::fs::fstat(&other).unwrap();
    assert_eq!(stat.st_size.unsigned_abs(), layer_bytes(BYTES));
    // Header and map, and one cluster.
    let used = stat.st_blocks.unsigned_abs() * 512;
    assert!(used <= CLUSTER_BYTES + 16 * 1024, "{used}");
}

#[test]
fn clusters_of_a_map_are_found_in_their_order() {
    let mut map = Map::new(40 * 4096 * 8 * CLUSTER_BYTES);
    assert_eq!(map.next(0), None);
    let all = [0, 1, 7, 8, 4096 * 8, 4096 * 8 * 40 - 1];
    all.iter().for_each(|cluster| map.set(*cluster));
    let mut other = Map::new(40 * 4096 * 8 * CLUSTER_BYTES);
    other.set(9);
    other.add(&map);
    for (map, wanted) in [(&map, &all[..]), (&other, &[0, 1, 7, 8, 9, 4096 * 8])] {
        let mut found = Vec::new();
        while let Some(next) = map.next(found.last().map_or(0, |last| last + 1)) {
            found.push(next);
        }
        assert_eq!(&found[..wanted.len()], wanted);
        assert_eq!(found.last(), all.last());
    }
    assert_eq!(map.next(u64::MAX), None);
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        bytes: u64,
        fill: u8,
    },
    Read {
        at: u64,
        bytes: u64,
    },
    Flush,
    /// Of the two flushes of one, so many succeed.
    FailedFlush(u32),
    Reopen,
    Crash(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = BYTES / 512;
    let range = (0..sectors).prop_flat_map(move |at| {
        let most = sectors - at;
        let bytes = prop_oneof![1..=most.min(8), 1..=most];
        (Just(at * 512), bytes.prop_map(|sectors| sectors * 512))
    });
    prop_oneof![
        6 => (range.clone(), any::<u8>())
            .prop_map(|((at, bytes), fill)| Step::Write { at, bytes, fill }),
        4 => range.prop_map(|(at, bytes)| Step::Read { at, bytes }),
        2 => Just(Step::Flush),
        1 => (0..2_u32).prop_map(Step::FailedFlush),
        1 => Just(Step::Reopen),
        1 => (1..=u64::MAX).prop_map(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// After a loss of power each sector is as it was flushed last or at some time since.
    #[test]
    fn a_disk_is_what_a_model_of_it_is_whatever_happens(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let layer = layer();
        let mut overlay = create(&layer);
        overlay.flush().unwrap();
        // The last flush, and what a flush that failed may have made last.
        let (mut now, mut possible) = (base(), vec![base()]);
        let mut has_failed = false;
        for step in steps {
            match step {
                Step::Write { at, bytes, fill } => {
                    let range = range(at, usize::try_from(bytes).unwrap());
                    now[range.clone()].fill(fill);
                    overlay.write(at, &now[range]).unwrap();
                }
                Step::Read { at, bytes } => {
                    let mut read = vec![0xee; usize::try_from(bytes).unwrap()];
                    overlay.read(at, &mut read).unwrap();
                    prop_assert_eq!(&read, &now[range(at, read.len())]);
                }
                Step::Flush | Step::Reopen => {
                    // It fails for ever once it has failed.
                    let done = overlay.flush().is_ok();
                    prop_assert_eq!(done, !has_failed);
                    if done {
                        possible = vec![now.clone()];
                        if matches!(step, Step::Reopen) {
                            overlay = open(&layer).unwrap();
                        }
                    }
                }
                Step::FailedFlush(count) => {
                    layer.with(|inner| inner.flushes = count);
                    match overlay.flush() {
                        Ok(()) => possible.clear(),
                        Err(_failed) => has_failed = true,
                    }
                    possible.push(now.clone());
                    layer.with(|inner| inner.flushes = u32::MAX);
                }
                Step::Crash(seed) => {
                    layer.crash(seed);
                    has_failed = false;
                    overlay = open(&layer).unwrap();
                    let found = whole(&mut overlay);
                    possible.push(now);
                    for (number, sector) in found.chunks(512).enumerate() {
                        let range = number * 512..number * 512 + 512;
                        let is_known = possible.iter().any(|one| one[range.clone()] == *sector);
                        prop_assert!(is_known, "sector {}", number);
                    }
                    possible = vec![found.clone()];
                    now = found;
                }
            }
        }
        prop_assert_eq!(whole(&mut overlay), now);
    }
}
