//! What a VMM is started with, and what its guest is made of: the files that the node opens for it.
//!
//! Called by the driver for each start.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use spore_wire::id::VmId;
use spore_wire::launch::{
    Begin, FdIndex, Incarnation, LAYER_KEY_BYTES, Launch, Layer, MemoryOwner, PageRun, Scratch,
    layer_bytes,
};
use spore_wire::secret::SecretBytes;
use spore_wire::zygote::FdRole;

use super::{CONTROL_SOCKET, MIB, Shared};
use crate::disk::Disks;
use crate::disk::overlay::DiskKey;
use crate::hypervisor::fork::{ForkFrom, ForkMemory};
use crate::hypervisor::memory_image::MemoryDraft;
use crate::hypervisor::monitored::AGENT_SOCKET;
use crate::hypervisor::monitored::in_memory::{bounded_log, no_folder};
use crate::hypervisor::{BootError, Machine};
use crate::net::tap::GUEST_MAC;

/// Who may wait to speak with a VMM.
const BACKLOG: i32 = 4;

/// The least file size that a VMM may write: its own output, and what its devices are.
const FILE_BYTES_MIN: u64 = 16 * MIB;

/// What a guest's kernel is told. Spore's own machine has one serial port, which it need not look
/// for others beside, and no hardware that would be probed for. `reboot=k`: by the reset line, not
/// by a firmware that is not there.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=k random.trust_cpu=on \
     raid=noautodetect cryptomgr.notests 8250.nr_uarts=1 audit=0";

/// Descriptors on their way, and their places.
#[derive(Debug, Default)]
struct Files(Vec<OwnedFd>);

impl Files {
    fn add(&mut self, file: impl Into<OwnedFd>) -> FdIndex {
        let index = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        self.0.push(file.into());
        FdIndex(index)
    }
}

impl Shared {
    /// What a VMM that waits has, by role, and its output once more.
    pub(super) fn open_waiting(
        &self,
        vm: VmId,
    ) -> Result<(OwnedFd, Vec<(FdRole, OwnedFd)>), BootError> {
        let step = |what| move |source| BootError::Step { what, source };
        let log = bounded_log().map_err(step("its output"))?;
        let control = listening(&self.rooms.folder(vm).join(CONTROL_SOCKET));
        let control = control.map_err(step("its control socket"))?;
        let output = log.try_clone().map_err(step("its output"))?;
        let fds = vec![(FdRole::Control, control), (FdRole::Output, output)];
        Ok((log, fds))
    }

    /// What a guest is made of.
    pub(super) fn open_files(
        &self,
        vm: VmId,
        machine: &Machine,
        tap: OwnedFd,
        from: Option<&ForkFrom>,
    ) -> Result<(Launch, Vec<OwnedFd>), BootError> {
        let step = |what| move |source| BootError::Step { what, source };
        let image = |path: &Path| {
            File::open(path).map_err(|source| BootError::Image {
                path: path.to_owned(),
                source,
            })
        };
        let mut files = Files::default();
        let memory = match from {
            Some(from) => from.memory.fd().try_clone_to_owned(),
            None => MemoryDraft::new(machine.resources.memory_bytes())
                .map_err(io::Error::other)
                .and_then(|draft| draft.fd().try_clone_to_owned()),
        };
        let memory = files.add(memory.map_err(step("its memory"))?);
        let folder = match &machine.folder {
            Some(folder) => image(folder)?.into(),
            None => no_folder().map_err(step("a disk for no folder"))?,
        };
        let agent = agent_socket(&self.rooms.folder(vm).join(AGENT_SOCKET));
        let launch = Launch {
            vm,
            vcpus: machine.resources.cpus,
            memory_mib: machine.resources.memory_mib,
            memory,
            begin: self.begin(from, &mut files)?,
            incarnation: Incarnation::random()
                .map_err(io::Error::other)
                .map_err(step("random numbers"))?,
            image: files.add(image(&machine.image)?),
            folder: files.add(folder),
            scratch: self
                .open_scratch(vm, machine, from, &mut files)
                .map_err(step("the scratch disk"))?,
            tap: files.add(tap),
            mac: GUEST_MAC,
            agent: files.add(agent.map_err(step("the agent's socket"))?),
            rates: self.config.rates,
        };
        Ok((launch, files.0))
    }

    fn begin(&self, from: Option<&ForkFrom>, files: &mut Files) -> Result<Begin, BootError> {
        let step = |what| move |source| BootError::Step { what, source };
        let Some(from) = from else {
            let open = |path: &Path| File::open(path);
            return Ok(Begin::Boot {
                kernel: files.add(open(&self.config.kernel).map_err(step("opening the kernel"))?),
                initramfs: files
                    .add(open(&self.config.initramfs).map_err(step("opening the initramfs"))?),
                command_line: self.config.kernel_arguments.after(COMMAND_LINE),
            });
        };
        let state = File::open(format!("/proc/self/fd/{}", from.state.as_raw_fd()));
        Ok(Begin::Restore {
            state: files.add(state.map_err(step("opening the source's devices"))?),
            memory: match from.memory {
                ForkMemory::Shared(_) => MemoryOwner::Shared,
                ForkMemory::Own(_) => MemoryOwner::Own,
            },
            ahead: ahead(&from.memory),
        })
    }

    /// A machine's scratch disk: what it begins with, and a layer of its own, whose key nobody else
    /// ever has.
    fn open_scratch(
        &self,
        vm: VmId,
        machine: &Machine,
        from: Option<&ForkFrom>,
        files: &mut Files,
    ) -> io::Result<Option<Scratch>> {
        let mib = machine.resources.disk_mib;
        if mib == 0 {
            return Ok(None);
        }
        let disks = self.rooms.disks();
        let (mut base, mut layers) = (None, Vec::new());
        match from.and_then(|from| from.scratch.as_ref()) {
            None => base = Some(files.add(disks.open_empty(vm, mib)?)),
            Some(source) => {
                for layer in &source.layers {
                    // However it was opened, a VMM has it to read.
                    let path = format!("/proc/self/fd/{}", layer.file.as_raw_fd());
                    layers.push(Layer {
                        file: files.add(File::open(path)?),
                        key: layer.key.as_ref().map(layer_key),
                    });
                }
            }
        }
        let key = DiskKey::random().map_err(io::Error::other)?;
        Ok(Some(Scratch {
            bytes: u64::from(mib) * MIB,
            base,
            layers,
            own: Layer {
                file: files.add(new_layer(disks, mib, None)?),
                key: Some(layer_key(&key)),
            },
        }))
    }
}

/// What a fork of a memory is known to write to first.
fn ahead(memory: &ForkMemory) -> Vec<PageRun> {
    let ForkMemory::Shared(image) = memory else {
        return Vec::new();
    };
    let runs = image.ahead().unwrap_or_default().iter();
    runs.filter_map(|run| {
        let (first, pages) = (run.first.try_into().ok()?, run.pages.try_into().ok()?);
        Some(PageRun { first, pages })
    })
    .collect()
}

/// The file of an empty layer of a disk of `mib` MiB. It has no name: it is gone with its last
/// holder. What is written to it is encrypted by the VMM, with whatever key it is told.
pub(super) fn new_layer(disks: &Disks, mib: u32, _key: Option<&DiskKey>) -> io::Result<File> {
    let file = disks.unnamed()?;
    file.set_len(layer_bytes(u64::from(mib) * MIB))?;
    Ok(file)
}

/// What a layer is encrypted with: as long as AES-256 in XTS mode wants it.
pub(super) fn layer_key(key: &DiskKey) -> SecretBytes {
    let mut derived = vec![0; LAYER_KEY_BYTES];
    blake3::Hasher::new_derive_key("spore scratch layer of the kvm driver")
        .update(key.expose())
        .finalize_xof()
        .fill(&mut derived);
    SecretBytes::new(derived)
}

/// The most that a file of a machine's VMM may have: a layer, full, or a copy of one.
pub(super) fn file_bytes(machine: &Machine) -> u64 {
    let disk = u64::from(machine.resources.disk_mib) * MIB;
    layer_bytes(disk).max(machine.resources.memory_bytes()) + FILE_BYTES_MIN
}

/// A socket for packets that listens, which only root can reach.
pub(super) fn listening(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn agent_socket(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}
