//! Snapshots on the disk: staged, sealed, opened, and removed once nothing needs them.
//!
//! Used by the node. Blocking: daemons call it through `spawn_blocking`. Knows no driver: device
//! state is bytes, disk layers are files with a word for their format. Never decides what is needed
//! and never finds anything by a hash: a snapshot is named by its id, inside one account.
//!
//! ```text
//!   .staging/SNAP ──files, each fsynced──▶ header.json, fsync ──▶ fsync folder ──rename──▶
//!       ACCOUNT/SNAP ──fsync both folders──▶ there
//!       ACCOUNT/SNAP ──rename──▶ .staging/SNAP.removed ──fsync──▶ files removed
//! ```
//!
//! | file | what |
//! |---|---|
//! | `header.json` | what it is of and what the others hash to ([`header`]) |
//! | `memory.index`, `memory.pages` | the pages of memory that it holds itself ([`pages`]) |
//! | `state` | the driver's device state |
//! | `disk.N`, `disk.N.index` | its disk layers, lowest first |
//! | `claimed-by` | the VM that goes on from a suspended one |
//!
//! A snapshot is there once its folder has its place, so a crash leaves it whole or not at all, and
//! what is in `.staging` is removed when the store is opened. What another one continues is removed
//! after that one. Staging, removing and opening exclude each other for the moment in which folders
//! change; what is read later is read from files that are open by then.

mod blocks;
mod claim;
pub mod ground;
pub mod hash;
pub mod header;
pub mod key;
pub mod lineage;
pub mod memory;
pub mod opened;
pub mod pages;
pub mod staging;
mod upkeep;
mod verified;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use spore_wire::cause::chain;
use spore_wire::id::{SnapshotId, VmId};
use spore_wire::snapshot::{PUBLIC_ACCOUNT, SnapshotInfo};
use thiserror::Error;

use self::header::{HEADER_BYTES_MAX, Header, HeaderError, Protection};
use self::lineage::{DEPTH_MAX, Lineage};
use self::pages::{ReadError, WriteError};
use self::verified::Verified;
use crate::clock::Clock;

pub use self::upkeep::{Cascade, Removal};

/// Where unfinished and removed snapshots are: no account has a name with a dot.
const STAGING: &str = ".staging";

const HEADER: &str = "header.json";
const PAGES: &str = "memory.pages";
const PAGES_INDEX: &str = "memory.index";
const STATE: &str = "state";
const CLAIM: &str = "claimed-by";

/// The longest name of an account.
const ACCOUNT_BYTES_MAX: usize = 40;

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `/var/lib/spore/snapshots`.
    pub folder: PathBuf,
    /// `/run/spore`: gone with the host, as is what is known of files.
    pub runtime: PathBuf,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// Told after each step.
    pub points: Arc<dyn StorePoints>,
}

/// The snapshots of one node.
#[derive(Clone, Debug)]
pub struct SnapshotStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    clock: Arc<dyn Clock>,
    points: Arc<dyn StorePoints>,
    verified: Verified,
    /// Held while folders change.
    filing: Mutex<Filing>,
}

/// What is under way.
#[derive(Debug, Default)]
struct Filing {
    staged: BTreeMap<SnapshotId, Reservation>,
}

/// What a snapshot that is being staged needs of others.
#[derive(Debug)]
struct Reservation {
    account: String,
    parent: Option<SnapshotId>,
    bytes: u64,
}

/// A step after which a crash must leave each snapshot whole or absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorePoint {
    /// Its folder in staging was made.
    Staged,
    /// Its memory is on the disk.
    MemoryWritten,
    /// Its device state is on the disk.
    StateWritten,
    /// A disk layer of it is on the disk.
    DiskWritten,
    /// Its header is on the disk.
    HeaderWritten,
    /// The names of its files are.
    Synced,
    /// Its folder has its place.
    Renamed,
    /// That is on the disk.
    Filed,
    /// What a compacted snapshot took the place of is gone.
    Replaced,
    /// Who goes on from it is on the disk, but not in its place.
    ClaimWritten,
    /// Who goes on from it is in its place.
    Claimed,
    /// A removed snapshot is out of its place.
    Unlisted,
    /// Its files are gone.
    Removed,
}

/// Told after each step of the store, so that a test can end the daemon there.
pub trait StorePoints: std::fmt::Debug + Send + Sync + 'static {
    /// The store has done this for `id`, and nothing that follows from it.
    fn reached(&self, id: SnapshotId, point: StorePoint);
}

/// Lets every step happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoStorePoints;

impl StorePoints for NoStorePoints {
    fn reached(&self, _id: SnapshotId, _point: StorePoint) {}
}

/// What of a snapshot is not as it was written.
#[derive(Debug, Error)]
pub enum Damage {
    /// The header.
    #[error(transparent)]
    Header(HeaderError),
    /// Index or pages of memory.
    #[error(transparent)]
    Memory(ReadError),
    /// The device state.
    #[error("its device state is damaged")]
    State,
    /// The proof of a disk layer.
    #[error("the index of disk layer {0} is damaged")]
    DiskIndex(usize),
    /// A disk layer.
    #[error("chunk {chunk} of disk layer {layer} is damaged")]
    Disk {
        /// Which layer, from the lowest of this snapshot.
        layer: usize,
        /// Its first bad chunk of 64 KiB.
        chunk: u32,
    },
    /// A disk layer is longer or shorter.
    #[error("disk layer {0} has another length than it was written with")]
    DiskLength(usize),
    /// Who goes on from it.
    #[error("the name of the VM that goes on from it is damaged")]
    Claim,
    /// A file that belongs to it.
    #[error("its file `{0}` is missing")]
    File(String),
    /// What it continues.
    #[error("what it continues, snapshot {0}, is missing")]
    Parent(SnapshotId),
    /// It continues more than any snapshot may.
    #[error("it continues more than {DEPTH_MAX} snapshots")]
    Depth,
}

/// Why the store could not do something.
#[derive(Debug, Error)]
pub enum StoreError {
    /// This account has no such snapshot.
    #[error("there is no snapshot {0}: `spore snapshot ls` shows what there is")]
    Missing(SnapshotId),
    /// It is not what was written.
    #[error("snapshot {id} cannot be used: remove it and make it again")]
    Damaged {
        /// Which.
        id: SnapshotId,
        /// In what.
        source: Box<Damage>,
    },
    /// It is there already, or on its way.
    #[error("there is a snapshot {0} already: ids are used once")]
    Exists(SnapshotId),
    /// Not the name of an account.
    #[error("`{0}` is no name of an account: a-z, then up to 39 of a-z, 0-9 and `-`, is expected")]
    Account(String),
    /// The new header would not be readable.
    #[error("snapshot {id} cannot be described")]
    Header {
        /// Which.
        id: SnapshotId,
        /// Why.
        source: HeaderError,
    },
    /// Secrets would be readable on the disk.
    #[error(
        "snapshot {0} would hold secrets or continue an encrypted one, so it must be encrypted: \
         give it a key"
    )]
    Unprotected(SnapshotId),
    /// It continues one of a VM with another size of memory.
    #[error("snapshot {id} has {found} MiB of memory, and what it continues has {expected}")]
    MemorySize {
        /// Which.
        id: SnapshotId,
        /// What it has.
        found: u32,
        /// What it should have.
        expected: u32,
    },
    /// It would continue too many.
    #[error("snapshot {parent} continues {DEPTH_MAX} others already: compact it first")]
    Depth {
        /// The deep one.
        parent: SnapshotId,
    },
    /// Its disk would have too many layers.
    #[error(
        "the disk of snapshot {0} would have more than {max} layers: have the VM merge them first",
        max = header::DISK_LAYERS_MAX
    )]
    DiskLayers(SnapshotId),
    /// A whole memory was given for a snapshot that holds changes of what nobody compares it with.
    #[error("snapshot {0} continues another one: its changed pages are expected, not a memory")]
    WholeMemory(SnapshotId),
    /// Its memory cannot be written.
    #[error("cannot write the memory of snapshot {id}")]
    Pages {
        /// Which.
        id: SnapshotId,
        /// Why.
        source: WriteError,
    },
    /// The device state is larger than any.
    #[error(
        "the device state of snapshot {0} is larger than {max} bytes",
        max = header::STATE_BYTES_MAX
    )]
    StateSize(SnapshotId),
    /// It was sealed before it had all its parts.
    #[error("snapshot {0} has no device state yet")]
    Unfinished(SnapshotId),
    /// It is encrypted.
    #[error("snapshot {0} is encrypted, and its key is not there")]
    NoKey(SnapshotId),
    /// The key is another's.
    #[error("the key that was given for snapshot {0} does not open it")]
    WrongKey(SnapshotId),
    /// Others continue it.
    #[error(
        "snapshot {id} is continued by {children:?}: remove them first, compact them, or remove \
         them all with `--cascade`"
    )]
    Dependents {
        /// Which.
        id: SnapshotId,
        /// By what, directly.
        children: Vec<SnapshotId>,
    },
    /// A tag, a VM or an app needs it.
    #[error("snapshot {0} is in use: remove what uses it first")]
    InUse(SnapshotId),
    /// Another VM goes on from it.
    #[error("snapshot {id} is that of a suspended VM, and VM {by} goes on from it already")]
    Claimed {
        /// Which.
        id: SnapshotId,
        /// Who.
        by: VmId,
    },
    /// It is being compacted, or another one on top of it is being made.
    #[error("snapshot {0} is being worked on: try again in a moment")]
    Busy(SnapshotId),
    /// The account has too much.
    #[error(
        "the snapshots of account `{account}` would take {bytes} bytes, and {quota} are allowed: \
         remove some with `spore snapshot rm` or `spore snapshot gc`"
    )]
    Quota {
        /// Whose.
        account: String,
        /// With the new one.
        bytes: u64,
        /// The most.
        quota: u64,
    },
    /// The data disk is full.
    #[error(
        "no space is left for snapshots in {folder}: remove some with `spore snapshot rm` or \
         `spore snapshot gc`, or free the disk"
    )]
    DiskFull {
        /// Where.
        folder: PathBuf,
    },
    /// The host has no memory for it.
    #[error("cannot make a memory of {bytes} bytes for snapshot {id}")]
    Memory {
        /// Which.
        id: SnapshotId,
        /// How much.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel gives no random bytes.
    #[error("the kernel gives no random bytes for a nonce")]
    Random(#[source] getrandom::Error),
    /// A file of the store cannot be read or written.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A snapshot's folder with what its header says.
#[derive(Debug)]
struct Listed {
    account: String,
    id: SnapshotId,
    header: Result<Header, StoreError>,
}

impl SnapshotStore {
    /// The store in its folder, made if it is not there, rid of what a crash left. Legal once per
    /// folder: nobody stages meanwhile.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn open(settings: Settings) -> Result<Self, StoreError> {
        let Settings {
            folder,
            runtime,
            clock,
            points,
        } = settings;
        let staging = folder.join(STAGING);
        make_folder(&staging)?;
        for left in names(&staging)? {
            let left = staging.join(left);
            // Folders of snapshots, and claims, which are files.
            let removed = if left.is_dir() {
                fs::remove_dir_all(&left)
            } else {
                fs::remove_file(&left)
            };
            removed.map_err(file("remove", &left))?;
        }
        let inner = Inner {
            verified: Verified::load(runtime.join("verified.json")),
            folder,
            clock,
            points,
            filing: Mutex::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    fn filing(&self) -> MutexGuard<'_, Filing> {
        let filing = self.inner.filing.lock();
        filing.unwrap_or_else(PoisonError::into_inner)
    }

    fn reached(&self, id: SnapshotId, point: StorePoint) {
        self.inner.points.reached(id, point);
    }

    fn staging(&self) -> PathBuf {
        self.inner.folder.join(STAGING)
    }

    fn account_folder(&self, account: &str) -> Result<PathBuf, StoreError> {
        let is_first = |c: char| c.is_ascii_lowercase();
        let is_other = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
        if account.len() <= ACCOUNT_BYTES_MAX
            && account.starts_with(is_first)
            && account.bytes().all(is_other)
        {
            Ok(self.inner.folder.join(account))
        } else {
            Err(StoreError::Account(account.chars().take(80).collect()))
        }
    }

    fn place(&self, account: &str, id: SnapshotId) -> Result<PathBuf, StoreError> {
        Ok(self.account_folder(account)?.join(id.to_string()))
    }

    /// The header of `account`'s snapshot `id`: of no other account's.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::Damaged`].
    pub fn header(&self, account: &str, id: SnapshotId) -> Result<Header, StoreError> {
        let folder = self.place(account, id)?;
        let damaged = |damage| damaged(id, damage);
        let path = folder.join(HEADER);
        let bytes = match File::open(&path) {
            Ok(found) => read(found, HEADER_BYTES_MAX as u64).map_err(file("read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(if folder.exists() {
                    damaged(Damage::File(HEADER.to_owned()))
                } else {
                    StoreError::Missing(id)
                });
            }
            Err(error) => return Err(file("open", &path)(error)),
        };
        let header = Header::decode(&bytes);
        let header = header.and_then(|header| header.check_place(account, id).map(|()| header));
        header.map_err(|error| damaged(Damage::Header(error)))
    }

    /// The header of `id` as `account` finds it: its own, or the platform's.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::Damaged`].
    pub fn find(&self, account: &str, id: SnapshotId) -> Result<Header, StoreError> {
        self.header(self.owner_of(account, id)?, id)
    }

    /// The headers of `id` and of what it continues, itself first.
    fn lineage(&self, account: &str, id: SnapshotId) -> Result<Vec<Header>, StoreError> {
        let mut chain = vec![self.header(account, id)?];
        while let Some(parent) = chain.last().and_then(|last| last.meta.parent.clone()) {
            if chain.len() > DEPTH_MAX {
                return Err(damaged(id, Damage::Depth));
            }
            match self.header(&parent.account, parent.id) {
                Ok(header) => chain.push(header),
                Err(StoreError::Missing(gone)) => return Err(damaged(id, Damage::Parent(gone))),
                Err(other) => return Err(other),
            }
        }
        Ok(chain)
    }

    /// Every snapshot of every account, in the order of accounts and ids.
    fn catalogue(&self) -> Result<Vec<Listed>, StoreError> {
        let mut found = Vec::new();
        for account in names(&self.inner.folder)? {
            // Staging, and what the file system itself keeps at its root.
            let Ok(folder) = self.account_folder(&account) else {
                continue;
            };
            for id in names(&folder)? {
                if let Ok(id) = id.parse::<SnapshotId>() {
                    let header = self.header(&account, id);
                    let account = account.clone();
                    found.push(Listed {
                        account,
                        id,
                        header,
                    });
                }
            }
        }
        Ok(found)
    }

    /// The snapshots of `account`, in the order of their ids.
    ///
    /// # Errors
    /// [`StoreError::File`]. One that is damaged is listed as such.
    pub fn list(&self, account: &str) -> Result<Vec<SnapshotInfo>, StoreError> {
        self.account_folder(account)?;
        let _alone = self.filing();
        let catalogue = self.catalogue()?;
        let lineage = lineage_of(&catalogue);
        let own = catalogue.iter().filter(|listed| listed.account == account);
        own.map(|listed| self.describe(listed, &lineage)).collect()
    }

    /// The snapshots of all accounts.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn all(&self) -> Result<Vec<SnapshotInfo>, StoreError> {
        let _alone = self.filing();
        let catalogue = self.catalogue()?;
        let lineage = lineage_of(&catalogue);
        let all = catalogue.iter();
        all.map(|listed| self.describe(listed, &lineage)).collect()
    }

    /// One snapshot of `account`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::File`].
    pub fn info(&self, account: &str, id: SnapshotId) -> Result<SnapshotInfo, StoreError> {
        self.account_folder(account)?;
        let _alone = self.filing();
        let catalogue = self.catalogue()?;
        let is_it = |listed: &&Listed| listed.account == account && listed.id == id;
        let found = catalogue.iter().find(is_it);
        let found = found.ok_or(StoreError::Missing(id))?;
        self.describe(found, &lineage_of(&catalogue))
    }

    fn describe(&self, listed: &Listed, lineage: &Lineage) -> Result<SnapshotInfo, StoreError> {
        let header = listed.header.as_ref();
        let depth = lineage.chain(listed.id).len() - 1;
        Ok(SnapshotInfo {
            id: listed.id,
            account: listed.account.clone(),
            meta: header.ok().map(|header| header.meta.clone()),
            encrypted: header.is_ok_and(|header| header.protection == Protection::Sealed),
            depth: u32::try_from(depth).unwrap_or(u32::MAX),
            bytes: folder_bytes(&self.place(&listed.account, listed.id)?)?,
            memory_pages: header.map_or(0, |header| header.memory.pages),
            children: lineage.children(listed.id),
            damage: header.err().map(|error| chain(error)),
        })
    }

    /// What the snapshots of `account` take on the disk.
    ///
    /// # Errors
    /// [`StoreError::Account`] and [`StoreError::File`].
    pub fn usage_bytes(&self, account: &str) -> Result<u64, StoreError> {
        let folder = self.account_folder(account)?;
        if !folder.exists() {
            return Ok(0);
        }
        let bytes = |name: String| folder_bytes(&folder.join(name));
        names(&folder)?.into_iter().map(bytes).sum()
    }

    /// Whether any account has a snapshot of this id.
    fn is_anywhere(&self, id: SnapshotId) -> Result<bool, StoreError> {
        let accounts = names(&self.inner.folder)?;
        let mut places = accounts
            .iter()
            .filter_map(|account| self.place(account, id).ok());
        Ok(places.any(|place| place.exists()))
    }

    /// The account in which `account` finds `id`: its own, or the platform's.
    fn owner_of<'a>(&self, account: &'a str, id: SnapshotId) -> Result<&'a str, StoreError> {
        for owner in [account, PUBLIC_ACCOUNT] {
            if self.place(owner, id)?.exists() {
                return Ok(owner);
            }
        }
        Err(StoreError::Missing(id))
    }
}

fn lineage_of(catalogue: &[Listed]) -> Lineage {
    let parent = |listed: &Listed| {
        let header = listed.header.as_ref().ok()?;
        header.meta.parent.as_ref().map(|parent| parent.id)
    };
    catalogue
        .iter()
        .map(|listed| (listed.id, parent(listed)))
        .collect()
}

fn damaged(id: SnapshotId, damage: Damage) -> StoreError {
    let source = Box::new(damage);
    StoreError::Damaged { id, source }
}

fn disk_name(layer: usize) -> String {
    format!("disk.{layer}")
}

fn disk_index_name(layer: usize) -> String {
    format!("disk.{layer}.index")
}

/// The names in a folder that are text, in their order; none when it is no folder.
fn names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(names);
        }
        Err(error) => return Err(file("list", folder)(error)),
    };
    for entry in entries {
        let name = entry.map_err(file("list", folder))?.file_name();
        names.extend(name.into_string());
    }
    names.sort();
    Ok(names)
}

/// What the files of a folder take on the disk.
fn folder_bytes(folder: &Path) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for name in names(folder)? {
        match fs::symlink_metadata(folder.join(name)) {
            Ok(found) => bytes += found.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file("look at", folder)(error)),
        }
    }
    Ok(bytes)
}

/// At most `max` bytes of a file, and one more if there are more, so that no limit looks kept.
fn read(from: impl io::Read, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(max + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn make_folder(folder: &Path) -> Result<(), StoreError> {
    let mut made = fs::DirBuilder::new();
    made.recursive(true).mode(0o700);
    made.create(folder).map_err(file("make", folder))
}

fn new_file(path: &Path) -> Result<File, StoreError> {
    let made = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    made.map_err(file("make", path))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut new = new_file(path)?;
    new.write_all(bytes).map_err(file("write", path))?;
    new.sync_all().map_err(file("sync", path))
}

fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(file("sync", folder))
}

fn file(what: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| {
        if is_full(&source) {
            let folder = path.parent().unwrap_or(path).to_path_buf();
            return StoreError::DiskFull { folder };
        }
        StoreError::File {
            what,
            path: path.to_path_buf(),
            source,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    is(Errno::NOSPC) || is(Errno::DQUOT)
}

#[cfg(test)]
mod tests;
