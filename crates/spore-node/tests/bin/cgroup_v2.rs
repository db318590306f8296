//! The first process of a small machine in which cgroup v2 is the only hierarchy: it runs the
//! checks of this crate's cgroups there, one line each, and powers off.
//!
//! Booted by `tests/cgroup_v2`, which reads the lines. As another process than the first it is
//! what a check needs to put into a cgroup. Never run on a host: it mounts over what it finds.

use std::error::Error;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use rustix::system::{RebootCommand, reboot};
use spore_node::cgroup::{Cgroups, Limits};

type Outcome = Result<(), Box<dyn Error>>;

const ROOT: &str = "/sys/fs/cgroup";

/// Two levels, as below a systemd slice.
const PARENT: &str = "spore.slice/vms";

const STEP: Duration = Duration::from_millis(20);

type Check = fn(&Cgroups) -> Outcome;

/// Each check, by the name that its test asks for.
const CHECKS: [(&str, Check); 9] = [
    ("only_hierarchy", only_hierarchy),
    ("delegated", delegated),
    ("limited", limited),
    ("entered", entered),
    ("too_many_processes", too_many_processes),
    ("too_much_memory", too_much_memory),
    ("throttled", throttled),
    ("removed", removed),
    ("listed", listed),
];

fn main() -> Outcome {
    if std::process::id() == 1 {
        let outcome = first_process();
        if let Err(error) = outcome {
            say(&format!("failed setup: {error}"))?;
        }
        reboot(RebootCommand::PowerOff)?;
    }
    match std::env::args().nth(1).as_deref() {
        Some("fill") => fill(),
        Some("swarm") => swarm(),
        Some("breed") => breed(),
        _ => Err("fill, swarm or breed is expected".into()),
    }
}

/// Takes memory without end.
fn fill() -> Outcome {
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        held.push(vec![u8::try_from(held.len() % 255)? + 1; 1 << 20]);
    }
}

/// Starts processes until one is refused, tells how many there are, and stays.
fn swarm() -> Outcome {
    let mut children = Vec::new();
    while let Ok(child) = Command::new("/bin/sleep").arg("1000").spawn() {
        children.push(child);
    }
    say(&children.len().to_string())?;
    for mut child in children {
        child.wait()?;
    }
    Ok(())
}

/// Starts processes that end at once, also after some were refused: a shell gives up at the first.
fn breed() -> Outcome {
    let mut children = Vec::new();
    loop {
        let child = Command::new("/bin/sleep").arg("0").spawn();
        let is_refused = child.is_err();
        children.extend(child);
        if is_refused || children.len() > 8 {
            for mut child in children.drain(..children.len().div_ceil(2)) {
                child.wait()?;
            }
        }
    }
}

fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn first_process() -> Outcome {
    // The firmware leaves a line without an end.
    say("")?;
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    mount("cgroup2", ROOT, "cgroup2", MountFlags::empty(), None)?;
    let cgroups = Cgroups::open(PARENT)?;
    for (name, check) in CHECKS {
        match check(&cgroups) {
            Ok(()) => say(&format!("passed {name}"))?,
            Err(error) => say(&format!("failed {name}: {error}"))?,
        }
        // What a failed check leaves is not the next one's.
        for left in cgroups.list()? {
            cgroups.remove(&left)?;
        }
    }
    Ok(())
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}

const LIMITS: Limits = Limits {
    memory_bytes: 64 << 20,
    cpus: 1,
    pids: 12,
};

fn folder(name: &str) -> PathBuf {
    Path::new(ROOT).join(PARENT).join(name)
}

fn read(name: &str, file: &str) -> Result<String, Box<dyn Error>> {
    let path = folder(name).join(file);
    let text = fs::read_to_string(&path);
    let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Runs a program as a launcher does: what starts it has written `0` to each entrance before.
fn run_in(cgroups: &Cgroups, name: &str, program: &[&str]) -> Result<Child, Box<dyn Error>> {
    let entrances = cgroups.entrances(name);
    let [entrance] = entrances.as_slice() else {
        return Err(format!("one entrance is expected: {entrances:?}").into());
    };
    let child = Command::new("/bin/sh")
        .args(["-c", "echo 0 > \"$0\" && exec \"$@\""])
        .arg(entrance)
        .args(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(child)
}

/// Waits until `so`; the machine is killed from outside when that is never.
fn until(mut so: impl FnMut() -> Result<bool, Box<dyn Error>>) -> Outcome {
    while !so()? {
        sleep(STEP);
    }
    Ok(())
}

fn only_hierarchy(_cgroups: &Cgroups) -> Outcome {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let first: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup "))
        .collect();
    ensure(first.is_empty(), || format!("v1 is mounted: {first:?}"))?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    ensure(own.trim() == "0::/", || format!("hierarchies: {own}"))
}

fn delegated(_cgroups: &Cgroups) -> Outcome {
    for level in ["", "spore.slice", PARENT] {
        let path = Path::new(ROOT).join(level).join("cgroup.subtree_control");
        let text = fs::read_to_string(&path)?;
        for controller in ["cpu", "memory", "pids"] {
            let has = text.split_whitespace().any(|one| one == controller);
            ensure(has, || format!("{}: {text}", path.display()))?;
        }
    }
    Ok(())
}

fn limited(cgroups: &Cgroups) -> Outcome {
    cgroups.create("vm", &LIMITS)?;
    let two = Limits { cpus: 2, ..LIMITS };
    // Again, as a daemon does that died in the middle of the first time.
    cgroups.create("vm", &two)?;
    let expected = [
        ("memory.max", LIMITS.memory_bytes.to_string()),
        ("memory.swap.max", "0".to_owned()),
        ("memory.oom.group", "1".to_owned()),
        ("cpu.max", "200000 100000".to_owned()),
        ("pids.max", "12".to_owned()),
    ];
    for (file, value) in expected {
        let found = read("vm", file)?;
        ensure(found == value, || format!("{file} is {found}, not {value}"))?;
    }
    Ok(cgroups.remove("vm")?)
}

fn entered(cgroups: &Cgroups) -> Outcome {
    cgroups.create("vm", &LIMITS)?;
    let burn = ["/bin/sh", "-c", "while :; do :; done"];
    let child = run_in(cgroups, "vm", &burn)?;
    let proc = format!("/proc/{}/cgroup", child.id());
    until(|| Ok(cgroups.holds("vm", &fs::read_to_string(&proc)?)))?;
    ensure(!cgroups.holds("v", &fs::read_to_string(&proc)?), || {
        "held by another".to_owned()
    })?;
    until(|| Ok(cgroups.stats("vm")?.cpu_us > 100_000))?;
    let stats = cgroups.stats("vm")?;
    ensure(stats.pids == 1 && stats.memory_bytes > 0, || {
        format!("{stats:?}")
    })?;
    ensure(!cgroups.was_out_of_memory("vm")?, || "out of memory".into())?;
    // The next daemon opens the same tree while a VM is in it.
    let next = Cgroups::open(PARENT)?;
    ensure(next.list()? == ["vm"], || format!("{:?}", next.list()))?;
    next.remove("vm")?;
    is_killed(child)
}

fn is_killed(mut child: Child) -> Outcome {
    // Whoever removes a cgroup reaps the children that it killed; then nothing is told of it.
    match child.wait() {
        Ok(status) => ensure(status.signal() == Some(Signal::KILL.as_raw()), || {
            format!("it ended with {status}")
        }),
        Err(_reaped) => Ok(()),
    }
}

fn too_many_processes(cgroups: &Cgroups) -> Outcome {
    cgroups.create("vm", &LIMITS)?;
    let mut child = run_in(cgroups, "vm", &["/init", "swarm"])?;
    let mut said = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut said)?;
    let children: u64 = said.trim().parse()?;
    let pids = cgroups.stats("vm")?.pids;
    let allowed = u64::from(LIMITS.pids);
    ensure(children < allowed && pids <= allowed, || {
        format!("{children} children, {pids} processes")
    })?;
    ensure(read("vm", "pids.events")? != "max 0", || {
        "nothing was refused".to_owned()
    })?;
    cgroups.remove("vm")?;
    is_killed(child)
}

fn too_much_memory(cgroups: &Cgroups) -> Outcome {
    cgroups.create("vm", &LIMITS)?;
    let bystander = run_in(cgroups, "vm", &["/bin/sleep", "1000"])?;
    until(|| Ok(cgroups.stats("vm")?.pids == 1))?;
    is_killed(run_in(cgroups, "vm", &["/init", "fill"])?)?;
    // Not the greedy one alone: half a VM is none.
    is_killed(bystander)?;
    ensure(cgroups.was_out_of_memory("vm")?, || {
        "not called out of memory".to_owned()
    })?;
    let peak: u64 = read("vm", "memory.peak")?.parse()?;
    ensure(peak <= LIMITS.memory_bytes, || format!("{peak} bytes"))?;
    ensure(peak > LIMITS.memory_bytes / 2, || format!("{peak} bytes"))?;
    Ok(cgroups.remove("vm")?)
}

fn throttled(cgroups: &Cgroups) -> Outcome {
    cgroups.create("vm", &LIMITS)?;
    let burn = ["/bin/sh", "-c", "while :; do :; done"];
    let burning = [run_in(cgroups, "vm", &burn)?, run_in(cgroups, "vm", &burn)?];
    until(|| {
        let stat = read("vm", "cpu.stat")?;
        let count = stat
            .lines()
            .find_map(|line| line.strip_prefix("nr_throttled "));
        Ok(count.ok_or("no nr_throttled")? != "0")
    })?;
    cgroups.remove("vm")?;
    burning.into_iter().try_for_each(is_killed)
}

fn removed(cgroups: &Cgroups) -> Outcome {
    let limits = Limits { pids: 60, ..LIMITS };
    cgroups.create("vm", &limits)?;
    let child = run_in(cgroups, "vm", &["/init", "breed"])?;
    let swarm = run_in(cgroups, "vm", &["/init", "swarm"])?;
    until(|| Ok(cgroups.stats("vm")?.pids > 20))?;
    cgroups.remove("vm")?;
    cgroups.remove("vm")?;
    ensure(!folder("vm").exists(), || "it is left".to_owned())?;
    is_killed(child)?;
    is_killed(swarm)?;
    for entry in fs::read_dir("/proc")? {
        let stat = fs::read_to_string(entry?.path().join("stat")).unwrap_or_default();
        // Ended children of the dead are this process's to reap, and it does not.
        let lives = stat.contains("(sleep)") && !stat.contains("(sleep) Z");
        ensure(!lives, || format!("a process is left: {stat}"))?;
    }
    Ok(())
}

fn listed(cgroups: &Cgroups) -> Outcome {
    for name in ["b", "a", "c"] {
        cgroups.create(name, &LIMITS)?;
    }
    let listed = cgroups.list()?;
    ensure(listed == ["a", "b", "c"], || format!("{listed:?}"))?;
    ensure(cgroups.remove_parent().is_err(), || {
        "the parent of three goes".to_owned()
    })?;
    for name in listed {
        cgroups.remove(&name)?;
    }
    ensure(cgroups.list()?.is_empty(), || "not all go".to_owned())?;
    cgroups.remove_parent()?;
    ensure(!folder("").exists(), || "the parent is left".to_owned())?;
    Cgroups::open(PARENT)?;
    Ok(())
}
