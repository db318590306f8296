//! Scratch disks: what a VM writes over an empty ext4 that it shares with others, or over the disk
//! that it was forked with.
//!
//! Used by `hypervisor/room.rs` and the `qemu` driver. One empty file per size is made by
//! `mkfs.ext4` (as an unprivileged user, on a file that no guest ever wrote); a few of them are
//! kept, and who has one open keeps it. What VMs write goes to files without a name, which are gone
//! with their VMM. Never reads, checks or resizes a file that a guest could have written.

pub mod overlay;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, SeekFrom, copy_file_range, ioctl_ficlone, open, seek, statvfs};
use rustix::io::Errno;
use spore_wire::id::VmId;
use zeroize::Zeroizing;

use self::overlay::DiskKey;
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

    /// Where they are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn draft(&self, vm: VmId) -> PathBuf {
        self.folder.join(format!("{vm}.draft"))
    }

    fn empty(&self, mib: u32) -> PathBuf {
        self.folder.join(format!("empty-{RECIPE}-{mib}.ext4"))
    }

    /// Whether there is room for what `vm` may write, over an empty disk, which is there then.
    /// Blocks.
    ///
    /// # Errors
    /// [`PrepareError::DiskFull`] when the data disk has no room for all of it.
    pub fn prepare(&self, vm: VmId, mib: u32) -> Result<(), PrepareError> {
        let room = || -> io::Result<()> {
            let room = statvfs(&self.folder)?;
            if room.f_bavail.saturating_mul(room.f_frsize) < u64::from(mib) * MIB {
                return Err(Errno::NOSPC.into());
            }
            self.open_empty(vm, mib).map(drop)
        };
        room().map_err(|source| {
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

    /// The empty disk of `mib` MiB, to read; made for `vm` if it is not there. Blocks.
    ///
    /// # Errors
    /// What the kernel or `mkfs.ext4` says.
    pub fn open_empty(&self, vm: VmId, mib: u32) -> io::Result<File> {
        let empty = self.empty(mib);
        loop {
            match File::open(&empty) {
                Ok(empty) => return Ok(empty),
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
        let draft = self.draft(vm);
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

    /// The file of an empty disk of `mib` MiB with nothing below it, locked with `key` if there is
    /// one. It has no name: it is gone with its last holder. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new_layer(&self, mib: u32, key: Option<&DiskKey>) -> io::Result<File> {
        let size = u64::from(mib) * MIB;
        let layout = match key {
            Some(key) => {
                let mut seed = Zeroizing::new([0; 32]);
                getrandom::fill(&mut *seed).map_err(io::Error::other)?;
                overlay::overlay(size, key, &seed)
            }
            None => overlay::clear(size),
        };
        let file = self.unnamed()?;
        layout.map_err(io::Error::other)?.write_to(&file)?;
        Ok(file)
    }

    /// An empty file that has no name: it is gone with its last holder. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unnamed(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(&self.folder, flags, Mode::from_raw_mode(0o600))?;
        Ok(file.into())
    }

    /// Unlinks what bears the id of `vm`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, vm: VmId) -> io::Result<()> {
        remove_if_there(&self.draft(vm))
    }

    /// The VMs for which something was being made.
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
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use spore_wire::id::VmId;

    use super::overlay::DiskKey;
    use super::{Disks, EMPTY_MAX, RECIPE};
    use crate::hypervisor::PrepareError;

    #[test]
    fn an_empty_disk_is_an_ext4_and_sparse_and_shared() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: mkfs.ext4 is run as another user, which needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::open(folder.path().join("scratch"), 290_000).unwrap();
        let vms = [1, 2].map(|n| VmId::from_bytes([n; 16]));
        for vm in vms {
            disks.prepare(vm, 512).unwrap();
            let empty = disks.open_empty(vm, 512).unwrap();
            let meta = empty.metadata().unwrap();
            assert_eq!(meta.len(), 512 << 20);
            assert!(meta.blocks() * 512 < 16 << 20, "{} blocks", meta.blocks());
            assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o600));
            let mut magic = [0; 2];
            empty.read_exact_at(&mut magic, 0x438).unwrap();
            assert_eq!(magic, [0x53, 0xef]);
            assert!(empty.write_at(b"x", 0).is_err());
        }
        let all = std::fs::read_dir(folder.path().join("scratch")).unwrap();
        assert_eq!(all.count(), 1, "both have the same");
        assert_eq!(disks.list().unwrap(), []);
    }

    #[test]
    fn a_layer_has_no_name_and_another_seed_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::open(folder.path().to_owned(), 290_000).unwrap();
        let key = DiskKey::from_bytes([7; 32]);
        let read = |key: Option<&DiskKey>| {
            let file = disks.new_layer(64, key).unwrap();
            let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let locked = [read(Some(&key)), read(Some(&key))];
        assert!(locked[0] != locked[1] && locked[0].starts_with(b"QFI\xfb"));
        assert_eq!(read(None).len(), 4 * 64 * 1024);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
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
        std::fs::write(scratch.join(format!("{vm}.draft")), b"").unwrap();
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
        let refused = disks
            .prepare(VmId::from_bytes([9; 16]), u32::MAX)
            .unwrap_err();
        assert!(
            matches!(refused, PrepareError::DiskFull { mib: u32::MAX }),
            "{refused}"
        );
        assert_eq!(disks.list().unwrap(), []);
    }
}
