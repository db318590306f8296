//! The daemon's configuration, the environment, and what is wrong in them.

use std::ffi::OsString;
use std::time::Duration;

use std::num::NonZeroU64;

use spore_wire::launch::Rates;

use super::{CliConfig, Colour, Desktop, HypervisorChoice, Screen, ServerConfig};
use crate::log::{LogConfig, LogFormat};

fn with(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> + use<> {
    let pairs: Vec<(String, OsString)> = pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).into()))
        .collect();
    move |name| {
        pairs
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    }
}

#[test]
fn an_empty_file_means_the_defaults() {
    assert_eq!(
        ServerConfig::default().parse("s", "").unwrap(),
        ServerConfig::default()
    );
}

#[test]
fn a_file_that_was_named_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spore.toml");
    let error = ServerConfig::read(Some(&path)).unwrap_err().to_string();
    assert!(error.contains("--config"), "{error}");
    std::fs::write(&path, "base = \"apps.example.org\"").unwrap();
    assert_eq!(
        ServerConfig::read(Some(&path)).unwrap().base,
        "apps.example.org"
    );
}

#[test]
fn every_key_is_read() {
    let text = r#"
            data_dir = "/d"
            runtime_dir = "/r"
            log_dir = "/l"
            base = "apps.example.org"
            gateway = "127.0.0.2:80"
            api = "127.0.0.1:9000"
            config_dir = "/c"
            uid_first = 300000
            uid_count = 500
            gateway_uid = 299999
            resolvers = ["127.0.0.53:53", "[::1]:5353"]
            memory_reserve = "1GiB"
            templates = false
            snapshot_memory = "3GiB"
            image_quota = "2GiB"
            hypervisor = "auto"
            vmm = "/v"
            disk_bandwidth = "200MiB"
            disk_operations = 5000
            network_bandwidth = "1GiB"
            kernel = "/k"
            kernel_arguments = "nohz=off"
            initramfs = "/i"
            base_images = "/b"
            cgroup_parent = "spore.slice/vms"
            boot_timeout = "5m"
            log = "warn,spore_node=debug"
            log_format = "json"
        "#;
    let config = ServerConfig::default().parse("s", text).unwrap();
    let expected = ServerConfig {
        data_dir: "/d".into(),
        runtime_dir: "/r".into(),
        log_dir: "/l".into(),
        base: "apps.example.org".into(),
        gateway: "127.0.0.2:80".parse().unwrap(),
        api: "127.0.0.1:9000".parse().unwrap(),
        config_dir: "/c".into(),
        uid_first: 300_000,
        uid_count: 500,
        gateway_uid: 299_999,
        resolvers: vec![
            "127.0.0.53:53".parse().unwrap(),
            "[::1]:5353".parse().unwrap(),
        ],
        memory_reserve_mib: 1024,
        templates: false,
        snapshot_memory_mib: Some(3072),
        image_quota_mib: 2048,
        hypervisor: HypervisorChoice::Auto,
        vmm: "/v".into(),
        rates: Rates {
            disk_bytes: NonZeroU64::new(200 << 20),
            disk_operations: NonZeroU64::new(5000),
            network_bytes: NonZeroU64::new(1 << 30),
        },
        kernel: "/k".into(),
        kernel_arguments: "nohz=off".parse().unwrap(),
        initramfs: "/i".into(),
        base_images: "/b".into(),
        cgroup_parent: "spore.slice/vms".into(),
        boot_timeout: Duration::from_secs(300),
        log: LogConfig {
            filter: "warn,spore_node=debug".into(),
            format: LogFormat::Json,
        },
    };
    assert_eq!(config, expected);
}

#[test]
fn what_is_wrong_is_refused_with_its_line_and_what_is_right() {
    for (text, expected) in [
        (
            "\ndatadir = \"/x\"",
            "s:2: unknown key `datadir`. Did you mean `data_dir`?",
        ),
        (
            "disk_bandwidth = \"0MiB\"",
            "a size such as \"256MiB\" or \"1GiB\", from 1MiB to 1024GiB",
        ),
        ("disk_operations = 0", "from 50 to 10000000"),
        (
            "network_bandwidth = 10",
            "`network_bandwidth = 10` is a whole number",
        ),
        ("zebra = 1", "Known here: data_dir, runtime_dir"),
        ("data_dir = \"x\"", "begins with /"),
        (
            "templates = \"no\"",
            "`templates = \"no\"` is a text, but must be true or false",
        ),
        (
            "data_dir = 3",
            "`data_dir = 3` is a whole number, but must be a text in quotes",
        ),
        ("log_dir = \"/x/../y\"", "has no .."),
        ("gateway = \"8080\"", "such as 127.0.0.1:8080"),
        ("gateway = \"127.0.0.1:0\"", "such as 127.0.0.1:8080"),
        ("gateway = \"0.0.0.0:80\"", "loopback only"),
        ("api = \"192.0.2.1:8889\"", "loopback only"),
        ("api = \"127.0.0.1:8080\"", "use another port"),
        ("uid_first = 0", "from 100000 to"),
        ("gateway_uid = 200000", "use a lower one"),
        (
            "log = \"loud=verbose\"",
            "such as `info,spore_gateway=debug`",
        ),
        ("log_format = \"xml\"", "must be `text` or `json`"),
        ("boot_timeout = \"1s\"", "from 10s to 1h"),
        ("hypervisor = \"xen\"", "it must be auto, kvm or qemu"),
        ("kernel_arguments = \"init=/sh\"", "first program"),
        ("resolvers = \"9.9.9.9:53\"", "a list"),
        ("resolvers = [\"9.9.9.9\"]", "such as 127.0.0.53:53"),
        ("resolvers = [\"0.0.0.0:53\"]", "such as 127.0.0.53:53"),
        ("memory_reserve = 512", "a size such as"),
        ("memory_reserve = \"512MB\"", "`MB` is not a unit"),
        ("base = \"Local_Host\"", "lower case"),
        ("cgroup_parent = \"/x\"", "without a leading /"),
    ] {
        let error = ServerConfig::default()
            .parse("s", text)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("s:") && error.contains(expected),
            "{text}: {error}"
        );
    }
}

#[test]
fn a_named_host_wins_over_the_environment_and_brings_the_token() {
    let environment = with(&[("SPORE_HOST", "/run/other.sock"), ("SPORE_TOKEN", "t\n")]);
    let config = CliConfig::read(Some("127.0.0.1:9"), &environment).unwrap();
    assert_eq!(config.endpoint.to_string(), "http://127.0.0.1:9");
    assert_eq!(config.token.as_deref(), Some("t"));
    let config = CliConfig::read(None, &environment).unwrap();
    assert_eq!(config.endpoint.to_string(), "unix:/run/other.sock");
    assert_eq!(config.token, None, "a socket knows who calls");
}

#[test]
fn the_token_is_found_in_the_users_own_folder() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join(".config/spore");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("token"), "abc\n").unwrap();
    let home = home.path().to_str().unwrap();
    let environment = with(&[("HOME", home), ("SPORE_HOST", "127.0.0.1:9")]);
    let config = CliConfig::read(None, &environment).unwrap();
    assert_eq!(config.token.as_deref(), Some("abc"));
    std::fs::write(folder.join("token"), "a b\nc\n").unwrap();
    let error = CliConfig::read(None, &environment).unwrap_err().to_string();
    assert!(error.contains("is not a token"), "{error}");
}

#[test]
fn a_wrong_host_names_the_variable() {
    let error = CliConfig::read(None, &with(&[("SPORE_HOST", "a b")])).unwrap_err();
    assert!(
        error.to_string().starts_with("SPORE_HOST: `a b`"),
        "{error}"
    );
}

#[test]
fn no_color_and_dumb_terminals_are_obeyed() {
    assert_eq!(
        Screen::read(&with(&[("TERM", "xterm")])).colour,
        Colour::Auto
    );
    assert_eq!(
        Screen::read(&with(&[("TERM", "dumb")])).colour,
        Colour::Never
    );
    let screen = Screen::read(&with(&[("NO_COLOR", "1"), ("DISPLAY", ":0")]));
    assert_eq!(
        (screen.colour, screen.desktop),
        (Colour::Never, Desktop::Present)
    );
}
