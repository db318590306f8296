//! What the environment and the configuration file say: read here and nowhere else.
//!
//! `main.rs` reads the environment once and hands plain values on. The daemon's verbs read
//! `/etc/spore/spore.toml` through [`ServerConfig`]. An app's own `spore.toml` is not
//! configuration: `manifest.rs` reads it.

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use spore_api::client::{Endpoint, EndpointError};
use spore_node::egress::blob::RESOLVERS_MAX;
use spore_node::hypervisor::KernelArguments;
use spore_wire::launch::Rates;
use thiserror::Error;

use crate::document::{Document, DocumentError, Entry, Table};
use crate::log::{self, LogConfig};
use crate::server::HypervisorChoice;

/// Where the daemon's configuration is.
pub(crate) const SERVER_FILE: &str = "/etc/spore/spore.toml";
/// There while systemd is the host's first process.
pub(crate) const SYSTEMD: &str = "/run/systemd/system";
/// The cgroup that systemd leaves to us (`packaging/spore-vms.service`); elsewhere it would be its
/// to change at any time.
const UNIT_CGROUP: &str = "spore.slice/spore-vms.service";
/// Where the daemon's socket is when nobody says otherwise.
const SOCKET: &str = "/run/spore/api.sock";
/// Where the daemon listens for callers with a token.
const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8889);
/// The token that the daemon made, for root.
const TOKEN_FILE: &str = "/etc/spore/token";
/// What a VM may be given to boot: less than any needs, and longer than anybody waits.
const BOOT_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_secs(3600);
/// What may be had of a disk or the network in a second: an app starts with less in no reasonable
/// time, and more is no limit.
const RATE_MIB: RangeInclusive<u32> = 1..=1024 * 1024;
const RATE_OPERATIONS: RangeInclusive<i64> = 50..=10_000_000;
/// The most bytes of a token file.
const TOKEN_BYTES_MAX: usize = 4096;

/// What the verbs that call a daemon need to know.
#[derive(Debug)]
pub(crate) struct CliConfig {
    /// Where the daemon is.
    pub(crate) endpoint: Endpoint,
    /// Who calls; absent on the socket, and where none was found.
    pub(crate) token: Option<String>,
    /// How it may be written.
    pub(crate) screen: Screen,
}

/// What the environment says about the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Screen {
    /// Whether colours are allowed on a terminal.
    pub(crate) colour: Colour,
    /// `TERM`, for a program that gets a terminal; absent when there is none.
    pub(crate) terminal: Option<String>,
    /// Whether a browser can be opened.
    pub(crate) desktop: Desktop,
}

/// Whether colours are allowed on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    /// On a terminal.
    Auto,
    /// `NO_COLOR` is set, or the terminal is dumb.
    Never,
}

/// Whether there is a desktop to open a browser on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Desktop {
    /// `DISPLAY` or `WAYLAND_DISPLAY` is set.
    Present,
    /// Neither is.
    Absent,
}

/// What the daemon needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerConfig {
    /// The store, images and volumes; closed to everybody but root.
    pub(crate) data_dir: PathBuf,
    /// Journal, sockets and namespaces; gone with the host's run.
    pub(crate) runtime_dir: PathBuf,
    /// The daemon's and the apps' logs.
    pub(crate) log_dir: PathBuf,
    /// The domain under which apps answer.
    pub(crate) base: String,
    /// Where visitors come in.
    pub(crate) gateway: SocketAddr,
    /// Where callers with a token come in.
    pub(crate) api: SocketAddr,
    /// The token and the key of secrets.
    pub(crate) config_dir: PathBuf,
    /// The first of the uids that VMs, their proxies and the host's tools run as.
    pub(crate) uid_first: u32,
    /// How many there are.
    pub(crate) uid_count: u32,
    /// The uid of the gateway's process.
    pub(crate) gateway_uid: u32,
    /// Whom egress proxies ask about granted names; none are the host's own.
    pub(crate) resolvers: Vec<SocketAddr>,
    /// Memory that stays with the host, in MiB.
    pub(crate) memory_reserve_mib: u32,
    /// Whether wakes begin from templates.
    pub(crate) templates: bool,
    /// Memory for what VMs are forked from, in MiB. `None` is a quarter of the host's, and at most
    /// 2 GiB.
    pub(crate) snapshot_memory_mib: Option<u32>,
    /// The most that images of one account may take, in MiB.
    pub(crate) image_quota_mib: u64,
    /// What hosts VMs.
    pub(crate) hypervisor: HypervisorChoice,
    /// The program of the `kvm` driver's VMMs.
    pub(crate) vmm: PathBuf,
    /// How much the devices of each VM do in a second at most.
    pub(crate) rates: Rates,
    /// The guest kernel, an ELF file.
    pub(crate) kernel: PathBuf,
    /// What the kernels of guests are told beside the driver's own.
    pub(crate) kernel_arguments: KernelArguments,
    /// The guest's first file system.
    pub(crate) initramfs: PathBuf,
    /// Base images that came with the installation.
    pub(crate) base_images: PathBuf,
    /// The cgroup below which VMs get theirs.
    pub(crate) cgroup_parent: String,
    /// How long a VM may take from its start to its agent's first word.
    pub(crate) boot_timeout: Duration,
    /// What the daemon and the gateway log.
    pub(crate) log: LogConfig,
}

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("SPORE_HOST: {0}")]
    Host(EndpointError),
    #[error("cannot read the token in {path}: check its owner and mode, or set SPORE_TOKEN")]
    Token { path: PathBuf, source: io::Error },
    #[error("{path} is not a token: it must be one line of at most 4096 characters")]
    TokenForm { path: PathBuf },
    #[error("cannot read {path}: check its owner and mode, or name another with --config")]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// The environment, by name. Tests give their own.
pub(crate) type Environment<'e> = &'e dyn Fn(&str) -> Option<OsString>;

/// The environment of this process.
pub(crate) fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

impl Screen {
    /// What the environment says.
    pub(crate) fn read(environment: Environment<'_>) -> Self {
        let terminal = environment("TERM").and_then(|term| term.into_string().ok());
        let dumb = terminal.as_deref() == Some("dumb");
        let colour = match environment("NO_COLOR") {
            None if !dumb => Colour::Auto,
            _ => Colour::Never,
        };
        let desktop = match environment("DISPLAY").or_else(|| environment("WAYLAND_DISPLAY")) {
            Some(_) => Desktop::Present,
            None => Desktop::Absent,
        };
        Self {
            colour,
            terminal,
            desktop,
        }
    }
}

impl CliConfig {
    /// Where the daemon is, and with which token. `host` is the flag of that name.
    pub(crate) fn read(
        host: Option<&str>,
        environment: Environment<'_>,
    ) -> Result<Self, ConfigError> {
        let screen = Screen::read(environment);
        let given = environment("SPORE_HOST");
        let named = match (host, &given) {
            (Some(host), _) => Some(host.parse::<Endpoint>()?),
            (None, Some(host)) => Some(host.to_string_lossy().parse().map_err(ConfigError::Host)?),
            (None, None) => None,
        };
        let socket = Path::new(SOCKET);
        let endpoint = match named {
            Some(endpoint @ Endpoint::Unix(_)) => {
                return Ok(Self {
                    endpoint,
                    token: None,
                    screen,
                });
            }
            Some(endpoint) => endpoint,
            None if may_use(socket) || !socket.exists() => {
                let endpoint = Endpoint::Unix(socket.to_owned());
                return Ok(Self {
                    endpoint,
                    token: None,
                    screen,
                });
            }
            None => Endpoint::Tcp {
                host: API.ip().to_string(),
                port: API.port(),
            },
        };
        let token = read_token(environment)?;
        if token.is_none() && given.is_none() && host.is_none() {
            // Without a token the socket's own refusal says more than that of TCP.
            let endpoint = Endpoint::Unix(socket.to_owned());
            return Ok(Self {
                endpoint,
                token,
                screen,
            });
        }
        Ok(Self {
            endpoint,
            token,
            screen,
        })
    }
}

/// The user who became root for this call, as sudo(8) tells; `None` is root itself.
pub(crate) fn invoker(environment: Environment<'_>) -> Option<u32> {
    let uid = environment("SUDO_UID")?;
    uid.to_str()?.parse().ok().filter(|uid| *uid != 0)
}

/// The socket on which systemd wants to be told that the daemon is ready, as sd_notify(3) has it;
/// sockets in the abstract namespace are for managers in containers and not used here.
pub(crate) fn supervisor(environment: Environment<'_>) -> Option<PathBuf> {
    let socket = PathBuf::from(environment("NOTIFY_SOCKET")?);
    socket.is_absolute().then_some(socket)
}

fn may_use(socket: &Path) -> bool {
    let wanted = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    rustix::fs::access(socket, wanted).is_ok()
}

fn read_token(environment: Environment<'_>) -> Result<Option<String>, ConfigError> {
    if let Some(token) = environment("SPORE_TOKEN") {
        return Ok(Some(token.to_string_lossy().trim().to_owned()));
    }
    let home = environment("HOME").map(PathBuf::from);
    let folder = environment("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| home.map(|home| home.join(".config")));
    let own = folder.map(|folder| folder.join("spore/token"));
    for path in own.into_iter().chain([PathBuf::from(TOKEN_FILE)]) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            // The file of root is not for everybody; whose own cannot be read should know.
            Err(error)
                if path == Path::new(TOKEN_FILE)
                    && error.kind() == io::ErrorKind::PermissionDenied =>
            {
                continue;
            }
            Err(source) => return Err(ConfigError::Token { path, source }),
        };
        let token = text.trim();
        let is_token = |byte: u8| byte.is_ascii_graphic();
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX || !token.bytes().all(is_token) {
            return Err(ConfigError::TokenForm { path });
        }
        return Ok(Some(token.to_owned()));
    }
    Ok(None)
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/spore".into(),
            runtime_dir: "/run/spore".into(),
            log_dir: "/var/log/spore".into(),
            base: "localhost".to_owned(),
            gateway: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            api: API,
            config_dir: "/etc/spore".into(),
            uid_first: 200_000,
            uid_count: 10_000,
            gateway_uid: 199_999,
            resolvers: Vec::new(),
            memory_reserve_mib: 512,
            templates: true,
            snapshot_memory_mib: None,
            image_quota_mib: 64 * 1024,
            hypervisor: HypervisorChoice::default(),
            vmm: "/usr/local/lib/spore/spore-vmm".into(),
            rates: Rates::default(),
            kernel: "/usr/local/lib/spore/guest/vmlinux".into(),
            kernel_arguments: KernelArguments::default(),
            initramfs: "/usr/local/lib/spore/guest/initramfs.cpio".into(),
            base_images: "/usr/local/lib/spore/images".into(),
            cgroup_parent: "spore".to_owned(),
            boot_timeout: Duration::from_secs(90),
            log: LogConfig::default(),
        }
    }
}

const SERVER_KEYS: [&str; 28] = [
    "data_dir",
    "runtime_dir",
    "log_dir",
    "base",
    "gateway",
    "api",
    "config_dir",
    "uid_first",
    "uid_count",
    "gateway_uid",
    "resolvers",
    "memory_reserve",
    "templates",
    "snapshot_memory",
    "image_quota",
    "hypervisor",
    "vmm",
    "disk_bandwidth",
    "disk_operations",
    "network_bandwidth",
    "kernel",
    "kernel_arguments",
    "initramfs",
    "base_images",
    "cgroup_parent",
    "boot_timeout",
    "log",
    "log_format",
];

impl ServerConfig {
    /// Reads `file`, or [`SERVER_FILE`] when absent, which need not be there.
    pub(crate) fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = file.unwrap_or(Path::new(SERVER_FILE));
        let mut config = Self::default();
        if file.is_none() && Path::new(SYSTEMD).is_dir() {
            config.cgroup_parent = UNIT_CGROUP.to_owned();
        }
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(config.parse(&path.display().to_string(), &text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_none() => Ok(config),
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// This, with what the text of a file says that messages call `name`.
    fn parse(self, name: &str, text: &str) -> Result<Self, DocumentError> {
        let document = Document::parse(name, text)?;
        let table = document.root(&SERVER_KEYS)?;
        let mut config = self;
        config.places(&table)?;
        config.rates = rates(&table)?;
        if let Some(entry) = table.get("base") {
            config.base = base(&entry)?;
        }
        if let Some(entry) = table.get("gateway") {
            config.gateway = address(&entry)?;
        }
        if let Some(entry) = table.get("api") {
            config.api = address(&entry)?;
            if config.api == config.gateway {
                return Err(entry.refused("the gateway listens there; use another port"));
            }
        }
        if let Some(entry) = table.get("uid_first") {
            config.uid_first = uid(&entry)?;
        }
        if let Some(entry) = table.get("uid_count") {
            let number = entry.integer(16..=1_000_000)?;
            config.uid_count = u32::try_from(number)
                .map_err(|_error| entry.refused("it must fit into 32 bits"))?;
        }
        if let Some(entry) = table.get("gateway_uid") {
            config.gateway_uid = uid(&entry)?;
            if config.gateway_uid >= config.uid_first {
                let first = config.uid_first;
                return Err(entry.refused(format!(
                    "VMs run as the uids from {first} on; use a lower one for the gateway"
                )));
            }
        }
        if let Some(entry) = table.get("resolvers") {
            config.resolvers = resolvers(&entry)?;
        }
        if let Some(entry) = table.get("memory_reserve") {
            config.memory_reserve_mib = entry.mib(0..=1024 * 1024)?;
        }
        if let Some(entry) = table.get("templates") {
            config.templates = entry.flag()?;
        }
        if let Some(entry) = table.get("hypervisor") {
            let choice = entry.text()?.parse();
            config.hypervisor = choice.map_err(|why: &str| entry.refused(why))?;
        }
        if let Some(entry) = table.get("kernel_arguments") {
            let arguments = entry.text()?.parse();
            config.kernel_arguments = arguments.map_err(|why| entry.refused(why))?;
        }
        if let Some(entry) = table.get("snapshot_memory") {
            config.snapshot_memory_mib = Some(entry.mib(0..=1024 * 1024)?);
        }
        if let Some(entry) = table.get("image_quota") {
            config.image_quota_mib = entry.mib(1..=1024 * 1024 * 1024)?.into();
        }
        if let Some(entry) = table.get("cgroup_parent") {
            config.cgroup_parent = cgroup(&entry)?;
        }
        if let Some(entry) = table.get("boot_timeout") {
            config.boot_timeout = entry.span(BOOT_TIMEOUT)?;
        }
        config.logs(&table)?;
        Ok(config)
    }

    fn logs(&mut self, table: &Table<'_>) -> Result<(), DocumentError> {
        if let Some(entry) = table.get("log") {
            let filter = entry.text()?;
            if let Some(why) = log::refused_filter(filter) {
                return Err(entry.refused(why));
            }
            filter.clone_into(&mut self.log.filter);
        }
        if let Some(entry) = table.get("log_format") {
            let format = entry.text()?.parse();
            self.log.format = format.map_err(|why| entry.refused(why))?;
        }
        Ok(())
    }

    fn places(&mut self, table: &Table<'_>) -> Result<(), DocumentError> {
        for (key, path) in [
            ("data_dir", &mut self.data_dir),
            ("runtime_dir", &mut self.runtime_dir),
            ("log_dir", &mut self.log_dir),
            ("config_dir", &mut self.config_dir),
            ("vmm", &mut self.vmm),
            ("kernel", &mut self.kernel),
            ("initramfs", &mut self.initramfs),
            ("base_images", &mut self.base_images),
        ] {
            if let Some(entry) = table.get(key) {
                let given = Path::new(entry.text()?);
                let plain = !given.components().any(|part| part.as_os_str() == "..");
                if !given.is_absolute() || !plain {
                    return Err(entry.refused("it must be a path that begins with / and has no .."));
                }
                *path = given.to_owned();
            }
        }
        Ok(())
    }
}

/// What may be had of devices in a second.
fn rates(table: &Table<'_>) -> Result<Rates, DocumentError> {
    let bytes = |key| -> Result<_, DocumentError> {
        let mib = table
            .get(key)
            .map(|entry| entry.mib(RATE_MIB))
            .transpose()?;
        Ok(mib.and_then(|mib| NonZeroU64::new(u64::from(mib) << 20)))
    };
    let operations = table.get("disk_operations");
    let operations = operations.map(|entry| entry.integer(RATE_OPERATIONS));
    let operations = operations.transpose()?;
    Ok(Rates {
        disk_bytes: bytes("disk_bandwidth")?,
        disk_operations: operations.and_then(|count| NonZeroU64::new(u64::try_from(count).ok()?)),
        network_bytes: bytes("network_bandwidth")?,
    })
}

fn base(entry: &Entry<'_>) -> Result<String, DocumentError> {
    let text = entry.text()?;
    let is_label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // An app's label of up to 82 characters and a dot go before it.
    if text.len() <= 170 && text.split('.').all(is_label) {
        return Ok(text.to_owned());
    }
    Err(entry
        .refused("it must be a domain in lower case, such as `localhost` or `apps.example.org`"))
}

fn address(entry: &Entry<'_>) -> Result<SocketAddr, DocumentError> {
    let address: Option<SocketAddr> = entry.text()?.parse().ok();
    let address = address.filter(|address| address.port() != 0);
    if address.is_some_and(|address| !address.ip().is_loopback()) {
        // The only driver is software emulation, which is no boundary: nobody outside may come in.
        return Err(entry.refused(
            "on a host whose VMs have no hardware boundary Spore listens on loopback only; \
             listening elsewhere is not in this version",
        ));
    }
    address
        .ok_or_else(|| entry.refused("it must be an address with a port, such as 127.0.0.1:8080"))
}

fn resolvers(entry: &Entry<'_>) -> Result<Vec<SocketAddr>, DocumentError> {
    let all = entry.texts()?;
    if all.len() > RESOLVERS_MAX {
        return Err(entry.refused(format!("at most {RESOLVERS_MAX} are asked")));
    }
    let one = |(text, item): (&str, Entry<'_>)| {
        let address: Option<SocketAddr> = text.parse().ok();
        let can_be_asked = |at: &SocketAddr| {
            at.port() != 0 && !at.ip().is_unspecified() && !at.ip().is_multicast()
        };
        address.filter(can_be_asked).ok_or_else(|| {
            item.refused("it must be a resolver's address with its port, such as 127.0.0.53:53")
        })
    };
    all.into_iter().map(one).collect()
}

fn uid(entry: &Entry<'_>) -> Result<u32, DocumentError> {
    // Below are the uids of the system and of people; 65534 and 2^32-1 mean nobody.
    let number = entry.integer(100_000..=4_000_000_000)?;
    u32::try_from(number).map_err(|_error| entry.refused("it must fit into 32 bits"))
}

fn cgroup(entry: &Entry<'_>) -> Result<String, DocumentError> {
    let text = entry.text()?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/');
    let plain = text.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if plain && text.bytes().all(allowed) {
        return Ok(text.to_owned());
    }
    Err(entry
        .refused("it must be a path without a leading /, such as `spore` or `spore.slice/vms`"))
}
