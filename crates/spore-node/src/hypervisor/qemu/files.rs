//! What a VMM is started with: the files that the node opens for it, and the jail around them.
//!
//! Called by the driver for each start. The order of descriptors is said twice, here and in
//! `arguments.rs`, and is the same.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

use spore_wire::id::VmId;

use super::arguments::{Begin, INITRAMFS, KERNEL, Lock, Scratch, arguments};
use super::{MIB, QMP_SOCKET, Shared, limits};
use crate::confine::limits::ProcessLimits;
use crate::disk::overlay::DiskKey;
use crate::hypervisor::fork::{ForkFrom, ForkMemory, ScratchLayer};
use crate::hypervisor::memory_image::{MemoryDraft, MemoryImageError};
use crate::hypervisor::monitored::AGENT_SOCKET;
use crate::hypervisor::monitored::in_memory::{bounded_log, key_file, no_folder};
use crate::hypervisor::{BootError, Machine, Prepared, VmFds};
use crate::jail::{self, Jail, Launch};

/// The least file size that a VMM may write: its own output, what its devices are, and the headers
/// of a disk.
const FILE_BYTES_MIN: u64 = 16 * MIB;

/// The files of a start, opened by the node.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) null: OwnedFd,
    pub(super) log: OwnedFd,
    pub(super) vm: VmFds,
    pub(super) qmp: UnixListener,
    pub(super) agent: UnixListener,
    /// The kernel and the initramfs, of what boots.
    pub(super) kernel: Vec<File>,
    /// Those among `vm`'s descriptors that hold keys.
    pub(super) keys: Vec<File>,
}

impl Shared {
    fn open_memory(
        &self,
        machine: &Machine,
        from: Option<&ForkFrom>,
    ) -> Result<OwnedFd, MemoryImageError> {
        let cloned = |source| MemoryImageError::Kernel {
            what: "share",
            source,
        };
        match from {
            Some(from) => from.memory.fd().try_clone_to_owned().map_err(cloned),
            None => {
                let draft = MemoryDraft::new(machine.resources.memory_bytes())?;
                draft.fd().try_clone_to_owned().map_err(cloned)
            }
        }
    }

    pub(super) fn open_files(
        &self,
        vm: VmId,
        machine: &Machine,
        tap: OwnedFd,
        from: Option<&ForkFrom>,
    ) -> Result<Files, BootError> {
        let step = |what| move |source| BootError::Step { what, source };
        let image = |path: &Path| {
            let opened = File::open(path).map(OwnedFd::from);
            opened.map_err(|source| BootError::Image {
                path: path.to_owned(),
                source,
            })
        };
        let mut disks = vec![image(&machine.image)?];
        disks.push(match &machine.folder {
            Some(folder) => image(folder)?,
            None => no_folder().map_err(step("a disk for no folder"))?,
        });
        let mut keys = Vec::new();
        let scratch = self.open_scratch(vm, machine, from);
        for (file, key) in scratch.map_err(step("the scratch disk"))? {
            disks.push(file.into());
            if let Some(key) = key {
                let file = key_file(&key).and_then(|file| Ok((file.try_clone()?, file)));
                let (file, kept) = file.map_err(step("a file for a disk's key"))?;
                disks.push(file.into());
                keys.push(kept);
            }
        }
        // Each VMM reads the state from its beginning, so each has a description of its own.
        let state =
            from.map(|from| File::open(format!("/proc/self/fd/{}", from.state.as_raw_fd())));
        let state = state
            .transpose()
            .map_err(step("opening the source's devices"))?;
        let memory = self.open_memory(machine, from);
        let memory = memory.map_err(|error| step("its memory")(io::Error::other(error)))?;
        let kernel = match from {
            Some(_) => Vec::new(),
            None => vec![
                File::open(&self.config.kernel).map_err(step("opening the kernel"))?,
                File::open(&self.config.initramfs).map_err(step("opening the initramfs"))?,
            ],
        };
        let socket = |name| {
            let path = self.rooms.folder(vm).join(name);
            let listener = UnixListener::bind(&path)?;
            std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        Ok(Files {
            null: File::open("/dev/null")
                .map_err(step("opening /dev/null"))?
                .into(),
            log: bounded_log().map_err(step("its output"))?,
            vm: VmFds {
                tap,
                memory,
                disks,
                state: state.map(OwnedFd::from),
            },
            qmp: socket(QMP_SOCKET).map_err(step("its control socket"))?,
            agent: socket(AGENT_SOCKET).map_err(step("the agent's socket"))?,
            kernel,
            keys,
        })
    }

    /// The files of a machine's scratch disk with their keys, lowest first: what it begins with,
    /// and one of its own, whose key nobody else ever has.
    fn open_scratch(
        &self,
        vm: VmId,
        machine: &Machine,
        from: Option<&ForkFrom>,
    ) -> io::Result<Vec<(File, Option<DiskKey>)>> {
        let mib = machine.resources.disk_mib;
        if mib == 0 {
            return Ok(Vec::new());
        }
        let disks = self.rooms.disks();
        let mut files = Vec::new();
        match from.and_then(|from| from.scratch.as_ref()) {
            None => files.push((disks.open_empty(vm, mib)?, None)),
            Some(source) => {
                for layer in &source.layers {
                    // However it was opened, a VMM has it to read.
                    let path = format!("/proc/self/fd/{}", layer.file.as_raw_fd());
                    files.push((File::open(path)?, layer.key.clone()));
                }
            }
        }
        let key = DiskKey::random().map_err(io::Error::other)?;
        files.push((disks.new_layer(mib, Some(&key))?, Some(key)));
        Ok(files)
    }

    pub(super) fn jail(
        &self,
        vm: VmId,
        machine: &Machine,
        prepared: &Prepared,
        from: Option<&ForkFrom>,
    ) -> Jail {
        let mut binds = vec![self.config.qemu.clone()];
        binds.extend(self.config.libraries.iter().cloned());
        let limits = limits(machine);
        let (begin, files) = match from {
            None => (Begin::Boot, vec![KERNEL.into(), INITRAMFS.into()]),
            Some(from) => match from.memory {
                ForkMemory::Shared(_) => (Begin::Fork, Vec::new()),
                ForkMemory::Own(_) => (Begin::GoOn, Vec::new()),
            },
        };
        let scratch = scratch_of(machine, from);
        let line = arguments(begin, &machine.resources, &scratch, &self.kernel_line);
        Jail {
            cgroup: self.rooms.cgroups().entrances(&vm.to_string()),
            stage: self.rooms.stage(),
            binds,
            files,
            fds: line.fds,
            program: self.config.qemu.clone(),
            arguments: line.words,
            uid: prepared.uid,
            limits: ProcessLimits::vmm(u64::from(limits.pids), file_bytes(machine)),
        }
    }

    pub(super) fn launch(&self, jail: &Jail, files: &Files) -> Result<u32, jail::LaunchError> {
        let log = files.log.as_fd();
        // The order is that of the FD_* numbers in `arguments.rs`.
        let mut fds = vec![files.null.as_fd(), log, log, files.vm.tap.as_fd()];
        fds.extend([files.qmp.as_fd(), files.agent.as_fd()]);
        fds.push(files.vm.memory.as_fd());
        fds.extend(files.vm.disks.iter().map(AsFd::as_fd));
        fds.extend(files.vm.state.iter().map(AsFd::as_fd));
        fds.extend(files.kernel.iter().map(AsFd::as_fd));
        Launch {
            launcher: &self.config.launcher,
            jail,
            fds,
        }
        .start()
    }
}

/// The most that a file of a machine's VMM may have: its disk, full, and what says where things are
/// in that file, which is an eighth of a thousandth and a header.
fn file_bytes(machine: &Machine) -> u64 {
    let disk = u64::from(machine.resources.disk_mib) * MIB;
    disk + disk / 1024 + FILE_BYTES_MIN
}

fn scratch_of(machine: &Machine, from: Option<&ForkFrom>) -> Scratch {
    let lock = |layer: &ScratchLayer| match layer.key {
        Some(_) => Lock::Locked,
        None => Lock::Open,
    };
    match from.and_then(|from| from.scratch.as_ref()) {
        Some(source) => Scratch::Forked(source.layers.iter().map(lock).collect()),
        None => Scratch::of(&machine.resources),
    }
}
