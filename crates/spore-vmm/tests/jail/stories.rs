//! The tests.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::net::SocketType;
use rustix::process::Signal;
use spore_wire::vmm::{FromVmm, VmmState};
use spore_wire::zygote::{ExitedBy, FdRole};

use crate::attempt::{self, Fate};
use crate::checkpoint::source_keeps_its_uid_filter_and_speed_after_checkpoint;
use crate::launch::{
    a_guest_runs_with_every_thread_in_its_cell,
    a_paused_guest_is_saved_copied_and_restored_in_the_jail,
};
use crate::node::{IDS, Vmm, Zygote, kill, listener, socket, wait_for};
use crate::scarce::{
    a_vmm_at_its_limit_of_descriptors_refuses_and_goes_on,
    a_vmm_that_gets_no_memory_refuses_or_ends_alone,
};
use crate::warden::a_test_that_is_killed_leaves_nothing_behind;
use crate::{Story, attempt::Attempt};

macro_rules! stories {
    ($($name:ident,)*) => {
        pub(crate) const ALL: &[Story] = &[$((stringify!($name), $name),)*];
    };
}

stories! {
    every_vmm_has_exactly_its_fds_uid_and_filter,
    code_in_the_vmms_place_can_do_nothing_else,
    vmms_go_on_without_their_zygote,
    an_end_is_told_and_takes_all_of_the_vm_with_it,
    a_copy_outlives_its_vmm,
    a_copy_ends_with_whoever_reads_it_or_after_its_time,
    a_zygote_whose_node_reads_nothing_ends_with_it,
    thirty_vmms_leave_nothing_behind,
    wrong_requests_are_refused_and_the_zygote_goes_on,
    the_program_serves_its_control_socket_in_the_jail,
    what_a_vmm_says_at_its_end_is_in_its_output,
    a_vmm_is_born_in_its_cgroup,
    a_guest_runs_with_every_thread_in_its_cell,
    a_paused_guest_is_saved_copied_and_restored_in_the_jail,
    source_keeps_its_uid_filter_and_speed_after_checkpoint,
    a_vmm_at_its_limit_of_descriptors_refuses_and_goes_on,
    a_vmm_that_gets_no_memory_refuses_or_ends_alone,
    what_is_no_zygotes_start_ends_with_its_code,
    a_test_that_is_killed_leaves_nothing_behind,
}

/// Runs one, where it can run.
pub(crate) fn run(story: fn()) {
    if rustix::process::geteuid().is_root() {
        story();
    } else {
        println!("SKIPPED: a zygote is started by root");
    }
}

const SIGKILL: ExitedBy = ExitedBy::Signal { signal: 9 };
const SIGSYS: ExitedBy = ExitedBy::Signal { signal: 31 };

fn open(rows: &[(u32, &str)]) -> BTreeMap<u32, String> {
    rows.iter()
        .map(|(number, name)| (*number, (*name).to_owned()))
        .collect()
}

fn every_vmm_has_exactly_its_fds_uid_and_filter() {
    let zygote = Zygote::new();
    let vmm = zygote.spawn(3);
    let talk = vmm.connect();
    assert_eq!(talk.asks("echo parked"), "parked");
    let null = "/dev/null";

    let of = zygote.process();
    let signals = "anon_inode:[signalfd]";
    let ends = [(3, "socket"), (4, null), (5, signals)];
    // It lets go of its VMM's pidfd when it has told of it.
    of.wait_open(&open(
        &[&[(0, null), (1, null), (2, null)][..], &ends].concat(),
    ));
    of.check_jail(zygote.first);
    // SETGID, SETUID, SETPCAP and SYS_ADMIN, in its user namespace.
    of.check_capabilities("00000000002001c0");
    assert_eq!(of.threads().len(), 1);

    let of = vmm.init;
    // It jails itself beside its VMM.
    of.wait_filters("2");
    assert_eq!(of.open(), open(&[(0, "pipe")]));
    of.check_jail(vmm.uid);
    of.check_vm(1);
    assert_eq!(
        (of.status("Name"), of.limit("Max open files")),
        ("spore-init".into(), "1".into())
    );

    let of = vmm.process;
    let held = [
        (0, null),
        (1, null),
        (2, null),
        (3, "socket"),
        (4, null),
        (5, "pipe"),
    ];
    // The test's own connection is the last.
    let and = |more: &[(u32, &'static str)]| open(&[&held, more].concat());
    assert_eq!(of.open(), and(&[(6, "socket")]));
    assert_eq!(talk.asks("threads"), "there");
    assert_eq!(talk.asks("run"), "running");
    assert_eq!(of.threads().len(), 3);
    of.check_jail(vmm.uid);
    of.check_vm(2);
    let limits = [of.limit("Max open files"), of.limit("Max processes")];
    assert_eq!(
        (of.status("Name"), limits),
        ("spore-parked".into(), ["256".into(), "16".into()])
    );
    assert_eq!(of.limit("Max file size"), "unlimited");

    let reads = vmm.connect();
    assert_eq!(talk.asks("copy 60000"), "5");
    wait_for(reads.0.as_fd());
    let of = vmm.process.child();
    assert_eq!(of.open(), open(&[(5, "pipe"), (7, "socket")]));
    of.check_jail(vmm.uid);
    of.check_vm(5);
    assert_eq!(of.status("Name"), "spore-frozen");
    assert_eq!(of.threads().len(), 1);
    // Each list that it has had is still there: zygote, first thread twice, copy.
    of.wait_filters("4");
    zygote.close();
    vmm.kill();
}

fn code_in_the_vmms_place_can_do_nothing_else() {
    let zygote = Zygote::new();
    for Attempt {
        name,
        cell,
        call: _,
        fate,
    } in attempt::ALL
    {
        let vmm = zygote.spawn(1);
        let talk = vmm.connect();
        talk.says(&format!("attempt {cell} {name}"));
        let said = talk.hears();
        let found = match said.as_deref() {
            None => Fate::Killed,
            Some("done") => Fate::Done,
            Some(errno) => Fate::Refused(errno.strip_prefix("errno ").unwrap().parse().unwrap()),
        };
        if found != Fate::Killed {
            vmm.kill();
        }
        let by = zygote.waits(&vmm);
        assert_eq!(
            (found, by == SIGSYS),
            (*fate, *fate == Fate::Killed),
            "{cell} {name}: {by:?}"
        );
    }
    zygote.close();
}

fn vmms_go_on_without_their_zygote() {
    let mut zygote = Zygote::new();
    let vmms: Vec<Vmm> = (1..=3).map(|number| zygote.spawn(number)).collect();
    let talks: Vec<_> = vmms.iter().map(Vmm::connect).collect();
    for talk in &talks {
        assert_eq!(talk.asks("echo there"), "there");
    }
    // In one group of processes, all would be hung up for the one that stands still.
    vmms[0].signal(Signal::STOP);
    zygote.child.kill().unwrap();
    zygote.child.wait().unwrap();
    vmms[0].signal(Signal::CONT);
    for (vmm, talk) in vmms.iter().zip(&talks) {
        assert_eq!(talk.asks("echo still"), "still");
        assert!(vmm.init.is_alive());
    }
    talks[0].says("end 0");
    vmms[0].init.wait_end();
    // A sleeper's end is its VMM's too.
    kill(vmms[1].init);
    vmms[1].process.wait_end();
    assert_eq!(talks[2].asks("echo still"), "still");
    vmms[2].kill();
    wait_for(vmms[2].pidfd.as_fd());
    vmms[2].init.wait_end();
}

fn an_end_is_told_and_takes_all_of_the_vm_with_it() {
    let zygote = Zygote::new();
    let vmm = zygote.spawn(1);
    let talk = vmm.connect();
    talk.says("end 7");
    assert_eq!(zygote.waits(&vmm), ExitedBy::Code { code: 7 });
    assert!(!vmm.init.is_alive() && !vmm.process.is_alive());

    let vmm = zygote.spawn(1);
    vmm.kill();
    assert_eq!(zygote.waits(&vmm), SIGKILL);
    assert!(!vmm.init.is_alive());

    let vmm = zygote.spawn(1);
    kill(vmm.init);
    assert_eq!(zygote.waits(&vmm), SIGKILL);
    assert!(!vmm.process.is_alive());
    zygote.close();
}

fn a_copy_outlives_its_vmm() {
    let zygote = Zygote::new();
    let vmm = zygote.spawn(1);
    let (talk, reads) = (vmm.connect(), vmm.connect());
    talk.asks("copy 60000");
    wait_for(reads.0.as_fd());
    let copy = vmm.process.child();
    vmm.kill();
    assert_eq!(zygote.waits_end(&vmm), SIGKILL);
    assert!(copy.is_alive() && vmm.init.is_alive());
    assert_eq!(copy.status("PPid"), vmm.init.0.to_string());
    // The uid is not free yet.
    let (_, listens) = listener();
    zygote.asks(vmm.uid, &[(FdRole::Control, listens.as_fd())]);
    assert!(zygote.refuses().1.contains("another VM"));
    // Nobody holds the other end any more.
    drop(reads);
    zygote.waits_gone(&vmm);
    assert!(!copy.is_alive());
    zygote.close();
}

fn a_copy_ends_with_whoever_reads_it_or_after_its_time() {
    let zygote = Zygote::new();
    let vmm = zygote.spawn(1);
    let talk = vmm.connect();
    let reads = vmm.connect();
    talk.asks("copy 60000");
    wait_for(reads.0.as_fd());
    let copy = vmm.process.child();
    drop(reads);
    copy.wait_end();
    let reads = vmm.connect();
    talk.asks("copy 100");
    wait_for(reads.0.as_fd());
    // Its byte, and then the end.
    assert_eq!(reads.hears().as_deref(), Some("\u{1}"));
    assert_eq!(reads.hears(), None);
    // Nobody waits for them, and none is left.
    while !vmm.process.children().is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(talk.asks("echo still"), "still");
    zygote.close();
    vmm.kill();
}

fn a_zygote_whose_node_reads_nothing_ends_with_it() {
    let zygote = Zygote::new();
    let vmms: Vec<Vmm> = (1..=2).map(|number| zygote.spawn(number)).collect();
    // It tells of this end, and is not heard.
    vmms[0].kill();
    vmms[0].init.wait_end();
    wait_for(zygote.socket.as_fd());
    zygote.close();
    assert_eq!(vmms[1].connect().asks("echo still"), "still");
    vmms[1].kill();
}

fn thirty_vmms_leave_nothing_behind() {
    let zygote = Zygote::new();
    let before = zygote.process().open();
    let vmms: Vec<Vmm> = (1..=30).map(|number| zygote.spawn(number)).collect();
    assert_eq!(zygote.process().children().len(), 60);
    zygote.process().wait_open(&before);
    for vmm in &vmms {
        let talk = vmm.connect();
        assert_eq!(talk.asks("echo there"), "there");
        talk.says("end 0");
        assert_eq!(zygote.waits(vmm), ExitedBy::Code { code: 0 });
    }
    assert_eq!(zygote.process().children(), []);
    zygote.process().wait_open(&before);
    zygote.close();
}

fn wrong_requests_are_refused_and_the_zygote_goes_on() {
    let zygote = Zygote::new();
    let before = zygote.process().open();
    let (_, listens) = listener();
    let control = (FdRole::Control, listens.as_fd());
    let null = std::fs::File::open("/dev/null").unwrap();
    let null = null.as_fd();
    let refused = |what: &str| {
        let (request, why) = zygote.refuses();
        assert!(why.contains(what), "{why}");
        request
    };

    for wrong in [&b"{}"[..], b"\xff\0", b"[]", b"{\"type\":\"spawn\"}"] {
        zygote.sends(wrong, &[]);
        assert_eq!(refused("no message"), None);
    }
    zygote.sends(&vec![b' '; 5000], &[]);
    assert_eq!(refused("over 4096 bytes"), None);
    zygote.sends(b"{}", &[null; 9]);
    assert_eq!(refused("8 descriptors"), None);

    let uid = zygote.first + 1;
    zygote.asks(uid, &[]);
    assert_eq!(
        refused("no descriptor is the control socket"),
        Some(uid.into())
    );
    let spawn = |roles: &str| {
        format!("{{\"type\":\"spawn\",\"request\":1,\"uid\":{uid},\"fds\":[{roles}]}}")
    };
    zygote.sends(spawn("\"control\"").as_bytes(), &[]);
    refused("0 descriptors came where 1 are named");
    zygote.sends(spawn("").as_bytes(), &[null, null]);
    refused("2 descriptors came where 0 are named");
    zygote.sends(spawn("\"disk\"").as_bytes(), &[null]);
    refused("no message");
    zygote.asks(uid, &[control, control]);
    refused("two descriptors are Control");
    let talks = socket(SocketType::SEQPACKET);
    for wrong in [null, talks.as_fd()] {
        zygote.asks(uid, &[(FdRole::Control, wrong)]);
        refused("no socket of packets that listens");
    }
    zygote.asks(uid, &[control, (FdRole::Cgroup, null)]);
    refused("cannot make a VMM");
    for uid in [
        0,
        1,
        zygote.first - 1,
        zygote.first,
        zygote.first + IDS,
        u32::MAX,
    ] {
        zygote.asks(uid, &[control]);
        assert_eq!(refused("is none of the 63"), Some(uid.into()));
    }
    let vmm = zygote.spawn(1);
    zygote.asks(uid, &[control]);
    refused("another VM");
    vmm.kill();
    zygote.waits(&vmm);
    zygote.process().wait_open(&before);
    assert_eq!(zygote.process().children(), []);
    zygote.close();
}

fn the_program_serves_its_control_socket_in_the_jail() {
    let program = Path::new(env!("CARGO_BIN_EXE_spore-vmm"));
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    for kvm in [None, kvm.ok()] {
        let with_kvm = kvm.is_some();
        let zygote = Zygote::start(program, &["zygote", "--uids"], kvm);
        let vmm = zygote.spawn(1);
        let talk = vmm.connect();
        let hello = serde_json::from_str(&talk.hears().unwrap()).unwrap();
        assert!(matches!(
            hello,
            FromVmm::Hello {
                state: VmmState::Parked,
                ..
            }
        ));
        let answer = talk.asks("{\"type\":\"resume\"}");
        assert!(matches!(
            serde_json::from_str(&answer).unwrap(),
            FromVmm::Failed { .. }
        ));
        vmm.process.check_jail(vmm.uid);
        let open = vmm.process.open();
        assert_eq!(
            open.get(&4).is_some_and(|name| name == "/dev/kvm"),
            with_kvm,
            "{open:?}"
        );
        talk.says("{\"type\":\"quit\"}");
        assert_eq!(zygote.waits(&vmm), ExitedBy::Code { code: 0 });
        zygote.close();
    }
}

fn what_a_vmm_says_at_its_end_is_in_its_output() {
    let zygote = Zygote::new();
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let output = rustix::fs::memfd_create("output", flags).unwrap();
    let vmm = zygote.spawn_with(1, &[(FdRole::Output, output.as_fd())]);
    let open = vmm.connect();
    open.asks("echo there");
    for number in [1, 2] {
        assert!(vmm.process.open()[&number].starts_with("/memfd:output"));
    }
    open.says("panic");
    assert_eq!(zygote.waits(&vmm), ExitedBy::Code { code: 101 });
    let mut text = [0; 4096];
    let count = rustix::io::pread(&output, &mut text, 0).unwrap();
    let text = String::from_utf8_lossy(&text[..count]);
    assert!(text.contains("as it was told to"), "{text}");
    zygote.close();
}

/// A folder of a cgroup2, removed again.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(parent: &Path, name: &str, owner: u32) -> std::io::Result<Self> {
        let folder = parent.join(name);
        std::fs::create_dir(&folder)?;
        let procs = folder.join("cgroup.procs");
        std::os::unix::fs::chown(procs, Some(owner), None)?;
        Ok(Self(folder))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir(&self.0);
        assert!(std::thread::panicking() || removed.is_ok(), "{removed:?}");
    }
}

fn a_vmm_is_born_in_its_cgroup() {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let root = roots
        .into_iter()
        .find(|root| root.join("cgroup.procs").exists());
    let Some(root) = root else {
        println!("SKIPPED: there is no cgroup2");
        return;
    };
    let zygote = Zygote::new();
    let name = format!("spore-jail-{}", std::process::id());
    let all = match Cgroup::new(root, &name, zygote.first) {
        Ok(all) => all,
        Err(error) => {
            println!("SKIPPED: no cgroup can be made: {error}");
            zygote.close();
            return;
        }
    };
    let zygotes = Cgroup::new(&all.0, "zygote", zygote.first).unwrap();
    let own = Cgroup::new(&all.0, "vm", zygote.first).unwrap();
    let pid = zygote.process().0.to_string();
    std::fs::write(zygotes.0.join("cgroup.procs"), pid).unwrap();
    let folder = std::fs::File::open(&own.0).unwrap();
    let vmm = zygote.spawn_with(1, &[(FdRole::Cgroup, folder.as_fd())]);
    // While somebody is there it does not end.
    let talk = vmm.connect();
    assert_eq!(talk.asks("echo there"), "there");
    for process in [vmm.process, vmm.init] {
        assert_eq!(process.cgroup(), format!("/{name}/vm"));
    }
    assert_eq!(zygote.process().cgroup(), format!("/{name}/zygote"));
    vmm.kill();
    zygote.waits(&vmm);
    // One whose cgroup forbids it is refused, and no half of it is left.
    let procs = own.0.join("cgroup.procs");
    std::os::unix::fs::chown(procs, Some(0), None).unwrap();
    let (_, listens) = listener();
    let fds = [
        (FdRole::Control, listens.as_fd()),
        (FdRole::Cgroup, folder.as_fd()),
    ];
    zygote.asks(zygote.first + 1, &fds);
    assert!(zygote.refuses().1.contains("Permission denied"));
    assert_eq!(zygote.process().children(), []);
    zygote.close();
    drop((own, zygotes, all));
}

fn what_is_no_zygotes_start_ends_with_its_code() {
    let program = env!("CARGO_BIN_EXE_spore-vmm");
    let ends = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(environment.iter().copied());
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said)
    };
    let ids = ["zygote", "--uids", "300000+2"];
    for wrong in [
        &["zygote"][..],
        &["zygote", "--uids", "0+9"],
        &["zygote", "--uids", "x"],
    ] {
        assert_eq!(ends(wrong, &[]).0, 2, "{wrong:?}");
    }
    let (code, said) = ends(&ids, &[("A", "b")]);
    assert_eq!((code, said.contains("an environment")), (6, true), "{said}");
    let (code, said) = ends(&ids, &[]);
    assert_eq!(
        (code, said.contains("descriptor 3 was not given")),
        (6, true),
        "{said}"
    );
}
