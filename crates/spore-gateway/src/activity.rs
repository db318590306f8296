//! Handles of what is in flight: an app is idle when the last one is dropped.
//!
//! Made by `wake/mod.rs` with every admission; held by `forward.rs`, by the body of the answer and
//! by upgraded connections. Never decides anything.

use std::sync::Arc;

use crate::pool::Incarnation;
use crate::wake::App;

/// One admitted request. Dropping it says that the request, its answer and whatever it was
/// upgraded to are over.
#[derive(Debug)]
pub(crate) struct InFlight {
    app: Arc<App>,
    incarnation: Arc<Incarnation>,
}

impl InFlight {
    /// Counted in the app's machine already.
    pub(crate) const fn new(app: Arc<App>, incarnation: Arc<Incarnation>) -> Self {
        Self { app, incarnation }
    }

    pub(crate) const fn incarnation(&self) -> &Arc<Incarnation> {
        &self.incarnation
    }

    /// Counts that the VM ended under this request.
    pub(crate) fn count_death(&self) {
        self.app.count_death(self.incarnation.vm());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.app.finished(self.incarnation.vm());
    }
}
