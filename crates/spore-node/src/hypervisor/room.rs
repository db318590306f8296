//! What a VM needs of the host before its VMM runs: a folder, uids, a namespace, a cgroup, a disk.
//!
//! Used by drivers whose VMMs are processes. Each thing is found again by the VM's id alone:
//!
//! ```text
//!   <runtime>/vms/VMID/           record: machine.json, namespace (a name), sockets, egress.log
//!   <runtime>/uids/UID            whose uid it is: a VMM's, or an egress proxy's
//!   <runtime>/netns/NAME          namespaces: of the pool, or named in a record
//!   <data>/scratch/VMID.raw       until the VMM has it open
//!   cgroup PARENT/VMID
//! ```
//!
//! The record comes first and goes last, so that whatever instant the daemon dies at, `release` and
//! `sweep` find everything. What is done for one VM is done in order, by a lock per VM, and
//! goes on when the caller gives up.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use spore_wire::id::VmId;
use tokio::sync::OwnedMutexGuard;

use super::{Left, Machine, PrepareError, Prepared, ReleaseError, Swept};
use crate::cgroup::{CgroupError, Cgroups, Limits};
use crate::disk::Disks;
use crate::net::namespace::Namespaces;
use crate::net::pool::Pool;

/// Where rooms are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomConfig {
    /// Gone with the host's boot: `/run/spore`.
    pub runtime_dir: PathBuf,
    /// On the data disk: `/var/lib/spore`.
    pub data_dir: PathBuf,
    /// The cgroup above those of VMs.
    pub cgroup_parent: String,
    /// The first uid of the node's own range; it is used for the host's tools, the others for VMs.
    pub uid_first: u32,
    /// How many there are.
    pub uid_count: u32,
    /// Namespaces made ahead.
    pub pool_size: usize,
}

/// Why rooms cannot be made on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoomError {
    /// A folder or thread could not be made.
    #[error("cannot set up {path}: run as root on a file system that can be written")]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Cgroups cannot be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Whose uid it is that no VM has yet: nobody's, once its daemon is gone.
const PARKED: &str = "parked";

/// All rooms of this daemon.
#[derive(Debug)]
pub struct Rooms {
    config: RoomConfig,
    namespaces: Namespaces,
    pool: Pool,
    cgroups: Cgroups,
    disks: Disks,
    /// One lock per VM that something is being done for.
    locks: Mutex<BTreeMap<VmId, Weak<tokio::sync::Mutex<()>>>>,
    /// The uid that was given last: a uid rests for as long as possible before it is used again.
    uid_last: Mutex<u32>,
}

impl Rooms {
    /// Sets up the folders and starts filling the pool. Must be called inside a runtime.
    ///
    /// # Errors
    /// [`RoomError`].
    pub fn open(config: RoomConfig) -> Result<Self, RoomError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RoomError::Folder { path, source }
        };
        for name in ["", "vms", "uids", "netns", "stage", "parked"] {
            let path = config.runtime_dir.join(name);
            fs::create_dir_all(&path).map_err(failed(&path))?;
            fs::set_permissions(&path, Permissions::from_mode(0o700)).map_err(failed(&path))?;
        }
        let netns = config.runtime_dir.join("netns");
        let namespaces = Namespaces::open(netns.clone()).map_err(failed(&netns))?;
        let scratch = config.data_dir.join("scratch");
        let disks = Disks::open(scratch.clone(), config.uid_first).map_err(failed(&scratch))?;
        Ok(Self {
            pool: Pool::start(namespaces.clone(), config.pool_size),
            cgroups: Cgroups::open(&config.cgroup_parent)?,
            uid_last: Mutex::new(config.uid_first),
            locks: Mutex::default(),
            namespaces,
            disks,
            config,
        })
    }

    /// The namespaces, to be entered.
    #[must_use]
    pub const fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// The cgroups, to be entered and read.
    #[must_use]
    pub const fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    /// The scratch disks.
    #[must_use]
    pub const fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The folder of the VM's record and sockets, root's alone.
    #[must_use]
    pub fn folder(&self, vm: VmId) -> PathBuf {
        self.config.runtime_dir.join("vms").join(vm.to_string())
    }

    /// The empty folder that launchers put their roots together on.
    #[must_use]
    pub fn stage(&self) -> PathBuf {
        self.config.runtime_dir.join("stage")
    }

    /// Waits until nobody else does anything for `vm`.
    pub async fn lock(&self, vm: VmId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let entry = locks.entry(vm).or_default();
            entry.upgrade().unwrap_or_else(|| {
                let new = Arc::default();
                *entry = Arc::downgrade(&new);
                new
            })
        };
        lock.lock_owned().await
    }

    /// Makes the room of `vm`. The caller holds its lock. `made_ahead` is the uid of a VMM that
    /// waits ([`claim_parked_uid`](Self::claim_parked_uid)), which becomes the VM's.
    ///
    /// # Errors
    /// [`PrepareError`]; the caller releases.
    pub async fn prepare(
        self: &Arc<Self>,
        vm: VmId,
        machine: &Machine,
        limits: Limits,
        made_ahead: Option<u32>,
    ) -> Result<Prepared, PrepareError> {
        let step = |what| move |source| PrepareError::Step { what, source };
        let folder = self.folder(vm);
        self.write_record(vm, machine).map_err(step("the record"))?;
        let claim = |name: &str| write_whole(&folder.join("namespace"), name.as_bytes());
        let namespace = self
            .pool
            .take(claim)
            .await
            .map_err(step("a network namespace"))?;
        let this = Arc::clone(self);
        let disk_mib = machine.resources.disk_mib;
        let has_grants = !machine.egress.is_empty();
        let work = move || {
            let uid = match made_ahead {
                Some(uid) => this.pass_uid(uid, vm),
                None => this.claim_uid(&vm.to_string()),
            };
            let uid = uid.map_err(step("a uid"))?;
            let egress_uid = has_grants
                .then(|| this.claim_uid(&vm.to_string()))
                .transpose();
            let egress_uid = egress_uid.map_err(step("a uid"))?;
            this.cgroups
                .create(&vm.to_string(), &limits)
                .map_err(step("a cgroup"))?;
            if disk_mib > 0 {
                this.disks.prepare(vm, disk_mib)?;
            }
            Ok(Prepared {
                namespace,
                uid,
                egress_uid,
            })
        };
        blocking(work).await.map_err(step("a worker thread"))?
    }

    fn write_record(&self, vm: VmId, machine: &Machine) -> io::Result<()> {
        let folder = self.folder(vm);
        fs::create_dir(&folder)?;
        write_whole(&folder.join("machine.json"), &serde_json::to_vec(machine)?)
    }

    /// What the VM is made of, as it was prepared by this daemon or an earlier one.
    ///
    /// # Errors
    /// When there is no record.
    pub fn machine(&self, vm: VmId) -> io::Result<Machine> {
        Ok(serde_json::from_slice(&fs::read(
            self.folder(vm).join("machine.json"),
        )?)?)
    }

    /// A uid for a VMM that waits for a guest, which no VM has, and a path for its socket.
    pub(super) fn claim_parked_uid(&self) -> io::Result<(u32, PathBuf)> {
        let uid = self.claim_uid(PARKED)?;
        let socket = self.config.runtime_dir.join("parked").join(uid.to_string());
        // Of a VMM that an earlier daemon had waiting, which ended with it.
        remove_if_there(fs::remove_file(&socket))?;
        Ok((uid, socket))
    }

    /// Frees the uid of a VMM that waited for a guest, and is gone.
    pub(super) fn free_parked_uid(&self, uid: u32) -> io::Result<()> {
        remove_if_there(fs::remove_file(self.uid_file(uid)))
    }

    /// Whether a uid is still that of a VMM that waits for a guest, and no VM's.
    pub(super) fn is_parked_uid(&self, uid: u32) -> io::Result<bool> {
        Ok(fs::read_to_string(self.uid_file(uid))? == PARKED)
    }

    /// The uids that VMs may have.
    pub(super) const fn uids(&self) -> Range<u32> {
        self.config.uid_first + 1..self.config.uid_first + self.config.uid_count
    }

    /// Those that these VMs have.
    pub(super) fn uids_of(&self, vms: &BTreeSet<VmId>) -> io::Result<BTreeSet<u32>> {
        let claims = self.claimed_uids()?.into_iter();
        let theirs = claims.filter(|(_path, of)| of.is_some_and(|vm| vms.contains(&vm)));
        let uid = |(path, _of): (PathBuf, _)| path.file_name()?.to_str()?.parse().ok();
        Ok(theirs.filter_map(uid).collect())
    }

    /// Gives a VM the uid of a VMM that waited for a guest.
    fn pass_uid(&self, uid: u32, vm: VmId) -> io::Result<u32> {
        let draft = self
            .config
            .runtime_dir
            .join("parked")
            .join(format!("{uid}.draft"));
        fs::write(&draft, vm.to_string())?;
        fs::rename(draft, self.uid_file(uid))?;
        Ok(uid)
    }

    fn uid_file(&self, uid: u32) -> PathBuf {
        self.config.runtime_dir.join("uids").join(uid.to_string())
    }

    fn claim_uid(&self, whose: &str) -> io::Result<u32> {
        let mut last = self.uid_last.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.config.uid_count.max(2) - 1;
        for step in 1..=count {
            let offset = (*last - self.config.uid_first + step - 1) % count + 1;
            let uid = self.config.uid_first + offset;
            let path = self.uid_file(uid);
            match File::options().write(true).create_new(true).open(path) {
                Ok(mut file) => {
                    file.write_all(whose.as_bytes())?;
                    *last = uid;
                    return Ok(uid);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(
            "every uid of the range is in use: configure a larger one",
        ))
    }

    /// Each claimed uid's file and the VM it says; `None` when it was not written whole.
    fn claimed_uids(&self) -> io::Result<Vec<(PathBuf, Option<VmId>)>> {
        let mut claims = Vec::new();
        for entry in fs::read_dir(self.config.runtime_dir.join("uids"))? {
            let path = entry?.path();
            match fs::read_to_string(&path) {
                Ok(text) => claims.push((path, text.parse().ok())),
                // Released by another task meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(claims)
    }

    /// Kills what runs for `vm` and removes its room. The caller holds its lock.
    ///
    /// # Errors
    /// [`ReleaseError`].
    pub async fn release(self: &Arc<Self>, vm: VmId) -> Result<(), ReleaseError> {
        let this = Arc::clone(self);
        blocking(move || this.release_now(vm))
            .await
            .map_err(|source| ReleaseError {
                what: format!("VM {vm}"),
                source,
            })?
    }

    fn release_now(&self, vm: VmId) -> Result<(), ReleaseError> {
        let failed = |what: &str| {
            let what = format!("{what} of VM {vm}");
            move |source| ReleaseError { what, source }
        };
        self.cgroups
            .remove(&vm.to_string())
            .map_err(failed("the cgroup"))?;
        let folder = self.folder(vm);
        if let Some(name) = self.namespace_of(vm).map_err(failed("the record"))? {
            self.namespaces
                .remove(&name)
                .map_err(failed("the namespace"))?;
        }
        self.disks.remove(vm).map_err(failed("the scratch disk"))?;
        for (path, of) in self.claimed_uids().map_err(failed("the uid"))? {
            if of == Some(vm) {
                remove_if_there(fs::remove_file(path)).map_err(failed("the uid"))?;
            }
        }
        remove_if_there(fs::remove_dir_all(folder)).map_err(failed("the record"))
    }

    /// A name in a record is checked, since it becomes part of a path.
    fn namespace_of(&self, vm: VmId) -> io::Result<Option<String>> {
        match fs::read_to_string(self.folder(vm).join("namespace")) {
            Ok(name) if name.bytes().all(|byte| byte.is_ascii_alphanumeric()) => Ok(Some(name)),
            Ok(_cut) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the rooms of VMs that are not in `keep`, and whatever is nobody's.
    ///
    /// # Errors
    /// [`ReleaseError`] when what there is cannot be listed.
    pub async fn sweep(self: &Arc<Self>, keep: &BTreeSet<VmId>) -> Result<Swept, ReleaseError> {
        let mut swept = Swept::default();
        for vm in self
            .known()
            .map_err(|source| unreadable("the rooms", source))?
        {
            if !keep.contains(&vm) {
                let _guard = self.lock(vm).await;
                match self.release(vm).await {
                    Ok(()) => swept.removed.push(format!("VM {vm}")),
                    Err(error) => swept.left.push(Left {
                        vm: Some(vm),
                        error,
                    }),
                }
            }
        }
        let this = Arc::clone(self);
        let strays = blocking(move || this.sweep_strays())
            .await
            .map_err(|source| unreadable("strays", source))??;
        swept.removed.extend(strays.removed);
        swept.left.extend(strays.left);
        Ok(swept)
    }

    /// Every VM that anything bears the id of.
    fn known(&self) -> io::Result<BTreeSet<VmId>> {
        let mut vms: BTreeSet<VmId> = self.disks.list()?.into_iter().collect();
        vms.extend(
            self.cgroups
                .list()?
                .iter()
                .filter_map(|name| name.parse::<VmId>().ok()),
        );
        vms.extend(self.claimed_uids()?.into_iter().filter_map(|(_, vm)| vm));
        vms.extend(self.recorded()?);
        Ok(vms)
    }

    /// Every VM that has a record.
    fn recorded(&self) -> io::Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in fs::read_dir(self.config.runtime_dir.join("vms"))? {
            let name = entry?.file_name();
            vms.extend(name.to_str().and_then(|name| name.parse::<VmId>().ok()));
        }
        Ok(vms)
    }

    /// What is left once the rooms that are not kept are gone.
    fn sweep_strays(&self) -> Result<Swept, ReleaseError> {
        let mut swept = Swept::default();
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| ReleaseError { what, source }
        };
        for name in self.cgroups.list().map_err(failed("cgroups"))? {
            if name.parse::<VmId>().is_err() {
                let removed = self.cgroups.remove(&name);
                swept.note(format!("cgroup {name}"), removed);
            }
        }
        for (path, of) in self.claimed_uids().map_err(failed("uids"))? {
            if of.is_none() {
                let removed = remove_if_there(fs::remove_file(&path));
                swept.note(path.display().to_string(), removed);
            }
        }
        // Names are listed before claims are read: one that is made or claimed meanwhile is seen
        // as the pool's or the claimant's.
        let names = self.namespaces.list().map_err(failed("namespaces"))?;
        let mut kept = self.pool.unclaimed();
        for vm in self.recorded().map_err(failed("the records"))? {
            kept.extend(self.namespace_of(vm).map_err(failed("a record"))?);
        }
        for name in names {
            if !kept.contains(&name) {
                let removed = self.namespaces.remove(&name);
                swept.note(format!("namespace {name}"), removed);
            }
        }
        Ok(swept)
    }

    /// Stops the pool and removes the namespaces that wait in it.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn close(&self) -> io::Result<()> {
        self.pool.close()
    }
}

impl Swept {
    /// Something of nobody's was removed, or not.
    fn note(&mut self, what: String, removed: io::Result<()>) {
        match removed {
            Ok(()) => self.removed.push(what),
            Err(source) => self.left.push(Left {
                vm: None,
                error: ReleaseError { what, source },
            }),
        }
    }
}

fn unreadable(what: &str, source: io::Error) -> ReleaseError {
    ReleaseError {
        what: what.to_owned(),
        source,
    }
}

pub(crate) fn remove_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file that is whole or not there.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    fs::write(&draft, bytes)?;
    fs::rename(draft, path)
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T, W>(work: W) -> io::Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> T + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)
}

/// Runs `work` to its end even when the caller gives up, so that no step is left half done while
/// the next one begins.
pub(crate) async fn uncancelled<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> io::Result<T> {
    tokio::spawn(work).await.map_err(io::Error::other)
}
