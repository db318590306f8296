//! An app whose visitors stay: the example, deployed as it is but for how soon it may sleep.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use spore_e2e::{Platform, available, until};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How soon the app may sleep in this story.
const IDLE: Duration = Duration::from_secs(3);

/// Longer than any wake in software emulation may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// The example's folder, where it sleeps sooner.
fn folder() -> Result<TempDir> {
    let example = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/websocket");
    let copy = tempfile::tempdir()?;
    std::fs::copy(example.join("app.py"), copy.path().join("app.py"))?;
    let manifest = std::fs::read_to_string(example.join("spore.toml"))?;
    let sooner = manifest.replace("30s", &format!("{}s", IDLE.as_secs()));
    ensure!(sooner != manifest, "the example says another idle time");
    std::fs::write(copy.path().join("spore.toml"), sooner)?;
    Ok(copy)
}

fn argument(folder: &Path) -> String {
    folder.display().to_string()
}

/// A WebSocket of a visitor, as much of RFC 6455 as an echo takes.
struct Socket(TcpStream);

impl Socket {
    async fn open(platform: &Platform) -> Result<Self> {
        let mut stream = TcpStream::connect(platform.visitor().gateway()).await?;
        let request = "GET / HTTP/1.1\r\nHost: websocket.localhost\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(PATIENCE, stream.read_u8())
                .await
                .context("no answer")?;
            head.push(byte.context("the gateway hung up")?);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 101 "), "{head}");
        // The key's answer as the RFC gives it (section 1.3).
        ensure!(head.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        Ok(Self(stream))
    }

    async fn echo(&mut self, text: &str) -> Result<()> {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![0x81, 0x80 | u8::try_from(text.len())?];
        frame.extend_from_slice(&mask);
        let masked = text
            .bytes()
            .enumerate()
            .map(|(at, byte)| byte ^ mask[at % 4]);
        frame.extend(masked);
        self.0.write_all(&frame).await?;
        let mut answer = vec![0; 2 + text.len()];
        let read = timeout(PATIENCE, self.0.read_exact(&mut answer)).await;
        read.context("no echo")?.context("the app hung up")?;
        let Some((head, said)) = answer.split_at_checked(2) else {
            bail!("a short frame");
        };
        ensure!(head == [0x81, u8::try_from(text.len())?], "{head:?}");
        ensure!(said == text.as_bytes(), "{}", String::from_utf8_lossy(said));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_websocket_wakes_its_app_and_keeps_it_awake() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let folder = folder()?;
    platform.cli(&["deploy", &argument(folder.path())])?;
    platform.cli(&["stop", "websocket"])?;
    ensure!(platform.vm_processes()?.is_empty(), "it sleeps");

    let mut socket = Socket::open(&platform).await.context("through a wake")?;
    socket.echo("good morning").await?;
    let awake = platform.vm_processes()?;
    ensure!(awake.len() == 1, "{awake:?}");

    // Silent for longer than it takes to be idle, and served by the same VM then.
    tokio::time::sleep(IDLE * 3).await;
    socket.echo("still there?").await?;
    ensure!(platform.vm_processes()? == awake, "the same VM answers");

    drop(socket);
    until(240, || Ok(platform.vm_processes()?.is_empty()))
        .await
        .context("reaped once nobody is connected")?;
    platform.end()
}
