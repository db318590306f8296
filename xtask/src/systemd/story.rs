//! What is looked at inside the Debian of `cargo xtask systemd-test`, one line each.
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

/// The user with sudo, whose Spore it is.
const ADA: &str = "ada";

/// A user without.
const EVE: &str = "eve";

const TOKEN: &str = "/home/ada/.config/spore/token";

type Chapter = fn(&mut World) -> Result<()>;

const CHAPTERS: [(&str, Chapter); 11] = [
    ("a_user_with_sudo_brings_the_unit_up", comes_up),
    ("the_user_has_the_socket_and_a_token", user_has_access),
    ("another_user_has_neither", others_have_none),
    ("the_journal_has_the_daemons_log", journal),
    (
        "a_vm_is_in_a_cgroup_that_systemd_left_to_us",
        vm_has_its_place,
    ),
    ("a_restart_keeps_vm_and_gateway", restart),
    (
        "systemd_leaves_the_vms_limits_alone",
        other_units_come_and_go,
    ),
    ("a_killed_daemon_comes_back_to_its_vm", kill),
    ("a_stop_keeps_vm_and_gateway", stop),
    ("down_needs_no_qemu_and_leaves_nothing", down),
    ("a_start_that_fails_shows_the_journal", failing_start),
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
    vm: String,
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
                &["--unit=spore", "--lines=60", "--no-pager"],
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
    // Everything is slower by an order of magnitude in here.
    fs::create_dir("/etc/spore")?;
    fs::write("/etc/spore/spore.toml", "boot_timeout = \"20m\"\n")?;
    for user in [ADA, EVE] {
        command::run(Command::new("useradd").args(["--create-home", user]))?;
    }
    fs::write("/etc/sudoers.d/ada", "ada ALL=(ALL) NOPASSWD: ALL\n")?;
    command::run(Command::new("cp").args(["-r", "/mnt/hello", "/home/ada/hello"]))?;
    let manifest = Path::new("/home/ada/hello/spore.toml");
    let slow = "\n[health]\ntimeout = \"10m\"\n[idle]\nmode = \"never\"\n";
    fs::write(manifest, fs::read_to_string(manifest)? + slow)?;
    command::run(Command::new("chown").args(["-R", "ada:", "/home/ada/hello"]))
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

/// Waits until `so`; whoever started the machine ends it when that is never.
fn until(mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    while !so()? {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
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
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", property("MainPID")?))?;
    ensure!(
        cgroup.trim() == "0::/system.slice/spore.service",
        "{cgroup}"
    );
    until(|| Ok(Path::new("/run/spore/gateway/pid").exists()))?;
    world.gateway_pid = fs::read_to_string("/run/spore/gateway/pid")?;
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
    until(|| {
        let log = output(
            "journalctl",
            &["--unit=spore", "--output=cat", "--no-pager"],
        )?;
        Ok(log.contains("Spore is up"))
    })
}

/// The process of the VM, as its cgroup says.
fn vm_pid(vm: &str) -> Result<String> {
    let procs = fs::read_to_string(Path::new(VMS).join(vm).join("cgroup.procs"))?;
    let lines: Vec<&str> = procs.lines().collect();
    match lines.as_slice() {
        [pid] => Ok((*pid).to_owned()),
        _ => bail!("one process is expected: {lines:?}"),
    }
}

/// The VM that the daemon says the app has.
fn vm_of_app() -> Result<String> {
    let app = ada(&[SPORE, "status", "hello", "--json"])?;
    let app: serde_json::Value = serde_json::from_str(&app)?;
    let vm = app["vm"]["id"]
        .as_str()
        .with_context(|| format!("no VM: {app}"))?;
    Ok(vm.to_owned())
}

fn app_answers() -> Result<()> {
    let address = ["--resolve", "hello.localhost:8080:127.0.0.1"];
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "300"]);
    let answer = command::output(curl.args(address).arg("http://hello.localhost:8080/"))?;
    ensure!(answer.contains("microVM"), "{answer}");
    Ok(())
}

fn vm_has_its_place(world: &mut World) -> Result<()> {
    ada(&[SPORE, "deploy", "/home/ada/hello"])?;
    app_answers()?;
    world.vm = vm_of_app()?;
    world.vm_pid = vm_pid(&world.vm)?;
    let shown = fs::read_to_string(format!("/proc/{}/cgroup", world.vm_pid))?;
    let expected = format!("0::/spore.slice/spore-vms.service/{}", world.vm);
    ensure!(shown.trim() == expected, "{shown}");
    limits_hold(world)
}

fn limits_hold(world: &World) -> Result<()> {
    for file in ["memory.max", "cpu.max", "pids.max"] {
        let value = fs::read_to_string(Path::new(VMS).join(&world.vm).join(file))?;
        ensure!(!value.starts_with("max"), "{file} is {value}");
    }
    Ok(())
}

/// The daemon is another process now, and VM and gateway are the same.
fn is_taken_up(world: &World, daemon: &str) -> Result<()> {
    until(|| Ok(property("ActiveState")? == "active" && property("MainPID")? != daemon))?;
    let vm = vm_of_app()?;
    ensure!(vm == world.vm, "the app has the VM {vm}");
    ensure!(vm_pid(&vm)? == world.vm_pid, "another process");
    let gateway = fs::read_to_string("/run/spore/gateway/pid")?;
    ensure!(
        gateway == world.gateway_pid && runs(&gateway),
        "gateway {gateway}"
    );
    app_answers()
}

fn restart(world: &mut World) -> Result<()> {
    let daemon = property("MainPID")?;
    systemctl(&["restart", "spore"])?;
    is_taken_up(world, &daemon)
}

fn other_units_come_and_go(world: &mut World) -> Result<()> {
    // Each makes systemd write the controllers of every cgroup that is its own.
    systemctl(&["daemon-reload"])?;
    let limited = [
        "--wait",
        "--quiet",
        "--property=MemoryMax=100M",
        "--property=CPUQuota=50%",
    ];
    command::run(Command::new("systemd-run").args(limited).arg("/bin/true"))?;
    systemctl(&["daemon-reexec"])?;
    limits_hold(world)?;
    ensure!(runs(&world.vm_pid), "the VM is gone");
    app_answers()
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
    let said = ada(&["sudo", SPORE, "down"])?;
    ensure!(said.contains("VMs stopped: 1"), "{said}");
    ensure!(
        !runs(&world.vm_pid) && !runs(&world.gateway_pid),
        "VM or gateway runs"
    );
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

fn failing_start(_world: &mut World) -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:8889").context("take the API's port")?;
    let refused = as_user(ADA, &["sudo", SPORE, "up"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success(), "it came up");
    ensure!(said.contains("127.0.0.1:8889"), "{said}");
    ensure!(
        property("MainPID")? == "0",
        "systemd starts it again and again"
    );
    drop(taken);
    ada(&["sudo", SPORE, "up"])?;
    ada(&["sudo", SPORE, "down"])?;
    Ok(())
}
