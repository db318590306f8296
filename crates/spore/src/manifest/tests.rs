//! What a manifest may say, and how each thing it may not is refused.

use std::fs;

use proptest::prelude::{prop_assert, proptest};
use spore_api::release::IdleMode;

use super::{ImageChoice, Manifest};

const SMALL: &str = "name = \"notes\"\nimage = \"debian/python3\"\n\
    command = [\"python3\", \"app.py\"]\nport = 8000\n";

#[test]
fn the_smallest_manifest_gets_the_defaults() {
    let manifest = Manifest::parse("spore.toml", SMALL).unwrap();
    let ImageChoice::Named(image) = manifest.image.clone() else {
        panic!("{manifest:?}");
    };
    let spec = manifest.spec(image);
    assert_eq!(spec.port, 8000);
    assert_eq!(spec.resources.memory_mib, 256);
    assert_eq!(
        (spec.idle.after_ms, spec.idle.mode),
        (60_000, IdleMode::Stop)
    );
    assert!(spec.egress.is_empty() && spec.secrets.names.is_empty());
}

#[test]
fn everything_that_a_manifest_may_say_is_read() {
    let text = r#"
        name = "notes"
        image = "dir:./rootfs"
        command = ["./serve", "--fast"]
        port = 65535
        protocol = "http1"
        warm = "boot"
        environment = { MODE = "fast", EMPTY = "" }
        [resources]
        cpus = 2
        memory = "1GiB"
        disk = "16MiB"
        [idle]
        after = "1m30s"
        mode = "stop"
        [health]
        path = "/healthz?deep=1"
        timeout = "500s"
        [egress]
        allow = ["API.example.org:443", "10.20.0.5:5432"]
        [secrets]
        names = ["API_KEY"]
        files = ["CERT"]
        [volumes]
        [scale]
        max = 1
    "#;
    let manifest = Manifest::parse("spore.toml", text).unwrap();
    assert_eq!(manifest.image, ImageChoice::Folder("./rootfs".into()));
    let spec = manifest.spec("notes/rootfs".parse().unwrap());
    assert_eq!(
        (
            spec.resources.cpus,
            spec.resources.memory_mib,
            spec.resources.disk_mib
        ),
        (2, 1024, 16)
    );
    assert_eq!(
        (spec.idle.after_ms, spec.health.timeout_ms),
        (90_000, 500_000)
    );
    assert_eq!(spec.health.path.as_deref(), Some("/healthz?deep=1"));
    assert_eq!(spec.egress, ["api.example.org:443", "10.20.0.5:5432"]);
    assert_eq!(spec.environment[0], ("MODE".to_owned(), "fast".to_owned()));
    assert_eq!(spec.secrets.files[0].as_str(), "CERT");
}

/// A line that replaces or follows those of [`SMALL`], the line it is refused at, and words of the
/// refusal.
const REFUSED: &[(&str, usize, &str)] = &[
    (
        "colour = \"red\"",
        5,
        "unknown key `colour`. Known here: name, image",
    ),
    ("prot = 80", 5, "unknown key `prot`"),
    ("ports = 80", 5, "Did you mean `port`?"),
    ("[resource]", 5, "Did you mean `resources`?"),
    (
        "[resources]\nram = \"1GiB\"",
        6,
        "unknown key `resources.ram`. Known here: cpus, memory",
    ),
    (
        "name = 3",
        1,
        "`name = 3` is a whole number, but must be a text in quotes",
    ),
    ("name = \"My App\"", 1, "app name `My App` is not allowed"),
    ("name = \"a--b\"", 1, "without --"),
    ("name = \"\"", 1, "app name `` is not allowed"),
    (
        "image = \"oci:registry.example/x:1\"",
        2,
        "is not in this version. Use an image of",
    ),
    ("image = \"tar:./x.tar\"", 2, "is not in this version"),
    ("image = \"dir:\"", 2, "name the folder"),
    (
        "image = \"Debian\"",
        2,
        "image name `Debian` is not allowed",
    ),
    (
        "command = \"python3 app.py\"",
        3,
        "must be a list: `[\"python3\", \"app.py\"]`",
    ),
    ("command = []", 3, "name a program"),
    ("command = [\"\"]", 3, "name a program"),
    ("command = [\"a\", 3]", 3, "`command = 3` is a whole number"),
    ("command = [\"a\\u0000\"]", 3, "NUL"),
    (
        "port = 0",
        4,
        "`port = 0` is not possible: it must be a whole number from 1 to 65535",
    ),
    ("port = 70000", 4, "from 1 to 65535"),
    ("port = -1", 4, "from 1 to 65535"),
    ("port = 99999999999999999999", 4, "from 1 to 65535"),
    (
        "port = \"8000\"",
        4,
        "is a text, but must be a whole number",
    ),
    ("port = 80.5", 4, "is a fraction"),
    (
        "protocol = \"h2c\"",
        5,
        "`protocol = \"h2c\"` is not in this version",
    ),
    ("protocol = \"ftp\"", 5, "use \"http1\""),
    (
        "warm = \"ready\"\n[secrets]\nnames = [\"KEY\"]",
        5,
        "`warm = \"ready\"` is not possible: the memory of such an app is kept",
    ),
    (
        "warm = \"ready\"\n[secrets]\nfiles = [\"KEY\"]",
        5,
        "leave [secrets] out",
    ),
    ("warm = \"hot\"", 5, "use \"boot\" or \"ready\""),
    ("[resources]\ncpus = 0", 6, "from 1 to 4"),
    ("[resources]\ncpus = 5", 6, "from 1 to 4"),
    ("[resources]\nmemory = \"32MiB\"", 6, "from 64MiB to 32GiB"),
    (
        "[resources]\nmemory = \"256MB\"",
        6,
        "`MB` is not a unit here: MiB and GiB are",
    ),
    ("[resources]\nmemory = \"256\"", 6, "has no unit"),
    ("[resources]\nmemory = \"lots\"", 6, "`lots` is not a size"),
    (
        "[resources]\nmemory = 256",
        6,
        "must be a size such as \"256MiB\"",
    ),
    (
        "[resources]\ndisk = \"99999999999999999999GiB\"",
        6,
        "is not a size",
    ),
    ("[resources]\ndisk = \"1.5GiB\"", 6, "is not a unit"),
    ("resources = 3", 5, "must be a table"),
    ("[idle]\nafter = \"0s\"", 6, "from 1s to 1d"),
    ("[idle]\nafter = \"2d\"", 6, "from 1s to 1d"),
    ("[idle]\nafter = 60", 6, "must be a time such as \"60s\""),
    ("[idle]\nafter = \"60\"", 6, "has no unit"),
    ("[idle]\nafter = \"-5s\"", 6, "is not a time"),
    (
        "[idle]\nmode = \"sometimes\"",
        6,
        "use \"stop\", \"suspend\" or \"never\"",
    ),
    (
        "[idle]\nmode = \"never\"\nafter = \"60s\"",
        7,
        "leave one of them out",
    ),
    ("[health]\npath = \"healthz\"", 6, "such as \"/healthz\""),
    ("[health]\npath = \"/a b\"", 6, "without spaces"),
    ("[health]\ntimeout = \"1h\"", 6, "from 1s to 10m"),
    (
        "[egress]\nallow = [\"*.example.org:443\"]",
        6,
        "is not in this version. Name each host",
    ),
    (
        "[egress]\nallow = [\"10.0.0.0/8\"]",
        6,
        "is not in this version",
    ),
    (
        "[egress]\nallow = [\"[::1]:443\"]",
        6,
        "is not in this version. Apps have no IPv6",
    ),
    (
        "[egress]\nallow = [\"example.org\"]",
        6,
        "use \"HOST:PORT\"",
    ),
    (
        "[egress]\nallow = [\"https://example.org:443\"]",
        6,
        "use \"HOST:PORT\"",
    ),
    (
        "[egress]\nallow = [\"example.org:0\"]",
        6,
        "use \"HOST:PORT\"",
    ),
    ("[egress]\nallow = [\"1.2.3:80\"]", 6, "use \"HOST:PORT\""),
    ("[egress]\nallow = [\"127.0.0.1:80\"]", 6, "name another"),
    ("[egress]\nallow = [\"10.42.0.1:53\"]", 6, "name another"),
    (
        "[egress]\nallow = [\"database:5432\"]",
        6,
        "use \"HOST:PORT\"",
    ),
    ("[egress]\nallow = [\"a-.b:1\"]", 6, "use \"HOST:PORT\""),
    ("[egress]\nallow = [\"a.-b:1\"]", 6, "use \"HOST:PORT\""),
    ("[egress]\nallow = [\"localhost:80\"]", 6, "an app is alone"),
    (
        "[egress]\nallow = [\"a.b:1\",\n\"A.b:1\"]",
        7,
        "there twice",
    ),
    (
        "[egress]\nallow = \"a.b:1\"",
        6,
        "must be a list: `[\"a.b:1\"]`",
    ),
    ("[egress]\ndeny = []", 6, "unknown key `egress.deny`"),
    (
        "[secrets]\nnames = [\"1X\"]",
        6,
        "secret name `1X` is not allowed",
    ),
    ("[secrets]\nnames = [\"PORT\"]", 6, "not PORT"),
    (
        "[secrets]\nnames = [\"A\"]\nfiles = [\"A\"]",
        7,
        "there twice",
    ),
    (
        "[volumes]\n\"/data\" = { name = \"d\", size = \"1GiB\" }",
        6,
        "is not in this version",
    ),
    (
        "[scale]\nmax = 3",
        6,
        "`scale.max = 3` is not in this version",
    ),
    ("[scale]\nmax = 0", 6, "from 1 to 1000"),
    ("[environment]\nPORT = \"1\"", 6, "is not PORT"),
    ("[environment]\n\"A-B\" = \"1\"", 6, "made of A-Z"),
    ("[environment]\nA = 1", 6, "must be a text in quotes"),
    (
        "environment = { A = \"1\" }\n[secrets]\nnames = [\"A\"]",
        5,
        "sets the same variable",
    ),
    ("name", 5, "this is not TOML"),
];

/// [`SMALL`] with `lines` after it; a first line for a key that is there takes its place.
fn with(lines: &str) -> String {
    let key = lines.split(' ').next().unwrap_or_default();
    let is_old = |line: &&str| lines.contains(" = ") && line.starts_with(&format!("{key} = "));
    match SMALL.lines().find(is_old) {
        Some(old) => SMALL.replace(old, lines),
        None => format!("{SMALL}{lines}\n"),
    }
}

#[test]
fn what_is_wrong_is_refused_with_its_line_and_what_would_be_right() {
    for (lines, line, words) in REFUSED {
        let error = Manifest::parse("spore.toml", &with(lines))
            .unwrap_err()
            .to_string();
        let place = format!("spore.toml:{line}: ");
        assert!(error.starts_with(&place), "{lines:?}: {error}");
        assert!(error.contains(words), "{lines:?}: {error}");
    }
}

#[test]
fn what_is_missing_is_told_with_a_line_to_add() {
    for key in ["name", "image", "command", "port"] {
        let text: String = SMALL
            .lines()
            .filter(|line| !line.starts_with(key))
            .map(|l| format!("{l}\n"))
            .collect();
        let error = Manifest::parse("spore.toml", &text)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("`{key}` is missing. Add `{key} = ")),
            "{error}"
        );
    }
}

#[test]
fn folders_without_a_manifest_are_refused_with_one_to_paste() {
    let folder = tempfile::tempdir().unwrap();
    let app = folder.path().join("notes");
    let error = Manifest::read(&app).unwrap_err().to_string();
    assert!(error.contains("there is no folder"), "{error}");
    fs::create_dir(&app).unwrap();
    fs::write(app.join("app.py"), "").unwrap();
    let error = Manifest::read(&app).unwrap_err().to_string();
    assert!(
        error.contains("has no spore.toml. It looks like a Python project"),
        "{error}"
    );
    assert!(
        error.contains("name    = \"notes\"\nimage   = \"debian/python3\""),
        "{error}"
    );
    let error = Manifest::read(&app.join("app.py")).unwrap_err().to_string();
    assert!(error.contains("is not a folder"), "{error}");
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "[a-z\\[\\]={}\"., \n0-9]{0,80}") {
        drop(Manifest::parse("spore.toml", &format!("{SMALL}{text}")));
    }

    #[test]
    fn every_port_in_range_is_taken_and_no_other(port in -10_i64..70_000) {
        let text = SMALL.replace("8000", &port.to_string());
        prop_assert!(Manifest::parse("f", &text).is_ok() == (1..=65535).contains(&port));
    }
}
