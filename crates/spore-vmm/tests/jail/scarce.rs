//! VMMs that the host gives nothing more: no descriptor, no memory. Each request that needs some
//! is refused with the reason, wherever it is found missing; what was taken until then is given
//! back, and the same VMM does what it is asked when there is more again.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use spore_wire::vmm::{FromVmm, ToVmm};
use spore_wire::zygote::ExitedBy;

use crate::launch::{Control, Given, PROGRAM, boots, file, memory, usable};
use crate::node::{Vmm, Zygote};

/// The descriptors that the jail lets a VMM have: more than a guest of two processors needs.
const FILES_MAX: u64 = 256;

/// How much more memory is allowed in each turn.
const STEP_BYTES: u64 = 32 * 1024;

/// A zygote, and whether its KVM runs guests; `None` without KVM.
fn zygote() -> Option<(Zygote, bool)> {
    let (kvm, runs) = match usable() {
        Ok(kvm) => (kvm, true),
        Err(why) => {
            // Without running them, guests are launched on any.
            println!("no guest runs: {why}");
            let opened = File::options().read(true).write(true).open("/dev/kvm");
            match opened {
                Ok(kvm) => (kvm, false),
                Err(error) => {
                    println!("SKIPPED: /dev/kvm: {error}");
                    return None;
                }
            }
        }
    };
    let zygote = Zygote::start(Path::new(PROGRAM), &["zygote", "--uids"], Some(kvm));
    Some((zygote, runs))
}

/// What a VMM may have from now on; `None` is all that it might have at its start. Only the limit
/// that can be raised again.
fn limit(vmm: &Vmm, resource: Resource, most: Option<u64>) {
    let maximum = (resource == Resource::Nofile).then_some(FILES_MAX);
    let limit = Rlimit {
        current: most.or(maximum),
        maximum,
    };
    let pid = Pid::from_raw(vmm.process.0.cast_signed());
    prlimit(pid, resource, limit).unwrap();
}

/// Lets a VMM give back what it has made ahead, by a launch that cannot be: whatever the next one
/// needs it makes then.
fn nothing_ahead(vmm: &Vmm, control: &mut Control<'_>, given: &Given) {
    let fds = given.fds();
    let refused = control.tries(&given.request(), &fds[1..]);
    assert!(refused.is_err());
    vmm.process.wait_one_thread();
}

/// The lowest number that no descriptor of it has.
fn next(vmm: &Vmm) -> u64 {
    let open = vmm.process.open();
    (0..)
        .find(|number| !open.contains_key(number))
        .unwrap()
        .into()
}

/// The processor's time that its first thread has used, in hundredths of a second.
fn ticks(vmm: &Vmm) -> u64 {
    let pid = vmm.process.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let of = |at: usize| fields.split_whitespace().nth(at).unwrap().parse::<u64>();
    of(11).unwrap() + of(12).unwrap()
}

fn mapped_bytes(vmm: &Vmm) -> u64 {
    let size = vmm.process.status("VmSize");
    size.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

pub(crate) fn a_vmm_at_its_limit_of_descriptors_refuses_and_goes_on() {
    let Some(given) = boots(memory()) else { return };
    let Some((zygote, runs)) = zygote() else {
        return;
    };
    let vmm = zygote.spawn(1);
    let mut control = Control::new(&zygote, &vmm);
    nothing_ahead(&vmm, &mut control, &given);
    let (before, least) = (vmm.process.open(), next(&vmm));
    let mut reasons = BTreeSet::new();
    let enough = (least..FILES_MAX).find(|most| {
        limit(&vmm, Resource::Nofile, Some(*most));
        let refused = control.launch(&given).err();
        if refused.is_some() {
            vmm.process.wait_open(&before);
            vmm.process.wait_one_thread();
        }
        let is_launched = refused.is_none();
        reasons.extend(refused);
        is_launched
    });
    println!("from {least} to {enough:?}: {reasons:#?}");
    assert!(enough.is_some_and(|most| most > least + 20));
    let is_told = |why: &String| why.contains("not all descriptors") || why.contains("os error 24");
    assert!(reasons.iter().all(is_told), "{reasons:#?}");
    if runs {
        control.asks(&ToVmm::Resume, &[]);
    }
    limit(&vmm, Resource::Nofile, Some(next(&vmm)));
    let into = file(0);
    let refused = control.tries(&ToVmm::Console, &[into.as_fd()]);
    assert!(refused.unwrap_err().contains("not all descriptors"));
    // Somebody waits to be let in, and costs nothing.
    let waits = vmm.connect();
    let start = ticks(&vmm);
    std::thread::sleep(Duration::from_secs(1));
    let spent = ticks(&vmm) - start;
    assert!(spent < 30, "{spent} of 100");
    control.asks(&ToVmm::Pause { limit_ms: 60_000 }, &[]);
    limit(&vmm, Resource::Nofile, None);
    let hello = serde_json::from_str(&waits.hears().unwrap()).unwrap();
    assert!(matches!(hello, FromVmm::Hello { .. }), "{hello:?}");
    control.talk = waits;
    control.asks(&ToVmm::Save, &[into.as_fd()]);
    if runs {
        control.asks(&ToVmm::Resume, &[]);
        control.says("Linux version");
    }
    control.quit(&vmm);
    zygote.close();
}

/// How a launch ended for which there was only so much memory.
enum Short {
    Launched,
    Refused(String),
    /// The VMM is gone, and its guest with it.
    Ended(ExitedBy),
}

fn launch_within(zygote: &Zygote, vmm: &Vmm, given: &Given, more_bytes: u64) -> Short {
    let mut control = Control::new(zygote, vmm);
    nothing_ahead(vmm, &mut control, given);
    let before = vmm.process.open();
    limit(vmm, Resource::As, Some(mapped_bytes(vmm) + more_bytes));
    let launched = control.tries_if_there(&given.request(), &given.fds());
    // Its threads have begun when they stand still.
    let pause = ToVmm::Pause { limit_ms: 60_000 };
    let launched = match launched {
        Some(Ok(_)) => control.tries_if_there(&pause, &[]),
        refused => refused,
    };
    match launched {
        None => Short::Ended(zygote.waits(vmm)),
        Some(Ok(_)) => Short::Launched,
        Some(Err(why)) => {
            limit(vmm, Resource::As, None);
            vmm.process.wait_open(&before);
            vmm.process.wait_one_thread();
            Short::Refused(why)
        }
    }
}

pub(crate) fn a_vmm_that_gets_no_memory_refuses_or_ends_alone() {
    let Some(given) = boots(memory()) else { return };
    let Some((zygote, _runs)) = zygote() else {
        return;
    };
    let neighbour = zygote.spawn(2);
    let mut beside = Control::new(&zygote, &neighbour);
    let mut vmm = zygote.spawn(1);
    let (mut reasons, mut ends) = (BTreeSet::new(), 0);
    let guests = u64::from(given.blob.memory_mib) << 20;
    let turns = [0, guests / 2].into_iter();
    let turns = turns.chain((0..1000).map(|turn| guests + turn * STEP_BYTES));
    for more_bytes in turns {
        match launch_within(&zygote, &vmm, &given, more_bytes) {
            Short::Launched => break,
            Short::Refused(why) => {
                reasons.insert(why);
            }
            Short::Ended(by) => {
                // Rust's own memory was what was missing.
                assert_eq!(by, ExitedBy::Signal { signal: 6 }, "{more_bytes}");
                ends += 1;
                vmm = zygote.spawn(1);
            }
        }
    }
    println!("{ends} ended, and {reasons:#?}");
    assert!(reasons.len() > 1, "{reasons:#?}");
    let is_told = |why: &String| why.contains("os error 12") || why.contains("os error 11");
    assert!(reasons.iter().all(is_told), "{reasons:#?}");
    limit(&vmm, Resource::As, None);
    let mut control = Control::new(&zygote, &vmm);
    let into = file(0);
    assert!(control.asks(&ToVmm::Save, &[into.as_fd()]) > 0);
    control.quit(&vmm);
    beside.launch(&given).unwrap();
    beside.quit(&neighbour);
    zygote.close();
}
