//! The system calls that rustix lacks or marks unsafe: the only unsafe code of this crate.
//!
//! Called by `jail.rs` (a single-threaded launcher), `net/` (threads of its own) and the `qemu`
//! driver (the TSC, a paused guest's memory). Each function is safe to call as far as memory goes;
//! what it does to the process is said at each. Never keeps state.
#![expect(
    unsafe_code,
    reason = "system calls without a safe wrapper live here and nowhere else"
)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::thread::UnshareFlags;
use tokio::io::unix::AsyncFd;

/// The device behind every tap.
const TUN_DEVICE: &str = "/dev/net/tun";

/// From where descriptors are parked while they are put in order: above every number that is
/// given out, below every sensible limit.
const PARKED_FDS: i32 = 64;

/// Takes the calling thread into new namespaces, or gives it its own file-system attributes.
///
/// The descriptor table is never unshared: other threads keep seeing the same descriptors.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    if flags.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the one hazard of unshare(2), a thread that sees another descriptor table, is
    // excluded above.
    unsafe { rustix::thread::unshare_unsafe(flags)? };
    Ok(())
}

/// Which side of [`fork_vmm`] one is on.
#[derive(Debug)]
pub(crate) enum Forked {
    /// The launcher; holds the child's pid as the launcher's pid namespace numbers it.
    Parent(u32),
    /// The new process, pid 1 of a new pid namespace.
    Child,
}

/// Forks the launcher: the child is the first process of a new pid namespace and a child of the
/// launcher's *parent* (`CLONE_PARENT`), so that the daemon reaps it and no launcher has to stay.
pub(crate) fn fork_vmm() -> io::Result<Forked> {
    let flags = libc::CLONE_PARENT | libc::CLONE_NEWPID;
    // SAFETY: clone_args is plain integers, for which all zeros is a value.
    let mut args: libc::clone_args = unsafe { zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    // SAFETY: no stack and no memory sharing is asked for, so this is fork(2); the launcher has
    // one thread, hence no lock of libc can be held by another.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match u32::try_from(pid) {
        Ok(0) => Ok(Forked::Child),
        Ok(pid) => Ok(Forked::Parent(pid)),
        Err(_negative) => Err(io::Error::last_os_error()),
    }
}

/// Makes `fds` the descriptors 0, 1, 2 … of this process, in that order and kept over exec, with
/// `last` behind them, closed at exec; closes every other descriptor.
///
/// Returns `last` at its new place. Whoever owned another descriptor of this process has lost it,
/// so only a launcher that is about to exec may call this.
pub(crate) fn place_fds(fds: Vec<OwnedFd>, last: OwnedFd) -> io::Result<OwnedFd> {
    let mut parked = Vec::with_capacity(fds.len() + 1);
    for fd in fds.into_iter().chain([last]) {
        parked.push(rustix::io::fcntl_dupfd_cloexec(&fd, PARKED_FDS)?.into_raw_fd());
        // The original is closed by close_range below; closing it here could free number 0.
        let _number = fd.into_raw_fd();
    }
    let count = i32::try_from(parked.len()).map_err(|_e| io::ErrorKind::InvalidInput)?;
    for (number, from) in (0..count).zip(&parked) {
        let flags = if number == count - 1 {
            libc::O_CLOEXEC
        } else {
            0
        };
        // SAFETY: dup3 only changes the descriptor table; nobody uses the replaced numbers
        // afterwards, as this function's contract says.
        let placed = unsafe { libc::syscall(libc::SYS_dup3, *from, number, flags) };
        if placed < 0 && *from != number {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: closes descriptors that nobody uses any more, as this function's contract says.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, count, u32::MAX, 0) };
    if closed < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the last number was made above and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(count - 1) })
}

/// Watches a pidfd: readable once its process has ended.
pub(crate) fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the returned value and gives the same number for as long
    // as that lives.
    Ok(unsafe { AsyncFd::register(pidfd)? })
}

/// The most ranges of one process_vm_readv(2) (`UIO_MAXIOV`).
const RANGES_MAX: usize = 1024;

/// Reads `ranges`, each an address and a length, of the process `pid` into `buffer`, one behind the
/// other; the buffer is as long as all of them together.
pub(crate) fn read_process(pid: u32, ranges: &[(u64, u64)], buffer: &mut [u8]) -> io::Result<()> {
    let invalid = |_error| io::Error::from(io::ErrorKind::InvalidInput);
    let pid = libc::pid_t::try_from(pid).map_err(invalid)?;
    let mut rest = buffer;
    for some in ranges.chunks(RANGES_MAX) {
        let mut remote = Vec::with_capacity(some.len());
        let mut total = 0_usize;
        for (address, len) in some {
            let len = usize::try_from(*len).map_err(invalid)?;
            total = total.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
            remote.push(libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(
                    usize::try_from(*address).map_err(invalid)?,
                ),
                iov_len: len,
            });
        }
        let (to, behind) = rest
            .split_at_mut_checked(total)
            .ok_or(io::ErrorKind::InvalidInput)?;
        rest = behind;
        let local = libc::iovec {
            iov_base: to.as_mut_ptr().cast(),
            iov_len: to.len(),
        };
        // SAFETY: the kernel writes at most `to.len()` bytes to `to`, which is borrowed for the
        // call; the remote addresses are the other process's and are only read from.
        let read = unsafe {
            libc::process_vm_readv(
                pid,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        match usize::try_from(read) {
            Ok(read) if read == total => {}
            Ok(_short) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_negative) => return Err(io::Error::last_os_error()),
        }
    }
    match rest.is_empty() {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp_counter() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user space read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A request of netdevice(7) about the interface `name`, all else zero.
fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is integers, bytes and unions of them, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Opens the persistent tap `name` of the calling thread's network namespace, making it if it is
/// not there.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open(TUN_DEVICE)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|_e| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNSETPERSIST takes an integer, not a pointer.
    let kept = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    if kept < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun.into())
}

/// One request of netdevice(7) on any socket of the namespace.
fn interface_ioctl(
    socket: &OwnedFd,
    number: libc::c_ulong,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the callers pass the SIOC?IF* numbers, which read and write one ifreq.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut *request) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `AF_INET` in the width of a socket address.
const AF_INET: libc::sa_family_t = 2;
const _: () = assert!(AF_INET as libc::c_int == libc::AF_INET);

/// `address` as the kernel's ioctls want it.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let inet = libc::sockaddr_in {
        sin_family: AF_INET,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.octets()),
        },
        sin_zero: [0; 8],
    };
    const { assert!(size_of::<libc::sockaddr_in>() == size_of::<libc::sockaddr>()) };
    // SAFETY: both are 16 bytes of integers; sockaddr is the generic view of sockaddr_in.
    unsafe { std::mem::transmute(inet) }
}

/// `mac` as the kernel's ioctls want it.
fn hardware_address(mac: [u8; 6]) -> libc::sockaddr {
    let mut address = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: [0; 14],
    };
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from.cast_signed();
    }
    address
}

/// Gives an interface its hardware address; legal while it is down.
pub(crate) fn set_hardware_address(socket: &OwnedFd, name: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_hwaddr = hardware_address(mac);
    interface_ioctl(socket, libc::SIOCSIFHWADDR, &mut request)
}

/// Gives an interface its IPv4 address and the length of its network's prefix.
pub(crate) fn set_address(
    socket: &OwnedFd,
    name: &str,
    address: Ipv4Addr,
    prefix: u8,
) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    interface_ioctl(socket, libc::SIOCSIFADDR, &mut request)?;
    let host_bits = 32_u32.saturating_sub(u32::from(prefix));
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0));
    request.ifr_ifru.ifru_netmask = socket_address(mask);
    interface_ioctl(socket, libc::SIOCSIFNETMASK, &mut request)
}

/// Whether an interface is administratively up.
pub(crate) fn is_up(socket: &OwnedFd, name: &str) -> io::Result<bool> {
    let mut request = interface_request(name)?;
    interface_ioctl(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS wrote the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & libc::IFF_UP != 0)
}

/// Takes an interface up.
pub(crate) fn set_up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    change_flags(socket, name, |flags| flags | libc::IFF_UP)
}

/// Takes an interface down.
pub(crate) fn set_down(socket: &OwnedFd, name: &str) -> io::Result<()> {
    change_flags(socket, name, |flags| flags & !libc::IFF_UP)
}

fn change_flags(socket: &OwnedFd, name: &str, to: impl Fn(i32) -> i32) -> io::Result<()> {
    let mut request = interface_request(name)?;
    interface_ioctl(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS wrote the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(to(i32::from(flags))).map_err(|_e| io::ErrorKind::InvalidInput)?;
    interface_ioctl(socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Adds a neighbour that is never asked for and never forgotten, while the interface is up.
pub(crate) fn set_neighbour(
    socket: &OwnedFd,
    name: &str,
    address: Ipv4Addr,
    mac: [u8; 6],
) -> io::Result<()> {
    let mut device: [libc::c_char; 16] = [0; 16];
    if name.len() >= device.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in device.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let request = libc::arpreq {
        arp_pa: socket_address(address),
        arp_ha: hardware_address(mac),
        arp_flags: libc::ATF_PERM | libc::ATF_COM,
        arp_netmask: socket_address(Ipv4Addr::UNSPECIFIED),
        arp_dev: device,
    };
    // SAFETY: SIOCSARP reads one arpreq, which lives across the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP, &raw const request) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Any system call, in a process of its own: how tests see what a filter forbids.
#[cfg(test)]
pub(crate) mod probe {
    use std::io;
    use std::os::unix::process::ExitStatusExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::process::ExitStatus;

    /// Makes a call with plain numbers for arguments, of which none is the address of anything.
    pub(crate) fn call(number: i64, [a, b, c]: [u64; 3]) -> io::Result<i64> {
        // SAFETY: the tests pass small numbers and zeros, which are no valid addresses, so the
        // kernel reads and writes no memory; a call that ends the process ends a test's child.
        let result = unsafe { libc::syscall(number, a, b, c, 0_u64, 0_u64, 0_u64) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }

    /// Does `work` in a child, whose exit code is its result; 255 is a panic.
    pub(crate) fn in_child(work: impl FnOnce() -> u8) -> ExitStatus {
        // SAFETY: the child does what the tests ask for and leaves by `_exit`; memory that it
        // allocates is fine, since glibc's fork takes malloc's locks over.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        if pid == 0 {
            let code = catch_unwind(AssertUnwindSafe(work)).unwrap_or(u8::MAX);
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code.into()) }
        }
        let mut status = 0;
        // SAFETY: the pid is that of a child that nobody else waits for, and `status` lives.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(waited, pid, "{}", io::Error::last_os_error());
        ExitStatus::from_raw(status)
    }
}

#[cfg(test)]
mod tests {
    use super::{RANGES_MAX, hardware_address, interface_request, read_process, socket_address};
    use std::net::Ipv4Addr;

    #[test]
    fn ranges_of_a_process_are_read_one_behind_the_other() {
        let text: Vec<u8> = (0..=255).collect();
        let address = text.as_ptr().addr() as u64;
        let mut ranges = vec![(address + 10, 2); RANGES_MAX];
        ranges.extend([(address, 3), (address + 255, 1)]);
        let mut read = vec![0; 2 * RANGES_MAX + 4];
        read_process(std::process::id(), &ranges, &mut read).unwrap();
        assert_eq!(read[..4], [10, 11, 10, 11]);
        assert_eq!(read[2 * RANGES_MAX..], [0, 1, 2, 255]);
        assert!(read_process(std::process::id(), &ranges, &mut read[1..]).is_err());
        let mut longer = vec![0; 5];
        assert!(read_process(std::process::id(), &[(address, 4)], &mut longer).is_err());
        assert!(read_process(std::process::id(), &[(0, 4)], &mut [0; 4]).is_err());
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        assert!(interface_request("tap0").is_ok());
        assert!(interface_request("sixteen-bytes-xx").is_err());
    }

    #[test]
    fn addresses_lie_as_the_kernel_reads_them() {
        let address = socket_address(Ipv4Addr::new(10, 42, 0, 1));
        assert_eq!(address.sa_family, 2);
        assert_eq!(address.sa_data[..6], [0, 0, 10, 42, 0, 1]);
        assert_eq!(
            hardware_address([2, 0x53, 0x50, 0, 0, 1]).sa_data[..6],
            [2, 83, 80, 0, 0, 1]
        );
    }
}
