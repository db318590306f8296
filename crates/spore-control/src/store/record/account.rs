//! Accounts, their data keys and tokens.

use serde::{Deserialize, Serialize};
use spore_api::name::AccountName;

use super::Record;

/// An account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountRecord {
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for AccountRecord {
    const KIND: &'static str = "account";
    const VERSION: u32 = 1;
}

/// An account's data key, wrapped by the key provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataKeyRecord {
    /// Which key of the provider wraps it.
    pub provider_key: String,
    /// Base64.
    pub wrapped: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for DataKeyRecord {
    const KIND: &'static str = "data key";
    const VERSION: u32 = 1;
}

/// A token of an account. Only its hash is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Whose calls it makes.
    pub account: AccountName,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for TokenRecord {
    const KIND: &'static str = "token";
    const VERSION: u32 = 1;
}

/// The key of an account.
#[must_use]
pub fn account_key(account: &AccountName) -> String {
    format!("account/{account}")
}

/// All data keys begin with it.
pub const DATA_KEYS: &str = "data_key/";

/// The key of an account's data key.
#[must_use]
pub fn data_key_key(account: &AccountName) -> String {
    format!("{DATA_KEYS}{account}")
}

/// The key of a token: of its BLAKE3 hash, so that the store gives no token away and looking one
/// up takes a time that says nothing about it.
#[must_use]
pub fn token_key(token: &str) -> String {
    format!("token/{}", blake3::hash(token.as_bytes()).to_hex())
}
