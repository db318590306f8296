//! Tells the gateway which hosts there are.
//!
//! What it was told is remembered, so that a look at an app sends only a difference, and all of it
//! is sent again whenever a gateway connects.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use spore_api::name::host_of;
use spore_wire::cause::chain;
use spore_wire::gateway::{Activity, Admission, Route, RoutePolicy, ToGateway};

use super::life::{self, Event, Intent};
use super::{AppRef, Converge};
use crate::store::record::app::{APPS, AppRecord, names_of};
use crate::store::record::decode;
use crate::store::{StoreError, every};

/// Routes in one packet: one takes at most about 400 bytes, a packet 64 KiB.
const ROUTES_PER_PACKET: usize = 100;

impl Converge {
    /// Tells what changed of one app's route.
    pub(super) fn route(&self, app: &AppRef, intent: &Intent) {
        let wanted = match intent {
            Intent::Removed => None,
            Intent::App { admission, live } => {
                let is_enabled = *admission == life::Admission::Enabled;
                Some(admission_of(is_enabled, live.is_some()))
            }
        };
        let mut routes = self.routes();
        if routes.get(app) == wanted.as_ref() {
            return;
        }
        match wanted {
            Some(admission) => {
                routes.insert(app.clone(), admission);
                let set = vec![self.route_of(app, admission)];
                self.inner.door.send(ToGateway::Routes { set });
            }
            None => {
                routes.remove(app);
                let hosts = vec![self.host(app)];
                self.inner.door.send(ToGateway::Unroute { hosts });
            }
        }
    }

    /// A commit changed an app: its route is told before this returns, and it is looked at.
    ///
    /// # Errors
    /// When the store cannot serve.
    pub async fn refresh(&self, app: &AppRef) -> Result<(), StoreError> {
        let intent = self.intent(app).await?;
        self.route(app, &intent);
        self.signal(app);
        Ok(())
    }

    /// A gateway connected: it is told everything.
    pub(super) async fn door_back(&self, warm: Vec<Activity>) {
        if let Err(error) = self.tell_routes().await {
            let error = chain(&error);
            tracing::error!(error, "the gateway cannot be told its routes");
        }
        let mut by_app: BTreeMap<AppRef, Vec<Activity>> = BTreeMap::new();
        for app in self.slots().keys() {
            by_app.insert(app.clone(), Vec::new());
        }
        for activity in warm {
            if let Some(app) = AppRef::from_key(&activity.app) {
                by_app.entry(app).or_default().push(activity);
            }
        }
        for (app, warm) in by_app {
            self.event(&app, Event::DoorBack(warm));
        }
    }

    async fn tell_routes(&self) -> Result<(), StoreError> {
        let apps = self.all_apps().await?;
        let table: BTreeMap<_, _> = apps
            .into_iter()
            .map(|(app, record)| {
                let admission = admission_of(record.enabled, record.release.is_some());
                (app, admission)
            })
            .collect();
        let routes: Vec<_> = table
            .iter()
            .map(|(app, admission)| self.route_of(app, *admission))
            .collect();
        for set in routes.chunks(ROUTES_PER_PACKET) {
            let set = set.to_vec();
            self.inner.door.send(ToGateway::Routes { set });
        }
        self.inner.door.send(ToGateway::RoutesEnd);
        let before = core::mem::replace(&mut *self.routes(), table.clone());
        // What a look told while the store was read may be newer than the table: look again.
        for app in before.keys().chain(table.keys()) {
            if before.get(app) != table.get(app) {
                self.signal(app);
            }
        }
        Ok(())
    }

    /// Every app of every account.
    pub(crate) async fn all_apps(&self) -> Result<Vec<(AppRef, AppRecord)>, StoreError> {
        let mut apps = Vec::new();
        for entry in every(&*self.inner.store, APPS).await? {
            if let Some((account, app)) = names_of(&entry.key) {
                apps.push((AppRef { account, app }, decode(&entry)?));
            }
        }
        Ok(apps)
    }

    /// The host under which an app answers.
    pub fn host(&self, app: &AppRef) -> String {
        host_of(&app.app, &app.account, &self.inner.config.base)
    }

    fn route_of(&self, app: &AppRef, admission: Admission) -> Route {
        let deadline = self.inner.config.timing.wake_deadline.as_millis();
        Route {
            host: self.host(app),
            app: app.key(),
            policy: RoutePolicy {
                admission,
                waiters_max: self.inner.config.waiters_max,
                wake_deadline_ms: u64::try_from(deadline).unwrap_or(u64::MAX),
            },
        }
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, BTreeMap<AppRef, Admission>> {
        self.inner
            .routes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether requests of an app are let in.
const fn admission_of(is_enabled: bool, has_release: bool) -> Admission {
    match (is_enabled, has_release) {
        (false, _) => Admission::Disabled,
        (true, false) => Admission::NoRelease,
        (true, true) => Admission::Open,
    }
}
