//! `spore fork`: sandboxes from what runs, or from a snapshot.

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::sandbox::{Fork as Forked, ForkRequest};

use super::failure::FAILED;
use super::output::Format;
use super::{Context, counting};

/// Open sandboxes: copies of an app, a sandbox or a snapshot, each in a VM of its own
#[derive(Debug, Args)]
#[command(
    after_help = "Prints the id of each sandbox that is open. It ends with 1 when not all are."
)]
pub(super) struct Fork {
    /// An app, a tag, or the id of a sandbox or snapshot; where a tag and an app have one name,
    /// tag:NAME or app:NAME
    #[arg(value_name = "APP|SANDBOX|TAG")]
    from: String,
    /// How many, up to 1000
    #[arg(long, short = 'n', value_name = "N", default_value = "1", value_parser = counting::<u32>)]
    count: u32,
    /// None at all unless all can be opened
    #[arg(long)]
    all_or_nothing: bool,
    /// Fork an app or sandbox although it holds secrets; each fork holds them too
    #[arg(long)]
    allow_secrets: bool,
}

impl Fork {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let request = ForkRequest {
            from: self.from,
            count: self.count,
            all_or_nothing: self.all_or_nothing,
            allow_secrets: self.allow_secrets,
        };
        let forks = context.client.fork(&request).await;
        let forks = forks.with_context(|| format!("cannot fork {}", request.from))?;
        let output = &context.output;
        if output.format() == Format::Json {
            output.json(&forks)?;
        } else {
            tell(context, &forks)?;
        }
        let all = forks.iter().all(|fork| fork.error.is_none());
        Ok(if all { 0 } else { FAILED })
    }
}

/// The ids of those that are open; of the others, how many there are of each reason.
fn tell(context: &Context, forks: &[Forked]) -> Result<()> {
    let output = &context.output;
    let mut reasons: Vec<(&str, usize)> = Vec::new();
    for fork in forks {
        let Some(error) = &fork.error else {
            output.line(fork.id.as_str())?;
            continue;
        };
        match reasons.iter_mut().find(|(text, _)| *text == error.message) {
            Some((_, count)) => *count += 1,
            None => reasons.push((&error.message, 1)),
        }
    }
    for (text, count) in reasons {
        let text = super::output::harmless(text);
        output.note(&format!("{count} of {} not opened: {text}", forks.len()));
    }
    Ok(())
}
