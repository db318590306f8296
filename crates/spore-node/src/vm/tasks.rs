//! Tasks that end together: what a node spawns dies with its scope, never behind its back.
//!
//! Used by the node and everything below it. Ending a scope drops its tasks at their next await;
//! it touches no VM.

use core::future::Future;

use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Spawns tasks that end when the scope does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    token: CancellationToken,
}

/// A scope that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Scope {
    tasks: Tasks,
    _ends: DropGuard,
}

impl Tasks {
    /// Spawns a task of this scope.
    pub(crate) fn spawn<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let token = self.token.clone();
        // The handle is not kept: the tracker counts the task, and a panic is the business of
        // whoever supervises what the task serves.
        drop(self.tracker.spawn(async move {
            token.run_until_cancelled(future).await;
        }));
    }

    /// A scope inside this one.
    pub(crate) fn scope(&self) -> Scope {
        let token = self.token.child_token();
        Scope {
            _ends: token.clone().drop_guard(),
            tasks: Self {
                tracker: self.tracker.clone(),
                token,
            },
        }
    }

    /// Ends every task when it is dropped before it is disarmed.
    pub(crate) fn end_on_drop(&self) -> DropGuard {
        self.token.clone().drop_guard()
    }

    /// Ends every task and waits until all are gone.
    pub(crate) async fn end(&self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

impl Scope {
    /// The tasks of this scope.
    pub(crate) const fn tasks(&self) -> &Tasks {
        &self.tasks
    }
}
