//! Request bodies that go on being taken for a while after nobody wants them.
//!
//! Used by the listener. A server that answers in the middle of a body and closes can destroy its
//! own answer, because the sender learns of the close first (RFC 9112, section 9.6).

use core::pin::Pin;
use core::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// A body whose rest is read and thrown away once it is dropped.
pub(super) struct Lingering {
    /// `None` once it ended.
    body: Option<Incoming>,
    timeout: Duration,
}

impl Lingering {
    /// Reads on for `timeout` at most.
    pub(super) fn new(body: Incoming, timeout: Duration) -> Self {
        let body = Some(body);
        Self { body, timeout }
    }
}

impl Body for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let ended = || SizeHint::with_exact(0);
        self.body.as_ref().map_or_else(ended, Body::size_hint)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream()) else {
            return;
        };
        // Without a runtime the process ends, and its connections with it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let timeout = self.timeout;
        runtime.spawn(async move {
            let rest = async {
                while let Some(Ok(_thrown_away)) =
                    core::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
                {
                }
            };
            drop(tokio::time::timeout(timeout, rest).await);
        });
    }
}
