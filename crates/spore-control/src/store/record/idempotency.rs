//! Idempotency keys: what a repeated create means.

use serde::{Deserialize, Serialize};
use spore_api::name::AccountName;

use super::Record;

/// What the first call with a key did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyRecord {
    /// BLAKE3 of method, path and body: a repetition must be the same call.
    pub fingerprint: String,
    /// What it made: an operation's id, sandboxes' ids, or a snapshot's with its pauses.
    pub operation: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Record for IdempotencyRecord {
    const KIND: &'static str = "idempotency";
    const VERSION: u32 = 1;
}

/// All idempotency keys begin with it.
pub const KEYS: &str = "idempotency/";

/// The key of a client's key, hashed: it may be any text.
#[must_use]
pub fn idempotency_key(account: &AccountName, key: &str) -> String {
    let hash = blake3::hash(key.as_bytes());
    format!("{KEYS}{account}/{}", hash.to_hex())
}
