//! What is in the VMM's place: it does what the test says over the control socket, one packet a
//! command, and answers each with a packet.

use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use rustix::net::SocketFlags;
use spore_vmm::jail::copy;
use spore_vmm::jail::seccomp::{self, Cell};
use spore_vmm::jail::{Inherited, zygote};

use crate::attempt;

/// This program as a zygote.
pub(crate) fn zygote(ids: &str) -> ExitCode {
    let ids = ids.parse().expect("the tests pass a range");
    match zygote::main(ids, obey) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", spore_wire::cause::chain(&error));
            ExitCode::from(6)
        }
    }
}

fn accept(listener: &OwnedFd) -> OwnedFd {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC).unwrap()
}

fn obey(inherited: Inherited) -> u8 {
    let test = accept(&inherited.control);
    let mut buffer = [0; 256];
    loop {
        let count = rustix::io::read(&test, &mut buffer).unwrap();
        let text = std::str::from_utf8(&buffer[..count]).unwrap();
        let words: Vec<&str> = text.split(' ').collect();
        let answer = match *words.as_slice() {
            ["echo", word] => word.to_owned(),
            ["threads"] => {
                thread(Cell::Devices);
                thread(Cell::Vcpu);
                "there".to_owned()
            }
            ["run"] => {
                seccomp::enter(Cell::Running).unwrap();
                "running".to_owned()
            }
            ["copy", limit_ms] => copy(&accept(&inherited.control), limit_ms),
            ["attempt", cell, name] => attempt_in(cell, name),
            ["panic"] => panic!("as it was told to"),
            ["end", code] => return code.parse().unwrap(),
            _ => return 250,
        };
        rustix::io::write(&test, answer.as_bytes()).unwrap();
    }
}

/// A thread that stays in its cell.
fn thread(cell: Cell) {
    let (tell, told) = std::sync::mpsc::channel();
    let body = move || {
        seccomp::enter(cell).unwrap();
        tell.send(()).unwrap();
        loop {
            std::thread::park();
        }
    };
    let builder = std::thread::Builder::new().name(format!("{cell:?}"));
    builder.spawn(body).unwrap();
    told.recv().unwrap();
}

/// A copy that stands until nobody holds the other end, or its time is over.
fn copy(to: &OwnedFd, limit_ms: &str) -> String {
    let limit = Duration::from_millis(limit_ms.parse().unwrap());
    copy::freeze(to.as_fd(), limit).unwrap().to_string()
}

fn attempt_in(cell: &str, name: &str) -> String {
    let attempt = attempt::ALL.iter().find(|attempt| attempt.name == name);
    let call = attempt.unwrap().call;
    let cell = match cell {
        "Starting" => return said(&call()),
        "Running" => Cell::Running,
        "Devices" => Cell::Devices,
        "Disks" => Cell::Disks,
        "Vcpu" => Cell::Vcpu,
        "Copy" => Cell::Copy,
        other => panic!("no cell is called {other}"),
    };
    let thread = std::thread::spawn(move || {
        seccomp::enter(cell).unwrap();
        call()
    });
    said(&thread.join().unwrap())
}

fn said(result: &std::io::Result<i64>) -> String {
    match result {
        Ok(_) => "done".to_owned(),
        Err(error) => format!("errno {}", error.raw_os_error().unwrap()),
    }
}
