//! From the kernel's first instruction of PID 1 to the session loop.
//!
//! Called by `main` as PID 1. Each step happens once and in this order:
//!
//! ```text
//!   own root (memory) ─▶ kernel file systems ─▶ modules ─▶ switch root ─▶ port and disks there
//!     ─▶ tenant's view ─▶ network ─▶ groups ─▶ session loop ─▶ power off
//! ```
//! The agent's root is a memory file system of its own, since the kernel refuses to pivot away from
//! the initramfs. A step that fails is said on the console and the VM ends: there is nobody to
//! repair it inside.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, Timespec, open};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{chdir, chroot};
use rustix::system::finit_module;
use rustix::thread::nanosleep;
use spore_wire::cause::chain;
use spore_wire::guest::PORT_NAME;
use thiserror::Error;

use crate::agent::{Agent, AgentStartError, Machine as _};
use crate::cgroup::{CgroupError, Groups, Stock};
use crate::guest::Guest;
use crate::launch::Launcher;
use crate::net::NetError;
use crate::reap::Reaper;
use crate::thaw::Real;
use crate::view::{FACE_FOLDER, View, ViewError};
use crate::{clock, console, disk, hook, net, procfs};

/// How long devices may take to appear after their modules are loaded.
const DEVICES_MS_MAX: u64 = 10_000;

const DEVICES_STEP_MS: u64 = 5;

/// The agent's own program, in the agent's root.
const PROGRAM: &str = "/bin/spore-guest";

/// Why the guest did not come up.
#[derive(Debug, Error)]
pub enum InitError {
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A device has not appeared.
    #[error("no {0} appeared within 10 s: is its driver among the modules?")]
    Missing(&'static str),
    /// No groups.
    #[error("no groups for tenants")]
    Groups(#[from] CgroupError),
    /// No view.
    #[error("no view for tenants")]
    View(#[from] ViewError),
    /// No network.
    #[error("no network")]
    Net(#[from] NetError),
    /// No agent.
    #[error("no agent")]
    Agent(#[from] AgentStartError),
}

/// Brings the guest up and serves it to its end.
pub fn run() {
    if let Err(error) = serve() {
        console::say(&format!("the guest did not come up: {}", chain(&error)));
    }
    Real::default().power_off();
    // PID 1 must not return; a kernel that can neither power off nor reset is left waiting.
    loop {
        pause(1000);
    }
}

fn serve() -> Result<(), InitError> {
    let reaper = Reaper::everybody().map_err(step("wait for children by a descriptor"))?;
    mount_own_root()?;
    load_modules()?;
    switch_root()?;
    let port = wait_for("agent's port", agent_port)?;
    wait_for("disk with an image", || disk::find(disk::IMAGE))?;
    wait_for("network interface", || {
        fs::metadata(format!("/sys/class/net/{}", net::INTERFACE)).ok()
    })?;
    let view = View::make()?;
    net::bring_up()?;
    // As late as possible, so that what the kernel took for disks and network is not given away.
    let stock = Stock {
        memory_bytes: procfs::memory_kib("MemAvailable").unwrap_or(0) * 1024,
        threads: procfs::threads_max().unwrap_or(u64::MAX),
    };
    let groups = Groups::make(Path::new("/sys/fs/cgroup"), stock)?;
    let guest = Guest {
        root: view.root,
        launcher: Launcher {
            program: PathBuf::from(PROGRAM),
            namespace: Some(view.namespace),
        },
        groups,
        reaper,
        address: net::guest_address(),
        face: Some(PathBuf::from(FACE_FOLDER).join("agent.sock")),
        leftovers: Vec::new(),
    };
    Agent::new(port, guest, Real::default())?.run();
    Ok(())
}

fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> InitError {
    move |source| InitError::Step {
        step: step.into(),
        source: source.into(),
    }
}

fn mount_own_root() -> Result<(), InitError> {
    let root = "/own";
    folder(root)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", root, "tmpfs", flags, c"mode=0755,size=2m").map_err(step("mount a root"))?;
    let bin = format!("{root}/bin");
    let face = format!("{root}{FACE_FOLDER}");
    for path in [&bin, &face, &format!("{face}/bin")] {
        folder(path)?;
    }
    let lib = format!("{face}/lib");
    folder(&lib)?;
    for (name, text) in hook::FILES {
        let path = format!("{lib}/{name}");
        fs::write(&path, text).map_err(step(format!("write {path}")))?;
    }
    let compiled = fs::read_dir("/hooks").map_err(step("list /hooks"))?;
    for hook in compiled {
        let hook = hook.map_err(step("list /hooks"))?;
        let path = Path::new(&lib).join(hook.file_name());
        fs::copy(hook.path(), &path).map_err(step(format!("show {}", path.display())))?;
    }
    let flags = flags | MountFlags::NOEXEC;
    for (name, kind, flags) in [
        ("proc", "proc", flags),
        ("sys", "sysfs", flags),
        ("dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC),
        ("sys/fs/cgroup", "cgroup2", flags),
    ] {
        let at = format!("{root}/{name}");
        if kind != "cgroup2" {
            folder(&at)?;
        }
        mount(kind, &at, kind, flags, None).map_err(step(format!("mount {kind}")))?;
    }
    // The program stays in the initramfs and is shown here: a copy would cost its size in memory.
    let program = format!("{root}{PROGRAM}");
    for file in [&program, &format!("{face}/bin/spore-guest")] {
        File::create(file).map_err(step("show the agent's program"))?;
    }
    mount_bind("/init", &program).map_err(step("show the agent's program"))
}

/// Loads what `/modules/order` names, and gives its memory back.
fn load_modules() -> Result<(), InitError> {
    let order = fs::read_to_string("/modules/order").map_err(step("read /modules/order"))?;
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = format!("/modules/{name}");
        let file = File::open(&path).map_err(step(format!("open {path}")))?;
        match finit_module(&file, c"", 0) {
            // Built in already, or for a device or CPU feature that is not there (crc32c-intel).
            Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::NODEV) => {}
            Err(errno) => return Err(step(format!("load module {name}"))(errno)),
        }
        drop(file);
        fs::remove_file(&path).map_err(step(format!("remove {path}")))?;
    }
    Ok(())
}

/// Moves the own root over the initramfs, which stays below with nothing but the program.
fn switch_root() -> Result<(), InitError> {
    let failed = "make the own root the root";
    chdir("/own").map_err(step(failed))?;
    mount_move(".", "/").map_err(step(failed))?;
    chroot(".").map_err(step(failed))?;
    chdir("/").map_err(step(failed))
}

/// The port whose name is ours, opened.
fn agent_port() -> Option<OwnedFd> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()? {
        let entry = entry.ok()?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            let path = Path::new("/dev").join(entry.file_name());
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
            return open(path, flags, Mode::empty()).ok();
        }
    }
    None
}

fn wait_for<T>(what: &'static str, find: impl Fn() -> Option<T>) -> Result<T, InitError> {
    let deadline_ms = clock::monotonic_ms() + DEVICES_MS_MAX;
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if clock::monotonic_ms() >= deadline_ms {
            return Err(InitError::Missing(what));
        }
        pause(DEVICES_STEP_MS);
    }
}

fn pause(ms: u64) {
    let time: Timespec = clock::timeout(ms);
    // Woken early by a signal, the caller looks again sooner.
    let _early = nanosleep(&time);
}

fn folder(path: &str) -> Result<(), InitError> {
    fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .map_err(step(format!("make the folder {path}")))
}
