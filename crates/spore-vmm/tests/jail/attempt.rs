//! What code in the VMM's place would try, each with what becomes of it.
#![expect(
    unsafe_code,
    reason = "system calls are made as an attacker would make them"
)]

use std::ffi::CStr;
use std::io;

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The process ends by SIGSYS.
    Killed,
    /// The call fails.
    Refused(i32),
    /// It is what a VMM does.
    Done,
}

/// One attempt.
pub(crate) struct Attempt {
    pub(crate) name: &'static str,
    /// The cell that it is made in, by name.
    pub(crate) cell: &'static str,
    pub(crate) call: fn() -> io::Result<i64>,
    pub(crate) fate: Fate,
}

fn call(number: i64, arguments: [u64; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: nothing that these calls could do to memory happens: those that are let through are
    // given none, and the others do nothing.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn text(text: &'static CStr) -> u64 {
    text.as_ptr().expose_provenance() as u64
}

const ROOT: &CStr = c"/";
const HERE: u64 = libc::AT_FDCWD.cast_unsigned() as u64;
const CHILD: u64 = libc::SIGCHLD.cast_unsigned() as u64;

/// A process that lives on in both, of which the copy ends at once.
fn process(flags: u64) -> io::Result<i64> {
    let made = call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0])?;
    if made == 0 {
        call(libc::SYS_exit_group, [0; 6])?;
    }
    Ok(made)
}

fn page(protection: i32) -> io::Result<i64> {
    let flags = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned());
    call(
        libc::SYS_mmap,
        [
            0,
            4096,
            u64::from(protection.cast_unsigned()),
            flags,
            u64::MAX,
            0,
        ],
    )
}

fn thread() -> io::Result<i64> {
    let thread = std::thread::Builder::new().spawn(|| 7);
    Ok(thread?.join().unwrap())
}

macro_rules! attempts {
    ($($cell:literal $name:literal => $fate:ident $(($errno:expr))? : $call:expr;)*) => {
        /// All attempts.
        pub(crate) const ALL: &[Attempt] = &[$(Attempt {
            name: $name,
            cell: $cell,
            call: || $call,
            fate: Fate::$fate $(($errno))?,
        },)*];
    };
}

attempts! {
    // See or open anything.
    "Starting" "open" => Killed: call(libc::SYS_open, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "openat" => Killed: call(libc::SYS_openat, [HERE, text(ROOT), 0, 0, 0, 0]);
    "Starting" "openat2" => Killed: call(libc::SYS_openat2, [HERE, text(ROOT), 0, 0, 0, 0]);
    "Starting" "open_by_handle" => Killed: call(libc::SYS_open_by_handle_at, [0; 6]);
    "Starting" "stat" => Killed: call(libc::SYS_newfstatat, [HERE, text(ROOT), 0, 0, 0, 0]);
    "Starting" "getdents" => Killed: call(libc::SYS_getdents64, [3, 0, 0, 0, 0, 0]);
    "Starting" "memfd" => Killed: call(libc::SYS_memfd_create, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "inotify" => Killed: call(libc::SYS_inotify_init1, [0; 6]);
    "Starting" "uname" => Killed: call(libc::SYS_uname, [0; 6]);
    "Starting" "shared_memory" => Killed: call(libc::SYS_shmget, [0, 4096, 0, 0, 0, 0]);
    "Starting" "message_queue" => Killed: call(libc::SYS_mq_open, [0; 6]);
    // Speak to anybody.
    "Starting" "socket" => Killed: call(libc::SYS_socket, [1, 1, 0, 0, 0, 0]);
    "Starting" "socketpair" => Killed: call(libc::SYS_socketpair, [1, 1, 0, 0, 0, 0]);
    "Starting" "connect" => Killed: call(libc::SYS_connect, [3, 0, 0, 0, 0, 0]);
    "Starting" "bind" => Killed: call(libc::SYS_bind, [3, 0, 0, 0, 0, 0]);
    // Touch another process.
    "Starting" "kill_all" => Killed: call(libc::SYS_kill, [u64::MAX, 9, 0, 0, 0, 0]);
    "Starting" "kill_init" => Killed: call(libc::SYS_kill, [1, 9, 0, 0, 0, 0]);
    "Starting" "tkill" => Killed: call(libc::SYS_tkill, [1, 9, 0, 0, 0, 0]);
    "Starting" "tgkill" => Killed: call(libc::SYS_tgkill, [1, 1, 9, 0, 0, 0]);
    "Starting" "sigqueue" => Killed: call(libc::SYS_rt_sigqueueinfo, [1, 9, 0, 0, 0, 0]);
    "Starting" "pidfd" => Killed: call(libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]);
    "Starting" "pidfd_signal" => Killed: call(libc::SYS_pidfd_send_signal, [0, 9, 0, 0, 0, 0]);
    "Starting" "ptrace" => Killed: call(libc::SYS_ptrace, [16, 1, 0, 0, 0, 0]);
    "Starting" "read_process" => Killed: call(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0]);
    "Starting" "write_process" => Killed: call(libc::SYS_process_vm_writev, [1, 0, 0, 0, 0, 0]);
    "Starting" "limits" => Killed: call(libc::SYS_prlimit64, [1, 7, 0, 0, 0, 0]);
    // Be another process, or another user.
    "Starting" "execve" => Killed: call(libc::SYS_execve, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "fork" => Killed: call(libc::SYS_fork, [0; 6]);
    "Starting" "vfork" => Killed: call(libc::SYS_vfork, [0; 6]);
    "Starting" "clone_user" => Killed: process(libc::CLONE_NEWUSER as u64 | CHILD);
    "Starting" "clone_pid" => Killed: process(libc::CLONE_NEWPID as u64 | CHILD);
    "Starting" "clone_parent" => Killed: process(libc::CLONE_PARENT as u64 | CHILD);
    "Starting" "clone_memory" => Killed: process(libc::CLONE_VM as u64 | CHILD);
    "Starting" "clone_silent" => Killed: process(0);
    "Starting" "clone3" => Refused(libc::ENOSYS): call(libc::SYS_clone3, [0, 88, 0, 0, 0, 0]);
    "Starting" "unshare" => Killed: call(libc::SYS_unshare, [0x0200_0000, 0, 0, 0, 0, 0]);
    "Starting" "setns" => Killed: call(libc::SYS_setns, [3, 0, 0, 0, 0, 0]);
    "Starting" "setuid" => Killed: call(libc::SYS_setuid, [0; 6]);
    "Starting" "setresuid" => Killed: call(libc::SYS_setresuid, [0; 6]);
    "Starting" "setresgid" => Killed: call(libc::SYS_setresgid, [0; 6]);
    "Starting" "capset" => Killed: call(libc::SYS_capset, [0; 6]);
    "Starting" "dumpable" => Killed: call(libc::SYS_prctl, [4, 1, 0, 0, 0, 0]);
    "Starting" "ambient" => Killed: call(libc::SYS_prctl, [47, 2, 21, 0, 0, 0]);
    "Starting" "tracer" => Killed: call(libc::SYS_prctl, [0x5961_6d61, u64::MAX, 0, 0, 0, 0]);
    "Starting" "personality" => Killed: call(libc::SYS_personality, [0x40_0000, 0, 0, 0, 0, 0]);
    // Run what it has written.
    "Starting" "mmap_exec" => Killed: page(libc::PROT_READ | libc::PROT_EXEC);
    "Starting" "mprotect_exec" => Killed: call(libc::SYS_mprotect, [0, 0, 4, 0, 0, 0]);
    "Starting" "pkey_mprotect" => Killed: call(libc::SYS_pkey_mprotect, [0, 0, 4, 0, 0, 0]);
    "Starting" "remap" => Killed: call(libc::SYS_remap_file_pages, [0; 6]);
    // Change what it sees.
    "Starting" "mount" => Killed: call(libc::SYS_mount, [0, text(ROOT), 0, 0, 0, 0]);
    "Starting" "umount" => Killed: call(libc::SYS_umount2, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "fsopen" => Killed: call(libc::SYS_fsopen, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "open_tree" => Killed: call(libc::SYS_open_tree, [HERE, text(ROOT), 0, 0, 0, 0]);
    "Starting" "pivot_root" => Killed: call(libc::SYS_pivot_root, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "chroot" => Killed: call(libc::SYS_chroot, [text(ROOT), 0, 0, 0, 0, 0]);
    "Starting" "chdir" => Killed: call(libc::SYS_chdir, [text(ROOT), 0, 0, 0, 0, 0]);
    // The parts of the kernel that exploits love.
    "Starting" "bpf" => Killed: call(libc::SYS_bpf, [0; 6]);
    "Starting" "io_uring" => Killed: call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]);
    "Starting" "userfaultfd" => Killed: call(libc::SYS_userfaultfd, [0; 6]);
    "Starting" "perf" => Killed: call(libc::SYS_perf_event_open, [0; 6]);
    "Starting" "keys" => Killed: call(libc::SYS_keyctl, [0; 6]);
    "Starting" "splice" => Killed: call(libc::SYS_splice, [0; 6]);
    "Starting" "ksm" => Killed: call(libc::SYS_madvise, [0, 0, 12, 0, 0, 0]);
    "Starting" "x32" => Killed: call(0x4000_0000 | libc::SYS_getpid, [0; 6]);
    "Starting" "terminal" => Killed: call(libc::SYS_ioctl, [1, libc::TIOCSTI, 0, 0, 0, 0]);
    "Starting" "owner" => Killed: call(libc::SYS_fcntl, [3, libc::F_SETOWN as u64, 1, 0, 0, 0]);
    // What a VMM does until its guest runs, and not later.
    "Starting" "thread" => Done: thread();
    "Starting" "copy" => Done: process(CHILD);
    "Starting" "page" => Done: page(libc::PROT_READ | libc::PROT_WRITE);
    "Running" "thread_later" => Killed: thread();
    "Running" "copy_later" => Done: process(CHILD);
    "Running" "wait" => Killed: call(libc::SYS_wait4, [u64::MAX, 0, 1, 0, 0, 0]);
    "Running" "close_range" => Done: call(libc::SYS_close_range, [900, 901, 0, 0, 0, 0]);
    "Running" "kvm_vm_later" => Killed: call(libc::SYS_ioctl, [4, 0xae01, 0, 0, 0, 0]);
    "Running" "kvm_run_by_first" => Killed: call(libc::SYS_ioctl, [4, 0xae80, 0, 0, 0, 0]);
    "Devices" "devices_page" => Done: page(libc::PROT_READ);
    "Devices" "devices_copy" => Killed: process(CHILD);
    "Devices" "devices_thread" => Killed: thread();
    "Devices" "devices_kvm" => Killed: call(libc::SYS_ioctl, [4, 0xae80, 0, 0, 0, 0]);
    "Devices" "devices_receive" => Killed: call(libc::SYS_recvmsg, [3, 0, 0, 0, 0, 0]);
    "Disks" "disks_copy" => Killed: process(CHILD);
    "Disks" "disks_thread" => Killed: thread();
    "Disks" "disks_truncate" => Killed: call(libc::SYS_ftruncate, [3, 0, 0, 0, 0, 0]);
    "Disks" "disks_kvm" => Killed: call(libc::SYS_ioctl, [4, 0xae80, 0, 0, 0, 0]);
    "Disks" "disks_send" => Killed: call(libc::SYS_sendto, [3, 0, 0, 0, 0, 0]);
    "Vcpu" "vcpu_copy" => Killed: process(CHILD);
    "Vcpu" "vcpu_accept" => Killed: call(libc::SYS_accept4, [3, 0, 0, 0, 0, 0]);
    "Vcpu" "vcpu_disk" => Killed: call(libc::SYS_pwrite64, [3, 0, 0, 0, 0, 0]);
    "Vcpu" "vcpu_run" => Refused(libc::ENOTTY): call(libc::SYS_ioctl, [3, 0xae80, 0, 0, 0, 0]);
    "Copy" "copy_page" => Killed: page(libc::PROT_READ);
    "Copy" "copy_send" => Killed: call(libc::SYS_sendmsg, [3, 0, 0, 0, 0, 0]);
    "Copy" "copy_copy" => Killed: process(CHILD);
    "Copy" "copy_close" => Killed: call(libc::SYS_close, [3, 0, 0, 0, 0, 0]);
    "Copy" "copy_read" => Killed: call(libc::SYS_read, [3, 0, 0, 0, 0, 0]);
    "Copy" "copy_pwrite" => Killed: call(libc::SYS_pwrite64, [1, 0, 0, 0, 0, 0]);
}
