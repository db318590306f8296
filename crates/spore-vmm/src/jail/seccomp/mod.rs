//! Which system calls a thread may make, and what becomes of one that makes another: the process
//! ends (`SECCOMP_RET_KILL_PROCESS`), with SIGSYS.
//!
//! Each kind of thread has a list in `lists.rs`, which is compiled once, in the zygote: a program
//! per VMM would cost more than the rest of its jail. A thread keeps the programs that it had, so
//! each new one can only take away:
//!
//! ```text
//!   Zygote ─┬─▶ Sleeper
//!           └─▶ Starting ─┬─▶ Devices, Disks, Vcpu  threads that are made before the guest runs
//!                         └─▶ Running ──▶ Copy      the first, and its copy for a checkpoint
//! ```
//!
//! So a program need not say what is let through: it can also say what is not any more. The kernel
//! translates each anew for each process, in time that grows with its length, and the shorter of
//! the two is taken. Together with those before it, either lets through exactly the list.
//!
//! `clone3` does not exist for any of them (`ENOSYS`): its flags lie in memory, where no filter
//! sees them. glibc falls back to `clone`.

mod ioctls;
mod lists;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

use self::lists::{Argument, Call, Check, When, before};

/// A kind of thread, by what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The zygote, and its copies on their way into their jails.
    Zygote,
    /// The first process of a VMM's pid namespace, which waits for its end.
    Sleeper,
    /// A VMM's first thread until its guest's threads are there.
    Starting,
    /// The same from then on.
    Running,
    /// The thread of the devices.
    Devices,
    /// The thread that copies and merges what disks are made of.
    Disks,
    /// A thread of a processor.
    Vcpu,
    /// A frozen copy of a VMM, which waits.
    Copy,
}

const CELLS: [Cell; 8] = [
    Cell::Zygote,
    Cell::Sleeper,
    Cell::Starting,
    Cell::Running,
    Cell::Devices,
    Cell::Disks,
    Cell::Vcpu,
    Cell::Copy,
];

/// Why a thread is not confined; its process must end.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A list makes no program.
    #[error("the list of {cell:?} cannot be compiled")]
    Compile {
        /// Whose.
        cell: Cell,
        /// What is wrong with it.
        #[source]
        source: BackendError,
    },
    /// The kernel does not take a program.
    #[error("the filter of {cell:?} cannot be installed")]
    Install {
        /// Whose.
        cell: Cell,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The programs of all cells, once they are compiled. A process is in a jail or it is not: as with
/// its ids, that is the process's, and no machine's to know.
static PROGRAMS: OnceLock<Programs> = OnceLock::new();

type Programs = [BpfProgram; CELLS.len()];

/// Compiles all lists, for this process and its copies. It changes nothing by itself.
pub(super) fn prepare() -> Result<(), FilterError> {
    let programs = programs()?;
    let _programs = PROGRAMS.get_or_init(|| programs);
    Ok(())
}

fn programs() -> Result<Programs, FilterError> {
    let mut programs = [const { BpfProgram::new() }; CELLS.len()];
    for (program, cell) in programs.iter_mut().zip(CELLS) {
        let compiled = shortest(cell);
        let mut compiled = compiled.map_err(|source| FilterError::Compile { cell, source })?;
        // Only the zygote makes processes of which it wants a descriptor.
        if cell != Cell::Zygote {
            program.extend(without_clone3());
        }
        program.append(&mut compiled);
    }
    Ok(programs)
}

/// Confines the calling thread for good, and the threads and processes that it will make. Does
/// nothing in a process that was not made by a zygote, as tests and the probe are.
pub fn enter(cell: Cell) -> Result<(), FilterError> {
    let Some(programs) = PROGRAMS.get() else {
        return Ok(());
    };
    let failed = |source| FilterError::Install { cell, source };
    let program = CELLS.iter().zip(programs).find(|(of, _)| **of == cell);
    let (_, program) = program.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    seccompiler::apply_filter(program).map_err(|error| {
        failed(match error {
            seccompiler::Error::Prctl(source) | seccompiler::Error::Seccomp(source) => source,
            other => io::Error::other(other),
        })
    })
}

/// The shorter of the two programs that leave a cell its list.
fn shortest(cell: Cell) -> Result<BpfProgram, BackendError> {
    let list = merged(&lists::of(cell));
    let whole = letting(&list)?;
    let Some(had) = before(cell) else {
        return Ok(whole);
    };
    let less = taking(&merged(&lists::of(had)), &list)?;
    Ok(less
        .filter(|less| less.len() < whole.len())
        .unwrap_or(whole))
}

/// With which arguments calls are let through, by their numbers: when one of these holds, or
/// whatever they are.
type Let = BTreeMap<i64, Option<BTreeSet<Argument>>>;

fn merged(calls: &[Call]) -> Let {
    let mut merged = Let::new();
    for call in calls {
        let known = merged
            .entry(call.number)
            .or_insert_with(|| Some(BTreeSet::new()));
        match (call.when, known.as_mut()) {
            (When::Always, _) => *known = None,
            (When::Any(arguments), Some(known)) => known.extend(arguments),
            (When::Any(_), None) => {}
        }
    }
    merged
}

/// A program that lets a list through and ends the process at all else.
fn letting(list: &Let) -> Result<BpfProgram, BackendError> {
    let holds = |argument: &Argument| {
        // Each argument that is looked at is an int, of which the kernel reads 32 bits too.
        let (compare, value) = match argument.check {
            Check::Is(value) => (SeccompCmpOp::Eq, value),
            Check::Lacks(bits) => (SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
        };
        SeccompRule::new(vec![condition(argument, compare, value)?])
    };
    let rules = list.iter().map(|(number, when)| {
        let arguments = when.iter().flatten();
        Ok((*number, arguments.map(holds).collect::<Result<_, _>>()?))
    });
    let rules = rules.collect::<Result<_, BackendError>>()?;
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// A program that ends the process at what it had and is not on its list. `None` where that cannot
/// be said: seccompiler does not ask whether any of some bits is there.
fn taking(had: &Let, list: &Let) -> Result<Option<BpfProgram>, BackendError> {
    let mut rules = BTreeMap::new();
    for (number, had) in had {
        let none = match list.get(number) {
            // Whatever its arguments are.
            None => Vec::new(),
            Some(None) => continue,
            Some(Some(left)) if had.as_ref().is_some_and(|had| had.is_subset(left)) => continue,
            Some(Some(left)) => {
                let mut none = Vec::new();
                for argument in left {
                    let Check::Is(value) = argument.check else {
                        return Ok(None);
                    };
                    none.push(condition(argument, SeccompCmpOp::Ne, value)?);
                }
                vec![SeccompRule::new(none)?]
            }
        };
        rules.insert(*number, none);
    }
    compile(rules, SeccompAction::Allow, SeccompAction::KillProcess).map(Some)
}

fn condition(
    argument: &Argument,
    compare: SeccompCmpOp,
    value: u32,
) -> Result<SeccompCondition, BackendError> {
    let width = SeccompCmpArgLen::Dword;
    SeccompCondition::new(argument.number, width, compare, u64::from(value))
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    then: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, then, arch)?.try_into()
}

/// What goes before a program so that there is no `clone3`: a list says yes or no, and nothing
/// between.
fn without_clone3() -> [sock_filter; 3] {
    const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
    const CLONE3: u32 = 435;
    const { assert!(CLONE3 as i64 == libc::SYS_clone3) };
    let step = |code: u32, jf, k| sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: 0,
        jf,
        k,
    };
    [
        // The number is the first field of `seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, CLONE3),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | ENOSYS,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use seccompiler::sock_filter;

    use super::lists::{self, Check, When, before};
    use super::{CELLS, Cell, Let, merged, programs, shortest};

    /// What nobody in the jail may do, whatever the arguments.
    const NEVER: &[i64] = &[
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_personality,
        libc::SYS_memfd_create,
        libc::SYS_pkey_mprotect,
        libc::SYS_shmat,
        libc::SYS_remap_file_pages,
    ];

    #[test]
    fn no_list_has_what_nobody_may_do() {
        for cell in CELLS {
            for call in lists::of(cell) {
                assert!(!NEVER.contains(&call.number), "{cell:?}: {}", call.number);
            }
        }
    }

    #[test]
    fn calls_that_can_do_much_are_only_let_through_by_their_arguments() {
        let narrow = [
            libc::SYS_clone,
            libc::SYS_mmap,
            libc::SYS_mprotect,
            libc::SYS_prctl,
            libc::SYS_ioctl,
            libc::SYS_fcntl,
            libc::SYS_madvise,
            libc::SYS_tgkill,
            libc::SYS_unshare,
        ];
        for cell in CELLS.into_iter().filter(|cell| *cell != Cell::Zygote) {
            for call in lists::of(cell) {
                let always = matches!(call.when, When::Always);
                assert!(
                    !always || !narrow.contains(&call.number),
                    "{cell:?}: {}",
                    call.number
                );
            }
        }
    }

    /// What a program says of a call (the machine of <linux/bpf_common.h>, as far as programs of
    /// seccompiler and of this module use it).
    fn says(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
        let word = |at: u32| match at {
            0 => number,
            4 => AUDIT_ARCH_X86_64,
            16.. => {
                let argument = arguments[usize::try_from((at - 16) / 8).unwrap()];
                let half = if at.is_multiple_of(8) {
                    argument
                } else {
                    argument >> 32
                };
                u32::try_from(half & u64::from(u32::MAX)).unwrap()
            }
            _ => panic!("nothing is read at {at}"),
        };
        let (mut at, mut acc) = (0, 0_u32);
        loop {
            let step: &sock_filter = &program[at];
            at += 1;
            let code = u32::from(step.code);
            let jump = |is: bool| usize::from(if is { step.jt } else { step.jf });
            match (code & 0x07, code & 0xf0) {
                (libc::BPF_LD, _) => acc = word(step.k),
                (libc::BPF_ALU, libc::BPF_AND) => acc &= step.k,
                (libc::BPF_JMP, libc::BPF_JA) => at += usize::try_from(step.k).unwrap(),
                (libc::BPF_JMP, libc::BPF_JEQ) => at += jump(acc == step.k),
                (libc::BPF_JMP, libc::BPF_JGT) => at += jump(acc > step.k),
                (libc::BPF_JMP, libc::BPF_JGE) => at += jump(acc >= step.k),
                (libc::BPF_JMP, libc::BPF_JSET) => at += jump(acc & step.k != 0),
                (libc::BPF_RET, _) => return step.k,
                _ => panic!("{step:?}"),
            }
        }
    }

    /// Of <linux/audit.h>.
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const CLONE3: u32 = 435;

    fn is_let(list: &Let, number: u32, arguments: [u64; 6]) -> bool {
        match list.get(&i64::from(number)) {
            None => false,
            Some(None) => true,
            Some(Some(any)) => any.iter().any(|argument| {
                let low = u32::try_from(arguments[usize::from(argument.number)] & 0xffff_ffff);
                match argument.check {
                    Check::Is(value) => low == Ok(value),
                    Check::Lacks(bits) => low.unwrap() & bits == 0,
                }
            }),
        }
    }

    /// All values that any list asks for, and what is next to them.
    fn values() -> BTreeSet<u64> {
        let checks = CELLS.into_iter().flat_map(|cell| {
            let list = merged(&lists::of(cell));
            let arguments = list.into_values().flatten().flatten();
            arguments.map(|argument| argument.check).collect::<Vec<_>>()
        });
        let of = checks.map(|check| match check {
            Check::Is(value) | Check::Lacks(value) => u64::from(value),
        });
        of.flat_map(|value| [value, value ^ 1, value | 1 << 40])
            .collect()
    }

    #[test]
    fn programs_one_on_top_of_the_other_let_through_exactly_the_lists() {
        let (programs, values) = (programs().unwrap(), values());
        let of = |cell: Cell| &programs[CELLS.iter().position(|of| *of == cell).unwrap()];
        for cell in CELLS {
            let list = merged(&lists::of(cell));
            let over = std::iter::successors(Some(cell), |cell| before(*cell));
            let over: Vec<_> = over.map(of).collect();
            for number in (0..=460).chain([0x4000_0000, 0x4000_0010]) {
                for (at, value) in (0..6).flat_map(|at| values.iter().map(move |of| (at, of))) {
                    let mut arguments = [0x7777_7777_7777_7777; 6];
                    arguments[at] = *value;
                    let said = over.iter().map(|program| says(program, number, arguments));
                    // Of several answers the kernel takes the one that lets through least, by
                    // the order of their signed numbers (seccomp(2)).
                    let said = said.min_by_key(|said| (said & 0xffff_0000).cast_signed());
                    let expected = if is_let(&list, number, arguments) {
                        libc::SECCOMP_RET_ALLOW
                    } else if number == CLONE3 && cell != Cell::Zygote {
                        libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()
                    } else {
                        libc::SECCOMP_RET_KILL_PROCESS
                    };
                    assert_eq!(said, Some(expected), "{cell:?} {number} {arguments:x?}");
                }
            }
        }
    }

    #[test]
    fn what_a_thread_enters_is_short() {
        for (cell, most) in [
            (Cell::Sleeper, 32),
            (Cell::Starting, 128),
            (Cell::Running, 256),
            (Cell::Devices, 160),
            (Cell::Disks, 192),
            (Cell::Vcpu, 160),
        ] {
            let length = shortest(cell).unwrap().len();
            println!("{cell:?}: {length}");
            assert!(length <= most, "{cell:?}: {length}");
        }
    }

    #[test]
    fn every_list_compiles_and_fits_a_program() {
        for program in &programs().unwrap() {
            // BPF_MAXINSNS of <linux/bpf_common.h>.
            assert!((4..4096).contains(&program.len()), "{}", program.len());
        }
    }
}
