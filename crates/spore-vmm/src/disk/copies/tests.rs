//! Copies against a model of the disk, and with files that fail or make them wait.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use spore_wire::cause::chain;

use super::{BeginError, Copier, Copies, Progress};
use crate::disk::locked::KEY_BYTES;
use crate::disk::overlay::layer::{Layer, layer_bytes};
use crate::disk::overlay::{CLUSTER_BYTES, LayerError};
use crate::disk::scratch::{Below, LAYERS_MAX, LayerFile, Scratch, SwitchError, UpTo};
use crate::disk::stack::Base;
use crate::disk::tests::file;
use crate::disk::zeros::Zeros;
use crate::disk::{Access, Disk, Raw};
use crate::kvm::bell::Bell;

/// Seven clusters and a part of one.
const CLUSTERS: u64 = 8;
const BYTES: u64 = 7 * CLUSTER_BYTES + 3 * 512;

const NOTHING: Base = Base::Zeros(Zeros(BYTES));

/// A new layer's file, and its descriptor once more.
fn new(key: Option<u8>) -> (LayerFile, OwnedFd) {
    let (file, again) = file(layer_bytes(BYTES));
    let raw = Raw::new(file, Access::ReadWrite).unwrap();
    let key = key.map(|key| [key; KEY_BYTES]);
    (LayerFile::new(raw, key.as_ref()), again)
}

fn whole(disk: &mut impl Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(BYTES).unwrap()];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// A disk, its copies, and what tells that one is over.
struct Copied {
    disk: Scratch,
    copies: Copies,
    over: Arc<Bell>,
}

impl Copied {
    fn new(base: Base, given: Vec<LayerFile>, own: LayerFile) -> Self {
        let disk = Scratch::new(base, given, own).unwrap();
        let over = Arc::new(Bell::new().unwrap());
        let copies = Copies::new(Copier::start().unwrap(), disk.clone(), Arc::clone(&over));
        Self { disk, copies, over }
    }

    /// Over nothing, and with a cluster of ones written.
    fn with_ones() -> Self {
        let mut copied = Self::new(NOTHING, Vec::new(), new(None).0);
        copied.disk.write(0, &[1; 512]).unwrap();
        copied
    }

    fn wait(&self) -> Result<(), String> {
        let mut bell = [PollFd::from_borrowed_fd(self.over.as_fd(), PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut bell, Some(&limit)).unwrap(), 1, "never over");
        assert!(self.over.hear());
        match self.copies.progress() {
            Progress::Over(result) => result.map_err(|error| chain(&*error)),
            other => panic!("{other:?}"),
        }
    }
}

/// A file that has no room, or waits at each cluster until it may go on.
#[derive(Debug)]
struct Target {
    raw: Raw,
    gate: Option<Gate>,
}

#[derive(Debug)]
struct Gate {
    comes: Sender<()>,
    goes: Receiver<()>,
}

impl Disk for Target {
    fn bytes(&self) -> u64 {
        self.raw.bytes()
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.raw.read(at, into)
    }

    fn write(&mut self, at: u64, from: &[u8]) -> io::Result<()> {
        if at >= CLUSTER_BYTES {
            let Some(gate) = &self.gate else {
                return Err(rustix::io::Errno::NOSPC.into());
            };
            // A test that is over lets it go on.
            let _over = gate.comes.send(());
            let _over = gate.goes.recv();
        }
        self.raw.write(at, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.raw.flush()
    }
}

fn target(gate: Option<Gate>) -> Layer {
    let raw = Raw::new(file(layer_bytes(BYTES)).0, Access::ReadWrite).unwrap();
    Layer::create(Box::new(Target { raw, gate }), BYTES, &[0; 32]).unwrap()
}

/// A file that waits; who is told that it does; who lets it go on.
fn gated() -> (Layer, Receiver<()>, Sender<()>) {
    let ((comes, came), (go, goes)) = (channel(), channel());
    (target(Some(Gate { comes, goes })), came, go)
}

#[test]
fn a_copy_without_room_says_so_and_the_guest_goes_on() {
    let mut copied = Copied::with_ones();
    let begun = copied
        .copies
        .begin_in(target(None), Below::Source, UpTo::Written);
    begun.unwrap();
    let why = copied.wait().unwrap_err();
    assert!(
        why.contains("the layer cannot be written at byte 0"),
        "{why}"
    );
    assert!(why.contains("No space left"), "{why}");
    copied.disk.write(512, &[2; 512]).unwrap();
    copied.disk.flush().unwrap();
    copied.copies.switch(new(None).0).unwrap();
    let (to, _file) = new(None);
    copied
        .copies
        .begin(&to, Below::Source, UpTo::Frozen)
        .unwrap();
    copied.wait().unwrap();
}

#[test]
fn a_file_that_is_none_for_a_copy_leaves_the_one_that_is_there() {
    let copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    let short = Raw::new(file(4096).0, Access::ReadWrite).unwrap();
    let short = LayerFile::new(short, None);
    let refused = copied.copies.begin(&short, Below::Source, UpTo::Frozen);
    assert!(matches!(
        refused,
        Err(BeginError::To(LayerError::Length { found: 4096, .. }))
    ));
    assert!(matches!(copied.copies.progress(), Progress::UnderWay));
    drop(go);
    copied.wait().unwrap();
}

#[test]
fn a_host_that_cannot_read_a_frozen_layer_fails_the_copy_alone() {
    let (own, frozen) = new(Some(1));
    let mut copied = Copied::new(NOTHING, Vec::new(), own);
    copied.disk.write(0, &[1; 512]).unwrap();
    copied.disk.write(6 * CLUSTER_BYTES, &[2; 512]).unwrap();
    copied.copies.switch(new(None).0).unwrap();
    rustix::fs::ftruncate(&frozen, layer_bytes(BYTES) - 2 * CLUSTER_BYTES).unwrap();
    let (to, _file) = new(None);
    copied
        .copies
        .begin(&to, Below::Source, UpTo::Frozen)
        .unwrap();
    let why = copied.wait().unwrap_err();
    let where_it_was = format!("cannot be read at byte {}", 6 * CLUSTER_BYTES);
    assert!(why.contains(&where_it_was), "{why}");
    copied.disk.write(512, &[3; 512]).unwrap();
    let mut read = [0; 1024];
    copied.disk.read(0, &mut read).unwrap();
    assert_eq!((read[0], read[512]), (1, 3));
}

#[test]
fn a_copy_that_is_not_wanted_any_more_is_never_heard_of() {
    let copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    copied.copies.cancel();
    assert!(matches!(copied.copies.progress(), Progress::None));
    // The next one waits for its turn, and is told alone.
    let (to, _file) = new(None);
    copied
        .copies
        .begin(&to, Below::Source, UpTo::Written)
        .unwrap();
    assert!(!copied.over.hear());
    assert!(matches!(copied.copies.progress(), Progress::UnderWay));
    drop(go);
    copied.wait().unwrap();
    copied.copies.cancel();
    assert!(matches!(copied.copies.progress(), Progress::None));
    copied.copies.cancel();
}

#[test]
fn a_newer_copy_takes_the_place_of_an_older_one() {
    let copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    let (waits, _file) = new(None);
    let (newest, file) = new(Some(7));
    for to in [&waits, &newest] {
        copied
            .copies
            .begin(to, Below::Nothing, UpTo::Written)
            .unwrap();
    }
    drop(go);
    copied.wait().unwrap();
    assert!(!copied.over.hear());
    let layer = newest.open(BYTES, Access::ReadOnly).unwrap();
    assert_eq!(layer.map().next(0), Some(0));
    let waits = waits.open(BYTES, Access::ReadOnly).unwrap();
    assert_eq!(waits.map().next(0), None);
    drop(file);
}

#[test]
fn a_guest_that_goes_on_ends_a_copy_of_what_it_writes_and_no_other() {
    let mut copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    copied.copies.resume();
    let why = copied.wait().unwrap_err();
    assert!(why.contains("was resumed"), "{why}");
    drop(go);
    copied.copies.resume();
    copied.copies.switch(new(None).0).unwrap();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Frozen)
        .unwrap();
    came.recv().unwrap();
    copied.copies.resume();
    copied.disk.write(0, &[2; 512]).unwrap();
    drop(go);
    copied.wait().unwrap();
}

#[test]
fn layers_are_merged_beside_no_copy_and_a_disk_that_is_switched_for_ever_stays() {
    let mut copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    let mut switches = 0;
    let refused = loop {
        match copied.copies.switch(new(None).0) {
            Ok(()) => switches += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(switches, LAYERS_MAX);
    assert!(matches!(refused, SwitchError::Deep(None)), "{refused}");
    drop(go);
    copied.wait().unwrap();
    for fill in 0..40 {
        copied.disk.write(512, &[fill; 512]).unwrap();
        // As many as there is room for before the thread comes to it.
        while let Err(error) = copied.copies.switch(new(Some(fill)).0) {
            assert!(matches!(error, SwitchError::Deep(None)), "{error}");
            std::thread::yield_now();
        }
    }
    while copied.disk.is_deep() {
        std::thread::yield_now();
    }
    let mut read = [0; 1024];
    copied.disk.read(0, &mut read).unwrap();
    assert_eq!((read[0], read[512]), (1, 39));
}

#[test]
fn a_copy_that_waits_comes_before_layers_are_merged() {
    let mut copied = Copied::with_ones();
    let (to, came, go) = gated();
    copied
        .copies
        .begin_in(to, Below::Source, UpTo::Written)
        .unwrap();
    came.recv().unwrap();
    copied.copies.switch(new(None).0).unwrap();
    let (to, _file) = new(None);
    copied
        .copies
        .begin(&to, Below::Source, UpTo::Frozen)
        .unwrap();
    for fill in 2..=u8::try_from(LAYERS_MAX).unwrap() {
        copied.disk.write(0, &[fill; 512]).unwrap();
        copied.copies.switch(new(None).0).unwrap();
    }
    assert!(copied.disk.is_deep());
    drop(go);
    copied.wait().unwrap();
    let mut copy = Scratch::new(NOTHING, vec![to], new(None).0).unwrap();
    let mut read = [0; 512];
    copy.read(0, &mut read).unwrap();
    assert_eq!(read, [1; 512]);
    while copied.disk.is_deep() {
        std::thread::yield_now();
    }
}

#[test]
fn the_thread_ends_with_its_copies() {
    let copied = Copied::with_ones();
    let shared = Arc::downgrade(&copied.copies.shared);
    drop(copied);
    while shared.strong_count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_base_that_was_shortened_is_no_zeros() {
    let (base, other) = file(BYTES);
    rustix::io::pwrite(&base, &[1], 0).unwrap();
    let base = Base::File(Raw::new(base, Access::ReadOnly).unwrap());
    let copied = Copied::new(base, Vec::new(), new(None).0);
    rustix::fs::ftruncate(&other, CLUSTER_BYTES).unwrap();
    let (to, _file) = new(None);
    copied
        .copies
        .begin(&to, Below::Nothing, UpTo::Written)
        .unwrap();
    let why = copied.wait().unwrap_err();
    assert!(why.contains("cannot be looked through"), "{why}");
}

/// What happens to a disk.
#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        bytes: u64,
        fill: u8,
    },
    Switch {
        key: Option<u8>,
    },
    Copy {
        below: Below,
        up_to: UpTo,
        key: Option<u8>,
    },
}

fn write() -> impl Strategy<Value = (u64, u64, u8)> {
    let sectors = BYTES / 512;
    let range = (0..sectors).prop_flat_map(move |at| {
        let most = sectors - at;
        let bytes = prop_oneof![3 => 1..=most.min(8), 1 => 1..=most];
        (Just(at * 512), bytes.prop_map(|sectors| sectors * 512))
    });
    // Zeros are written too, over what is none.
    let fill = prop_oneof![Just(0), 1..=u8::MAX];
    (range, fill).prop_map(|((at, bytes), fill)| (at, bytes, fill))
}

fn step() -> impl Strategy<Value = Step> {
    let key = || prop::option::of(any::<u8>());
    let below = prop_oneof![Just(Below::Nothing), Just(Below::Source)];
    let up_to = prop_oneof![Just(UpTo::Frozen), Just(UpTo::Written)];
    prop_oneof![
        5 => write().prop_map(|(at, bytes, fill)| Step::Write { at, bytes, fill }),
        3 => key().prop_map(|key| Step::Switch { key }),
        2 => (below, up_to, key())
            .prop_map(|(below, up_to, key)| Step::Copy { below, up_to, key }),
    ]
}

fn clusters(at: u64, bytes: u64) -> std::ops::RangeInclusive<u64> {
    at / CLUSTER_BYTES..=(at + bytes - 1) / CLUSTER_BYTES
}

/// A disk as it should be.
#[derive(Clone, Default)]
struct Model {
    bytes: Vec<u8>,
    /// Which of its clusters were written since it was made.
    written: BTreeSet<u64>,
}

impl Model {
    fn write(&mut self, disk: &mut impl Disk, at: u64, bytes: u64, fill: u8) {
        let range = usize::try_from(at).unwrap()..usize::try_from(at + bytes).unwrap();
        self.bytes[range.clone()].fill(fill);
        self.written.extend(clusters(at, bytes));
        disk.write(at, &self.bytes[range]).unwrap();
    }

    /// What a copy has.
    fn copied(&self, below: Below) -> BTreeSet<u64> {
        if below == Below::Source {
            return self.written.clone();
        }
        let cluster = usize::try_from(CLUSTER_BYTES).unwrap();
        let all = (0..).zip(self.bytes.chunks(cluster));
        let some = all.filter(|(_number, bytes)| bytes.iter().any(|byte| *byte != 0));
        some.map(|(number, _bytes)| number).collect()
    }
}

/// A copy that was begun, and the disk that it should be.
struct Begun {
    to: LayerFile,
    below: Below,
    wanted: Model,
}

impl Begun {
    fn check(self, copied: &Copied, base: &Base, given: &[LayerFile]) {
        copied.wait().unwrap();
        let layer = self.to.open(BYTES, Access::ReadOnly).unwrap();
        let has = (0..CLUSTERS).filter(|cluster| layer.map().has(*cluster));
        assert_eq!(has.collect::<BTreeSet<_>>(), self.wanted.copied(self.below));
        let (base, mut layers) = match self.below {
            Below::Nothing => (NOTHING, Vec::new()),
            Below::Source => (base.clone(), given.to_vec()),
        };
        layers.push(self.to);
        let mut fork = Scratch::new(base, layers, new(None).0).unwrap();
        assert!(whole(&mut fork) == self.wanted.bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_copy_is_the_disk_as_it_was_while_the_disk_goes_on(
        data in prop::collection::vec((0..CLUSTERS - 1, any::<u8>()), 0..4),
        below in prop::collection::vec(prop::collection::vec(write(), 0..3), 0..3),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let (image, again) = file(BYTES);
        let mut now = Model { bytes: vec![0; usize::try_from(BYTES).unwrap()], ..Model::default() };
        for (cluster, fill) in data {
            let at = cluster * CLUSTER_BYTES + 4096;
            rustix::io::pwrite(&again, &[fill; 512], at).unwrap();
            let at = usize::try_from(at).unwrap();
            now.bytes[at..at + 512].fill(fill);
        }
        let base = Base::File(Raw::new(image, Access::ReadOnly).unwrap());
        let mut given = Vec::new();
        for (number, writes) in (0..).zip(below) {
            let (own, _file) = new(Some(number));
            let mut disk = Scratch::new(base.clone(), given.clone(), own.clone()).unwrap();
            for (at, bytes, fill) in writes {
                now.write(&mut disk, at, bytes, fill);
            }
            disk.flush().unwrap();
            given.push(own);
        }
        now.written.clear();
        let mut copied = Copied::new(base.clone(), given.clone(), new(Some(9)).0);
        let mut frozen = now.clone();
        let mut begun: Option<Begun> = None;
        for step in steps {
            match step {
                Step::Write { at, bytes, fill } => now.write(&mut copied.disk, at, bytes, fill),
                Step::Switch { key } => {
                    while let Err(error) = copied.copies.switch(new(key).0) {
                        prop_assert!(matches!(error, SwitchError::Deep(None)), "{}", error);
                    }
                    frozen = now.clone();
                }
                Step::Copy { below, up_to, key } => {
                    if let Some(begun) = begun.take() {
                        begun.check(&copied, &base, &given);
                    }
                    let (to, _file) = new(key);
                    copied.copies.begin(&to, below, up_to).unwrap();
                    let wanted = if up_to == UpTo::Frozen { &frozen } else { &now };
                    let one = Begun { to, below, wanted: wanted.clone() };
                    match up_to {
                        UpTo::Frozen => begun = Some(one),
                        UpTo::Written => one.check(&copied, &base, &given),
                    }
                }
            }
            // No matter how it is kept, it reads as it was written.
            let mut sector = [0; 512];
            copied.disk.read(now.bytes.len() as u64 - 512, &mut sector).unwrap();
            prop_assert_eq!(&sector[..], &now.bytes[now.bytes.len() - 512..]);
        }
        if let Some(begun) = begun {
            begun.check(&copied, &base, &given);
        }
        prop_assert!(whole(&mut copied.disk) == now.bytes);
    }
}
