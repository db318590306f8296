//! A copy of a disk as it was at one instant, in one layer.
//!
//! What the copy is over is the caller's to know: a copy of the layers that came since the disk was
//! made has every cluster of theirs, and one of everything has what is not zeros. One cluster is in
//! memory at a time, and a bit for each cluster of the disk. Layers are merged in the same way.

use std::io;

use super::Disk as _;
use super::overlay::layer::Layer;
use super::overlay::map::Map;
use super::overlay::{CLUSTER_BYTES, LayerError};
use super::scratch::Source;
use super::stack::Stack;

/// After so many clusters (16 MiB) what was copied is flushed, so that a guest that flushes does
/// not wait for all of a copy with its own, and the end of a copy is near when it is not wanted.
const FLUSHED_CLUSTERS: u32 = 256;

/// Why a copy is not whole.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Somebody did not want it any more.
    #[error("the copy is not wanted any more")]
    Unwanted,
    /// It was one of the layer that the guest writes.
    #[error("the guest was resumed before the copy was whole")]
    Resumed,
    /// There is nothing to be read.
    #[error("the disk's frozen layers cannot be opened")]
    Open(#[source] LayerError),
    /// Nobody knows what of the base is zeros.
    #[error("the disk's base cannot be looked through")]
    Base(#[source] io::Error),
    /// The disk cannot be read.
    #[error("the disk cannot be read at byte {at}")]
    Read {
        /// Where.
        at: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The layer cannot be written.
    #[error("the layer cannot be written at byte {at} of the disk")]
    Write {
        /// Where.
        at: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It cannot be made to last.
    #[error("the layer cannot be flushed")]
    Flush(#[source] io::Error),
}

/// Copies all of a source into a new layer, and returns when it is where a loss of power leaves it.
/// Asks between two clusters whether that is still wanted.
pub fn copy(
    source: &Source,
    to: &mut Layer,
    is_wanted: impl Fn() -> bool,
) -> Result<(), CopyError> {
    let mut from = source.open().map_err(CopyError::Open)?;
    let clusters = clusters(&from, &is_wanted)?;
    let below = match source.is_all() {
        true => Content::NotZeros,
        false => Content::Any,
    };
    transfer(
        &clusters,
        |at, cluster| from.read(at, cluster),
        to,
        below,
        is_wanted,
    )
}

/// Which clusters need not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// None of them.
    Any,
    /// Those of zeros: they are what is below.
    NotZeros,
}

/// Puts clusters into a layer and flushes it. Asks between two of them whether that is still
/// wanted.
pub(super) fn transfer(
    clusters: &Map,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    to: &mut Layer,
    content: Content,
    is_wanted: impl Fn() -> bool,
) -> Result<(), CopyError> {
    let mut cluster = Vec::new();
    let (mut next, mut unflushed) = (0, 0);
    while let Some(index) = clusters.next(next) {
        if !is_wanted() {
            return Err(CopyError::Unwanted);
        }
        let at = index * CLUSTER_BYTES;
        let whole = CLUSTER_BYTES.min(to.bytes() - at);
        cluster.resize(usize::try_from(whole).unwrap_or(0), 0);
        read(at, &mut cluster).map_err(|source| CopyError::Read { at, source })?;
        if content == Content::Any || cluster.iter().any(|byte| *byte != 0) {
            let written = to.write(at, &cluster);
            written.map_err(|source| CopyError::Write { at, source })?;
            unflushed += 1;
        }
        if unflushed == FLUSHED_CLUSTERS {
            to.flush().map_err(CopyError::Flush)?;
            unflushed = 0;
        }
        next = index + 1;
        // The guest's own reads and writes come first where there are few processors.
        std::thread::yield_now();
    }
    to.flush().map_err(CopyError::Flush)
}

/// The clusters that may be other than what is below the copy.
fn clusters(from: &Stack, is_wanted: &impl Fn() -> bool) -> Result<Map, CopyError> {
    let mut clusters = Map::new(from.bytes());
    for layer in from.layers() {
        clusters.add(layer.map());
    }
    let mut next = 0;
    while next < from.bytes()
        && let Some(data) = from.base().data(next).map_err(CopyError::Base)?
    {
        if !is_wanted() {
            return Err(CopyError::Unwanted);
        }
        let (first, end) = (data.start / CLUSTER_BYTES, data.end.div_ceil(CLUSTER_BYTES));
        (first..end).for_each(|cluster| clusters.set(cluster));
        next = end * CLUSTER_BYTES;
    }
    Ok(clusters)
}
