//! What is looked at inside the Debian of `cargo xtask systemd-test`, one line each.
//!
//! A VM in an emulated machine takes longer to boot than its agent's time limits allow, so a helper
//! process stands where a VM would, with a VM's limits; the gateway is the real one. That the next
//! daemon takes real VMs up again is told by `tests/e2e`.
//!
//! Run as root in that machine only: it makes users, moves QEMU away and listens on ports. Stops
//! at the first thing that does not hold, since the next ones build on it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::command;
use crate::progress::say;

/// Where the payload is mounted.
const PAYLOAD: &str = "/mnt";

const SPORE: &str = "/usr/local/lib/spore/spore";

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Below it are the VMs, each in its own.
const VMS: &str = "/sys/fs/cgroup/spore.slice/spore-vms.service";

/// The helper's cgroup, beside those of VMs.
const HELPER: &str = "helper";

/// Limits as a VM's are.
const LIMITS: [(&str, &str); 3] = [
    ("memory.max", "134217728"),
    ("cpu.max", "100000 100000"),
    ("pids.max", "82"),
];

/// The user with sudo, whose Spore it is.
const ADA: &str = "ada";

/// A user without.
const EVE: &str = "eve";

const TOKEN: &str = "/home/ada/.config/spore/token";

type Chapter = fn(&mut World) -> Result<()>;

const CHAPTERS: [(&str, Chapter); 11] = [
    ("a_start_that_fails_shows_the_journal", failing_start),
    ("a_user_with_sudo_brings_the_unit_up", comes_up),
    ("the_user_has_the_socket_and_a_token", user_has_access),
    ("another_user_has_neither", others_have_none),
    ("the_journal_has_the_daemons_log", journal),
    ("the_vms_cgroup_is_left_to_us", vm_has_its_place),
    ("a_restart_keeps_vm_and_gateway", restart),
    (
        "systemd_leaves_the_vms_limits_alone",
        other_units_come_and_go,
    ),
    ("a_killed_daemon_comes_back_to_its_vm", kill),
    ("a_stop_keeps_vm_and_gateway", stop),
    ("down_needs_no_qemu_and_leaves_nothing", down),
];

/// The names of the chapters, for whoever counts.
pub(crate) const NAMES: [&str; CHAPTERS.len()] = {
    let mut names = [""; CHAPTERS.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = CHAPTERS[index].0;
        index += 1;
    }
    names
};

/// What earlier chapters found.
#[derive(Debug, Default)]
struct World {
    vm_pid: String,
    gateway_pid: String,
}

/// Tells the story.
pub(crate) fn run() -> Result<()> {
    let mut world = World::default();
    set_up().context("set up the machine")?;
    for (name, chapter) in CHAPTERS {
        if let Err(error) = chapter(&mut world) {
            say(format!("failed {name}: {error:#}"));
            say(output(
                "journalctl",
                &["--unit=spore*", "--lines=60", "--no-pager"],
            )?);
            bail!("the story ended at {name}");
        }
        say(format!("passed {name}"));
    }
    Ok(())
}

fn set_up() -> Result<()> {
    let installed = Path::new(SPORE).parent().context("a folder")?;
    let from = Path::new(PAYLOAD).join("spore");
    command::run(
        Command::new("cp")
            .args(["-r", "--no-preserve=ownership"])
            .arg(from)
            .arg(installed),
    )?;
    for user in [ADA, EVE] {
        command::run(Command::new("useradd").args(["--create-home", user]))?;
    }
    fs::write("/etc/sudoers.d/ada", "ada ALL=(ALL) NOPASSWD: ALL\n")?;
    Ok(())
}

/// Runs a program as a user, as a login shell would.
fn as_user(user: &str, words: &[&str]) -> Result<Output> {
    Command::new("runuser")
        .args(["-u", user, "--", "env", &format!("HOME=/home/{user}")])
        .args(words)
        .current_dir(format!("/home/{user}"))
        .stdin(Stdio::null())
        .output()
        .context("cannot start runuser")
}

/// The same; it must succeed.
fn ada(words: &[&str]) -> Result<String> {
    let output = as_user(ADA, words)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{words:?}: {}: {said}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    command::output(Command::new(program).args(arguments))
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    command::run(Command::new("systemctl").args(arguments))
}

fn property(name: &str) -> Result<String> {
    let shown = output(
        "systemctl",
        &["show", "spore.service", "--value", "--property", name],
    )?;
    Ok(shown.trim().to_owned())
}

/// Waits until `so`, in a machine where everything takes long.
fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    for _second in 0..300 {
        if so()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    bail!("never: {what}")
}

fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn failing_start(_world: &mut World) -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:8889").context("take the API's port")?;
    let refused = as_user(ADA, &["sudo", SPORE, "up"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success(), "it came up");
    ensure!(said.contains("cannot listen on 127.0.0.1:8889"), "{said}");
    ensure!(
        property("MainPID")? == "0",
        "systemd starts it again and again"
    );
    drop(taken);
    Ok(())
}

fn comes_up(world: &mut World) -> Result<()> {
    let said = ada(&["sudo", SPORE, "up"])?;
    ensure!(said.contains("is up"), "{said}");
    for (name, value) in [
        ("ActiveState", "active"),
        ("Type", "notify"),
        ("UnitFileState", "enabled"),
    ] {
        let found = property(name)?;
        ensure!(found == value, "{name} is {found}");
    }
    let again = ada(&["sudo", SPORE, "up"])?;
    ensure!(again.contains("was up already"), "{again}");
    let controllers = fs::read_to_string(Path::new(VMS).join("cgroup.subtree_control"))?;
    for controller in ["cpu", "memory", "pids"] {
        let has = controllers.split_whitespace().any(|one| one == controller);
        ensure!(has, "VMs cannot be limited: {controllers}");
    }
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", property("MainPID")?))?;
    ensure!(
        cgroup.trim() == "0::/system.slice/spore.service",
        "{cgroup}"
    );
    let pid_file = Path::new("/run/spore/gateway/pid");
    until("the gateway runs", || Ok(pid_file.exists()))?;
    world.gateway_pid = fs::read_to_string(pid_file)?;
    Ok(())
}

fn user_has_access(_world: &mut World) -> Result<()> {
    ada(&[SPORE, "status"])?;
    ada(&[SPORE, "--host", "127.0.0.1:8889", "status"])?;
    let token = fs::metadata(TOKEN)?;
    let home = fs::metadata("/home/ada")?;
    ensure!(
        (token.uid(), token.mode() & 0o777) == (home.uid(), 0o600),
        "uid {}, mode {:o}",
        token.uid(),
        token.mode()
    );
    let foreign = output("find", &["/home/ada", "!", "-user", ADA])?;
    ensure!(foreign.is_empty(), "not the user's own: {foreign}");
    Ok(())
}

fn others_have_none(_world: &mut World) -> Result<()> {
    for words in [
        vec![SPORE, "status"],
        vec![SPORE, "--host", "127.0.0.1:8889", "status"],
        vec!["cat", TOKEN],
        vec!["cat", "/etc/spore/token"],
        vec!["ls", "/var/lib/spore"],
    ] {
        let refused = as_user(EVE, &words)?;
        ensure!(!refused.status.success(), "{words:?}: {refused:?}");
    }
    Ok(())
}

fn journal(_world: &mut World) -> Result<()> {
    until("the journal has it", || {
        let log = output(
            "journalctl",
            &["--unit=spore", "--output=cat", "--no-pager"],
        )?;
        Ok(log.contains("Spore is up"))
    })
}

fn vm_has_its_place(world: &mut World) -> Result<()> {
    // The daemon would sweep away what it did not put there, so it gets a place beside.
    let config = "cgroup_parent = \"spore.slice/spore-vms.service/daemon\"\n";
    fs::write("/etc/spore/spore.toml", config)?;
    systemctl(&["restart", "spore"])?;
    let place = Path::new(VMS).join(HELPER);
    fs::create_dir(&place)?;
    for (file, value) in LIMITS {
        fs::write(place.join(file), value).context(file)?;
    }
    let helper = Command::new("sleep")
        .arg("1000000")
        .stdin(Stdio::null())
        .spawn()?;
    world.vm_pid = helper.id().to_string();
    fs::write(place.join("cgroup.procs"), &world.vm_pid).context("enter the cgroup")?;
    limits_hold(world)
}

fn limits_hold(world: &World) -> Result<()> {
    let shown = fs::read_to_string(format!("/proc/{}/cgroup", world.vm_pid))?;
    let expected = format!("0::/spore.slice/spore-vms.service/{HELPER}");
    ensure!(shown.trim() == expected, "it is in {shown}");
    for (file, value) in LIMITS {
        let found = fs::read_to_string(Path::new(VMS).join(HELPER).join(file))?;
        ensure!(found.trim() == value, "{file} is {found}");
    }
    Ok(())
}

/// The daemon is another process now, and VM and gateway are the same.
fn is_taken_up(world: &World, daemon: &str) -> Result<()> {
    until("another daemon is ready", || {
        Ok(property("ActiveState")? == "active" && property("MainPID")? != daemon)
    })?;
    ensure!(runs(&world.vm_pid), "the helper ended");
    limits_hold(world)?;
    ada(&[SPORE, "status"])?;
    let gateway = fs::read_to_string("/run/spore/gateway/pid")?;
    ensure!(
        gateway == world.gateway_pid && runs(&gateway),
        "gateway {gateway}"
    );
    Ok(())
}

fn restart(world: &mut World) -> Result<()> {
    let daemon = property("MainPID")?;
    systemctl(&["restart", "spore"])?;
    is_taken_up(world, &daemon)
}

fn other_units_come_and_go(world: &mut World) -> Result<()> {
    // Each makes systemd write the controllers of every cgroup that is its own.
    systemctl(&["daemon-reload"])?;
    let limited = "[Service]\nType=oneshot\nExecStart=/bin/true\nMemoryMax=100M\nCPUQuota=50%\n";
    fs::write("/run/systemd/system/limited.service", limited)?;
    systemctl(&["start", "limited"])?;
    systemctl(&["daemon-reexec"])?;
    limits_hold(world)?;
    ensure!(runs(&world.vm_pid), "the helper ended");
    Ok(())
}

fn kill(world: &mut World) -> Result<()> {
    let daemon = property("MainPID")?;
    command::run(Command::new("kill").args(["-9", &daemon]))?;
    is_taken_up(world, &daemon)
}

fn stop(world: &mut World) -> Result<()> {
    let daemon = property("MainPID")?;
    systemctl(&["stop", "spore"])?;
    ensure!(!runs(&daemon), "the daemon runs");
    ensure!(
        runs(&world.vm_pid) && runs(&world.gateway_pid),
        "VM or gateway ended"
    );
    systemctl(&["start", "spore"])?;
    is_taken_up(world, &daemon)
}

/// What `down` must not need.
fn unneeded() -> [(PathBuf, PathBuf); 3] {
    let installed = |name: &str| Path::new(SPORE).with_file_name(name);
    [PathBuf::from(QEMU), installed("guest"), installed("images")].map(|path| {
        let hidden = path.with_extension("hidden");
        (path, hidden)
    })
}

fn down(world: &mut World) -> Result<()> {
    for (path, hidden) in unneeded() {
        fs::rename(&path, &hidden).with_context(|| path.display().to_string())?;
    }
    // The helper is no VM of the daemon's, so it is not the daemon's to stop.
    command::run(Command::new("kill").args(["-9", &world.vm_pid]))?;
    until("the helper ended", || Ok(!runs(&world.vm_pid)))?;
    fs::remove_dir(Path::new(VMS).join(HELPER))?;
    let said = ada(&["sudo", SPORE, "down"])?;
    ensure!(said.contains("Spore is down"), "{said}");
    ensure!(!runs(&world.gateway_pid), "the gateway runs");
    ensure!(property("ActiveState")? == "inactive", "the unit runs");
    ensure!(
        property("UnitFileState")? == "disabled",
        "the unit is enabled"
    );
    ensure!(!Path::new(VMS).exists(), "the cgroup is left");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let left: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains("/run/spore"))
        .collect();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    for (path, hidden) in unneeded() {
        fs::rename(&hidden, &path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
