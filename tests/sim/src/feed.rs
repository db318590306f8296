//! The gateway's side of the session with a daemon, as `spore_wire::gateway` draws it.
//!
//! Called by the link when a daemon connects. The newest connection has the session.

use core::time::Duration;

use spore_gateway::wake::AppEvent;
use spore_wire::gateway::{AppKey, FromGateway, ToGateway};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::gateway::{ConnectError, Gateway, Target};
use crate::link::{Down, Stream};

/// The shortest time between two reports of activity.
const ACTIVITY_PACE: Duration = Duration::from_millis(50);

impl Gateway {
    /// A daemon connects: what it says comes by `down`, what it is told goes by `up`.
    pub(crate) fn accept(
        &self,
        down: mpsc::UnboundedReceiver<Down>,
        up: mpsc::UnboundedSender<FromGateway>,
    ) {
        let over = self.0.over.child_token();
        {
            let mut inner = self.inner();
            inner.session_over.cancel();
            inner.session_over = over.clone();
            inner.session = None;
        }
        let gateway = self.clone();
        let ended = over.clone();
        drop(tokio::spawn(async move {
            let session = gateway.session(down, up, &over);
            over.run_until_cancelled(session).await;
            ended.cancel();
        }));
    }

    async fn session(
        &self,
        mut down: mpsc::UnboundedReceiver<Down>,
        up: mpsc::UnboundedSender<FromGateway>,
        over: &CancellationToken,
    ) {
        let Some(Down::Message(ToGateway::Hello { .. })) = down.recv().await else {
            return;
        };
        let (queue, mut said) = mpsc::unbounded_channel();
        self.begin(queue, &up);
        let obey = async {
            while let Some(message) = down.recv().await {
                match message {
                    Down::Message(message) => self.obey(message),
                    Down::Connected(id, stream) => self.connected(id, Ok(stream)),
                }
            }
        };
        let report = async {
            loop {
                tokio::time::sleep(ACTIVITY_PACE).await;
                while self.inner().changed.is_empty() {
                    self.0.change.notified().await;
                }
                let changed = core::mem::take(&mut self.inner().changed);
                for app in changed {
                    for activity in self.report(&app) {
                        drop(up.send(FromGateway::Activity(activity)));
                    }
                }
            }
        };
        let tell = async {
            while let Some(message) = said.recv().await {
                if up.send(message).is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            biased;
            () = obey => {}
            () = tell => {}
            () = report => {}
        }
        let mut inner = self.inner();
        if !over.is_cancelled() {
            inner.session = None;
        }
    }

    fn begin(
        &self,
        queue: mpsc::UnboundedSender<FromGateway>,
        up: &mpsc::UnboundedSender<FromGateway>,
    ) {
        let now_ms = self.now_ms();
        let mut inner = self.inner();
        inner.table += 1;
        inner.session = Some(queue);
        inner.asked.clear();
        let apps = inner.apps.iter();
        let warm = apps.flat_map(|(key, app)| app.activities(key, now_ms));
        let hello = FromGateway::Hello {
            generation: GENERATION,
            warm: warm.collect(),
            stamp: String::new(),
        };
        drop(up.send(hello));
        let again: Vec<_> = inner.connects.iter().map(|(id, of)| (*id, of.vm)).collect();
        let keys: Vec<_> = inner.apps.keys().cloned().collect();
        drop(inner);
        for key in keys {
            self.event(&key, AppEvent::SessionBegan, None);
        }
        for (id, vm) in again {
            self.inner().push(FromGateway::Connect { id, vm });
        }
    }

    fn obey(&self, message: ToGateway) {
        match message {
            ToGateway::Hello { .. } | ToGateway::Connected { .. } | ToGateway::Quit { .. } => {}
            ToGateway::Routes { set } => {
                let mut inner = self.inner();
                let table = inner.table;
                for route in set {
                    inner.apps.entry(route.app.clone()).or_default();
                    let target = Target {
                        app: route.app,
                        policy: route.policy,
                        table,
                    };
                    inner.routes.insert(route.host, target);
                }
            }
            ToGateway::RoutesEnd => self.table_ends(),
            ToGateway::Unroute { hosts } => {
                for host in hosts {
                    let target = self.inner().routes.remove(&host);
                    if let Some(target) = target {
                        self.unrouted(&target.app);
                    }
                }
            }
            ToGateway::Awake { app, vm, .. } => {
                self.inner().asked.remove(&app);
                self.awake(&app, vm);
            }
            ToGateway::WakeFailed { app, failure } => {
                self.inner().asked.remove(&app);
                self.event(&app, AppEvent::WakeFailed, Some(&failure));
            }
            ToGateway::ConnectFailed { id, reason, gone } => {
                let error = if gone {
                    ConnectError::Gone
                } else {
                    ConnectError::Failed(reason)
                };
                self.connected(id, Err(error));
            }
            ToGateway::Reap { app, vm, force } => self.reap(&app, vm, force),
            ToGateway::Gone { app, vm, .. } => {
                self.event(&app, AppEvent::Gone { vm }, None);
                self.forget_blank(&app);
                self.connects_gone(vm);
            }
        }
    }

    fn table_ends(&self) {
        let mut inner = self.inner();
        let table = inner.table;
        inner.is_whole = true;
        let forgotten: Vec<_> = inner
            .routes
            .extract_if(.., |_, target| target.table != table)
            .collect();
        drop(inner);
        self.0.became_whole.notify_waiters();
        for (_host, target) in forgotten {
            self.unrouted(&target.app);
        }
    }

    fn unrouted(&self, app: &AppKey) {
        let routed = self.inner().routes.values().any(|to| to.app == *app);
        if !routed {
            self.event(app, AppEvent::Unrouted, None);
            self.inner().asked.remove(app);
            self.forget_blank(app);
        }
    }

    fn forget_blank(&self, app: &AppKey) {
        let mut inner = self.inner();
        let routed = inner.routes.values().any(|to| to.app == *app);
        let blank = inner
            .apps
            .get(app)
            .is_some_and(|app| app.machine.is_blank());
        if blank && !routed {
            let forgotten = inner.apps.remove(app);
            drop(inner);
            drop(forgotten);
        }
    }

    fn connected(&self, id: u64, result: Result<Stream, ConnectError>) {
        let pending = self.inner().connects.remove(&id);
        if let Some(pending) = pending {
            drop(pending.sender.send(result));
        }
    }

    fn connects_gone(&self, vm: VmId) {
        let gone: Vec<_> = {
            let mut inner = self.inner();
            let gone = inner.connects.extract_if(.., |_, of| of.vm == vm);
            gone.collect()
        };
        for (_id, pending) in gone {
            drop(pending.sender.send(Err(ConnectError::Gone)));
        }
    }
}
