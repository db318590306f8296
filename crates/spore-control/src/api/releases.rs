//! Releases: made, listed, rolled back to.

use axum::Json as Answer;
use axum::extract::State;
use http::StatusCode;
use spore_api::app::Rollback;
use spore_api::error::ErrorCode;
use spore_api::operation::Operation;
use spore_api::page::{Page, PageQuery};
use spore_api::release::{
    CreateRelease, HealthSpec, IdleMode, IdleSpec, Release, ReleaseSpec, ReleaseState,
    ResourceSpec, SecretSpec, Warm,
};
use spore_wire::egress::{Grant, GrantTarget};
use spore_wire::id::ImageId;
use spore_wire::node::ImageKind;

use super::body::{Create, InPath, Query};
use super::error::Fault;
use super::operations::running;
use super::page::page;
use super::{Caller, Shared};
use crate::clock::rfc3339;
use crate::converge::deploy::{Named, NewRelease};
use crate::converge::{AppRef, Converge};
use crate::domain::release::rules;
use crate::store::record::image::{ImageRecord, image_key};
use crate::store::record::release::{ReleaseRecord, Rules, StoredState, StoredWarm, releases_of};
use crate::store::record::secret::secret_key;
use crate::store::record::source::{SourceRecord, source_key};
use crate::store::record::{decode, load};
use crate::store::{Order, StoreError};

/// Makes a release; it goes live when it is healthy, and what served before serves until then.
#[utoipa::path(post, path = "/api/v1/apps/{app}/releases", tag = "releases",
    params(("app" = String, Path), ("Idempotency-Key" = Option<String>, Header)),
    request_body = CreateRelease, responses((status = 202, body = Operation)))]
pub(super) async fn create(
    State(api): State<Shared>,
    InPath(app): InPath,
    body: Create<CreateRelease>,
) -> Result<(StatusCode, Answer<Operation>), Fault> {
    let new = api.converge.new_release(&app, &body.value).await?;
    let id = api
        .converge
        .deploy(&app, &new, body.repeatable.as_ref())
        .await?;
    running(&api, &app.account, &id).await
}

/// Goes back to a release that was healthy.
#[utoipa::path(post, path = "/api/v1/apps/{app}/rollback", tag = "releases",
    params(("app" = String, Path), ("Idempotency-Key" = Option<String>, Header)),
    request_body = Rollback, responses((status = 202, body = Operation)))]
pub(super) async fn rollback(
    State(api): State<Shared>,
    InPath(app): InPath,
    body: Create<Rollback>,
) -> Result<(StatusCode, Answer<Operation>), Fault> {
    let (wanted, repeatable) = (body.value.to, body.repeatable.as_ref());
    let id = api.converge.rollback(&app, wanted, repeatable).await?;
    running(&api, &app.account, &id).await
}

/// Lists an app's releases, newest first.
#[utoipa::path(get, path = "/api/v1/apps/{app}/releases", tag = "releases",
    params(("app" = String, Path), PageQuery),
    responses((status = 200, body = Page<Release>)))]
pub(super) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    InPath(app): InPath,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<Release>>, Fault> {
    if api.converge.app_record(&app).await?.is_none() {
        return Err(Fault::no_app(&app.app));
    }
    let prefix = releases_of(&caller.account, &app.app);
    let (entries, next) = page(&api, &query, prefix, Order::Falling).await?;
    let items = entries.iter().map(|entry| decode(entry).map(public));
    let items = items.collect::<Result<_, _>>().map_err(StoreError::from)?;
    Ok(Answer(Page { items, next }))
}

impl Converge {
    /// Checks a request for a release and finds what it names, in the app's account only.
    async fn new_release(
        &self,
        app: &AppRef,
        request: &CreateRelease,
    ) -> Result<NewRelease, Fault> {
        let rules = rules(&request.spec)?;
        let store = &*self.inner.store;
        let key = image_key(&app.account, &rules.image_name);
        let Some(image) = load::<ImageRecord>(store, &key).await? else {
            let name = &rules.image_name;
            let message = format!(
                "`spec.image` is `{name}`: there is no such image; `spore image ls` lists them, \
                 `spore image build` makes one"
            );
            return Err(Fault::new(ErrorCode::Invalid, message));
        };
        let folder = match request.source.as_deref() {
            Some(source) => Some(self.folder(app, source).await?),
            None => None,
        };
        for name in rules.secret_names.iter().chain(&rules.secret_files) {
            let key = secret_key(&app.account, &app.app, name);
            if store.get(&key).await?.is_none() {
                let message = format!(
                    "`spec.secrets` names `{name}`, which is not set: `spore secret set {} \
                     {name}`, then deploy again",
                    app.app
                );
                return Err(Fault::new(ErrorCode::Invalid, message));
            }
        }
        let image = Named {
            id: image.record.id,
            bytes: image.record.bytes,
            key,
        };
        Ok(NewRelease {
            rules,
            image,
            folder,
        })
    }

    async fn folder(&self, app: &AppRef, source: &str) -> Result<Named, Fault> {
        let missing = || {
            let shown: String = source.chars().take(80).collect();
            let message =
                format!("`source` is `{shown}`: there is no such upload; upload it again");
            Fault::new(ErrorCode::Invalid, message)
        };
        let id: ImageId = source.parse().map_err(|_e| missing())?;
        let key = source_key(&app.account, id);
        let stored = load::<SourceRecord>(&*self.inner.store, &key).await?;
        let stored = stored.ok_or_else(missing)?;
        if stored.record.kind != ImageKind::Folder {
            let message = "`source` is a root file system: upload the app's folder instead";
            return Err(Fault::new(ErrorCode::Invalid, message));
        }
        Ok(Named {
            id,
            bytes: stored.record.bytes,
            key,
        })
    }
}

/// The public form of a release.
fn public(record: ReleaseRecord) -> Release {
    Release {
        number: record.number,
        state: match record.state {
            StoredState::Pending => ReleaseState::Pending,
            StoredState::Live => ReleaseState::Live,
            StoredState::Retired => ReleaseState::Retired,
            StoredState::Failed => ReleaseState::Failed,
        },
        spec: spec(record.rules),
        source: record.folder.map(|id| id.to_string()),
        created_at: rfc3339(record.created_at_ms),
        failure: record.failure,
    }
}

fn spec(rules: Rules) -> ReleaseSpec {
    ReleaseSpec {
        image: rules.image_name,
        command: rules.command,
        port: rules.port,
        resources: ResourceSpec {
            cpus: rules.cpus,
            memory_mib: rules.memory_mib,
            disk_mib: rules.disk_mib,
        },
        idle: IdleSpec {
            after_ms: rules.idle_after_ms,
            mode: match (rules.sleeps, rules.suspends) {
                (false, _) => IdleMode::Never,
                (true, false) => IdleMode::Stop,
                (true, true) => IdleMode::Suspend,
            },
        },
        health: HealthSpec {
            path: rules.health_path,
            timeout_ms: rules.health_timeout_ms,
        },
        egress: rules.egress.iter().map(grant).collect(),
        secrets: SecretSpec {
            names: rules.secret_names,
            files: rules.secret_files,
        },
        environment: rules.environment,
        warm: match rules.warm {
            StoredWarm::Boot => Warm::Boot,
            StoredWarm::Ready => Warm::Ready,
        },
    }
}

fn grant(grant: &Grant) -> String {
    let port = grant.port;
    match &grant.to {
        GrantTarget::Name { name } => format!("{name}:{port}"),
        GrantTarget::Address { address } => format!("{address}:{port}"),
    }
}
