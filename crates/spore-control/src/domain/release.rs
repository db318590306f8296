//! Releases: a manifest checked against every limit.

use std::collections::BTreeSet;

use spore_api::limits::{
    COMMAND_BYTES_MAX, COMMAND_PART_BYTES_MAX, COMMAND_PARTS_MAX, CPUS_MAX, DISK_MIB_MAX,
    DISK_MIB_MIN, EGRESS_GRANTS_MAX, IDLE_S_MAX, IDLE_S_MIN, MEMORY_MIB_MAX, MEMORY_MIB_MIN,
    READY_S_MAX, SECRETS_PER_APP_MAX,
};
use spore_api::release::{IdleMode, ReleaseSpec, Warm};

use super::{RuleError, egress};
use crate::store::record::release::{Rules, StoredWarm};

/// The most names in the environment of a manifest.
pub const ENVIRONMENT_NAMES_MAX: usize = 256;

/// The most bytes of a health path.
const PATH_BYTES_MAX: usize = 1024;

/// The release that `spec` describes.
///
/// # Errors
/// The first value that is not allowed.
pub fn rules(spec: &ReleaseSpec) -> Result<Rules, RuleError> {
    command(&spec.command)?;
    if spec.port == 0 {
        return Err(RuleError::invalid("spec.port", 0, "1 to 65535 are allowed"));
    }
    resources(spec)?;
    times(spec)?;
    health_path(spec.health.path.as_deref())?;
    secrets(spec)?;
    environment(spec)?;
    let warm = warm(spec)?;
    together(spec)?;
    Ok(Rules {
        image_name: spec.image.clone(),
        command: spec.command.clone(),
        port: spec.port,
        cpus: spec.resources.cpus,
        memory_mib: spec.resources.memory_mib,
        disk_mib: spec.resources.disk_mib,
        idle_after_ms: spec.idle.after_ms,
        sleeps: spec.idle.mode != IdleMode::Never,
        suspends: spec.idle.mode == IdleMode::Suspend,
        health_path: spec.health.path.clone(),
        health_timeout_ms: spec.health.timeout_ms,
        egress: grants(&spec.egress)?,
        secret_names: spec.secrets.names.clone(),
        secret_files: spec.secrets.files.clone(),
        environment: spec.environment.clone(),
        warm,
    })
}

fn command(command: &[String]) -> Result<(), RuleError> {
    let field = "spec.command";
    if command
        .first()
        .is_none_or(|program| program.trim().is_empty())
    {
        let rule = "name the program to run, such as [\"python3\", \"app.py\"]";
        return Err(RuleError::invalid(field, format!("{command:?}"), rule));
    }
    if command.len() > COMMAND_PARTS_MAX {
        let rule = format!("at most {COMMAND_PARTS_MAX} parts are allowed");
        return Err(RuleError::invalid(
            field,
            format!("{} parts", command.len()),
            rule,
        ));
    }
    for (index, part) in command.iter().enumerate() {
        let field = format!("{field}[{index}]");
        if part.len() > COMMAND_PART_BYTES_MAX {
            let rule = format!("at most {COMMAND_PART_BYTES_MAX} bytes are allowed");
            return Err(RuleError::invalid(field, part, rule));
        }
        if part.contains('\0') {
            return Err(RuleError::invalid(
                field,
                part.escape_default(),
                "NUL is not allowed",
            ));
        }
    }
    Ok(())
}

fn resources(spec: &ReleaseSpec) -> Result<(), RuleError> {
    let resources = &spec.resources;
    within(
        "spec.resources.cpus",
        u64::from(resources.cpus),
        1,
        u64::from(CPUS_MAX),
        "vCPUs",
    )?;
    within(
        "spec.resources.memory_mib",
        u64::from(resources.memory_mib),
        u64::from(MEMORY_MIB_MIN),
        u64::from(MEMORY_MIB_MAX),
        "MiB",
    )?;
    within(
        "spec.resources.disk_mib",
        u64::from(resources.disk_mib),
        u64::from(DISK_MIB_MIN),
        u64::from(DISK_MIB_MAX),
        "MiB",
    )
}

fn times(spec: &ReleaseSpec) -> Result<(), RuleError> {
    let (least, most) = (IDLE_S_MIN * 1000, IDLE_S_MAX * 1000);
    within(
        "spec.idle.after_ms",
        spec.idle.after_ms,
        least,
        most,
        "milliseconds",
    )?;
    let most = READY_S_MAX * 1000;
    within(
        "spec.health.timeout_ms",
        spec.health.timeout_ms,
        100,
        most,
        "milliseconds",
    )
}

fn within(field: &str, value: u64, least: u64, most: u64, unit: &str) -> Result<(), RuleError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let rule = format!("{least} to {most} {unit} are allowed");
    Err(RuleError::invalid(field, value, rule))
}

fn health_path(path: Option<&str>) -> Result<(), RuleError> {
    let Some(path) = path else {
        return Ok(());
    };
    let plain = path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if path.starts_with('/') && plain && path.len() <= PATH_BYTES_MAX {
        return Ok(());
    }
    let rule = format!(
        "a path begins with `/`, is at most {PATH_BYTES_MAX} bytes of ASCII without spaces and \
         `#`, such as `/healthz`"
    );
    Err(RuleError::invalid(
        "spec.health.path",
        path.escape_default(),
        rule,
    ))
}

fn secrets(spec: &ReleaseSpec) -> Result<(), RuleError> {
    let total = spec.secrets.names.len() + spec.secrets.files.len();
    if total > SECRETS_PER_APP_MAX {
        let rule = format!("at most {SECRETS_PER_APP_MAX} are allowed");
        return Err(RuleError::invalid(
            "spec.secrets",
            format!("{total} secrets"),
            rule,
        ));
    }
    for (field, names) in [
        ("spec.secrets.names", &spec.secrets.names),
        ("spec.secrets.files", &spec.secrets.files),
    ] {
        let mut seen = BTreeSet::new();
        for (index, name) in names.iter().enumerate() {
            if !seen.insert(name) {
                let field = format!("{field}[{index}]");
                return Err(RuleError::invalid(
                    field,
                    name,
                    "it is named twice; once is enough",
                ));
            }
        }
    }
    Ok(())
}

fn environment(spec: &ReleaseSpec) -> Result<(), RuleError> {
    let field = "spec.environment";
    let count = spec.environment.len();
    if count > ENVIRONMENT_NAMES_MAX {
        let rule = format!("at most {ENVIRONMENT_NAMES_MAX} names are allowed");
        return Err(RuleError::invalid(field, format!("{count} names"), rule));
    }
    let mut seen = BTreeSet::new();
    for (index, (name, value)) in spec.environment.iter().enumerate() {
        let field = format!("{field}[{index}]");
        if !is_environment_name(name) {
            let rule = "A-Z, a-z, 0-9 and _, not beginning with a digit; not PORT, HOME, TZ or \
                        SPORE_…, which Spore sets itself";
            return Err(RuleError::invalid(field, name.escape_default(), rule));
        }
        if value.contains('\0') || value.len() > COMMAND_PART_BYTES_MAX {
            let rule = format!("at most {COMMAND_PART_BYTES_MAX} bytes without NUL are allowed");
            return Err(RuleError::invalid(field, value.escape_default(), rule));
        }
        if !seen.insert(name) {
            return Err(RuleError::invalid(
                field,
                name,
                "it is named twice; once is enough",
            ));
        }
        if spec
            .secrets
            .names
            .iter()
            .any(|secret| secret.as_str() == name)
        {
            let rule = "a secret of this name is asked for too; keep one of the two";
            return Err(RuleError::invalid(field, name, rule));
        }
    }
    Ok(())
}

/// What has been in memory when a template is taken is on the disk, and in every VM from it.
fn warm(spec: &ReleaseSpec) -> Result<StoredWarm, RuleError> {
    let has_secrets = !spec.secrets.names.is_empty() || !spec.secrets.files.is_empty();
    match spec.warm {
        Warm::Boot => Ok(StoredWarm::Boot),
        Warm::Ready if has_secrets => {
            let rule = "the memory of such an app is kept, so it can be given no secrets: use \
                        `boot`, or leave the secrets out";
            Err(RuleError::invalid("spec.warm", "ready", rule))
        }
        Warm::Ready => Ok(StoredWarm::Ready),
    }
}

/// Command and environment are told to a VM in one message, beside its secrets.
fn together(spec: &ReleaseSpec) -> Result<(), RuleError> {
    let json = serde_json::to_vec(&(&spec.command, &spec.environment));
    let bytes = json.map_or(usize::MAX, |json| json.len());
    if bytes > COMMAND_BYTES_MAX {
        let rule = format!(
            "with `spec.environment` at most {COMMAND_BYTES_MAX} bytes are allowed; put what is \
             large into a file of the app's folder"
        );
        return Err(RuleError::invalid(
            "spec.command",
            format!("{bytes} bytes"),
            rule,
        ));
    }
    Ok(())
}

fn is_environment_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.as_bytes()[0].is_ascii_digit()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !["PORT", "HOME", "TZ"].contains(&name)
        && !name.starts_with("SPORE_")
}

fn grants(egress: &[String]) -> Result<Vec<spore_wire::egress::Grant>, RuleError> {
    let count = egress.len();
    if count > EGRESS_GRANTS_MAX {
        let rule = format!("at most {EGRESS_GRANTS_MAX} grants are allowed");
        return Err(RuleError::invalid(
            "spec.egress",
            format!("{count} grants"),
            rule,
        ));
    }
    let mut grants = Vec::with_capacity(count);
    for (index, text) in egress.iter().enumerate() {
        let field = format!("spec.egress[{index}]");
        let grant = egress::grant(&field, text)?;
        if grants.contains(&grant) {
            return Err(RuleError::invalid(
                field,
                text,
                "it is granted twice; once is enough",
            ));
        }
        grants.push(grant);
    }
    Ok(grants)
}

#[cfg(test)]
pub(crate) use tests::sample;

#[cfg(test)]
mod tests {
    use spore_api::release::{ReleaseSpec, ResourceSpec, Warm};
    use spore_wire::id::ImageId;

    use super::rules;
    use crate::store::record::release::{ReleaseRecord, StoredState};

    pub(crate) fn spec() -> ReleaseSpec {
        ReleaseSpec {
            image: "debian/python3".parse().unwrap(),
            command: vec!["python3".to_owned(), "app.py".to_owned()],
            port: 8000,
            resources: ResourceSpec::default(),
            idle: Default::default(),
            warm: Default::default(),
            health: Default::default(),
            egress: Vec::new(),
            secrets: Default::default(),
            environment: Vec::new(),
        }
    }

    pub(crate) fn sample(number: u64) -> ReleaseRecord {
        ReleaseRecord {
            number,
            state: StoredState::Retired,
            image: ImageId::from_hash([1; 32]),
            image_bytes: 0,
            folder_bytes: 0,
            folder: None,
            rules: rules(&spec()).unwrap(),
            created_at_ms: 0,
            failure: None,
        }
    }

    type Spoil = fn(&mut ReleaseSpec);

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table reads better whole")]
    fn what_is_out_of_its_limits_is_refused_by_field_and_value() {
        let table: &[(&str, Spoil)] = &[
            ("spec.port", |s| s.port = 0),
            ("spec.command", |s| s.command.clear()),
            ("spec.command", |s| s.command = vec![String::new()]),
            ("spec.command", |s| s.command = vec!["  ".to_owned()]),
            ("spec.command", |s| s.command = vec!["a".to_owned(); 257]),
            ("spec.command[1]", |s| s.command[1] = "a\0b".to_owned()),
            ("spec.command[1]", |s| s.command[1] = "a".repeat(40_000)),
            ("spec.resources.cpus", |s| s.resources.cpus = 0),
            ("spec.resources.cpus", |s| s.resources.cpus = 5),
            ("spec.resources.memory_mib", |s| s.resources.memory_mib = 63),
            ("spec.resources.memory_mib", |s| {
                s.resources.memory_mib = 32_769
            }),
            ("spec.resources.disk_mib", |s| s.resources.disk_mib = 0),
            ("spec.idle.after_ms", |s| s.idle.after_ms = 999),
            ("spec.idle.after_ms", |s| s.idle.after_ms = u64::MAX),
            ("spec.health.timeout_ms", |s| s.health.timeout_ms = 0),
            ("spec.health.timeout_ms", |s| s.health.timeout_ms = 600_001),
            ("spec.health.path", |s| {
                s.health.path = Some("healthz".to_owned())
            }),
            ("spec.health.path", |s| {
                s.health.path = Some("/a b".to_owned())
            }),
            ("spec.health.path", |s| {
                s.health.path = Some("/a\r\nX: y".to_owned())
            }),
            ("spec.secrets.names[1]", |s| {
                s.secrets.names = vec!["A".parse().unwrap(), "A".parse().unwrap()];
            }),
            ("spec.secrets.files[1]", |s| {
                s.secrets.files = vec!["A".parse().unwrap(), "A".parse().unwrap()];
            }),
            ("spec.secrets", |s| {
                s.secrets.names = vec!["A".parse().unwrap(); 129]
            }),
            ("spec.environment[0]", |s| {
                s.environment = vec![("PORT".to_owned(), "1".to_owned())];
            }),
            ("spec.environment[0]", |s| {
                s.environment = vec![("SPORE_APP".to_owned(), "1".to_owned())];
            }),
            ("spec.environment[0]", |s| {
                s.environment = vec![("A=B".to_owned(), "1".to_owned())];
            }),
            ("spec.environment[1]", |s| {
                s.environment = vec![("A".to_owned(), String::new()); 2];
            }),
            ("spec.environment[0]", |s| {
                s.secrets.names = vec!["A".parse().unwrap()];
                s.environment = vec![("A".to_owned(), String::new())];
            }),
            ("spec.warm", |s| {
                s.warm = Warm::Ready;
                s.secrets.names = vec!["A".parse().unwrap()];
            }),
            ("spec.warm", |s| {
                s.warm = Warm::Ready;
                s.secrets.files = vec!["A".parse().unwrap()];
            }),
            ("spec.egress[0]", |s| {
                s.egress = vec!["*.example.com:443".to_owned()]
            }),
            ("spec.egress[1]", |s| {
                s.egress = vec!["example.com:443".to_owned(); 2]
            }),
            ("spec.egress", |s| {
                s.egress = vec!["example.com:443".to_owned(); 65]
            }),
        ];
        rules(&spec()).unwrap();
        let warm = Warm::Ready;
        rules(&ReleaseSpec { warm, ..spec() }).unwrap();
        for (field, spoil) in table {
            let mut spec = spec();
            spoil(&mut spec);
            let error = rules(&spec).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("`{field}` is ")),
                "{field}: {error}"
            );
            assert!(error.len() < 500, "{error}");
        }
    }
}
