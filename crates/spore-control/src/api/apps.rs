//! Apps: listed, shown, put to sleep, woken, switched off, removed.

use axum::Json as Answer;
use axum::extract::State;
use http::StatusCode;
use spore_api::app::{App, AppState, AppTemplate, AppVm, WakePhase};
use spore_api::page::{Page, PageQuery};
use spore_api::span::Ms;
use spore_wire::node::TemplateStage;

use super::body::{InPath, Query};
use super::error::Fault;
use super::files::exists;
use super::page::page;
use super::status::{boundary_name, boundary_text};
use super::{Caller, Shared};
use crate::clock::rfc3339;
use crate::converge::life::{Moment, Standing, View};
use crate::converge::{AppRef, Converge};
use crate::store::record::app::{AppRecord, app_key, apps_of, names_of};
use crate::store::record::{decode, encode};
use crate::store::{CommitError, Order, StoreError, Transaction};

/// Lists the account's apps.
#[utoipa::path(get, path = "/api/v1/apps", tag = "apps", params(PageQuery),
    responses((status = 200, body = Page<App>)))]
pub(super) async fn list(
    State(api): State<Shared>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Answer<Page<App>>, Fault> {
    let prefix = apps_of(&caller.account);
    let (entries, next) = page(&api, &query, prefix, Order::Rising).await?;
    let mut items = Vec::with_capacity(entries.len());
    for entry in &entries {
        if let Some((account, app)) = names_of(&entry.key) {
            let record = decode(entry).map_err(StoreError::from)?;
            items.push(api.converge.app(&AppRef { account, app }, &record));
        }
    }
    Ok(Answer(Page { items, next }))
}

/// Shows an app.
#[utoipa::path(get, path = "/api/v1/apps/{app}", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn show(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    shown(&api.converge, &app).await
}

/// Removes an app with its releases, secrets and log; its VM is stopped first.
#[utoipa::path(delete, path = "/api/v1/apps/{app}", tag = "apps",
    params(("app" = String, Path)), responses((status = 204)))]
pub(super) async fn remove(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<StatusCode, Fault> {
    api.converge.remove(&app).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Puts an app to sleep now; the next request starts it anew. What a suspended one held in memory
/// is gone.
#[utoipa::path(post, path = "/api/v1/apps/{app}/stop", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn stop(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    exists(&api, &app).await?;
    api.converge.sleep(&app).await?;
    api.converge.forget_suspended(&app).await?;
    shown(&api.converge, &app).await
}

/// Wakes an app and waits until it is awake.
#[utoipa::path(post, path = "/api/v1/apps/{app}/wake", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn wake(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    exists(&api, &app).await?;
    api.converge.wake(&app).await?;
    shown(&api.converge, &app).await
}

/// Gives an app that is awake a fresh VM; one that sleeps goes on sleeping.
#[utoipa::path(post, path = "/api/v1/apps/{app}/restart", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn restart(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    exists(&api, &app).await?;
    if !api.converge.with_life(&app, |life, _| life.is_asleep()) {
        api.converge.restart(&app).await?;
    }
    shown(&api.converge, &app).await
}

/// Lets an app be woken again.
#[utoipa::path(post, path = "/api/v1/apps/{app}/enable", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn enable(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    api.converge
        .change(&app, |record| record.enabled = true)
        .await?;
    shown(&api.converge, &app).await
}

/// Puts an app to sleep and keeps it from being woken.
#[utoipa::path(post, path = "/api/v1/apps/{app}/disable", tag = "apps",
    params(("app" = String, Path)), responses((status = 200, body = App)))]
pub(super) async fn disable(
    State(api): State<Shared>,
    InPath(app): InPath,
) -> Result<Answer<App>, Fault> {
    api.converge
        .change(&app, |record| record.enabled = false)
        .await?;
    api.converge.until_asleep(&app).await?;
    shown(&api.converge, &app).await
}

async fn shown(converge: &Converge, app: &AppRef) -> Result<Answer<App>, Fault> {
    let stored = converge.app_record(app).await?;
    let stored = stored.ok_or_else(|| Fault::no_app(&app.app))?;
    let mut shown = converge.app(app, &stored.record);
    if let Some(vm) = &mut shown.vm {
        vm.template = converge.template(&vm.id).await;
    }
    Ok(Answer(shown))
}

impl Converge {
    async fn change(&self, app: &AppRef, change: impl Fn(&mut AppRecord)) -> Result<(), Fault> {
        let key = app_key(&app.account, &app.app);
        loop {
            let stored = self.app_record(app).await?;
            let mut stored = stored.ok_or_else(|| Fault::no_app(&app.app))?;
            change(&mut stored.record);
            let transaction = Transaction::default()
                .when(&key, stored.version)
                .put(&key, encode(&stored.record));
            match self.inner.store.commit(transaction).await {
                Ok(_) => break,
                Err(CommitError::Conflict { .. }) => {}
                Err(CommitError::Store(error)) => return Err(error.into()),
            }
        }
        Ok(self.refresh(app).await?)
    }

    /// The public form of an app.
    /// How far the template is that this VM began from, or could have. Of a node that does not
    /// answer nothing is known, which fails no call.
    async fn template(&self, vm: &str) -> Option<AppTemplate> {
        let stage = self.inner.nodes.template_stage(vm.parse().ok()?).await;
        Some(match stage.ok()?? {
            TemplateStage::Waiting => AppTemplate::Waiting,
            TemplateStage::Booting => AppTemplate::Booting,
            TemplateStage::Writing => AppTemplate::Writing,
            TemplateStage::Ready => AppTemplate::Ready,
            TemplateStage::Failed => AppTemplate::Failed,
        })
    }

    pub(super) fn app(&self, app: &AppRef, record: &AppRecord) -> App {
        let (scheme, port) = self.inner.config.public;
        let host = self.host(app);
        let url = match (scheme, port) {
            ("http", 80) | ("https", 443) => format!("{scheme}://{host}/"),
            _ => format!("{scheme}://{host}:{port}/"),
        };
        self.with_life(app, |life, now| {
            let view = life.view();
            App {
                name: app.app.clone(),
                account: app.account.clone(),
                url,
                state: state_of(record, view.standing),
                enabled: record.enabled,
                release: record.release,
                vm: vm_of(&view, now),
                last_failure: view.last_failure.map(|failure| failure.message.clone()),
                created_at: rfc3339(record.created_at_ms),
            }
        })
    }
}

/// Where an app stands, with what its owner wants.
pub(super) const fn state_of(record: &AppRecord, standing: Standing) -> AppState {
    match standing {
        Standing::Draining => AppState::Draining,
        Standing::Awake => AppState::Awake,
        _ if !record.enabled => AppState::Disabled,
        _ if record.release.is_none() => AppState::New,
        Standing::Waking => AppState::Waking,
        Standing::Failing => AppState::Failing,
        Standing::Asleep if record.suspended.is_some() => AppState::Suspended,
        Standing::Asleep => AppState::Asleep,
    }
}

fn vm_of(view: &View<'_>, now: Moment) -> Option<AppVm> {
    let status = view.status?;
    let phases = status.phases.iter().map(|phase| WakePhase {
        name: phase.name.clone(),
        ms: Ms(phase.us),
    });
    Some(AppVm {
        id: status.vm.to_string(),
        boundary: boundary_name(status.boundary).to_owned(),
        boundary_text: boundary_text(status.boundary, &status.hypervisor),
        boot_id: status.boot_id.clone(),
        phases: phases.collect(),
        awake_for_ms: view.lease_until.0.saturating_sub(now.0),
        template: None,
    })
}
