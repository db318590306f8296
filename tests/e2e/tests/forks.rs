//! An app is checkpointed while it runs, forked, and its forks are used and thrown away.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use spore_e2e::app::STAYS_AWAKE;
use spore_e2e::{Platform, available, until};

/// Counts its visitors, in memory and on its disk.
const COUNTER: &str = r#"
import http.server, os

count = 0

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        with open("/tmp/count", "w") as file:
            file.write(str(count))
        body = str(count).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// Asks the app beside which it runs.
const ASK: &str = "import urllib.request as u; \
    print(u.urlopen('http://127.0.0.1:8000/', timeout=60).read().decode())";

#[tokio::test(flavor = "multi_thread")]
async fn an_app_is_checkpointed_and_its_forks_go_on_by_themselves() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("counter", COUNTER, STAYS_AWAKE)?;
    let visitor = platform.visitor();
    for expected in ["1", "2"] {
        let served = visitor.get("counter.localhost", "/").await?;
        ensure!(served.body == expected, "{served:?}");
    }
    let taken = platform.json(&["checkpoint", "counter", "--tag", "two"])?;
    let pause_ms = taken["pause_ms"].as_f64().context("a pause")?;
    ensure!(pause_ms > 0.0, "{taken}");
    ensure!(
        visitor.get("counter.localhost", "/").await?.body == "3",
        "the app goes on"
    );

    a_fork_that_is_cancelled_leaves_nothing(&platform).await?;
    let sandboxes = fork(&platform, "two", 3)?;
    each_goes_on_where_the_app_stood(&platform, &sandboxes)?;
    one_is_rolled_back(&platform, &sandboxes)?;
    ensure!(
        visitor.get("counter.localhost", "/").await?.body == "4",
        "nobody else visited it"
    );

    // What continues the checkpoint, and what needs it, holds it.
    platform.json(&["checkpoint", &sandboxes[1], "--tag", "deeper"])?;
    let deeper = platform.json(&["snapshot", "info", "deeper"])?;
    ensure!(deeper["parent"] == taken["snapshot"]["id"], "{deeper}");
    let held = platform.run(&["snapshot", "rm", "two"])?;
    held.ensure_refused("sandboxes")?;
    let grandchild = fork(&platform, "deeper", 1)?.remove(0);
    ensure!(
        ask(&platform, &grandchild)? == "4",
        "it stands where its sandbox stood"
    );

    let mut rm = vec!["sandbox", "rm", grandchild.as_str()];
    rm.extend(sandboxes.iter().map(String::as_str));
    platform.cli(&rm)?;
    ensure!(platform.json(&["sandbox", "ls"])?["items"] == serde_json::json!([]));
    let gone = platform.run(&["sandbox", "exec", &sandboxes[0], "--", "true"])?;
    gone.ensure_refused("spore sandbox ls")?;
    let continued = platform.run(&["snapshot", "rm", "two"])?;
    continued.ensure_refused("--cascade")?;
    platform.cli(&["snapshot", "compact", "deeper"])?;
    platform.cli(&["snapshot", "rm", "two"])?;
    platform.cli(&["snapshot", "rm", "deeper"])?;
    let left = platform.json(&["snapshot", "ls"])?;
    let of_counter = |item: &&serde_json::Value| item["account"] == "me";
    let items = left["items"].as_array().context("a list")?;
    ensure!(items.iter().find(of_counter).is_none(), "{left}");
    platform.cli(&["rm", "counter", "--yes"])?;
    ensure!(platform.vm_pids()?.is_empty(), "a VM is left");
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_snapshot_that_an_installation_begins_with_outlives_its_app() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let example = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/python3");
    platform.cli(&["deploy", &example.display().to_string()])?;
    platform.cli(&["checkpoint", "python3-warm", "--tag", "python3"])?;
    platform.cli(&["rm", "python3-warm", "--yes"])?;
    let sandboxes = fork(&platform, "python3", 3)?;
    let mut drawn = BTreeSet::new();
    for sandbox in &sandboxes {
        let draw = "import uuid; print(uuid.uuid4())";
        drawn.insert(exec(&platform, sandbox, &["python3", "-c", draw])?);
    }
    ensure!(drawn.len() == 3, "{drawn:?}");
    let mut rm = vec!["sandbox", "rm"];
    rm.extend(sandboxes.iter().map(String::as_str));
    platform.cli(&rm)?;
    platform.cli(&["snapshot", "rm", "python3"])?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_outlive_the_daemon() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    platform.deploy("counter", COUNTER, STAYS_AWAKE)?;
    // The running app itself is forked: the checkpoint of it has no name.
    let sandboxes = fork(&platform, "counter", 2)?;
    ensure!(ask(&platform, &sandboxes[0])? == "1");
    platform.kill_daemon()?;
    platform.start_daemon().await?;
    ensure!(ask(&platform, &sandboxes[0])? == "2", "it went on");
    platform.cli(&["sandbox", "rollback", &sandboxes[0]])?;
    ensure!(ask(&platform, &sandboxes[0])? == "1", "it is back");
    a_rollback_that_is_cut_off_happened_or_did_not(&mut platform, &sandboxes[0]).await?;
    platform.cli(&["sandbox", "rm", &sandboxes[0], &sandboxes[1]])?;
    let left = platform.json(&["snapshot", "ls"])?;
    let of_me = |item: &serde_json::Value| item["account"] == "me";
    let items = left["items"].as_array().context("a list")?;
    ensure!(
        !items.iter().any(of_me),
        "what was taken for it went too: {left}"
    );
    platform.end()
}

/// The daemon dies while the new VM is there beside the old one: the next one has one of the two
/// under the sandbox's id, and nothing of the other.
async fn a_rollback_that_is_cut_off_happened_or_did_not(
    platform: &mut Platform,
    sandbox: &str,
) -> Result<()> {
    let before = platform.vm_pids()?.len();
    let mut rolling = platform.command("sandbox");
    let mut rolling = rolling
        .args(["rollback", sandbox])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let begun = until(120, || {
        Ok(platform.vm_pids()?.len() > before || rolling.try_wait()?.is_some())
    })
    .await;
    platform.kill_daemon()?;
    rolling.wait()?;
    begun?;
    platform.start_daemon().await?;
    until(240, || Ok(ask(platform, sandbox).is_ok())).await?;
    // It was asked once since, where it was or where it is back.
    let told = ask(platform, sandbox)?;
    ensure!(["2", "3"].contains(&told.as_str()), "it counts {told}");
    until(120, || Ok(platform.vm_pids()?.len() == before)).await
}

/// Whoever asked for it is killed as soon as there is a VM of it.
async fn a_fork_that_is_cancelled_leaves_nothing(platform: &Platform) -> Result<()> {
    let before = platform.vm_pids()?.len();
    let mut asking = platform.command("fork");
    let mut asking = asking
        .args(["two", "-n", "6"])
        .stdout(Stdio::null())
        .spawn()?;
    let begun = until(120, || Ok(platform.vm_pids()?.len() > before)).await;
    asking.kill()?;
    let ended = asking.wait()?;
    begun?;
    ensure!(
        !ended.success(),
        "the fork was over before anybody could leave"
    );
    until(120, || {
        let left = platform.json(&["sandbox", "ls"])?;
        Ok(left["items"] == serde_json::json!([]) && platform.vm_pids()?.len() == before)
    })
    .await
}

fn fork(platform: &Platform, from: &str, count: usize) -> Result<Vec<String>> {
    let forks = platform.json(&["fork", from, "-n", &count.to_string()])?;
    let forks = forks.as_array().context("an array")?;
    let id = |fork: &serde_json::Value| {
        ensure!(fork.get("error").is_none(), "{fork}");
        Ok(fork["id"].as_str().context("an id")?.to_owned())
    };
    let ids = forks.iter().map(id).collect::<Result<Vec<_>>>()?;
    ensure!(ids.len() == count, "{ids:?}");
    Ok(ids)
}

fn exec(platform: &Platform, sandbox: &str, program: &[&str]) -> Result<String> {
    let out = platform.cli(&[&["sandbox", "exec", sandbox, "--"], program].concat())?;
    Ok(out.trim().to_owned())
}

fn ask(platform: &Platform, sandbox: &str) -> Result<String> {
    exec(platform, sandbox, &["python3", "-c", ASK])
}

fn each_goes_on_where_the_app_stood(platform: &Platform, sandboxes: &[String]) -> Result<()> {
    let mut machines = BTreeSet::new();
    for sandbox in sandboxes {
        ensure!(
            ask(platform, sandbox)? == "3",
            "its memory is the app's, and its own"
        );
        let file = exec(platform, sandbox, &["cat", "/tmp/count"])?;
        ensure!(file == "3", "so is its disk: {file}");
        machines.insert(exec(platform, sandbox, &["cat", "/etc/machine-id"])?);
    }
    ensure!(
        machines.len() == sandboxes.len(),
        "each is a machine of its own"
    );
    let listed = platform.json(&["sandbox", "ls"])?;
    let open = listed["items"].as_array().context("a list")?;
    ensure!(open.len() == sandboxes.len() && open.iter().all(|one| one["state"] == "open"));
    Ok(())
}

fn one_is_rolled_back(platform: &Platform, sandboxes: &[String]) -> Result<()> {
    let back = platform.json(&["sandbox", "rollback", &sandboxes[0]])?;
    ensure!(back["id"] == sandboxes[0].as_str(), "{back}");
    ensure!(
        ask(platform, &sandboxes[0])? == "3",
        "what it did since is undone"
    );
    Ok(())
}
