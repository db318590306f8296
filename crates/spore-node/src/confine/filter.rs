//! The system calls of a helper process: what ends it, and what it is told not to exist.
//!
//! Installed by [`super::confine`] as its last step. Three programs, of which the kernel obeys the
//! strictest answer:
//!
//! | program | what | answer |
//! |---|---|---|
//! | forbidden | calls that no helper needs and every exploit wants | the process ends |
//! | absent | `clone3`, whose flags lie in memory where no filter sees them | `ENOSYS` |
//! | x32 | the same calls by other numbers (x86-64 only) | the process ends |
//!
//! Told that there is no `clone3`, libc falls back to `clone`.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::ConfineError;

/// System calls that no helper needs and every exploit wants.
const FORBIDDEN: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_open_by_handle_at,
    libc::SYS_personality,
    libc::SYS_mknodat,
    libc::SYS_setuid,
    libc::SYS_setresuid,
    libc::SYS_setgid,
    libc::SYS_setresgid,
    libc::SYS_capset,
    // Other processes of the same uid are another tenant's work.
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
];

/// Flags of `clone` that make a namespace: in a new user namespace a process has every capability,
/// and with them most of the kernel to attack.
const NAMESPACE_FLAGS: &[libc::c_int] = &[
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Installs the filter in all threads of the calling process, for good.
pub(super) fn install() -> Result<(), ConfineError> {
    for program in programs(std::process::id())? {
        seccompiler::apply_filter_all_threads(&program)?;
    }
    Ok(())
}

/// The programs of the process `own`, which may signal its own threads and no others (abort(3)).
fn programs(own: u32) -> Result<Vec<BpfProgram>, ConfineError> {
    let mut programs = vec![forbidden(own)?, absent()?];
    if cfg!(target_arch = "x86_64") {
        programs.push(x32());
    }
    Ok(programs)
}

fn forbidden(own: u32) -> Result<BpfProgram, ConfineError> {
    let mut rules = FORBIDDEN
        .iter()
        .map(|number| (*number, Vec::new()))
        .collect::<BTreeMap<_, _>>();
    let mut namespaces = Vec::new();
    for flag in NAMESPACE_FLAGS {
        let flag = u64::from(flag.cast_unsigned());
        let set = SeccompCmpOp::MaskedEq(flag);
        namespaces.push(rule(0, set, flag)?);
    }
    rules.insert(libc::SYS_clone, namespaces);
    let others = rule(0, SeccompCmpOp::Ne, u64::from(own))?;
    rules.insert(libc::SYS_tgkill, vec![others]);
    program(rules, SeccompAction::KillProcess)
}

fn absent() -> Result<BpfProgram, ConfineError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(rules, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()))
}

fn rule(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, ConfineError> {
    let width = SeccompCmpArgLen::Dword;
    let condition = SeccompCondition::new(argument, width, compare, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    answer: SeccompAction,
) -> Result<BpfProgram, ConfineError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch)?;
    Ok(filter.try_into()?)
}

/// Ends the process at every call whose number has the x32 bit: such calls come with the
/// architecture of x86-64 and with numbers that no list above has. By hand, since `seccompiler` has
/// no words for a range of numbers.
fn x32() -> BpfProgram {
    /// `__X32_SYSCALL_BIT` of `asm/unistd.h`.
    const X32: u32 = 0x4000_0000;
    let step = |code: u32, jf: u8, k: u32| seccompiler::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: 0,
        jf,
        k,
    };
    vec![
        // The number is the first field of `seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, X32),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::{FORBIDDEN, NAMESPACE_FLAGS, programs};
    use crate::sys::probe::{call, in_child};

    /// What became of a process that made one call behind the filter.
    #[derive(Debug, PartialEq, Eq)]
    enum Fate {
        Ended,
        Refused(i32),
        Done,
    }

    /// Does `work` in a process of its own, behind the filter.
    fn behind(work: impl FnOnce() -> u8) -> ExitStatus {
        in_child(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            for program in &programs(std::process::id()).unwrap() {
                seccompiler::apply_filter(program).unwrap();
            }
            work()
        })
    }

    fn fate(number: i64, arguments: [u64; 3]) -> Fate {
        let status = behind(|| match call(number, arguments) {
            Ok(_) => 0,
            Err(error) => u8::try_from(error.raw_os_error().unwrap()).unwrap(),
        });
        match (status.signal(), status.code()) {
            (Some(libc::SIGSYS), _) => Fate::Ended,
            (None, Some(0)) => Fate::Done,
            (None, Some(errno)) => Fate::Refused(errno),
            other => panic!("it ended in another way: {other:?}"),
        }
    }

    #[test]
    fn no_flag_of_clone_makes_a_namespace() {
        for flag in NAMESPACE_FLAGS {
            let flags = u64::from((flag | libc::SIGCHLD).cast_unsigned());
            assert_eq!(
                fate(libc::SYS_clone, [flags, 0, 0]),
                Fate::Ended,
                "{flag:#x}"
            );
        }
        let plain = u64::from(libc::SIGCHLD.cast_unsigned());
        assert_eq!(fate(libc::SYS_clone, [plain, 0, 0]), Fate::Done);
    }

    #[test]
    fn clone3_is_told_not_to_exist_and_threads_start_all_the_same() {
        let absent = Fate::Refused(libc::ENOSYS);
        assert_eq!(fate(libc::SYS_clone3, [0, 88, 0]), absent);
        let status = behind(|| std::thread::spawn(|| 7).join().unwrap());
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn every_forbidden_call_ends_the_process() {
        for number in FORBIDDEN {
            assert_eq!(fate(*number, [0, 0, 0]), Fate::Ended, "{number}");
        }
    }

    #[test]
    fn a_process_may_signal_itself_and_nobody_else() {
        let parent = u64::from(std::process::id());
        assert_eq!(fate(libc::SYS_tgkill, [parent, parent, 0]), Fate::Ended);
        let status = behind(|| {
            let own = u64::from(std::process::id());
            u8::from(call(libc::SYS_tgkill, [own, own, 0]).is_err())
        });
        assert_eq!(status.code(), Some(0));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn no_call_of_the_x32_abi_is_made() {
        for number in [libc::SYS_getpid, libc::SYS_execve, libc::SYS_unshare, 520] {
            assert_eq!(
                fate(number | 0x4000_0000, [0, 0, 0]),
                Fate::Ended,
                "{number}"
            );
        }
        assert_eq!(fate(libc::SYS_getpid, [0, 0, 0]), Fate::Done);
    }
}
