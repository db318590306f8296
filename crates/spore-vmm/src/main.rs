//! One guest's process. Started by the node with everything open; see `spore_vmm::control` for
//! what it is then asked.
//!
//! ```text
//!   spore-vmm serve        descriptor 3 is the control socket, which listens, and 4 is /dev/kvm
//! ```
//!
//! | code | when |
//! |---|---|
//! | 0 | it was told to quit |
//! | 2 | its arguments are none of these |
//! | 3 | what it was given is not what it needs; standard error says which |
//! | 4 | it cannot serve any more; standard error says why |
//! | 101 | a bug: it panicked |

use std::error::Error;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use spore_vmm::control::Control;
use spore_vmm::inherited::{CONTROL_FD, KVM_FD, take};
use spore_vmm::kvm::Kvm;
use spore_wire::cause::chain;

const USAGE: u8 = 2;
const GIVEN: u8 = 3;
const SERVE: u8 = 4;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("serve"), None) => serve(),
        _ => failed(USAGE, "usage: spore-vmm serve (Spore's node starts it)"),
    }
}

fn serve() -> ExitCode {
    let control = match given() {
        Ok(control) => control,
        Err(error) => return failed(GIVEN, &chain(&*error)),
    };
    match control.serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(SERVE, &chain(&error)),
    }
}

fn given() -> Result<Control, Box<dyn Error>> {
    let [listener, kvm]: [OwnedFd; 2] = take([CONTROL_FD, KVM_FD])?;
    Ok(Control::new(listener, Some(Kvm::new(kvm)?))?)
}

fn failed(code: u8, why: &str) -> ExitCode {
    // Whoever closed it does not want to know.
    let _unheard = writeln!(std::io::stderr(), "spore-vmm: {why}");
    ExitCode::from(code)
}
