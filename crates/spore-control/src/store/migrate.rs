//! Brings a store to the format of this build, or refuses it.
//!
//! Called once, when control starts, before anything else reads the store. The steps run in order,
//! each in commits of its own that may be repeated, and the number is raised after each.

use serde::{Deserialize, Serialize};

use super::record::{Record, decode, encode};
use super::{CommitError, Store, StoreError, Transaction};

/// The format that this build writes. A step from the one before is added with every raise.
pub const FORMAT: u64 = 1;

const KEY: &str = "format";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FormatRecord {
    format: u64,
}

impl Record for FormatRecord {
    const KIND: &'static str = "format";
    const VERSION: u32 = 1;
}

/// Brings `store` to [`FORMAT`].
///
/// # Errors
/// [`StoreError::Newer`] when a newer Spore wrote it.
pub async fn migrate(store: &dyn Store) -> Result<(), CommitError> {
    let found = match store.get(KEY).await? {
        None => 0,
        Some(entry) => {
            decode::<FormatRecord>(&entry)
                .map_err(StoreError::from)?
                .format
        }
    };
    if found > FORMAT {
        return Err(CommitError::Store(StoreError::Newer {
            found,
            known: FORMAT,
        }));
    }
    if found == 0 {
        let record = FormatRecord { format: FORMAT };
        let first = Transaction::default()
            .when(KEY, 0)
            .put(KEY, encode(&record));
        store.commit(first).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{FORMAT, FormatRecord, KEY, migrate};
    use crate::store::memory::MemoryStore;
    use crate::store::record::encode;
    use crate::store::{Store as _, Transaction};

    #[tokio::test]
    async fn a_store_of_a_newer_spore_is_refused_with_what_to_do() {
        let store = MemoryStore::default();
        migrate(&store).await.unwrap();
        migrate(&store).await.unwrap();
        let newer = encode(&FormatRecord { format: FORMAT + 1 });
        let write = Transaction::default().put(KEY, newer);
        store.commit(write).await.unwrap();
        let error = migrate(&store).await.unwrap_err().to_string();
        assert!(error.contains("start the newer Spore"), "{error}");
    }
}
