//! `cargo xtask up | down | clean-host`: Spore on this machine. Run by `make`.
//!
//! What `up` puts on the machine, all of it owned by root since the daemon runs it:
//!
//! ```text
//!   /usr/local/lib/spore/spore                 the program
//!   /usr/local/lib/spore/guest/                vmlinux, initramfs.cpio, release
//!   /usr/local/lib/spore/images/               base images, to seed the daemon's store with
//!   /var/lib/spore  /run/spore  /var/log/spore  /etc/spore     the daemon's own
//! ```
//!
//! `./bin/spore` is a link to the installed program, so that what one types is what runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::progress::{say, step};
use crate::{DepsOptions, Folder, command, deps, fixed, guest, place};

/// Where the installed files are.
const INSTALLED: &str = "/usr/local/lib/spore";

/// The daemon's data; only root may enter.
const DATA: &str = "/var/lib/spore";

/// Everything that the daemon makes on a machine.
const DAEMON_FOLDERS: &[&str] = &[DATA, "/run/spore", "/var/log/spore", "/etc/spore"];

/// The app that `up` deploys.
const EXAMPLE: &str = "examples/hello";

/// The snapshot that `up` has for sandboxes, and the app that it is taken of, which goes again.
const SNAPSHOT: &str = "python3";
const SNAPSHOT_APP: &str = "python3-warm";
const SNAPSHOT_EXAMPLE: &str = "examples/python3";

/// Where the example answers.
const EXAMPLE_URL: &str = "http://hello.localhost:8080/";

/// Builds, installs and starts Spore, and shows one wake. Run again it updates and is harmless.
pub(crate) fn up(dir: &Path) -> Result<()> {
    deps::run(&DepsOptions {
        folder: Folder {
            dir: dir.to_path_buf(),
        },
        refresh: false,
        bench: false,
        systemd: false,
        no_images: false,
        // Nothing that runs here does so in the rig.
        no_rig: true,
    })?;
    guest::run(dir)?;
    let programs = step("build spore (release)", build)?;
    step("install to /usr/local/lib/spore", || {
        install(&programs, dir)
    })?;
    link_program()?;
    spore(&["up"])?;
    spore(&["deploy", EXAMPLE])?;
    if let Err(error) = ensure_snapshot() {
        // Whoever forks nothing does not miss it.
        say(format!(
            "there is no snapshot `{SNAPSHOT}` to fork: {error:#}. Run `make up` again to have it"
        ));
    }
    show_one_wake()
}

/// Has the snapshot that sandboxes are forked from. One that is there and can be forked stays, so
/// that running this again changes nothing.
fn ensure_snapshot() -> Result<()> {
    match fork_one()? {
        Forked::Open(sandbox) => return spore(&["sandbox", "rm", &sandbox]),
        Forked::Missing => {}
        // What was taken under another kernel or QEMU.
        Forked::Unusable => spore(&["snapshot", "rm", SNAPSHOT])?,
        Forked::Failed(why) => bail!("{why}"),
    }
    step("take the snapshot python3", || {
        spore(&["deploy", SNAPSHOT_EXAMPLE])?;
        let taken = spore(&["checkpoint", SNAPSHOT_APP, "--tag", SNAPSHOT]);
        spore(&["rm", SNAPSHOT_APP, "--yes"])?;
        taken
    })
}

/// What became of a try to fork the snapshot.
#[derive(Debug, PartialEq, Eq)]
enum Forked {
    /// The sandbox that was opened.
    Open(String),
    /// There is no such snapshot.
    Missing,
    /// It was made on another kind of host, or is damaged.
    Unusable,
    /// Why, whatever the snapshot is like.
    Failed(String),
}

fn fork_one() -> Result<Forked> {
    let output = Command::new(place::repository().join("bin/spore"))
        .args(["fork", SNAPSHOT, "--json"])
        .stdin(Stdio::null())
        .output()
        .context("cannot run bin/spore")?;
    Ok(forked(&output.stdout, &output.stderr))
}

/// Reads what `spore fork --json` printed: an array of one, or an error on the other side.
fn forked(out: &[u8], err: &[u8]) -> Forked {
    let read = |text: &[u8]| serde_json::from_slice(text).unwrap_or(Value::Null);
    let out: Value = read(out);
    let last = err.trim_ascii_end().rsplit(|byte| *byte == b'\n').next();
    let err: Value = read(last.unwrap_or_default());
    let error = match (&out[0]["error"], &out[0]["id"]) {
        (Value::Null, Value::String(id)) => return Forked::Open(id.clone()),
        (Value::Null, _) => &err,
        (error, _) => error,
    };
    match error["code"].as_str() {
        Some("not_found") => Forked::Missing,
        Some("snapshot_unusable") => Forked::Unusable,
        _ => Forked::Failed(error["message"].as_str().unwrap_or("no answer").to_owned()),
    }
}

/// Stops all VMs and the daemon; nothing that runs is not an error.
pub(crate) fn down() -> Result<()> {
    if !Path::new(INSTALLED).join("spore").is_file() {
        say("Spore is not installed here: nothing to stop");
        return Ok(());
    }
    link_program()?;
    spore(&["down"])
}

/// Removes what `up` and `deps` put on the machine.
pub(crate) fn clean(dir: &Path) -> Result<()> {
    down()?;
    deps::packages::remove(dir)?;
    let mut folders: Vec<PathBuf> = DAEMON_FOLDERS.iter().map(PathBuf::from).collect();
    folders.extend([PathBuf::from(INSTALLED), dir.to_path_buf()]);
    for folder in folders.iter().filter(|folder| folder.exists()) {
        say(format!("removing {}", folder.display()));
        command::run(
            command::as_root("rm")
                .args(["-rf", "--one-file-system"])
                .arg(folder),
        )?;
    }
    remove_units()?;
    forget_token()?;
    let user = deps::packages::BUILD_USER;
    if Command::new("getent")
        .args(["passwd", user])
        .output()?
        .status
        .success()
    {
        say(format!("removing user {user}"));
        command::run(command::as_root("userdel").arg(user))?;
    }
    let link = place::repository().join("bin/spore");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    }
    say("clean");
    Ok(())
}

/// Removes the systemd units that `spore up` wrote.
fn remove_units() -> Result<()> {
    let units = ["spore.service", "spore-vms.service"];
    let paths = units.map(|unit| Path::new("/etc/systemd/system").join(unit));
    let there: Vec<&PathBuf> = paths.iter().filter(|path| path.exists()).collect();
    if there.is_empty() {
        return Ok(());
    }
    say("removing the systemd units");
    command::run(command::as_root("rm").arg("-f").args(there))?;
    command::run(command::as_root("systemctl").args(["daemon-reload", "--quiet"]))
}

/// Removes the copy of the token that the daemon gave to whoever started it, with their own rights:
/// root would follow the links of their home. Root itself gets no copy.
fn forget_token() -> Result<()> {
    let own = rustix::process::geteuid();
    let user = match place::sudo_uid() {
        Some(uid) if own.is_root() => uid,
        None if own.is_root() => return Ok(()),
        _ => own.as_raw(),
    };
    let entry = command::output(Command::new("getent").args(["passwd", &user.to_string()]))?;
    let Some(home) = entry.trim().split(':').nth(5) else {
        return Ok(());
    };
    let mut remove = if own.is_root() {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", &user.to_string(), "--clear-groups", "sh"]);
        setpriv
    } else {
        Command::new("sh")
    };
    // What else is in the folder is not ours.
    let folder = Path::new(home).join(".config/spore");
    let what = r#"rm -f "$0/token" && { rmdir "$0" 2>/dev/null || true; }"#;
    command::run(remove.args(["-c", what]).arg(folder))
}

/// What is built and installed.
#[derive(Debug)]
struct Programs {
    spore: PathBuf,
    /// The VMM, which ends at once on a panic: a profile of its own.
    vmm: PathBuf,
}

fn build() -> Result<Programs> {
    let release = ["build", "--quiet", "--locked", "--release"];
    command::run(place::cargo().args(release).args(["--package", "spore"]))?;
    Ok(Programs {
        spore: place::target()?.join("release/spore"),
        vmm: fixed::build("spore-vmm", "vmm")?,
    })
}

/// Copies programs, guest and images, owned by root and writable by nobody else.
fn install(programs: &Programs, dir: &Path) -> Result<()> {
    let installed = Path::new(INSTALLED);
    let folders = [
        installed.to_path_buf(),
        installed.join("guest"),
        installed.join("images"),
    ];
    let names = installed.join("images/names");
    command::run(
        command::as_root("install")
            .args(["-d", "-o", "root", "-g", "root", "-m", "0755"])
            .args(&folders)
            .arg(&names),
    )?;
    install_file(&programs.spore, &installed.join("spore"), "0755")?;
    install_file(&programs.vmm, &installed.join("spore-vmm"), "0755")?;
    for name in ["vmlinux", "initramfs.cpio", "release"] {
        install_file(
            &dir.join("guest").join(name),
            &installed.join("guest").join(name),
            "0644",
        )?;
    }
    let images = dir.join("images");
    for (from, to) in [
        (images.clone(), folders[2].clone()),
        (images.join("names"), names),
    ] {
        for file in files(&from)? {
            let name = file.file_name().context("a file without a name")?;
            install_file(&file, &to.join(name), "0444")?;
        }
    }
    Ok(())
}

/// Copies a file unless the same is there already, in one step: a running program keeps its own.
fn install_file(from: &Path, to: &Path, mode: &str) -> Result<()> {
    if same(from, to) {
        return Ok(());
    }
    let mut staged = to.as_os_str().to_owned();
    staged.push(".new");
    command::run(
        command::as_root("install")
            .args(["-o", "root", "-g", "root", "-m", mode])
            .arg(from)
            .arg(&staged),
    )?;
    command::run(command::as_root("mv").arg("-T").arg(&staged).arg(to))
}

/// Whether two files have the same bytes.
fn same(from: &Path, to: &Path) -> bool {
    Command::new("cmp")
        .arg("-s")
        .arg(from)
        .arg(to)
        .status()
        .is_ok_and(|status| status.success())
}

/// The files of a folder, without its folders.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}: run `cargo xtask deps`", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Points `./bin/spore` to the installed program.
fn link_program() -> Result<()> {
    let bin = place::repository().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    let target = Path::new(INSTALLED).join("spore");
    let link =
        tempfile::Builder::new().make_in(&bin, |path| std::os::unix::fs::symlink(&target, path))?;
    link.persist(bin.join("spore"))?;
    Ok(())
}

/// Runs the installed program; the daemon's verbs need root and find it themselves through sudo.
fn spore(arguments: &[&str]) -> Result<()> {
    let program = place::repository().join("bin/spore");
    let needs_root = matches!(arguments, ["up" | "down", ..]);
    let mut command = if needs_root {
        command::as_root(&program)
    } else {
        Command::new(&program)
    };
    command::run(command.args(arguments).current_dir(place::repository()))
}

/// Puts the example to sleep, wakes it by a request, and shows what that took.
fn show_one_wake() -> Result<()> {
    spore(&["stop", "hello"])?;
    let answer = step("wake hello by a request", || {
        command::output(Command::new("curl").args([
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "90",
            "--dump-header",
            "-",
            // Not every resolver knows *.localhost.
            "--resolve",
            "hello.localhost:8080:127.0.0.1",
            EXAMPLE_URL,
        ]))
    })?;
    for line in answer
        .lines()
        .filter(|line| !line.trim().is_empty())
        .take(12)
    {
        say(format!("    {}", line.trim_end()));
    }
    if let Some(phases) = phases(&answer) {
        say("phases of this wake:");
        for (name, ms) in phases {
            say(format!("    {name:<12} {ms} ms"));
        }
    }
    spore(&["status", "hello"])?;
    say(format!("hello answers at {EXAMPLE_URL}"));
    say("try next: ./bin/spore ps, ./bin/spore logs hello, ./bin/spore shell hello, make down");
    Ok(())
}

/// Names and milliseconds of a `Server-Timing` header, if the answer has one.
fn phases(answer: &str) -> Option<Vec<(String, String)>> {
    let header = answer.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("server-timing")
            .then(|| value.trim())
    })?;
    let phases = header.split(',').filter_map(|phase| {
        let (name, parameters) = phase.split_once(';')?;
        let duration = parameters
            .split(';')
            .find_map(|p| p.trim().strip_prefix("dur="))?;
        Some((name.trim().to_owned(), duration.to_owned()))
    });
    Some(phases.collect())
}

#[cfg(test)]
mod tests {
    use super::{Forked, forked, phases};

    #[test]
    fn what_a_fork_came_to_is_read_from_either_side() {
        let failed = |why: &str| Forked::Failed(why.to_owned());
        for (out, err, expected) in [
            (r#"[{"id": "abc"}]"#, "", Forked::Open("abc".to_owned())),
            (
                r#"[{"id": "abc", "error": {"code": "snapshot_unusable", "message": "m"}}]"#,
                "",
                Forked::Unusable,
            ),
            (
                r#"[{"id": "abc", "error": {"code": "no_capacity", "message": "m"}}]"#,
                "",
                failed("m"),
            ),
            (
                "",
                "a word on the way\n{\"code\": \"not_found\", \"message\": \"m\"}\n",
                Forked::Missing,
            ),
            ("", "no JSON", failed("no answer")),
        ] {
            assert_eq!(forked(out.as_bytes(), err.as_bytes()), expected);
        }
    }

    #[test]
    fn phases_are_read_from_the_answer() {
        let answer =
            "HTTP/1.1 200 OK\r\nserver-timing: boot;dur=2100.5, app;desc=\"x\";dur=900\r\n\r\nhi";
        let expected = [("boot", "2100.5"), ("app", "900")];
        let found = phases(answer).unwrap();
        assert_eq!(found.len(), 2);
        for ((name, ms), (expected_name, expected_ms)) in found.iter().zip(expected) {
            assert_eq!((name.as_str(), ms.as_str()), (expected_name, expected_ms));
        }
        assert_eq!(phases("HTTP/1.1 200 OK\r\n\r\nhi"), None);
    }
}
