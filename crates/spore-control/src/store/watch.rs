//! Watching a prefix: every engine publishes its commits here.
//!
//! A watcher that reads too slowly is told [`Change::Missed`] once instead of what it missed, so a
//! watch never holds up a commit and never grows without bound.

use tokio::sync::broadcast;

use super::{Transaction, Write};

/// Changes that a slow watcher may be behind before it is told [`Change::Missed`].
const BEHIND_MAX: usize = 1024;

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An entry was written.
    Put {
        /// Its key.
        key: String,
        /// The revision of the commit.
        version: u64,
    },
    /// An entry was removed.
    Delete {
        /// Its key.
        key: String,
        /// The revision of the commit.
        version: u64,
    },
    /// Changes were lost: list the prefix again.
    Missed,
}

/// Receives the changes of one prefix.
#[derive(Debug)]
pub struct Watch {
    prefix: String,
    receiver: broadcast::Receiver<Change>,
}

impl Watch {
    /// The next change; `None` once the store is gone.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            match self.receiver.recv().await {
                Ok(change) => {
                    let (Change::Put { key, .. } | Change::Delete { key, .. }) = &change else {
                        return Some(change);
                    };
                    if key.starts_with(&self.prefix) {
                        return Some(change);
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => return Some(Change::Missed),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// The side of the engine.
#[derive(Debug)]
pub(super) struct Publisher(broadcast::Sender<Change>);

impl Publisher {
    pub(super) fn new() -> Self {
        Self(broadcast::Sender::new(BEHIND_MAX))
    }

    pub(super) fn watch(&self, prefix: &str) -> Watch {
        Watch {
            prefix: prefix.to_owned(),
            receiver: self.0.subscribe(),
        }
    }

    pub(super) fn publish(&self, transaction: &Transaction, version: u64) {
        for write in &transaction.writes {
            let change = match write {
                Write::Put { key, .. } => Change::Put {
                    key: key.clone(),
                    version,
                },
                Write::Delete { key } => Change::Delete {
                    key: key.clone(),
                    version,
                },
            };
            // An error only says that nobody watches.
            drop(self.0.send(change));
        }
    }
}
