//! Secrets: names and times come out, values only go in.

use axum::Json as Answer;
use axum::extract::{Path, State};
use http::StatusCode;
use spore_api::error::ErrorCode;
use spore_api::limits::{SECRET_BYTES_MAX, SECRETS_BYTES_PER_APP_MAX, SECRETS_PER_APP_MAX};
use spore_api::name::SecretName;
use spore_api::page::{Page, PageQuery};
use spore_api::secret::{PutSecret, Secret};
use spore_wire::secret::SecretBytes;

use super::Shared;
use super::body::{InPath, Query, SecretValue};
use super::error::Fault;
use super::page::page;
use crate::clock::rfc3339;
use crate::converge::deploy::{DeployError, Removing};
use crate::converge::{AppRef, Converge};
use crate::domain::RuleError;
use crate::domain::app::one_more_app;
use crate::secrets::{Place, value_bytes};
use crate::store::record::app::{AppRecord, apps_of};
use crate::store::record::removal::removal_key;
use crate::store::record::secret::{SecretRecord, name_of, secret_key, secrets_of};
use crate::store::record::{decode, encode, load};
use crate::store::{Order, StoreError, Transaction, every};

/// Lists an app's secrets, without their values.
#[utoipa::path(get, path = "/api/v1/apps/{app}/secrets", tag = "secrets",
    params(("app" = String, Path), PageQuery),
    responses((status = 200, body = Page<Secret>)))]
pub(super) async fn list(
    State(api): State<Shared>,
    InPath(app): InPath,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<Secret>>, Fault> {
    let used = api.converge.secrets_in_use(&app).await?;
    let prefix = secrets_of(&app.account, &app.app);
    let (entries, next) = page(&api, &query, prefix, Order::Rising).await?;
    let mut items = Vec::with_capacity(entries.len());
    for entry in &entries {
        let record: SecretRecord = decode(entry).map_err(StoreError::from)?;
        items.extend(name_of(&entry.key).map(|name| public(name, &record, &used)));
    }
    Ok(Answer(Page { items, next }))
}

/// Sets a secret; it takes effect at the next start. An app that is not there yet is made, so
/// that its first deploy finds its secrets.
#[utoipa::path(put, path = "/api/v1/apps/{app}/secrets/{name}", tag = "secrets",
    params(("app" = String, Path), ("name" = String, Path)),
    request_body = PutSecret, responses((status = 200, body = Secret)))]
pub(super) async fn set(
    State(api): State<Shared>,
    InPath(app): InPath,
    Path((_, name)): Path<(String, String)>,
    SecretValue(body): SecretValue,
) -> Result<Answer<Secret>, Fault> {
    let name: SecretName = name.parse()?;
    let value = SecretBytes::new(body.value.into_bytes());
    let record = api.converge.set_secret(&app, &name, &value).await?;
    api.converge.refresh(&app).await?;
    let used = api.converge.secrets_in_use(&app).await?;
    Ok(Answer(public(name, &record, &used)))
}

/// Removes a secret. A release that asks for it does not start any more.
#[utoipa::path(delete, path = "/api/v1/apps/{app}/secrets/{name}", tag = "secrets",
    params(("app" = String, Path), ("name" = String, Path)), responses((status = 204)))]
pub(super) async fn remove(
    State(api): State<Shared>,
    InPath(app): InPath,
    Path((_, name)): Path<(String, String)>,
) -> Result<StatusCode, Fault> {
    let name: SecretName = name.parse()?;
    api.converge.remove_secret(&app, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Converge {
    pub(crate) async fn set_secret(
        &self,
        app: &AppRef,
        name: &SecretName,
        value: &SecretBytes,
    ) -> Result<SecretRecord, Fault> {
        check(value)?;
        let (account, store) = (&app.account, &self.inner.store);
        let at = secret_key(account, &app.app, name);
        loop {
            let stored_app = self.app_record(app).await?;
            let stored = load::<SecretRecord>(&**store, &at).await?;
            let version = stored.as_ref().map_or(0, |stored| stored.version);
            let mut change = Transaction::default().when(&at, version);
            let mut app_record = match &stored_app {
                Some(stored) => stored.record.clone(),
                None => {
                    one_more_app(store.count(&apps_of(account)).await?)?;
                    if self.is_being_removed(app).await? {
                        let app = app.app.to_string();
                        return Err(DeployError::from(Removing { app }).into());
                    }
                    change = change.when(removal_key(account, &app.app), 0);
                    AppRecord::new(self.now_ms())
                }
            };
            let others = self.others(app, &at).await?;
            let stored = stored.map(|stored| stored.record);
            others.leave_room_for(value.expose().len(), stored.as_ref().map(value_bytes))?;
            let place = Place {
                account,
                app: &app.app,
                name,
            };
            let revision = stored.as_ref().map_or(0, |stored| stored.revision) + 1;
            let mut record = self.inner.vault.seal(place, revision, value).await?;
            if let Some(former) = &stored {
                let until = app_record.secrets_version;
                change = self.keep_former(app, name, former, until, change).await?;
            }
            changed(&mut app_record);
            record.since = app_record.secrets_version;
            change = change.put(&at, encode(&record));
            let was = stored_app.as_ref();
            if self.write_app(app, was, &app_record, change).await? {
                // A look at it forgets what no VM holds.
                self.signal(app);
                return Ok(record);
            }
        }
    }

    pub(crate) async fn remove_secret(&self, app: &AppRef, name: &SecretName) -> Result<(), Fault> {
        let at = secret_key(&app.account, &app.app, name);
        loop {
            let stored_app = self.app_record(app).await?;
            let stored = load::<SecretRecord>(&*self.inner.store, &at).await?;
            let (Some(stored_app), Some(stored)) = (stored_app, stored) else {
                let message = format!("`{}` has no secret `{name}`", app.app);
                return Err(Fault::new(ErrorCode::NotFound, message));
            };
            let mut app_record = stored_app.record.clone();
            let until = app_record.secrets_version;
            let change = Transaction::default().when(&at, stored.version).delete(&at);
            let former = self.keep_former(app, name, &stored.record, until, change);
            let change = former.await?;
            changed(&mut app_record);
            if self
                .write_app(app, Some(&stored_app), &app_record, change)
                .await?
            {
                self.signal(app);
                return Ok(());
            }
        }
    }

    async fn others(&self, app: &AppRef, but: &str) -> Result<Others, StoreError> {
        let mut others = Others::default();
        for entry in every(&*self.inner.store, &secrets_of(&app.account, &app.app)).await? {
            if entry.key != but {
                others.count += 1;
                others.bytes += value_bytes(&decode(&entry)?);
            }
        }
        Ok(others)
    }

    /// The secrets that the live release asks for.
    async fn secrets_in_use(&self, app: &AppRef) -> Result<Vec<SecretName>, Fault> {
        let stored = self.app_record(app).await?;
        let stored = stored.ok_or_else(|| Fault::no_app(&app.app))?;
        let releases = self.releases(app).await?;
        let live = |number| {
            releases
                .into_iter()
                .find(|release| release.number == number)
        };
        let rules = stored
            .record
            .release
            .and_then(live)
            .map(|release| release.rules);
        Ok(rules.map_or_else(Vec::new, |rules| {
            [rules.secret_names, rules.secret_files].concat()
        }))
    }
}

/// One of its secrets changes: what is suspended, and what runs, holds what they were.
fn changed(app: &mut AppRecord) {
    app.suspended = None;
    app.secrets_changed = true;
    app.secrets_version += 1;
}

fn check(value: &SecretBytes) -> Result<(), RuleError> {
    let bytes = value.expose();
    if bytes.len() > SECRET_BYTES_MAX {
        let rule = format!("at most {SECRET_BYTES_MAX} bytes are allowed");
        let given = format!("{} bytes long", bytes.len());
        return Err(RuleError::invalid("value", given, rule));
    }
    if bytes.contains(&0) {
        return Err(RuleError::invalid(
            "value",
            "not shown",
            "NUL is not allowed",
        ));
    }
    Ok(())
}

/// An app's secrets but the one that is set.
#[derive(Default)]
struct Others {
    count: usize,
    bytes: usize,
}

impl Others {
    /// Whether a value of so many bytes may be set beside them; `before` is the length of the one
    /// that it replaces.
    fn leave_room_for(&self, bytes: usize, before: Option<usize>) -> Result<(), RuleError> {
        if before.is_none() && self.count >= SECRETS_PER_APP_MAX {
            return Err(RuleError::Quota {
                what: "secrets of this app",
                used: self.count as u64,
                most: SECRETS_PER_APP_MAX as u64,
            });
        }
        let total = self.bytes + bytes;
        if total > SECRETS_BYTES_PER_APP_MAX && before.is_none_or(|before| bytes > before) {
            let rule = format!(
                "with the app's other secrets that would be {total} bytes, and at most \
                 {SECRETS_BYTES_PER_APP_MAX} are allowed: remove one first (`spore secret rm`)"
            );
            let given = format!("{bytes} bytes long");
            return Err(RuleError::invalid("value", given, rule));
        }
        Ok(())
    }
}

fn public(name: SecretName, record: &SecretRecord, used: &[SecretName]) -> Secret {
    Secret {
        updated_at: rfc3339(record.updated_at_ms),
        used: used.contains(&name),
        name,
    }
}
