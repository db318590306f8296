//! The app's folder: which one the tenant finds at `/app`.
//!
//! Called by [`crate::thaw`]. Its disk is always there, so that a VM may be forked for whichever
//! app: a boot mounts nothing of it, and each thaw says what is on the disk now. A fork's disk is
//! another one than its source's at the same place, which the kernel finds out by its size only
//! when the driver takes hold of it anew.
//!
//! ```text
//!   /sys/bus/virtio/drivers/virtio_blk: unbind, bind     the agent's root
//!     ─▶ /folder, read-only
//!     ─▶ overlay under /scratch/app ──moved──▶ /app      the tenant's root
//! ```

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use spore_wire::guest::DEFAULT_UID;

use crate::disk;
use crate::sys;
use crate::view::{ViewError, make_folder, mount_disk, mount_point, step};

/// Where the disk is mounted, in the agent's root.
const LOWER: &str = "/folder";

/// What the tenant writes to its folder, and what the overlay needs beside it.
const UPPER: &str = "/scratch/app";
const WORK: &str = "/scratch/app-work";

/// Where the tenant finds it.
const SHOWN_AT: &str = "/app";

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";

/// The folder as it is shown now.
#[derive(Debug, Default)]
pub struct Folder {
    shown: Option<String>,
}

impl Folder {
    /// Shows the folder of this name, or none; one that is shown already stays as it is, with what
    /// the tenant has written and opened.
    ///
    /// # Errors
    /// [`ViewError`] with the step that failed, such as hiding a folder in which a process is.
    pub fn show(&mut self, tenant: BorrowedFd<'_>, wanted: Option<&str>) -> Result<(), ViewError> {
        if self.shown.as_deref() == wanted {
            return Ok(());
        }
        if self.shown.is_some() {
            in_namespace(tenant, || {
                unmount(SHOWN_AT, UnmountFlags::NOFOLLOW).map_err(step("hide the folder from /app"))
            })?;
            unmount(LOWER, UnmountFlags::NOFOLLOW).map_err(step("unmount the folder"))?;
            for path in [UPPER, WORK] {
                fs::remove_dir_all(path).map_err(step(format!("empty {path}")))?;
            }
            self.shown = None;
        }
        let Some(wanted) = wanted else {
            return Ok(());
        };
        take_hold_anew()?;
        let device = disk::find(disk::FOLDER).ok_or(ViewError::NoFolder)?;
        mount_disk(&device, LOWER)?;
        for path in [UPPER, WORK] {
            make_folder(path)?;
        }
        // The upper folder's owner is the merged one's: the default user may write to /app.
        chown(UPPER, Some(DEFAULT_UID), Some(DEFAULT_UID))
            .map_err(step("give /app to the default user"))?;
        let overlay = overlay().map_err(step("mount the overlay over the folder"))?;
        in_namespace(tenant, || {
            let at = mount_point(Path::new("/"), "app")?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&overlay, "", CWD, &at, flags).map_err(step("show the folder at /app"))
        })?;
        self.shown = Some(wanted.to_owned());
        Ok(())
    }
}

/// Lets the driver leave the disk and take it again: it reads the size only then.
fn take_hold_anew() -> Result<(), ViewError> {
    let device = disk::find(disk::FOLDER).ok_or(ViewError::NoFolder)?;
    let name = device.file_name().map(OsString::from).unwrap_or_default();
    let block = Path::new("/sys/block").join(name).join("device");
    let target = fs::read_link(&block).map_err(step("find the folder's device"))?;
    let Some(device) = target.file_name().and_then(|name| name.to_str()) else {
        return Err(ViewError::NoFolder);
    };
    for order in ["unbind", "bind"] {
        fs::write(format!("{DRIVER}/{order}"), device)
            .map_err(step(format!("{order} the folder's disk ({device})")))?;
    }
    Ok(())
}

/// The folder under what the tenant writes, mounted nowhere yet.
fn overlay() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("lowerdir", LOWER), ("upperdir", UPPER), ("workdir", WORK)] {
        fsconfig_set_string(&context, key, value)?;
    }
    // Nothing here outlives the VM, so a tenant's fsync need not wait for a disk.
    fsconfig_set_flag(&context, "volatile")?;
    fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// Does `work` in a thread that sees the tenant's mounts, and ends.
fn in_namespace<T: Send>(
    tenant: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, ViewError> + Send,
) -> Result<T, ViewError> {
    let enter = move || -> io::Result<()> {
        sys::unshare_root()?;
        let kind = Some(LinkNameSpaceType::Mount);
        Ok(move_into_link_name_space(tenant.as_fd(), kind)?)
    };
    let thread = move || {
        enter().map_err(step("enter the tenant's view"))?;
        work()
    };
    std::thread::scope(|scope| {
        scope
            .spawn(thread)
            .join()
            .map_err(|_panic| ViewError::Thread)
    })?
}
