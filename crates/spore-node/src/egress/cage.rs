//! How the proxy gives up what it does not need, before it has read a byte.
//!
//! Called by `main`, in a process with one thread: [`enter`] first of all, [`seal`] last. What
//! every helper process gives up is [`crate::confine`]'s; added here is another filter: the only
//! new sockets are TCP and UDP ones. In the host's network
//! namespace that matters, since abstract unix sockets and netlink are found there without any
//! file. Never loosens anything.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use thiserror::Error;

use crate::confine::limits::ProcessLimits;
use crate::confine::{ConfineError, Confinement, Network, confine};

/// Why the proxy could not be confined.
#[derive(Debug, Error)]
pub enum CageError {
    /// The process has threads already, which the steps would miss.
    #[error("the egress proxy must be confined before it starts threads; it has {0}")]
    Threads(usize),
    /// The threads could not be counted.
    #[error("cannot list the threads of the egress proxy: is /proc mounted?")]
    CountThreads(#[source] std::io::Error),
    /// The common part failed.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The filter could not be built.
    #[error("cannot build the egress proxy's filter")]
    Filter(#[from] seccompiler::BackendError),
    /// The filter could not be installed.
    #[error("cannot install the egress proxy's filter")]
    Install(#[from] seccompiler::Error),
}

/// Confines the calling process for good. Legal once, as root, with one thread; keeps the
/// descriptors 0 to 2 and those of `keep`.
///
/// # Errors
/// [`CageError`]; the process must then end.
pub fn enter(uid: u32, keep: &[i32]) -> Result<(), CageError> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(CageError::CountThreads)?
        .count();
    if threads != 1 {
        return Err(CageError::Threads(threads));
    }
    confine(&Confinement {
        uid,
        keep: keep.to_vec(),
        network: Network::Host,
        limits: ProcessLimits::EGRESS,
    })?;
    Ok(())
}

/// Gives up every kind of socket but those that a proxy makes. Legal once, after [`enter`] and
/// after the runtime was made, which wants a socket pair for signals.
///
/// # Errors
/// [`CageError`]; the process must then end.
pub fn seal() -> Result<(), CageError> {
    seccompiler::apply_filter(&sockets_only()?)?;
    Ok(())
}

/// Lets `socket` and `socketpair` make nothing but internet sockets for TCP and UDP.
fn sockets_only() -> Result<BpfProgram, seccompiler::BackendError> {
    let is_not = |argument, value: i32| {
        let value = u64::from(value.unsigned_abs());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
    };
    let is_of_type = |kind: i32| {
        let (mask, kind) = (u64::from(0xf_u8), u64::from(kind.unsigned_abs()));
        let compare = SeccompCmpOp::MaskedEq(mask);
        SeccompCondition::new(1, SeccompCmpArgLen::Dword, compare, kind)
    };
    let family = SeccompRule::new(vec![is_not(0, libc::AF_INET)?, is_not(0, libc::AF_INET6)?])?;
    let raw = SeccompRule::new(vec![is_of_type(libc::SOCK_RAW)?])?;
    let packet = SeccompRule::new(vec![is_of_type(libc::SOCK_SEQPACKET)?])?;
    let rules = BTreeMap::from([
        (libc::SYS_socket, vec![family, raw, packet]),
        (libc::SYS_socketpair, Vec::new()),
    ]);
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, denied, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::sockets_only;

    #[test]
    fn the_filter_compiles() {
        assert!(sockets_only().unwrap().len() > 10);
    }
}
