//! What a copy of the zygote does to become a sleeper or a VMM. Called on the spawner's stack, and
//! never comes back. Why in this order: [`super`].

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, Gid, Uid};
use spore_wire::cause::chain;
use spore_wire::zygote::KVM_FD;

use super::limits::Limits;
use super::seccomp::{self, Cell};
use super::setup::KEPT;
use super::{Inherited, JailError, LIFE_FD, Run, UNJAILED, VMM_PID, check, step, sys};
use crate::inherited::CONTROL_FD;

/// The exit code of a VMM that panicked, as Rust has it.
const PANICKED: u8 = 101;

/// How long a sleeper lets its VMM go first.
const AFTER_ITS_VMM: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// What a VMM is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    /// Its uid and gid in the zygote's user namespace; never 0.
    pub(super) uid: u32,
    pub(super) null: BorrowedFd<'a>,
    pub(super) output: BorrowedFd<'a>,
    pub(super) control: BorrowedFd<'a>,
    pub(super) kvm: Option<BorrowedFd<'a>>,
    pub(super) run: Run,
}

/// The first process of a VM: it sleeps until nobody holds the other end of `life`, and then all
/// others of its pid namespace end with it.
pub(super) fn sleeper(plan: &Plan<'_>, life: BorrowedFd<'_>) -> ! {
    let jailed = (|| {
        sys::place(&[(life.as_raw_fd(), 0)]).map_err(step("descriptors"))?;
        rustix::thread::set_name(c"spore-init").map_err(step("name"))?;
        // Copies that outlive their VMM become its children.
        sys::reap_none().map_err(step("children"))?;
        confine(plan.uid, Limits::SLEEPER)?;
        // The kernel translates one filter at a time, and its VMM's has more to wait for it.
        let mut life = [PollFd::from_borrowed_fd(
            rustix::stdio::stdin(),
            PollFlags::IN,
        )];
        let _ended = poll(&mut life, Some(&AFTER_ITS_VMM));
        seccomp::enter(Cell::Sleeper)?;
        Ok::<(), JailError>(())
    })();
    if jailed.is_err() {
        // It has nowhere to say why; its VMM meets the same and says it.
        sys::end(UNJAILED);
    }
    let mut ignored = [0];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut ignored) {
            Ok(0) => sys::end(0),
            // What is written there says nothing.
            Ok(_) | Err(Errno::INTR) => {}
            Err(_other) => sys::end(UNJAILED),
        }
    }
}

/// A VMM.
pub(super) fn vmm(plan: &Plan<'_>, life: BorrowedFd<'_>) -> ! {
    sys::take_stack();
    let code = match jail(plan, life) {
        // It must not come back to what is below it on the stack, not by a panic either.
        Ok(inherited) => {
            catch_unwind(AssertUnwindSafe(|| (plan.run)(inherited))).unwrap_or(PANICKED)
        }
        Err(error) => {
            // Whoever gave no output does not want to know.
            let _unheard = writeln!(std::io::stderr(), "spore-vmm: {}", chain(&error));
            UNJAILED
        }
    };
    sys::end(code)
}

fn jail(plan: &Plan<'_>, life: BorrowedFd<'_>) -> Result<Inherited, JailError> {
    let mut pairs = vec![
        (plan.null.as_raw_fd(), 0),
        (plan.output.as_raw_fd(), 1),
        (plan.output.as_raw_fd(), 2),
        (plan.control.as_raw_fd(), CONTROL_FD),
        (life.as_raw_fd(), LIFE_FD),
    ];
    pairs.extend(plan.kvm.map(|kvm| (kvm.as_raw_fd(), KVM_FD)));
    sys::place(&pairs).map_err(step("descriptors"))?;
    let inherited = Inherited {
        control: sys::placed(CONTROL_FD),
        kvm: plan.kvm.map(|_there| sys::placed(KVM_FD)),
    };
    // Until it has a guest.
    rustix::thread::set_name(c"spore-parked").map_err(step("name"))?;
    // A filter knows its process by this number.
    let pid = rustix::process::getpid().as_raw_pid();
    check(
        "it is not alone in its pid namespace",
        pid.cast_unsigned() == VMM_PID,
    )?;
    sys::all_signals().map_err(step("signals"))?;
    // Nobody waits for the copies that it makes of itself.
    sys::reap_none().map_err(step("children"))?;
    confine(plan.uid, Limits::VMM)?;
    seccomp::enter(Cell::Starting)?;
    Ok(inherited)
}

/// What a sleeper and a VMM have in common.
fn confine(uid: u32, limits: Limits) -> Result<(), JailError> {
    limits.set()?;
    // With its parent's end a process group is orphaned, and all of it is hung up when one of it is
    // stopped (_exit(2)): the end of a zygote must not be that of every VM.
    rustix::process::setsid().map_err(step("session"))?;
    own_cgroup_namespace().map_err(step("cgroup namespace"))?;
    empty_bounding_set(KEPT, CapabilitySet::empty())?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    rustix::thread::set_thread_res_gid(group, group, group).map_err(step("gid"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(step("uid"))?;
    let none = CapabilitySet::empty();
    set_capabilities(none)?;
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("dumpable"))?;
    check_ids(uid)
}

/// In it, the cgroup that the process is in is the root. The zygote has none of its own: from one
/// it could put no child into a cgroup, where cgroup2 is mounted with `nsdelegate`.
fn own_cgroup_namespace() -> Result<(), Errno> {
    sys::unshare(rustix::thread::UnshareFlags::NEWCGROUP)
}

fn check_ids(uid: u32) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    let users = [rustix::process::getuid(), rustix::process::geteuid()];
    let groups = [rustix::process::getgid(), rustix::process::getegid()];
    check("another uid", uid != 0 && users == [user; 2])?;
    check("another gid", groups == [group; 2])?;
    let more = rustix::process::getgroups().map_err(step("groups"))?;
    check("supplementary groups", more.is_empty())
}

/// Gives up all capabilities but these, from every set but the bounding one.
pub(super) fn set_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    rustix::thread::clear_ambient_capability_set().map_err(step("ambient capabilities"))?;
    let sets = rustix::thread::CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(step("capabilities"))?;
    let now = rustix::thread::capabilities(None).map_err(step("capabilities"))?;
    let same = now.effective == kept && now.permitted == kept && now.inheritable.is_empty();
    check("capabilities", same)
}

/// Takes all but those that are kept out of a bounding set that has no others than `had`. What is
/// not in it never comes back, so that a copy has to do with what its source had kept only.
pub(super) fn empty_bounding_set(had: CapabilitySet, kept: CapabilitySet) -> Result<(), JailError> {
    for capability in had.difference(kept).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(step("bounding set")(error)),
        }
        let there = rustix::thread::capability_is_in_bounding_set(capability);
        check("bounding set", !there.unwrap_or(false))?;
    }
    Ok(())
}
