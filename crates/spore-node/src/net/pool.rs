//! Namespaces made ahead, since making one takes longer than the rest of a start's preparation.
//!
//! Used by `hypervisor/room.rs`. A task keeps a few ready; each is taken once; whoever finds none
//! makes one. What waits here when the daemon dies is swept by the next one, which does not know
//! the names.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::namespace::Namespaces;

/// How long the pool waits after it could not make a namespace.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// The pool.
#[derive(Debug)]
pub struct Pool {
    maker: Maker,
    ready: Mutex<mpsc::Receiver<String>>,
    filler: JoinHandle<()>,
}

/// What makes namespaces, for the filler and for whoever finds none ready.
#[derive(Clone, Debug)]
struct Maker {
    namespaces: Namespaces,
    /// The names of those that wait or are being made.
    unclaimed: Arc<Mutex<BTreeSet<String>>>,
}

impl Pool {
    /// Starts filling, inside a runtime; at most `size` wait, at least one.
    #[must_use]
    pub fn start(namespaces: Namespaces, size: usize) -> Self {
        let maker = Maker {
            namespaces,
            unclaimed: Arc::default(),
        };
        let (give, ready) = mpsc::channel(size.max(1));
        let filler = tokio::spawn(maker.clone().fill(give));
        Self {
            maker,
            ready: Mutex::new(ready),
            filler,
        }
    }

    /// Takes a namespace, which from now on is the caller's to remove. `claim` gets its name
    /// while [`Self::unclaimed`] still lists it: whoever sweeps sees it here or in the claim.
    ///
    /// # Errors
    /// Why none could be made, or what `claim` says.
    pub async fn take(&self, claim: impl FnOnce(&str) -> io::Result<()>) -> io::Result<String> {
        let ready = lock(&self.ready).try_recv();
        let name = match ready {
            // One that waited when the pool was closed is gone.
            Ok(name) if lock(&self.maker.unclaimed).contains(&name) => name,
            _none => self.maker.make().await?,
        };
        let claimed = claim(&name);
        self.maker.forget(&name);
        if let Err(error) = claimed {
            self.maker.namespaces.remove(&name)?;
            return Err(error);
        }
        Ok(name)
    }

    /// The names that are not anybody's yet.
    #[must_use]
    pub fn unclaimed(&self) -> BTreeSet<String> {
        lock(&self.maker.unclaimed).clone()
    }

    /// Stops filling and removes what waits and what was just being made. Blocks; nothing can be
    /// taken afterwards.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn close(&self) -> io::Result<()> {
        self.filler.abort();
        lock(&self.ready).close();
        // The filler may be cut off while one is made for it, or before it passes one on.
        self.maker.namespaces.end_making();
        for name in self.unclaimed() {
            self.maker.namespaces.remove(&name)?;
            self.maker.forget(&name);
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.filler.abort();
    }
}

impl Maker {
    async fn fill(self, give: mpsc::Sender<String>) {
        loop {
            // The place comes first: no more are made than there is room for.
            let Ok(place) = give.reserve().await else {
                return;
            };
            match self.make().await {
                Ok(name) => place.send(name),
                Err(error) => {
                    tracing::warn!(%error, "cannot make a network namespace ahead");
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        }
    }

    async fn make(&self) -> io::Result<String> {
        let mut bits = [0_u8; 10];
        getrandom::fill(&mut bits).map_err(io::Error::other)?;
        let name = data_encoding::BASE32_NOPAD
            .encode(&bits)
            .to_ascii_lowercase();
        lock(&self.unclaimed).insert(name.clone());
        let made = self.namespaces.make(&name).await;
        if let Err(error) = made {
            let removed = self.namespaces.remove(&name);
            self.forget(&name);
            removed?;
            return Err(error);
        }
        Ok(name)
    }

    fn forget(&self, name: &str) {
        lock(&self.unclaimed).remove(name);
    }
}

/// What is locked here is whole after any panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
