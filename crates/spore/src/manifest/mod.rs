//! `spore.toml` in an app's folder: read, checked, and turned into a release's specification.
//!
//! Used by `deploy`. What is unknown, wrong, contradictory or of a later version is refused with
//! file, line, value and what would be right; nothing is silently accepted. The daemon checks the
//! specification again: this is for people, that is for safety.

mod guess;
#[cfg(test)]
mod tests;

use core::ops::RangeInclusive;
use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use spore_api::limits;
use spore_api::name::{AppName, ImageName, SecretName};
use spore_api::release::{
    HealthSpec, IdleMode, IdleSpec, ReleaseSpec, ResourceSpec, SecretSpec, Warm,
};
use thiserror::Error;

use crate::document::{Document, DocumentError, Entry, Table};

/// The manifest's name in an app's folder.
pub(crate) const FILE: &str = "spore.toml";
/// The most bytes of a manifest.
const BYTES_MAX: u64 = 256 * 1024;

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// The app's name.
    pub(crate) name: AppName,
    /// Where its root file system comes from.
    pub(crate) image: ImageChoice,
    command: Vec<String>,
    port: u16,
    warm: Warm,
    resources: ResourceSpec,
    idle: IdleSpec,
    health: HealthSpec,
    egress: Vec<String>,
    secrets: SecretSpec,
    environment: Vec<(String, String)>,
}

/// Where an app's root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageChoice {
    /// An image that the daemon has.
    Named(ImageName),
    /// A folder, as the manifest calls it: it becomes an image first.
    Folder(PathBuf),
}

/// Why a folder cannot be deployed.
#[derive(Debug, Error)]
pub(crate) enum ManifestError {
    #[error("there is no folder {path}. Name the app's folder: `spore deploy FOLDER`")]
    NoFolder { path: PathBuf },
    #[error("{path} is not a folder. Name the folder that holds it: `spore deploy FOLDER`")]
    NotFolder { path: PathBuf },
    #[error(
        "{} has no {FILE}. {found}; put this into {} and deploy again:\n\n{paste}",
        folder.display(), folder.join(FILE).display()
    )]
    Absent {
        folder: PathBuf,
        found: &'static str,
        paste: String,
    },
    #[error("cannot read {path}: check its owner and mode")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} has {bytes} bytes; a manifest has at most {BYTES_MAX}")]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error(transparent)]
    Document(#[from] DocumentError),
}

impl Manifest {
    /// Reads the manifest of an app's folder.
    pub(crate) fn read(folder: &Path) -> Result<Self, ManifestError> {
        let path = folder.join(FILE);
        let read = |source| ManifestError::Read {
            path: path.clone(),
            source,
        };
        match std::fs::metadata(folder) {
            Ok(found) if found.is_dir() => {}
            Ok(_file) => {
                return Err(ManifestError::NotFolder {
                    path: folder.to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::NoFolder {
                    path: folder.to_owned(),
                });
            }
            Err(source) => {
                return Err(ManifestError::Read {
                    path: folder.to_owned(),
                    source,
                });
            }
        }
        match std::fs::metadata(&path) {
            Ok(found) if found.len() > BYTES_MAX => {
                return Err(ManifestError::TooLarge {
                    path,
                    bytes: found.len(),
                });
            }
            Ok(_found) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let guess = guess::guess(folder);
                return Err(ManifestError::Absent {
                    folder: folder.to_owned(),
                    found: guess.found,
                    paste: guess.manifest,
                });
            }
            Err(source) => return Err(read(source)),
        }
        let text = std::fs::read_to_string(&path).map_err(read)?;
        Ok(Self::parse(&path.display().to_string(), &text)?)
    }

    /// Reads the text of a manifest that messages call `file`.
    fn parse(file: &str, text: &str) -> Result<Self, DocumentError> {
        let document = Document::parse(file, text)?;
        let root = document.root(&ROOT_KEYS)?;
        refuse_what_comes_later(&root)?;
        let secrets = secrets(&root)?;
        Ok(Self {
            name: root.need("name", "name = \"notes\"")?.parse()?,
            image: image(&root.need("image", "image = \"debian/python3\"")?)?,
            command: command(&root.need("command", "command = [\"python3\", \"app.py\"]")?)?,
            port: port(&root.need("port", "port = 8000")?)?,
            resources: resources(&root)?,
            idle: idle(&root)?,
            health: health(&root)?,
            egress: egress(&root)?,
            environment: environment(&root, &secrets)?,
            warm: warm(&root, &secrets)?,
            secrets,
        })
    }

    /// The specification of a release, with the image that was chosen or made.
    pub(crate) fn spec(&self, image: ImageName) -> ReleaseSpec {
        ReleaseSpec {
            image,
            command: self.command.clone(),
            port: self.port,
            resources: self.resources,
            idle: self.idle,
            health: self.health.clone(),
            egress: self.egress.clone(),
            secrets: self.secrets.clone(),
            environment: self.environment.clone(),
            warm: self.warm,
        }
    }
}

const ROOT_KEYS: [&str; 14] = [
    "name",
    "image",
    "command",
    "port",
    "protocol",
    "warm",
    "resources",
    "idle",
    "health",
    "egress",
    "secrets",
    "environment",
    "volumes",
    "scale",
];

/// Keys and values of the full manifest that have no effect yet must not look as if they had.
fn refuse_what_comes_later(root: &Table<'_>) -> Result<(), DocumentError> {
    if let Some(entry) = root.get("protocol") {
        match entry.text()? {
            "http1" => {}
            "h2c" => return Err(entry.not_yet("Use \"http1\", or leave it out")),
            _ => return Err(entry.refused("use \"http1\"")),
        }
    }
    if let Some(entry) = root.get("volumes")
        && let Some((_, volume)) = entry.names("volumes.")?.entries().into_iter().next()
    {
        return Err(volume.not_yet(
            "What an app writes is gone when it sleeps: leave [volumes] out, and keep data in a \
             database that [egress] admits",
        ));
    }
    if let Some(scale) = root.table("scale.", &["max"])?
        && let Some(entry) = scale.get("max")
        && entry.integer(1..=1000)? > 1
    {
        return Err(entry.not_yet("Use 1, or leave it out"));
    }
    Ok(())
}

fn image(entry: &Entry<'_>) -> Result<ImageChoice, DocumentError> {
    let text = entry.text()?;
    if text.starts_with("oci:") || text.starts_with("tar:") {
        return Err(entry
            .not_yet("Use an image of `spore image ls`, or unpack it and use \"dir:./rootfs\""));
    }
    let Some(folder) = text.strip_prefix("dir:") else {
        return Ok(ImageChoice::Named(entry.parse()?));
    };
    if folder.is_empty() {
        return Err(entry.refused("name the folder: \"dir:./rootfs\""));
    }
    Ok(ImageChoice::Folder(PathBuf::from(folder)))
}

fn command(entry: &Entry<'_>) -> Result<Vec<String>, DocumentError> {
    let parts = entry.texts()?;
    if parts.first().is_none_or(|(program, _)| program.is_empty()) {
        return Err(entry.refused("name a program: [\"python3\", \"app.py\"]"));
    }
    if parts.len() > limits::COMMAND_PARTS_MAX {
        let most = limits::COMMAND_PARTS_MAX;
        return Err(entry.refused(format!("it has {} parts, {most} is the most", parts.len())));
    }
    for (part, place) in &parts {
        if part.contains('\0') {
            return Err(place.refused("no argument can hold a NUL character"));
        }
        if part.len() > limits::COMMAND_PART_BYTES_MAX {
            let most = limits::COMMAND_PART_BYTES_MAX;
            return Err(place.refused(format!("{most} bytes are the most of one argument")));
        }
    }
    Ok(parts.into_iter().map(|(part, _)| part.to_owned()).collect())
}

fn port(entry: &Entry<'_>) -> Result<u16, DocumentError> {
    let port = entry.integer(1..=65535)?;
    u16::try_from(port).map_err(|_error| entry.refused("it must be 1 to 65535"))
}

fn warm(root: &Table<'_>, secrets: &SecretSpec) -> Result<Warm, DocumentError> {
    let Some(entry) = root.get("warm") else {
        return Ok(Warm::Boot);
    };
    let has_secrets = !secrets.names.is_empty() || !secrets.files.is_empty();
    match entry.text()? {
        "boot" => Ok(Warm::Boot),
        "ready" if has_secrets => Err(entry.refused(
            "the memory of such an app is kept, so it can be given no secrets; use \"boot\", or \
             leave [secrets] out",
        )),
        "ready" => Ok(Warm::Ready),
        _ => Err(entry.refused("use \"boot\" or \"ready\"")),
    }
}

fn resources(root: &Table<'_>) -> Result<ResourceSpec, DocumentError> {
    let mut spec = ResourceSpec::default();
    let Some(table) = root.table("resources.", &["cpus", "memory", "disk"])? else {
        return Ok(spec);
    };
    if let Some(entry) = table.get("cpus") {
        let cpus = entry.integer(1..=i64::from(limits::CPUS_MAX))?;
        spec.cpus = u8::try_from(cpus).map_err(|_error| entry.refused("it is too large"))?;
    }
    if let Some(entry) = table.get("memory") {
        spec.memory_mib = entry.mib(limits::MEMORY_MIB_MIN..=limits::MEMORY_MIB_MAX)?;
    }
    if let Some(entry) = table.get("disk") {
        spec.disk_mib = entry.mib(limits::DISK_MIB_MIN..=limits::DISK_MIB_MAX)?;
    }
    Ok(spec)
}

fn seconds(low: u64, high: u64) -> RangeInclusive<Duration> {
    Duration::from_secs(low)..=Duration::from_secs(high)
}

fn milliseconds(entry: &Entry<'_>, range: RangeInclusive<Duration>) -> Result<u64, DocumentError> {
    let span = entry.span(range)?;
    u64::try_from(span.as_millis()).map_err(|_error| entry.refused("it is too long"))
}

fn idle(root: &Table<'_>) -> Result<IdleSpec, DocumentError> {
    let mut spec = IdleSpec::default();
    let Some(table) = root.table("idle.", &["after", "mode"])? else {
        return Ok(spec);
    };
    if let Some(entry) = table.get("mode") {
        spec.mode = match entry.text()? {
            "stop" => IdleMode::Stop,
            "never" => IdleMode::Never,
            "suspend" => IdleMode::Suspend,
            _ => return Err(entry.refused("use \"stop\", \"suspend\" or \"never\"")),
        };
    }
    if let Some(entry) = table.get("after") {
        spec.after_ms = milliseconds(&entry, seconds(limits::IDLE_S_MIN, limits::IDLE_S_MAX))?;
        if spec.mode == IdleMode::Never {
            return Err(
                entry.refused("`idle.mode = \"never\"` keeps it awake; leave one of them out")
            );
        }
    }
    Ok(spec)
}

fn health(root: &Table<'_>) -> Result<HealthSpec, DocumentError> {
    let mut spec = HealthSpec::default();
    let Some(table) = root.table("health.", &["path", "timeout"])? else {
        return Ok(spec);
    };
    if let Some(entry) = table.get("path") {
        let path = entry.text()?;
        let plain = path
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'#');
        if !path.starts_with('/') || !plain || path.len() > 1024 {
            return Err(entry.refused("it must be a path such as \"/healthz\", without spaces"));
        }
        spec.path = Some(path.to_owned());
    }
    if let Some(entry) = table.get("timeout") {
        spec.timeout_ms = milliseconds(&entry, seconds(1, limits::READY_S_MAX))?;
    }
    Ok(spec)
}

fn egress(root: &Table<'_>) -> Result<Vec<String>, DocumentError> {
    let Some(table) = root.table("egress.", &["allow"])? else {
        return Ok(Vec::new());
    };
    let Some(list) = table.get("allow") else {
        return Ok(Vec::new());
    };
    let mut seen = BTreeSet::new();
    let mut grants = Vec::new();
    for (text, entry) in list.texts()? {
        let grant = grant(text, &entry)?;
        if !seen.insert(grant.clone()) {
            return Err(entry.refused("it is there twice; leave one out"));
        }
        grants.push(grant);
    }
    if grants.len() > limits::EGRESS_GRANTS_MAX {
        let most = limits::EGRESS_GRANTS_MAX;
        return Err(list.refused(format!(
            "it has {} grants, {most} is the most",
            grants.len()
        )));
    }
    Ok(grants)
}

/// What every VM and its host call each other.
const VM_LINK: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 42, 0, 0),
    Ipv4Addr::new(10, 42, 0, 1),
    Ipv4Addr::new(10, 42, 0, 2),
    Ipv4Addr::new(10, 42, 0, 3),
];

/// One `host:port` or `address:port`, in lower case.
fn grant(text: &str, entry: &Entry<'_>) -> Result<String, DocumentError> {
    if text.contains('*') {
        return Err(entry.not_yet("Name each host: \"api.example.org:443\""));
    }
    if text.contains('/')
        && text
            .rsplit('/')
            .next()
            .is_some_and(|bits| bits.parse::<u8>().is_ok())
    {
        return Err(entry.not_yet("Name each address: \"10.20.0.5:5432\""));
    }
    if text.starts_with('[') || text.matches(':').count() > 1 && !text.contains("://") {
        return Err(entry.not_yet("Apps have no IPv6: name a host or an IPv4 address"));
    }
    let form =
        || entry.refused("use \"HOST:PORT\" or \"ADDRESS:PORT\", as in \"api.example.org:443\"");
    let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
    let port: u16 = port.parse().map_err(|_error| form())?;
    let host = host.to_ascii_lowercase();
    let is_label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(allowed)
    };
    let last = host.rsplit('.').next().unwrap_or_default();
    let like_address = last.bytes().all(|byte| byte.is_ascii_digit());
    let is_host =
        host.len() <= 253 && host.contains('.') && host.split('.').all(is_label) && !like_address;
    let address: Option<Ipv4Addr> = host.parse().ok();
    if host == "localhost" || host.ends_with(".localhost") {
        return Err(entry.refused(
            "inside its VM an app is alone; to reach a service of the host, name the host's \
             address in a network",
        ));
    }
    if port == 0 || (!is_host && address.is_none()) {
        return Err(form());
    }
    if address.is_some_and(|address| {
        address.is_unspecified()
            || address.is_loopback()
            || address.is_multicast()
            || address.is_broadcast()
            || VM_LINK.contains(&address)
    }) {
        return Err(entry.refused("no VM can be let through to such an address; name another"));
    }
    Ok(format!("{host}:{port}"))
}

fn secrets(root: &Table<'_>) -> Result<SecretSpec, DocumentError> {
    let mut spec = SecretSpec::default();
    let Some(table) = root.table("secrets.", &["names", "files"])? else {
        return Ok(spec);
    };
    let mut seen = BTreeSet::new();
    for (key, list) in [("names", &mut spec.names), ("files", &mut spec.files)] {
        let Some(entry) = table.get(key) else {
            continue;
        };
        for (text, place) in entry.texts()? {
            let name: SecretName = place.parse()?;
            if !seen.insert(text) {
                return Err(place.refused(
                    "it is there twice; a secret comes as a variable or as a file, not as both",
                ));
            }
            list.push(name);
        }
        if list.len() > limits::SECRETS_PER_APP_MAX {
            let most = limits::SECRETS_PER_APP_MAX;
            return Err(entry.refused(format!("it has {} names, {most} is the most", list.len())));
        }
    }
    Ok(spec)
}

fn environment(
    root: &Table<'_>,
    secrets: &SecretSpec,
) -> Result<Vec<(String, String)>, DocumentError> {
    let Some(entry) = root.get("environment") else {
        return Ok(Vec::new());
    };
    let mut pairs = Vec::new();
    for (name, value) in entry.names("environment.")?.entries() {
        // The same names are free for variables as for secrets.
        let parsed: SecretName = name.parse().map_err(|_error| {
            value.refused(
                "a variable's name is made of A-Z, a-z, 0-9 and _, and is not PORT, HOME, PATH, \
                 TZ, LD_… or SPORE_…",
            )
        })?;
        let text = value.text()?;
        if text.contains('\0') {
            return Err(value.refused("no variable can hold a NUL character"));
        }
        if secrets.names.contains(&parsed) {
            return Err(value.refused("[secrets] sets the same variable; leave one of them out"));
        }
        pairs.push((name.to_owned(), text.to_owned()));
    }
    Ok(pairs)
}
