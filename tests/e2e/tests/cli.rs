//! The command line against a running platform: what each verb says, and with `--json`.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::platform::{self, Driver, driver};
use spore_e2e::{AppFolder, Platform, available, until};

const BROKEN: &str = "print('these are my last words', flush=True)\nraise SystemExit(7)\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_app_is_deployed_looked_at_put_to_sleep_and_removed() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let folder = AppFolder::python("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    let deployed = platform.run(&["deploy", &folder.argument()])?;
    ensure!(deployed.code == 0, "{deployed:?}");
    let url = deployed.out.trim().to_owned();
    ensure!(
        url.starts_with("http://portrait.localhost:"),
        "{deployed:?}"
    );

    let listed = platform.cli(&["ps"])?;
    ensure!(
        listed.contains("portrait") && listed.contains("awake"),
        "{listed}"
    );
    let status = platform.cli(&["status"])?;
    let text = match driver() {
        Driver::Qemu => "none (qemu-tcg)",
        Driver::Kvm => "kvm",
    };
    ensure!(status.contains(text), "{status}");
    let status = platform.cli(&["status", "portrait"])?;
    ensure!(
        status.contains("boundary") && status.contains(driver().boundary()),
        "{status}"
    );
    ensure!(status.contains("live") && status.contains(&url), "{status}");
    ensure!(platform.cli(&["open", "portrait"])?.contains(&url));
    let images = platform.cli(&["image", "ls"])?;
    ensure!(images.contains("debian/python3"), "{images}");
    let unused = platform.json(&["image", "gc", "--dry-run"])?;
    ensure!(unused["dry_run"] == true, "{unused}");
    logs_are_followed_until_the_reader_goes(&platform).await?;

    platform.cli(&["stop", "portrait"])?;
    ensure!(platform.vm_pids()?.is_empty());
    ensure!(platform.json(&["status", "portrait"])?["state"] == "asleep");
    platform.cli(&["disable", "portrait"])?;
    let visitor = platform.visitor();
    let page = visitor.get("portrait.localhost", "/").await?;
    ensure!(
        page.status == 503 && page.body.contains("app_disabled"),
        "{page:?}"
    );
    ensure!(
        platform.vm_pids()?.is_empty(),
        "a disabled app is not woken"
    );
    let refused = platform.run(&["exec", "portrait", "--", "true"])?;
    refused.ensure_refused("spore enable")?;
    platform.cli(&["enable", "portrait"])?;
    ensure!(visitor.get("portrait.localhost", "/").await?.status == 200);

    let kept = platform.run(&["rm", "portrait"])?;
    ensure!(kept.code == 2 && kept.err.contains("--yes"), "{kept:?}");
    platform.cli(&["rm", "portrait", "--yes"])?;
    ensure!(visitor.get("portrait.localhost", "/").await?.status == 404);
    let gone = platform.run(&["status", "--json", "portrait"])?;
    let error: serde_json::Value = serde_json::from_str(&gone.err)?;
    ensure!(gone.code == 1 && error["code"] == "not_found", "{gone:?}");
    platform.cli(&["image", "gc"])?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_release_leaves_the_old_one_serving_and_an_old_one_comes_back() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let folder = AppFolder::python("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    let code = folder.path().join("app.py");
    for body in ["first", "second"] {
        let answer = format!("body = \"{body}\"");
        std::fs::write(
            &code,
            SELF_PORTRAIT.replace("body = json.dumps(", &format!("{answer} #")),
        )?;
        platform.json(&["deploy", &folder.argument()])?;
        let served = platform.visitor().get("portrait.localhost", "/").await?;
        ensure!(served.body == body, "{served:?}");
    }
    std::fs::write(&code, BROKEN)?;
    let failed = platform.run(&["deploy", &folder.argument()])?;
    ensure!(failed.code == 3, "the app is to blame: {failed:?}");
    ensure!(failed.err.contains("these are my last words"), "{failed:?}");
    ensure!(failed.err.contains("exit code 7"), "{failed:?}");
    let served = platform.visitor().get("portrait.localhost", "/").await?;
    ensure!(served.body == "second", "{served:?}");
    let status = platform.cli(&["status", "portrait"])?;
    ensure!(
        status.contains("failed") && status.contains("retired"),
        "{status}"
    );

    platform.json(&["rollback", "portrait"])?;
    let served = platform.visitor().get("portrait.localhost", "/").await?;
    ensure!(served.body == "first", "{served:?}");
    platform.cli(&["rollback", "portrait", "--to", "2"])?;
    let served = platform.visitor().get("portrait.localhost", "/").await?;
    ensure!(served.body == "second", "{served:?}");
    let refused = platform.run(&["rollback", "portrait", "--to", "9"])?;
    refused.ensure_refused("9")?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_and_files_go_into_an_app_and_come_out() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let folder = platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    platform.cli(&["stop", "portrait"])?;
    // It sleeps, so this wakes it.
    let script = "cat; echo aside >&2; exit 42";
    let run = platform.run_with(&["exec", "portrait", "--", "sh", "-c", script], b"typed")?;
    ensure!(
        run.code == 42 && run.out == "typed" && run.err.contains("aside"),
        "{run:?}"
    );
    let run = platform.run(&["exec", "portrait", "--", "sh", "-c", "kill -9 $$"])?;
    ensure!(run.code == 137, "{run:?}");
    let run = platform.run(&["exec", "portrait", "--timeout", "1s", "--", "sleep", "60"])?;
    ensure!(run.code == 124, "{run:?}");
    let arguments = [
        "exec", "portrait", "-e", "A=b c", "-w", "/tmp", "--", "sh", "-c",
    ];
    let run = platform.run(&[&arguments[..], &["echo $A; pwd; id -u; tty"]].concat())?;
    ensure!(run.out == "b c\n/tmp\n1000\nnot a tty\n", "{run:?}");
    let run = platform.run(&["exec", "portrait", "--", "no-such-program"])?;
    run.ensure_refused("no-such-program")?;

    let spore = format!(
        "stty rows 30 cols 100; SPORE_HOST=unix:{home}/run/api.sock {home}/bin/spore exec portrait \
         -- sh -c 'tty; stty size; exit 5'",
        home = platform.home().display()
    );
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &spore, "/dev/null"]);
    let run = platform::run(terminal, b"")?;
    ensure!(run.code == 5, "{run:?}");
    ensure!(
        run.out.contains("/dev/pts/") && run.out.contains("30 100"),
        "{run:?}"
    );

    let bytes: Vec<u8> = (0_u32..)
        .flat_map(u32::to_le_bytes)
        .take(3_000_000)
        .collect();
    let (here, back) = (
        folder.path().join("here.bin"),
        folder.path().join("back.bin"),
    );
    std::fs::write(&here, &bytes)?;
    platform.cli(&["cp", &here.display().to_string(), "portrait:/tmp/there.bin"])?;
    platform.cli(&["cp", "portrait:/tmp/there.bin", &back.display().to_string()])?;
    ensure!(std::fs::read(&back)? == bytes, "the copy is another");
    let run = platform.run(&["cp", "portrait:/nowhere", "-"])?;
    run.ensure_refused("/nowhere")?;
    platform.end()
}

async fn logs_are_followed_until_the_reader_goes(platform: &Platform) -> Result<()> {
    let file = platform.home().join("followed");
    let mut command = platform.command("logs");
    command.args(["-f", "portrait"]).stdin(Stdio::null());
    let mut follower = command.stdout(std::fs::File::create(&file)?).spawn()?;
    let seen = |path: &str| Ok(std::fs::read_to_string(&file)?.contains(path));
    for path in ["/one", "/two"] {
        platform.visitor().get("portrait.localhost", path).await?;
        until(120, || seen(path))
            .await
            .with_context(|| format!("{path} is followed"))?;
    }
    follower.kill()?;
    follower.wait()?;
    let logs = platform.cli(&["logs", "portrait", "-n", "1"])?;
    ensure!(logs.lines().count() == 1 && logs.contains("/two"), "{logs}");
    let logs = platform.cli(&["logs", "--json", "portrait"])?;
    for line in logs.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        ensure!(line["text"].is_string(), "{line}");
    }
    Ok(())
}
