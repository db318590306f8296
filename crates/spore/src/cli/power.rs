//! `spore wake`, `stop`, `enable` and `disable`: whether an app runs, and whether it may.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::app::{App, AppVm};

use super::output::{Format, time_text};
use super::{Context, OneApp};

/// Wake an app and show what took how long
#[derive(Debug, Args)]
pub(super) struct Wake {
    #[command(flatten)]
    which: OneApp,
}

/// Put an app to sleep now; the next request wakes it
#[derive(Debug, Args)]
pub(super) struct Stop {
    #[command(flatten)]
    which: OneApp,
}

/// Let a disabled app be woken again
#[derive(Debug, Args)]
pub(super) struct Enable {
    #[command(flatten)]
    which: OneApp,
}

/// Stop an app and let nothing wake it
#[derive(Debug, Args)]
pub(super) struct Disable {
    #[command(flatten)]
    which: OneApp,
}

impl Wake {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let woken = context.client.wake(&app).await;
        let woken = woken.with_context(|| format!("cannot wake {app}"))?;
        let phases = woken
            .vm
            .as_ref()
            .map(phases)
            .filter(|text| !text.is_empty());
        let told = match phases {
            Some(phases) => format!("{app} is awake: {phases}"),
            None => format!("{app} is awake"),
        };
        tell(context, &woken, &told)
    }
}

impl Stop {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let stopped = context.client.stop(&app).await;
        let stopped = stopped.with_context(|| format!("cannot stop {app}"))?;
        tell(
            context,
            &stopped,
            &format!("{app} sleeps; the next request wakes it"),
        )
    }
}

impl Enable {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let enabled = context.client.enable(&app).await;
        let enabled = enabled.with_context(|| format!("cannot enable {app}"))?;
        tell(
            context,
            &enabled,
            &format!("{app} is enabled; the next request wakes it"),
        )
    }
}

impl Disable {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let app = self.which.app;
        let disabled = context.client.disable(&app).await;
        let disabled = disabled.with_context(|| format!("cannot disable {app}"))?;
        tell(
            context,
            &disabled,
            &format!("{app} is disabled; `spore enable {app}` undoes it"),
        )
    }
}

fn tell(context: &Context, app: &App, text: &str) -> Result<u8> {
    match context.output.format() {
        Format::Json => context.output.json(app)?,
        Format::Text => context.output.line(text)?,
    }
    Ok(0)
}

/// The phases of a wake on one line, with their sum.
pub(super) fn phases(vm: &AppVm) -> String {
    let text = |us: u64| time_text(Duration::from_micros(us));
    let parts: Vec<String> = vm
        .phases
        .iter()
        .map(|phase| format!("{} {}", phase.name, text(phase.ms.0)))
        .collect();
    if parts.is_empty() {
        return String::new();
    }
    let sum = vm.phases.iter().map(|phase| phase.ms.0).sum();
    format!("{} ({})", text(sum), parts.join(", "))
}
