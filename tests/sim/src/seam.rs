//! What a visitor must not notice: reaps, wakes, a slow host, a link that breaks, a daemon's end, a
//! VM that its node ends under requests, one that died while it was idle.
//!
//! The last part of a life, in calm: no VM is harmed under a request and the owner is still, so
//! every request is served. Requests come when the reap of their app is asked for, give or take
//! the way of a message, and stay longer than the app may be idle: the handshake between control
//! and gateway has nothing to stand on but itself.

use core::time::Duration;

use anyhow::{Context as _, Result};
use spore_node::hypervisor::sim::FaultPlan;

use crate::gateway::Refused;
use crate::life::{APPS, Life};
use crate::visit::{Answer, Body};

/// Requests at the edge of an app's idle time.
const EDGES: u64 = 4;

/// A reap is asked for and answered within so many milliseconds of the edge.
const EDGE_MS: u64 = 8;

/// How long a disturbance waits for a wake or a reap to be under way, in milliseconds.
const DISTURB_MS: u64 = 3_000;

/// Until an app sleeps after its last request, leases included: there may be room for three VMs
/// only, and one app may never sleep.
const ASLEEP: Duration = Duration::from_secs(90);

/// Requests around the end of a VM, and before it.
const AROUND_END: u32 = 40;
const BEFORE_END: u32 = 10;

/// Between two of them, and between the pieces of their bodies, in milliseconds: one is sent while
/// every word of the farewell is on its way, and none stays as long as that may take.
const AROUND_END_MS: u64 = 3;
const PIECE_MS: u64 = 20;

/// Beyond every pause after a start that failed once or twice.
const BREAKER: Duration = Duration::from_secs(30);

impl Life {
    /// Every request of every app is served, whatever happens beside it.
    pub(crate) async fn visitors_notice_nothing(&mut self) -> Result<()> {
        for app in APPS {
            let record = self.world.record(app).await?;
            // Without a release it was told already that none goes live in calm.
            let Some(number) = record.and_then(|record| record.release) else {
                continue;
            };
            let release = self.world.release(app, number).await?;
            let rules = release.context("the live release is not there")?.rules;
            for _edge in 0..EDGES {
                let first = self.world.ask(app).await;
                self.must_serve(app, first);
                let edge = Duration::from_millis(rules.idle_after_ms);
                tokio::time::sleep(edge + self.chance.span(EDGE_MS)).await;
                let body = Body {
                    pieces: 8,
                    pause: self.chance.span(3_000),
                };
                let visitor = tokio::spawn(self.world.ask_with(app, body));
                self.disturb(app).await?;
                let answer = visitor.await.context("a visitor panicked")?;
                self.must_serve(app, answer);
            }
            // It sleeps, or lived so long that an end before does not count: of an app that failed
            // just now, control lets nobody wait for the next start.
            tokio::time::sleep(ASLEEP).await;
            self.ended_vm(app).await?;
            tokio::time::sleep(ASLEEP).await;
            self.lost_vm(app).await;
            tokio::time::sleep(ASLEEP).await;
        }
        Ok(())
    }

    /// A VM must not go on, and requests keep coming: its node ends it, and each of them is served,
    /// by it or by the next one.
    async fn ended_vm(&mut self, app: &str) -> Result<()> {
        let first = self.world.ask(app).await;
        self.must_serve(app, first);
        let mut visitors = Vec::new();
        for number in 0..AROUND_END {
            if number == BEFORE_END {
                self.world
                    .trace
                    .say(format!("{app}: its VM must not go on"));
                self.spoil(app);
            }
            let body = Body {
                pieces: 4,
                pause: self.chance.span(PIECE_MS),
            };
            visitors.push(tokio::spawn(self.world.ask_with(app, body)));
            tokio::time::sleep(self.chance.span(AROUND_END_MS)).await;
        }
        for visitor in visitors {
            let answer = visitor.await.context("a visitor panicked")?;
            self.must_serve(app, answer);
        }
        Ok(())
    }

    fn spoil(&self, app: &str) {
        let mut running = self.world.ground.watcher.running();
        for (vm, _release) in running.remove(app).unwrap_or_default() {
            self.world.ground.host.spoil_vm(vm, "its proxy ended");
        }
    }

    /// An idle VM dies: who comes when that is known meets the next one.
    async fn lost_vm(&self, app: &str) {
        let host = &self.world.ground.host;
        for (vm, _release) in self
            .world
            .ground
            .watcher
            .running()
            .remove(app)
            .unwrap_or_default()
        {
            self.world.trace.say(format!("{vm} crashes while idle"));
            host.crash_vm(vm);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let answer = self.world.ask(app).await;
        self.must_serve(app, answer);
    }

    fn must_serve(&self, app: &str, answer: Option<Answer>) {
        if !matches!(answer, Some(Answer::Served(_))) {
            let text = format!("{app}: a visitor notices what goes on behind: {answer:?}");
            self.world.trace.violation(text);
        }
    }

    /// Something happens that no visitor may notice.
    async fn disturb(&mut self, app: &str) -> Result<()> {
        let pause = self.chance.span(DISTURB_MS);
        match self.chance.below(5) {
            0 => {
                tokio::time::sleep(pause).await;
                if let Some(daemon) = &self.world.daemon {
                    self.world.trace.say(format!("{app}: the link breaks"));
                    daemon.breaks.now();
                }
            }
            1 => {
                tokio::time::sleep(pause).await;
                self.world.end_daemon().await;
                tokio::time::sleep(self.chance.span(DISTURB_MS)).await;
                self.world.start_daemon(None).await?;
            }
            2 => {
                self.world.trace.say(format!("{app}: the host is slow"));
                self.world.ground.host.set_plan(FaultPlan {
                    slow: 1000,
                    ..FaultPlan::default()
                });
                tokio::time::sleep(pause).await;
                self.world.ground.host.set_plan(FaultPlan::default());
            }
            _ => {}
        }
        Ok(())
    }

    /// A wake that fails is told to whoever waits, at once; the next one is made all the same.
    pub(crate) async fn failed_wakes_are_told(&self) -> Result<()> {
        for app in APPS {
            if !self.sleeps(app).await? {
                continue;
            }
            self.world.ground.host.set_plan(FaultPlan {
                boot: 1000,
                ..FaultPlan::default()
            });
            let answer = self.world.ask(app).await;
            if !matches!(answer, Some(Answer::Refused(Refused::WakeFailed(_)))) {
                let text = format!("{app}: a failed wake was not told: {answer:?}");
                self.world.trace.violation(text);
            }
            self.world.ground.host.set_plan(FaultPlan::default());
            tokio::time::sleep(BREAKER).await;
            let answer = self.world.ask(app).await;
            self.must_serve(app, answer);
            tokio::time::sleep(ASLEEP).await;
        }
        Ok(())
    }
}
