//! Encrypts and proves what goes to the disk of a VM's memory: XChaCha20-Poly1305, nothing else.
//!
//! Used by the node's store of snapshots, which decides on keys, nonces and what is bound to what.
//! A crate of its own for one reason: the cipher is generic, so it is compiled as whoever calls it
//! is, and without optimisation it takes minutes where it should take moments. The workspace
//! optimises this crate in every profile.
#![forbid(unsafe_code)]

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

/// The bytes of a key.
pub const KEY_BYTES: usize = 32;

/// The bytes of a nonce.
pub const NONCE_BYTES: usize = 24;

/// What encryption adds to a text.
pub const TAG_BYTES: usize = 16;

/// `text` under a nonce that must be new for this key, bound to `bound`.
///
/// # Panics
/// When the text is over 256 GiB.
#[must_use]
pub fn seal(key: &[u8; KEY_BYTES], nonce: [u8; NONCE_BYTES], bound: &[u8], text: &[u8]) -> Vec<u8> {
    let payload = Payload {
        msg: text,
        aad: bound,
    };
    XChaCha20Poly1305::new(key.into())
        .encrypt(&XNonce::from(nonce), payload)
        .expect("only texts over 256 GiB are refused")
}

/// What [`seal`] was given, or `None` when key, nonce, bond or text are others.
#[must_use]
pub fn open(
    key: &[u8; KEY_BYTES],
    nonce: [u8; NONCE_BYTES],
    bound: &[u8],
    sealed: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let payload = Payload {
        msg: sealed,
        aad: bound,
    };
    let cipher = XChaCha20Poly1305::new(key.into());
    let text = cipher.decrypt(&XNonce::from(nonce), payload).ok()?;
    Some(Zeroizing::new(text))
}

#[cfg(test)]
mod tests {
    use super::{TAG_BYTES, open, seal};

    #[test]
    fn a_text_opens_with_all_that_it_was_sealed_with_and_with_nothing_else() {
        let sealed = seal(&[1; 32], [2; 24], b"bond", b"canary");
        assert_eq!(sealed.len(), 6 + TAG_BYTES);
        let opened = open(&[1; 32], [2; 24], b"bond", &sealed).unwrap();
        assert_eq!(opened.as_slice(), b"canary");
        assert!(open(&[9; 32], [2; 24], b"bond", &sealed).is_none());
        assert!(open(&[1; 32], [9; 24], b"bond", &sealed).is_none());
        assert!(open(&[1; 32], [2; 24], b"", &sealed).is_none());
        assert!(open(&[1; 32], [2; 24], b"bond", &sealed[1..]).is_none());
    }
}
