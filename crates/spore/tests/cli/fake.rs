//! A daemon of canned answers, on a port and a thread of its own.
//!
//! It knows one awake app, `notes`, and one asleep, `sleepy`; an app called `broken` cannot be
//! deployed. It keeps what it was asked.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use spore_api::error::{ApiError, ErrorCode};
use spore_api::exec::{Channel, ExecExit, ExecStart, SUBPROTOCOL};

pub(crate) const TOKEN: &str = "t0ken";

/// What the daemon was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) line: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

#[derive(Clone, Debug, Default)]
struct Memory {
    asked: Arc<Mutex<Vec<Asked>>>,
    started: Arc<Mutex<Option<ExecStart>>>,
}

/// A running fake; it stops when it is dropped.
#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    memory: Memory,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        Self::listening(None)
    }

    /// Listens on a socket too.
    pub(crate) fn listening(socket: Option<&Path>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let memory = Memory::default();
        let router = router(memory.clone());
        let open = router.clone().layer(middleware::from_fn(need_token));
        let address = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(axum::serve(listener, open).into_future());
            if let Some(socket) = socket {
                let listener = tokio::net::UnixListener::bind(socket).unwrap();
                tokio::spawn(axum::serve(listener, router).into_future());
            }
            address
        });
        Self {
            address,
            memory,
            runtime: Some(runtime),
        }
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.memory.asked.lock().unwrap().clone()
    }

    /// The calls as lines, without those that only look.
    pub(crate) fn acts(&self) -> Vec<String> {
        let asked = self.asked().into_iter().map(|asked| asked.line);
        asked.filter(|line| !line.starts_with("GET ")).collect()
    }

    pub(crate) fn started(&self) -> ExecStart {
        self.memory.started.lock().unwrap().clone().unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

fn router(memory: Memory) -> Router {
    Router::new()
        .route("/api/v1/apps/{app}/exec", get(exec))
        .route("/api/v1/sandboxes/{sandbox}/exec", get(exec))
        .fallback(answer)
        .with_state(memory)
}

async fn need_token(request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get("authorization")
        .map(|value| value.as_bytes().to_vec());
    if given != Some(format!("Bearer {TOKEN}").into_bytes()) {
        return refuse(
            ErrorCode::Unauthorized,
            "the token is missing or wrong; set SPORE_TOKEN",
        );
    }
    next.run(request).await
}

fn refuse(code: ErrorCode, message: &str) -> Response {
    let mut error = ApiError::new(code, message);
    error.request_id = "r1".to_owned();
    json(code.status(), &serde_json::to_string(&error).unwrap())
}

fn json(status: u16, text: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    (
        status,
        [("content-type", "application/json")],
        text.to_owned(),
    )
        .into_response()
}

pub(crate) const NOTES: &str = r#"{"name":"notes","account":"me",
  "url":"http://notes.localhost:8080/","state":"awake","enabled":true,"release":2,
  "vm":{"id":"abcdefghijklmnopqrstuvwxyz","boundary":"none",
  "boundary_text":"none (qemu-tcg)","phases":[
    {"name":"prepare","ms":12.5},{"name":"boot","ms":1800.0},{"name":"app","ms":700.25}],
    "awake_for_ms":600000,"template":"booting"},
  "created_at":"2026-01-02T03:04:05.678Z"}"#;
const SLEEPY: &str = r#"{"name":"sleepy","account":"me","url":"http://sleepy.localhost:8080/",
  "state":"failing","enabled":true,
  "last_failure":"the app ended with code 1\u001b[2J","created_at":"2026-01-02T03:04:05Z"}"#;
const SPEC: &str = r#"{"image":"debian/python3","command":["python3","app.py"],"port":8000}"#;
const STATUS: &str = r#"{"version":"0.1.0","base":"localhost","gateway":"127.0.0.1:8080",
  "hypervisor":"qemu 7.2","boundary":"none","boundary_text":"none (qemu-tcg)",
  "kernel":"6.1.0-41-cloud-amd64","apps":2,"vms":1,"memory_mib_total":8192,
  "memory_mib_used":256,"templates":{"ready":1,"hits":41,"misses":2},
  "memories":{"hits":40,"misses":1,"evictions":0,"bytes":268435456,"held_bytes":0,
    "budget_bytes":1073741824},"uptime_ms":7260000,
  "warnings":["software emulation is not a security boundary"]}"#;
const LOGS: &str = concat!(
    r#"{"at":"2026-01-02T03:04:05.1Z","vm":"v","release":2,"from":"stdout","text":"listening"}"#,
    "\n",
    r#"{"at":"2026-01-02T03:04:06.2Z","vm":"v","release":3,"from":"stderr","text":"no module"}"#,
    "\n",
    r#"{"at":"2026-01-02T03:04:07.3Z","vm":"v","release":3,"from":"platform","text":"ended"}"#,
    "\n",
);

/// The id of the one sandbox.
pub(crate) const SANDBOX: &str = "abcdefghijklmnopqrstuvwx27";
pub(crate) const SNAPSHOT: &str = r#"{"id":"snapsnapsnapsnapsnapsnapaa","account":"me",
  "tags":["warm"],"kind":"checkpoint","taken_of":"notes",
  "resources":{"cpus":1,"memory_mib":256,"disk_mib":1024},
  "parent":"parentparentparentparentpa","depth":1,"children":[],"sandboxes":2,
  "bytes":3145728,"encrypted":false,"created_at":"2026-01-02T03:04:05Z"}"#;
const DAMAGED: &str = r#"{"id":"brokenbrokenbrokenbrokenaa","account":"me","tags":[],"depth":0,
  "children":[],"sandboxes":0,"bytes":4096,"encrypted":false,
  "damage":"memory chunk 17 is damaged"}"#;
const OPEN: &str = r#"{"id":"abcdefghijklmnopqrstuvwx27","account":"me","state":"open",
  "from":"warm","snapshot":"snapsnapsnapsnapsnapsnapaa","vm":"vmvmvmvmvmvmvmvmvmvmvmvmaa",
  "boundary":"none","boundary_text":"none (qemu-tcg)",
  "created_at":"2026-01-02T03:04:05Z"}"#;
const ENDED: &str = r#"{"id":"zbcdefghijklmnopqrstuvwx27","account":"me","state":"ended",
  "from":"notes","snapshot":"snapsnapsnapsnapsnapsnapaa","ended":"the VM died\u001b[2J",
  "created_at":"2026-01-02T03:04:05Z"}"#;

/// Everything about snapshots and sandboxes.
fn answer_sandboxes(method: &Method, parts: &[&str], body: &[u8]) -> Response {
    let list = |items: &[&str]| json(200, &format!(r#"{{"items":[{}]}}"#, items.join(",")));
    match (method.as_str(), parts) {
        ("GET", ["snapshots"]) => list(&[SNAPSHOT, DAMAGED]),
        ("GET" | "POST", ["snapshots", "warm"] | ["snapshots", "warm", "compact"]) => {
            json(200, SNAPSHOT)
        }
        ("DELETE", ["snapshots", "warm"]) => json(
            200,
            r#"{"removed":["childchildchildchildchildx","snapsnapsnapsnapsnapsnapaa"]}"#,
        ),
        ("POST", ["snapshots", "gc"]) => json(
            200,
            r#"{"removed":["brokenbrokenbrokenbrokenaa"],"bytes":4096,"dry_run":true}"#,
        ),
        ("POST", ["apps", "sleepy", "checkpoint"]) => refuse(
            ErrorCode::Conflict,
            "sleepy holds secrets: say `--allow-secrets`",
        ),
        ("POST", ["apps" | "sandboxes", _, "checkpoint"]) => json(
            200,
            &format!(r#"{{"snapshot":{SNAPSHOT},"pause_ms":2.5,"frozen_ms":9.04}}"#),
        ),
        ("POST", ["forks"]) => {
            let asked: serde_json::Value = serde_json::from_slice(body).unwrap();
            let mut error = ApiError::new(ErrorCode::NoCapacity, "the host has no memory left");
            error.request_id = "r1".to_owned();
            let error = serde_json::to_string(&error).unwrap();
            let forks: Vec<String> = (2..asked["count"].as_u64().unwrap() + 2)
                .map(|n| match asked["from"] == "full" && n > 2 {
                    true => format!(r#"{{"id":"{n}bcdefghijklmnopqrstuvwx27","error":{error}}}"#),
                    false => format!(r#"{{"id":"{SANDBOX}"}}"#),
                })
                .collect();
            json(200, &format!("[{}]", forks.join(",")))
        }
        ("GET", ["sandboxes"]) => list(&[OPEN, ENDED]),
        ("GET" | "POST", ["sandboxes", SANDBOX, ..]) => json(200, OPEN),
        ("DELETE", ["sandboxes", SANDBOX]) => StatusCode::NO_CONTENT.into_response(),
        (_, ["sandboxes", id]) => refuse(ErrorCode::NotFound, &format!("there is no sandbox {id}")),
        _ => refuse(ErrorCode::NotFound, "there is no such route"),
    }
}

fn operation(kind: &str, state: &str, rest: &str) -> String {
    format!(
        r#"{{"id":"{kind}-{state}","kind":"{kind}","target":"notes","state":"{state}","steps":[
        {{"text":"making the image","ms":350}},{{"text":"waiting for the app","ms":4200}}],
        "revision":4,"created_at":"2026-01-02T03:04:05Z"{rest}}}"#
    )
}

async fn answer(
    State(memory): State<Memory>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let body = match axum::body::to_bytes(body, 64 * 1024 * 1024).await {
        Ok(body) => body,
        Err(_cut) => return refuse(ErrorCode::BadRequest, "the body was cut off"),
    };
    let line = format!("{method} {uri}");
    memory.asked.lock().unwrap().push(Asked {
        line: line.clone(),
        headers,
        body: body.clone(),
    });
    let path = uri.path().strip_prefix("/api/v1/").unwrap_or_default();
    let parts: Vec<&str> = path.split('/').collect();
    match (method.as_str(), parts.as_slice()) {
        ("GET", ["status"]) => json(200, STATUS),
        ("GET", ["apps"]) => json(200, &format!(r#"{{"items":[{NOTES},{SLEEPY}]}}"#)),
        ("POST", ["sources"]) => json(201, r#"{"id":"s1","bytes":4096,"entries":3}"#),
        ("GET", ["images"]) => json(
            200,
            r#"{"items":[{"name":"debian/python3","id":"0123456789abcdef","bytes":121634816,
            "created_at":"2026-01-02T03:04:05Z","used_by":2}]}"#,
        ),
        ("POST", ["images"]) => json(
            202,
            &operation(
                "image_build",
                "succeeded",
                r#","result":"fedcba9876543210""#,
            ),
        ),
        ("POST", ["images", "gc"]) => json(
            200,
            r#"{"removed":["0123456789abcdef"],"bytes":1048576,"dry_run":true}"#,
        ),
        ("DELETE", ["images", _]) => StatusCode::NO_CONTENT.into_response(),
        ("GET", ["operations", _]) => {
            json(200, &operation("deploy", "succeeded", r#","result":"2""#))
        }
        (_, ["snapshots" | "sandboxes" | "forks", ..] | ["apps", _, "checkpoint"]) => {
            answer_sandboxes(&method, &parts, &body)
        }
        (_, ["apps", app, rest @ ..]) => answer_app(&method, app, rest),
        _ => refuse(ErrorCode::NotFound, "there is no such route"),
    }
}

fn answer_app(method: &Method, app: &str, rest: &[&str]) -> Response {
    let text = match app {
        "notes" | "broken" => NOTES,
        "sleepy" => SLEEPY,
        _ => return refuse(ErrorCode::NotFound, &format!("there is no app `{app}`")),
    };
    let done = StatusCode::NO_CONTENT.into_response();
    match (method.as_str(), rest) {
        ("POST", ["wake"]) if app == "sleepy" => refuse(
            ErrorCode::AppFailed,
            "the app ended with code 1 before it was ready",
        ),
        ("GET", []) | ("POST", ["wake" | "stop" | "enable" | "disable" | "restart"]) => {
            json(200, text)
        }
        ("DELETE", [] | ["secrets", _]) | ("PUT", ["secrets", _] | ["files"]) => done,
        ("GET", ["releases"]) => json(
            200,
            &format!(
                r#"{{"items":[
                {{"number":1,"state":"retired","spec":{SPEC},"created_at":"2026-01-01T00:00:00Z"}},
                {{"number":2,"state":"live","spec":{SPEC},"created_at":"2026-01-02T00:00:00Z"}},
                {{"number":3,"state":"failed","spec":{SPEC},"created_at":"2026-01-03T00:00:00Z"}}
                ]}}"#
            ),
        ),
        ("POST", ["releases"]) if app == "broken" => {
            let error = ApiError::new(ErrorCode::AppFailed, "the app ended with code 1");
            let error = serde_json::to_string(&error).unwrap();
            json(
                202,
                &operation("deploy", "failed", &format!(r#","error":{error}"#)),
            )
        }
        ("POST", ["releases"]) => json(202, &operation("deploy", "running", "")),
        ("POST", ["rollback"]) => {
            json(202, &operation("rollback", "succeeded", r#","result":"1""#))
        }
        ("GET", ["secrets"]) => json(
            200,
            r#"{"items":[{"name":"API_KEY","updated_at":"2026-01-02T03:04:05Z","used":true}]}"#,
        ),
        ("GET", ["logs"]) => ([("content-type", "application/x-ndjson")], LOGS).into_response(),
        ("GET", ["files"]) => {
            ([("content-type", "application/octet-stream")], "file\n").into_response()
        }
        _ => refuse(ErrorCode::NotFound, "there is no such route"),
    }
}

async fn exec(State(memory): State<Memory>, uri: Uri, upgrade: WebSocketUpgrade) -> Response {
    if uri.path().contains("/nosuch/") {
        return refuse(ErrorCode::NotFound, "there is no app `nosuch`");
    }
    upgrade
        .protocols([SUBPROTOCOL])
        .on_upgrade(async move |mut socket| {
            run(memory, &mut socket).await;
            // A connection that is closed with something unread takes back what was said last.
            socket.send(Message::Close(None)).await.ok();
            while let Some(Ok(_unread)) = socket.recv().await {}
        })
}

/// `cat` gives its input back, `exit N` ends with N, `die` by signal 9, `late` by its time,
/// `refuse` by an error, `wait` ends with the number of the first signal, anything else writes its
/// arguments.
async fn run(memory: Memory, socket: &mut WebSocket) {
    let Some(Ok(Message::Text(text))) = socket.recv().await else {
        return;
    };
    let start: ExecStart = serde_json::from_str(&text).unwrap();
    *memory.started.lock().unwrap() = Some(start.clone());
    let argv: Vec<&str> = start.argv.iter().map(String::as_str).collect();
    let exit = match argv.as_slice() {
        ["cat"] => {
            while let Some(Ok(message)) = socket.recv().await {
                let Message::Binary(bytes) = message else {
                    continue;
                };
                match (bytes[0], &bytes[1..]) {
                    (0, []) => break,
                    (0, rest) => send(socket, Channel::Stdout, rest).await,
                    _ => {}
                }
            }
            ExecExit::Code { code: 0 }
        }
        ["wait"] => {
            send(socket, Channel::Stdout, b"ready\n").await;
            loop {
                let Some(Ok(Message::Binary(bytes))) = socket.recv().await else {
                    return;
                };
                if bytes[0] == Channel::Signal as u8 {
                    let number: i32 = serde_json::from_slice(&bytes[1..]).unwrap();
                    break ExecExit::Signal { signal: number };
                }
            }
        }
        ["exit", code] => ExecExit::Code {
            code: code.parse().unwrap(),
        },
        ["die"] => ExecExit::Signal { signal: 9 },
        ["late"] => ExecExit::Timeout,
        ["refuse"] => {
            let error = ApiError::new(ErrorCode::AppFailed, "there is no program `refuse`");
            send(socket, Channel::Error, &serde_json::to_vec(&error).unwrap()).await;
            return;
        }
        ["vanish"] => return,
        other => {
            send(socket, Channel::Stdout, other.join(" ").as_bytes()).await;
            send(socket, Channel::Stderr, b"aside\n").await;
            ExecExit::Code { code: 0 }
        }
    };
    send(socket, Channel::Exit, &serde_json::to_vec(&exit).unwrap()).await;
}

async fn send(socket: &mut WebSocket, channel: Channel, bytes: &[u8]) {
    let message = [&[channel as u8], bytes].concat();
    // The client may be gone: then the test says so.
    socket.send(Message::Binary(message.into())).await.ok();
}
