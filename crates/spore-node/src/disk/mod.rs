//! Scratch disks: sparse raw files with an empty ext4, made by the host before any guest saw them.
//!
//! Used by `hypervisor/room.rs`. One empty file per size is made by `mkfs.ext4` (as an unprivileged
//! user, on a file that no guest ever wrote) and copied, holes and all, for each VM; a few of them
//! are kept. Never opens, checks or resizes a file that a guest could have written: those are only
//! unlinked.

pub mod overlay;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, SeekFrom, copy_file_range, ioctl_ficlone, open, seek, statvfs};
use rustix::io::Errno;
use spore_wire::id::VmId;

use crate::hypervisor::PrepareError;
use crate::tool::{self, ToolError};

/// Changes when the empty file system is made in another way, so that old ones are not used.
const RECIPE: u32 = 1;

const MIB: u64 = 1024 * 1024;

/// How long `mkfs.ext4` may take; it writes some hundred kilobytes.
const MKFS_LIMIT: Duration = Duration::from_secs(50);

/// Empty file systems that are kept, one per size; the oldest goes first.
const EMPTY_MAX: usize = 8;

/// The scratch disks of all VMs of this daemon.
#[derive(Clone, Debug)]
pub struct Disks {
    folder: PathBuf,
    /// Who runs `mkfs.ext4`.
    uid: u32,
}

impl Disks {
    /// Disks under `folder`, which is made if it is missing.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: PathBuf, uid: u32) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        // The uid of mkfs passes through, others of the host do not get here: the folder above is
        // root's alone.
        fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
        let this = Self { folder, uid };
        this.trim_empty(None)?;
        Ok(this)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.folder.join(format!("{vm}.raw"))
    }

    fn empty(&self, mib: u32) -> PathBuf {
        self.folder.join(format!("empty-{RECIPE}-{mib}.ext4"))
    }

    /// Makes the scratch disk of `vm`. Blocks.
    ///
    /// # Errors
    /// [`PrepareError::DiskFull`] when the data disk has no room for all of it.
    pub fn make(&self, vm: VmId, mib: u32) -> Result<(), PrepareError> {
        self.try_make(vm, mib).map_err(|source| {
            if source.raw_os_error() == Some(Errno::NOSPC.raw_os_error()) {
                PrepareError::DiskFull { mib }
            } else {
                PrepareError::Step {
                    what: "a scratch disk",
                    source,
                }
            }
        })
    }

    fn try_make(&self, vm: VmId, mib: u32) -> io::Result<()> {
        let room = statvfs(&self.folder)?;
        if room.f_bavail.saturating_mul(room.f_frsize) < u64::from(mib) * MIB {
            return Err(Errno::NOSPC.into());
        }
        let empty = self.empty(mib);
        loop {
            match File::open(&empty) {
                Ok(empty) => return copy_sparse(&empty, &self.path(vm)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            self.make_empty(vm, &empty, mib)?;
            self.trim_empty(Some(&empty))?;
        }
    }

    /// Removes empty file systems of other recipes, and the oldest beyond [`EMPTY_MAX`] but `new`.
    fn trim_empty(&self, new: Option<&Path>) -> io::Result<()> {
        let ours = format!("empty-{RECIPE}-");
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("empty-") || new.is_some_and(|new| entry.path() == new) {
                continue;
            }
            match entry.metadata() {
                Ok(meta) if name.starts_with(&ours) => kept.push((meta.modified()?, entry.path())),
                Ok(_other_recipe) => remove_if_there(&entry.path())?,
                // Another VM's trim was here first.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        kept.sort();
        let most = EMPTY_MAX - usize::from(new.is_some());
        let surplus = kept.len().saturating_sub(most);
        for (_made, path) in &kept[..surplus] {
            remove_if_there(path)?;
        }
        Ok(())
    }

    /// Two VMs may make the same one at once: each has a name of its own until it is whole.
    fn make_empty(&self, vm: VmId, empty: &Path, mib: u32) -> io::Result<()> {
        let draft = self.folder.join(format!("{vm}.draft"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&draft)?;
        file.set_len(u64::from(mib) * MIB)?;
        chown(&draft, Some(self.uid), Some(self.uid))?;
        let mut mkfs = Command::new("mkfs.ext4");
        // No journal: the disk is gone with its VM, so nothing is ever replayed.
        mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal"])
            .args([
                "-E",
                "lazy_itable_init=1,nodiscard,root_owner=0:0",
                "/dev/stdin",
            ])
            .env_clear()
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .current_dir("/")
            .uid(self.uid)
            .gid(self.uid)
            .stdin(file);
        if let Err(error) = tool::run(mkfs, MKFS_LIMIT, "install the package e2fsprogs") {
            fs::remove_file(&draft)?;
            return match error {
                ToolError::Failed { said, .. } if said.contains("No space left") => {
                    Err(Errno::NOSPC.into())
                }
                other => Err(other.into()),
            };
        }
        chown(&draft, Some(0), Some(0))?;
        fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
        fs::rename(&draft, empty)
    }

    /// Makes the scratch disk of `vm` anew, as `from` is. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remake(&self, vm: VmId, from: &File) -> io::Result<()> {
        self.remove(vm)?;
        copy_sparse(from, &self.path(vm))
    }

    /// A copy that has no name: it is gone with its last holder. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn copy_nameless(&self, from: &File) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let copy = File::from(open(&self.folder, flags, Mode::from_raw_mode(0o600))?);
        copy_into(from, &copy)?;
        Ok(copy)
    }

    /// Opens the scratch disk of `vm` for its VMM.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open_scratch(&self, vm: VmId) -> io::Result<OwnedFd> {
        Ok(File::options()
            .read(true)
            .write(true)
            .open(self.path(vm))?
            .into())
    }

    /// The scratch disk of `vm` that was unlinked, opened again through the process that has it. It
    /// is known by the name that it had, which nobody but this daemon could give a file.
    ///
    /// # Errors
    /// What the kernel says; `NotFound` when the process has it not.
    pub fn open_held(&self, vm: VmId, pid: u32) -> io::Result<File> {
        let folder = self.folder.canonicalize()?;
        let name = format!("{}/{vm}.raw (deleted)", folder.display());
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            // It closes others while it is looked at.
            if fs::read_link(&path).is_ok_and(|target| target.as_os_str() == &*name) {
                return File::open(path);
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Unlinks what bears the id of `vm`; whoever has it open keeps it until they end.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, vm: VmId) -> io::Result<()> {
        for path in [self.path(vm), self.folder.join(format!("{vm}.draft"))] {
            remove_if_there(&path)?;
        }
        Ok(())
    }

    /// The VMs that have a disk here.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> io::Result<Vec<VmId>> {
        let mut vms = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let stem = Path::new(&name).file_stem().and_then(|stem| stem.to_str());
            vms.extend(stem.and_then(|stem| stem.parse::<VmId>().ok()));
        }
        vms.sort();
        vms.dedup();
        Ok(vms)
    }
}

pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Copies a file and its holes; shares its blocks where the file system can.
pub(crate) fn copy_sparse(from: &File, to: &Path) -> io::Result<()> {
    let to = File::options().write(true).create_new(true).open(to)?;
    to.set_permissions(Permissions::from_mode(0o600))?;
    copy_into(from, &to)
}

fn copy_into(from: &File, to: &File) -> io::Result<()> {
    match ioctl_ficlone(to, from) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let size = from.metadata()?.size();
    to.set_len(size)?;
    copy_data(from, to, size)
}

/// Copies what is no hole in the first `size` bytes of `from` to the same places of `to`.
pub(crate) fn copy_data(from: &File, to: &File, size: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(size);
        copy_range(from, to, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let left = usize::try_from(end - read_at).map_err(io::Error::other)?;
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_copied) => {}
            // Two kinds of file system: the kernel leaves it to us.
            Err(Errno::XDEV) => return copy_bytes(from, to, read_at, end),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut at = start;
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let count = from.read_at(&mut buffer[..most], at)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(&buffer[..count], at)?;
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use spore_wire::id::VmId;

    use super::{Disks, EMPTY_MAX, RECIPE};
    use crate::hypervisor::PrepareError;

    #[test]
    fn a_scratch_disk_is_an_empty_ext4_and_sparse_and_private() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: mkfs.ext4 is run as another user, which needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::open(folder.path().join("scratch"), 290_000).unwrap();
        let vms: Vec<VmId> = (1..3).map(|n| VmId::from_bytes([n; 16])).collect();
        for vm in &vms {
            disks.make(*vm, 512).unwrap();
            let path = disks.path(*vm);
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(meta.len(), 512 << 20);
            assert!(meta.blocks() * 512 < 16 << 20, "{} blocks", meta.blocks());
            assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o600));
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes[0x438..0x43a], [0x53, 0xef]);
        }
        assert_eq!(disks.list().unwrap(), vms);
        for vm in vms {
            disks.remove(vm).unwrap();
            disks.remove(vm).unwrap();
        }
        assert_eq!(disks.list().unwrap(), []);
    }

    #[test]
    fn a_few_empty_file_systems_are_kept_and_those_of_another_recipe_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = folder.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let name = |recipe: u32, mib: u32| format!("empty-{recipe}-{mib}.ext4");
        for mib in 0..20 {
            for recipe in [RECIPE, RECIPE + 1] {
                std::fs::write(scratch.join(name(recipe, mib)), b"").unwrap();
            }
        }
        let vm = VmId::from_bytes([1; 16]);
        std::fs::write(scratch.join(format!("{vm}.raw")), b"").unwrap();
        let disks = Disks::open(scratch.clone(), 290_000).unwrap();
        let files = || {
            let entries = std::fs::read_dir(&scratch).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.collect::<Vec<_>>()
        };
        let ours = format!("empty-{RECIPE}-");
        assert_eq!(files().len(), EMPTY_MAX + 1, "{:?}", files());
        assert!(
            files()
                .iter()
                .filter(|name| name.starts_with(&ours))
                .count()
                == EMPTY_MAX
        );
        let new = disks.empty(99);
        std::fs::write(&new, b"").unwrap();
        disks.trim_empty(Some(&new)).unwrap();
        assert!(
            new.exists() && files().len() == EMPTY_MAX + 1,
            "{:?}",
            files()
        );
    }

    #[test]
    fn a_disk_larger_than_the_free_space_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::open(folder.path().join("scratch"), 290_000).unwrap();
        let refused = disks.make(VmId::from_bytes([9; 16]), u32::MAX).unwrap_err();
        assert!(
            matches!(refused, PrepareError::DiskFull { mib: u32::MAX }),
            "{refused}"
        );
        assert_eq!(disks.list().unwrap(), []);
    }
}
