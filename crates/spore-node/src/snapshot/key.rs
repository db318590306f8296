//! The key of one snapshot, and what is bound to it.
//!
//! Used by the store when a snapshot is sealed or opened. Control makes the key and keeps it; here
//! it lives as long as the call. Never written anywhere, never printed.
//!
//! Everything is XChaCha20-Poly1305 under the one key, told apart by its associated data: a chunk
//! of memory, the state and the key of a disk layer cannot stand in for each other, nor for those
//! of another snapshot.

use std::collections::BTreeMap;

pub(super) use spore_seal::{NONCE_BYTES, TAG_BYTES};
use spore_wire::id::SnapshotId;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// The key of one snapshot.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SnapshotKey([u8; 32]);

/// The keys of a snapshot and of those that it continues.
pub type Keys = BTreeMap<SnapshotId, SnapshotKey>;

impl SnapshotKey {
    /// The key with these bytes, which came from a generator of random numbers.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key with these bytes, if they are 32.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }

    /// The key of this snapshot's disk layer `layer`, so that nothing of it can stand in for memory
    /// or for another layer.
    pub(super) fn of_disk(&self, layer: usize) -> Self {
        let mut material = Zeroizing::new([0; 40]);
        material[..32].copy_from_slice(&self.0);
        material[32..].copy_from_slice(&(layer as u64).to_le_bytes());
        Self(blake3::derive_key("spore snapshot disk layer", &*material))
    }

    /// `text` under a given nonce, which must be new for this key.
    pub(super) fn seal_with(&self, nonce: [u8; NONCE_BYTES], bound: &[u8], text: &[u8]) -> Vec<u8> {
        spore_seal::seal(&self.0, nonce, bound, text)
    }

    /// What `seal_with` was given, or `None` when key, nonce, bond or text are others.
    pub(super) fn open_with(
        &self,
        nonce: [u8; NONCE_BYTES],
        bound: &[u8],
        sealed: &[u8],
    ) -> Option<Zeroizing<Vec<u8>>> {
        spore_seal::open(&self.0, nonce, bound, sealed)
    }

    /// `text` under a random nonce, which goes before it.
    pub(super) fn seal(&self, bound: &[u8], text: &[u8]) -> Result<Vec<u8>, getrandom::Error> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce)?;
        let mut sealed = nonce.to_vec();
        sealed.extend(self.seal_with(nonce, bound, text));
        Ok(sealed)
    }

    /// What `seal` was given.
    pub(super) fn open(&self, bound: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>()?;
        self.open_with(*nonce, bound, sealed)
    }
}

impl std::fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SnapshotKey(***)")
    }
}

/// What a text is bound to: what it is, of which snapshot, and which of its kind.
pub(super) fn bond(what: &str, id: SnapshotId, which: &[u8]) -> Vec<u8> {
    [what.as_bytes(), b"\0", id.as_bytes(), which].concat()
}

#[cfg(test)]
mod tests {
    use spore_wire::id::SnapshotId;

    use super::{SnapshotKey, bond};

    #[test]
    fn a_sealed_text_opens_only_with_its_key_and_its_bond() {
        let key = SnapshotKey::from_bytes([7; 32]);
        let id = SnapshotId::from_bytes([1; 16]);
        let state = bond("state", id, &[]);
        let sealed = key.seal(&state, b"canary").unwrap();
        assert_eq!(key.open(&state, &sealed).unwrap().as_slice(), b"canary");
        assert_ne!(sealed, key.seal(&state, b"canary").unwrap());
        let other = SnapshotId::from_bytes([2; 16]);
        for bound in [
            bond("state", other, &[]),
            bond("disk", id, &[]),
            bond("state", id, &[0]),
        ] {
            assert!(key.open(&bound, &sealed).is_none());
        }
        let stranger = SnapshotKey::from_bytes([8; 32]);
        assert!(stranger.open(&state, &sealed).is_none());
        assert!(key.open(&state, &sealed[..20]).is_none());
        assert_eq!(format!("{key:?}"), "SnapshotKey(***)");
    }
}
