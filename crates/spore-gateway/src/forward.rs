//! One request, from the moment its head is read until its answer is on its way.
//!
//! Called by `listen.rs` for every request of every connection. Decides nothing about wakes (that
//! is `wake/`), and never sends a request twice: a connection that is refused is tried again for
//! a while, one that closes before a byte was written gives the request back, any other failure is
//! answered with 502.
//!
//! ```text
//!   host ──▶ route ──▶ enter ──Now──▶ connection: idle one or new ──▶ exchange ──▶ answer
//!                        │ ▲                  │                          │
//!                   Wait │ └── gone meanwhile─┴── closed, nothing sent ──┘
//!                        ▼
//!                     Verdict, deadline or client gone
//! ```

use std::sync::Arc;

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;
use spore_wire::gateway::{Admission, Phase};
use tokio::time::{Duration, Instant};
use tracing::field::Empty;
use tracing::{Instrument as _, Span};

use crate::Gateway;
use crate::activity::InFlight;
use crate::body::{AnswerBody, AppBody, BodyProgress, Hold, RequestBody, Transport};
use crate::feed::ConnectError;
use crate::header::{self, Framing};
use crate::limits::{CLIENT_CHECK_PACE, REFUSED_PAUSE_MAX, REFUSED_PAUSE_MIN};
use crate::listen::{Client, Turn};
use crate::page::{self, Form, Trouble};
use crate::pool::{ExchangeError, Upstream};
use crate::relay::Relay;
use crate::route::Target;
use crate::wake::{Entry, Refused, Verdict, Waiter};

/// What is known of the wake that a request waited for.
#[derive(Debug)]
struct Waited {
    phases: Arc<[Phase]>,
    wait: Duration,
}

/// A request that is ready to be sent.
struct Outgoing {
    request: Request<RequestBody>,
    progress: Option<Arc<BodyProgress>>,
    /// The client's side of a wanted upgrade.
    upgrade: Option<OnUpgrade>,
}

/// Answers one request.
pub(crate) async fn serve(
    gateway: &Arc<Gateway>,
    turn: Turn,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let pending = Unanswered(gateway);
    let request_id = gateway.ids.next();
    let form = Form::wanted(request.headers());
    let mut response = match forward(gateway, turn, request, &request_id).await {
        Ok(response) => response,
        // Returning drops `pending`, which counts it.
        Err(Trouble::ClientGone) => return Response::new(AnswerBody::Page(None)),
        Err(trouble) => {
            if matches!(trouble, Trouble::QueueFull | Trouble::AppFull) {
                gateway.feed.counters().count_refused_full();
            }
            let text = request_id.to_str().unwrap_or_default();
            let mut response = page::answer(&trouble, form, text);
            response
                .headers_mut()
                .insert(header::X_REQUEST_ID, request_id);
            response
        }
    };
    *response.version_mut() = Version::HTTP_11;
    if gateway.quit.is_cancelled() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    std::mem::forget(pending);
    gateway.feed.counters().count_answer(response.status());
    response
}

/// Counts a request that is dropped before its answer.
struct Unanswered<'a>(&'a Gateway);

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.feed.counters().count_unanswered();
    }
}

async fn forward(
    gateway: &Arc<Gateway>,
    turn: Turn,
    request: Request<Incoming>,
    request_id: &HeaderValue,
) -> Result<Response<AnswerBody>, Trouble> {
    let (mut parts, body) = request.into_parts();
    // Known before anything is refused: what is left of a body decides how the connection closes.
    let progress = (!body.is_end_stream()).then(Arc::default);
    turn.client().watch_body(progress.as_ref());
    let host = header::take_host(
        &parts.method,
        parts.version,
        &mut parts.uri,
        &mut parts.headers,
    )?;
    let framing = header::framing_of(&parts.headers, body.is_end_stream())?;
    let target = find(gateway, &host).await?;
    match target.policy.admission {
        Admission::Open => {}
        Admission::Disabled => return Err(Trouble::AppDisabled),
        Admission::NoRelease => return Err(Trouble::NoRelease),
    }
    let outgoing = prepare(
        turn.client(),
        parts,
        RequestBody::new(body, progress),
        framing,
        request_id,
    );
    // From here the request is large or waits long: off the stack of the connection.
    let span = tracing::debug_span!("request", app = %target.app.key(), trace = ?request_id);
    let delivery = deliver(gateway, turn, &target, outgoing, request_id).instrument(span);
    let mut response = Box::pin(delivery).await?;
    header_of_answer(&mut response, &target.host, request_id, framing);
    Ok(response)
}

fn header_of_answer(
    response: &mut Response<AnswerBody>,
    host: &str,
    request_id: &HeaderValue,
    framing: Framing,
) {
    let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let protocol = response.headers().get(UPGRADE).cloned();
    let headers = response.headers_mut();
    header::rewrite_answer(headers, host, request_id);
    if let Some(protocol) = protocol.filter(|_| switching) {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else if framing == Framing::Chunked {
        // The parser drops a Content-Length beside Transfer-Encoding without a word, so that the
        // request may have been meant to end elsewhere by whoever sent it: what follows on this
        // connection is not to be trusted (RFC 9112, 6.1).
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

async fn find(gateway: &Gateway, host: &str) -> Result<Arc<Target>, Trouble> {
    if let Some(target) = gateway.routes.get(host) {
        return Ok(target);
    }
    if !gateway.routes.is_whole() {
        let limit = gateway.limits.first_table_timeout;
        let waited = tokio::time::timeout(limit, gateway.routes.wait_whole()).await;
        waited.map_err(|_elapsed| Trouble::TableMissing)?;
    }
    gateway.routes.get(host).ok_or(Trouble::HostUnknown)
}

fn prepare(
    client: &Client,
    mut parts: Parts,
    body: RequestBody,
    framing: Framing,
    request_id: &HeaderValue,
) -> Outgoing {
    let protocol = header::upgrade_of(parts.version, &parts.headers);
    let upgrade = protocol
        .as_ref()
        .and_then(|_| parts.extensions.remove::<OnUpgrade>());
    let protocol = protocol.filter(|_| upgrade.is_some());
    header::rewrite_request(
        &mut parts.headers,
        &client.headers,
        request_id,
        framing,
        protocol,
    );
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    Outgoing {
        progress: body.progress(),
        request: Request::from_parts(parts, body),
        upgrade,
    }
}

/// Sends the request to its app, as often as it takes to send it once.
async fn deliver(
    gateway: &Arc<Gateway>,
    turn: Turn,
    target: &Target,
    mut outgoing: Outgoing,
    request_id: &HeaderValue,
) -> Result<Response<AnswerBody>, Trouble> {
    let mut deadline = Deadline::new(target.policy.wake_deadline_ms);
    let mut waited = None;
    loop {
        let in_flight_max = gateway.limits.in_flight_max;
        let in_flight = match target.app.enter(&target.policy, in_flight_max, request_id) {
            Entry::Now(in_flight) => in_flight,
            Entry::Refused(why) => return Err(why.into()),
            Entry::Wait(waiter) => {
                if waited.is_none() {
                    gateway.feed.counters().count_waited();
                }
                let (in_flight, phases) = wait(waiter, turn.client(), deadline.at())
                    .instrument(tracing::debug_span!("wait"))
                    .await?;
                let wait = deadline.since();
                waited = Some(Waited { phases, wait });
                in_flight
            }
        };
        let (mut upstream, kept) = match in_flight.incarnation().take() {
            Some(upstream) => (upstream, Kept::Before),
            None => match open(gateway, &in_flight, deadline.at())
                .instrument(tracing::debug_span!("connect", refused = Empty))
                .await?
            {
                Some(upstream) => (upstream, Kept::Now),
                // It serves no longer; nothing was sent, so the next one may be woken.
                None => continue,
            },
        };
        let exchange = upstream
            .exchange(outgoing.request)
            .instrument(tracing::debug_span!("exchange", vm = %in_flight.incarnation().vm()));
        match exchange.await {
            Ok(response) => {
                let mut answer = answer(
                    gateway,
                    Exchange {
                        response,
                        upstream,
                        in_flight,
                        turn,
                        progress: outgoing.progress,
                        upgrade: outgoing.upgrade,
                    },
                )?;
                if let Some(Waited { phases, wait }) = waited {
                    let wait_us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
                    header::add_timing(answer.headers_mut(), &phases, wait_us);
                }
                return Ok(answer);
            }
            Err(ExchangeError::Unsent(request)) => {
                if kept == Kept::Now && !in_flight.incarnation().is_gone() {
                    return Err(Trouble::AppClosed);
                }
                outgoing.request = *request;
            }
            Err(ExchangeError::Sent(error)) => return Err(failed(&in_flight, &error)),
        }
    }
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Before,
    Now,
}

fn failed(in_flight: &InFlight, error: &hyper::Error) -> Trouble {
    if in_flight.incarnation().is_gone() {
        in_flight.count_death();
        return Trouble::VmDied;
    }
    let vm = in_flight.incarnation().vm();
    tracing::debug!(%vm, %error, "an app gave no answer");
    if error.is_parse() {
        Trouble::AppBroke
    } else {
        Trouble::AppClosed
    }
}

/// When a request stops waiting. The clock is read only by requests that wait.
struct Deadline {
    limit: Duration,
    began: Option<Instant>,
}

impl Deadline {
    const fn new(limit_ms: u64) -> Self {
        Self {
            limit: Duration::from_millis(limit_ms),
            began: None,
        }
    }

    fn at(&mut self) -> Instant {
        *self.began.get_or_insert_with(Instant::now) + self.limit
    }

    fn since(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.elapsed())
    }
}

/// Waits in the app's queue. A client that leaves takes its place along: hyper drops this future
/// when it sees the client go, and behind an unread body, where hyper cannot see it, this looks.
async fn wait(
    waiter: Waiter,
    client: &Client,
    deadline: Instant,
) -> Result<(InFlight, Arc<[Phase]>), Trouble> {
    let mut waiter = std::pin::pin!(waiter);
    loop {
        let look_at = deadline.min(Instant::now() + CLIENT_CHECK_PACE);
        match tokio::time::timeout_at(look_at, waiter.as_mut()).await {
            Ok(Some(Verdict::Admitted { in_flight, phases })) => return Ok((in_flight, phases)),
            Ok(Some(Verdict::Refused(why))) => return Err(why.into()),
            Ok(None) => return Err(Trouble::WakeSlow),
            Err(_elapsed) if Instant::now() >= deadline => return Err(Trouble::WakeSlow),
            Err(_elapsed) => {
                if client.is_gone().await {
                    client.end();
                    return Err(Trouble::ClientGone);
                }
            }
        }
    }
}

/// What became of one try to connect.
enum Connected {
    Open(Upstream),
    Refused(ConnectError),
    /// The VM ended meanwhile.
    Gone,
}

/// A new connection; `None` when the VM serves no longer. An app that refuses may have crashed, and
/// its agent then starts it again: nothing was sent, so it is tried again for a while.
async fn open(
    gateway: &Gateway,
    in_flight: &InFlight,
    deadline: Instant,
) -> Result<Option<Upstream>, Trouble> {
    let incarnation = in_flight.incarnation();
    let mut pause = REFUSED_PAUSE_MIN;
    for refused in 1_u32.. {
        let error = match connect(gateway, in_flight, deadline).await? {
            Connected::Open(upstream) => return Ok(Some(upstream)),
            Connected::Gone => return Ok(None),
            Connected::Refused(error) => error,
        };
        Span::current().record("refused", refused);
        let patience = incarnation.refused() + gateway.limits.refused_patience;
        let again = Instant::now() + pause;
        if again > patience.min(deadline) {
            let vm = incarnation.vm();
            let error: &dyn std::error::Error = &error;
            tracing::info!(%vm, refused, error, "no connection to an app");
            break;
        }
        tokio::select! {
            () = tokio::time::sleep_until(again) => {}
            () = incarnation.gone() => return Ok(None),
        }
        if incarnation.is_retired() {
            return Ok(None);
        }
        pause = (pause * 2).min(REFUSED_PAUSE_MAX);
    }
    Err(Trouble::ConnectFailed)
}

async fn connect(
    gateway: &Gateway,
    in_flight: &InFlight,
    deadline: Instant,
) -> Result<Connected, Trouble> {
    let incarnation = in_flight.incarnation();
    let connecting = gateway.feed.connect(incarnation.vm());
    let connected = tokio::select! {
        connected = tokio::time::timeout_at(deadline, connecting) => connected,
        () = incarnation.gone() => return Ok(Connected::Gone),
    };
    match connected {
        Ok(Ok(stream)) => match incarnation.adopt(stream).await {
            Some(Ok(upstream)) => Ok(Connected::Open(upstream)),
            Some(Err(error)) => Err(failed(in_flight, &error)),
            None => Ok(Connected::Gone),
        },
        Ok(Err(ConnectError::Gone)) => Ok(Connected::Gone),
        Ok(Err(error)) => Ok(Connected::Refused(error)),
        Err(_elapsed) => Err(Trouble::ConnectSlow),
    }
}

/// An answer's head has come.
struct Exchange {
    response: Response<Incoming>,
    upstream: Upstream,
    in_flight: InFlight,
    turn: Turn,
    progress: Option<Arc<BodyProgress>>,
    upgrade: Option<OnUpgrade>,
}

fn answer(gateway: &Gateway, mut exchange: Exchange) -> Result<Response<AnswerBody>, Trouble> {
    if exchange.response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(client_side) = exchange.upgrade.take() else {
            return Err(Trouble::AppBroke);
        };
        let app_side = hyper::upgrade::on(&mut exchange.response);
        exchange.turn.client().upgrade(Relay {
            client_side,
            app_side,
            upstream: exchange.upstream,
            in_flight: exchange.in_flight,
        });
        return Ok(exchange.response.map(|_| AnswerBody::Page(None)));
    }
    header::settle_answer(exchange.response.headers_mut())?;
    let sent = exchange.progress.is_none_or(|progress| progress.is_ended());
    let transport = if sent {
        Transport::Here(exchange.upstream)
    } else {
        Transport::Task(exchange.upstream.detach())
    };
    let hold = Hold {
        transport,
        in_flight: exchange.in_flight,
        _turn: exchange.turn,
        limits: Arc::clone(&gateway.limits),
    };
    Ok(exchange
        .response
        .map(|incoming| AnswerBody::App(AppBody::new(incoming, hold))))
}

impl From<Refused> for Trouble {
    fn from(why: Refused) -> Self {
        match why {
            Refused::QueueFull => Self::QueueFull,
            Refused::AppFull => Self::AppFull,
            Refused::Unrouted => Self::HostUnknown,
            Refused::WakeFailed(failure) => Self::WakeFailed(failure),
        }
    }
}
