//! Names that travel between processes: VMs, snapshots, image contents, and traces.
//!
//! All are validated when decoded, since they become parts of paths and of log lines.

use core::fmt;
use core::str::FromStr;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use serde::{Deserialize, Serialize};

/// One VM of an app or sandbox: 128 random bits, shown as 26 characters of lower-case
/// base32 (RFC 4648, no padding).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId([u8; 16]);

/// One snapshot: 128 random bits, shown as a [`VmId`] is. Knowing it gives no right to it: what
/// bears it is looked for inside one account.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId([u8; 16]);

/// The content of an image: the BLAKE3 hash of its file, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId([u8; 32]);

/// One request on its way through the processes: 128 bits, shown as 32 hexadecimal digits, as the
/// trace-id of W3C Trace Context is. For logs only: nothing is decided by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TraceId([u8; 16]);

/// Why a text is not an id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Not 26 characters of lower-case base32.
    #[error("`{0}` is not a VM id: 26 characters a-z and 2-7 are expected")]
    Vm(String),
    /// Not 26 characters of lower-case base32.
    #[error("`{0}` is not a snapshot id: 26 characters a-z and 2-7 are expected")]
    Snapshot(String),
    /// Not 64 hexadecimal digits.
    #[error("`{0}` is not an image id: 64 digits 0-9 and a-f are expected")]
    Image(String),
    /// Not 32 hexadecimal digits.
    #[error("`{0}` is not a trace id: 32 digits 0-9 and a-f are expected")]
    Trace(String),
}

impl ImageId {
    /// The id of a content whose BLAKE3 hash is `hash`.
    #[must_use]
    pub const fn from_hash(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

/// What the ids of 128 random bits have in common.
macro_rules! random_id {
    ($type:ident, $wrong:path) => {
        impl $type {
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

            /// The bits.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }

        impl FromStr for $type {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let wrong = || $wrong(text.chars().take(64).collect());
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

        impl TryFrom<String> for $type {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(id: $type) -> Self {
                id.to_string()
            }
        }
    };
}

random_id!(VmId, IdError::Vm);
random_id!(SnapshotId, IdError::Snapshot);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
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
        digits(text).map(Self).ok_or_else(wrong)
    }
}

/// The bytes that lower-case hexadecimal digits stand for.
fn digits<const N: usize>(text: &str) -> Option<[u8; N]> {
    let bytes = HEXLOWER.decode(text.as_bytes()).ok()?;
    bytes.try_into().ok()
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TraceId({self})")
    }
}

impl FromStr for TraceId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError::Trace(text.chars().take(64).collect());
        digits(text).map(Self).ok_or_else(wrong)
    }
}

impl TryFrom<String> for TraceId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<TraceId> for String {
    fn from(id: TraceId) -> Self {
        id.to_string()
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
    use super::{ImageId, SnapshotId, TraceId, VmId};

    #[test]
    fn a_random_id_reads_back() {
        let id = VmId::random().unwrap();
        assert_eq!(id.to_string().parse::<VmId>().unwrap(), id);
        let id = SnapshotId::random().unwrap();
        assert_eq!(id.to_string().parse::<SnapshotId>().unwrap(), id);
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
            assert!(text.parse::<SnapshotId>().is_err(), "{text}");
            assert!(text.parse::<ImageId>().is_err(), "{text}");
            assert!(text.parse::<TraceId>().is_err(), "{text}");
        }
    }

    #[test]
    fn hexadecimal_ids_are_lower_case_and_whole() {
        let text = "0123456789abcdef0123456789abcdef";
        assert_eq!(text.parse::<TraceId>().unwrap().to_string(), text);
        assert!(text.to_uppercase().parse::<TraceId>().is_err());
        assert!(text[1..].parse::<TraceId>().is_err());
        assert!(text.repeat(2).to_uppercase().parse::<ImageId>().is_err());
    }

    #[test]
    fn an_image_id_is_its_hash_in_hexadecimal() {
        let id = ImageId::from_hash([0xab; 32]);
        assert_eq!(id.to_string(), "ab".repeat(32));
        assert_eq!(id.to_string().parse::<ImageId>().unwrap(), id);
    }
}
