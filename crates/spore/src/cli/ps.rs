//! `spore ps`: all apps, a line each.

use anyhow::{Context as _, Result};
use clap::Args;
use spore_api::app::{App, AppState};

use super::Context;
use super::output::{Cell, Look};

/// List apps
#[derive(Debug, Args)]
#[command(visible_alias = "ls")]
pub(super) struct Ps {}

impl Ps {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let apps = context
            .client
            .apps()
            .await
            .context("cannot list the apps")?;
        let headings = ["NAME", "STATE", "RELEASE", "BOUNDARY", "URL"];
        let none = "no apps yet. Deploy one: spore deploy FOLDER";
        context.output.list(&apps, &headings, row, none)?;
        Ok(0)
    }
}

fn row(app: &App) -> Vec<Cell> {
    vec![
        Cell::new(app.name.as_str()),
        state(app.state),
        Cell::new(
            app.release
                .map_or_else(|| "-".to_owned(), |number| number.to_string()),
        ),
        Cell::new(app.vm.as_ref().map_or("-", |vm| vm.boundary_text.as_str())),
        Cell::new(&app.url),
    ]
}

/// A state as a word with a look.
pub(super) fn state(state: AppState) -> Cell {
    let (text, look) = match state {
        AppState::Asleep => ("asleep", Look::Faint),
        AppState::Suspended => ("suspended", Look::Faint),
        AppState::Waking => ("waking", Look::Pending),
        AppState::Awake => ("awake", Look::Good),
        AppState::Draining => ("draining", Look::Pending),
        AppState::Disabled => ("disabled", Look::Faint),
        AppState::New => ("new", Look::Pending),
        AppState::Failing => ("failing", Look::Bad),
    };
    Cell::new(text).look(look)
}
