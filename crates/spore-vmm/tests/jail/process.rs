//! What `/proc` says of a process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

/// A process by its pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    fn path(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0))
    }

    fn read(self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Whether it is there and no zombie.
    pub(crate) fn is_alive(self) -> bool {
        let status = fs::read_to_string(self.path("status")).unwrap_or_default();
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        state.is_some_and(|state| !state.trim().starts_with(['Z', 'X']))
    }

    /// Waits until it is not.
    pub(crate) fn wait_end(self) {
        self.wait_until("gone", |process| !process.is_alive());
    }

    /// Waits until it has so many filters: of a child of the zygote two are its whole jail.
    pub(crate) fn wait_filters(self, count: &str) {
        let key = "Seccomp_filters";
        self.wait_until(key, |process| process.status(key) == count);
    }

    /// Waits until it has these open: the zygote lets go of a descriptor after it has passed it on.
    pub(crate) fn wait_open(self, open: &BTreeMap<u32, String>) {
        self.wait_until("open", |process| process.open() == *open);
    }

    /// Waits until it has no thread but its first: one that ends by itself is there for a moment.
    pub(crate) fn wait_one_thread(self) {
        let count = |process: Self| fs::read_dir(process.path("task")).unwrap().count();
        self.wait_until("threads", |process| count(process) == 1);
    }

    fn wait_until(self, what: &str, holds: impl Fn(Self) -> bool) {
        for _ in 0..6000 {
            if holds(self) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("{self:?}, {what}: {:?}", self.threads());
    }

    /// What is open, by number.
    pub(crate) fn open(self) -> BTreeMap<u32, String> {
        let entries = fs::read_dir(self.path("fd")).unwrap().map(Result::unwrap);
        let open = entries.filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            // One that was closed meanwhile is not open.
            let target = fs::read_link(entry.path()).ok()?;
            let target = target.display().to_string();
            let kind = target.split_once(":[").map(|(kind, _)| kind);
            let kind = kind.filter(|kind| ["pipe", "socket"].contains(kind));
            Some((number, kind.unwrap_or(&target).to_owned()))
        });
        open.collect()
    }

    /// The lines of the status of each of its threads.
    pub(crate) fn threads(self) -> Vec<BTreeMap<String, String>> {
        let tasks = fs::read_dir(self.path("task")).unwrap().map(Result::unwrap);
        let status = tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap());
        let fields = |text: String| {
            let pairs = text.lines().filter_map(|line| line.split_once(':'));
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            pairs
                .map(|(key, value)| (key.to_owned(), words(value)))
                .collect()
        };
        status.map(fields).collect()
    }

    /// A line of the status of its first thread.
    pub(crate) fn status(self, key: &str) -> String {
        self.threads()[0][key].clone()
    }

    /// Whether it is in the same namespace of a kind as this one.
    pub(crate) fn shares(self, kind: &str) -> bool {
        let kind = format!("ns/{kind}");
        fs::read_link(self.path(&kind)).unwrap()
            == fs::read_link(format!("/proc/self/{kind}")).unwrap()
    }

    /// Its only child.
    pub(crate) fn child(self) -> Self {
        let children: Vec<Self> = self.children();
        assert_eq!(children.len(), 1, "{children:?}");
        children[0]
    }

    /// All processes that have it as their parent, zombies too.
    pub(crate) fn children(self) -> Vec<Self> {
        let all = fs::read_dir("/proc").unwrap().map(Result::unwrap);
        let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Self));
        let parent = |process: &Self| {
            let status = fs::read_to_string(process.path("status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            line.and_then(|pid| pid.trim().parse().ok())
        };
        all.filter(|process| parent(process) == Some(self.0))
            .collect()
    }

    /// What is the same of every process of the jail.
    pub(crate) fn check_jail(self, uid: u32) {
        for thread in self.threads() {
            for key in ["Uid", "Gid"] {
                assert_eq!(thread[key], format!("{uid} {uid} {uid} {uid}"), "{key}");
            }
            assert_eq!(thread["Groups"], "");
            assert_eq!(thread["NoNewPrivs"], "1");
            assert_eq!(thread["THP_enabled"], "0");
            assert_eq!(thread["Seccomp"], "2");
        }
        for kind in ["user", "mnt", "net", "ipc", "uts"] {
            assert!(!self.shares(kind), "{kind}");
        }
        assert_eq!(self.read("environ"), "");
        let inside: Vec<_> = fs::read_dir(self.path("root")).unwrap().collect();
        assert!(inside.is_empty(), "{inside:?}");
        let mounts = self.read("mountinfo");
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
        let devices = self.read("net/dev");
        let devices = devices.lines().skip(2);
        let devices: Vec<_> = devices
            .map(|line| line.split(':').next().unwrap().trim())
            .collect();
        assert_eq!(devices, ["lo"]);
        // The files of a process that is not dumpable are root's, whoever it is.
        assert_eq!(fs::metadata(self.path("fd")).unwrap().uid(), 0);
        assert_eq!(self.read("oom_score_adj").trim(), "500");
        let core = self.limit("Max core file size");
        assert!(core == "1" || core == "0", "{core}");
        assert_eq!(self.limit("Max locked memory"), "0");
    }

    /// That it is the first or second of a pid namespace of its own, with a cgroup namespace of its
    /// own and no capability.
    pub(crate) fn check_vm(self, number: u32) {
        assert_eq!(self.status("NSpid"), format!("{} {number}", self.0));
        for kind in ["pid", "cgroup"] {
            assert!(!self.shares(kind), "{kind}");
        }
        self.check_capabilities("0000000000000000");
    }

    /// Its capabilities, which are the same in each set that is not always empty.
    pub(crate) fn check_capabilities(self, kept: &str) {
        for thread in self.threads() {
            for key in ["CapPrm", "CapEff", "CapBnd"] {
                assert_eq!(thread[key], kept, "{key}");
            }
            for key in ["CapInh", "CapAmb"] {
                assert_eq!(thread[key], "0000000000000000", "{key}");
            }
        }
    }

    /// A limit, hard and soft the same.
    pub(crate) fn limit(self, name: &str) -> String {
        let limits = self.read("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let mut words = line.unwrap().split_whitespace();
        let (soft, hard) = (words.next().unwrap(), words.next().unwrap());
        assert_eq!(soft, hard, "{name}");
        soft.to_owned()
    }

    /// Its line of cgroup2.
    pub(crate) fn cgroup(self) -> String {
        let lines = self.read("cgroup");
        let line = lines.lines().find_map(|line| line.strip_prefix("0::"));
        line.unwrap_or_default().to_owned()
    }
}
