//! Records: what is stored, one noun per file with its keys.
//!
//! Used by the API and the reconcilers. A record is an internal type with a version of its own,
//! never an answer of the API; `api/` converts. A record of an unknown version is refused.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Entry;

pub mod account;
pub mod app;
pub mod former_secret;
pub mod idempotency;
pub mod image;
pub mod operation;
pub mod release;
pub mod removal;
pub mod sandbox;
pub mod secret;
pub mod snapshot_key;
pub mod source;
pub mod tag;

/// Something that is stored.
pub trait Record: Serialize + DeserializeOwned {
    /// For messages: `app`, `release`.
    const KIND: &'static str;
    /// The version that this build writes. One that reads older versions too says so in `decode`.
    const VERSION: u32;
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It was written by another Spore.
    #[error(
        "the {kind} record `{key}` has version {found}, and this Spore knows {known}: start the \
         Spore that wrote it, or restore a backup"
    )]
    Version {
        /// Which noun.
        kind: &'static str,
        /// Its key.
        key: String,
        /// What was found.
        found: u32,
        /// What this build knows.
        known: u32,
    },
    /// It is damaged.
    #[error("the {kind} record `{key}` is damaged: restore a backup of the store")]
    Damaged {
        /// Which noun.
        kind: &'static str,
        /// Its key.
        key: String,
        /// What the decoder said.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Serialize, serde::Deserialize)]
struct Envelope<T> {
    v: u32,
    record: T,
}

#[derive(serde::Deserialize)]
struct VersionOnly {
    v: u32,
}

/// The bytes of `record`.
///
/// # Panics
/// Never: a record has only string keys and no failing serialiser.
#[must_use]
pub fn encode<R: Record>(record: &R) -> Vec<u8> {
    let envelope = Envelope {
        v: R::VERSION,
        record,
    };
    serde_json::to_vec(&envelope).expect("records have string keys and cannot fail to encode")
}

/// The record in `entry`.
///
/// # Errors
/// When another version wrote it, or it is damaged.
pub fn decode<R: Record>(entry: &Entry) -> Result<R, RecordError> {
    let damaged = |source| RecordError::Damaged {
        kind: R::KIND,
        key: entry.key.clone(),
        source,
    };
    let version: VersionOnly = serde_json::from_slice(&entry.value).map_err(damaged)?;
    if version.v != R::VERSION {
        return Err(RecordError::Version {
            kind: R::KIND,
            key: entry.key.clone(),
            found: version.v,
            known: R::VERSION,
        });
    }
    let envelope: Envelope<R> = serde_json::from_slice(&entry.value).map_err(damaged)?;
    Ok(envelope.record)
}

/// A record with the version of its entry, for the condition of the next commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<R> {
    /// [`Entry::version`].
    pub version: u64,
    /// What is stored.
    pub record: R,
}

/// The record of `key`, if there is one.
///
/// # Errors
/// When the store cannot serve or the record cannot be read.
pub async fn load<R: Record>(
    store: &dyn super::Store,
    key: &str,
) -> Result<Option<Versioned<R>>, super::StoreError> {
    let Some(entry) = store.get(key).await? else {
        return Ok(None);
    };
    Ok(Some(Versioned {
        version: entry.version,
        record: decode(&entry)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::app::AppRecord;
    use super::secret::SecretRecord;
    use super::{decode, encode};
    use crate::store::Entry;

    #[test]
    fn records_of_before_secrets_had_versions_are_of_version_0() {
        let entry = |key: &str, record: &str| Entry {
            key: key.to_owned(),
            version: 1,
            value: format!("{{\"v\":1,\"record\":{record}}}").into_bytes(),
        };
        let app = "{\"created_at_ms\":0,\"enabled\":true,\"release\":1,\"next_release\":2,\
                   \"deploying\":null}";
        let app: AppRecord = decode(&entry("app/me/notes", app)).unwrap();
        let secret = "{\"revision\":7,\"sealed\":\"\",\"updated_at_ms\":0}";
        let secret: SecretRecord = decode(&entry("secret/me/notes/KEY", secret)).unwrap();
        assert_eq!((app.secrets_version, secret.since), (0, 0));
    }

    #[test]
    fn a_record_of_another_version_is_refused_with_what_to_do() {
        let text = String::from_utf8(encode(&AppRecord::new(0))).unwrap();
        let newer = text.replacen("\"v\":1", "\"v\":2", 1);
        assert_ne!(text, newer);
        let entry = Entry {
            key: "app/me/x".to_owned(),
            version: 1,
            value: newer.into_bytes(),
        };
        let error = decode::<AppRecord>(&entry).unwrap_err().to_string();
        assert!(
            error.contains("version 2") && error.contains("start the Spore"),
            "{error}"
        );
    }
}
