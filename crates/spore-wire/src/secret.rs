//! Bytes that must not be printed: secret values on their way to a guest.
//!
//! Used by [`crate::guest`] and [`crate::node`]. `Debug` never shows the value, and the memory is
//! wiped on drop. The value is serialised (that is its purpose), as base64.

use core::fmt;

use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A secret value of at most [`SECRET_BYTES_MAX`] bytes.
#[derive(Clone, Default, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SecretBytes(Vec<u8>);

/// The most bytes one secret value may have.
pub const SECRET_BYTES_MAX: usize = 64 * 1024;

impl SecretBytes {
    /// Takes ownership of `bytes`; the caller keeps no copy.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The value, for the one place that hands it on.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes(***)")
    }
}

impl Serialize for SecretBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = Zeroizing::new(BASE64.encode(&self.0));
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for SecretBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let bytes = BASE64
            .decode(text.as_bytes())
            .map_err(|_e| serde::de::Error::custom("a secret value that is not base64"))?;
        if bytes.len() > SECRET_BYTES_MAX {
            return Err(serde::de::Error::custom("a secret value over 64 KiB"));
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::SecretBytes;

    #[test]
    fn debug_never_shows_the_value() {
        let secret = SecretBytes::new(b"hunter2".to_vec());
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    #[test]
    fn a_value_survives_its_encoding() {
        let secret = SecretBytes::new(vec![0, 255, 10]);
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(serde_json::from_str::<SecretBytes>(&text).unwrap(), secret);
    }
}
