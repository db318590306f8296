//! What a fork on KVM costs beside a floor: the bare ioctls of the same restore, in the same boot,
//! turn by turn.
//!
//! ```text
//!   cargo build --profile vmm -p spore-vmm -p spore-floor
//!   cargo xtask rig -- target/vmm/spore-floor [ROUNDS [forks|hundred|linux|pauses]…]
//! ```
//!
//! Every fork takes the real path of a VMM: a copy of the zygote, in its jail under a uid of its
//! own with namespaces and filters, told over its control socket. What is the node's is not in it:
//! a network's namespace, a cgroup, disks. Prints a table for people and one line of JSON, and
//! fails when a figure is worse than its limit. Leaves nothing behind, unless it is killed.

mod bare;
mod guest;
mod linux;
mod memory;
mod node;
mod pause;
mod starts;

use std::io::Write as _;

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value, json};

use self::node::Zygote;

/// Of each kind, unless others are asked for.
const ROUNDS: usize = 25;

/// What is measured.
const PARTS: [&str; 4] = ["forks", "hundred", "linux", "pauses"];

/// Figures by their names, and what must not be worse.
#[derive(Debug, Default)]
pub(crate) struct Report {
    figures: Map<String, Value>,
    limits: Vec<(&'static str, f64, f64)>,
}

impl Report {
    /// Prints a row and keeps it; gives its median.
    pub(crate) fn row(&mut self, name: &str, mut numbers: Vec<f64>) -> Result<f64> {
        numbers.sort_by(f64::total_cmp);
        let at = |part: usize| {
            let last = numbers.len().saturating_sub(1);
            numbers.get(last * part / 100).copied().unwrap_or(f64::NAN)
        };
        let [least, low, median, high, most] = [0, 10, 50, 90, 100].map(at);
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{name:<48} {median:>9.2} {least:>9.2} {low:>9.2} {high:>9.2} {most:>9.2} {:>4}",
            numbers.len()
        )?;
        let figure = json!({
            "median": median, "least": least, "p10": low, "p90": high, "most": most,
            "count": numbers.len(),
        });
        self.figures.insert(name.to_owned(), figure);
        Ok(median)
    }

    pub(crate) fn at_most(&mut self, name: &'static str, figure: f64, worst: f64) {
        self.limits.push((name, figure, worst));
    }

    /// Prints the limits and the line of JSON; an error names those that were missed.
    fn end(self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let mut missed = Vec::new();
        let mut limits = Map::new();
        writeln!(out)?;
        for (name, figure, worst) in self.limits {
            let is_missed = figure.is_nan() || figure > worst;
            let word = if is_missed { "MISSED" } else { "" };
            writeln!(out, "{name:<48} {figure:>9.3}   at most {worst:.3} {word}")?;
            limits.insert(name.to_owned(), json!({ "figure": figure, "worst": worst }));
            if is_missed {
                missed.push(name);
            }
        }
        let json = json!({ "bench": "floor", "figures": self.figures, "limits": limits });
        writeln!(out, "{json}")?;
        ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (rounds, parts) = match *arguments {
        [bare::WORD] => return bare::main(),
        [] => (ROUNDS, &PARTS[..]),
        [rounds, ref parts @ ..] if parts.iter().all(|part| PARTS.contains(part)) => {
            let parts = if parts.is_empty() { &PARTS } else { parts };
            (rounds.parse()?, parts)
        }
        _ => bail!("usage: spore-floor [ROUNDS [{}]…]", PARTS.join("|")),
    };
    ensure!(rounds > 0, "no rounds");
    let mut zygote = Zygote::start()?;
    let mut report = Report::default();
    writeln!(
        std::io::stdout(),
        "{:<48} {:>9} {:>9} {:>9} {:>9} {:>9} {:>4}",
        "floor",
        "median",
        "least",
        "p10",
        "p90",
        "most",
        "n"
    )?;
    for part in parts {
        match *part {
            "forks" => starts::run(&mut zygote, rounds, &mut report)?,
            "hundred" => starts::hundred(&mut zygote, &mut report)?,
            "linux" => starts::linux(&mut zygote, rounds, &mut report)?,
            _ => pause::run(&mut zygote, rounds, &mut report)?,
        }
    }
    zygote.close()?;
    report.end()
}
