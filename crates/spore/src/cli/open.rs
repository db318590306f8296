//! `spore open`: an app's URL, in a browser where there is one.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use super::output::Format;
use super::{Context, OneApp};
use crate::config::Desktop;

/// Print an app's URL, and open it on a desktop
#[derive(Debug, Args)]
pub(super) struct Open {
    #[command(flatten)]
    which: OneApp,
}

#[derive(Serialize)]
struct Place {
    url: String,
}

impl Open {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let found = context.client.app(&app).await;
        let url = found.with_context(|| format!("cannot find {app}"))?.url;
        let output = &context.output;
        if output.format() == Format::Json {
            output.json(&Place { url })?;
            return Ok(0);
        }
        output.line(&url)?;
        let is_url = url.starts_with("http://") || url.starts_with("https://");
        if output.is_terminal() && is_url && context.screen.desktop == Desktop::Present {
            let browser = Command::new("xdg-open")
                .arg(&url)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            if browser.is_err() {
                output.note("there is no xdg-open here: open the URL by hand");
            }
        }
        Ok(0)
    }
}
