//! `spore logs`: what an app printed, and prints.

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::log::{LogLine, LogQuery, LogSource};

use super::output::{Format, Look, Output, harmless, moment};
use super::{Context, OneApp, counting};

/// Show what an app prints
#[derive(Debug, Args)]
pub(super) struct Logs {
    #[command(flatten)]
    which: OneApp,
    /// Go on with what comes, until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// The last so many lines [default: 100]
    #[arg(long, short = 'n', value_name = "LINES", value_parser = counting::<u32>)]
    tail: Option<u32>,
}

impl Logs {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let what = || format!("cannot show the logs of {app}");
        let query = LogQuery {
            tail: self.tail,
            follow: self.follow,
        };
        let mut lines = context.client.logs(&app, &query).await.with_context(what)?;
        while let Some(line) = lines.next().await.with_context(what)? {
            match context.output.format() {
                Format::Json => context.output.json_line(&line)?,
                Format::Text => context.output.line(&shown(&context.output, &line))?,
            }
        }
        Ok(0)
    }
}

/// A line for people.
pub(super) fn shown(output: &Output, line: &LogLine) -> String {
    let at = output.paint(Look::Faint, &moment(&line.at));
    // A pipe gets the bytes as they are: it may be a file that is looked at later.
    let text = if output.is_terminal() {
        harmless(&line.text)
    } else {
        line.text.as_str().into()
    };
    match line.from {
        LogSource::Stdout | LogSource::Stderr => format!("{at}  {text}"),
        LogSource::Platform => {
            format!(
                "{at}  {}",
                output.paint(Look::Faint, &format!("spore: {text}"))
            )
        }
    }
}
