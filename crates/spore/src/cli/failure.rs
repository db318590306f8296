//! What went wrong, for people, for programs and as an exit code.
//!
//! Made by `cli/mod.rs` of the error that a verb ended with; printed by `output.rs`.

use std::io;

use clap::error::ErrorKind;
use serde::Serialize;
use spore_api::client::{CallError, ExecError};
use spore_api::error::{ApiError, Blame, Retry};
use thiserror::Error;

use crate::config::ConfigError;

/// Exit code of a failure.
pub(crate) const FAILED: u8 = 1;
/// Exit code of a wrong command line.
pub(crate) const USAGE: u8 = 2;
/// Exit code of an app that failed.
pub(crate) const APP_FAILED: u8 = 3;
/// Exit code of a program whose time was up, as timeout(1) has it.
pub(crate) const TIMED_OUT: u8 = 124;

/// What went wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    /// From what failed to the last cause.
    pub(crate) chain: Vec<String>,
    /// For programs.
    pub(crate) report: Report,
    /// The exit code.
    pub(crate) exit: u8,
}

/// What went wrong, in the shape of the interface's own errors.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The interface's codes, and `usage`, `unreachable` and `local` of the CLI itself.
    code: String,
    message: String,
    blame: Blame,
    retry: Retry,
    request_id: String,
}

/// A command line that is well-formed and still cannot be done.
#[derive(Debug, Error)]
pub(crate) enum UsageError {
    #[error("removing {app} needs a yes, and there is no terminal to ask on. Add `--yes`")]
    NeedsYes { app: String },
    #[error(
        "`{text}` has no app and no path. Use APP:/path for a file inside an app, a plain path for \
         a file here, - for standard input or output"
    )]
    CopySide { text: String },
    #[error(
        "one side of a copy is a file inside an app, the other one is here: `spore cp APP:/path \
         FILE` or `spore cp FILE APP:/path`"
    )]
    CopySides,
    #[error(
        "a secret's value is never taken from the command line, where every process of this host \
         reads it: pipe it, or type it when asked. The one given may be in your shell's history"
    )]
    ValueInSight,
    #[error("`{text}` is not of the form NAME=VALUE. Use `-e NAME=VALUE`")]
    Variable { text: String },
    #[error("`{text}` is not a time: {problem}. Use one such as 30s or 5m")]
    Time { text: String, problem: String },
}

/// Whether a failure is only that nobody reads the output any more, as in `spore logs | head`.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(broken)
}

impl Failure {
    /// The failure that a command line is which the parser does not take.
    pub(crate) fn of_parser(error: &clap::Error) -> Self {
        let text = match error.kind() {
            // The parser's own words would list the verbs that are not for people.
            ErrorKind::MissingSubcommand => "no verb is given".to_owned(),
            _ => error.render().to_string(),
        };
        // What follows the first part is the usage, for people.
        let first = text.split("\n\nUsage:").next().unwrap_or(&text);
        let words: Vec<&str> = first.split_whitespace().collect();
        let message = words.join(" ");
        let message = message.strip_prefix("error: ").unwrap_or(&message);
        let message = message
            .strip_suffix("For more information, try '--help'.")
            .unwrap_or(message)
            .trim_end()
            .to_owned();
        Self {
            chain: vec![message.clone()],
            report: Report {
                code: "usage".to_owned(),
                message,
                blame: Blame::Caller,
                retry: Retry::Never,
                request_id: String::new(),
            },
            exit: USAGE,
        }
    }

    /// The failure that an error means.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        let mut chain: Vec<String> = Vec::new();
        for cause in error.chain() {
            let text = cause.to_string();
            // A transparent wrapper says the same as what it wraps.
            if chain.last() != Some(&text) {
                chain.push(text);
            }
        }
        let api = error.chain().find_map(api_of);
        let exit = match api {
            Some(api) if api.blame == Blame::App => APP_FAILED,
            _ if error.chain().any(is_usage) => USAGE,
            _ => FAILED,
        };
        let report = match api {
            Some(api) => Report::of_api(api),
            None => Report::of_chain(error, &chain, exit),
        };
        Self {
            chain,
            report,
            exit,
        }
    }
}

impl Report {
    fn of_api(api: &ApiError) -> Self {
        let code = serde_json::to_value(api.code).ok();
        let code = code
            .as_ref()
            .and_then(serde_json::Value::as_str)
            .unwrap_or("internal");
        Self {
            code: code.to_owned(),
            message: api.message.clone(),
            blame: api.blame,
            retry: api.retry,
            request_id: api.request_id.clone(),
        }
    }

    fn of_chain(error: &anyhow::Error, chain: &[String], exit: u8) -> Self {
        let is_far = error.chain().any(|cause| {
            matches!(
                cause.downcast_ref::<CallError>(),
                Some(CallError::Unreachable { .. } | CallError::Denied { .. })
            )
        });
        let (code, blame, retry) = match (is_far, exit) {
            (true, _) => ("unreachable", Blame::Platform, Retry::AfterChange),
            (_, USAGE) => ("usage", Blame::Caller, Retry::Never),
            _ => ("local", Blame::Caller, Retry::AfterChange),
        };
        Self {
            code: code.to_owned(),
            message: chain.join(": "),
            blame,
            retry,
            request_id: String::new(),
        }
    }
}

/// Whether the command line itself is wrong: `--host` is read by the verb, not by the parser.
fn is_usage(cause: &(dyn std::error::Error + 'static)) -> bool {
    let host = cause.downcast_ref::<ConfigError>();
    cause.is::<UsageError>() || matches!(host, Some(ConfigError::Endpoint(_)))
}

fn api_of<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e ApiError> {
    if let Some(error) = cause.downcast_ref::<ApiError>() {
        return Some(error);
    }
    if let Some(error) = cause.downcast_ref::<CallError>() {
        return error.api();
    }
    match cause.downcast_ref::<ExecError>()? {
        ExecError::Api(error) => Some(error),
        ExecError::Call(error) => error.api(),
        _ => None,
    }
}
