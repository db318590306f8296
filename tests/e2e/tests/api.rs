//! Who may use the API, and what it says of wakes.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::process::Command;

use anyhow::{Result, ensure};
use spore_e2e::app::{SELF_PORTRAIT, STAYS_AWAKE};
use spore_e2e::{Answer, Platform, available, platform, raw};

#[tokio::test(flavor = "multi_thread")]
async fn a_web_page_cannot_drive_the_api() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let own = platform.api_address().to_string();
    let port = platform.api_address().port();
    let token = format!("Authorization: Bearer {}", platform.token()?);

    // What an owner may do, under each of the API's own names.
    for host in [own.clone(), format!("localhost:{port}")] {
        let answer = call(&platform, "GET /api/v1/apps", &host, &[&token], "").await?;
        ensure!(answer.status == 200, "{answer:?}");
        let allowed = answer.header("access-control-allow-origin");
        ensure!(allowed.is_none(), "{answer:?}");
    }
    let open = call(&platform, "GET /healthz", &own, &[], "").await?;
    ensure!(open.status == 200, "{open:?}");

    // A name that an attacker lets point here (DNS rebinding), with whatever the page knows.
    let gateway = platform.visitor().gateway().port();
    for host in [
        "attacker.example".to_owned(),
        format!("attacker.example:{port}"),
        format!("localhost.attacker.example:{port}"),
        format!("127.0.0.1.attacker.example:{port}"),
        format!("app.localhost:{port}"),
        format!("localhost:{gateway}"),
        "127.0.0.1".to_owned(),
        String::new(),
    ] {
        for path in ["GET /api/v1/apps", "GET /healthz", "GET /metrics"] {
            let answer = call(&platform, path, &host, &[&token], "").await?;
            refused(&answer, 403, "forbidden", &host)?;
        }
    }
    // A page of another origin, even one of an app of this host.
    for origin in [
        "http://attacker.example".to_owned(),
        "https://attacker.example".to_owned(),
        format!("http://app.localhost:{gateway}"),
        format!("https://{own}"),
        "null".to_owned(),
    ] {
        let origin = format!("Origin: {origin}");
        let headers = [token.as_str(), &origin];
        let answer = call(&platform, "POST /api/v1/apps/a/stop", &own, &headers, "").await?;
        refused(&answer, 403, "forbidden", &origin)?;
        let asked = "Access-Control-Request-Method: POST";
        let headers = [origin.as_str(), asked];
        let before = call(&platform, "OPTIONS /api/v1/apps", &own, &headers, "").await?;
        refused(&before, 403, "forbidden", &origin)?;
        ensure!(before.header("access-control-allow-origin").is_none());
    }
    forms_and_strangers_are_refused(&platform).await?;
    only_admitted_users_reach_the_socket(&platform)?;
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_tell_of_a_wake_by_phase() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    platform.deploy("portrait", SELF_PORTRAIT, STAYS_AWAKE)?;
    platform.cli(&["stop", "portrait"])?;
    let count = |phase: &str| format!("spore_wake_seconds_count{{phase=\"{phase}\"}}");
    let before = platform.metric(&count("total")).await?;
    let answer = platform.visitor().get("portrait.localhost", "/").await?;
    ensure!(answer.status == 200, "{answer:?}");
    for phase in ["prepare", "boot", "agent", "thaw", "app", "total"] {
        let wakes = platform.metric(&count(phase)).await?;
        ensure!(
            wakes == before + 1,
            "{wakes} wakes with {phase}: {}",
            platform.metrics().await?
        );
    }
    let page = platform.metrics().await?;
    ensure!(page.contains("spore_apps{state=\"awake\"} 1"), "{page}");
    ensure!(
        !page.contains("portrait"),
        "names of apps are no labels: {page}"
    );
    ensure!(page.ends_with("# EOF\n"), "{page}");
    platform.end()
}

/// One call with these headers; an empty `host` sends none.
async fn call(
    platform: &Platform,
    line: &str,
    host: &str,
    headers: &[&str],
    body: &str,
) -> Result<Answer> {
    let mut request = format!("{line} HTTP/1.1\r\nConnection: close\r\n");
    if !host.is_empty() {
        request.push_str(&format!("Host: {host}\r\n"));
    }
    for header in headers {
        request.push_str(&format!("{header}\r\n"));
    }
    if line.starts_with("POST") {
        request.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    raw(platform.api_address(), &format!("{request}\r\n{body}")).await
}

fn refused(answer: &Answer, status: u16, code: &str, what: &str) -> Result<()> {
    ensure!(answer.status == status, "{what}: {answer:?}");
    let error: serde_json::Value = serde_json::from_str(&answer.body)?;
    ensure!(error["code"] == code, "{what}: {error}");
    ensure!(error["request_id"].is_string(), "{what}: {error}");
    Ok(())
}

async fn forms_and_strangers_are_refused(platform: &Platform) -> Result<()> {
    let own = platform.api_address().to_string();
    let token = format!("Authorization: Bearer {}", platform.token()?);
    // What a form can send without being asked first.
    for kind in [
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
    ] {
        let kind = format!("Content-Type: {kind}");
        for path in ["POST /api/v1/images/gc", "POST /api/v1/apps/a/stop"] {
            let answer = call(platform, path, &own, &[&token, &kind], "{}").await?;
            refused(&answer, 415, "unsupported_media_type", &kind)?;
        }
    }
    // Without a token, or with another one.
    let wrong = format!("Authorization: Bearer {}", "0".repeat(64));
    let basic = format!("Authorization: Basic {}", platform.token()?);
    for header in [
        "X-Nothing: 1",
        &wrong,
        &basic,
        "Authorization: Bearer",
        "Cookie: token=1",
    ] {
        for path in [
            "GET /api/v1/apps",
            "GET /metrics",
            "GET /version",
            "GET /nowhere",
        ] {
            let answer = call(platform, path, &own, &[header], "").await?;
            refused(&answer, 401, "unauthorized", header)?;
        }
    }
    Ok(())
}

/// The socket lets anybody connect and answers root only; the same command works for root.
fn only_admitted_users_reach_the_socket(platform: &Platform) -> Result<()> {
    let program = platform.home().join("bin/spore");
    let socket = format!("unix:{}", platform.home().join("run/api.sock").display());
    for (uid, admitted) in [(0, true), (65_534, false), (1000, false)] {
        let mut command = Command::new("setpriv");
        command.args([
            &format!("--reuid={uid}"),
            &format!("--regid={uid}"),
            "--clear-groups",
        ]);
        command.arg(&program).args(["--host", &socket, "ps"]);
        command.env("HOME", "/nonexistent");
        let run = platform::run(command, b"")?;
        ensure!((run.code == 0) == admitted, "as {uid}: {run:?}");
    }
    Ok(())
}
