//! Where a secret is, and where it is not.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::platform::driver;
use spore_e2e::search::Words;
use spore_e2e::{AppFolder, Platform, available, until};

const CANARY: &str = "canary-9f3b1c77e2d84a60-never-in-clear";
const SECOND: &str = "canary-5a0e4d19b7c64f38-nor-this-one";

const THIRD: &str = "canary-c81d02f7a65b4e93-nor-that-one";

const CANARIES: Words<3> = Words([CANARY, SECOND, THIRD]);

const PRINTS_IT: &str = "import os\nprint('the key is', os.environ['API_KEY'], flush=True)\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_in_the_app_and_nowhere_else() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    // A grant, so that the VM has a proxy whose process is searched too.
    // A small disk, since a checkpoint of it is searched.
    let manifest = "[idle]\nafter = \"2h\"\n[resources]\ndisk = \"64MiB\"\n\
                    [egress]\nallow = [\"10.20.0.5:5432\"]\n\
                    [secrets]\nnames = [\"API_KEY\"]\nfiles = [\"SECOND\"]\n";
    let folder = AppFolder::python("keeper", &format!("{PRINTS_IT}{SELF_PORTRAIT}"), manifest)?;
    let refused = platform.run(&["deploy", &folder.argument()])?;
    ensure!(refused.code != 0, "{refused:?}");
    ensure!(refused.err.contains("API_KEY"), "{refused:?}");
    ensure!(refused.err.contains("spore secret set"), "{refused:?}");

    set(&platform, "API_KEY", CANARY)?;
    set(&platform, "SECOND", SECOND)?;
    let done = AtomicBool::new(false);
    // Helpers of a deploy live shortly, so their arguments are looked at while it goes on.
    let (deployed, meanwhile) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch_processes(&platform, &done));
        let deployed = platform.cli(&["deploy", &folder.argument()]);
        done.store(true, Ordering::Release);
        (deployed, watch.join())
    });
    deployed?;
    let meanwhile = meanwhile.map_err(|_panic| anyhow::anyhow!("the watch panicked"))??;
    ensure!(meanwhile.is_empty(), "the secret is in {meanwhile:?}");

    let visitor = platform.visitor();
    let answer = visitor.get("keeper.localhost", "/env/API_KEY").await?;
    ensure!(answer.body == CANARY, "{answer:?}");
    let file = platform.cli(&["exec", "keeper", "--", "cat", "/run/secrets/SECOND"])?;
    ensure!(file == SECOND, "{file}");
    let masked = || {
        Ok(platform
            .cli(&["logs", "keeper"])?
            .contains("the key is ***"))
    };
    until(120, masked)
        .await
        .context("its line is kept, masked")?;

    its_checkpoint_holds_it_encrypted(&platform)?;
    let found = sightings(&platform)?;
    ensure!(found.is_empty(), "the secret is in {found:?}");
    the_search_finds_what_is_planted(&platform)?;
    platform.end()
}

/// It is taken only when that is asked for; what is forked from it holds the secret too.
fn its_checkpoint_holds_it_encrypted(platform: &Platform) -> Result<()> {
    let refused = platform.run(&["checkpoint", "keeper", "--tag", "safe"])?;
    refused.ensure_refused("--allow-secrets")?;
    let allowed = ["checkpoint", "keeper", "--tag", "safe", "--allow-secrets"];
    let taken = platform.json(&allowed)?;
    ensure!(taken["snapshot"]["encrypted"] == true, "{taken}");
    let forks = platform.json(&["fork", "safe"])?;
    let sandbox = forks[0]["id"].as_str().context("an id")?;
    let inside = [
        "sandbox",
        "exec",
        sandbox,
        "--",
        "cat",
        "/run/secrets/SECOND",
    ];
    ensure!(platform.cli(&inside)? == SECOND);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_set_replaced_listed_without_values_and_removed() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let manifest = "[idle]\nafter = \"2h\"\n[secrets]\nnames = [\"API_KEY\", \"REGION\"]\n";
    let folder = AppFolder::python("keeper", SELF_PORTRAIT, manifest)?;
    let file = folder.path().join("values.env");
    std::fs::write(
        &file,
        format!("# two\nAPI_KEY=\"{CANARY}\"\nREGION=north\n"),
    )?;
    let file = file.display().to_string();
    platform.cli(&["secret", "set", "keeper", "--env-file", &file])?;
    platform.cli(&["deploy", &folder.argument()])?;
    ensure!(value(&platform, "API_KEY").await? == CANARY);
    ensure!(value(&platform, "REGION").await? == "north");

    let listed = platform.cli(&["secret", "ls", "keeper"])?;
    ensure!(
        listed.contains("API_KEY") && listed.contains("REGION"),
        "{listed}"
    );
    ensure!(
        !listed.contains(CANARY) && !listed.contains("north"),
        "{listed}"
    );
    let listed = platform.json(&["secret", "ls", "keeper"])?;
    for secret in listed["items"].as_array().context("items")? {
        let mut keys: Vec<_> = secret.as_object().context("an object")?.keys().collect();
        keys.sort();
        ensure!(keys == ["name", "updated_at", "used"], "{secret}");
    }

    // A new value comes with the next start, or at once when that is asked for.
    set(&platform, "REGION", "south")?;
    ensure!(value(&platform, "REGION").await? == "north");
    let arguments = ["secret", "set", "keeper", "REGION", "--restart"];
    let restarted = platform.run_with(&arguments, b"west\n")?;
    ensure!(restarted.code == 0, "{restarted:?}");
    ensure!(value(&platform, "REGION").await? == "west");

    platform.cli(&["secret", "rm", "keeper", "REGION"])?;
    let listed = platform.cli(&["secret", "ls", "keeper"])?;
    ensure!(!listed.contains("REGION"), "{listed}");
    let again = platform.run(&["secret", "rm", "keeper", "REGION"])?;
    ensure!(again.code == 1 && again.err.contains("REGION"), "{again:?}");
    for (input, what) in [
        (b"".as_slice(), "empty"),
        (b"a\0b", "NUL"),
        (b"\xff", "UTF-8"),
    ] {
        let refused = platform.run_with(&["secret", "set", "keeper", "API_KEY"], input)?;
        ensure!(
            refused.code != 0 && refused.err.contains(what),
            "{refused:?}"
        );
    }

    // The app still asks for what is gone, and says so when it is woken.
    platform.cli(&["stop", "keeper"])?;
    let answer = platform.visitor().get("keeper.localhost", "/").await?;
    ensure!(answer.status == 503, "{answer:?}");
    let status = platform.cli(&["status", "keeper"])?;
    ensure!(status.contains("REGION"), "{status}");
    platform.end()
}

/// Its answer is what it was given, and it prints the same.
const SAYS_THEM: &str = r#"
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        given = os.environ["API_KEY"] + " " + os.environ["SECOND"]
        print("asked by", self.path, "for", given, flush=True)
        self.send_response(200)
        self.send_header("Content-Length", str(len(given)))
        self.end_headers()
        self.wfile.write(given.encode())

    def log_message(self, form, *arguments):
        pass


ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_vm_was_given_is_masked_after_a_restart_whatever_it_is_now() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    let manifest = format!("{STAYS_AWAKE}[secrets]\nnames = [\"API_KEY\", \"SECOND\"]\n");
    let folder = AppFolder::python("keeper", SAYS_THEM, &manifest)?;
    set(&platform, "API_KEY", CANARY)?;
    set(&platform, "SECOND", SECOND)?;
    platform.cli(&["deploy", &folder.argument()])?;
    let given = format!("{CANARY} {SECOND}");
    ensure!(asked(&platform, "/before").await? == given);

    set(&platform, "API_KEY", THIRD)?;
    platform.cli(&["secret", "rm", "keeper", "SECOND"])?;
    ensure!(asked(&platform, "/changed").await? == given);
    for round in ["/first", "/second"] {
        platform.kill_daemon()?;
        platform.start_daemon().await?;
        ensure!(asked(&platform, round).await? == given, "it is the same VM");
        printed(&platform, round, "*** ***").await?;
    }
    let found = sightings(&platform)?;
    ensure!(found.is_empty(), "the secret is in {found:?}");

    // A new VM is given what is there now, and what was is gone.
    let arguments = ["secret", "set", "keeper", "SECOND", "--restart"];
    let restarted = platform.run_with(&arguments, THIRD.as_bytes())?;
    ensure!(restarted.code == 0, "{restarted:?}");
    ensure!(asked(&platform, "/anew").await? == format!("{THIRD} {THIRD}"));
    printed(&platform, "/anew", "*** ***").await?;
    let found = sightings(&platform)?;
    ensure!(found.is_empty(), "the secret is in {found:?}");
    platform.end()
}

async fn asked(platform: &Platform, path: &str) -> Result<String> {
    let answer = platform.visitor().get("keeper.localhost", path).await?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.body)
}

/// Waits until the app's log has the line of a request, and looks that it is this one.
async fn printed(platform: &Platform, path: &str, masked: &str) -> Result<()> {
    let began = format!("asked by {path} for ");
    for _try in 0..600 {
        let logs = platform.cli(&["logs", "keeper"])?;
        if let Some((_, line)) = logs.split_once(&began) {
            ensure!(line.starts_with(masked), "{logs}");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    anyhow::bail!("the log says nothing of {path}: {}", platform.log_tail())
}

async fn value(platform: &Platform, name: &str) -> Result<String> {
    let path = format!("/env/{name}");
    let answer = platform.visitor().get("keeper.localhost", &path).await?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.body)
}

fn set(platform: &Platform, name: &str, value: &str) -> Result<()> {
    let set = platform.run_with(&["secret", "set", "keeper", name], value.as_bytes())?;
    ensure!(set.code == 0, "{set:?}");
    ensure!(
        !set.out.contains(value) && !set.err.contains(value),
        "{set:?}"
    );
    Ok(())
}

/// Planted in clear in a file and in a process's arguments and environment, it is found.
fn the_search_finds_what_is_planted(platform: &Platform) -> Result<()> {
    let planted = platform.home().join("data/planted");
    std::fs::write(&planted, format!("before {CANARY} after"))?;
    let mut sleeper = Command::new("/bin/sleep");
    let mut sleeper = sleeper
        .arg0(format!("{} {CANARY}", platform.home().display()))
        .arg("600")
        .env("PLANTED", SECOND)
        .spawn()?;
    let found = sightings(platform);
    sleeper.kill()?;
    sleeper.wait()?;
    std::fs::remove_file(&planted)?;
    let found = found?;
    for place in ["data/planted", "cmdline", "environ"] {
        ensure!(
            found.iter().any(|found| found.ends_with(place)),
            "{place} is not in {found:?}"
        );
    }
    Ok(())
}

/// Every place of the platform that has a canary: files, logs, arguments and environments.
fn sightings(platform: &Platform) -> Result<Vec<String>> {
    let mut found = CANARIES.files(platform.home())?;
    let pids = platform.pids()?;
    let mut names = Vec::new();
    for pid in &pids {
        names.push(std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default());
    }
    // Daemon, gateway and VM at least: else the search looks at too little.
    ensure!(
        pids.len() >= 3 && names.iter().any(|name| name.starts_with(driver().vmm())),
        "only {names:?} run"
    );
    found.extend(CANARIES.processes(&pids));
    Ok(found)
}

fn watch_processes(platform: &Platform, done: &AtomicBool) -> Result<Vec<String>> {
    let mut found = Vec::new();
    while !done.load(Ordering::Acquire) {
        found.extend(CANARIES.processes(&platform.pids()?));
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(found)
}
