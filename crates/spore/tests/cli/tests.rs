//! The tests of this folder.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::json;
use spore_api::release::CreateRelease;
use tempfile::{TempDir, tempdir};

use crate::fake::{Fake, NOTES, SANDBOX, SNAPSHOT, TOKEN};

/// What a run printed and how it ended.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The program in an empty environment.
fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spore"));
    command
        .env_clear()
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

/// Copies the program, by another process: were the copy open for writing here while a test beside
/// this one starts a process, that would inherit it, and nobody could run the copy.
fn copy_program(to: &Path) {
    let mut cp = Command::new("cp");
    cp.arg(env!("CARGO_BIN_EXE_spore")).arg(to);
    assert!(cp.status().unwrap().success());
}

fn spore(fake: &Fake, args: &[&str]) -> Command {
    let mut command = bare();
    command
        .env("SPORE_HOST", fake.address.to_string())
        .env("SPORE_TOKEN", TOKEN)
        .args(args);
    command
}

fn run(fake: &Fake, args: &[&str]) -> Ran {
    spore(fake, args).output().unwrap().into()
}

fn run_with_input(fake: &Fake, args: &[&str], input: &[u8]) -> Ran {
    let mut command = spore(fake, args);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // On a thread, as a program that echoes is read while it is written to.
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let ran = child.wait_with_output().unwrap().into();
    // A program that refuses its input leaves before all of it is written.
    drop(writer.join().unwrap());
    ran
}

fn app(manifest: &str) -> TempDir {
    let folder = tempdir().unwrap();
    std::fs::write(folder.path().join("spore.toml"), manifest).unwrap();
    std::fs::write(folder.path().join("app.py"), "print('hello')\n").unwrap();
    std::fs::write(folder.path().join(".env"), "KEY=1\n").unwrap();
    folder
}

fn manifest(name: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"debian/python3\"\n\
         command = [\"python3\", \"app.py\"]\nport = 8000\n"
    )
}

/// Compares with a golden file, without what differs from run to run.
fn golden(name: &str, ran: &Ran) {
    let mut text = format!("exit: {}\n", ran.code.unwrap());
    for (stream, printed) in [("stdout", &ran.stdout), ("stderr", &ran.stderr)] {
        text.push_str(&format!("--- {stream}\n"));
        for line in printed.lines() {
            text.push_str(&without_time(line));
            text.push('\n');
        }
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden");
    let path = path.join(format!("{name}.txt"));
    if std::env::var_os("SPORE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "golden file {name}");
}

/// A step ends with the time it took.
fn without_time(line: &str) -> String {
    let is_step = line.starts_with("  uploaded ");
    match line.trim_end().rsplit_once("  ") {
        Some((step, _time)) if is_step => format!("{}  TIME", step.trim_end()),
        _ => line.to_owned(),
    }
}

#[test]
fn help_is_as_it_was() {
    let verbs: [&[&str]; 40] = [
        &["--help"],
        &["-h"],
        &["deploy", "--help"],
        &["ps", "--help"],
        &["status", "--help"],
        &["open", "--help"],
        &["logs", "--help"],
        &["exec", "--help"],
        &["shell", "--help"],
        &["cp", "--help"],
        &["wake", "--help"],
        &["stop", "--help"],
        &["enable", "--help"],
        &["disable", "--help"],
        &["rollback", "--help"],
        &["rm", "--help"],
        &["secret", "--help"],
        &["secret", "set", "--help"],
        &["secret", "ls", "--help"],
        &["secret", "rm", "--help"],
        &["image", "--help"],
        &["image", "ls", "--help"],
        &["image", "build", "--help"],
        &["image", "rm", "--help"],
        &["image", "gc", "--help"],
        &["checkpoint", "--help"],
        &["fork", "--help"],
        &["sandbox", "--help"],
        &["sandbox", "ls", "--help"],
        &["sandbox", "exec", "--help"],
        &["sandbox", "rollback", "--help"],
        &["sandbox", "rm", "--help"],
        &["snapshot", "--help"],
        &["snapshot", "ls", "--help"],
        &["snapshot", "info", "--help"],
        &["snapshot", "rm", "--help"],
        &["snapshot", "compact", "--help"],
        &["snapshot", "gc", "--help"],
        &["doctor", "--help"],
        &["completions", "--help"],
    ];
    for args in verbs {
        let ran: Ran = bare().args(args).output().unwrap().into();
        golden(&format!("help-{}", args.join("-").replace("--", "")), &ran);
    }
}

#[test]
fn output_for_people_is_as_it_was() {
    let fake = Fake::start();
    for (name, args) in [
        ("ps", &["ps"][..]),
        ("status", &["status"]),
        ("status-app", &["status", "notes"]),
        ("status-failing", &["status", "sleepy"]),
        ("open", &["open", "notes"]),
        ("logs", &["logs", "notes", "--tail", "3"]),
        ("wake", &["wake", "notes"]),
        ("wake-failed", &["wake", "sleepy"]),
        ("stop", &["stop", "notes"]),
        ("enable", &["enable", "notes"]),
        ("disable", &["disable", "notes"]),
        ("rollback", &["rollback", "notes", "--to", "1"]),
        ("rm", &["rm", "notes", "--yes"]),
        ("rm-no-terminal", &["rm", "notes"]),
        ("not-found", &["stop", "nosuch"]),
        ("secret-ls", &["secret", "ls", "notes"]),
        (
            "secret-rm",
            &["secret", "rm", "notes", "API_KEY", "--restart"],
        ),
        ("image-ls", &["image", "ls"]),
        (
            "image-build",
            &[
                "image",
                "build",
                "debian/node",
                "--packages",
                "nodejs,ca-certificates",
            ],
        ),
        ("image-rm", &["image", "rm", "debian/python3"]),
        ("image-gc", &["image", "gc", "--dry-run"]),
        ("usage-verb", &["depoly"]),
        ("usage-name", &["stop", "No"]),
        ("usage-count", &["logs", "notes", "-n", "few"]),
        ("usage-host", &["ps", "--host", ":::"]),
        ("usage-build", &["image", "build", "x"]),
        ("usage-cp", &["cp", "a", "b"]),
        ("usage-env", &["exec", "notes", "-e", "A", "true"]),
        (
            "usage-timeout",
            &["exec", "notes", "--timeout", "5", "true"],
        ),
    ] {
        golden(name, &run(&fake, args));
    }
}

#[test]
fn output_about_sandboxes_is_as_it_was() {
    let fake = Fake::start();
    for (name, args) in [
        ("checkpoint", &["checkpoint", "notes", "--tag", "warm"][..]),
        (
            "checkpoint-secrets",
            &["checkpoint", "sleepy", "--tag", "warm"],
        ),
        ("fork", &["fork", "warm", "-n", "2"]),
        ("fork-some", &["fork", "full", "-n", "3"]),
        ("sandbox-ls", &["sandbox", "ls"]),
        ("sandbox-rollback", &["sandbox", "rollback", SANDBOX]),
        (
            "sandbox-rollback-to",
            &["sandbox", "rollback", SANDBOX, "--to", "warm"],
        ),
        ("sandbox-rm", &["sandbox", "rm", SANDBOX, SANDBOX]),
        (
            "sandbox-not-found",
            &["sandbox", "rm", "bbbbbbbbbbbbbbbbbbbbbbbbbb"],
        ),
        ("snapshot-ls", &["snapshot", "ls"]),
        ("snapshot-info", &["snapshot", "info", "warm"]),
        ("snapshot-rm", &["snapshot", "rm", "warm", "--cascade"]),
        ("snapshot-compact", &["snapshot", "compact", "warm"]),
        ("snapshot-gc", &["snapshot", "gc", "--dry-run"]),
        ("usage-tag", &["checkpoint", "notes", "--tag", "No Tag"]),
        ("usage-sandbox", &["sandbox", "rm", "notes"]),
        ("usage-forks", &["fork", "notes", "-n", "0"]),
    ] {
        golden(name, &run(&fake, args));
    }
}

#[test]
fn with_json_a_wrong_command_line_is_json_too() {
    for (args, words) in [
        (&["--json", "depoly"][..], "deploy"),
        (&["--json"], "no verb"),
        (&["stop", "No", "--json"], "`No` is not allowed"),
        (&["logs", "--json"], "<APP>"),
        (&["ps", "--json", "--host", ":::"], "not an address"),
    ] {
        let ran: Ran = bare().args(args).output().unwrap().into();
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args:?}");
        let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(error["code"], "usage", "{args:?}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(words), "{args:?}: {message}");
        assert!(!message.contains("Usage:") && !message.contains("--help"));
    }
    // The program's own option, not ours.
    let ran: Ran = bare()
        .args(["exec", "--", "ls", "--json"])
        .output()
        .unwrap()
        .into();
    assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
}

#[test]
fn a_fork_that_is_not_whole_tells_each_and_fails() {
    let fake = Fake::start();
    let ran = run(&fake, &["fork", "full", "-n", "3", "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(1), ""));
    let forks: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let codes: Vec<_> = forks.as_array().unwrap().iter().collect();
    assert_eq!(codes.len(), 3);
    assert!(codes[0].get("error").is_none());
    assert_eq!(codes[2]["error"]["code"], "no_capacity");
}

#[test]
fn a_program_runs_in_a_sandbox() {
    let fake = Fake::start();
    let exec = ["sandbox", "exec", SANDBOX, "-e", "A=1", "--", "exit", "7"];
    let ran = run(&fake, &exec);
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    assert_eq!(
        fake.started().environment,
        [("A".to_owned(), "1".to_owned())]
    );
}

#[test]
fn verbs_of_the_daemon_are_offered_to_nobody() {
    let scripts = ["bash", "zsh", "fish"].map(|shell| vec!["completions", shell]);
    for args in scripts
        .into_iter()
        .chain([vec!["--help"], vec!["--host", "x"]])
    {
        let ran: Ran = bare().args(&args).output().unwrap().into();
        let said = ran.stdout + &ran.stderr;
        assert!(
            said.contains("deploy") || said.contains("--help"),
            "{args:?}: {said}"
        );
        for verb in ["keep-token", "image-pack", "egress", "jail"] {
            assert!(!said.contains(verb), "{args:?}: {verb}");
        }
    }
}

#[test]
fn json_has_the_shapes_of_the_interface() {
    let fake = Fake::start();
    let notes: serde_json::Value = serde_json::from_str(NOTES).unwrap();
    let json = |args: &[&str]| -> serde_json::Value {
        let ran = run(&fake, &[args, &["--json"]].concat());
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{args:?}");
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    };
    for verb in ["wake", "stop", "enable", "disable", "status"] {
        assert_eq!(json(&[verb, "notes"]), notes, "{verb}");
    }
    assert_eq!(json(&["ps"])["items"][0], notes);
    assert_eq!(json(&["status"])["boundary_text"], "none (qemu-tcg)");
    assert_eq!(
        json(&["open", "notes"])["url"],
        "http://notes.localhost:8080/"
    );
    assert_eq!(
        json(&["secret", "ls", "notes"])["items"][0]["name"],
        "API_KEY"
    );
    assert_eq!(json(&["secret", "rm", "notes", "A"])["target"], "A");
    assert_eq!(json(&["image", "ls"])["items"][0]["used_by"], 2);
    assert_eq!(json(&["image", "rm", "x"])["done"], "removed");
    assert_eq!(json(&["image", "gc"])["bytes"], 1_048_576);
    assert_eq!(
        json(&["image", "build", "x", "--packages", "a"])["state"],
        "succeeded"
    );
    assert_eq!(json(&["rm", "notes", "--yes"])["target"], "notes");
    let rolled = json(&["rollback", "notes"]);
    assert_eq!(
        (&rolled["operation"]["kind"], &rolled["app"]),
        (&"rollback".into(), &notes)
    );
    let (open, snapshot): (serde_json::Value, serde_json::Value) = (
        json(&["sandbox", "rollback", SANDBOX]),
        serde_json::from_str(SNAPSHOT).unwrap(),
    );
    assert_eq!(json(&["sandbox", "ls"])["items"][0], open);
    assert_eq!(json(&["sandbox", "rm", SANDBOX])["target"], SANDBOX);
    assert_eq!(json(&["snapshot", "ls"])["items"][0], snapshot);
    for verb in ["info", "compact"] {
        assert_eq!(json(&["snapshot", verb, "warm"]), snapshot, "{verb}");
    }
    let removed = json(&["snapshot", "rm", "warm"]);
    assert_eq!(removed["removed"].as_array().unwrap().len(), 2);
    assert_eq!(json(&["snapshot", "gc"])["bytes"], 4096);
    for of in ["notes", SANDBOX] {
        let taken = json(&["checkpoint", of, "--tag", "warm"]);
        assert_eq!(taken["pause_ms"], 2.5);
        assert_eq!(taken["snapshot"], snapshot);
    }
    assert_eq!(
        json(&["fork", "warm", "-n", "1"]),
        serde_json::json!([{"id": SANDBOX}])
    );
    let folder = app(&manifest("notes"));
    let deployed = json(&["deploy", folder.path().to_str().unwrap()]);
    assert_eq!(
        (&deployed["operation"]["result"], &deployed["app"]),
        (&"2".into(), &notes)
    );
    let ran = run(&fake, &["logs", "notes", "--json"]);
    let lines: Vec<serde_json::Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((lines.len(), &lines[1]["from"]), (3, &"stderr".into()));
}

#[test]
fn errors_are_json_where_json_is_wanted() {
    let fake = Fake::start();
    for (args, exit, code, blame) in [
        (&["stop", "nosuch", "--json"][..], 1, "not_found", "caller"),
        (&["wake", "sleepy", "--json"], 3, "app_failed", "app"),
        (&["rm", "notes", "--json"], 2, "usage", "caller"),
        (
            &["deploy", "/nonexistent/app", "--json"],
            1,
            "local",
            "caller",
        ),
        (
            &["--host", "/nonexistent/api.sock", "ps", "--json"],
            1,
            "unreachable",
            "platform",
        ),
    ] {
        let ran = run(&fake, args);
        let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (Some(exit), ""),
            "{args:?}"
        );
        assert_eq!(
            (&error["code"], &error["blame"]),
            (&code.into(), &blame.into()),
            "{args:?}"
        );
    }
}

#[test]
fn deploy_uploads_the_folder_and_makes_a_release() {
    let fake = Fake::start();
    let folder = app(&format!(
        "{}[resources]\nmemory = \"128MiB\"\n",
        manifest("notes")
    ));
    golden(
        "deploy",
        &run(&fake, &["deploy", folder.path().to_str().unwrap()]),
    );
    let asked = fake.asked();
    assert_eq!(asked[0].line, "POST /api/v1/sources");
    assert_eq!(asked[0].headers["content-type"], "application/zstd");
    let mut archive = tar::Archive::new(zstd::Decoder::new(asked[0].body.as_ref()).unwrap());
    let paths: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(paths, ["app.py", "spore.toml"]);
    assert_eq!(asked[1].line, "POST /api/v1/apps/notes/releases");
    assert_eq!(asked[1].headers["idempotency-key"].len(), 32);
    let release: CreateRelease = serde_json::from_slice(&asked[1].body).unwrap();
    assert_eq!(release.source.as_deref(), Some("s1"));
    assert_eq!(release.spec.resources.memory_mib, 128);
    assert!(
        asked[2]
            .line
            .starts_with("GET /api/v1/operations/deploy-running?wait_ms=")
    );
}

#[test]
fn deploy_makes_an_image_of_a_root_folder_first() {
    let fake = Fake::start();
    let text = manifest("notes").replace("debian/python3", "dir:./rootfs");
    let folder = app(&text);
    std::fs::create_dir_all(folder.path().join("rootfs/bin")).unwrap();
    std::fs::write(folder.path().join("rootfs/bin/python3"), "x").unwrap();
    let ran = run(&fake, &["deploy", folder.path().to_str().unwrap()]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let acts = fake.acts();
    assert_eq!(
        acts,
        [
            "POST /api/v1/sources?kind=root",
            "POST /api/v1/images",
            "POST /api/v1/sources",
            "POST /api/v1/apps/notes/releases"
        ]
    );
    let image: serde_json::Value = serde_json::from_slice(&fake.asked()[1].body).unwrap();
    assert_eq!(image["name"], "notes/rootfs");
    assert_eq!(image["from"]["source"], "s1");
}

#[test]
fn a_failed_deploy_shows_the_apps_last_lines_and_blames_the_app() {
    let fake = Fake::start();
    let folder = app(&manifest("broken"));
    golden(
        "deploy-failed",
        &run(&fake, &["deploy", folder.path().to_str().unwrap()]),
    );
}

#[test]
fn folders_that_cannot_be_deployed_are_refused_before_anything_is_sent() {
    let fake = Fake::start();
    let none = tempdir().unwrap();
    std::fs::write(none.path().join("main.py"), "").unwrap();
    let bad = app(&manifest("notes").replace("8000", "70000"));
    let link = app(&manifest("notes"));
    std::os::unix::fs::symlink("/etc/passwd", link.path().join("users")).unwrap();
    for (folder, words) in [
        (none.path(), "It looks like a Python project"),
        (bad.path(), "spore.toml:4: `port = 70000` is not possible"),
        (link.path(), "users is a link to /etc/passwd"),
        (Path::new("/nonexistent"), "there is no folder /nonexistent"),
    ] {
        let ran = run(&fake, &["deploy", folder.to_str().unwrap()]);
        assert_eq!(ran.code, Some(1));
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
    }
    assert!(fake.asked().is_empty());
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    let fake = Fake::start();
    let folder = app(&manifest("notes"));
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set(folder.path(), 0o755);
    set(&folder.path().join("app.py"), 0o000);
    let mut command = spore(&fake, &["deploy", folder.path().to_str().unwrap()]);
    // Root may read everything: then somebody else tries, with a copy that is within reach.
    let copy = tempdir().unwrap();
    if std::fs::read(folder.path().join("app.py")).is_ok() {
        set(copy.path(), 0o755);
        let program = copy.path().join("spore");
        copy_program(&program);
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        command = Command::new(program);
        command
            .env_clear()
            .env("SPORE_HOST", fake.address.to_string());
        command
            .env("SPORE_TOKEN", TOKEN)
            .args(args)
            .uid(65534)
            .gid(65534);
    }
    let ran: Ran = command.output().unwrap().into();
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("cannot read app.py"), "{}", ran.stderr);
}

#[test]
fn secrets_come_from_input_or_a_file_and_never_from_the_command_line() {
    let fake = Fake::start();
    let ran = run_with_input(&fake, &["secret", "set", "notes", "API_KEY"], b"hunter2\n");
    golden("secret-set", &ran);
    let body: serde_json::Value = serde_json::from_slice(&fake.asked()[0].body).unwrap();
    assert_eq!(body["value"], "hunter2");
    assert_eq!(fake.acts(), ["PUT /api/v1/apps/notes/secrets/API_KEY"]);
    let folder = tempdir().unwrap();
    let file = folder.path().join("env");
    std::fs::write(&file, "A=1\nB='two'\n").unwrap();
    let args = [
        "secret",
        "set",
        "notes",
        "--env-file",
        file.to_str().unwrap(),
        "--restart",
    ];
    let ran = run(&fake, &args);
    assert_eq!(ran.stdout, "A of notes is set\nB of notes is set\n");
    assert_eq!(
        fake.acts()[1..],
        [
            "PUT /api/v1/apps/notes/secrets/A",
            "PUT /api/v1/apps/notes/secrets/B",
            "POST /api/v1/apps/notes/restart",
        ]
    );
    for (input, words) in [
        (&b""[..], "the value is empty"),
        (b"\n", "the value is empty"),
        (b"\xff", "not UTF-8"),
        (b"a\0b", "NUL"),
        (&[b'x'; 70_000], "more than 65536 bytes"),
    ] {
        let ran = run_with_input(&fake, &["secret", "set", "notes", "A"], input);
        assert_eq!(ran.code, Some(1));
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
    }
    for more in [&[][..], &["--json"]] {
        let ran = run(
            &fake,
            &[&["secret", "set", "notes", "A", "hunter2"], more].concat(),
        );
        assert_eq!(ran.code, Some(2));
        assert!(ran.stderr.contains("pipe it"), "{}", ran.stderr);
        assert!(!ran.stderr.contains("hunter2"), "{}", ran.stderr);
    }
}

#[test]
fn exec_carries_input_output_and_the_exit_code() {
    let fake = Fake::start();
    let big = vec![b'x'; 3_000_000];
    let ran = run_with_input(&fake, &["exec", "notes", "cat"], &big);
    assert_eq!((ran.code, ran.stdout.len()), (Some(0), big.len()));
    let args = [
        "exec",
        "notes",
        "-e",
        "A=b=c",
        "-w",
        "/tmp",
        "--timeout",
        "5m",
        "--",
        "ls",
        "-l",
    ];
    let ran = run(&fake, &args);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("ls -l", "aside\n")
    );
    let start = fake.started();
    assert_eq!(start.environment, [("A".to_owned(), "b=c".to_owned())]);
    assert_eq!(
        (start.directory.as_deref(), start.timeout_ms),
        (Some("/tmp"), Some(300_000))
    );
    assert_eq!(start.pty, None, "there is no terminal here");
    for (args, exit, words) in [
        (&["exit", "7"][..], 7, ""),
        (&["exit", "255"], 255, ""),
        (&["die"], 137, ""),
        (&["late"], 124, "its time was up"),
        (&["refuse"], 3, "there is no program `refuse`"),
        (&["vanish"], 1, "before the program"),
    ] {
        let ran = run(&fake, &[&["exec", "notes"], args].concat());
        assert_eq!(ran.code, Some(exit), "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
    }
    let ran = run(&fake, &["exec", "nosuch", "true"]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr.contains("there is no app `nosuch`"),
        "{}",
        ran.stderr
    );
    let ran = run_with_input(&fake, &["shell", "notes"], b"");
    assert_eq!(ran.code, Some(0));
    assert_eq!(fake.started().argv[0], "/bin/sh");
}

#[test]
fn a_program_that_programs_run_is_told_as_one_json_document() {
    let fake = Fake::start();
    for before in [&["exec", "notes"][..], &["sandbox", "exec", SANDBOX]] {
        for (args, code, exit, out) in [
            (
                &["ls", "-l"][..],
                0,
                json!({"by": "code", "code": 0}),
                "ls -l",
            ),
            (&["exit", "7"], 7, json!({"by": "code", "code": 7}), ""),
            (&["die"], 137, json!({"by": "signal", "signal": 9}), ""),
            (&["late"], 124, json!({"by": "timeout"}), ""),
        ] {
            let ran = run(&fake, &[&["--json"], before, &["--"], args].concat());
            let aside = ["", "aside\n"][usize::from(!out.is_empty())];
            let told: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
            let expected = json!({"exit": exit, "stdout": out, "stderr": aside});
            assert_eq!((ran.code, told), (Some(code), expected), "{args:?}");
            assert_eq!(ran.stderr, "", "{args:?}");
        }
        let ran = run(&fake, &[&["--json"], before, &["refuse"]].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(3), ""));
        let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
        assert_eq!(error["code"], "app_failed");
    }
    let ran = run_with_input(&fake, &["exec", "--json", "notes", "cat"], b"a\xff");
    let told: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(told["stdout"], "a\u{fffd}");
    let much = vec![b'x'; 16 * 1024 * 1024 + 1];
    let ran = run_with_input(&fake, &["exec", "--json", "notes", "cat"], &much);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("leave --json out"), "{}", ran.stderr);
}

#[test]
fn a_signal_reaches_the_program_and_its_end_comes_back() {
    let fake = Fake::start();
    let mut command = spore(&fake, &["exec", "notes", "wait"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn files_are_copied_both_ways_and_through_pipes() {
    let fake = Fake::start();
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    assert_eq!(
        run(&fake, &["cp", "notes:/etc/file.txt", &path("")]).code,
        Some(0)
    );
    assert_eq!(std::fs::read_to_string(path("file.txt")).unwrap(), "file\n");
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "no part is left"
    );
    assert_eq!(
        run(&fake, &["cp", "notes:/etc/file.txt", "-"]).stdout,
        "file\n"
    );
    assert_eq!(
        run(&fake, &["cp", &path("file.txt"), "notes:/tmp/"]).code,
        Some(0)
    );
    let ran = run_with_input(&fake, &["cp", "-", "notes:/tmp/a b"], b"piped");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(
        fake.acts(),
        [
            "PUT /api/v1/apps/notes/files?path=%2Ftmp%2Ffile.txt&mode=644",
            "PUT /api/v1/apps/notes/files?path=%2Ftmp%2Fa%20b",
        ]
    );
    assert_eq!(fake.asked().last().unwrap().body.as_ref(), b"piped");
    let ran = run(&fake, &["cp", &path(""), "notes:/tmp/x"]);
    assert!(ran.stderr.contains("tar"), "{}", ran.stderr);
    let ran = run(&fake, &["cp", "nosuch:/x", &path("y")]);
    assert!(
        ran.stderr.contains("there is no app `nosuch`"),
        "{}",
        ran.stderr
    );
    assert!(!folder.path().join("y").exists());
}

#[test]
fn the_socket_needs_no_token_and_tcp_does() {
    let folder = tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let fake = Fake::listening(Some(&socket));
    let ran: Ran = bare()
        .args(["--host", socket.to_str().unwrap(), "ps"])
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let address = fake.address.to_string();
    let ran: Ran = bare()
        .args(["--host", &address, "ps"])
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("set SPORE_TOKEN"), "{}", ran.stderr);
}

#[test]
fn a_missing_daemon_is_told_with_what_to_do() {
    let folder = tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let ran: Ran = bare()
        .args(["--host", socket.to_str().unwrap(), "ps"])
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr
            .starts_with("error: cannot list the apps\n  cannot reach Spore at unix:")
    );
    assert!(
        ran.stderr.contains("Start it with `spore up`"),
        "{}",
        ran.stderr
    );
}

#[test]
fn completions_and_version_need_no_daemon() {
    for shell in ["bash", "zsh", "fish"] {
        let ran: Ran = bare().args(["completions", shell]).output().unwrap().into();
        assert_eq!(ran.code, Some(0));
        assert!(ran.stdout.contains("rollback"), "{shell}");
    }
    let ran: Ran = bare().arg("--version").output().unwrap().into();
    assert_eq!(ran.stdout, format!("spore {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_doctor_names_what_is_missing_and_says_what_to_do() {
    let folder = tempdir().unwrap();
    let config = folder.path().join("spore.toml");
    let missing = folder.path().join("no-kernel");
    std::fs::write(&config, format!("kernel = {missing:?}\n")).unwrap();
    let config = config.to_str().unwrap();
    let ran: Ran = bare()
        .args(["doctor", "--config", config])
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stdout.contains("no-kernel"), "{}", ran.stdout);
    assert!(ran.stdout.contains("`make up`"), "{}", ran.stdout);
    let ran: Ran = bare()
        .args(["doctor", "--json", "--config", config])
        .output()
        .unwrap()
        .into();
    let told: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(told["ready"], false);
    let findings = told["findings"].as_array().unwrap();
    let guest = findings.iter().find(|it| it["name"] == "guest").unwrap();
    assert_eq!(guest["verdict"], "missing");
    // Whether there is a KVM of use is this machine's; that it was asked is not.
    let kvm = findings.iter().find(|it| it["name"] == "kvm").unwrap();
    assert_ne!(kvm["verdict"], "missing", "{kvm}");
    assert!(
        !kvm["says"].as_str().unwrap().contains("ended with exit"),
        "{kvm}"
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let fake = Fake::start();
    let mut command = spore(&fake, &["logs", "notes"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran: Ran = command.stdout(writer).output().unwrap().into();
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

/// Nobody's uid on a machine that has no user with it.
const STRANGER: u32 = 399_999;

#[test]
fn a_users_copy_of_the_token_is_written_with_the_users_rights_only() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
    use std::os::unix::process::CommandExt as _;
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: becoming another user needs root");
        return;
    }
    let shared = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o755))
        .tempdir()
        .unwrap();
    // The build's own folder may be closed to others.
    let program = shared.path().join("spore");
    copy_program(&program);
    let home = shared.path().join("home");
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(STRANGER), Some(STRANGER)).unwrap();
    let keep = |uid: u32| -> Ran {
        let mut command = Command::new(&program);
        command.env_clear().current_dir("/").uid(uid).gid(uid);
        command.arg("keep-token").arg(&home);
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A process that refuses at once may have ended before it is told anything.
        child.stdin.take().unwrap().write_all(b"secret").ok();
        child.wait_with_output().unwrap().into()
    };

    let by_root = keep(0);
    assert_eq!(by_root.code, Some(1), "{}", by_root.stderr);
    assert!(!home.join(".config").exists());

    let owned_by_root = shared.path().join("of-root");
    std::fs::create_dir(&owned_by_root).unwrap();
    symlink(&owned_by_root, home.join(".config")).unwrap();
    let through_link = keep(STRANGER);
    assert_eq!(through_link.code, Some(1), "{}", through_link.stderr);
    assert!(
        through_link.stderr.contains("cannot make"),
        "{}",
        through_link.stderr
    );
    assert_eq!(std::fs::read_dir(&owned_by_root).unwrap().count(), 0);

    std::fs::remove_file(home.join(".config")).unwrap();
    let written = keep(STRANGER);
    assert_eq!(written.code, Some(0), "{}", written.stderr);
    let found = std::fs::metadata(home.join(".config/spore/token")).unwrap();
    assert_eq!(
        (found.uid(), found.gid(), found.mode() & 0o777),
        (STRANGER, STRANGER, 0o600)
    );
}
