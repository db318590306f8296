//! Operations under way: progress in memory, the beginning and the end in the store.
//!
//! Begun by the API, ended by the reconcilers, read by long polls. An operation that a daemon's
//! end interrupted is written down as failed by the next start; nothing goes on half-done.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use spore_api::error::ErrorCode;
use spore_api::name::AccountName;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::store::record::operation::{
    OPERATIONS, OperationRecord, StoredOperationState, names_of, operation_key,
};
use crate::store::record::{decode, encode, load};
use crate::store::{CommitError, SharedStore, StoreError, Transaction, every};

/// The most steps that are kept of one operation: a build prints many.
const STEPS_MAX: usize = 200;

/// Operations that are not over.
#[derive(Debug)]
pub struct Operations {
    store: SharedStore,
    running: Mutex<HashMap<String, Running>>,
}

#[derive(Debug)]
struct Running {
    record: watch::Sender<OperationRecord>,
    /// When the last step began.
    step_began: Instant,
}

impl Running {
    fn is_running(&self) -> bool {
        self.record.borrow().state == StoredOperationState::Running
    }
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It made this.
    Succeeded {
        /// A release's number, an image's id.
        result: String,
    },
    /// It did not.
    Failed {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
}

impl Operations {
    /// No operation under way.
    #[must_use]
    pub fn new(store: SharedStore) -> Self {
        Self {
            store,
            running: Mutex::default(),
        }
    }

    /// An operation's first record.
    #[must_use]
    pub fn record(
        kind: &str,
        target: &str,
        release: Option<u64>,
        created_at_ms: i64,
    ) -> OperationRecord {
        OperationRecord {
            kind: kind.to_owned(),
            target: target.to_owned(),
            release,
            state: StoredOperationState::Running,
            steps: Vec::new(),
            revision: 1,
            error: None,
            result: None,
            created_at_ms,
        }
    }

    /// Follows an operation whose record was committed just now.
    pub fn begin(&self, account: &AccountName, id: &str, record: OperationRecord) {
        let running = Running {
            record: watch::Sender::new(record),
            step_began: Instant::now(),
        };
        self.running().insert(operation_key(account, id), running);
    }

    /// A new step begins; the one before is over. The same text again is the same step.
    pub fn step(&self, account: &AccountName, id: &str, text: &str) {
        let mut all = self.running();
        let Some(running) = all.get_mut(&operation_key(account, id)) else {
            return;
        };
        let ms = elapsed_ms(running.step_began);
        let began = &mut running.step_began;
        running.record.send_if_modified(|record| {
            if record.steps.last().is_some_and(|last| last.0 == text) {
                return false;
            }
            *began = Instant::now();
            close_step(record, ms);
            if record.steps.len() == STEPS_MAX {
                record.steps.remove(0);
            }
            record.steps.push((text.to_owned(), None));
            record.revision += 1;
            true
        });
    }

    /// Whether an operation is followed and not over.
    #[must_use]
    pub fn is_running(&self, account: &AccountName, id: &str) -> bool {
        let all = self.running();
        all.get(&operation_key(account, id))
            .is_some_and(|running| running.is_running())
    }

    /// An operation is over although the store does not take it: who waits is told, and the end is
    /// kept until it is written down.
    pub fn over(&self, account: &AccountName, id: &str, outcome: Outcome) {
        let all = self.running();
        let held = all.get(&operation_key(account, id));
        let Some(record) = held.map(|held| held.record.borrow().clone()) else {
            return;
        };
        drop(all);
        let ended = self.ended(account, id, record, outcome);
        if let Some(held) = self.running().get(&operation_key(account, id)) {
            held.record.send_replace(ended);
        }
    }

    /// The operations that are over and not written down.
    #[must_use]
    pub fn unwritten(&self) -> Vec<(AccountName, String, OperationRecord)> {
        let all = self.running();
        let over = all.iter().filter(|(_, held)| !held.is_running());
        over.filter_map(|(key, held)| {
            let (account, id) = names_of(key)?;
            Some((account, id.to_owned(), held.record.borrow().clone()))
        })
        .collect()
    }

    /// The record as it ends, for the commit that ends it. Nothing is told before that commit. One
    /// that is over stays what it is.
    #[must_use]
    pub fn ended(
        &self,
        account: &AccountName,
        id: &str,
        stored: OperationRecord,
        outcome: Outcome,
    ) -> OperationRecord {
        let all = self.running();
        let running = all.get(&operation_key(account, id));
        let mut record = running.map_or(stored, |running| running.record.borrow().clone());
        if record.state != StoredOperationState::Running {
            return record;
        }
        let ms = running.map_or(0, |running| elapsed_ms(running.step_began));
        drop(all);
        close_step(&mut record, ms);
        record.revision += 1;
        match outcome {
            Outcome::Succeeded { result } => {
                record.state = StoredOperationState::Succeeded;
                record.result = Some(result);
            }
            Outcome::Failed { code, message } => {
                record.state = StoredOperationState::Failed;
                record.error = Some((code, message));
            }
        }
        record
    }

    /// The store holds how an operation ended, or that it never began: it is followed no more.
    /// Who waits is told `record`.
    pub fn end(&self, account: &AccountName, id: &str, record: Option<OperationRecord>) {
        let held = self.running().remove(&operation_key(account, id));
        if let (Some(held), Some(record)) = (held, record) {
            held.record.send_replace(record);
        }
    }

    /// Ends an operation that changes nothing else.
    ///
    /// # Errors
    /// When the store cannot serve; the end is kept and written down by the repair.
    pub async fn finish(
        &self,
        account: &AccountName,
        id: &str,
        outcome: Outcome,
    ) -> Result<(), StoreError> {
        let written = self.write_end(account, id, outcome.clone()).await;
        if written.is_err() {
            self.over(account, id, outcome);
        }
        written
    }

    async fn write_end(
        &self,
        account: &AccountName,
        id: &str,
        outcome: Outcome,
    ) -> Result<(), StoreError> {
        let key = operation_key(account, id);
        let stored = load::<OperationRecord>(&*self.store, &key).await?;
        let mut end = None;
        if let Some(stored) = stored
            && stored.record.state == StoredOperationState::Running
        {
            let record = self.ended(account, id, stored.record, outcome);
            let write = Transaction::default().put(&key, encode(&record));
            match self.store.commit(write).await {
                Ok(_) | Err(CommitError::Conflict { .. }) => end = Some(record),
                Err(CommitError::Store(error)) => return Err(error),
            }
        }
        self.end(account, id, end);
        Ok(())
    }

    /// The operation as it is, once its revision is above `after` or `wait` is over.
    ///
    /// # Errors
    /// When the store cannot serve.
    pub async fn wait(
        &self,
        account: &AccountName,
        id: &str,
        after: u64,
        wait: core::time::Duration,
    ) -> Result<Option<OperationRecord>, StoreError> {
        let key = operation_key(account, id);
        let running = self
            .running()
            .get(&key)
            .map(|running| running.record.subscribe());
        let Some(mut receiver) = running else {
            return Ok(load(&*self.store, &key).await?.map(|stored| stored.record));
        };
        let newer = receiver.wait_for(|record| record.revision > after);
        // A time that is over and an operation that is gone both leave the last state.
        drop(tokio::time::timeout(wait, newer).await);
        let record = receiver.borrow().clone();
        Ok(Some(record))
    }

    /// Writes down as failed what an earlier daemon left, and forgets what is older than
    /// `forget_before_ms`. Called once, before anything can begin.
    ///
    /// # Errors
    /// When the store cannot serve.
    pub async fn after_restart(
        &self,
        forget_before_ms: i64,
    ) -> Result<Vec<(AccountName, OperationRecord)>, CommitError> {
        let mut interrupted = Vec::new();
        let entries = every(&*self.store, OPERATIONS).await?;
        for entry in entries {
            let record: OperationRecord = decode(&entry).map_err(StoreError::from)?;
            let Some((account, id)) = names_of(&entry.key) else {
                continue;
            };
            if record.state != StoredOperationState::Running {
                if record.created_at_ms < forget_before_ms {
                    let forget = Transaction::default().delete(&entry.key);
                    self.store.commit(forget).await?;
                }
                continue;
            }
            let again = match record.kind.as_str() {
                "deploy" => "what served before serves on; deploy again",
                "rollback" => "what served before serves on; roll back again",
                _ => "nothing was changed; begin it again",
            };
            let outcome = Outcome::Failed {
                code: ErrorCode::Stopping,
                message: format!("the daemon ended during this {}: {again}", record.kind),
            };
            let ended = self.ended(&account, id, record, outcome);
            let write = Transaction::default()
                .when(&entry.key, entry.version)
                .put(&entry.key, encode(&ended));
            self.store.commit(write).await?;
            interrupted.push((account, ended));
        }
        Ok(interrupted)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close_step(record: &mut OperationRecord, ms: u64) {
    if let Some(last) = record.steps.last_mut() {
        last.1.get_or_insert(ms);
    }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
