//! A node with real VMs and nothing above it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use spore_node::config::{Config, Images};
use spore_node::egress::launch::EgressLauncher;
use spore_node::hypervisor::qemu::{Qemu, QemuConfig};
use spore_node::hypervisor::room::RoomConfig;
use spore_node::hypervisor::{Hypervisor as _, KernelArguments, Machine};
use spore_node::node::Node;
use spore_node::take::{Take, Taken};
use spore_wire::guest::{Exec, Exit, Readiness};
use spore_wire::id::{ImageId, SnapshotId, VmId};
use spore_wire::node::{
    NodeEvent, Owner, Process, Purpose, Resources, Source, StartVm, StopMode, VmPhase, VmStatus,
};
use spore_wire::snapshot::SnapshotKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

/// Only a hang takes longer.
const HANG: Duration = Duration::from_secs(300);

/// Uids above those of stories and tests, which may run beside this.
const UID_FIRST: u32 = 2_500_000;
const UIDS: u32 = 64;

/// What the node may give to VMs: enough for what is measured, wherever that is.
const MEMORY_MIB: u64 = 64 * 1024;

/// A machine as an app of a few lines has it.
const RESOURCES: Resources = Resources {
    cpus: 1,
    memory_mib: 256,
    disk_mib: 64,
};

/// Answers at once, and says that it listens by listening.
const SERVER: &str = "
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('content-length', '2')
        self.end_headers()
        self.wfile.write(b'ok')
    def log_message(self, *arguments):
        pass
socketserver.TCPServer.allow_reuse_address = True
socketserver.TCPServer(('', 8000), Handler).serve_forever()
";

/// The same file for every image.
#[derive(Debug)]
struct OneImage(PathBuf);

impl Images for OneImage {
    fn path(&self, _id: &ImageId) -> Option<PathBuf> {
        Some(self.0.clone())
    }
}

/// The node and its folders, which go with it.
#[derive(Debug)]
pub(super) struct Host {
    node: Node,
    qemu: Qemu,
    root: PathBuf,
    image: PathBuf,
}

impl Host {
    pub(super) async fn open() -> Result<Self> {
        let deps = spore_e2e::platform::deps();
        let guest = deps.join("guest");
        let name = std::fs::read_to_string(deps.join("images/names/debian--python3"))
            .context("the image debian/python3 is missing: run `make deps`")?;
        let image = deps.join(format!("images/{}.img", name.trim()));
        let root = Path::new("/run").join(format!("spore-bench-{}", std::process::id()));
        let program = spore_e2e::platform::program("spore");
        let qemu = Qemu::open(QemuConfig {
            room: RoomConfig {
                runtime_dir: root.join("host"),
                data_dir: root.join("data"),
                cgroup_parent: format!("spore-bench-{}", std::process::id()),
                uid_first: UID_FIRST,
                uid_count: UIDS,
                pool_size: 4,
            },
            kernel: guest.join("vmlinux"),
            kernel_release: std::fs::read_to_string(guest.join("release"))?
                .trim()
                .to_owned(),
            kernel_arguments: KernelArguments::default(),
            initramfs: guest.join("initramfs.cpio"),
            qemu: QemuConfig::DEBIAN_QEMU.into(),
            libraries: QemuConfig::debian_libraries(),
            launcher: vec![program.to_string_lossy().into_owned(), "jail".to_owned()],
            egress: EgressLauncher::new(&program, ["egress"]),
        })
        .await?;
        let [runtime, logs, snapshots] = ["node", "logs", "snapshots"].map(|name| root.join(name));
        let mut config = Config::new(runtime, logs, snapshots, MEMORY_MIB);
        config.templates = false;
        let images = Arc::new(OneImage(image.clone()));
        let (node, _nothing) = Node::open(config, Arc::new(qemu.clone()), images).await?;
        Ok(Self {
            node,
            qemu,
            root,
            image,
        })
    }

    /// Begins a VM there, which serves if it is to.
    pub(super) fn begin(&self, source: Source, serves: bool) -> Result<VmId> {
        let vm = VmId::random()?;
        let process = serves.then(|| Process {
            command: ["python3", "-c", SERVER].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            secret_environment: Vec::new(),
            secret_files: Vec::new(),
            user: None,
            port: 8000,
            ready: Readiness::Port,
            ready_timeout_ms: 240_000,
            stop_grace_ms: 100,
            has_hooks: false,
        });
        self.node.start(StartVm {
            vm,
            owner: Owner {
                account: "bench".to_owned(),
                app: "bench".to_owned(),
                release: 1,
                secrets_version: 0,
            },
            image: ImageId::from_hash([1; 32]),
            folder: None,
            resources: RESOURCES,
            process,
            egress: Vec::new(),
            source,
            keys: Vec::new(),
            purpose: Purpose::Serve,
            trace: None,
        })?;
        Ok(vm)
    }

    pub(super) async fn ready(&self, vm: VmId) -> Result<VmStatus> {
        let mut watch = self.node.watch();
        let settled = async {
            loop {
                let NodeEvent::Vm(status) = watch.next().await;
                if status.vm == vm && status.phase >= VmPhase::Ready {
                    return status;
                }
            }
        };
        let status = timeout(HANG, settled).await.context("a VM hangs")?;
        ensure!(status.phase == VmPhase::Ready, "{status:?}");
        Ok(status)
    }

    pub(super) async fn start(&self, source: Source, serves: bool) -> Result<VmStatus> {
        let vm = self.begin(source, serves)?;
        self.ready(vm).await
    }

    /// Waits for its first answer.
    pub(super) async fn ask(&self, vm: VmId) -> Result<()> {
        let mut stream = self.node.connect(vm).await?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        timeout(HANG, read).await.context("no answer")??;
        ensure!(answer.ends_with("ok"), "{answer}");
        Ok(())
    }

    /// Runs a shell script in it.
    pub(super) async fn run(&self, vm: VmId, script: &str) -> Result<()> {
        let exec = Exec {
            argv: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            environment: Vec::new(),
            directory: None,
            user: Some("0".to_owned()),
            pty: None,
            timeout_ms: None,
        };
        let program = self.node.exec(vm, exec).await?;
        let mut said = Vec::new();
        while let Some((_of, bytes)) = program.next_output().await? {
            said.extend(bytes);
        }
        let exit = program.wait().await?;
        ensure!(
            exit == Exit::Code { code: 0 },
            "{exit:?}: {}",
            String::from_utf8_lossy(&said)
        );
        Ok(())
    }

    pub(super) async fn take(&self, vm: VmId) -> Result<(SnapshotId, Taken)> {
        let id = SnapshotId::random()?;
        let take = Take {
            id,
            kind: SnapshotKind::Checkpoint,
            key: None,
            made_at_s: 1_800_000_000,
        };
        Ok((id, self.node.take(vm, take).await?))
    }

    pub(super) async fn stop(&self, vm: VmId) -> Result<()> {
        self.node.stop(vm, StopMode::Kill).await?;
        timeout(HANG, self.node.stopped(vm)).await??;
        Ok(())
    }

    /// How long a VM stands still that is paused for nothing, in milliseconds, so many times.
    pub(super) async fn pauses(&self, rounds: usize) -> Result<Vec<f64>> {
        let (vm, machine) = (
            VmId::random()?,
            Machine {
                resources: RESOURCES,
                image: self.image.clone(),
                folder: None,
                egress: Vec::new(),
            },
        );
        let prepared = self.qemu.prepare(vm, &machine).await?;
        let identity = self.qemu.boot(vm, &machine, &prepared).await?;
        let held = self.qemu.attach(vm, &prepared, &identity).await?;
        let mut pauses = Vec::new();
        for _round in 0..rounds {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let begun = Instant::now();
            held.pause().await?;
            held.resume().await?;
            pauses.push(begun.elapsed().as_secs_f64() * 1000.0);
        }
        drop(held);
        self.qemu.release(vm).await?;
        Ok(pauses)
    }

    /// The guest pages that belong to that VM alone, in KiB.
    ///
    /// Source: proc_pid_smaps(5); the guest's memory is the one mapping of a memory file that a
    /// fork has, and what it wrote of it has become anonymous.
    pub(super) fn private_kib(&self, vm: VmId) -> Result<u64> {
        for (pid, _pidfd) in self.qemu.rooms().cgroups().members(&vm.to_string())? {
            let pid = pid.as_raw_nonzero();
            let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
            let mut of_guest = false;
            let mut found = None;
            for line in smaps.lines() {
                let mut words = line.split_whitespace();
                let first = words.next().unwrap_or_default();
                if !first.ends_with(':') {
                    of_guest = line.contains("/memfd:");
                } else if of_guest && first == "Anonymous:" {
                    let kib = words.next().context("a number")?.parse::<u64>()?;
                    found = Some(found.unwrap_or(0) + kib);
                }
            }
            if let Some(kib) = found {
                return Ok(kib);
            }
        }
        bail!("no process of {vm} maps a guest's memory")
    }

    /// Ends everything, and removes its folders.
    pub(super) async fn close(self) -> Result<()> {
        self.node.detach().await;
        self.qemu.close()?;
        self.qemu.rooms().cgroups().remove_parent()?;
        std::fs::remove_dir_all(&self.root)?;
        Ok(())
    }
}
