//! The log of a process of ours: lines on standard error; whoever starts it says where that goes.
//!
//! Called first thing by the daemon and by the gateway, with what the configuration says. A span is
//! written once it closes, with the time it took, so that at `debug` a request can be followed
//! through every hop by its trace, which is also the visitor's `X-Request-Id`.

use std::fmt;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

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

/// Has this process log to its standard error. The first call holds.
pub(crate) fn to_stderr(config: &LogConfig) {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_span_events(FmtSpan::CLOSE);
    let set = match config.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    if let Err(error) = set {
        tracing::debug!(%error, "a log subscriber is there already");
    }
}
