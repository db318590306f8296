//! A hundred VMs of one memory, alive at once.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, resume_unwind};

use futures_util::future::join_all;
use futures_util::stream::iter;
use futures_util::{FutureExt as _, StreamExt as _};
use spore_node::hypervisor::fork::{Afterwards, ForkFrom};
use spore_node::hypervisor::{KernelArguments, Machine};
use spore_wire::id::VmId;
use tokio::time::{Instant, timeout};

use crate::driver::{Driver, is_kvm};
use crate::fork::{Running, boot, capture, fork_only, hostname_of};
use crate::host::{HANG, TestHost};
use crate::parked::named;

/// How many there are.
const FORKS: usize = 100;

/// On their way at once: more take turns on a small machine's processors all the same.
const AT_ONCE: usize = 4;

/// What a VM says that no other does: its name, by the kernel and by a file; its boot; chance.
const OWN: &str = "uname -n; cat /proc/sys/kernel/random/boot_id; od -An -tx1 -N16 /dev/urandom";

/// A fork that is renewed and on its network, and what it says of itself.
async fn forked(
    driver: &Driver,
    machine: &Machine,
    from: &ForkFrom,
    source: VmId,
) -> (Running, String) {
    let mut one = fork_only(driver, machine, from, source).await;
    let renewed = async {
        let hostname = hostname_of(one.vm);
        one.agent.thaw(one.vm, &hostname).await.unwrap();
        one.held.open_network().await.unwrap();
        one.agent.sh(OWN).await
    };
    // Of one that ends meanwhile its agent's connection says only that it is closed.
    match AssertUnwindSafe(renewed).catch_unwind().await {
        Ok(said) => (one, said),
        Err(panicked) => {
            let exit = timeout(HANG, one.held.exited()).await;
            let said = one.held.console_tail().await;
            println!("{}: {exit:?} {said:#?}", one.vm);
            resume_unwind(panicked)
        }
    }
}

/// None has ended; says of one that has why, and what its guest said last.
async fn assert_all_live(forks: &[(Running, String)]) {
    for (one, _said) in forks {
        let exit = one.held.exited().now_or_never();
        let said = one.held.console_tail().await;
        assert!(exit.is_none(), "{exit:?} {said:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_forks_all_answer() {
    if !is_kvm() {
        return println!("SKIPPED: a hundred emulated machines take turns for an hour");
    }
    let Some((mut host, machine)) = TestHost::with_agent() else {
        return;
    };
    // More uids than one test's host has, far from those of all others.
    let room = &mut host.config.room;
    room.uid_first = 4_000_000 + (std::process::id() % 4096) * 256;
    room.uid_count = 256;
    host.parked = 2;
    // A tick of each would be all that the processor does.
    host.config.kernel_arguments = KernelArguments::default();
    let driver = host.driver().await;
    let mut template = boot(&driver, &machine).await;
    let from = capture(&mut template, Afterwards::Ends, None).await.source;
    driver.release(template.vm).await.unwrap();

    let begun = Instant::now();
    let of = template.vm;
    let forks = iter(0..FORKS).map(|_fork| forked(&driver, &machine, &from, of));
    let mut forks: Vec<_> = forks.buffer_unordered(AT_ONCE).collect().await;
    println!("{FORKS} forks answered within {:?}", begun.elapsed());
    assert_all_live(&forks).await;
    assert_eq!(named(&host, "spore-vmm").len(), FORKS, "all are there");
    let mut seen = BTreeSet::new();
    for (one, said) in &forks {
        let name = format!("fork-{}", &one.vm.to_string()[..8]);
        assert!(said.starts_with(&name), "{name}: {said}");
        assert_eq!(said.lines().count(), 3, "{said}");
        for line in said.lines() {
            assert!(seen.insert(line.to_owned()), "{line} was said before");
        }
    }

    let mut used = Vec::new();
    for _look in 0..2 {
        let mut all = 0;
        for (one, _) in &forks {
            all += one.held.stats().await.unwrap().cpu_us;
        }
        used.push(all);
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
    }
    println!(
        "idle for 10 s: {} ms of processor",
        (used[1] - used[0]) / 1000
    );
    assert_all_live(&forks).await;
    // Each is still there beside the others, and is who it was.
    for (one, said) in &mut forks {
        let boot = one.agent.sh("cat /proc/sys/kernel/random/boot_id").await;
        assert!(said.contains(&boot), "{boot} is not of {said}");
    }
    let ids = forks.iter().map(|(one, _)| one.vm).collect::<Vec<_>>();
    drop(forks);
    // All at once: those that still run would leave those that end no time.
    let released = join_all(ids.into_iter().map(|vm| driver.release(vm))).await;
    released.into_iter().for_each(Result::unwrap);
    driver.close().unwrap();
    assert_eq!(host.left(), Vec::<String>::new());
}
