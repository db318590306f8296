//! Layouts are told apart by text; the real host's tree is used by a test of its own parent.

use std::path::Path;

use super::{CgroupError, Cgroups, Controller, Limits, Version, detect, keyed};

const V2: &str = "\
25 1 0:22 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
26 1 0:23 / /proc rw,nosuid - proc proc rw
";

const HYBRID: &str = "\
30 1 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
35 30 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

#[test]
fn one_unified_tree_serves_all_controllers() {
    let found = detect(V2, |_root| "cpuset cpu io memory hugetlb pids\n".to_owned()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].version, Version::Two);
    assert_eq!(
        found[0].controllers,
        [Controller::Cpu, Controller::Memory, Controller::Pids]
    );
}

#[test]
fn a_hybrid_host_has_a_tree_per_controller_and_one_to_kill_with() {
    let found = detect(HYBRID, |_root| "hugetlb\n".to_owned()).unwrap();
    let roots: Vec<&Path> = found.iter().map(|one| one.root.as_path()).collect();
    let named = ["cpu,cpuacct", "memory", "pids", "unified"];
    let expected: Vec<_> = named
        .map(|one| Path::new("/sys/fs/cgroup").join(one))
        .to_vec();
    assert_eq!(roots, expected);
    assert_eq!(found[3].controllers, []);
}

#[test]
fn a_host_without_the_memory_controller_is_refused_by_its_name() {
    let error = detect(V2, |_root| "cpu pids".to_owned()).unwrap_err();
    assert!(matches!(error, CgroupError::Missing("memory")), "{error}");
}

#[test]
fn a_key_is_not_found_in_a_longer_one() {
    let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
    assert_eq!(keyed(text, "oom_kill"), Some(2));
    assert_eq!(keyed(text, "oom_k"), None);
}

#[test]
fn a_process_is_held_only_when_it_is_in_every_tree() {
    let hierarchies = detect(HYBRID, |_root| String::new()).unwrap();
    let cgroups = Cgroups {
        hierarchies,
        parent: "spore".to_owned(),
    };
    let inside = "5:cpu,cpuacct:/spore/a\n4:memory:/spore/a\n3:pids:/spore/a\n0::/spore/a\n";
    assert!(cgroups.holds("a", inside));
    assert!(!cgroups.holds("b", inside));
    assert!(!cgroups.holds("a", &inside.replace("memory:/spore/a", "memory:/")));
}

#[test]
fn a_cgroup_of_this_host_is_made_limited_killed_and_removed() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: cgroups need root");
        return;
    }
    let parent = format!("spore-test-cgroup-{}", std::process::id());
    let cgroups = Cgroups::open(&parent).unwrap();
    let limits = Limits {
        memory_bytes: 64 << 20,
        cpus: 1,
        pids: 7,
    };
    cgroups.create("one", &limits).unwrap();
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    for entrance in cgroups.entrances("one") {
        std::fs::write(entrance, child.id().to_string()).unwrap();
    }
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
    assert!(cgroups.holds("one", &text), "{text}");
    assert_eq!(cgroups.stats("one").unwrap().pids, 1);
    let limit = || cgroups.memory_limit("one").unwrap();
    assert_eq!(limit(), Some(64 << 20));
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("lent");
    let lend = |more| cgroups.lend_memory("one", more, note.clone());
    let lent = lend(32 << 20).unwrap();
    assert_eq!(limit(), Some(96 << 20));
    drop(lent);
    assert_eq!((limit(), note.exists()), (Some(64 << 20), false));
    // Who lent it ends: the next takes it back, also after it lent some itself.
    for again in [false, true] {
        core::mem::forget(lend(32 << 20).unwrap());
        assert_eq!((limit(), note.exists()), (Some(96 << 20), true));
        if again {
            core::mem::forget(lend(8 << 20).unwrap());
            assert_eq!(limit(), Some(96 << 20), "it has that already");
            core::mem::forget(lend(48 << 20).unwrap());
            assert_eq!(limit(), Some(112 << 20), "more than it was made with");
        }
        cgroups.take_memory_back("one", &note).unwrap();
        assert_eq!((limit(), note.exists()), (Some(64 << 20), false));
    }
    cgroups.take_memory_back("one", &note).unwrap();
    std::fs::write(&note, "much").unwrap();
    let refused = cgroups.take_memory_back("one", &note).unwrap_err();
    assert!(refused.to_string().contains("says \"much\""), "{refused}");
    std::fs::remove_file(&note).unwrap();
    cgroups.raise_memory("one", 80 << 20).unwrap();
    assert_eq!(limit(), Some(80 << 20));
    let lent = lend(1 << 20).unwrap();
    assert!(!cgroups.was_out_of_memory("one").unwrap());
    assert_eq!(cgroups.list().unwrap(), ["one"]);
    cgroups.remove("one").unwrap();
    cgroups.remove("one").unwrap();
    // It is gone, and nothing is to be given back.
    drop(lent);
    assert!(!note.exists() && lend(1).is_err());
    assert_eq!(cgroups.list().unwrap(), Vec::<String>::new());
    // Reaped by `remove`, or it is reaped here: dead it is either way.
    assert!(child.wait().map_or(true, |status| !status.success()));
    cgroups.remove_parent().unwrap();
}
