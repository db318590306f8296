//! Values of secrets that were replaced or removed while a VM may hold them: ciphertext only.
//!
//! Kept so that a later daemon can mask them in what such a VM prints. No VM is given one.

use serde::{Deserialize, Serialize};
use spore_api::name::{AccountName, AppName, SecretName};

use super::Record;
use super::secret::SecretRecord;

/// A value that a secret had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerSecretRecord {
    /// As it was stored.
    pub secret: SecretRecord,
    /// The last version of the app's secrets that had it.
    pub until: u64,
}

impl FormerSecretRecord {
    /// Whether a VM that was started at this version of its app's secrets was given it.
    #[must_use]
    pub const fn was_given_at(&self, version: u64) -> bool {
        self.secret.since <= version && version <= self.until
    }
}

impl Record for FormerSecretRecord {
    const KIND: &'static str = "former secret";
    const VERSION: u32 = 1;
}

/// All former values begin with it.
pub const FORMER_SECRETS: &str = "former-secret/";

/// The key of a value that a secret had.
#[must_use]
pub fn former_secret_key(
    account: &AccountName,
    app: &AppName,
    name: &SecretName,
    until: u64,
) -> String {
    format!("{FORMER_SECRETS}{account}/{app}/{name}/{until}")
}

/// The keys of what an app's secrets were begin with it.
#[must_use]
pub fn former_secrets_of(account: &AccountName, app: &AppName) -> String {
    format!("{FORMER_SECRETS}{account}/{app}/")
}

/// The name in a former value's key.
#[must_use]
pub fn name_of(key: &str) -> Option<SecretName> {
    key.rsplit('/').nth(1)?.parse().ok()
}
