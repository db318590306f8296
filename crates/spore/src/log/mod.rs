//! The log of a process of ours: lines on standard error; whoever starts it says where that goes.
//!
//! Called first thing by the daemon and by the gateway, with what the configuration says. A span is
//! written once it closes, with the time it took, so that at `debug` a request can be followed
//! through every hop by its trace, which is also the visitor's `X-Request-Id`. Our own files stay
//! small (`file.rs`), and lines of one kind few (`throttle.rs`).

mod file;
mod throttle;

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

pub(crate) use self::file::{LogFile, open, open_older};
use self::throttle::Throttled;

/// What is written, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogConfig {
    /// In the syntax of `tracing_subscriber::EnvFilter`; checked when it was read.
    pub(crate) filter: String,
    /// How a line looks.
    pub(crate) format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// An object per line, for programs.
    Json,
}

impl LogFormat {
    /// A line about lines that are not there.
    fn note(self, text: &str) -> String {
        match self {
            Self::Text => format!("({text})"),
            Self::Json => serde_json::json!({ "message": text }).to_string(),
        }
    }
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("it must be `text` or `json`"),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Why a text is no filter; `None` when it is one.
pub(crate) fn refused_filter(text: &str) -> Option<String> {
    let wanted = "it must be a level (`error`, `warn`, `info`, `debug`, `trace`) or a list such as \
                  `info,spore_gateway=debug`";
    let error = EnvFilter::builder().parse(text).err()?;
    Some(format!("{wanted}: {error}"))
}

/// Has this process log to its standard error, which is this file if one is given. The first call
/// holds.
pub(crate) fn to_stderr(config: &LogConfig, file: Option<LogFile>) {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter))
        .with_writer(file.map_or_else(
            || BoxMakeWriter::new(std::io::stderr),
            |file| BoxMakeWriter::new(Mutex::new(file)),
        ))
        .with_ansi(false)
        .log_internal_errors(false)
        .with_span_events(FmtSpan::CLOSE);
    let format = config.format;
    let set = match format {
        LogFormat::Text => lines
            .map_event_format(|lines| Throttled::new(lines, format))
            .try_init(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|lines| Throttled::new(lines, format))
            .try_init(),
    };
    if let Err(error) = set {
        tracing::debug!(%error, "a log subscriber is there already");
    }
}
