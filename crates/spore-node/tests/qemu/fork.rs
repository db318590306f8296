//! VMs that begin where another stands: a booted one, a fork, one that ended for it.

use std::collections::BTreeSet;
use std::sync::Arc;

use spore_node::hypervisor::fork::{Afterwards, CaptureError, ForkError, ForkFrom};
use spore_node::hypervisor::memory_image::CapturedMemory;
use spore_node::hypervisor::{Machine, Vm};
use spore_wire::guest::{Exit, Reply, Request};
use spore_wire::id::VmId;
use tokio::time::{Instant, timeout};

use crate::agent::{Agent, shell};
use crate::driver::Driver;
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

fn hostname_of(fork: VmId) -> String {
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
    let changed = match &capture.memory {
        CapturedMemory::Whole(_) | CapturedMemory::Standing(_) => None,
        CapturedMemory::Changed { pages, .. } => Some(pages.len_bytes()),
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

#[tokio::test(flavor = "multi_thread")]
async fn a_running_vm_is_not_captured_and_a_fork_of_another_shape_is_refused() {
    let Some(host) = TestHost::new(Then::Wait) else {
        return;
    };
    let driver = host.driver().await;
    let (vm, machine) = (new_id(), host.machine());
    let prepared = driver.prepare(vm, &machine).await.unwrap();
    let identity = driver.boot(vm, &machine, &prepared).await.unwrap();
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
    let source = source.unwrap();

    for change in [
        |of: &mut Machine| of.resources.memory_mib *= 2,
        |of: &mut Machine| of.resources.disk_mib += 1,
    ] {
        let (fork, mut other) = (new_id(), host.machine());
        change(&mut other);
        let prepared = driver.prepare(fork, &other).await.unwrap();
        let refused = driver
            .fork(fork, &other, &prepared, &source)
            .await
            .unwrap_err();
        assert!(matches!(refused, ForkError::Shape { .. }), "{refused}");
        driver.release(fork).await.unwrap();
    }
    driver.release(vm).await.unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
