//! The proxy as a process: what it holds, how it starts, what it outlives.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use spore_node::egress::launch::{EgressLauncher, Launch, LaunchError};
use spore_wire::egress::{DNS_FD, TCP_FD};

use crate::world::{FIRST, UID, World, blob, by_address, is_root};

const PROXY: &str = env!("CARGO_BIN_EXE_egress-proxy");

fn proc_of(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn status(pid: u32) -> BTreeMap<String, String> {
    let status = fs::read_to_string(proc_of(pid).join("status")).unwrap();
    let pair = |line: &str| {
        let (key, value) = line.split_once(':')?;
        Some((
            key.to_owned(),
            value.split_whitespace().collect::<Vec<_>>().join(" "),
        ))
    };
    status.lines().filter_map(pair).collect()
}

fn descriptors(pid: u32) -> Vec<String> {
    let folder = fs::read_dir(proc_of(pid).join("fd")).unwrap();
    let mut found = folder
        .map(|entry| {
            fs::read_link(entry.unwrap().path())
                .unwrap()
                .display()
                .to_string()
        })
        .collect::<Vec<_>>();
    found.sort();
    found
}

/// Inodes of a namespace's sockets in one of its tables, where `column` 9 is the inode.
fn inodes(pid: &str, table: &str) -> Vec<String> {
    let rows = fs::read_to_string(Path::new("/proc").join(pid).join("net").join(table)).unwrap();
    let inode = |row: &str| row.split_whitespace().nth(9).map(ToOwned::to_owned);
    rows.lines().skip(1).filter_map(inode).collect()
}

#[test]
fn the_proxy_has_exactly_its_uid_limits_and_filter() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, 443)], 16, &[]);
    assert_eq!(world.say(FIRST, 443, "hello").unwrap(), "8.8.4.4:443 hello");
    let pid = world.pid();
    let status = status(pid);
    let four = |id: u32| {
        [
            id.to_string(),
            id.to_string(),
            id.to_string(),
            id.to_string(),
        ]
        .join(" ")
    };
    for (key, value) in [
        ("Uid", four(UID).as_str()),
        ("Gid", &four(UID)),
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        assert_eq!(status.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert_eq!(fs::read(proc_of(pid).join("environ")).unwrap(), b"");
    let limits = fs::read_to_string(proc_of(pid).join("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max processes"), "0");
    assert_eq!(limit("Max open files"), "2176");
}

#[test]
fn the_proxy_holds_two_sockets_of_its_vm_and_sees_no_file() {
    if !is_root() {
        return;
    }
    let world = World::new(vec![by_address(FIRST, 443)], 16, &[]);
    let pid = world.pid();
    let log = world.log_path().display().to_string();
    let inside = world.vm.enter(|| {
        let tcp = inodes("thread-self", "tcp");
        [tcp, inodes("thread-self", "udp")].concat()
    });
    let mut sockets = inside
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect::<Vec<_>>();
    let (mut unix, mut others) = (Vec::new(), Vec::new());
    for found in descriptors(pid) {
        if let Some(place) = sockets.iter().position(|socket| *socket == found) {
            sockets.remove(place);
        } else if found.starts_with("socket:") {
            unix.push(found);
        } else {
            others.push(found);
        }
    }
    assert!(sockets.is_empty(), "{sockets:?} are not held");
    // The runtime's own pair for signals, of which it holds one end twice.
    assert!(unix.len() <= 3, "{unix:?}");
    let polls = [
        "/dev/null",
        "/dev/null",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
    ];
    others.retain(|found| *found != log);
    others.dedup_by(|a, b| a == b && a.starts_with("anon_inode"));
    assert_eq!(others, polls);
    assert_eq!(fs::read_dir(proc_of(pid).join("root")).unwrap().count(), 0);
    let namespace =
        |pid: &str, kind| fs::read_link(Path::new("/proc").join(pid).join("ns").join(kind));
    let own = pid.to_string();
    let outside = world
        .outside
        .enter(|| namespace("thread-self", "net").unwrap());
    assert_eq!(namespace(&own, "net").unwrap(), outside);
    assert_ne!(
        namespace(&own, "mnt").unwrap(),
        namespace("self", "mnt").unwrap()
    );
}

#[test]
fn a_proxy_that_is_refused_its_blob_or_uid_does_not_start() {
    if !is_root() {
        return;
    }
    for (uid, grants, reason) in [
        (UID, vec![], "0 grants"),
        (UID, vec![by_address(FIRST, 0)], "port 0"),
        (0, vec![by_address(FIRST, 443)], "uid 0"),
    ] {
        let world = World::without_proxy(&[]);
        let (tcp, dns) = world.sockets();
        let log = fs::File::create(world.log_path()).unwrap();
        let blob = blob(grants, 16);
        let launch = Launch {
            uid,
            blob: &blob,
            tcp: tcp.into(),
            dns: dns.into(),
            log,
        };
        let launched = EgressLauncher::new(PROXY, [""; 0]).launch(launch, |_pid| Ok(()));
        assert!(
            matches!(launched, Err(LaunchError::NotReady { .. })),
            "{launched:?}"
        );
        assert!(world.said().contains(reason), "{reason}: {}", world.said());
    }
}

#[test]
fn sockets_of_the_wrong_kind_are_not_served() {
    if !is_root() {
        return;
    }
    let world = World::without_proxy(&[]);
    let (tcp, dns) = world.sockets();
    let log = fs::File::create(world.log_path()).unwrap();
    let blob = blob(vec![by_address(FIRST, 443)], 16);
    let swapped = Launch {
        uid: UID,
        blob: &blob,
        tcp: dns.into(),
        dns: tcp.into(),
        log,
    };
    let launched = EgressLauncher::new(PROXY, [""; 0]).launch(swapped, |_pid| Ok(()));
    assert!(
        matches!(launched, Err(LaunchError::NotReady { .. })),
        "{launched:?}"
    );
    assert!(world.said().contains("descriptor 3"), "{}", world.said());
}

#[test]
fn a_proxy_is_placed_before_it_reads_and_dies_if_it_cannot_be() {
    if !is_root() {
        return;
    }
    let world = World::without_proxy(&[]);
    let (tcp, dns) = world.sockets();
    let log = fs::File::create(world.log_path()).unwrap();
    let blob = blob(vec![by_address(FIRST, 443)], 16);
    let launch = Launch {
        uid: UID,
        blob: &blob,
        tcp: tcp.into(),
        dns: dns.into(),
        log,
    };
    let mut placed = None;
    let launched = EgressLauncher::new(PROXY, [""; 0]).launch(launch, |pid| {
        placed = Some(pid);
        Err(std::io::ErrorKind::PermissionDenied.into())
    });
    assert!(
        matches!(launched, Err(LaunchError::Place(_))),
        "{launched:?}"
    );
    assert!(test_kill_process(placed.unwrap()).is_err());
}

#[test]
fn the_proxy_outlives_a_daemon_that_is_killed() {
    if !is_root() {
        return;
    }
    let world = World::without_proxy(&[]);
    let (tcp, dns) = world.sockets();
    let log = fs::File::create(world.log_path()).unwrap();
    let mut daemon = Command::new(PROXY);
    daemon.args(["daemon", &UID.to_string()]);
    daemon
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    let mappings = vec![
        FdMapping {
            parent_fd: tcp.into(),
            child_fd: TCP_FD,
        },
        FdMapping {
            parent_fd: dns.into(),
            child_fd: DNS_FD,
        },
    ];
    daemon.fd_mappings(mappings).unwrap();
    let mut daemon = world.outside.enter(|| daemon.spawn().unwrap());
    let json = serde_json::to_string(&blob(vec![by_address(FIRST, 443)], 16)).unwrap();
    let mut order = daemon.stdin.take().unwrap();
    order.write_all(format!("{json}\n").as_bytes()).unwrap();
    let mut pid = String::new();
    BufReader::new(daemon.stdout.take().unwrap())
        .read_line(&mut pid)
        .unwrap();
    let pid = pid
        .trim()
        .parse::<i32>()
        .unwrap_or_else(|_| panic!("{pid} {}", world.said()));
    let pid = Pid::from_raw(pid).unwrap();
    world.redirect();
    assert_eq!(
        world.say(FIRST, 443, "before").unwrap(),
        "8.8.4.4:443 before"
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(world.say(FIRST, 443, "after").unwrap(), "8.8.4.4:443 after");
    assert!(world.is_refused(FIRST, 80));
    kill_process(pid, Signal::KILL).unwrap();
}
