//! The tenant's view of its machine: a mount namespace with the image as its root.
//!
//! Called by [`crate::init`] once. The namespace is made by a thread that leaves the agent's for
//! good (unshare, mounts, pivot_root) and then ends; what stays is a descriptor of it, which every
//! tenant's process enters ([`crate::launch`]), and one of its root, for files.
//!
//! ```text
//!   /            overlay: image (read-only) under scratch
//!   /app         overlay: the app's folder (read-only) under scratch, once a thaw says that there
//!                is one ([`crate::folder`])
//!   /dev         the devices that harm nobody; its own devpts
//!   /proc /sys   its own mounts, /sys read-only; in /proc the boot id is a file of the agent's,
//!                since the kernel's is the same in every fork
//!   /run         tmpfs; /run/secrets is the app's user's; /run/spore is the agent's, read-only
//! ```

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use spore_wire::guest::DEFAULT_UID;
use thiserror::Error;

use crate::disk::{self, DiskError, FileSystem};
use crate::sys;

/// Where the agent's own folder for the second face is, before it is bound to `/run/spore`.
pub const FACE_FOLDER: &str = "/face";

/// What the tenant reads as the kernel's boot id; in the agent's root, where only the agent writes.
pub const BOOT_ID_FILE: &str = "/boot_id";

/// Where the kernel tells it, below the root.
const BOOT_ID: &str = "proc/sys/kernel/random/boot_id";

/// Character devices of the tenant: name, major, minor (`Documentation/admin-guide/devices.txt`).
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Why there is no view.
#[derive(Debug, Error)]
pub enum ViewError {
    /// There is no root image.
    #[error("the VM has no disk with an image")]
    NoImage,
    /// There is no disk for a folder.
    #[error("the VM has no disk with an app's folder")]
    NoFolder,
    /// A disk is unusable.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The thread that makes it has died.
    #[error("the thread that makes the tenant's view has died")]
    Thread,
}

/// The tenant's view.
#[derive(Debug)]
pub struct View {
    /// Its mount namespace.
    pub namespace: OwnedFd,
    /// Its root folder.
    pub root: OwnedFd,
}

impl View {
    /// Mounts the disks in the agent's namespace and makes the tenant's.
    ///
    /// # Errors
    /// [`ViewError`] with the step that failed.
    pub fn make() -> Result<Self, ViewError> {
        let image = disk::find(disk::IMAGE).ok_or(ViewError::NoImage)?;
        mount_disk(&image, "/image")?;
        mount_scratch()?;
        make_boot_id()?;
        std::thread::spawn(make_namespace)
            .join()
            .map_err(|_panic| ViewError::Thread)?
    }
}

pub(crate) fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> ViewError {
    move |source| ViewError::Step {
        step: step.into(),
        source: source.into(),
    }
}

pub(crate) fn mount_disk(device: &Path, at: &str) -> Result<(), ViewError> {
    let kind = FileSystem::probe(device)?;
    make_folder(at)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(device, at, kind.name(), flags, None).map_err(step(format!(
        "mount {} ({})",
        device.display(),
        kind.name()
    )))
}

/// The scratch disk, whose file system the host has made while it was empty; without one, memory.
fn mount_scratch() -> Result<(), ViewError> {
    let at = "/scratch";
    make_folder(at)?;
    match disk::find(disk::SCRATCH) {
        Some(device) => {
            let kind = FileSystem::probe(&device)?;
            let flags = MountFlags::NODEV | MountFlags::NOATIME;
            mount(&device, at, kind.name(), flags, None).map_err(step(format!(
                "mount {} ({})",
                device.display(),
                kind.name()
            )))?;
        }
        None => mount_tmpfs(at, c"mode=0755,size=50%", MountFlags::NODEV)?,
    }
    for folder in ["root", "root-work"] {
        make_folder(format!("{at}/{folder}"))?;
    }
    Ok(())
}

/// Until the first thaw it is the kernel's.
fn make_boot_id() -> Result<(), ViewError> {
    fs::copy(Path::new("/").join(BOOT_ID), BOOT_ID_FILE)
        .and_then(|_bytes| fs::set_permissions(BOOT_ID_FILE, fs::Permissions::from_mode(0o444)))
        .map_err(step("keep the boot id"))
}

fn make_namespace() -> Result<View, ViewError> {
    sys::unshare_mounts().map_err(step("leave the agent's mount namespace"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make mounts private"))?;
    make_folder("/view")?;
    mount_root()?;
    mount_kernel_files()?;
    make_devices()?;
    mount_run()?;
    let tmp = view_point("tmp")?;
    let sticky = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(&tmp, sticky).map_err(step("open /tmp to everybody"))?;
    pivot()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = open("/proc/thread-self/ns/mnt", flags, Mode::empty())
        .map_err(step("keep the tenant's mount namespace"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open("/", flags, Mode::empty()).map_err(step("keep the tenant's root"))?;
    Ok(View { namespace, root })
}

/// Makes `/view` the root and forgets the agent's: both at the same place, so that no folder of the
/// tenant's is needed to hold the old one (pivot_root(2), NOTES).
fn pivot() -> Result<(), ViewError> {
    chdir("/view").map_err(step("enter the tenant's root"))?;
    pivot_root(".", ".").map_err(step("make the tenant's root the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("forget the agent's root"))?;
    chdir("/").map_err(step("enter the tenant's root"))
}

fn mount_root() -> Result<(), ViewError> {
    // volatile: nothing here outlives the VM, so a tenant's fsync need not wait for a disk.
    let options = c"lowerdir=/image,upperdir=/scratch/root,workdir=/scratch/root-work,volatile";
    mount("overlay", "/view", "overlay", MountFlags::NODEV, options)
        .map_err(step("mount the overlay over the image"))
}

fn mount_kernel_files() -> Result<(), ViewError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let proc = view_point("proc")?;
    mount("proc", &proc, "proc", flags, None).map_err(step("mount the tenant's /proc"))?;
    let boot_id = format!("/view/{BOOT_ID}");
    mount_bind(BOOT_ID_FILE, &boot_id).map_err(step("show the boot id"))?;
    let read_only = MountFlags::BIND | MountFlags::RDONLY | flags;
    mount_remount(&boot_id, read_only, c"").map_err(step("make the boot id read-only"))?;
    let sys = view_point("sys")?;
    mount("sysfs", &sys, "sysfs", flags | MountFlags::RDONLY, None)
        .map_err(step("mount the tenant's /sys"))
}

fn make_devices() -> Result<(), ViewError> {
    let dev = view_point("dev")?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_tmpfs(&dev, c"mode=0755,size=1m", flags)?;
    for (name, major, minor) in DEVICES {
        let path = format!("{dev}/{name}");
        let device = makedev(major, minor);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, &path, FileType::CharacterDevice, mode, device)
            .map_err(step(format!("make /dev/{name}")))?;
        // The umask of PID 1 has taken bits away.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
            .map_err(step(format!("open /dev/{name} to everybody")))?;
    }
    for (name, target) in LINKS {
        symlink(target, format!("{dev}/{name}")).map_err(step(format!("make /dev/{name}")))?;
    }
    let pts = format!("{dev}/pts");
    make_folder(&pts)?;
    let options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount("devpts", &pts, "devpts", flags, options).map_err(step("mount /dev/pts"))?;
    let shm = format!("{dev}/shm");
    make_folder(&shm)?;
    mount_tmpfs(&shm, c"mode=1777,size=50%", flags | MountFlags::NODEV)
}

fn mount_run() -> Result<(), ViewError> {
    let run = view_point("run")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount_tmpfs(&run, c"mode=0755,size=25%", flags)?;
    let secrets = format!("{run}/secrets");
    make_folder(&secrets)?;
    // 4 MiB: 64 secrets of the largest size.
    mount_tmpfs(&secrets, c"mode=0750,size=4m", flags | MountFlags::NOEXEC)?;
    std::os::unix::fs::chown(&secrets, Some(DEFAULT_UID), Some(DEFAULT_UID))
        .map_err(step("give /run/secrets to the default user"))?;
    let spore = format!("{run}/spore");
    make_folder(&spore)?;
    mount_bind(FACE_FOLDER, &spore).map_err(step("show /run/spore"))?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | flags;
    mount_remount(&spore, flags, c"").map_err(step("make /run/spore read-only"))?;
    let program = format!("{spore}/bin/spore-guest");
    mount_bind("/bin/spore-guest", &program).map_err(step("show the agent's program"))?;
    mount_remount(&program, flags, c"").map_err(step("make the agent's program read-only"))
}

fn view_point(name: &str) -> Result<String, ViewError> {
    mount_point(Path::new("/view"), name)
}

/// A real folder of that name in the tenant's root: an image in which it is a link or a file, or
/// not there at all, gets one. What we mount must not follow a tenant's link.
pub(crate) fn mount_point(root: &Path, name: &str) -> Result<String, ViewError> {
    let path = root.join(name);
    match fs::symlink_metadata(&path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            fs::remove_file(&path).map_err(step(format!("replace the image's /{name}")))?;
            make_folder(&path)?;
        }
        Err(_) => make_folder(&path)?,
    }
    Ok(path.to_string_lossy().into_owned())
}

fn mount_tmpfs(at: &str, options: &std::ffi::CStr, flags: MountFlags) -> Result<(), ViewError> {
    mount("tmpfs", at, "tmpfs", flags, options).map_err(step(format!("mount memory at {at}")))
}

pub(crate) fn make_folder(path: impl AsRef<Path>) -> Result<(), ViewError> {
    let path = path.as_ref();
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(step(format!("make the folder {}", path.display()))(error))
        }
        _ => fs::set_permissions(path, fs::Permissions::from_mode(0o755))
            .map_err(step(format!("open the folder {}", path.display()))),
    }
}
