//! An app: a small HTTP server on loopback whose paths do what stories need.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

pub(crate) struct App {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

struct State {
    tag: String,
    requests: Mutex<HashMap<String, usize>>,
    connections: Mutex<usize>,
    news: Notify,
    /// Lets `/sse` and `/slow` go on.
    go_on: Notify,
}

type AnyBody = http_body_util::combinators::UnsyncBoxBody<Bytes, hyper::Error>;

/// Frames as they are sent by a task.
struct Channel(mpsc::Receiver<Frame<Bytes>>);

impl Body for Channel {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl App {
    /// An app whose `/tag` answers `tag`.
    pub(crate) async fn start(tag: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            tag: tag.into(),
            requests: Mutex::default(),
            connections: Mutex::default(),
            news: Notify::new(),
            go_on: Notify::new(),
        });
        let task = tokio::spawn(serve(listener, Arc::clone(&state)));
        Self {
            address,
            state,
            task,
        }
    }

    pub(crate) fn requests(&self, path: &str) -> usize {
        let requests = self.state.requests.lock().unwrap();
        requests.get(path).copied().unwrap_or(0)
    }

    pub(crate) fn connections(&self) -> usize {
        *self.state.connections.lock().unwrap()
    }

    /// Ends when a path was asked for.
    pub(crate) async fn asked(&self, path: &str) {
        loop {
            let news = self.state.news.notified();
            if self.requests(path) > 0 {
                return;
            }
            news.await;
        }
    }

    pub(crate) fn go_on(&self) {
        self.state.go_on.notify_one();
    }
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        *state.connections.lock().unwrap() += 1;
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let service = service_fn(|request| {
                let state = Arc::clone(&state);
                async move { Ok::<_, Infallible>(handle(state, request).await) }
            });
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await
                .ok();
        });
    }
}

async fn handle(state: Arc<State>, mut request: Request<Incoming>) -> Response<AnyBody> {
    let path = request.uri().path().to_owned();
    *state
        .requests
        .lock()
        .unwrap()
        .entry(path.clone())
        .or_default() += 1;
    state.news.notify_waiters();
    let text = |text: String| Response::new(full(text));
    match path.as_str() {
        "/tag" => text(state.tag.clone()),
        "/head" => text(format!(
            "{} {}\n{:?}",
            request.method(),
            request.uri(),
            request.headers()
        )),
        "/echo" => Response::new(request.into_body().boxed_unsync()),
        "/sink" => {
            let mut received = 0;
            while let Some(frame) = request.body_mut().frame().await {
                received += frame.unwrap().data_ref().map_or(0, Bytes::len);
            }
            text(received.to_string())
        }
        "/trailers" => trailers(request).await,
        "/flood" => flood(),
        "/sse" => events(state),
        "/slow" => {
            state.go_on.notified().await;
            text(state.tag.clone())
        }
        "/hang" => std::future::pending().await,
        "/cookie" => Response::builder()
            .header("set-cookie", "a=1; Domain=localhost; Path=/")
            .header("set-cookie", "b=2; Domain=app.localhost")
            .header("keep-alive", "timeout=5")
            .body(full(String::new()))
            .unwrap(),
        "/nothing" => status(StatusCode::NO_CONTENT),
        "/same" => status(StatusCode::NOT_MODIFIED),
        "/upgrade" => upgrade(request),
        _ => status(StatusCode::NOT_FOUND),
    }
}

fn full(text: String) -> AnyBody {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn status(status: StatusCode) -> Response<AnyBody> {
    let mut response = Response::new(full(String::new()));
    *response.status_mut() = status;
    response
}

/// Endless bytes.
fn flood() -> Response<AnyBody> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let piece = Bytes::from(vec![b'x'; 64 * 1024]);
        while sender.send(Frame::data(piece.clone())).await.is_ok() {}
    });
    Response::new(Channel(receiver).boxed_unsync())
}

/// One event, then another once the story lets it go on.
fn events(state: Arc<State>) -> Response<AnyBody> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for event in ["data: 1\n\n", "data: 2\n\n"] {
            sender.send(Frame::data(event.into())).await.ok();
            state.go_on.notified().await;
        }
    });
    let mut response = Response::new(Channel(receiver).boxed_unsync());
    let kind = "text/event-stream".parse().unwrap();
    response.headers_mut().insert("content-type", kind);
    response
}

/// Answers with the trailer that the request had.
async fn trailers(request: Request<Incoming>) -> Response<AnyBody> {
    let collected = request.into_body().collect().await.unwrap();
    let given = collected.trailers().cloned().unwrap_or_default();
    let (sender, receiver) = mpsc::channel(2);
    sender.send(Frame::data("body".into())).await.unwrap();
    let mut back = HeaderMap::new();
    back.insert("x-sum", given.get("x-sum").unwrap().clone());
    let names: Vec<_> = given.keys().map(http::HeaderName::as_str).collect();
    back.insert("x-seen", names.join(" ").parse().unwrap());
    sender.send(Frame::trailers(back)).await.unwrap();
    let mut response = Response::new(Channel(receiver).boxed_unsync());
    let name = "x-sum, x-seen".parse().unwrap();
    response.headers_mut().insert("trailer", name);
    response
}

/// Echoes bytes once the protocol has changed.
fn upgrade(mut request: Request<Incoming>) -> Response<AnyBody> {
    let protocol = request.headers()["upgrade"].clone();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgraded.await.unwrap());
        let (mut read, mut write) = tokio::io::split(&mut stream);
        tokio::io::copy(&mut read, &mut write).await.ok();
        tokio::io::AsyncWriteExt::shutdown(&mut write).await.ok();
    });
    let mut response = status(StatusCode::SWITCHING_PROTOCOLS);
    response.headers_mut().insert("upgrade", protocol);
    let connection = "upgrade".parse().unwrap();
    response.headers_mut().insert("connection", connection);
    response
}
