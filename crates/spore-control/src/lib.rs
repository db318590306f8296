//! The truth: accounts, apps, releases, secrets, and what follows from them.
//!
//! Used by the `spore` program, which connects it to a node ([`nodes::Nodes`]) and to the gateway
//! ([`door::Door`]). It holds keys and tokens, serves the public contract of `spore-api`, and has
//! no privilege on the host: it opens no guest's file, socket or process, and reads no environment.
//!
//! | module | what |
//! |---|---|
//! | [`store`] | the small mutable truth, durable |
//! | [`domain`] | rules without IO |
//! | [`secrets`] | envelope encryption |
//! | [`converge`] | the reconcilers: wake, reap, deploy, repair |
//! | [`operations`] | longer work and its progress |
//! | [`api`] | the public contract over HTTP |
//! | [`nodes`], [`door`] | what control needs of others |
#![forbid(unsafe_code)]

use std::sync::Arc;

use spore_api::name::{AccountName, ImageName};
use spore_wire::gateway::FromGateway;
use spore_wire::node::ImageInfo;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

pub mod api;
pub mod clock;
pub mod config;
pub mod converge;
pub mod domain;
pub mod door;
#[cfg(test)]
mod fake;
mod metrics;
pub mod nodes;
pub mod operations;
pub mod secrets;
mod startup;
pub mod store;

use clock::{SharedChance, SharedClock};
use config::Config;
use converge::{AdoptError, Converge};
use door::Door;
use nodes::{Nodes, NodesError};
use secrets::KeyProvider;
use store::record::image::{ImageOrigin, ImageRecord, image_key};
use store::record::{encode, load};
use store::{CommitError, SharedStore, StoreError, Transaction};

/// What control is built from.
pub struct Parts {
    /// The truth.
    pub store: SharedStore,
    /// Where VMs run.
    pub nodes: Arc<dyn Nodes>,
    /// Towards the gateway.
    pub door: Arc<dyn Door>,
    /// The outermost key of secrets.
    pub keys: Arc<dyn KeyProvider>,
    /// The time of day.
    pub clock: SharedClock,
    /// Ids.
    pub chance: SharedChance,
}

impl core::fmt::Debug for Parts {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Parts")
    }
}

/// Why control cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The store cannot be used.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
    /// The store cannot be written.
    #[error("the store cannot be brought up to date")]
    Commit(#[from] CommitError),
    /// The node does not tell what runs.
    #[error("the node does not tell which VMs run; nothing may be started before it does")]
    Nodes(#[from] NodesError),
}

impl From<AdoptError> for ControlError {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::Nodes(error) => error.into(),
            AdoptError::Store(error) => error.into(),
        }
    }
}

/// The control plane, running.
#[derive(Debug)]
pub struct Control {
    converge: Converge,
    api: api::Api,
    stop: watch::Sender<bool>,
    driver: JoinHandle<()>,
}

impl Control {
    /// Brings the store up to date, ends what a crash interrupted, adopts the VMs that the node
    /// has, and begins to reconcile.
    ///
    /// # Errors
    /// When store or node cannot be used.
    pub async fn start(config: Config, parts: Parts) -> Result<Self, ControlError> {
        store::migrate::migrate(&*parts.store).await?;
        let (stop, stopped) = watch::channel(false);
        let (signals, receiver) = mpsc::unbounded_channel();
        let feed = parts.nodes.subscribe();
        let converge = Converge::new(Arc::new(config), parts, signals);
        startup::prepare(&converge, &AccountName::default_account()).await?;
        let adopted = converge.adopt().await?;
        let apps = converge.look_at_all().await?;
        tracing::info!(apps, adopted, "control is up");
        let driver = converge.driver(receiver, feed, stopped.clone());
        let driver = tokio::spawn(driver.run());
        tokio::spawn(converge.clone().collect_now_and_then(stopped.clone()));
        let api = api::Api::new(converge.clone(), stopped);
        Ok(Self {
            converge,
            api,
            stop,
            driver,
        })
    }

    /// Serves `/api/v1/**`, `/healthz`, `/version` and `/metrics`. A connection over the unix
    /// socket carries an [`api::Caller`] as a request extension; over TCP a token is needed.
    pub fn router(&self) -> axum::Router {
        self.api.router()
    }

    /// Takes a message of the gateway, in the order they came. `Connect` is answered by whoever
    /// owns the socket, from [`Nodes`]' own host; control ignores it.
    pub fn door_event(&self, message: FromGateway) {
        self.converge.door_event(message);
    }

    /// Whether a base image of the installation is to have its name: nothing has it, or this very
    /// image, or an older one of the platform's. What an account gave the name to itself stays.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub async fn wants_base(&self, name: &ImageName, info: &ImageInfo) -> Result<bool, StoreError> {
        let key = image_key(&AccountName::default_account(), name);
        let stored = load::<ImageRecord>(&*self.converge.inner.store, &key).await?;
        Ok(stored.is_none_or(|stored| is_wanted(&stored.record, info)))
    }

    /// Gives an image of the node its name in the default account, if that wants it: how the base
    /// images of an installation become known. Releases keep the image that they were made with.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub async fn ensure_image(
        &self,
        name: &ImageName,
        info: &ImageInfo,
    ) -> Result<(), CommitError> {
        let key = image_key(&AccountName::default_account(), name);
        let store = &self.converge.inner.store;
        let stored = load::<ImageRecord>(&**store, &key).await?;
        let version = match &stored {
            Some(stored) if stored.record.id == info.id => return Ok(()),
            Some(stored) if !is_wanted(&stored.record, info) => return Ok(()),
            Some(stored) => stored.version,
            None => 0,
        };
        let record = ImageRecord {
            id: info.id,
            bytes: info.bytes,
            created_at_ms: made_at_ms(info),
            origin: ImageOrigin::Base,
        };
        let write = Transaction::default().when(&key, version);
        store.commit(write.put(key, encode(&record))).await?;
        Ok(())
    }

    /// The reconcilers, for whoever drives control without HTTP.
    #[must_use]
    pub const fn converge(&self) -> &Converge {
        &self.converge
    }

    /// Stops reconciling and ends follows and long polls. VMs go on; the next start adopts them.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.driver.await
            && error.is_panic()
        {
            tracing::error!(%error, "the driver panicked");
        }
    }
}

/// Whether an installed image is to replace what has its name.
fn is_wanted(there: &ImageRecord, info: &ImageInfo) -> bool {
    let is_older = there.origin == ImageOrigin::Base && there.created_at_ms < made_at_ms(info);
    there.id == info.id || is_older
}

fn made_at_ms(info: &ImageInfo) -> i64 {
    i64::try_from(info.made_at_s.saturating_mul(1000)).unwrap_or(i64::MAX)
}
