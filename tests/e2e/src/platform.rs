//! A whole platform of a story's own: daemon, gateway, VMs, on folders and ports nobody else has.
//!
//! There are [`SLOTS`] places for platforms on a machine, each a folder with a lock, so that no
//! more stories boot VMs at once than the machine has cores, and so that whoever takes a place
//! first clears away what a killed story left there.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use spore_api::client::{Client, Endpoint};

use crate::app::AppFolder;
use crate::leftovers;
use crate::namespace::Namespace;
use crate::visitor::{Visitor, raw};

/// Platforms that may run beside each other.
pub const SLOTS: u16 = 2;

/// Where the slots are; root's own, as the daemon insists.
const HOME: &str = "/var/lib/spore-e2e";

/// The uids of one slot.
const UIDS: u32 = 500;

const FIRST_UID: u32 = 300_000;
const FIRST_PORT: u16 = 21_100;

/// How long a daemon may take to answer: re-adoption and a cold page cache included.
const START_PATIENCE: Duration = Duration::from_secs(300);

/// Names the run of stories that a process belongs to, where its parent does not.
pub const RUN: &str = "SPORE_E2E_RUN";

/// A running platform; stopped and checked for leftovers by [`Platform::end`].
#[derive(Debug)]
pub struct Platform {
    slot: Slot,
    network: Option<Arc<Namespace>>,
    daemon: Option<Child>,
}

/// How a run of the program ended.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its exit code; negative for a signal.
    pub code: i32,
    /// What it printed as its result.
    pub out: String,
    /// What it said beside.
    pub err: String,
}

impl Run {
    /// That the program refused, and said this.
    ///
    /// # Errors
    /// What it did instead.
    pub fn ensure_refused(&self, said: &str) -> Result<()> {
        ensure!(
            self.code != 0 && self.err.contains(said),
            "{said} is not in {self:?}"
        );
        Ok(())
    }
}

/// What a platform's data is written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disk {
    /// The host's own.
    #[default]
    Shared,
    /// One of its own with so many MiB.
    OwnMib(u32),
}

/// Where and how a platform is set up, beside the usual.
#[derive(Debug, Default)]
pub struct Site {
    /// What its data is written to.
    pub disk: Disk,
    /// Lines that are added to the daemon's configuration.
    pub config: String,
    /// Whether its wakes begin from templates. Without, all VMs are those of the story's apps.
    pub templates: bool,
    /// The network that its daemon, gateway and proxies live in; `None` is the host's.
    pub network: Option<Arc<Namespace>>,
}

impl Site {
    /// The usual, whose wakes begin from templates.
    #[must_use]
    pub fn with_templates() -> Self {
        Self {
            templates: true,
            ..Self::default()
        }
    }
}

#[derive(Debug)]
struct Slot {
    number: u16,
    home: PathBuf,
    _lock: File,
}

/// Whether stories can run here: as root, with what `make deps` fetches. Prints why not.
#[must_use]
pub fn available() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "stories start VMs, which needs root"
    } else if !deps().join("guest/initramfs.cpio").exists() {
        "the guest's kernel and image are missing: run `make deps`"
    } else {
        return true;
    };
    skipped(reason);
    false
}

/// The run of stories that this process belongs to: what started all its test programs.
#[must_use]
pub fn this_run() -> String {
    std::env::var(RUN).unwrap_or_else(|_unset| std::os::unix::process::parent_id().to_string())
}

/// Says that a story, or a part of one, cannot run here.
#[expect(
    clippy::print_stdout,
    reason = "a test run is read by people and by CI"
)]
pub fn skipped(reason: &str) {
    println!("SKIPPED: {reason}");
}

/// What VMs run on: `qemu`, or `kvm` where `SPORE_TEST_DRIVER` says so. Each story is told, and
/// none finds out by itself: what it found, it would prove nothing of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// QEMU in software.
    Qemu,
    /// Spore's own VMM.
    Kvm,
}

impl Driver {
    /// With what the name of a VM's process begins.
    #[must_use]
    pub const fn vmm(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Kvm => "spore-vmm",
        }
    }
}

impl Driver {
    /// What its daemons are told: where KVM is, they find it.
    const fn choice(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Kvm => "auto",
        }
    }

    /// What guests' kernels are told. Where tests find KVM, the processor is emulated and can have
    /// a guest sleep over an interrupt (`docs/internals/testing.md`): its next tick wakes it.
    const fn kernel_arguments(self) -> &'static str {
        match self {
            Self::Qemu => "",
            Self::Kvm => "nohz=off",
        }
    }

    /// With what the boundary begins that its daemons name: on a machine that is a guest itself,
    /// that is `kvm-nested`.
    #[must_use]
    pub const fn boundary(self) -> &'static str {
        match self {
            Self::Qemu => "none",
            Self::Kvm => "kvm",
        }
    }
}

/// What the VMs of this run's stories run on.
#[must_use]
pub fn driver() -> Driver {
    match std::env::var_os("SPORE_TEST_DRIVER") {
        Some(driver) if driver == "kvm" => Driver::Kvm,
        _ => Driver::Qemu,
    }
}

/// Where `make deps` puts the guest's kernel, initramfs and images.
#[must_use]
pub fn deps() -> PathBuf {
    std::env::var_os("SPORE_DEPS").map_or_else(|| "/var/lib/spore-deps".into(), PathBuf::from)
}

/// A program under test, built beside this test.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let running = std::env::current_exe().expect("a running program has a path");
    // A test is in `target/debug/deps`, a benchmark beside the program.
    let folder = running.parent().expect("a program is in a folder");
    let folder = match folder.parent() {
        Some(above) if folder.ends_with("deps") => above,
        _ => folder,
    };
    let program = folder.join(name);
    assert!(
        program.exists(),
        "{} is missing: `cargo build -p {name}` first",
        program.display()
    );
    program
}

impl Platform {
    /// A platform of the story's own, with nothing in it.
    ///
    /// # Errors
    /// When it does not come up; the daemon's log is in the message.
    pub async fn start() -> Result<Self> {
        Self::start_at(Site::default()).await
    }

    /// As [`Platform::start`], set up there.
    ///
    /// # Errors
    /// As [`Platform::start`].
    pub async fn start_at(site: Site) -> Result<Self> {
        let slot = tokio::task::spawn_blocking(Slot::take).await??;
        let mut platform = Self::new(slot);
        platform.network.clone_from(&site.network);
        platform
            .sweep()
            .context("clear what an earlier story left")?;
        std::fs::write(Slot::lock_path(platform.slot.number), this_run())?;
        platform
            .lay_out(&site)
            .context("lay out the platform's folders")?;
        platform.start_daemon().await?;
        let (found, wanted) = (
            platform.client().status().await?.boundary,
            driver().boundary(),
        );
        ensure!(
            found.starts_with(wanted),
            "the boundary is {found} and not {wanted}"
        );
        Ok(platform)
    }

    const fn new(slot: Slot) -> Self {
        Self {
            slot,
            network: None,
            daemon: None,
        }
    }

    /// Waits for every slot that a story of this run had last, clears it as the next story would,
    /// and gives what is left all the same.
    ///
    /// # Errors
    /// When one cannot be cleared.
    pub fn clear_all() -> Result<Vec<String>> {
        let mut left = Vec::new();
        for number in 0..SLOTS {
            let Some(slot) = Slot::take_own(number)? else {
                continue;
            };
            let mut platform = Self::new(slot);
            left.extend(
                platform
                    .sweep()
                    .context("clear what an earlier story left")?,
            );
        }
        Ok(left)
    }

    /// Starts the daemon again after [`Platform::kill_daemon`].
    ///
    /// # Errors
    /// When it does not answer in its time.
    pub async fn start_daemon(&mut self) -> Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.daemon_log())?;
        let child = self
            .command("server")
            .args(["--config", &self.config()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the daemon")?;
        self.daemon = Some(child);
        let asked = tokio::time::timeout(START_PATIENCE, self.until_it_answers()).await;
        match asked {
            Ok(answered) => answered,
            Err(_elapsed) => bail!("the daemon does not answer:\n{}", self.log_tail()),
        }
    }

    async fn until_it_answers(&mut self) -> Result<()> {
        loop {
            if self.client().status().await.is_ok() {
                return Ok(());
            }
            if let Some(child) = &mut self.daemon
                && let Some(status) = child.try_wait()?
            {
                bail!("the daemon ended with {status}:\n{}", self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Kills the daemon as the kernel would: SIGKILL, no goodbye.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill_daemon(&mut self) -> Result<()> {
        let mut child = self.daemon.take().context("no daemon runs")?;
        child.kill().context("kill the daemon")?;
        child.wait()?;
        Ok(())
    }

    /// Asks the daemon to end and waits for it; VMs go on.
    ///
    /// # Errors
    /// When it cannot be asked, or ends badly.
    pub fn stop_daemon(&mut self) -> Result<()> {
        let mut child = self.daemon.take().context("no daemon runs")?;
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::TERM)?;
        let status = child.wait()?;
        ensure!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Stops everything and fails when anything is left on the host.
    ///
    /// # Errors
    /// What is left.
    pub fn end(mut self) -> Result<()> {
        self.stop_all()?;
        unmount(&self.home().join("data"))?;
        let left = self.leftovers()?;
        ensure!(
            left.is_empty(),
            "left behind:\n{}\n{}",
            left.join("\n"),
            self.log_tail()
        );
        Ok(())
    }

    /// What bears this platform's marks on the host now.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let home = &self.slot.home;
        leftovers::of(home, self.slot.first_uid(), UIDS, &self.slot.cgroup())
    }

    /// Processes of this platform's VMs: their pids and command lines.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn vm_processes(&self) -> Result<Vec<String>> {
        let all = leftovers::processes(Path::new("/nonexistent"), self.slot.first_uid(), UIDS)?;
        let vmm = driver().vmm();
        let name = |line: &String| line.contains(&format!(" Name:\t{vmm}"));
        Ok(all.into_iter().filter(name).collect())
    }

    /// Pids of every process of this platform: VMs, proxies, gateway, daemon, helpers.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let all = leftovers::processes(self.home(), self.slot.first_uid(), UIDS)?;
        Ok(all.iter().filter_map(|line| pid_of(line)).collect())
    }

    /// Pids of this platform's VMs.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn vm_pids(&self) -> Result<Vec<i32>> {
        let all = self.vm_processes()?;
        Ok(all.iter().filter_map(|line| pid_of(line)).collect())
    }

    /// The daemon's pid.
    ///
    /// # Errors
    /// When none runs.
    pub fn daemon_pid(&self) -> Result<i32> {
        let child = self.daemon.as_ref().context("no daemon runs")?;
        Ok(i32::try_from(child.id())?)
    }

    /// The gateway's pid.
    ///
    /// # Errors
    /// When none runs.
    pub fn gateway_pid(&self) -> Result<i32> {
        let file = self.home().join("run/gateway/pid");
        let text = std::fs::read_to_string(file).context("no gateway runs")?;
        Ok(text.trim().parse()?)
    }

    /// The public client, as root over the unix socket.
    ///
    /// # Panics
    /// Never: the path is absolute.
    #[must_use]
    pub fn client(&self) -> Client {
        let socket = self.home().join("run/api.sock");
        let endpoint: Endpoint = format!("unix:{}", socket.display())
            .parse()
            .expect("an absolute path");
        Client::new(endpoint)
    }

    /// A visitor of this platform's gateway.
    #[must_use]
    pub fn visitor(&self) -> Visitor {
        Visitor::new(self.slot.gateway())
    }

    /// The API over TCP.
    #[must_use]
    pub fn api_address(&self) -> SocketAddr {
        self.slot.api()
    }

    /// What `/metrics` says of one series; zero when it is not there yet.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub async fn metric(&self, series: &str) -> Result<u64> {
        let page = self.metrics().await?;
        let name = format!("{series} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name));
        line.map_or(Ok(0), |value| value.parse().context(page.clone()))
    }

    /// The page of `/metrics`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn metrics(&self) -> Result<String> {
        let (api, token) = (self.api_address(), self.token()?);
        let request = format!(
            "GET /metrics HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {token}\r\n\
             Connection: close\r\n\r\n"
        );
        let answer = raw(api, &request).await?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(answer.body)
    }

    /// The API's token.
    ///
    /// # Errors
    /// When the daemon has not written it.
    pub fn token(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.home().join("etc/token"))?
            .trim()
            .to_owned())
    }

    /// Everything the platform writes is below this.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.slot.home
    }

    /// The program with a verb, told of this platform.
    #[must_use]
    pub fn command(&self, verb: &str) -> Command {
        let program = self.home().join("bin/spore");
        let mut command = match &self.network {
            None => Command::new(program),
            Some(network) => network.command(&program),
        };
        command.env(
            "SPORE_HOST",
            format!("unix:{}", self.home().join("run/api.sock").display()),
        );
        command.arg(verb);
        command
    }

    /// Runs the CLI and gives what it printed.
    ///
    /// # Errors
    /// When it fails; both outputs are in the message.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        let run = self.run(arguments)?;
        let Run { code, out, err } = &run;
        ensure!(
            *code == 0,
            "spore {arguments:?} ended with {code}:\n{out}{err}"
        );
        Ok(run.out)
    }

    /// Deploys a Python app by the CLI; its folder is removed with what this gives.
    ///
    /// # Errors
    /// When the deployment fails.
    pub fn deploy(&self, name: &str, code: &str, manifest: &str) -> Result<AppFolder> {
        let folder = AppFolder::python(name, code, manifest)?;
        self.cli(&["deploy", &folder.argument()])?;
        Ok(folder)
    }

    /// Runs the CLI, however it ends.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(&self, arguments: &[&str]) -> Result<Run> {
        self.run_with(arguments, b"")
    }

    /// Runs the CLI with this as its standard input, however it ends.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run_with(&self, arguments: &[&str], input: &[u8]) -> Result<Run> {
        let (verb, rest) = arguments.split_first().context("no verb")?;
        let mut command = self.command(verb);
        command.args(rest);
        run(command, input)
    }

    /// Runs the CLI with `--json` and gives what it printed.
    ///
    /// # Errors
    /// When it fails, or prints something that is not JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut arguments = arguments.to_vec();
        arguments.insert(1, "--json");
        let out = self.cli(&arguments)?;
        serde_json::from_str(&out).with_context(|| format!("{arguments:?} printed {out}"))
    }

    /// The last lines of the daemon's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(self.daemon_log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines = text.lines().collect::<Vec<_>>();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// What the daemon logged so far, and what the gateway did.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn logs(&self) -> Result<(String, String)> {
        let daemon = std::fs::read(self.daemon_log())?;
        let gateway = std::fs::read(self.home().join("log/gateway.log"))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((text(daemon), text(gateway)))
    }

    /// The daemon's configuration file.
    #[must_use]
    pub fn config(&self) -> String {
        self.home().join("etc/spore.toml").display().to_string()
    }

    fn daemon_log(&self) -> PathBuf {
        self.home().join("daemon.log")
    }

    /// Stops VMs, gateway and daemon, as `make down` does.
    ///
    /// # Errors
    /// When they do not stop.
    pub fn stop_all(&mut self) -> Result<()> {
        let output = self
            .command("down")
            .args(["--config", &self.config()])
            .stdin(Stdio::null())
            .output()?;
        if let Some(mut child) = self.daemon.take() {
            child.wait()?;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "spore down failed: {said}\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Stops and removes what a killed story left in this slot; gives what the platform itself did
    /// not remove when it was stopped.
    fn sweep(&mut self) -> Result<Vec<String>> {
        if self.home().join("etc/spore.toml").exists() && self.home().join("bin").is_dir() {
            // By the program of now: the one that was left may be what failed.
            self.install()?;
            if let Err(refused) = self.stop_all() {
                // Another version's story may have left keys that this one does not know. Where
                // things are is the slot's.
                self.configure(&Site::default())?;
                self.stop_all().context(refused)?;
            }
        }
        unmount(&self.home().join("data"))?;
        let left = self.leftovers()?;
        unmount(self.home())?;
        match std::fs::remove_dir_all(self.home()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _gone => Ok(left),
        }
    }

    /// Puts the program into the platform's folder, in place of what is there: another file, as an
    /// installed version is.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn install(&self) -> Result<()> {
        // Copied by another process: were the file open for writing here while a story beside this
        // one starts a process, that would inherit it, and nobody could run the program.
        let mut programs = vec![program("spore")];
        if driver() == Driver::Kvm {
            let given = std::env::var_os("SPORE_VMM");
            programs.push(given.map_or_else(|| program("spore-vmm"), PathBuf::from));
        }
        let mut copy = Command::new("cp");
        copy.arg("--remove-destination").args(programs);
        let status = copy.arg(self.home().join("bin")).status()?;
        ensure!(status.success(), "cp ended with {status}");
        Ok(())
    }

    fn lay_out(&self, site: &Site) -> Result<()> {
        let home = self.home();
        for folder in ["", "bin", "etc", "data", "log", "run"] {
            let path = home.join(folder);
            // The unix socket is reached by other users, so the way to it may be passed through.
            DirBuilder::new()
                .mode(0o711)
                .recursive(true)
                .create(&path)?;
        }
        if let Disk::OwnMib(mib) = site.disk {
            let size = format!("size={mib}m");
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]);
            let status = mount.arg(home.join("data")).status()?;
            ensure!(status.success(), "mount ended with {status}");
        }
        self.install()?;
        self.configure(site)
    }

    fn configure(&self, site: &Site) -> Result<()> {
        let home = self.home();
        let config = format!(
            "data_dir = \"{home}/data\"\nruntime_dir = \"{home}/run\"\nlog_dir = \"{home}/log\"\n\
             config_dir = \"{home}/etc\"\nkernel = \"{deps}/guest/vmlinux\"\n\
             initramfs = \"{deps}/guest/initramfs.cpio\"\n\
             base_images = \"{deps}/images\"\nbase = \"localhost\"\n\
             gateway = \"{gateway}\"\napi = \"{api}\"\nuid_first = {uid}\nuid_count = {count}\n\
             gateway_uid = {gateway_uid}\n\
             cgroup_parent = \"{cgroup}\"\n\
             log = \"info,spore_gateway=debug,spore_control=debug,spore_node=debug\"\n\
             boot_timeout = \"10m\"\ntemplates = {templates}\n\
             hypervisor = \"{driver}\"\nvmm = \"{home}/bin/spore-vmm\"\n\
             kernel_arguments = \"{kernel}\"\n{more}",
            home = home.display(),
            deps = deps().display(),
            gateway = self.slot.gateway(),
            api = self.slot.api(),
            uid = self.slot.first_uid() + 1,
            count = UIDS - 1,
            gateway_uid = self.slot.first_uid(),
            cgroup = self.slot.cgroup(),
            driver = driver().choice(),
            kernel = driver().kernel_arguments(),
            more = site.config,
            templates = site.templates,
        );
        std::fs::write(home.join("etc/spore.toml"), config)?;
        Ok(())
    }
}

/// Runs a command with this as its standard input, however it ends.
///
/// # Errors
/// When it cannot be run.
pub fn run(mut command: Command, input: &[u8]) -> Result<Run> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever does not read its input may still end well.
            drop(stdin.write_all(input));
        });
        child.wait_with_output()
    })?;
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    Ok(Run {
        code: output.status.code().unwrap_or_else(|| -signal.unwrap_or(1)),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// The pid in a line of [`leftovers::processes`].
fn pid_of(line: &str) -> Option<i32> {
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Unmounts everything that is mounted on or below a folder.
fn unmount(folder: &Path) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let places = table.lines().filter_map(|line| line.split(' ').nth(4));
    for place in places
        .map(Path::new)
        .filter(|path| path.starts_with(folder))
    {
        let status = Command::new("umount").arg(place).status()?;
        ensure!(status.success(), "umount ended with {status}");
    }
    Ok(())
}

impl Drop for Platform {
    #[expect(
        clippy::print_stderr,
        reason = "the story that fails says why elsewhere"
    )]
    fn drop(&mut self) {
        if self.daemon.is_some() {
            // The story failed: what it saw is in its own message; what stays is for the next one.
            if let Err(error) = self.stop_all() {
                eprintln!("the platform did not end cleanly: {error:#}");
            }
        }
    }
}

impl Slot {
    /// Waits for a free slot.
    fn take() -> Result<Self> {
        loop {
            for number in 0..SLOTS {
                if let Some(slot) = Self::take_one(number)? {
                    return Ok(slot);
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits for this slot; `None` when the last story in it was not one of this run: that one has
    /// cleared what was there before.
    fn take_own(number: u16) -> Result<Option<Self>> {
        loop {
            let last = std::fs::read_to_string(Self::lock_path(number));
            if last.ok().is_none_or(|run| run != this_run()) {
                return Ok(None);
            }
            if let Some(slot) = Self::take_one(number)? {
                return Ok(Some(slot));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn lock_path(number: u16) -> PathBuf {
        Path::new(HOME).join(format!("slot-{number}.lock"))
    }

    /// This slot, unless somebody has it.
    fn take_one(number: u16) -> Result<Option<Self>> {
        DirBuilder::new().mode(0o711).recursive(true).create(HOME)?;
        let path = Self::lock_path(number);
        let mut options = OpenOptions::new();
        let lock = options
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        let home = Path::new(HOME).join(format!("slot-{number}"));
        let taken = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        Ok(taken.then_some(Self {
            number,
            home,
            _lock: lock,
        }))
    }

    fn first_uid(&self) -> u32 {
        FIRST_UID + u32::from(self.number) * UIDS
    }

    fn cgroup(&self) -> String {
        format!("spore-e2e-{}", self.number)
    }

    fn gateway(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], FIRST_PORT + self.number * 2))
    }

    fn api(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], FIRST_PORT + self.number * 2 + 1))
    }
}
