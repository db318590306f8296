//! Answers of the gateway's own: a page for browsers, JSON for everybody else.
//!
//! Called by `forward.rs`. Says what is wrong and what to do next; never shows an address, a path,
//! an owner or an id of a VM.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue,
    RETRY_AFTER,
};
use http::{Response, StatusCode};
use spore_wire::gateway::WakeFailure;

use crate::body::AnswerBody;
use crate::limits::{RETRY_DEADLINE_S, RETRY_FULL_S};

/// Why a request is answered by the gateway.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    HostMissing,
    HostRepeated,
    HostInvalid,
    TargetInvalid,
    MethodRefused,
    FramingRefused,
    HostUnknown,
    TableMissing,
    AppDisabled,
    NoRelease,
    QueueFull,
    AppFull,
    WakeSlow,
    ConnectSlow,
    WakeFailed(Arc<WakeFailure>),
    ConnectFailed,
    VmDied,
    AppClosed,
    AppBroke,
    /// Nobody reads the answer.
    ClientGone,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blame {
    Caller,
    App,
    Platform,
}

/// Whether trying again may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retry {
    No,
    Yes,
    After(u32),
}

struct Text {
    status: StatusCode,
    code: Cow<'static, str>,
    blame: Blame,
    retry: Retry,
    title: &'static str,
    message: Cow<'static, str>,
}

impl Trouble {
    fn text(&self) -> Text {
        match self {
            Self::HostMissing
            | Self::HostRepeated
            | Self::HostInvalid
            | Self::TargetInvalid
            | Self::MethodRefused
            | Self::FramingRefused
            | Self::ClientGone => self.caller_text(),
            Self::HostUnknown => Text::new(
                StatusCode::NOT_FOUND,
                "host_unknown",
                (Blame::Caller, Retry::No),
                "No app here",
                "No app answers at this address. Check its spelling; `spore ps` lists the \
                 addresses of your apps.",
            ),
            Self::AppDisabled | Self::NoRelease | Self::AppFull => self.app_text(),
            Self::TableMissing | Self::QueueFull | Self::WakeSlow | Self::ConnectSlow => {
                self.platform_text()
            }
            Self::WakeFailed(failure) => Text {
                status: StatusCode::SERVICE_UNAVAILABLE,
                code: Cow::Owned(failure.code.clone()),
                blame: Blame::App,
                retry: Retry::After(failure.retry_after_s),
                title: "The app could not be started",
                message: Cow::Owned(failure.message.clone()),
            },
            Self::ConnectFailed | Self::VmDied | Self::AppClosed | Self::AppBroke => {
                self.answer_text()
            }
        }
    }

    fn caller_text(&self) -> Text {
        let (status, code, message) = match self {
            Self::HostMissing => (
                StatusCode::BAD_REQUEST,
                "host_missing",
                "The request names no host. Send one Host header with the app's address.",
            ),
            Self::HostRepeated => (
                StatusCode::BAD_REQUEST,
                "host_repeated",
                "The request has more than one Host header. Send exactly one.",
            ),
            Self::TargetInvalid => (
                StatusCode::BAD_REQUEST,
                "target_invalid",
                "The request's target is no path. Send one that begins with a slash.",
            ),
            Self::MethodRefused => (
                StatusCode::METHOD_NOT_ALLOWED,
                "method_refused",
                "The gateway is no forward proxy. Send requests to the app's own address.",
            ),
            Self::ClientGone => (
                StatusCode::REQUEST_TIMEOUT,
                "client_gone",
                "The client left while its request waited.",
            ),
            Self::FramingRefused => (
                StatusCode::BAD_REQUEST,
                "framing_refused",
                "The length of the request's body is ambiguous. Send either Content-Length or \
                 Transfer-Encoding: chunked.",
            ),
            _ => (
                StatusCode::BAD_REQUEST,
                "host_invalid",
                "The request's host is no valid name. Send the app's address as the Host header.",
            ),
        };
        let whose = (Blame::Caller, Retry::No);
        Text::new(status, code, whose, "The request was refused", message)
    }

    fn app_text(&self) -> Text {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        match self {
            Self::AppDisabled => Text::new(
                status,
                "app_disabled",
                (Blame::App, Retry::No),
                "This app is switched off",
                "Its owner disabled it. If that is you, `spore enable` switches it on again.",
            ),
            Self::NoRelease => Text::new(
                status,
                "no_release",
                (Blame::App, Retry::No),
                "Nothing is deployed here yet",
                "This app has no healthy release. If it is yours, `spore deploy` makes one and \
                 shows why an earlier one failed.",
            ),
            _ => Text::new(
                status,
                "app_full",
                (Blame::App, Retry::After(RETRY_FULL_S)),
                "The app is busy",
                "It answers as many requests at once as it may. Try again in a moment.",
            ),
        }
    }

    fn platform_text(&self) -> Text {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let (code, retry, title, message) = match self {
            Self::TableMissing => (
                "starting",
                RETRY_FULL_S,
                "Just a moment",
                "The platform is starting and does not know its apps yet. Try again in a moment.",
            ),
            Self::QueueFull => (
                "wake_queue_full",
                RETRY_FULL_S,
                "The app is waking up",
                "Too many requests wait for it already. Try again in a moment.",
            ),
            Self::WakeSlow => (
                "wake_deadline",
                RETRY_DEADLINE_S,
                "The app is still waking up",
                "It was asleep and did not become ready within the time that a request may wait. \
                 It goes on starting: try again in a moment.",
            ),
            _ => (
                "connect_deadline",
                RETRY_DEADLINE_S,
                "The app cannot be reached right now",
                "No connection to it could be made within the time that a request may wait. Try \
                 again in a moment.",
            ),
        };
        let whose = (Blame::Platform, Retry::After(retry));
        Text::new(status, code, whose, title, message)
    }

    fn answer_text(&self) -> Text {
        let (code, blame, message) = match self {
            Self::VmDied => (
                "vm_died",
                Blame::App,
                "The app's virtual machine ended while it was answering. The request was sent \
                 once and is not repeated; try again if that is safe.",
            ),
            Self::ConnectFailed => (
                "app_not_listening",
                Blame::App,
                "The app runs but does not accept connections on its port. Try again; if it is \
                 yours, `spore logs` shows what it says.",
            ),
            Self::AppBroke => (
                "app_broke_protocol",
                Blame::App,
                "The app answered with something that is not HTTP. If it is yours, check that it \
                 serves HTTP on the port of its manifest.",
            ),
            _ => (
                "app_closed_connection",
                Blame::App,
                "The app closed the connection without an answer. The request was sent once and \
                 is not repeated; if the app is yours, `spore logs` shows what it says.",
            ),
        };
        Text::new(
            StatusCode::BAD_GATEWAY,
            code,
            (blame, Retry::Yes),
            "The app gave no answer",
            message,
        )
    }
}

impl Text {
    const fn new(
        status: StatusCode,
        code: &'static str,
        (blame, retry): (Blame, Retry),
        title: &'static str,
        message: &'static str,
    ) -> Self {
        Self {
            status,
            code: Cow::Borrowed(code),
            blame,
            retry,
            title,
            message: Cow::Borrowed(message),
        }
    }
}

impl Blame {
    const fn name(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::App => "app",
            Self::Platform => "platform",
        }
    }
}

/// Which form of page a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Html,
    Json,
}

impl Form {
    /// HTML for whoever names it in `Accept`, as browsers do; JSON otherwise.
    pub(crate) fn wanted(headers: &HeaderMap) -> Self {
        let html = headers
            .get_all(ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|item| {
                let kind = item.split(';').next().unwrap_or_default().trim();
                kind.eq_ignore_ascii_case("text/html")
                    || kind.eq_ignore_ascii_case("application/xhtml+xml")
            });
        if html { Self::Html } else { Self::Json }
    }
}

/// The answer to a request that does not reach its app.
pub(crate) fn answer(trouble: &Trouble, form: Form, request_id: &str) -> Response<AnswerBody> {
    let text = trouble.text();
    let (kind, page) = match form {
        Form::Html => ("text/html; charset=utf-8", html(&text, request_id)),
        Form::Json => ("application/json", json(&text, request_id)),
    };
    let page = Bytes::from(page);
    let length = HeaderValue::from(page.len());
    let mut response = Response::new(AnswerBody::Page(Some(page)));
    *response.status_mut() = text.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_LENGTH, length);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Retry::After(seconds) = text.retry {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if text.blame == Blame::Caller && text.status == StatusCode::BAD_REQUEST {
        // What follows on such a connection cannot be trusted to be a request.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn json(text: &Text, request_id: &str) -> String {
    serde_json::json!({
        "code": text.code,
        "message": text.message,
        "blame": text.blame.name(),
        "retry": text.retry != Retry::No,
        "request_id": request_id,
    })
    .to_string()
}

fn html(text: &Text, request_id: &str) -> String {
    let title = escape(text.title);
    let message = escape(&text.message);
    let code = escape(&text.code);
    let status = text.status.as_u16();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>\
         body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;padding:0 1em;\
         color:#222;background:#fff}}\
         small{{color:#666}}\
         @media(prefers-color-scheme:dark)\
         {{body{{color:#ddd;background:#161616}}small{{color:#999}}}}\
         </style></head><body><h1>{title}</h1><p>{message}</p>\
         <p><small>{status} {code} &middot; request {request_id}</small></p></body></html>\n"
    )
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{Form, Trouble, answer, html};
    use http::HeaderMap;
    use http::header::{ACCEPT, HeaderValue};
    use spore_wire::gateway::WakeFailure;

    #[test]
    fn browsers_get_html_and_programs_json() {
        let accepting = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(value));
            Form::wanted(&headers)
        };
        assert_eq!(accepting("text/html,application/xml;q=0.9"), Form::Html);
        assert_eq!(accepting("*/*"), Form::Json);
        assert_eq!(accepting("application/json"), Form::Json);
        assert_eq!(Form::wanted(&HeaderMap::new()), Form::Json);
    }

    #[test]
    fn a_message_cannot_become_markup() {
        let failure = WakeFailure {
            code: "app_failed".into(),
            message: "<script>alert(1)</script>".into(),
            retry_after_s: 3,
        };
        let trouble = Trouble::WakeFailed(std::sync::Arc::new(failure));
        assert!(!html(&trouble.text(), "r").contains("<script>"));
        let response = answer(&trouble, Form::Html, "r");
        assert_eq!(response.headers()["retry-after"], "3");
    }
}
