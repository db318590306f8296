//! Longer work, step by step: each with its time once it is done, the present one as it goes.
//!
//! Used by verbs that upload or follow an operation.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use spore_api::operation::Operation;
use tokio::time::{Instant, MissedTickBehavior};

use super::output::{Format, Output, harmless};

/// How often a bar moves.
const TICK: Duration = Duration::from_millis(120);

/// The steps of one piece of work.
#[derive(Debug)]
pub(super) struct Steps<'o> {
    output: &'o Output,
    bar: ProgressBar,
    told: usize,
}

/// What was done, for programs, where the interface answers nothing.
#[derive(Debug, Serialize)]
pub(super) struct Done<'a> {
    done: &'static str,
    target: &'a str,
}

impl<'o> Steps<'o> {
    pub(super) fn new(output: &'o Output) -> Self {
        Self {
            output,
            bar: output.bar(),
            told: 0,
        }
    }

    /// Shows `text` while `work` goes on; `count` of `total` bytes are done. Tells `done` with the
    /// time it took.
    pub(super) async fn during<T, E>(
        &mut self,
        text: &str,
        progress: Option<(&AtomicU64, u64)>,
        work: impl Future<Output = Result<T, E>>,
        done: impl FnOnce(&T) -> String,
    ) -> Result<T, E> {
        let began = Instant::now();
        let mut work = pin!(work);
        match progress {
            Some((_, total)) => {
                self.bar.set_length(total);
                self.bar
                    .set_style(style("  {msg} {bar:24} {bytes} of {total_bytes}"));
            }
            None => self.bar.set_style(style("  {spinner} {msg} {elapsed}")),
        }
        self.bar.reset();
        self.bar.set_message(text.to_owned());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let result = loop {
            tokio::select! {
                result = &mut work => break result,
                _ = tick.tick() => match progress {
                    Some((count, _)) => self.bar.set_position(count.load(Ordering::Relaxed)),
                    None => self.bar.tick(),
                },
            }
        };
        self.clear();
        if let Ok(value) = &result {
            self.tell(&done(value), Some(began.elapsed()));
        }
        result
    }

    /// Tells the steps of an operation that were not told yet.
    pub(super) fn follow(&mut self, operation: &Operation) {
        for step in operation.steps.iter().skip(self.told) {
            let text = harmless(&step.text).into_owned();
            let Some(ms) = step.ms else {
                self.bar.set_style(style("  {spinner} {msg} {elapsed}"));
                self.bar.set_message(text);
                self.bar.enable_steady_tick(TICK);
                return;
            };
            self.clear();
            self.tell(&text, Some(Duration::from_millis(ms)));
            self.told += 1;
        }
    }

    /// Begins to follow another operation.
    pub(super) fn next_operation(&mut self) {
        self.told = 0;
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        self.bar.disable_steady_tick();
        self.bar.finish_and_clear();
        self.bar.reset();
    }

    fn tell(&self, text: &str, took: Option<Duration>) {
        if self.output.format() == Format::Text {
            self.output.step(text, took);
        }
    }
}

impl<'a> Done<'a> {
    pub(super) fn new(done: &'static str, target: &'a str) -> Self {
        Self { done, target }
    }

    /// Tells it in the format that is wanted; `text` is for people.
    pub(super) fn print(&self, output: &Output, text: &str) -> Result<u8> {
        match output.format() {
            Format::Json => output.json(self)?,
            Format::Text => output.line(text)?,
        }
        Ok(0)
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_error| ProgressStyle::default_spinner())
        .tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ")
        .progress_chars("━╸ ")
}
