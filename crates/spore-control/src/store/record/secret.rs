//! Secrets: ciphertext only.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, AppName, SecretName};

use super::Record;

/// A secret's value, encrypted with its account's data key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretRecord {
    /// Bound into the ciphertext: an older value cannot be put back in its place.
    pub revision: u64,
    /// Base64 of nonce and ciphertext.
    pub sealed: String,
    /// Milliseconds since the Unix epoch.
    pub updated_at_ms: i64,
    /// The version of the app's secrets that it came with.
    #[serde(default)]
    pub since: u64,
}

impl Record for SecretRecord {
    const KIND: &'static str = "secret";
    const VERSION: u32 = 1;
}

/// All secrets begin with it.
pub const SECRETS: &str = "secret/";

/// The key of a secret.
#[must_use]
pub fn secret_key(account: &AccountName, app: &AppName, name: &SecretName) -> String {
    format!("{SECRETS}{account}/{app}/{name}")
}

/// The keys of an app's secrets begin with it.
#[must_use]
pub fn secrets_of(account: &AccountName, app: &AppName) -> String {
    format!("{SECRETS}{account}/{app}/")
}

/// The name in a secret's key.
#[must_use]
pub fn name_of(key: &str) -> Option<SecretName> {
    key.rsplit_once('/')?.1.parse().ok()
}
