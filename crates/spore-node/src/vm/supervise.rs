//! What stands behind an actor: a bug in it costs its own VM and nothing else.
//!
//! Spawned with each actor (`vm/actor.rs`). Never acts while the actor lives.

use core::panic::AssertUnwindSafe;
use core::time::Duration;
use std::sync::{Arc, PoisonError};

use futures_util::FutureExt as _;
use spore_wire::node::{VmFailure, VmFailureKind, VmStatus};

use super::actor::{Actor, Host, give_back, status_of};
use super::guest::chain;
use super::state::Milestone;
use crate::journal::Record;

/// Runs an actor to its end, and cleans up after one that panics.
pub(super) async fn run(host: Arc<Host>, actor: Actor) {
    let record = actor.record.clone();
    let vm = record.start.vm;
    let run = AssertUnwindSafe(Box::pin(actor.run())).catch_unwind();
    if run.await.is_err() {
        tracing::error!(%vm, "a VM's actor panicked; the VM is released");
        clean_up(&host, record).await;
    }
    let mut actors = host.actors.lock().unwrap_or_else(PoisonError::into_inner);
    actors.remove(&vm);
}

async fn clean_up(host: &Host, mut record: Record) {
    let vm = record.start.vm;
    record.milestone = Milestone::EndingFailed;
    if let Err(error) = host.journal.write(&record) {
        tracing::error!(%vm, error = %chain(&error), "the journal cannot be written");
    }
    while let Err(error) = host.hypervisor.release(vm).await {
        tracing::error!(%vm, error = %chain(&error), "something of a VM is left; tried again");
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    if let Err(error) = host.journal.remove(vm) {
        tracing::error!(%vm, error = %chain(&error), "the journal cannot be removed");
    }
    give_back(host, vm);
    let failure = VmFailure {
        kind: VmFailureKind::Died,
        message: "the node made a mistake and removed the VM: start another, and report the \
                  node's log"
            .to_owned(),
        last_lines: Vec::new(),
    };
    let status = VmStatus {
        failure: Some(failure),
        phase: spore_wire::node::VmPhase::Failed,
        ..status_of(host, &record)
    };
    host.board.publish(status, None);
}
