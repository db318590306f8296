//! Names that travel between processes: VM incarnations and image contents.
//!
//! Both are validated when decoded, since they become parts of paths.

use core::fmt;
use core::str::FromStr;

use data_encoding::{BASE32_NOPAD, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Serialize};

/// One incarnation of an app or sandbox: 128 random bits, shown as 26 characters of lower-case
/// base32 (RFC 4648, no padding).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId([u8; 16]);

/// The content of an image: the BLAKE3 hash of its file, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId([u8; 32]);

/// Why a text is not an id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Not 26 characters of lower-case base32.
    #[error("`{0}` is not a VM id: 26 characters a-z and 2-7 are expected")]
    Vm(String),
    /// Not 64 hexadecimal digits.
    #[error("`{0}` is not an image id: 64 digits 0-9 and a-f are expected")]
    Image(String),
}

impl VmId {
    /// A new id from the kernel's random numbers (`getrandom(2)`).
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The id with exactly these bits: for a simulator, whose chance comes from a seed.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl ImageId {
    /// The id of a content whose BLAKE3 hash is `hash`.
    #[must_use]
    pub const fn from_hash(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({self})")
    }
}

impl FromStr for VmId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError::Vm(text.chars().take(64).collect());
        if text.len() != 26 || text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let bytes = BASE32_NOPAD
            .decode(text.to_ascii_uppercase().as_bytes())
            .map_err(|_e| wrong())?;
        let bytes = <[u8; 16]>::try_from(bytes).map_err(|_e| wrong())?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for VmId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

impl FromStr for ImageId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError::Image(text.chars().take(80).collect());
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let bytes = HEXLOWER_PERMISSIVE
            .decode(text.as_bytes())
            .map_err(|_e| wrong())?;
        let hash = <[u8; 32]>::try_from(bytes).map_err(|_e| wrong())?;
        Ok(Self(hash))
    }
}

impl TryFrom<String> for ImageId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::{ImageId, VmId};

    #[test]
    fn a_random_id_reads_back() {
        let id = VmId::random().unwrap();
        assert_eq!(id.to_string().parse::<VmId>().unwrap(), id);
    }

    #[test]
    fn a_path_is_not_an_id() {
        for text in [
            "../../../../etc/passwd....",
            "",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "a/b",
        ] {
            assert!(text.parse::<VmId>().is_err(), "{text}");
            assert!(text.parse::<ImageId>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_image_id_is_its_hash_in_hexadecimal() {
        let id = ImageId::from_hash([0xab; 32]);
        assert_eq!(id.to_string(), "ab".repeat(32));
        assert_eq!(id.to_string().parse::<ImageId>().unwrap(), id);
    }
}
