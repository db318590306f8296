//! PID 1 of a VM: brings the guest up, serves the host through one port, runs the app.
//!
//! | module | what |
//! |---|---|
//! | [`init`], [`disk`], [`view`], [`net`] | from an initramfs to a tenant's view |
//! | [`agent`], [`session`], [`port`], [`interest`] | the session loop and its bookkeeping |
//! | [`app`], [`runner`], [`probe`], [`socket_table`], [`log`] | the app: life, readiness, output |
//! | [`exec`], [`file`], [`guest`], [`user`] | what the host asks for inside the tenant's root |
//! | [`launch`], [`cgroup`], [`memory`], [`reap`] | processes: begin, bounds and end |
//! | [`thaw`], [`folder`], [`sockets`] | what a fork must renew |
//! | [`forward`], [`face`] | the other lives of the same binary: relay, and the tenant's command |
//! | [`hook`] | the tenant's processes that want to hear of forks |
//! | [`clock`], [`console`], [`procfs`], [`sys`] | the kernel's edges |
//!
//! Nothing of a tenant runs in this process, and nothing of it is believed: every buffer that a
//! tenant or the host can fill has a named limit. Built with `panic = "abort"`: a bug ends the VM.

pub mod agent;
pub mod app;
pub mod cgroup;
pub mod clock;
pub mod console;
pub mod disk;
pub mod exec;
pub mod face;
pub mod file;
pub mod folder;
pub mod forward;
pub mod guest;
pub mod hook;
pub mod init;
pub mod interest;
pub mod launch;
pub mod log;
pub mod memory;
pub mod net;
pub mod port;
pub mod probe;
pub mod procfs;
pub mod reap;
pub mod runner;
pub mod secrets;
pub mod session;
pub mod socket_table;
pub mod sockets;
#[expect(
    unsafe_code,
    reason = "the system calls that rustix does not offer as safe functions"
)]
pub mod sys;
pub mod thaw;
pub mod user;
pub mod view;
