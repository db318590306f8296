//! Secrets: named values, write-only through this interface.

use core::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::name::SecretName;

/// A secret, without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    /// Its name.
    pub name: SecretName,
    /// When its value was last set, RFC 3339, UTC.
    pub updated_at: String,
    /// Whether the live release asks for it.
    pub used: bool,
}

/// `PUT …/secrets/{name}`. Takes effect at the next start of the app.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutSecret {
    /// At most 64 KiB, without NUL.
    pub value: String,
}

impl fmt::Debug for PutSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PutSecret { value: *** }")
    }
}
