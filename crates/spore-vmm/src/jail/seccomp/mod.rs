//! Which system calls a thread may make, and what becomes of one that makes another: the process
//! ends (`SECCOMP_RET_KILL_PROCESS`), with SIGSYS.
//!
//! Each kind of thread has a list in `lists.rs`, which is compiled once, in the zygote: a program
//! per VMM would cost more than the rest of its jail. A thread keeps the lists that it had, so each
//! new one can only take away:
//!
//! ```text
//!   Zygote ─┬─▶ Sleeper
//!           └─▶ Starting ─┬─▶ Devices, Disks, Vcpu  threads that are made before the guest runs
//!                         └─▶ Running ──▶ Copy      the first, and its copy for a checkpoint
//! ```
//!
//! `clone3` does not exist for any of them (`ENOSYS`): its flags lie in memory, where no filter
//! sees them. glibc falls back to `clone`.

mod ioctls;
mod lists;

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use self::lists::{Argument, Call, Check, When};

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
        source: seccompiler::BackendError,
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
        let compiled = compile(&lists::of(cell), SeccompAction::KillProcess);
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

/// A program that lets these calls through and answers all others so.
fn compile(
    calls: &[Call],
    otherwise: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    // `None`: whatever its arguments are.
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for call in calls {
        let known = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
        match (call.when, known.as_mut()) {
            (When::Always, _) => *known = None,
            (When::Any(arguments), Some(known)) => {
                for argument in arguments {
                    known.push(rule(*argument)?);
                }
            }
            (When::Any(_), None) => {}
        }
    }
    let rules = rules
        .into_iter()
        .map(|(number, rules)| (number, rules.unwrap_or_default()))
        .collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
}

fn rule(argument: Argument) -> Result<SeccompRule, seccompiler::BackendError> {
    // Each argument that is looked at is an int, of which the kernel reads 32 bits too.
    let (compare, value) = match argument.check {
        Check::Is(value) => (SeccompCmpOp::Eq, value),
        Check::Lacks(bits) => (SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
    };
    let width = SeccompCmpArgLen::Dword;
    let condition = SeccompCondition::new(argument.number, width, compare, u64::from(value))?;
    SeccompRule::new(vec![condition])
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
    use super::lists::{self, When};
    use super::{CELLS, Cell, programs};

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

    #[test]
    fn every_list_compiles_and_fits_a_program() {
        for program in &programs().unwrap() {
            // BPF_MAXINSNS of <linux/bpf_common.h>.
            assert!((4..4096).contains(&program.len()), "{}", program.len());
        }
    }
}
