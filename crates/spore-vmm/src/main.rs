//! One guest's process. Started by the node with everything open; see `spore_vmm::control` for
//! what it is then asked.
//!
//! ```text
//!   spore-vmm zygote --uids FIRST+COUNT    makes VMMs: descriptor 3 is the socket to the node, and
//!                                          4 is /dev/kvm; root, no environment
//!   spore-vmm serve                        is one, without a jail, for tests: descriptor 3 is the
//!                                          control socket, which listens, and 4 is /dev/kvm
//! ```
//!
//! | code | when |
//! |---|---|
//! | 0 | it was told to quit |
//! | 2 | its arguments are none of these |
//! | 3 | what it was given is not what it needs; standard error says which |
//! | 4 | it cannot serve any more; standard error says why |
//! | 5 | it could not be jailed; standard error says which step |
//! | 6 | the zygote could not be jailed, or cannot go on |
//! | 101 | a bug: it panicked |

use std::error::Error;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use spore_vmm::control::Control;
use spore_vmm::inherited::{CONTROL_FD, KVM_FD, take};
use spore_vmm::jail::Inherited;
use spore_vmm::jail::zygote::{self, Ids};
use spore_vmm::kvm::Kvm;
use spore_wire::cause::chain;

const USAGE: u8 = 2;
const GIVEN: u8 = 3;
const SERVE: u8 = 4;
const ZYGOTE: u8 = 6;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let code = match *arguments {
        ["serve"] => serve(given()),
        ["zygote", "--uids", ids] => zygote(ids),
        _ => failed(USAGE, "usage: spore-vmm zygote --uids FIRST+COUNT | serve"),
    };
    ExitCode::from(code)
}

fn zygote(ids: &str) -> u8 {
    let ids: Ids = match ids.parse() {
        Ok(ids) => ids,
        Err(error) => return failed(USAGE, &chain(&error)),
    };
    match zygote::main(ids, jailed) {
        Ok(()) => 0,
        Err(error) => failed(ZYGOTE, &chain(&error)),
    }
}

/// What a VMM does in its jail.
fn jailed(inherited: Inherited) -> u8 {
    serve(control(inherited.control, inherited.kvm))
}

fn given() -> Result<Control, Box<dyn Error>> {
    let [listener, kvm]: [OwnedFd; 2] = take([CONTROL_FD, KVM_FD])?;
    control(listener, Some(kvm))
}

fn control(listener: OwnedFd, kvm: Option<OwnedFd>) -> Result<Control, Box<dyn Error>> {
    Ok(Control::new(listener, kvm.map(Kvm::new).transpose()?)?)
}

fn serve(control: Result<Control, Box<dyn Error>>) -> u8 {
    let control = match control {
        Ok(control) => control,
        Err(error) => return failed(GIVEN, &chain(&*error)),
    };
    match control.serve() {
        Ok(()) => 0,
        Err(error) => failed(SERVE, &chain(&error)),
    }
}

fn failed(code: u8, why: &str) -> u8 {
    // Whoever closed it does not want to know.
    let _unheard = writeln!(std::io::stderr(), "spore-vmm: {why}");
    code
}
