//! What each kind of thread may call, and with which arguments. Read by [`super`] alone.

use super::Cell;
use super::ioctls::{
    FIONBIO, KVM_CHECK_EXTENSION, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU, KVM_CREATE_VM,
    KVM_GET_API_VERSION, KVM_GET_CLOCK, KVM_GET_CPUID2, KVM_GET_DEBUGREGS, KVM_GET_DEVICE_ATTR,
    KVM_GET_IRQCHIP, KVM_GET_LAPIC, KVM_GET_MP_STATE, KVM_GET_MSR_INDEX_LIST, KVM_GET_MSRS,
    KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_SUPPORTED_CPUID, KVM_GET_TSC_KHZ, KVM_GET_VCPU_EVENTS,
    KVM_GET_VCPU_MMAP_SIZE, KVM_GET_XCRS, KVM_GET_XSAVE, KVM_IOEVENTFD, KVM_IRQFD,
    KVM_KVMCLOCK_CTRL, KVM_RUN, KVM_SET_CLOCK, KVM_SET_CPUID2, KVM_SET_DEBUGREGS,
    KVM_SET_DEVICE_ATTR, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_IRQCHIP, KVM_SET_LAPIC,
    KVM_SET_MP_STATE, KVM_SET_MSRS, KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_TSC_KHZ, KVM_SET_TSS_ADDR,
    KVM_SET_USER_MEMORY_REGION, KVM_SET_VCPU_EVENTS, KVM_SET_XCRS, KVM_SET_XSAVE,
};
use crate::jail::VMM_PID;

/// A call that is let through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) when: When,
}

/// With which arguments.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    /// Whatever they are.
    Always,
    /// When one of these holds.
    Any(&'static [Argument]),
}

/// What must hold of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Argument {
    /// From 0.
    pub(super) number: u8,
    pub(super) check: Check,
}

/// What must hold of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Check {
    Is(u32),
    /// It has none of these bits.
    Lacks(u32),
}

const fn always(number: i64) -> Call {
    Call {
        number,
        when: When::Always,
    }
}

const fn any(number: i64, arguments: &'static [Argument]) -> Call {
    Call {
        number,
        when: When::Any(arguments),
    }
}

const fn is(number: u8, value: u32) -> Argument {
    Argument {
        number,
        check: Check::Is(value),
    }
}

const fn int(number: u8, value: libc::c_int) -> Argument {
    is(number, value.cast_unsigned())
}

const fn lacks(number: u8, bits: libc::c_int) -> Argument {
    Argument {
        number,
        check: Check::Lacks(bits.cast_unsigned()),
    }
}

/// The flags with which glibc's `pthread_create` calls `clone`: a thread and nothing else.
const THREAD: u32 = 0x003d_0f00;

const _: () = assert!(
    THREAD
        == (libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID)
            .cast_unsigned()
);

/// The flags with which a VMM is copied for a checkpoint (`super::super::copy`).
pub(super) const COPY: u32 = libc::SIGCHLD.cast_unsigned();

/// What every thread does: end, come back from a signal, wait for another, and the clock where it
/// is no shared page.
const EVERY: &[Call] = &[
    always(libc::SYS_exit),
    always(libc::SYS_exit_group),
    always(libc::SYS_rt_sigreturn),
    always(libc::SYS_restart_syscall),
    always(libc::SYS_futex),
    always(libc::SYS_sched_yield),
    always(libc::SYS_clock_gettime),
];

/// The allocator, and the stack of a thread that ends. Nothing that is mapped can be run.
const MEMORY: &[Call] = &[
    always(libc::SYS_brk),
    any(libc::SYS_mmap, &[lacks(2, libc::PROT_EXEC)]),
    any(libc::SYS_mprotect, &[lacks(2, libc::PROT_EXEC)]),
    always(libc::SYS_mremap),
    always(libc::SYS_munmap),
    any(
        libc::SYS_madvise,
        &[
            int(2, libc::MADV_DONTNEED),
            int(2, libc::MADV_DONTDUMP),
            int(2, libc::MADV_NOHUGEPAGE),
            int(2, libc::MADV_POPULATE_READ),
            int(2, libc::MADV_POPULATE_WRITE),
        ],
    ),
    always(libc::SYS_sigaltstack),
    always(libc::SYS_rt_sigprocmask),
];

/// What a panic does, and `abort` after it: the message goes to descriptor 2. The pid is what the
/// VMM has in its own pid namespace, so nobody else is called.
const ABORT: &[Call] = &[
    always(libc::SYS_write),
    always(libc::SYS_getpid),
    always(libc::SYS_gettid),
    any(libc::SYS_tgkill, &[is(0, VMM_PID)]),
];

/// A narrower list, for a thread that begins or for a copy.
const NARROW: &[Call] = &[
    any(libc::SYS_seccomp, &[is(0, libc::SECCOMP_SET_MODE_FILTER)]),
    any(libc::SYS_prctl, &[int(0, libc::PR_SET_NO_NEW_PRIVS)]),
];

/// Threads are made.
const THREADS: &[Call] = &[
    any(libc::SYS_clone, &[is(0, THREAD)]),
    always(libc::SYS_set_robust_list),
    always(libc::SYS_rseq),
    always(libc::SYS_sched_getaffinity),
    any(libc::SYS_prctl, &[int(0, libc::PR_SET_NAME)]),
    // Of the calling thread. Nobody here may have a better one than it began with.
    any(libc::SYS_setpriority, &[is(1, 0)]),
    // The signal that calls a processor back.
    always(libc::SYS_rt_sigaction),
];

/// What comes over the control socket, and its descriptors: none is opened, all came in open.
const CONTROL: &[Call] = &[
    always(libc::SYS_accept4),
    always(libc::SYS_recvmsg),
    always(libc::SYS_sendmsg),
    always(libc::SYS_ppoll),
    always(libc::SYS_fstat),
    always(libc::SYS_lseek),
    always(libc::SYS_eventfd2),
    any(
        libc::SYS_fcntl,
        &[
            int(1, libc::F_GETFL),
            int(1, libc::F_SETFD),
            int(1, libc::F_DUPFD_CLOEXEC),
        ],
    ),
    any(libc::SYS_ioctl, &[is(1, FIONBIO)]),
];

/// Files that a guest is launched from, and those that it is saved to.
const FILES: &[Call] = &[
    always(libc::SYS_read),
    always(libc::SYS_write),
    always(libc::SYS_readv),
    always(libc::SYS_writev),
    always(libc::SYS_pread64),
    always(libc::SYS_pwrite64),
    always(libc::SYS_fdatasync),
    always(libc::SYS_ftruncate),
    always(libc::SYS_getrandom),
];

/// A descriptor is closed: where assertions are on, Rust looks whether it was open.
const CLOSE: &[Call] = &[
    always(libc::SYS_close),
    any(libc::SYS_fcntl, &[int(1, libc::F_GETFD)]),
];

/// What the devices do for the guest.
const DEVICES: &[Call] = &[
    always(libc::SYS_epoll_wait),
    always(libc::SYS_epoll_pwait),
    always(libc::SYS_epoll_ctl),
    always(libc::SYS_read),
    always(libc::SYS_write),
    always(libc::SYS_readv),
    always(libc::SYS_writev),
    always(libc::SYS_pread64),
    always(libc::SYS_pwrite64),
    always(libc::SYS_fstat),
    always(libc::SYS_fdatasync),
    always(libc::SYS_getrandom),
    // The agent's port.
    always(libc::SYS_accept4),
    always(libc::SYS_recvfrom),
    always(libc::SYS_sendto),
    always(libc::SYS_shutdown),
    any(libc::SYS_ioctl, &[is(1, FIONBIO)]),
];

/// What disks are made of is copied and merged, from files to files that are open.
const DISKS: &[Call] = &[
    // Where a base has no holes.
    always(libc::SYS_lseek),
    always(libc::SYS_pread64),
    always(libc::SYS_pwrite64),
    always(libc::SYS_fdatasync),
    always(libc::SYS_fstat),
];

/// What a processor's thread does: it runs the guest, and does what the guest writes to registers,
/// of which a reset closes the agent's connection.
const VCPU: &[Call] = &[
    any(libc::SYS_ioctl, &[is(1, KVM_RUN)]),
    always(libc::SYS_read),
    always(libc::SYS_write),
    always(libc::SYS_shutdown),
];

/// A machine is made, and its state is set.
const MAKE: &[Call] = &[
    always(libc::SYS_epoll_create1),
    any(
        libc::SYS_ioctl,
        &[
            is(1, KVM_GET_API_VERSION),
            is(1, KVM_CREATE_VM),
            is(1, KVM_GET_MSR_INDEX_LIST),
            is(1, KVM_CHECK_EXTENSION),
            is(1, KVM_GET_VCPU_MMAP_SIZE),
            is(1, KVM_GET_SUPPORTED_CPUID),
            is(1, KVM_CREATE_VCPU),
            is(1, KVM_SET_USER_MEMORY_REGION),
            is(1, KVM_SET_TSS_ADDR),
            is(1, KVM_SET_IDENTITY_MAP_ADDR),
            is(1, KVM_CREATE_IRQCHIP),
            is(1, KVM_SET_IRQCHIP),
            is(1, KVM_IRQFD),
            is(1, KVM_IOEVENTFD),
            is(1, KVM_SET_CLOCK),
            is(1, KVM_SET_REGS),
            is(1, KVM_SET_SREGS),
            is(1, KVM_SET_MSRS),
            is(1, KVM_SET_LAPIC),
            is(1, KVM_SET_CPUID2),
            is(1, KVM_SET_MP_STATE),
            is(1, KVM_SET_VCPU_EVENTS),
            is(1, KVM_SET_DEBUGREGS),
            is(1, KVM_SET_TSC_KHZ),
            is(1, KVM_SET_XSAVE),
            is(1, KVM_SET_XCRS),
            is(1, KVM_SET_DEVICE_ATTR),
        ],
    ),
    // What KVM shares with a processor's thread is in no copy of the process.
    any(libc::SYS_madvise, &[int(2, libc::MADV_DONTFORK)]),
];

/// A machine's state is read, while its guest stands still.
const SAVE: &[Call] = &[any(
    libc::SYS_ioctl,
    &[
        is(1, KVM_GET_IRQCHIP),
        is(1, KVM_GET_CLOCK),
        is(1, KVM_GET_REGS),
        is(1, KVM_GET_SREGS),
        is(1, KVM_GET_MSRS),
        is(1, KVM_GET_LAPIC),
        is(1, KVM_GET_CPUID2),
        is(1, KVM_GET_MP_STATE),
        is(1, KVM_GET_VCPU_EVENTS),
        is(1, KVM_GET_DEBUGREGS),
        is(1, KVM_GET_TSC_KHZ),
        is(1, KVM_GET_XSAVE),
        is(1, KVM_GET_XCRS),
        is(1, KVM_GET_DEVICE_ATTR),
        is(1, KVM_KVMCLOCK_CTRL),
    ],
)];

/// A bell is hung when the guest has rung it.
const HANG: &[Call] = &[any(libc::SYS_ioctl, &[is(1, KVM_IOEVENTFD)])];

/// A copy of the process is made for a checkpoint, and lets go of what is the guest's. Nobody waits
/// for its end.
const COPIES: &[Call] = &[
    any(libc::SYS_clone, &[is(0, COPY)]),
    any(libc::SYS_prctl, &[int(0, libc::PR_SET_NAME)]),
    always(libc::SYS_close_range),
];

/// What a copy does then: it says that it is there, and waits.
const COPYING: &[Call] = &[
    always(libc::SYS_write),
    always(libc::SYS_ppoll),
    always(libc::SYS_exit_group),
    always(libc::SYS_restart_syscall),
];

/// What a sleeper does: it waits for the end of a pipe.
const SLEEPING: &[Call] = &[
    always(libc::SYS_read),
    always(libc::SYS_exit_group),
    always(libc::SYS_restart_syscall),
];

/// What the zygote does, and its copies until they have lists of their own.
const ZYGOTE: &[Call] = &[
    any(
        libc::SYS_clone,
        &[int(
            0,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::SIGCHLD,
        )],
    ),
    always(libc::SYS_clone3),
    any(
        libc::SYS_unshare,
        &[int(0, libc::CLONE_NEWPID), int(0, libc::CLONE_NEWCGROUP)],
    ),
    any(libc::SYS_fcntl, &[int(1, libc::F_DUPFD_CLOEXEC)]),
    always(libc::SYS_prctl),
    always(libc::SYS_prlimit64),
    always(libc::SYS_wait4),
    always(libc::SYS_waitid),
    always(libc::SYS_pipe2),
    always(libc::SYS_dup3),
    always(libc::SYS_getsockopt),
    always(libc::SYS_capget),
    always(libc::SYS_capset),
    always(libc::SYS_setsid),
    always(libc::SYS_setresuid),
    always(libc::SYS_setresgid),
    always(libc::SYS_getuid),
    always(libc::SYS_geteuid),
    always(libc::SYS_getgid),
    always(libc::SYS_getegid),
    always(libc::SYS_getgroups),
];

const SLEEPER_LISTS: &[&[Call]] = &[SLEEPING];
const COPY_LISTS: &[&[Call]] = &[COPYING];
const DEVICES_LISTS: &[&[Call]] = &[EVERY, MEMORY, ABORT, CLOSE, DEVICES];
const DISKS_LISTS: &[&[Call]] = &[EVERY, MEMORY, ABORT, CLOSE, DISKS];
const VCPU_LISTS: &[&[Call]] = &[EVERY, MEMORY, ABORT, CLOSE, VCPU];
const RUNNING_LISTS: &[&[Call]] = &[
    EVERY, MEMORY, ABORT, CLOSE, NARROW, CONTROL, FILES, SAVE, HANG, COPIES, COPYING,
];
const STARTING_LISTS: &[&[Call]] = &[
    EVERY, MEMORY, ABORT, CLOSE, NARROW, CONTROL, FILES, SAVE, COPIES, COPYING, THREADS, MAKE,
    DEVICES, VCPU,
];
const ZYGOTE_LISTS: &[&[Call]] = &[
    EVERY, MEMORY, ABORT, CLOSE, NARROW, CONTROL, FILES, SAVE, COPIES, COPYING, THREADS, MAKE,
    DEVICES, VCPU, SLEEPING, ZYGOTE,
];

/// In which cell a thread is when it enters this one.
pub(super) const fn before(cell: Cell) -> Option<Cell> {
    match cell {
        Cell::Zygote => None,
        Cell::Sleeper | Cell::Starting => Some(Cell::Zygote),
        Cell::Devices | Cell::Disks | Cell::Vcpu | Cell::Running => Some(Cell::Starting),
        Cell::Copy => Some(Cell::Running),
    }
}

/// All that a cell may call; a call that is there more than once is let through by each.
pub(super) fn of(cell: Cell) -> Vec<Call> {
    let lists = match cell {
        Cell::Zygote => ZYGOTE_LISTS,
        Cell::Sleeper => SLEEPER_LISTS,
        Cell::Starting => STARTING_LISTS,
        Cell::Running => RUNNING_LISTS,
        Cell::Devices => DEVICES_LISTS,
        Cell::Disks => DISKS_LISTS,
        Cell::Vcpu => VCPU_LISTS,
        Cell::Copy => COPY_LISTS,
    };
    lists.concat()
}
