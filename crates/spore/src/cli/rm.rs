//! `spore rm`: an app goes, with its releases, secrets and logs.

use anyhow::{Context as _, Result};
use clap::Args;

use super::failure::{FAILED, UsageError};
use super::steps::Done;
use super::{Context, OneApp};

/// Remove an app with its releases, secrets and logs
#[derive(Debug, Args)]
pub(super) struct Rm {
    #[command(flatten)]
    which: OneApp,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Rm {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let (app, output) = (self.which.app, &context.output);
        if !self.yes {
            if !output.can_ask() {
                return Err(UsageError::NeedsYes {
                    app: app.to_string(),
                }
                .into());
            }
            let question = format!("Remove {app} with its releases, secrets and logs?");
            if !output.ask(&question)? {
                output.note("nothing was removed");
                return Ok(FAILED);
            }
        }
        let removed = context.client.remove_app(&app).await;
        removed.with_context(|| format!("cannot remove {app}"))?;
        Done::new("removed", app.as_str()).print(output, &format!("{app} is removed"))
    }
}
