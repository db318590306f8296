//! What a confined helper process has, and has not, read from outside by root.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::tests_outside_test_module,
    reason = "the whole program is tests: a failed step ends its test, and a skip is said"
)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    println!("SKIPPED: confining a process needs root");
    false
}

fn start(network: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_spore-node-confined"))
        .arg(network)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "confined\n");
    (child, out)
}

fn tell(child: &mut Child, out: &mut impl BufRead, order: &str) -> String {
    child
        .stdin
        .take()
        .unwrap()
        .write_all(format!("{order}\n").as_bytes())
        .unwrap();
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    line
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    std::fs::read_link(Path::new("/proc").join(pid).join("ns").join(kind)).unwrap()
}

#[test]
fn a_confined_process_has_its_uid_filter_and_nothing_else() {
    if !is_root() {
        return;
    }
    let (mut child, _out) = start("empty");
    let pid = child.id().to_string();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':')
            .unwrap()
            .1
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(field("Uid"), "213000 213000 213000 213000");
    assert_eq!(field("Gid"), "213000 213000 213000 213000");
    assert_eq!(field("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut fds = fds
        .map(|fd| fd.unwrap().file_name().into_string().unwrap())
        .collect::<Vec<_>>();
    fds.sort();
    assert_eq!(fds, ["0", "1", "2"]);
    for kind in ["mnt", "ipc", "uts", "net"] {
        assert_ne!(namespace(&pid, kind), namespace("self", kind), "{kind}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(name.split(' ').count())
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(limit("Max core file size"), "1 1");
    assert_eq!(limit("Max open files"), "64 64");
    assert_eq!(limit("Max processes"), "16 16");
    assert_eq!(limit("Max locked memory"), "0 0");
    assert_eq!(limit("Max msgqueue size"), "0 0");
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn its_root_is_empty_and_cannot_be_written() {
    if !is_root() {
        return;
    }
    let (mut child, mut out) = start("empty");
    assert_eq!(tell(&mut child, &mut out, "look"), "0\n");
    child.wait().unwrap();
    let (mut child, mut out) = start("empty");
    assert_eq!(tell(&mut child, &mut out, "write"), "true\n");
    child.wait().unwrap();
}

#[test]
fn it_is_killed_when_it_runs_a_program() {
    if !is_root() {
        return;
    }
    let (mut child, mut out) = start("empty");
    tell(&mut child, &mut out, "exec");
    let status = child.wait().unwrap();
    // The filter kills the forked child that calls execve; its parent reads an error or ends.
    assert!(
        status.signal() == Some(libc::SIGSYS) || status.success(),
        "{status}"
    );
}

#[test]
fn a_dialler_keeps_the_hosts_network() {
    if !is_root() {
        return;
    }
    let (mut child, _out) = start("host");
    let pid = child.id().to_string();
    assert_eq!(namespace(&pid, "net"), namespace("self", "net"));
    assert_ne!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    drop(child.stdin.take());
    child.wait().unwrap();
}
