//! A process that confines itself, says so, and waits: for the test of what it then has.
//!
//! Started by `tests/confine.rs` with `host` or `empty` as its argument. Ends when its standard
//! input does, or is killed by its own filter when it is told `exec`.

use std::io::{BufRead, Write};

use spore_node::confine::limits::ProcessLimits;
use spore_node::confine::{Confinement, Network, confine};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let network = match std::env::args().nth(1).as_deref() {
        Some("host") => Network::Host,
        _other => Network::Empty,
    };
    confine(&Confinement {
        uid: 213_000,
        keep: Vec::new(),
        network,
        limits: ProcessLimits {
            files: 64,
            ..ProcessLimits::GATEWAY
        },
    })?;
    let mut out = std::io::stdout();
    writeln!(out, "confined")?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    match line.trim() {
        "exec" => drop(std::process::Command::new("/bin/true").status()),
        "look" => writeln!(out, "{}", std::fs::read_dir("/")?.count())?,
        "write" => writeln!(out, "{}", std::fs::write("/file", b"x").is_err())?,
        _end => {}
    }
    Ok(())
}
