//! What people get wrong, and hosts: each is refused with what to do next.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use spore_e2e::app::SELF_PORTRAIT;
use spore_e2e::platform::{Run, program};
use spore_e2e::{AppFolder, Disk, Platform, Site, available, platform};

const GOOD: &str = "name = \"good\"\nimage = \"debian/python3\"\n\
                    command = [\"python3\", \"app.py\"]\nport = 8000\n";

/// A change to a good manifest, and what is said of it.
const REFUSED: [(&str, &str, &str); 30] = [
    (
        "port = 8000",
        "port = 8000\ncolour = 1",
        "unknown key `colour`",
    ),
    ("port = 8000", "port = 0", "65535"),
    ("port = 8000", "port = 70000", "65535"),
    ("port = 8000", "port = \"8000\"", "number"),
    ("port = 8000", "", "port"),
    ("[\"python3\", \"app.py\"]", "[]", "name a program"),
    ("[\"python3\", \"app.py\"]", "[\"\"]", "name a program"),
    ("[\"python3\", \"app.py\"]", "\"python3 app.py\"", "list"),
    ("\"good\"", "\"Good\"", "name"),
    ("\"good\"", "\"2good\"", "name"),
    ("\"good\"", "\"go--od\"", "name"),
    ("\"good\"", "\"8000-a\"", "name"),
    ("\"good\"", "7", "text"),
    (
        "\"debian/python3\"",
        "\"oci:alpine\"",
        "not in this version",
    ),
    ("\"debian/python3\"", "\"dir:\"", "name the folder"),
    (
        "port = 8000",
        "port = 8000\nprotocol = \"h2c\"",
        "not in this version",
    ),
    (
        "port = 8000",
        "port = 8000\nwarm = \"ready\"\n[secrets]\nnames = [\"KEY\"]",
        "no secrets",
    ),
    ("port = 8000", "port = 8000\nwarm = \"hot\"", "\"ready\""),
    (
        "port = 8000",
        "port = 8000\n[resources]\nmemory = \"256MB\"",
        "`MB`",
    ),
    (
        "port = 8000",
        "port = 8000\n[resources]\nmemory = \"1MiB\"",
        "64",
    ),
    (
        "port = 8000",
        "port = 8000\n[resources]\nmemory = \"-1MiB\"",
        "size",
    ),
    ("port = 8000", "port = 8000\n[resources]\ncpus = 1000", "4"),
    ("port = 8000", "port = 8000\n[resources]\ndisk = 5", "size"),
    (
        "port = 8000",
        "port = 8000\n[idle]\nmode = \"doze\"",
        "\"suspend\"",
    ),
    ("port = 8000", "port = 8000\n[idle]\nafter = \"1\"", "unit"),
    (
        "port = 8000",
        "port = 8000\n[egress]\nallow = [\"*.example.org:443\"]",
        "not in this version",
    ),
    (
        "port = 8000",
        "port = 8000\n[egress]\nallow = [\"example.org\"]",
        "HOST:PORT",
    ),
    (
        "port = 8000",
        "port = 8000\n[scale]\nmax = 2",
        "not in this version",
    ),
    (
        "port = 8000",
        "port = 8000\n[volumes]\n\"/data\" = { name = \"d\", size = \"1GiB\" }",
        "not in this version",
    ),
    ("port = 8000", "port = = 8000", "spore.toml:4"),
];

#[test]
fn a_wrong_manifest_is_refused_with_its_line_and_what_is_right() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (good, bad, said) in REFUSED {
        let text = GOOD.replacen(good, bad, 1);
        ensure!(text != GOOD, "{good} is not in the manifest");
        std::fs::write(folder.path().join("spore.toml"), &text)?;
        let refused = deploy_here(folder.path())?;
        ensure!(
            refused.code != 0 && refused.out.is_empty(),
            "{bad}: {refused:?}"
        );
        ensure!(
            refused.err.contains(said),
            "{bad}: {said} is not in {refused:?}"
        );
        let place = if good == bad || bad.is_empty() {
            "spore.toml"
        } else {
            "spore.toml:"
        };
        ensure!(
            refused.err.contains(place),
            "{bad}: no place in {refused:?}"
        );
        ensure!(!refused.err.contains("panicked"), "{bad}: {refused:?}");
    }
    for (path, said) in [
        (folder.path().join("nowhere"), "nowhere"),
        (folder.path().join("spore.toml"), "folder"),
    ] {
        let refused = deploy_here(&path)?;
        refused.ensure_refused(said)?;
    }
    std::fs::remove_file(folder.path().join("spore.toml"))?;
    std::fs::write(folder.path().join("app.py"), SELF_PORTRAIT)?;
    let refused = deploy_here(folder.path())?;
    ensure!(
        refused.code != 0 && refused.err.contains("command = [\"python3\""),
        "{refused:?}"
    );
    Ok(())
}

/// No daemon is needed to refuse these, so none is there.
fn deploy_here(folder: &Path) -> Result<Run> {
    let mut command = Command::new(program("spore"));
    command
        .args(["--host", "unix:/nonexistent/api.sock", "deploy"])
        .arg(folder);
    platform::run(command, b"")
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_folders_are_refused_or_deployed_whole() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let app = AppFolder::python("folder", SELF_PORTRAIT, "")?;
    let folder = app.path();

    std::os::unix::fs::symlink("/etc/shadow", folder.join("out"))?;
    let refused = platform.run(&["deploy", &app.argument()])?;
    refused.ensure_refused("out")?;
    std::fs::remove_file(folder.join("out"))?;
    std::os::unix::fs::symlink("../../etc", folder.join("up"))?;
    let refused = platform.run(&["deploy", &app.argument()])?;
    refused.ensure_refused("up")?;
    std::fs::remove_file(folder.join("up"))?;

    // A user who cannot read one of the files.
    let closed = folder.join("closed.txt");
    std::fs::write(&closed, "closed")?;
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000))?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(platform.home().join("bin/spore"));
    command
        .args(["--host", &platform.api_address().to_string(), "deploy"])
        .arg(folder);
    command.env("SPORE_TOKEN", platform.token()?);
    let refused = platform::run(command, b"")?;
    refused.ensure_refused("closed.txt")?;
    std::fs::remove_file(&closed)?;
    let apps = platform.json(&["ps"])?;
    ensure!(
        apps["items"].as_array().is_some_and(Vec::is_empty),
        "{apps}"
    );

    std::os::unix::fs::symlink("app.py", folder.join("inside"))?;
    std::fs::write(folder.join(".env"), "KEY=value")?;
    for number in 0..10_000 {
        let part = folder.join(format!("files/{}", number / 100));
        if number % 100 == 0 {
            std::fs::create_dir_all(&part)?;
        }
        std::fs::write(part.join(number.to_string()), number.to_string())?;
    }
    let deployed = platform.run(&["deploy", &app.argument()])?;
    ensure!(deployed.code == 0, "{deployed:?}");
    ensure!(
        deployed.err.contains(".env"),
        "what is left out is named: {deployed:?}"
    );
    let script = "find files -type f | wc -l; cat files/99/9999; echo; readlink inside; ls -A";
    let seen = platform.cli(&["exec", "folder", "--", "sh", "-c", script])?;
    ensure!(seen.starts_with("10000\n9999\napp.py\n"), "{seen}");
    ensure!(!seen.contains(".env"), "{seen}");
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_serve_is_told_why() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    let config = platform.config();
    let second = platform.run(&["server", "--config", &config])?;
    second.ensure_refused("already runs")?;
    ensure!(
        platform.client().status().await.is_ok(),
        "the first one serves on"
    );
    let again = platform.run(&["up", "--config", &config])?;
    ensure!(again.code == 0, "{again:?}");

    for verb in ["server", "up", "down"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(platform.home().join("bin/spore"));
        command.args([verb, "--config", &config]);
        let refused = platform::run(command, b"")?;
        ensure!(
            refused.code != 0 && refused.err.contains("root"),
            "{verb}: {refused:?}"
        );
    }
    platform.stop_daemon()?;
    let taken = std::net::TcpListener::bind(platform.api_address())?;
    let refused = platform.run(&["server", "--config", &config])?;
    refused.ensure_refused("another program")?;
    drop(taken);
    platform.start_daemon().await?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_what_serves_serves_on() -> Result<()> {
    if !available() {
        return Ok(());
    }
    // The base image and one app fit; little else does.
    let site = Site {
        disk: Disk::OwnMib(400),
        ..Site::default()
    };
    let mut platform = Platform::start_at(site).await?;
    platform.deploy(
        "small",
        SELF_PORTRAIT,
        "[resources]\ndisk = \"32MiB\"\n[idle]\nafter = \"2h\"\n",
    )?;
    let large = AppFolder::python("large", SELF_PORTRAIT, "")?;
    let mut noise = vec![0; 300 * 1024 * 1024];
    let mut state = 1_u64;
    for piece in noise.chunks_exact_mut(8) {
        // Xorshift: nothing can pack it.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        piece.copy_from_slice(&state.to_le_bytes());
    }
    std::fs::write(large.path().join("noise"), noise)?;
    let refused = platform.run(&["deploy", "--json", &large.argument()])?;
    ensure!(refused.code != 0, "{refused:?}");
    ensure!(refused.err.contains("disk_full"), "{refused:?}");
    let answer = platform.visitor().get("small.localhost", "/").await?;
    ensure!(answer.status == 200, "{answer:?}");

    // Full to the last byte, an awake app still answers and the API still tells.
    let filler = platform.home().join("data/filler");
    let mut command = Command::new("dd");
    command
        .args(["if=/dev/zero", "bs=1M"])
        .arg(format!("of={}", filler.display()));
    let filled = platform::run(command, b"")?;
    ensure!(filled.err.contains("No space"), "{filled:?}");
    let answer = platform.visitor().get("small.localhost", "/").await?;
    ensure!(answer.status == 200, "{answer:?}");
    platform.cli(&["ps"])?;
    let refused = platform.run_with(&["secret", "set", "small", "KEY"], b"value")?;
    refused.ensure_refused("full")?;
    std::fs::remove_file(&filler)?;
    // The store closes itself at a failed write; the next daemon opens it as it was.
    platform.stop_daemon()?;
    platform.start_daemon().await?;
    let set = platform.run_with(&["secret", "set", "small", "KEY"], b"value")?;
    ensure!(set.code == 0, "{set:?}");
    let answer = platform.visitor().get("small.localhost", "/").await?;
    ensure!(answer.status == 200, "{answer:?}");
    platform.end()
}
