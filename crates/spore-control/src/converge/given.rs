//! Which values of an app's secrets its VMs hold.
//!
//! An app counts the changes of its secrets, and a VM is started with that version. A value that is
//! replaced or removed is kept, sealed as it was, while a VM may hold it: a later daemon tells the
//! VM's node exactly what the VM was given, so that it is masked. A new VM is given present values
//! alone.

use spore_api::limits::{SECRETS_BYTES_PER_APP_MAX, SECRETS_PER_APP_MAX};
use spore_api::name::SecretName;
use spore_wire::id::VmId;
use spore_wire::secret::SecretBytes;

use super::{AppRef, Converge};
use crate::secrets::{Place, SecretsError, value_bytes};
use crate::store::record::former_secret::{
    FormerSecretRecord, former_secret_key, former_secrets_of, name_of,
};
use crate::store::record::release::Rules;
use crate::store::record::secret::{SecretRecord, secret_key};
use crate::store::record::{decode, encode, load};
use crate::store::{StoreError, Transaction, every};

/// As many sets of secrets as VMs of one app can differ in: one serves, one is tried, and each may
/// be followed while it ends.
const SETS_MAX: usize = 4;

/// What a VM is given.
pub(super) struct Given {
    pub(super) version: u64,
    pub(super) environment: Vec<(String, SecretBytes)>,
    pub(super) files: Vec<(String, SecretBytes)>,
}

/// Why that cannot be said.
#[derive(Debug, thiserror::Error)]
pub(super) enum GivenError {
    #[error("the secret `{name}` is not set: `spore secret set {app} {name}`, then try again")]
    NoSecret { app: String, name: SecretName },
    #[error(
        "the value of the secret `{name}` that it was given is not known any more: end it with \
         `spore stop {app}`, and the next request starts the app with the present values"
    )]
    NotKept { app: String, name: SecretName },
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A value that a secret had.
struct Former {
    key: String,
    name: SecretName,
    record: FormerSecretRecord,
}

impl Converge {
    /// What a new VM of these rules is given; or, with the version that one was started at, what
    /// that one was.
    pub(super) async fn given(
        &self,
        app: &AppRef,
        rules: &Rules,
        at: Option<u64>,
    ) -> Result<Given, GivenError> {
        loop {
            let now = self.secrets_version(app).await?;
            let given = self.given_at(app, rules, (at.unwrap_or(now), now)).await;
            // After a change in the middle some are values of before it, and some of after it.
            if self.secrets_version(app).await? == now {
                return given;
            }
        }
    }

    async fn given_at(
        &self,
        app: &AppRef,
        rules: &Rules,
        (version, now): (u64, u64),
    ) -> Result<Given, GivenError> {
        let former = if version < now {
            self.former_secrets(app).await?
        } else {
            Vec::new()
        };
        let mut given = Given {
            version,
            environment: Vec::with_capacity(rules.secret_names.len()),
            files: Vec::with_capacity(rules.secret_files.len()),
        };
        for (names, values) in [
            (&rules.secret_names, &mut given.environment),
            (&rules.secret_files, &mut given.files),
        ] {
            for name in names {
                let mut former = former.iter();
                let was = former.find(|it| it.name == *name && it.record.was_given_at(version));
                let record = match was {
                    Some(was) => was.record.secret.clone(),
                    None => self.present_secret(app, name, (version, now)).await?,
                };
                let place = Place {
                    account: &app.account,
                    app: &app.app,
                    name,
                };
                let value = self.inner.vault.open(place, &record).await?;
                values.push((name.to_string(), value));
            }
        }
        Ok(given)
    }

    /// The present value, if it was so at that version already. A store that was put back from a
    /// backup knows nothing of versions after its own.
    async fn present_secret(
        &self,
        app: &AppRef,
        name: &SecretName,
        (version, now): (u64, u64),
    ) -> Result<SecretRecord, GivenError> {
        let key = secret_key(&app.account, &app.app, name);
        let stored = load::<SecretRecord>(&*self.inner.store, &key).await?;
        let (app, name) = (app.app.to_string(), name.clone());
        match stored.map(|stored| stored.record) {
            Some(record) if (record.since..=now).contains(&version) => Ok(record),
            None if version == now => Err(GivenError::NoSecret { app, name }),
            _ => Err(GivenError::NotKept { app, name }),
        }
    }

    async fn secrets_version(&self, app: &AppRef) -> Result<u64, StoreError> {
        let stored = self.app_record(app).await?;
        Ok(stored.map_or(0, |stored| stored.record.secrets_version))
    }

    async fn former_secrets(&self, app: &AppRef) -> Result<Vec<Former>, StoreError> {
        let prefix = former_secrets_of(&app.account, &app.app);
        let mut former = Vec::new();
        for entry in every(&*self.inner.store, &prefix).await? {
            let record = decode(&entry)?;
            let key = entry.key;
            former.extend(name_of(&key).map(|name| Former { key, name, record }));
        }
        Ok(former)
    }

    /// Adds to a change of a secret that what it was until then is kept. Beyond what the VMs of an
    /// app can hold it is not: a value must be replaceable at any time, and a node that is not told
    /// all of a VM's secrets keeps nothing of what the VM prints.
    ///
    /// # Errors
    /// When the store did not serve.
    pub(crate) async fn keep_former(
        &self,
        app: &AppRef,
        name: &SecretName,
        secret: &SecretRecord,
        until: u64,
        change: Transaction,
    ) -> Result<Transaction, StoreError> {
        let kept = self.former_secrets(app).await?;
        let bytes = kept.iter().map(|former| value_bytes(&former.record.secret));
        let bytes = bytes.sum::<usize>() + value_bytes(secret);
        let is_full = kept.len() >= SETS_MAX * SECRETS_PER_APP_MAX
            || bytes > SETS_MAX * SECRETS_BYTES_PER_APP_MAX;
        if is_full {
            tracing::warn!(%app, %name, "what a secret was is not kept: there is much already");
            return Ok(change);
        }
        let key = former_secret_key(&app.account, &app.app, name, until);
        let record = FormerSecretRecord {
            secret: secret.clone(),
            until,
        };
        Ok(change.put(key, encode(&record)))
    }

    /// Forgets what secrets were that no VM holds; and what is suspended with them, when there is
    /// no VM at all but one that `begins`, which has not been given any yet.
    ///
    /// # Errors
    /// When the store did not serve.
    pub(crate) async fn forget_unheld(
        &self,
        app: &AppRef,
        begins: Option<VmId>,
    ) -> Result<(), StoreError> {
        loop {
            let Some(stored) = self.app_record(app).await? else {
                return Ok(());
            };
            if !stored.record.secrets_changed {
                return Ok(());
            }
            // Looked at behind the record: a VM that is not there yet reads its secrets later, and
            // gets none that was former by then.
            let held: Vec<_> =
                self.with_life(app, |life, _| life.secrets_versions(begins).collect());
            let mut forget = Transaction::default();
            for former in self.former_secrets(app).await? {
                let holds = |at: &Option<u64>| at.is_none_or(|at| former.record.was_given_at(at));
                if !held.iter().any(holds) {
                    forget = forget.delete(former.key);
                }
            }
            let mut record = stored.record.clone();
            if held.is_empty() {
                record.suspended = None;
                record.secrets_changed = false;
            } else if forget.writes.is_empty() {
                return Ok(());
            }
            if self.write_app(app, Some(&stored), &record, forget).await? {
                return Ok(());
            }
        }
    }
}
