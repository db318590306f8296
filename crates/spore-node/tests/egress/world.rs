//! The three namespaces, the servers outside and the proxy between them.
//!
//! Used by every test of this program. Everything ends with the test process: namespaces have no
//! name and live as long as somebody holds them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::sched::CloneFlags;
use spore_node::egress::launch::{EgressLauncher, Launch};
use spore_wire::egress::{EgressBlob, Grant, GrantTarget, PROXY_PORT};
use spore_wire::generation::GENERATION;
use spore_wire::id::VmId;
use tempfile::TempDir;

/// Public addresses that belong to the test.
pub(crate) const FIRST: Ipv4Addr = Ipv4Addr::new(8, 8, 4, 4);
pub(crate) const SECOND: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
/// A public address that is the host's own.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(1, 2, 3, 4);
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 5);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Ports on which every address answers.
pub(crate) const PORTS: [u16; 3] = [80, 443, 5432];
/// A port whose server takes connections and never reads.
pub(crate) const SINK_PORT: u16 = 9000;

/// The uid of the proxy in tests.
pub(crate) const UID: u32 = 265_001;

const TAP_HOST: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);

const REDIRECT: &str = r#"
table ip spore {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        iifname "tap0" meta l4proto tcp redirect to :3128
        iifname "tap0" udp dport 53 redirect to :53
    }
    chain input {
        type filter hook input priority filter; policy drop;
        iifname "tap0" tcp dport 3128 accept
        iifname "tap0" udp dport 53 accept
    }
}
"#;

/// Whether the tests can run; says so if not.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: making network namespaces needs root");
    }
    root
}

/// A network namespace without a name.
#[derive(Debug)]
pub(crate) struct Namespace(File);

impl Namespace {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Runs `inside` on a thread of its own in this namespace.
    pub(crate) fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let ran = std::thread::scope(|scope| {
            let inside = || {
                nix::sched::setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                inside()
            };
            scope.spawn(inside).join()
        });
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    fn ip(&self, arguments: &str) {
        let status = self.enter(|| Command::new("ip").args(arguments.split(' ')).status());
        assert!(status.unwrap().success(), "ip {arguments}");
    }
}

/// What the names outside lead to, and what was asked about them.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    pub(crate) names: Vec<(&'static str, Vec<Ipv4Addr>, u32)>,
    pub(crate) asked: Vec<String>,
}

/// Everything around one proxy.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) guest: Namespace,
    pub(crate) vm: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) zone: Arc<Mutex<Zone>>,
    /// Connections that the servers outside took.
    pub(crate) taken: Arc<AtomicUsize>,
    pub(crate) folder: TempDir,
    pub(crate) proxy: Option<Child>,
}

pub(crate) fn by_name(name: &str, port: u16) -> Grant {
    Grant {
        to: GrantTarget::Name {
            name: name.to_owned(),
        },
        port,
    }
}

pub(crate) fn by_address(address: Ipv4Addr, port: u16) -> Grant {
    Grant {
        to: GrantTarget::Address { address },
        port,
    }
}

pub(crate) fn blob(grants: Vec<Grant>, connections_max: u32) -> EgressBlob {
    EgressBlob {
        generation: GENERATION,
        vm: VmId::from_bytes([9; 16]),
        grants,
        resolvers: vec!["127.0.0.1:53".parse().unwrap()],
        host_addresses: vec![IpAddr::V4(HOST)],
        connections_max,
    }
}

impl World {
    /// A world with a proxy that has `grants`, where `names` resolve.
    pub(crate) fn new(
        grants: Vec<Grant>,
        connections_max: u32,
        names: &[(&'static str, &[Ipv4Addr])],
    ) -> Self {
        let mut world = Self::without_proxy(names);
        let (tcp, dns) = world.sockets();
        let blob = blob(grants, connections_max);
        let log = world.log();
        let launched = world.outside.enter(|| {
            let launch = Launch {
                uid: UID,
                blob: &blob,
                tcp: tcp.into(),
                dns: dns.into(),
                log,
            };
            EgressLauncher::new(env!("CARGO_BIN_EXE_egress-proxy"), [""; 0])
                .launch(launch, |_pid| Ok(()))
        });
        world.proxy = Some(launched.unwrap_or_else(|error| panic!("{error}: {}", world.said())));
        world.redirect();
        world
    }

    pub(crate) fn without_proxy(names: &[(&'static str, &[Ipv4Addr])]) -> Self {
        let (guest, vm, outside) = (Namespace::new(), Namespace::new(), Namespace::new());
        vm.ip(&format!(
            "link add tap0 type veth peer name eth0 netns {}",
            guest.path()
        ));
        vm.ip("addr add 10.42.0.1/30 dev tap0");
        vm.ip("link set tap0 up");
        guest.ip("link set lo up");
        guest.ip("addr add 10.42.0.2/30 dev eth0");
        guest.ip("link set eth0 up");
        guest.ip("route add default via 10.42.0.1");
        outside.ip("link set lo up");
        for address in [FIRST, SECOND, HOST, PRIVATE, METADATA] {
            outside.ip(&format!("addr add {address}/32 dev lo"));
        }
        let names = names
            .iter()
            .map(|(name, to)| (*name, to.to_vec(), 60))
            .collect();
        let world = Self {
            guest,
            vm,
            outside,
            zone: Arc::new(Mutex::new(Zone {
                names,
                asked: Vec::new(),
            })),
            taken: Arc::default(),
            folder: tempfile::tempdir().unwrap(),
            proxy: None,
        };
        world.serve_outside();
        world
    }

    /// The two sockets that a proxy inherits, made inside the VM's namespace.
    pub(crate) fn sockets(&self) -> (TcpListener, UdpSocket) {
        self.vm.enter(|| {
            let tcp = TcpListener::bind((TAP_HOST, PROXY_PORT)).unwrap();
            (tcp, UdpSocket::bind((TAP_HOST, 53)).unwrap())
        })
    }

    /// Turns the guest's traffic to the sockets.
    pub(crate) fn redirect(&self) {
        self.vm.enter(|| {
            let mut nft = Command::new("nft")
                .args(["-f", "-"])
                .stdin(Stdio::piped())
                .spawn();
            let nft = nft.as_mut().unwrap();
            nft.stdin
                .take()
                .unwrap()
                .write_all(REDIRECT.as_bytes())
                .unwrap();
            assert!(nft.wait().unwrap().success());
        });
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.folder.path().join("egress.log")
    }

    fn log(&self) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap()
    }

    /// What the proxy wrote.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Connections that reached a server outside.
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.proxy.as_ref().unwrap().id()
    }

    fn serve_outside(&self) {
        for port in PORTS {
            let listener = self
                .outside
                .enter(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
            let taken = Arc::clone(&self.taken);
            std::thread::spawn(move || {
                for connection in listener.incoming() {
                    taken.fetch_add(1, Ordering::SeqCst);
                    std::thread::spawn(move || answer(connection.unwrap()));
                }
            });
        }
        let sink = self
            .outside
            .enter(|| TcpListener::bind(("0.0.0.0", SINK_PORT)).unwrap());
        let taken = Arc::clone(&self.taken);
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for connection in sink.incoming() {
                taken.fetch_add(1, Ordering::SeqCst);
                held.push(connection);
            }
        });
        let dns = self
            .outside
            .enter(|| UdpSocket::bind("127.0.0.1:53").unwrap());
        let zone = Arc::clone(&self.zone);
        std::thread::spawn(move || resolve(&dns, &zone));
    }

    /// A connection of the guest.
    pub(crate) fn connect(&self, to: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
        let to = SocketAddr::V4(SocketAddrV4::new(to, port));
        let stream = self
            .guest
            .enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(30)))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(stream)
    }

    /// Says `words` to a server outside and returns its answer.
    pub(crate) fn say(&self, to: Ipv4Addr, port: u16, words: &str) -> io::Result<String> {
        let mut stream = self.connect(to, port)?;
        stream.write_all(words.as_bytes())?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Whether the guest is turned away, and nobody outside was dialled.
    pub(crate) fn is_refused(&self, to: Ipv4Addr, port: u16) -> bool {
        let before = self.taken();
        let said = self.say(to, port, "hello\n");
        let is_reset = said.is_err_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::NotConnected
                    | io::ErrorKind::BrokenPipe
            )
        });
        is_reset && self.taken() == before
    }

    /// The answer to a question of the guest, sent to an address that is not the proxy's.
    pub(crate) fn ask(&self, name: &str, kind: RecordType) -> Message {
        let mut question = Message::new(77, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let packet = self.ask_raw(&question.to_vec().unwrap());
        Message::from_vec(&packet.unwrap()).unwrap()
    }

    /// Asks as a guest's resolver does: again, when a packet got lost.
    fn ask_raw(&self, packet: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.guest.enter(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        self.guest.enter(|| socket.connect("8.8.8.8:53"))?;
        let mut answer = vec![0; 2048];
        for _try in 0..10 {
            socket.send(packet)?;
            if let Ok(length) = socket.recv(&mut answer) {
                answer.truncate(length);
                return Ok(answer);
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// The addresses that the guest is told for a name.
    pub(crate) fn addresses(&self, name: &str) -> Vec<Ipv4Addr> {
        let told = self.ask(name, RecordType::A).answers;
        let address = |record: Record| match record.data {
            RData::A(A(address)) => Some(address),
            _ => None,
        };
        told.into_iter().filter_map(address).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut proxy) = self.proxy.take() {
            proxy.kill().unwrap();
            proxy.wait().unwrap();
        }
    }
}

/// Reads to the end, then says which address was reached and repeats what was heard.
fn answer(mut connection: TcpStream) {
    let here = connection.local_addr().unwrap();
    let mut heard = Vec::new();
    if connection.read_to_end(&mut heard).is_ok() {
        let answer = [format!("{here} ").as_bytes(), &heard].concat();
        let _gone = connection.write_all(&answer);
    }
}

fn resolve(socket: &UdpSocket, zone: &Mutex<Zone>) {
    let mut packet = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut packet).unwrap();
        let question = Message::from_vec(&packet[..length]).unwrap();
        let query = question.queries[0].clone();
        let mut answer = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
        let name = query.name().to_ascii();
        let mut zone = zone.lock().unwrap();
        let found = zone
            .names
            .iter()
            .find(|(known, ..)| *known == name.trim_end_matches('.'));
        match found {
            Some((_name, addresses, ttl)) => {
                for address in addresses {
                    let data = RData::A(A(*address));
                    answer.add_answer(Record::from_rdata(query.name().clone(), *ttl, data));
                }
            }
            None => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        zone.asked.push(name);
        answer.add_query(query);
        socket.send_to(&answer.to_vec().unwrap(), from).unwrap();
    }
}
