//! Secrets at rest: envelope encryption.
//!
//! Used by the API (to seal) and by the app reconciler (to open, at a start and nowhere else).
//!
//! ```text
//!   provider's key ──wraps──▶ data key of an account ──seals──▶ each value
//!   (key file, 0600)          (stored wrapped)                  (stored, XChaCha20-Poly1305)
//! ```
//!
//! The associated data of a value binds account, app, name and revision: a ciphertext moved to
//! another place, or an older one put back, does not open. A plaintext is never stored, printed or
//! serialised here; it is wiped when dropped. A data key is made once per account and never
//! silently made again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use data_encoding::BASE64;
use spore_api::name::{AccountName, AppName, SecretName};
use spore_wire::id::SnapshotId;
use spore_wire::secret::SecretBytes;
use zeroize::Zeroizing;

use crate::clock::SharedClock;
use crate::store::record::account::{DataKeyRecord, data_key_key};
use crate::store::record::secret::SecretRecord;
use crate::store::record::{encode, load};
use crate::store::{CommitError, SharedStore, StoreError, Transaction};

mod key_file;
mod snapshot_key;
#[cfg(test)]
mod tests;

pub use key_file::{KeyFile, KeyFileError};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
/// Of Poly1305, behind each ciphertext.
const TAG_BYTES: usize = 16;

/// A key in memory, wiped when dropped.
pub type Key = Zeroizing<[u8; KEY_BYTES]>;

/// Keeps the outermost key: a file, or a service that never gives it away.
#[async_trait]
pub trait KeyProvider: Send + Sync + 'static {
    /// Names the key that [`KeyProvider::wrap`] uses, for messages and rotation.
    fn key_name(&self) -> String;

    /// Encrypts a data key, bound to `context`.
    ///
    /// # Errors
    /// When the provider does not serve.
    async fn wrap(&self, context: &[u8], key: &Key) -> Result<Vec<u8>, SecretsError>;

    /// Decrypts a data key.
    ///
    /// # Errors
    /// When the provider does not serve, or did not wrap it for this context.
    async fn unwrap(&self, context: &[u8], wrapped: &[u8]) -> Result<Key, SecretsError>;
}

/// Why a secret cannot be sealed or opened. No message holds a value.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// The provider's key is not the one that wrapped the data key.
    #[error(
        "the secrets of account `{account}` cannot be opened with the key `{key}`: put back the \
         key file that was in use when they were set, or set each secret again"
    )]
    WrongKey {
        /// Whose.
        account: String,
        /// The provider's.
        key: String,
    },
    /// A ciphertext was changed or moved.
    #[error("the secret `{name}` of `{app}` is damaged: set it again (`spore secret set`)")]
    Damaged {
        /// Whose.
        app: String,
        /// Which.
        name: String,
    },
    /// The sealed key of a snapshot was changed or moved.
    #[error("the key of the snapshot {id} is damaged: remove the snapshot and take it again")]
    DamagedSnapshotKey {
        /// Which.
        id: SnapshotId,
    },
    /// The kernel gives no random bytes.
    #[error("the kernel gave no random bytes")]
    Random(#[source] getrandom::Error),
    /// Encrypting failed.
    #[error("a value could not be encrypted")]
    Seal,
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Seals and opens secrets.
pub struct Vault {
    store: SharedStore,
    provider: Arc<dyn KeyProvider>,
    clock: SharedClock,
    keys: Mutex<HashMap<AccountName, Arc<Key>>>,
}

impl core::fmt::Debug for Vault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Vault")
    }
}

/// How long the value of `record` is.
#[must_use]
pub fn value_bytes(record: &SecretRecord) -> usize {
    let sealed = BASE64.decode_len(record.sealed.len()).unwrap_or(0);
    let padding = record
        .sealed
        .bytes()
        .rev()
        .take_while(|b| *b == b'=')
        .count();
    sealed.saturating_sub(padding + NONCE_BYTES + TAG_BYTES)
}

/// Where a secret belongs: what its ciphertext is bound to.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Whose.
    pub account: &'a AccountName,
    /// Of which app.
    pub app: &'a AppName,
    /// Which.
    pub name: &'a SecretName,
}

impl Vault {
    /// A vault over `store` with keys from `provider`.
    #[must_use]
    pub fn new(store: SharedStore, provider: Arc<dyn KeyProvider>, clock: SharedClock) -> Self {
        Self {
            store,
            provider,
            clock,
            keys: Mutex::default(),
        }
    }

    /// The record to store for `value`, the `revision`th at this place.
    ///
    /// # Errors
    /// When there is no data key and none can be made.
    pub async fn seal(
        &self,
        place: Place<'_>,
        revision: u64,
        value: &SecretBytes,
    ) -> Result<SecretRecord, SecretsError> {
        let key = self.data_key_or_new(place.account).await?;
        let sealed = seal(&key, &binding(place, revision), value.expose())?;
        Ok(SecretRecord {
            revision,
            sealed: BASE64.encode(&sealed),
            updated_at_ms: self.clock.now().as_millisecond(),
            since: 0,
        })
    }

    /// The value of `record`.
    ///
    /// # Errors
    /// When it was sealed for another place, or with another key.
    pub async fn open(
        &self,
        place: Place<'_>,
        record: &SecretRecord,
    ) -> Result<SecretBytes, SecretsError> {
        let damaged = || SecretsError::Damaged {
            app: place.app.to_string(),
            name: place.name.to_string(),
        };
        let key = self.data_key(place.account).await?.ok_or_else(damaged)?;
        let sealed = BASE64
            .decode(record.sealed.as_bytes())
            .map_err(|_e| damaged())?;
        let value = open(&key, &binding(place, record.revision), &sealed).ok_or_else(damaged)?;
        Ok(SecretBytes::new(value))
    }

    async fn data_key_or_new(&self, account: &AccountName) -> Result<Arc<Key>, SecretsError> {
        match self.data_key(account).await? {
            Some(key) => Ok(key),
            None => self.make_data_key(account).await,
        }
    }

    async fn data_key(&self, account: &AccountName) -> Result<Option<Arc<Key>>, SecretsError> {
        if let Some(key) = self.cached().get(account) {
            return Ok(Some(Arc::clone(key)));
        }
        let stored = load::<DataKeyRecord>(&*self.store, &data_key_key(account)).await?;
        let Some(stored) = stored else {
            return Ok(None);
        };
        let wrong = || SecretsError::WrongKey {
            account: account.to_string(),
            key: self.provider.key_name(),
        };
        let wrapped = BASE64
            .decode(stored.record.wrapped.as_bytes())
            .map_err(|_e| wrong())?;
        let key = Arc::new(self.provider.unwrap(&context(account), &wrapped).await?);
        self.cached().insert(account.clone(), Arc::clone(&key));
        Ok(Some(key))
    }

    async fn make_data_key(&self, account: &AccountName) -> Result<Arc<Key>, SecretsError> {
        let mut key = Key::default();
        getrandom::fill(&mut *key).map_err(SecretsError::Random)?;
        let wrapped = self.provider.wrap(&context(account), &key).await?;
        let record = DataKeyRecord {
            provider_key: self.provider.key_name(),
            wrapped: BASE64.encode(&wrapped),
            created_at_ms: self.clock.now().as_millisecond(),
        };
        let at = data_key_key(account);
        let transaction = Transaction::default()
            .when(&at, 0)
            .put(&at, encode(&record));
        match self.store.commit(transaction).await {
            Ok(_) => {
                let key = Arc::new(key);
                self.cached().insert(account.clone(), Arc::clone(&key));
                Ok(key)
            }
            // Somebody made it at the same time: that one counts.
            Err(CommitError::Conflict { .. }) => {
                let made = self.data_key(account).await?;
                made.ok_or(SecretsError::Seal)
            }
            Err(CommitError::Store(error)) => Err(error.into()),
        }
    }

    fn cached(&self) -> std::sync::MutexGuard<'_, HashMap<AccountName, Arc<Key>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn context(account: &AccountName) -> Vec<u8> {
    parts(&[b"spore data key 1", account.as_str().as_bytes()])
}

fn binding(place: Place<'_>, revision: u64) -> Vec<u8> {
    parts(&[
        b"spore secret 1",
        place.account.as_str().as_bytes(),
        place.app.as_str().as_bytes(),
        place.name.as_str().as_bytes(),
        &revision.to_le_bytes(),
    ])
}

/// Each part with its length in front, so that no two lists of parts look alike.
fn parts(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// A random nonce, then the ciphertext. 192 bits of nonce never meet again by chance.
fn seal(key: &Key, binding: &[u8], value: &[u8]) -> Result<Vec<u8>, SecretsError> {
    let mut nonce = [0_u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(SecretsError::Random)?;
    let payload = Payload {
        msg: value,
        aad: binding,
    };
    let cipher = XChaCha20Poly1305::new((&**key).into());
    let sealed = cipher
        .encrypt(&XNonce::from(nonce), payload)
        .map_err(|_e| SecretsError::Seal)?;
    Ok([&nonce[..], &sealed].concat())
}

fn open(key: &Key, binding: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    let payload = Payload {
        msg: sealed,
        aad: binding,
    };
    let cipher = XChaCha20Poly1305::new((&**key).into());
    cipher.decrypt(&XNonce::from(*nonce), payload).ok()
}
