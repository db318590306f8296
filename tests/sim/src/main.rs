//! Reruns one seed, or a range of them: `cargo run -p spore-sim -- --seed N [--count N] [--story]`.

use anyhow::{Context as _, Result, bail};
use spore_sim::life::live;
use spore_sim::trace::Print;

fn main() -> Result<()> {
    let (mut seed, mut count, mut print) = (0_u64, 1_u64, Print::Nothing);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64> {
            let text = words
                .next()
                .with_context(|| format!("{word} wants a number"))?;
            text.parse().with_context(|| format!("{text} is no number"))
        };
        match word.as_str() {
            "--seed" => seed = number()?,
            "--count" => count = number()?,
            "--story" => print = Print::Lines,
            _ => bail!("`{word}`: use --seed N, --count N and --story"),
        }
    }
    let mut failed = 0;
    for seed in seed..seed + count {
        failed += u64::from(!run(seed, print)?);
    }
    if failed > 0 {
        bail!("{failed} of {count} seeds failed");
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "it is what the program is for")]
fn run(seed: u64, print: Print) -> Result<bool> {
    let verdict = live(seed, print)?;
    let good = verdict.violations.is_empty();
    if !good {
        for line in &verdict.tail {
            println!("{line}");
        }
        for text in &verdict.violations {
            println!("seed {seed}: {text}");
        }
    }
    println!(
        "seed {seed}: {} lines, hash {:016x}, {:?}",
        verdict.lines, verdict.hash, verdict.counts
    );
    Ok(good)
}
