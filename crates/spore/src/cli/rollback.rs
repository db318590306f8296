//! `spore rollback`: an earlier release goes live again.

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::app;

use super::deploy::finish;
use super::steps::Steps;
use super::{Context, OneApp, counting};

/// Make an earlier release live
#[derive(Debug, Args)]
pub(super) struct Rollback {
    #[command(flatten)]
    which: OneApp,
    /// The release's number; the healthy one before the present when absent
    #[arg(long, value_name = "RELEASE", value_parser = counting::<u64>)]
    to: Option<u64>,
}

impl Rollback {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let begun = context
            .client
            .rollback(&app, app::Rollback { to: self.to })
            .await;
        let begun = begun.with_context(|| format!("cannot roll {app} back"))?;
        let mut steps = Steps::new(&context.output);
        let ended = context.client.wait(begun, |now| steps.follow(now)).await;
        steps.clear();
        let ended = ended.with_context(|| format!("cannot follow the rollback of {app}"))?;
        finish(context, &app, ended).await
    }
}
