//! VMs that begin where another stands: a booted one, a fork, one that ended for it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use spore_node::hypervisor::fork::{
    Afterwards, Capture, CaptureError, ForkError, ForkFrom, MemoryCopy,
};
use spore_node::hypervisor::memory_image::CapturedMemory;
use spore_node::hypervisor::{Machine, Prepared, Vm};
use spore_wire::cause::chain;
use spore_wire::guest::{Exit, Reply, Request};
use spore_wire::id::VmId;
use tokio::time::{Instant, timeout};

use crate::agent::{Agent, shell};
use crate::driver::{Driver, is_kvm};
use crate::guest::{Then, WORD};
use crate::host::{HANG, TestHost, new_id, said};

/// What must differ between any two VMs, in one line each.
const INDIVIDUAL: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid \
    /etc/machine-id /etc/hostname; od -An -tx1 -N16 /dev/urandom; uname -n | sed s/^/kernel-/";

/// A VM and its session.
pub(crate) struct Running {
    pub(crate) vm: VmId,
    pub(crate) held: Arc<dyn Vm>,
    pub(crate) agent: Agent,
}

pub(crate) async fn boot(driver: &Driver, machine: &Machine) -> Running {
    let mut this = boot_only(driver, machine).await;
    this.agent.thaw(this.vm, "source").await.unwrap();
    this
}

/// Not thawed yet.
pub(crate) async fn boot_only(driver: &Driver, machine: &Machine) -> Running {
    let vm = new_id();
    let prepared = driver.prepare(vm, machine).await.unwrap();
    let begun = Instant::now();
    let identity = driver.boot(vm, machine, &prepared).await.unwrap();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    let (agent, hello) = Agent::greet(&*held).await;
    println!("boot: agent answered {:?} after the spawn", begun.elapsed());
    assert!(!hello.thawed && !hello.frozen && hello.incarnation.is_none());
    Running { vm, held, agent }
}

pub(crate) async fn fork(
    driver: &Driver,
    machine: &Machine,
    from: &ForkFrom,
    source: VmId,
) -> Running {
    let mut this = fork_only(driver, machine, from, source).await;
    let begun = Instant::now();
    this.agent
        .thaw(this.vm, &hostname_of(this.vm))
        .await
        .unwrap();
    println!("fork: thawed in {:?}", begun.elapsed());
    this
}

pub(crate) fn hostname_of(fork: VmId) -> String {
    format!("fork-{}", &fork.to_string()[..8])
}

/// Not thawed yet.
pub(crate) async fn fork_only(
    driver: &Driver,
    machine: &Machine,
    from: &ForkFrom,
    source: VmId,
) -> Running {
    let vm = new_id();
    let prepared = driver.prepare(vm, machine).await.unwrap();
    fork_into(driver, machine, (vm, prepared), from, source).await
}

/// Likewise, in a room that is there.
pub(crate) async fn fork_into(
    driver: &Driver,
    machine: &Machine,
    (vm, prepared): (VmId, Prepared),
    from: &ForkFrom,
    source: VmId,
) -> Running {
    let begun = Instant::now();
    let identity = driver.fork(vm, machine, &prepared, from).await.unwrap();
    let loaded = begun.elapsed();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    held.resume().await.unwrap();
    let (agent, hello) = Agent::greet(&*held).await;
    println!(
        "fork: loaded {loaded:?}, agent answered {:?} after the spawn",
        begun.elapsed()
    );
    assert!(!hello.thawed && hello.frozen, "{hello:?}");
    assert_eq!(hello.incarnation, Some(source.to_string()));
    Running { vm, held, agent }
}

/// Freezes, pauses and captures; a VM that goes on is let run again.
pub(crate) async fn capture(
    of: &mut Running,
    afterwards: Afterwards,
    from: Option<&ForkFrom>,
) -> Taken {
    let turn = of.held.prepare_capture(None, None).await.unwrap();
    let busy = of.held.prepare_capture(None, None).await.unwrap_err();
    assert!(matches!(busy, CaptureError::Busy), "{busy}");
    assert_eq!(of.agent.ask(Request::Freeze).await, Ok(Reply::Done));
    let begun = Instant::now();
    of.held.pause().await.unwrap();
    let capture = of.held.capture(afterwards).await.unwrap();
    if afterwards == Afterwards::GoesOn {
        of.held.resume().await.unwrap();
        println!("captured, paused for {:?}", begun.elapsed());
        let unfreeze = Request::Unfreeze {
            incarnation: of.vm.to_string(),
            hooks_ms: None,
        };
        let going_on = of.agent.ask(unfreeze).await;
        assert_eq!(going_on, Ok(Reply::Done));
    } else {
        println!("captured and ended in {:?}", begun.elapsed());
    }
    let read = timeout(HANG, capture.memory.finished()).await.unwrap();
    let memory = read.unwrap();
    let changed = match &memory {
        CapturedMemory::Whole(_) | CapturedMemory::Standing(_) => None,
        CapturedMemory::Changed { pages, .. } => Some(pages.len_bytes()),
    };
    let capture = Capture {
        memory: MemoryCopy::Done(memory),
        ..capture
    };
    let begun = Instant::now();
    let source = timeout(HANG, capture.into_source(from)).await.unwrap();
    println!("disk copied and memory merged in {:?}", begun.elapsed());
    drop(turn);
    Taken {
        source: source.unwrap(),
        changed,
    }
}

/// What forks begin from, and how many bytes of it were a fork's own.
pub(crate) struct Taken {
    pub(crate) source: ForkFrom,
    changed: Option<usize>,
}

/// Each line is met by one VM only, however often it is looked at.
fn are_individuals(seen: &[String]) {
    let lines: Vec<&str> = seen.iter().flat_map(|text| text.lines()).collect();
    let distinct: BTreeSet<&str> = lines.iter().copied().collect();
    assert_eq!(lines.len(), seen.len() * 6, "{seen:#?}");
    assert_eq!(distinct.len(), lines.len(), "{seen:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_vm_is_forked_twice_and_all_three_are_individuals() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut source = boot(&driver, &machine).await;
    let before = source
        .agent
        .sh("echo kept > /root/kept; sync; echo memory > /run/kept; echo ok");
    assert_eq!(before.await, "ok");
    let waiting = source
        .agent
        .open(Request::Exec(shell("read word; echo heard $word")))
        .await;

    let taken = capture(&mut source, Afterwards::GoesOn, None).await;
    assert_eq!(source.agent.sh("touch /root/after; echo ok").await, "ok");
    let mut one = fork(&driver, &machine, &taken.source, source.vm).await;
    let mut two = fork(&driver, &machine, &taken.source, source.vm).await;

    let mut seen = Vec::new();
    for vm in [&mut source, &mut one, &mut two] {
        seen.push(vm.agent.sh(INDIVIDUAL).await);
    }
    are_individuals(&seen);
    for fork in [&mut one, &mut two] {
        let name = fork.agent.sh("uname -n").await;
        assert_eq!(name, hostname_of(fork.vm), "of two forks each has its own");
        let kept = fork
            .agent
            .sh("cat /root/kept /run/kept; ls /root/after /root/other 2>&1");
        let kept = kept.await;
        assert!(kept.starts_with("kept\nmemory\n"), "{kept}");
        assert_eq!(kept.matches("No such file").count(), 2, "{kept}");
        let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let asked = now();
        let date = fork.agent.sh("date +%s").await.parse::<u64>().unwrap();
        let when = asked - 2..=now() + 1;
        assert!(when.contains(&date), "{date}, not in {when:?}");
        assert_eq!(
            fork.agent
                .sh("echo x > /root/other; sync; cat /root/other")
                .await,
            "x"
        );
        // What ran for the source's session is killed here by the hello, and then has to end.
        assert_eq!(
            fork.agent
                .sh(
                    "for _ in $(seq 1000); do left=$(grep -l 'read wor[d]' /proc/[0-9]*/cmdline); \
                     [ -z \"$left\" ] && break; sleep 0.1; done; echo left: $left"
                )
                .await,
            "left:"
        );
        fork.agent.sh("rm /root/other").await;
    }
    source.agent.input(waiting, b"still\n").await;
    let (exit, output) = source.agent.finish(waiting).await.unwrap();
    assert_eq!(
        (exit, &*output),
        (Reply::Exit(Exit::Code { code: 0 }), "heard still\n")
    );

    for vm in [source.vm, one.vm, two.vm] {
        driver.release(vm).await.unwrap();
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_is_forked_and_one_that_ended_for_it_lives_on_in_its_forks() {
    let Some((host, machine)) = TestHost::with_agent() else {
        return;
    };
    let driver = host.driver().await;
    let mut template = boot(&driver, &machine).await;
    template.agent.sh("echo 0 > /root/0; echo 0 > /run/0").await;
    let taken = capture(&mut template, Afterwards::Ends, None).await;
    assert_eq!(taken.changed, None);
    let exit = timeout(HANG, template.held.exited()).await.unwrap();
    assert!(exit.reason.contains("signal 9"), "{exit:?}");
    driver.release(template.vm).await.unwrap();

    let mut from = taken.source;
    let mut source = template.vm;
    for depth in 1..4 {
        let mut fork = fork(&driver, &machine, &from, source).await;
        let last = depth - 1;
        let read = format!("cat /root/{last} /run/{last}");
        assert_eq!(fork.agent.sh(&read).await, format!("{last}\n{last}"));
        let write = format!("echo {depth} > /root/{depth}; echo {depth} > /run/{depth}");
        fork.agent.sh(&write).await;
        let taken = capture(&mut fork, Afterwards::GoesOn, Some(&from)).await;
        let changed = taken.changed.unwrap();
        println!("depth {depth}: {} KiB were its own", changed / 1024);
        assert!((4096..64 << 20).contains(&changed), "{changed}");
        assert_eq!(fork.agent.sh("echo on").await, "on");
        driver.release(fork.vm).await.unwrap();
        (from, source) = (taken.source, fork.vm);
    }
    assert_eq!(host.left(), Vec::<String>::new());
}

/// Boots a guest that does nothing, and captures it where it waits. It goes on.
async fn waiting(driver: &Driver, machine: &Machine) -> (VmId, ForkFrom) {
    let vm = new_id();
    let prepared = driver.prepare(vm, machine).await.unwrap();
    let identity = driver.boot(vm, machine, &prepared).await.unwrap();
    let held = driver.attach(vm, &prepared, &identity).await.unwrap();
    said(&*held, WORD).await;
    let refused = held.capture(Afterwards::GoesOn).await.unwrap_err();
    assert!(matches!(refused, CaptureError::NotPaused(_)), "{refused}");
    held.pause().await.unwrap();
    held.pause().await.unwrap();
    let captured = held.capture(Afterwards::GoesOn).await.unwrap();
    held.resume().await.unwrap();
    held.resume().await.unwrap();
    let source = timeout(HANG, captured.into_source(None)).await.unwrap();
    (vm, source.unwrap())
}

/// What is said of a fork that is refused.
async fn refused(driver: &Driver, machine: &Machine, source: &ForkFrom) -> ForkError {
    let fork = new_id();
    let prepared = driver.prepare(fork, machine).await.unwrap();
    let refused = driver.fork(fork, machine, &prepared, source).await;
    driver.release(fork).await.unwrap();
    let refused = refused.unwrap_err();
    println!("{}", chain(&refused));
    refused
}

/// The source with its saved machine changed: number `at` of 16 bits is one more.
fn changed(source: &ForkFrom, at: u64) -> ForkFrom {
    let mut bytes = vec![0; usize::try_from(source.state.metadata().unwrap().len()).unwrap()];
    source.state.read_exact_at(&mut bytes, 0).unwrap();
    let number = &mut bytes[usize::try_from(at).unwrap()..][..2];
    let more = u16::from_le_bytes([number[0], number[1]]) + 1;
    number.copy_from_slice(&more.to_le_bytes());
    let state = File::from(memfd_create(c"changed", MemfdFlags::CLOEXEC).unwrap());
    state.write_all_at(&bytes, 0).unwrap();
    ForkFrom {
        state: Arc::new(state),
        ..source.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_of_another_layout_is_refused() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let machine = host.machine();
    let (vm, source) = waiting(&driver, &machine).await;
    let lasting = host.left();

    let sizes: [(fn(&mut Machine), _); 2] = [
        (
            |of| of.resources.memory_mib *= 2,
            "a fork has its source's memory: 256 MiB was asked for, and the source has 128 MiB",
        ),
        (
            |of| of.resources.disk_mib += 1,
            "a fork has its source's scratch disk: 65 MiB was asked for, and the source has 64 MiB",
        ),
    ];
    for (change, words) in sizes {
        let mut other = machine.clone();
        change(&mut other);
        let refused = refused(&driver, &other, &source).await;
        assert!(matches!(refused, ForkError::Shape { .. }), "{refused}");
        assert_eq!(refused.to_string(), words);
    }
    // What follows the VMM says, who reads what was saved.
    if is_kvm() {
        let mut other = machine.clone();
        other.resources.cpus = 2;
        let said = refused(&driver, &other, &source).await;
        let sizes = "a machine of 128 MiB and 2 processors where the guest was saved in one of \
                     128 MiB and 1 processors";
        assert!(said.to_string().contains(sizes), "{said}");
        for (at, words) in [
            (4, "a saved machine of form 2: this version reads 1"),
            (8, "a saved machine of layout 3: this version has 2"),
            (
                14,
                "section 1.0 (machine) has version 2: this version reads 1",
            ),
        ] {
            let said = refused(&driver, &machine, &changed(&source, at)).await;
            assert!(matches!(said, ForkError::Load(_)), "{said}");
            assert!(said.to_string().contains(words), "{said}");
        }
    }
    assert_eq!(host.left(), lasting);
    let fork = new_id();
    let prepared = driver.prepare(fork, &machine).await.unwrap();
    driver
        .fork(fork, &machine, &prepared, &source)
        .await
        .unwrap();
    driver.release(fork).await.unwrap();
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
