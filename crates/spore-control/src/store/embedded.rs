//! The store of one host: a redb file.
//!
//! Used by the daemon. Every commit is synced before it returns. All work runs on blocking
//! threads, never on a runtime's worker. The file is locked: a second daemon on the same folder is
//! refused. A crash at any instant leaves the last whole commit (redb's two roots and checksums).
//!
//! After an error of the disk, such as a full one, redb serves nothing more until the file is
//! opened again. The next call does so, and goes on as soon as the disk does.

use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::watch::Publisher;
use super::{
    CommitError, Entry, LIST_ITEMS_MAX, Order, Range, Store, StoreError, Transaction, Watch, Write,
};

/// Keys to eight bytes of version, little endian, and the value.
const ENTRIES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("entries");
/// `revision` to the last commit's.
const COUNTERS: TableDefinition<'static, &str, u64> = TableDefinition::new("counters");

/// The pages that redb keeps in memory: a store of 10,000 apps fits.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// A redb file.
#[derive(Clone)]
pub struct EmbeddedStore {
    shared: Arc<Shared>,
}

struct Shared {
    held: RwLock<Held>,
    open: Box<Opener>,
    publisher: Publisher,
    path: PathBuf,
}

/// Opens the file, the first time and after each error of the disk.
type Opener = dyn Fn() -> Result<Database, redb::DatabaseError> + Send + Sync;

struct Held {
    /// `None` after an error of the disk, until it is opened again.
    database: Option<Database>,
    /// How often it was opened: whoever met an error closes what it met, never a newer one.
    opened: u64,
}

impl core::fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EmbeddedStore")
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Opens the file `path`, or makes it, readable by its owner only.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let path = path.to_owned();
        blocking(move || {
            make_private(&path).map_err(|source| StoreError::Open {
                path: path.display().to_string(),
                source: Box::new(redb::Error::Io(source)),
            })?;
            let at = path.clone();
            let open = move || {
                // Not made again: a store that vanished is not an empty one.
                let file = std::fs::File::options().read(true).write(true).open(&at);
                let file = file.map_err(redb::StorageError::Io)?;
                Database::builder()
                    .set_cache_size(CACHE_BYTES)
                    .create_with_backend(FileBackend::new(file)?)
            };
            Self::with_opener(Box::new(open), path)
        })
        .await
    }

    /// Opens a store over any backend of redb: how tests make a disk that fails.
    #[cfg(test)]
    pub(super) fn on_backend(
        backend: impl redb::StorageBackend + Clone,
    ) -> Result<Self, StoreError> {
        let open = move || {
            Database::builder()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(backend.clone())
        };
        Self::with_opener(Box::new(open), PathBuf::from("(backend)"))
    }

    fn with_opener(open: Box<Opener>, path: PathBuf) -> Result<Self, StoreError> {
        let database = open().map_err(not_open(&path))?;
        make_tables(&database).map_err(engine("make its tables"))?;
        let held = Held {
            database: Some(database),
            opened: 1,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                held: RwLock::new(held),
                open,
                publisher: Publisher::new(),
                path,
            }),
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl Fn(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.run(doing, work)).await
    }
}

impl Shared {
    /// Does `work`; opens the file first when an error closed it, also one of another call.
    fn run<T>(
        &self,
        doing: &'static str,
        work: impl Fn(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let mut is_again = false;
        loop {
            let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
            let Some(database) = &held.database else {
                drop(held);
                self.open_again()?;
                continue;
            };
            let (result, opened) = (work(database), held.opened);
            drop(held);
            match result {
                Err(redb::Error::PreviousIo) if !is_again => {
                    is_again = true;
                    self.close(opened);
                }
                Err(error) => {
                    if matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo) {
                        self.close(opened);
                    }
                    return Err(engine(doing)(error));
                }
                Ok(done) => return Ok(done),
            }
        }
    }

    fn close(&self, opened: u64) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if held.opened == opened {
            // Dropping it gives up its lock of the file.
            held.database = None;
        }
    }

    fn open_again(&self) -> Result<(), StoreError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if held.database.is_none() {
            let database = (self.open)().map_err(not_open(&self.path))?;
            tracing::warn!(path = %self.path.display(), "the store was opened again");
            held.database = Some(database);
            held.opened += 1;
        }
        Ok(())
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = key.to_owned();
        self.run("read an entry", move |database| {
            let table = database.begin_read()?.open_table(ENTRIES)?;
            Ok(table.get(key.as_str())?.map(|v| entry(&key, v.value())))
        })
        .await
    }

    async fn list(&self, range: Range) -> Result<Vec<Entry>, StoreError> {
        self.run("list entries", move |database| list(database, &range))
            .await
    }

    async fn count(&self, prefix: &str) -> Result<u64, StoreError> {
        let prefix = prefix.to_owned();
        self.run("count entries", move |database| {
            let table = database.begin_read()?.open_table(ENTRIES)?;
            let mut count = 0;
            for item in table.range(prefix.as_str()..)? {
                if !item?.0.value().starts_with(&prefix) {
                    break;
                }
                count += 1;
            }
            Ok(count)
        })
        .await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        transaction.check()?;
        let shared = Arc::clone(&self.shared);
        let committed = blocking(move || {
            let outcome = shared.run("commit", |database| commit(database, &transaction))?;
            // Published on this thread: the caller may be cancelled, the commit is not.
            if let Ok(revision) = &outcome {
                shared.publisher.publish(&transaction, *revision);
            }
            Ok(outcome)
        })
        .await?;
        committed.map_err(|key| CommitError::Conflict { key })
    }

    fn watch(&self, prefix: &str) -> Watch {
        self.shared.publisher.watch(prefix)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_cancelled) => Err(StoreError::Stopping),
    }
}

fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map(drop)
}

fn make_tables(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    drop(transaction.open_table(ENTRIES)?);
    drop(transaction.open_table(COUNTERS)?);
    transaction.commit()?;
    Ok(())
}

fn list(database: &Database, range: &Range) -> Result<Vec<Entry>, redb::Error> {
    let table = database.begin_read()?.open_table(ENTRIES)?;
    let prefix = range.prefix.as_str();
    let after = range.after.as_deref().filter(|after| *after >= prefix);
    let limit = range.limit.min(LIST_ITEMS_MAX);
    let mut entries = Vec::new();
    match range.order {
        Order::Rising => {
            let from = after.map_or(Bound::Included(prefix), Bound::Excluded);
            for item in table.range::<&str>((from, Bound::Unbounded))? {
                let (key, value) = item?;
                if entries.len() >= limit || !key.value().starts_with(prefix) {
                    break;
                }
                entries.push(entry(key.value(), value.value()));
            }
        }
        Order::Falling => {
            // Behind every key with the prefix: keys are ASCII, and this is not.
            let end = format!("{prefix}\u{10ffff}");
            let to = range.after.as_deref().unwrap_or(&end);
            for item in table
                .range::<&str>((Bound::Included(prefix), Bound::Excluded(to)))?
                .rev()
            {
                if entries.len() >= limit {
                    break;
                }
                let (key, value) = item?;
                if key.value().starts_with(prefix) {
                    entries.push(entry(key.value(), value.value()));
                }
            }
        }
    }
    Ok(entries)
}

/// `Ok(Err(key))` is a condition that did not hold.
fn commit(
    database: &Database,
    transaction: &Transaction,
) -> Result<Result<u64, String>, redb::Error> {
    let writer = database.begin_write()?;
    let revision;
    {
        let mut entries = writer.open_table(ENTRIES)?;
        for condition in &transaction.conditions {
            let version = entries
                .get(condition.key.as_str())?
                .map_or(0, |value| split(value.value()).0);
            if version != condition.version {
                return Ok(Err(condition.key.clone()));
            }
        }
        let mut counters = writer.open_table(COUNTERS)?;
        revision = counters.get("revision")?.map_or(0, |r| r.value()) + 1;
        counters.insert("revision", revision)?;
        for write in &transaction.writes {
            match write {
                Write::Put { key, value } => {
                    let mut bytes = Vec::with_capacity(value.len() + 8);
                    bytes.extend_from_slice(&revision.to_le_bytes());
                    bytes.extend_from_slice(value);
                    entries.insert(key.as_str(), bytes.as_slice())?;
                }
                Write::Delete { key } => drop(entries.remove(key.as_str())?),
            }
        }
    }
    writer.commit()?;
    Ok(Ok(revision))
}

fn entry(key: &str, stored: &[u8]) -> Entry {
    let (version, value) = split(stored);
    Entry {
        key: key.to_owned(),
        version,
        value: value.to_vec(),
    }
}

fn split(stored: &[u8]) -> (u64, &[u8]) {
    let (version, value) = stored
        .split_first_chunk::<8>()
        .expect("every value was written with its version in front");
    (u64::from_le_bytes(*version), value)
}

fn not_open(path: &Path) -> impl Fn(redb::DatabaseError) -> StoreError {
    let path = path.display().to_string();
    move |source| match redb::Error::from(source) {
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path: path.clone() },
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            StoreError::DiskFull
        }
        source => StoreError::Open {
            path: path.clone(),
            source: Box::new(source),
        },
    }
}

fn engine(doing: &'static str) -> impl Fn(redb::Error) -> StoreError {
    move |source| match &source {
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            StoreError::DiskFull
        }
        _ => StoreError::Engine {
            doing,
            source: Box::new(source),
        },
    }
}
