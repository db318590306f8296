//! An innocent app beside a bad one: visited all the time, so that a story can say that nothing
//! happened to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::app::{SELF_PORTRAIT, STAYS_AWAKE};
use crate::{Platform, Visitor};

const HOST: &str = "neighbour.localhost";

/// The pause between two visits.
const PACE: Duration = Duration::from_millis(250);

/// How long one visit may take beside VMs that use every processor there is.
const PATIENCE: Duration = Duration::from_secs(300);

/// The app `neighbour`, and who visits it.
#[derive(Debug)]
pub struct Neighbour {
    ended: Arc<AtomicBool>,
    visits: JoinHandle<Result<Visits>>,
}

/// What came of the visits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visits {
    /// How many there were.
    pub count: u32,
    /// The longest one.
    pub slowest: Duration,
}

impl Neighbour {
    /// Deploys it, and begins to visit it.
    ///
    /// # Errors
    /// When it cannot be deployed.
    pub fn move_in(platform: &Platform) -> Result<Self> {
        platform.deploy("neighbour", SELF_PORTRAIT, STAYS_AWAKE)?;
        let ended = Arc::new(AtomicBool::new(false));
        let visits = tokio::spawn(visit(platform.visitor(), Arc::clone(&ended)));
        Ok(Self { ended, visits })
    }

    /// Ends the visits, and fails unless each met the same VM, awake.
    ///
    /// # Errors
    /// What was met instead.
    pub async fn was_unhurt(self) -> Result<Visits> {
        self.ended.store(true, Ordering::Release);
        let visits = self.visits.await?.context("the neighbour was hurt")?;
        ensure!(visits.count > 1, "nobody visited the neighbour");
        Ok(visits)
    }
}

async fn visit(visitor: Visitor, ended: Arc<AtomicBool>) -> Result<Visits> {
    let mut visits = Visits::default();
    let mut first = None;
    while !ended.load(Ordering::Acquire) {
        let begun = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, visitor.get(HOST, "/")).await;
        let answer = answer.with_context(|| format!("no answer within {PATIENCE:?}"))??;
        ensure!(answer.status == 200, "{answer:?}");
        let portrait: serde_json::Value = serde_json::from_str(&answer.body)?;
        let known = first.get_or_insert_with(|| portrait["boot_id"].clone());
        ensure!(portrait["boot_id"] == *known, "another VM: {portrait}");
        visits.count += 1;
        visits.slowest = visits.slowest.max(begun.elapsed());
        tokio::time::sleep(PACE).await;
    }
    Ok(visits)
}
