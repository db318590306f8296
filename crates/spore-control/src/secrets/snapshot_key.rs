//! Keys of encrypted snapshots: made, sealed as secrets are, opened for a start and nowhere else.

use data_encoding::BASE64;
use spore_api::name::AccountName;
use spore_wire::id::SnapshotId;
use spore_wire::secret::SecretBytes;

use super::{KEY_BYTES, SecretsError, Vault, open, parts, seal};
use crate::store::record::snapshot_key::SnapshotKeyRecord;

impl Vault {
    /// A new key for a snapshot, and the record to store for it.
    ///
    /// # Errors
    /// When there is no data key and none can be made.
    pub async fn make_snapshot_key(
        &self,
        account: &AccountName,
        id: SnapshotId,
    ) -> Result<(SecretBytes, SnapshotKeyRecord), SecretsError> {
        let mut key = vec![0; KEY_BYTES];
        getrandom::fill(&mut key).map_err(SecretsError::Random)?;
        let key = SecretBytes::new(key);
        let data_key = self.data_key_or_new(account).await?;
        let sealed = seal(&data_key, &binding(account, id), key.expose())?;
        let record = SnapshotKeyRecord {
            sealed: BASE64.encode(&sealed),
            created_at_ms: self.clock.now().as_millisecond(),
        };
        Ok((key, record))
    }

    /// The key in `record`.
    ///
    /// # Errors
    /// When it was sealed for another snapshot, or with another key.
    pub async fn open_snapshot_key(
        &self,
        account: &AccountName,
        id: SnapshotId,
        record: &SnapshotKeyRecord,
    ) -> Result<SecretBytes, SecretsError> {
        let damaged = || SecretsError::DamagedSnapshotKey { id };
        let data_key = self.data_key(account).await?.ok_or_else(damaged)?;
        let sealed = BASE64
            .decode(record.sealed.as_bytes())
            .map_err(|_e| damaged())?;
        let key = open(&data_key, &binding(account, id), &sealed).ok_or_else(damaged)?;
        Ok(SecretBytes::new(key))
    }
}

fn binding(account: &AccountName, id: SnapshotId) -> Vec<u8> {
    parts(&[
        b"spore snapshot key 1",
        account.as_str().as_bytes(),
        id.as_bytes(),
    ])
}
