//! Where a secret is, and where it is not.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use spore_e2e::app::SELF_PORTRAIT;
use spore_e2e::{AppFolder, Platform, available};

const CANARY: &str = "canary-9f3b1c77e2d84a60-never-in-clear";

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_in_the_app_and_nowhere_else() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let manifest = "[idle]\nafter = \"10m\"\n[secrets]\nnames = [\"API_KEY\"]\n";
    let folder = AppFolder::python("keeper", &format!("{PRINTS_IT}{SELF_PORTRAIT}"), manifest)?;
    let refused = platform.cli(&["deploy", &folder.argument()]);
    let refused = format!(
        "{:#}",
        refused
            .err()
            .context("a secret that is not set is refused")?
    );
    ensure!(refused.contains("API_KEY"), "{refused}");

    set_secret(&platform, "keeper", "API_KEY", CANARY)?;
    platform.cli(&["deploy", &folder.argument()])?;
    let answer = platform
        .visitor()
        .get("keeper.localhost", "/env/API_KEY")
        .await?;
    ensure!(answer.body == CANARY, "{answer:?}");
    let logs = platform.cli(&["logs", "keeper"])?;
    ensure!(logs.contains("the key is ***"), "{logs}");

    let found = sightings(&platform)?;
    ensure!(found.is_empty(), "the secret is in {found:?}");

    // The search would have found it: planted in clear in a file and in a process's arguments.
    let planted = platform.home().join("data/planted");
    std::fs::write(&planted, format!("before {CANARY} after"))?;
    let program = platform.home().join("bin/sleep");
    std::fs::copy("/bin/sleep", &program)?;
    let mut sleeper = Command::new(&program).args(["600", CANARY]).spawn()?;
    let found = sightings(&platform);
    sleeper.kill()?;
    sleeper.wait()?;
    std::fs::remove_file(&planted)?;
    let found = found?;
    ensure!(
        found.iter().any(|place| place.contains("planted")),
        "{found:?}"
    );
    ensure!(
        found.iter().any(|place| place.contains("cmdline")),
        "{found:?}"
    );
    platform.end()
}

const PRINTS_IT: &str = "import os\nprint('the key is', os.environ['API_KEY'], flush=True)\n";

fn set_secret(platform: &Platform, app: &str, name: &str, value: &str) -> Result<()> {
    let mut child = platform
        .command("secret")
        .args(["set", app, name])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    child
        .stdin
        .take()
        .context("a pipe")?
        .write_all(value.as_bytes())?;
    ensure!(child.wait()?.success(), "secret set failed");
    Ok(())
}

/// Every place of the platform that has the canary: files, logs, arguments and environments.
fn sightings(platform: &Platform) -> Result<Vec<String>> {
    let mut found = Vec::new();
    search(platform.home(), &mut found)?;
    let home = platform.home().to_string_lossy().into_owned();
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        let command = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        let ours = String::from_utf8_lossy(&command).contains(&home)
            || std::fs::read_link(folder.join("exe")).is_ok_and(|exe| exe.starts_with(&home))
            || String::from_utf8_lossy(&command).contains("qemu-system");
        if !ours {
            continue;
        }
        for file in ["cmdline", "environ"] {
            if contains(&std::fs::read(folder.join(file)).unwrap_or_default()) {
                found.push(folder.join(file).display().to_string());
            }
        }
    }
    Ok(found)
}

fn search(folder: &Path, found: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            search(&entry.path(), found)?;
        } else if kind.is_file() && contains(&std::fs::read(entry.path()).unwrap_or_default()) {
            found.push(entry.path().display().to_string());
        }
    }
    Ok(())
}

fn contains(bytes: &[u8]) -> bool {
    bytes
        .windows(CANARY.len())
        .any(|window| window == CANARY.as_bytes())
}
