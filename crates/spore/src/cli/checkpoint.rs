//! `spore checkpoint`: a snapshot of what runs and goes on.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::name::{AppName, SandboxId, TagName};
use spore_api::snapshot::{Checkpoint as Taken, TakeCheckpoint};
use spore_api::span::Ms;

use super::Context;
use super::output::{Format, bytes_text};

/// Take a snapshot of an app or a sandbox, which goes on
#[derive(Debug, Args)]
#[command(after_help = "Fork it as often as you like: spore fork TAG -n 10")]
pub(super) struct Checkpoint {
    /// The app's name, or the sandbox's id; an app that sleeps is woken
    #[arg(value_name = "APP|SANDBOX")]
    of: String,
    /// The name that the snapshot gets
    #[arg(long)]
    tag: TagName,
    /// Take it although it holds secrets, which its forks hold too; on the host's disk it is
    /// encrypted
    #[arg(long)]
    allow_secrets: bool,
}

impl Checkpoint {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let take = TakeCheckpoint {
            tag: self.tag,
            allow_secrets: self.allow_secrets,
        };
        let what = || format!("cannot take a checkpoint of {}", self.of);
        let client = &context.client;
        let taken = match self.of.parse::<SandboxId>() {
            Ok(sandbox) => client.checkpoint_sandbox(&sandbox, &take).await,
            Err(_name) => {
                let app: AppName = self.of.parse().with_context(what)?;
                client.checkpoint_app(&app, &take).await
            }
        };
        let taken = taken.with_context(what)?;
        let output = &context.output;
        match output.format() {
            Format::Json => output.json(&taken)?,
            Format::Text => output.line(&told(&self.of, &take, &taken))?,
        }
        Ok(0)
    }
}

/// What was taken, and on a line of its own what that cost.
fn told(of: &str, take: &TakeCheckpoint, taken: &Taken) -> String {
    let ms = |span: Ms| Duration::from_micros(span.0).as_secs_f64() * 1000.0;
    format!(
        "{} is taken of {of}: {}\npause_ms {:.1}, frozen_ms {:.1}",
        take.tag,
        bytes_text(taken.snapshot.bytes),
        ms(taken.pause_ms),
        ms(taken.frozen_ms)
    )
}
