//! Where an app with a name in its grants gets to: the whole platform in a network of the story's
//! own, with a resolver and servers that nobody else has.
#![expect(clippy::tests_outside_test_module, reason = "this is a test crate")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use spore_e2e::app::STAYS_AWAKE;
use spore_e2e::{Namespace, Platform, Site, available};
use tokio::runtime::Handle;

const PROBER: &str = include_str!("../apps/prober.py");

/// Public addresses, in the story's own network only.
const GRANTED: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
const OTHER: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
/// The daemon's own address there, which is private besides.
const HOME: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

const PORT: u16 = 5432;
const OTHER_PORT: u16 = 5433;

/// What the story's resolver knows.
const ZONE: [(&str, Ipv4Addr); 3] = [
    ("granted.example.com", GRANTED),
    ("inward.example.com", HOME),
    ("other.example.com", OTHER),
];

/// The daemon's network, and the outside beyond it.
struct World {
    home: Arc<Namespace>,
    _outside: Namespace,
    resolver: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    /// Connections that each server outside took.
    met: BTreeMap<SocketAddr, Arc<AtomicUsize>>,
}

impl World {
    fn make() -> Result<Self> {
        let home = Namespace::make()?;
        let outside = Namespace::make()?;
        home.join(&format!("{HOME}/24"), &outside, "10.77.0.2/24")?;
        home.ip("route add default via 10.77.0.2")?;
        let mut met = BTreeMap::new();
        for address in [GRANTED, OTHER] {
            outside.ip(&format!("address add {address}/32 dev lo"))?;
            for port in [PORT, OTHER_PORT] {
                let at = SocketAddr::from((address, port));
                met.insert(at, outside.enter(|| greet(at))??);
            }
        }
        for port in [PORT, OTHER_PORT] {
            let at = SocketAddr::from((HOME, port));
            met.insert(at, home.enter(|| greet(at))??);
        }
        let asked = Arc::default();
        let resolver = home.enter(|| resolve(Arc::clone(&asked)))??;
        Ok(Self {
            home: Arc::new(home),
            _outside: outside,
            resolver,
            asked,
            met,
        })
    }

    fn asked(&self) -> Vec<String> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *asked)
    }

    fn met(&self) -> Vec<SocketAddr> {
        let met = self
            .met
            .iter()
            .filter(|(_at, count)| count.swap(0, Ordering::SeqCst) > 0);
        met.map(|(at, _count)| *at).collect()
    }

    /// What the app says of each place that it was sent to.
    fn probe(&self, platform: &Platform, to: &[String]) -> Result<BTreeMap<String, String>> {
        let query: Vec<_> = to.iter().map(|to| format!("to={to}")).collect();
        let path = format!("/?patience=60&{}", query.join("&"));
        let visitor = platform.visitor();
        let handle = Handle::current();
        let asked = || handle.block_on(visitor.get("prober.localhost", &path));
        // The gateway is in that network too.
        let answer = tokio::task::block_in_place(|| self.home.enter(asked))??;
        ensure!(answer.status == 200, "{answer:?}");
        serde_json::from_str(&answer.body).with_context(|| answer.body.clone())
    }
}

/// A server that greets everybody and counts them. It ends with the test's process.
fn greet(at: SocketAddr) -> Result<Arc<AtomicUsize>> {
    let listener = TcpListener::bind(at).with_context(|| format!("listen on {at}"))?;
    let met = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&met);
    std::thread::spawn(move || {
        while let Ok((mut stream, _from)) = listener.accept() {
            counted.fetch_add(1, Ordering::SeqCst);
            // Whoever left without reading was counted all the same.
            drop(stream.write_all(format!("welcome to {at}").as_bytes()));
        }
    });
    Ok(met)
}

/// A resolver of [`ZONE`] that remembers what it was asked. It ends with the test's process.
fn resolve(asked: Arc<Mutex<Vec<String>>>) -> Result<SocketAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = socket.local_addr()?;
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let Some((name, answer)) = query.get(..length).and_then(answer) else {
                continue;
            };
            asked
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(name);
            // A proxy that is gone needs no answer.
            drop(socket.send_to(&answer, from));
        }
    });
    Ok(at)
}

/// The name that a query of one question asks for, and the answer to it (RFC 1035, 4.1).
fn answer(query: &[u8]) -> Option<(String, Vec<u8>)> {
    let mut labels = Vec::new();
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        let label = query.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
    let name = labels.join(".");
    let question = query.get(12..at + 4)?;
    let known = ZONE.iter().find(|(known, _address)| *known == name);
    // A response, recursion wanted and there; the last bits are the code.
    let code = if known.is_some() { 0 } else { 3 };
    let mut answer = query.get(..2)?.to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, u8::from(known.is_some())]);
    answer.extend([0, 0, 0, 0]);
    answer.extend(question);
    if let Some((_name, address)) = known {
        // The question's name, type A, class IN, a minute, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some((name, answer))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_a_name_granted_reaches_what_it_leads_to_and_nothing_else() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let world = World::make()?;
    let site = Site {
        config: format!("resolvers = [\"{}\"]\n", world.resolver),
        network: Some(Arc::clone(&world.home)),
        ..Site::default()
    };
    let platform = Platform::start_at(site).await?;
    let grants = format!("\"granted.example.com:{PORT}\", \"inward.example.com:{PORT}\"");
    let manifest = format!("{STAYS_AWAKE}[egress]\nallow = [{grants}]\n");
    platform.deploy("prober", PROBER, &manifest)?;

    // The address that the name leads to is not granted by itself.
    let by_address = format!("{GRANTED}:{PORT}");
    let found = world.probe(&platform, std::slice::from_ref(&by_address))?;
    ensure!(found[&by_address].starts_with("failed"), "{found:?}");
    ensure!(world.met().is_empty(), "it was reached without its name");
    ensure!(world.asked().is_empty(), "nobody asked for a name");

    let granted = format!("granted.example.com:{PORT}");
    let refused = [
        format!("granted.example.com:{OTHER_PORT}"),
        format!("inward.example.com:{PORT}"),
        format!("other.example.com:{PORT}"),
        format!("secret-in-a-name.granted.example.com:{PORT}"),
        format!("example.com:{PORT}"),
        format!("{OTHER}:{PORT}"),
        format!("{HOME}:{PORT}"),
        format!("{}:{}", world.resolver.ip(), world.resolver.port()),
    ];
    let mut to = refused.to_vec();
    to.push(granted.clone());
    let found = world.probe(&platform, &to)?;
    let welcome = format!("answered welcome to {GRANTED}:{PORT}");
    ensure!(found[&granted] == welcome, "{found:?}");
    for to in &refused {
        let said = &found[to];
        ensure!(
            said.starts_with("failed") || said == "closed",
            "{to}: {said}"
        );
    }
    ensure!(world.met() == [SocketAddr::from((GRANTED, PORT))]);
    let mut asked = world.asked();
    asked.sort();
    asked.dedup();
    ensure!(
        asked == ["granted.example.com", "inward.example.com"],
        "names left the VM: {asked:?}"
    );
    platform.end()
}
