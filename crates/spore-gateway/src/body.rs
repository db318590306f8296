//! The two bodies of an exchange: the request's on its way to the app, the answer's on its way
//! back.
//!
//! Made by `forward.rs`; polled by hyper. Neither holds more than the piece that is on its way,
//! so a slow reader slows the writer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::activity::InFlight;
use crate::header::rewrite_trailers;
use crate::limits::Limits;
use crate::listen::Turn;
use crate::pool::{Detached, Upstream};

/// How far a request's body is, as its reader tells others.
#[derive(Debug, Default)]
pub(crate) struct BodyProgress {
    ended: AtomicBool,
    starved: AtomicBool,
}

impl BodyProgress {
    /// Whether all of it was read.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Whether the app waits for bytes that the client has not sent.
    pub(crate) fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Relaxed)
    }
}

/// A request's body. Reading it is what makes the gateway read from the client.
#[derive(Debug)]
pub(crate) struct RequestBody {
    incoming: Incoming,
    progress: Option<Arc<BodyProgress>>,
}

impl RequestBody {
    /// `None` for `progress` is a request without a body.
    pub(crate) const fn new(incoming: Incoming, progress: Option<Arc<BodyProgress>>) -> Self {
        Self { incoming, progress }
    }

    pub(crate) fn progress(&self) -> Option<Arc<BodyProgress>> {
        self.progress.clone()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut polled = Pin::new(&mut self.incoming).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            rewrite_trailers(trailers);
        }
        if let Some(progress) = &self.progress {
            progress
                .starved
                .store(polled.is_pending(), Ordering::Relaxed);
            if matches!(polled, Poll::Ready(None | Some(Err(_)))) || self.incoming.is_end_stream() {
                progress.ended.store(true, Ordering::Relaxed);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum AnswerBody {
    /// A page of the gateway's own; taken once.
    Page(Option<Bytes>),
    /// What the app sends.
    App(AppBody),
}

/// What the app sends, with all that must live as long as it flows.
#[derive(Debug)]
pub(crate) struct AppBody {
    incoming: Incoming,
    /// `None` once it is over.
    hold: Option<Hold>,
}

/// What is held until the last byte of an answer is on its way.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) transport: Transport,
    pub(crate) in_flight: InFlight,
    pub(crate) _turn: Turn,
    pub(crate) limits: Arc<Limits>,
}

/// Who moves the connection to the app on.
#[derive(Debug)]
pub(crate) enum Transport {
    /// The reader of the body.
    Here(Upstream),
    /// A task, because the request's body is still being sent.
    Task(#[expect(dead_code, reason = "held for its drop")] Detached),
}

/// Why an answer was cut off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The connection failed.
    #[error("the app's answer broke off")]
    Broken(#[source] hyper::Error),
    /// The VM ended, which may look like the regular end of a body without a length.
    #[error("the VM ended during the answer")]
    Died,
}

impl AppBody {
    pub(crate) fn new(incoming: Incoming, hold: Hold) -> Self {
        let mut body = Self {
            incoming,
            hold: Some(hold),
        };
        if body.incoming.is_end_stream() {
            body.finish();
        }
        body
    }

    /// The answer is complete: its connection is free, its request no longer in flight.
    fn finish(&mut self) {
        if let Some(hold) = self.hold.take()
            && let Transport::Here(upstream) = hold.transport
        {
            hold.in_flight.incarnation().put(upstream, &hold.limits);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(hold) = &mut self.hold else {
            return Poll::Ready(None);
        };
        let polled = match &mut hold.transport {
            Transport::Here(upstream) => upstream.poll_body(cx, &mut self.incoming),
            Transport::Task(_) => Pin::new(&mut self.incoming).poll_frame(cx),
        };
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                if self.incoming.is_end_stream() {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) if !hold.in_flight.incarnation().is_gone() => {
                self.finish();
                Poll::Ready(None)
            }
            Poll::Ready(end) => {
                let died = hold.in_flight.incarnation().is_gone();
                if died {
                    hold.in_flight.count_death();
                }
                self.hold = None;
                Poll::Ready(Some(Err(match end {
                    Some(Err(error)) if !died => BodyError::Broken(error),
                    _ => BodyError::Died,
                })))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for AppBody {
    fn drop(&mut self) {
        // hyper drops a body of known length without asking for its end.
        if self.incoming.is_end_stream() {
            self.finish();
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Page(page) => Poll::Ready(page.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::App(body) => body
                .poll(cx)
                .map(|frame| frame.map(|result| result.map_err(io::Error::other))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Page(page) => page.as_ref().is_none_or(Bytes::is_empty),
            Self::App(body) => body.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Page(page) => {
                SizeHint::with_exact(page.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::App(body) => body.incoming.size_hint(),
        }
    }
}
