//! Where an app gets to from inside its VM: what it was granted, and nowhere else.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use spore_e2e::app::STAYS_AWAKE;
use spore_e2e::{HostAddresses, Platform, available, until};

const PROBER: &str = include_str!("../apps/prober.py");

/// Of a net for documentation (RFC 5737): nobody's, so the host may have them for a while.
const GRANTED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 77);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 78);

/// A server of the host that greets everybody and counts them.
struct Greeter {
    address: SocketAddr,
    met: Arc<AtomicUsize>,
}

impl Greeter {
    fn listen(on: Ipv4Addr) -> Result<Self> {
        let listener = TcpListener::bind((on, 0)).with_context(|| format!("listen on {on}"))?;
        let address = listener.local_addr()?;
        let met = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&met);
        // Ends with the test's process.
        std::thread::spawn(move || {
            while let Ok((mut stream, _from)) = listener.accept() {
                counted.fetch_add(1, Ordering::SeqCst);
                // Whoever left without reading was counted all the same.
                drop(stream.write_all(b"welcome"));
            }
        });
        Ok(Self { address, met })
    }

    fn met(&self) -> usize {
        self.met.load(Ordering::SeqCst)
    }
}

/// What the host offers in a story, of which one thing is granted.
struct Town {
    granted: Greeter,
    other_port: Greeter,
    other_address: Greeter,
    everywhere: Greeter,
    _addresses: HostAddresses,
}

impl Town {
    fn open() -> Result<Self> {
        let addresses = HostAddresses::add(&[GRANTED, NEIGHBOUR])?;
        Ok(Self {
            granted: Greeter::listen(GRANTED)?,
            other_port: Greeter::listen(GRANTED)?,
            other_address: Greeter::listen(NEIGHBOUR)?,
            everywhere: Greeter::listen(Ipv4Addr::UNSPECIFIED)?,
            _addresses: addresses,
        })
    }

    /// Everything that no app may reach: servers that are there, on every address of the host, and
    /// the places that programs in clouds try first.
    fn forbidden(&self) -> Result<Vec<String>> {
        let everywhere = self.everywhere.address.port();
        let mut all = vec![
            self.other_port.address.to_string(),
            self.other_address.address.to_string(),
            format!("{GRANTED}:{everywhere}"),
            format!("127.0.0.1:{everywhere}"),
            format!("10.42.0.1:{everywhere}"),
            "10.42.0.1:3128".to_owned(),
            "169.254.169.254:80".to_owned(),
            "192.0.2.1:53".to_owned(),
        ];
        for address in own_addresses()? {
            all.push(format!("{address}:{everywhere}"));
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    fn ensure_only_the_granted_one_was_met(&self) -> Result<()> {
        for greeter in [&self.other_port, &self.other_address, &self.everywhere] {
            ensure!(
                greeter.met() == 0,
                "a VM got through to {}",
                greeter.address
            );
        }
        Ok(())
    }
}

/// The host's own addresses that a VM could name.
fn own_addresses() -> Result<Vec<IpAddr>> {
    let output = Command::new("hostname").arg("-I").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = text.split_whitespace().filter_map(|word| word.parse().ok());
    Ok(all.filter(IpAddr::is_ipv4).collect())
}

/// Seconds that a server which must answer has, and those after which silence is a no.
const PATIENT: &str = "60";
const HASTY: &str = "5";

/// What the app says of each place that it was sent to, and of some names.
async fn probe(
    platform: &Platform,
    app: &str,
    to: &[String],
    patience: &str,
) -> Result<BTreeMap<String, String>> {
    let mut query = vec![format!("patience={patience}")];
    query.extend(to.iter().map(|to| format!("to={to}")));
    query.extend(NAMES.iter().map(|name| format!("name={name}")));
    let host = format!("{app}.localhost");
    let path = format!("/?{}", query.join("&"));
    let answer = platform.visitor().get(&host, &path).await?;
    ensure!(answer.status == 200, "{answer:?}");
    serde_json::from_str(&answer.body).with_context(|| answer.body.clone())
}

const NAMES: [&str; 3] = [
    "example.org",
    "localhost.example.org",
    "metadata.google.internal",
];

/// One look at everything from inside an app with the grant.
async fn ensure_only_the_grant_works(platform: &Platform, town: &Town) -> Result<()> {
    let before = town.granted.met();
    let granted = town.granted.address.to_string();
    let mut to = town.forbidden()?;
    to.push(granted.clone());
    let mut found = probe(platform, "granted", &to, PATIENT).await?;
    ensure!(found.len() == to.len() + NAMES.len(), "{found:?}");
    let welcome = found.remove(&granted);
    ensure!(
        welcome.as_deref() == Some("answered welcome"),
        "{welcome:?} {found:?}"
    );
    ensure!(town.granted.met() == before + 1, "it was reached once");
    ensure_nothing_answered(&found)?;
    town.ensure_only_the_granted_one_was_met()
}

fn ensure_nothing_answered(found: &BTreeMap<String, String>) -> Result<()> {
    for (to, said) in found {
        ensure!(
            said.starts_with("failed") || said == "closed",
            "{to}: {said}"
        );
    }
    Ok(())
}

/// Egress proxies of this platform that run now.
fn proxies(platform: &Platform) -> Result<Vec<String>> {
    let all = platform.leftovers()?;
    let is_proxy = |line: &String| line.contains("/bin/spore egress --uid ");
    Ok(all.into_iter().filter(is_proxy).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_a_grant_reaches_that_address_and_nothing_else() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut platform = Platform::start().await?;
    let town = Town::open()?;
    let grant = format!(
        "[idle]\nafter = \"2h\"\n[egress]\nallow = [\"{}\"]\n",
        town.granted.address
    );
    platform.deploy("granted", PROBER, &grant)?;
    ensure_only_the_grant_works(&platform, &town)
        .await
        .context("after the deploy")?;
    let running = proxies(&platform)?;
    ensure!(
        running.len() == 1,
        "one proxy per VM with grants: {running:?}"
    );

    platform.kill_daemon()?;
    platform.start_daemon().await?;
    ensure_only_the_grant_works(&platform, &town)
        .await
        .context("after a kill")?;
    ensure!(proxies(&platform)? == running, "it is the same proxy");

    platform.cli(&["stop", "granted"])?;
    ensure!(proxies(&platform)?.is_empty(), "{:?}", proxies(&platform)?);

    platform.deploy("alone", PROBER, STAYS_AWAKE)?;
    let met = town.granted.met();
    let mut to = town.forbidden()?;
    to.push(town.granted.address.to_string());
    let found = probe(&platform, "alone", &to, HASTY).await?;
    ensure!(found.len() == to.len() + NAMES.len(), "{found:?}");
    ensure_nothing_answered(&found)?;
    ensure!(
        town.granted.met() == met,
        "an app without a grant got through"
    );
    town.ensure_only_the_granted_one_was_met()?;
    ensure!(proxies(&platform)?.is_empty(), "{:?}", proxies(&platform)?);
    platform.end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_ends_with_its_egress_proxy_and_the_next_one_has_its_own() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let platform = Platform::start().await?;
    let grant = format!("[idle]\nafter = \"2h\"\n[egress]\nallow = [\"{NEIGHBOUR}:9\"]\n");
    platform.deploy("granted", PROBER, &grant)?;
    platform.visitor().get("granted.localhost", "/").await?;
    let first = proxies(&platform)?;
    let pid = first.first().context("a proxy runs")?;
    let pid = pid
        .split_whitespace()
        .nth(1)
        .and_then(|pid| pid.parse().ok());
    let pid = pid
        .and_then(rustix::process::Pid::from_raw)
        .context("its pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    until(240, || Ok(platform.vm_processes()?.is_empty()))
        .await
        .context("the VM ends with it")?;

    let woken = platform.visitor().get("granted.localhost", "/").await?;
    ensure!(woken.status == 200, "{woken:?}");
    let second = proxies(&platform)?;
    ensure!(second.len() == 1 && second != first, "{first:?} {second:?}");
    platform.end()
}
