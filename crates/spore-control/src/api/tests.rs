//! The contract, called as a client calls it.
#![expect(
    clippy::too_many_lines,
    reason = "a story or a table of calls reads better whole"
)]

use core::time::Duration;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use spore_api::limits::IDEMPOTENCY_S;
use spore_wire::gateway::FromGateway;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tower::ServiceExt as _;

use super::{Caller, CallerBy};
use crate::clock::{HostClock, KernelChance};
use crate::fake::{Act, FakeDoor, FakeNodes, MoodyStore, TOKEN, config};
use crate::secrets::KeyFile;
use crate::store::embedded::EmbeddedStore;
use crate::store::memory::MemoryStore;
use crate::store::record::account::{TokenRecord, token_key};
use crate::store::record::app::{AppRecord, app_key};
use crate::store::record::idempotency::{IdempotencyRecord, idempotency_key};
use crate::store::record::image::{ImageOrigin, ImageRecord, image_key};
use crate::store::record::{encode, load};
use crate::store::{SharedStore, Transaction, every};
use crate::{Control, Parts};

pub(super) const YOUR_TOKEN: &str = "test-token-of-you";

pub(super) struct Bench {
    pub(super) control: Control,
    pub(super) nodes: FakeNodes,
    pub(super) router: Router,
    pub(super) store: SharedStore,
    folder: tempfile::TempDir,
}

/// Makes a good body bad.
type Spoil = fn(&mut Value);

pub(super) struct Answer {
    pub(super) status: StatusCode,
    headers: http::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error}: {}", String::from_utf8_lossy(&self.body));
        })
    }

    pub(super) fn code(&self) -> String {
        let json = self.json();
        for field in ["message", "blame", "retry", "request_id"] {
            assert!(
                json[field].as_str().is_some_and(|text| !text.is_empty()),
                "{field}: {json}"
            );
        }
        assert_eq!(
            json["request_id"],
            self.headers["x-request-id"].to_str().unwrap()
        );
        json["code"].as_str().unwrap().to_owned()
    }
}

impl Bench {
    pub(super) async fn new() -> Self {
        Self::over(Arc::new(MemoryStore::default())).await
    }

    pub(super) async fn over(store: SharedStore) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::begin(store, FakeNodes::new(), folder).await
    }

    /// The daemon ends, and another begins over the same store and node.
    pub(super) async fn again(self) -> Self {
        self.control.stop().await;
        Self::begin(self.store, self.nodes, self.folder).await
    }

    async fn begin(store: SharedStore, nodes: FakeNodes, folder: tempfile::TempDir) -> Self {
        let path = folder.path().join("key");
        let keys = KeyFile::open_or_make(&path, &*store).await.unwrap();
        let door = FakeDoor::default();
        let parts = Parts {
            store: Arc::clone(&store),
            nodes: Arc::new(nodes.clone()),
            door: Arc::new(door.clone()),
            keys: Arc::new(keys),
            clock: Arc::new(HostClock),
            chance: Arc::new(KernelChance),
        };
        let control = Control::start(config(), parts).await.unwrap();
        door.attach(control.converge());
        let you = "you".parse().unwrap();
        let token = TokenRecord {
            account: you,
            created_at_ms: 0,
        };
        let image = ImageRecord {
            id: spore_wire::id::ImageId::from_hash([1; 32]),
            bytes: 10,
            created_at_ms: 0,
            origin: ImageOrigin::Base,
        };
        let me = "me".parse().unwrap();
        let image_at = image_key(&me, &"debian/python3".parse().unwrap());
        let write = Transaction::default()
            .put(token_key(YOUR_TOKEN), encode(&token))
            .put(image_at, encode(&image));
        store.commit(write).await.unwrap();
        let router = control.router();
        Self {
            control,
            nodes,
            router,
            store,
            folder,
        }
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap().to_vec();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    pub(super) async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        self.send(request(method, path, body)).await
    }

    pub(super) async fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let answer = self.call(method, path, body).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(
            answer.status.is_success(),
            "{method} {path}: {} {text}",
            answer.status
        );
        if answer.body.is_empty() {
            Value::Null
        } else {
            answer.json()
        }
    }

    /// Deploys and waits for the end; answers the operation.
    pub(super) async fn deploy(&self, app: &str, change: impl FnOnce(&mut Value)) -> Value {
        let mut body = spec();
        change(&mut body);
        let path = format!("/api/v1/apps/{app}/releases");
        let operation = self.ok("POST", &path, Some(body)).await;
        self.until_over(&operation).await
    }

    async fn until_over(&self, operation: &Value) -> Value {
        let id = operation["id"].as_str().unwrap();
        let mut operation = operation.clone();
        while operation["state"] == "running" {
            let after = &operation["revision"];
            let path = format!("/api/v1/operations/{id}?wait_ms=30000&after={after}");
            operation = self.ok("GET", &path, None).await;
        }
        operation
    }
}

fn spec() -> Value {
    json!({"spec": {"image": "debian/python3", "command": ["python3", "app.py"], "port": 8000}})
}

pub(super) fn request(method: &str, path: &str, body: Option<Value>) -> Request<Body> {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("host", "127.0.0.1:8889")
        .header("authorization", format!("Bearer {TOKEN}"));
    match body {
        None => request.body(Body::empty()).unwrap(),
        Some(body) => {
            let body = body.to_string();
            let request = request.header("content-length", body.len());
            let request = request.header("content-type", "application/json");
            request.body(Body::from(body)).unwrap()
        }
    }
}

pub(super) fn with(mut request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

#[tokio::test(start_paused = true)]
async fn a_deploy_goes_on_when_its_caller_leaves() {
    let bench = Bench::new().await;
    let deploy = bench.call("POST", "/api/v1/apps/notes/releases", Some(spec()));
    let left = tokio::time::timeout(Duration::ZERO, deploy).await;
    assert!(
        left.is_err(),
        "the call was over before anybody could leave"
    );
    for _wait in 0..600 {
        let answer = bench.call("GET", "/api/v1/apps/notes", None).await;
        if answer.status.is_success() && answer.json()["release"] == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the release was never tried");
}

#[tokio::test(start_paused = true)]
async fn an_app_lives_and_dies_through_the_api() {
    let bench = Bench::new().await;
    let done = bench.deploy("notes", |_| {}).await;
    assert_eq!(
        (&done["state"], &done["result"]),
        (&json!("succeeded"), &json!("1")),
        "{done}"
    );
    let app = bench.ok("GET", "/api/v1/apps/notes", None).await;
    assert_eq!(app["state"], "awake");
    assert_eq!(app["url"], "http://notes.localhost:8080/");
    assert_eq!(app["vm"]["boundary"], "none");
    assert_eq!(app["vm"]["template"], "booting");
    assert_eq!(app["vm"]["phases"][0], json!({"name": "boot", "ms": 2.0}));
    let asleep = bench.ok("POST", "/api/v1/apps/notes/stop", None).await;
    assert_eq!(asleep["state"], "asleep");
    assert!(bench.nodes.running().is_empty());
    let first = bench.ok("POST", "/api/v1/apps/notes/wake", None).await;
    assert_eq!(first["state"], "awake");
    let second = bench.ok("POST", "/api/v1/apps/notes/restart", None).await;
    assert_ne!(first["vm"]["id"], second["vm"]["id"]);
    assert_eq!(
        bench.ok("POST", "/api/v1/apps/notes/disable", None).await["state"],
        "disabled"
    );
    let refused = bench.call("POST", "/api/v1/apps/notes/wake", None).await;
    assert_eq!(
        (refused.status.as_u16(), refused.code().as_str()),
        (409, "app_disabled")
    );
    assert_eq!(
        bench.ok("POST", "/api/v1/apps/notes/enable", None).await["state"],
        "asleep"
    );

    bench.nodes.act("notes", 2, Act::Crash);
    let failed = bench.deploy("notes", |_| {}).await;
    assert_eq!(failed["error"]["code"], "app_failed", "{failed}");
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(message.contains("KeyError"), "{message}");
    bench.deploy("notes", |_| {}).await;
    let back = bench.ok("POST", "/api/v1/apps/notes/rollback", None).await;
    assert_eq!(bench.until_over(&back).await["result"], "1");
    let releases = bench
        .ok("GET", "/api/v1/apps/notes/releases?limit=2", None)
        .await;
    let numbers = |page: &Value| -> Vec<u64> {
        let items = page["items"].as_array().unwrap();
        items
            .iter()
            .map(|release| release["number"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(numbers(&releases), [3, 2]);
    let next = releases["next"].as_str().unwrap();
    let path = format!("/api/v1/apps/notes/releases?limit=2&cursor={next}");
    let rest = bench.ok("GET", &path, None).await;
    assert_eq!((numbers(&rest), &rest["next"]), (vec![1], &Value::Null));

    bench.ok("DELETE", "/api/v1/apps/notes", None).await;
    assert!(bench.nodes.running().is_empty());
    assert_eq!(
        bench.call("GET", "/api/v1/apps/notes", None).await.code(),
        "not_found"
    );
    bench.control.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_web_page_cannot_drive_the_api() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let get = || request("GET", "/api/v1/apps", None);
    for host in [
        "evil.example",
        "evil.example:8889",
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost",
        "localhost:8889.evil.example",
        "127.0.0.1.evil.example:8889",
        "notes.localhost:8889",
        "[::1]",
        "0.0.0.0:8889",
        "",
    ] {
        let answer = bench.send(with(get(), "host", host)).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (403, "forbidden"),
            "{host}"
        );
        let health = with(request("GET", "/healthz", None), "host", host);
        assert_eq!(bench.send(health).await.status, 403, "{host}");
    }
    for host in [
        "127.0.0.1:8889",
        "localhost:8889",
        "LOCALHOST:8889",
        "[::1]:8889",
    ] {
        assert_eq!(
            bench.send(with(get(), "host", host)).await.status,
            200,
            "{host}"
        );
    }
    let mut twice = get();
    twice
        .headers_mut()
        .append("host", "evil.example".parse().unwrap());
    assert_eq!(bench.send(twice).await.status, 403);
    let mut none = get();
    none.headers_mut().remove("host");
    assert_eq!(bench.send(none).await.status, 403);
    for origin in [
        "null",
        "http://evil.example",
        "http://notes.localhost:8080",
        "https://127.0.0.1:8889",
        "http://127.0.0.1:8080",
        "http://localhost",
    ] {
        let answer = bench.send(with(get(), "origin", origin)).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (403, "forbidden")
        );
        assert!(!answer.headers.contains_key("access-control-allow-origin"));
    }
    let own = with(get(), "origin", "http://127.0.0.1:8889");
    assert_eq!(bench.send(own).await.status, 200);
    let preflight = with(
        request("OPTIONS", "/api/v1/apps", None),
        "origin",
        "http://evil.example",
    );
    assert_eq!(bench.send(preflight).await.status, 403);

    // What a form can send, with and without fields, on every route that changes something.
    for kind in [
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/plain; charset=application/json",
        "application/jsonx",
    ] {
        for (method, path) in [
            ("POST", "/api/v1/apps/notes/stop"),
            ("POST", "/api/v1/apps/notes/releases"),
            ("PUT", "/api/v1/apps/notes/secrets/KEY"),
            ("DELETE", "/api/v1/apps/notes"),
            ("POST", "/api/v1/sources"),
            ("PUT", "/api/v1/apps/notes/files?path=/x"),
            ("POST", "/api/v1/images/gc"),
        ] {
            let answer = bench
                .send(with(request(method, path, None), "content-type", kind))
                .await;
            let text = (answer.status.as_u16(), answer.code());
            assert_eq!(
                text,
                (415, "unsupported_media_type".to_owned()),
                "{kind} {path}"
            );
        }
    }
    let mut untyped = request("POST", "/api/v1/apps/notes/releases", Some(spec()));
    untyped.headers_mut().remove("content-type");
    assert_eq!(bench.send(untyped).await.status, 415);
    assert_eq!(bench.nodes.running().len(), 1, "nothing was stopped");
}

#[tokio::test(start_paused = true)]
async fn every_route_but_health_needs_a_token_and_sees_one_account() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let paths = [
        "/api/v1/status",
        "/api/v1/apps",
        "/api/v1/nothing",
        "/metrics",
        "/version",
        "/",
    ];
    for path in paths {
        for value in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic dGVzdA==",
            "Bearer test-token-of-me2",
            "Bearer test-token-of-m",
        ] {
            let answer = bench
                .send(with(request("GET", path, None), "authorization", value))
                .await;
            assert_eq!(
                (answer.status.as_u16(), answer.code().as_str()),
                (401, "unauthorized")
            );
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
    let mut health = request("GET", "/healthz", None);
    health.headers_mut().remove("authorization");
    assert_eq!(bench.send(health).await.body, b"ok\n");

    let yours = format!("Bearer {YOUR_TOKEN}");
    let mine = bench.deploy("mine", |_| {}).await;
    let operation = format!("/api/v1/operations/{}", mine["id"].as_str().unwrap());
    for (method, path) in [
        ("GET", "/api/v1/apps/notes"),
        ("DELETE", "/api/v1/apps/notes"),
        ("POST", "/api/v1/apps/notes/stop"),
        ("POST", "/api/v1/apps/notes/wake"),
        ("POST", "/api/v1/apps/notes/rollback"),
        ("GET", "/api/v1/apps/notes/releases"),
        ("GET", "/api/v1/apps/notes/secrets"),
        ("GET", "/api/v1/apps/notes/logs"),
        ("GET", "/api/v1/apps/notes/files?path=/x"),
        ("PUT", "/api/v1/apps/notes/files?path=/x"),
        ("DELETE", "/api/v1/images/debian/python3"),
        ("GET", operation.as_str()),
    ] {
        let answer = bench
            .send(with(request(method, path, None), "authorization", &yours))
            .await;
        let found = (answer.status.as_u16(), answer.code());
        assert_eq!(found, (404, "not_found".to_owned()), "{method} {path}");
    }
    let apps = with(
        request("GET", "/api/v1/apps", None),
        "authorization",
        &yours,
    );
    assert_eq!(bench.send(apps).await.json()["items"], json!([]));
    let image = with(
        request("POST", "/api/v1/apps/x/releases", Some(spec())),
        "authorization",
        &yours,
    );
    assert_eq!(
        bench.send(image).await.code(),
        "invalid",
        "another account's image"
    );

    let mut by_socket = request("GET", "/api/v1/apps", None);
    by_socket.headers_mut().clear();
    let account = "me".parse().unwrap();
    let by = CallerBy::Socket { uid: 0 };
    by_socket.extensions_mut().insert(Caller { account, by });
    assert_eq!(bench.send(by_socket).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn bad_input_is_refused_with_the_field_and_what_would_be_right() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let releases = "/api/v1/apps/notes/releases";
    let bodies: &[(Spoil, u16, &str, &str)] = &[
        (
            |b| b["spec"]["port"] = json!(0),
            422,
            "invalid",
            "1 to 65535",
        ),
        (
            |b| b["spec"]["port"] = json!(70000),
            422,
            "invalid",
            "`spec.port`",
        ),
        (
            |b| b["spec"]["port"] = json!("80"),
            422,
            "invalid",
            "`spec.port`",
        ),
        (
            |b| b["spec"]["command"] = json!([]),
            422,
            "invalid",
            "`spec.command`",
        ),
        (
            |b| b["spec"]["image"] = json!("Debian"),
            422,
            "invalid",
            "`spec.image`",
        ),
        (
            |b| b["spec"]["image"] = json!("debian/none"),
            422,
            "invalid",
            "spore image",
        ),
        (
            |b| b["spec"]["protocol"] = json!("h2c"),
            422,
            "invalid",
            "`spec.protocol`",
        ),
        (
            |b| b["spec"]["resources"] = json!({"cpu": 1}),
            422,
            "invalid",
            "`spec.resources.cpu`",
        ),
        (
            |b| b["spec"]["egress"] = json!(["*.a.b:443"]),
            422,
            "not_in_this_version",
            "egress[0]",
        ),
        (
            |b| b["spec"]["secrets"] = json!({"names": ["MISSING"]}),
            422,
            "invalid",
            "secret set",
        ),
        (
            |b| b["spec"]["secrets"] = json!({"names": ["PORT"]}),
            422,
            "invalid",
            "names[0]",
        ),
        (
            |b| b["source"] = json!("../../etc"),
            422,
            "invalid",
            "`source`",
        ),
        (
            |b| b["source"] = json!("ab".repeat(32)),
            422,
            "invalid",
            "upload it again",
        ),
        (|b| b["extra"] = json!(1), 422, "invalid", "`extra`"),
        (
            |b| drop(b.as_object_mut().unwrap().remove("spec")),
            422,
            "invalid",
            "spec",
        ),
        (|b| *b = json!([]), 422, "invalid", "CreateRelease"),
    ];
    for (change, status, code, says) in bodies {
        let mut body = spec();
        change(&mut body);
        let answer = bench.call("POST", releases, Some(body.clone())).await;
        let message = answer.json()["message"].to_string();
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (*status, *code),
            "{body}"
        );
        assert!(message.contains(says), "{message}: {says}");
    }
    let long = format!("/api/v1/apps/{}", "a".repeat(41));
    let calls: &[(&str, &str, u16, &str)] = &[
        ("GET", "/api/v1/apps/No_Name", 422, "invalid"),
        ("GET", &long, 422, "invalid"),
        ("GET", "/api/v1/apps/%2e%2e%2fx", 422, "invalid"),
        ("GET", "/api/v1/apps?limit=0", 422, "invalid"),
        ("GET", "/api/v1/apps?limit=x", 400, "bad_request"),
        ("GET", "/api/v1/apps?cursor=%25", 422, "invalid"),
        ("GET", "/api/v1/apps?page=2", 400, "bad_request"),
        ("GET", "/api/v1/apps/none", 404, "not_found"),
        ("POST", "/api/v1/apps/none/wake", 404, "not_found"),
        ("GET", "/api/v1/nothing", 404, "not_found"),
        ("PATCH", "/api/v1/apps/notes", 405, "method_not_allowed"),
        ("GET", "/api/v1/operations/../../x", 404, "not_found"),
        (
            "GET",
            "/api/v1/operations/none?wait_ms=60000",
            422,
            "invalid",
        ),
        ("DELETE", "/api/v1/images/none", 404, "not_found"),
        ("GET", "/api/v1/apps/notes/files?path=etc", 422, "invalid"),
        (
            "PUT",
            "/api/v1/apps/notes/files?path=/x&mode=999",
            422,
            "invalid",
        ),
        (
            "GET",
            "/api/v1/apps/notes/files?path=/none",
            404,
            "not_found",
        ),
        ("GET", "/api/v1/apps/notes/exec", 400, "bad_request"),
        (
            "GET",
            "/api/v1/apps/notes/logs?tail=1000000",
            422,
            "invalid",
        ),
        (
            "PUT",
            "/api/v1/apps/notes/secrets/LD_PRELOAD",
            400,
            "bad_request",
        ),
        ("POST", "/api/v1/sources?kind=zip", 400, "bad_request"),
    ];
    for (method, path, status, code) in calls {
        let answer = bench.call(method, path, None).await;
        let found = (answer.status.as_u16(), answer.code());
        assert_eq!(found, (*status, (*code).to_owned()), "{method} {path}");
    }
    let huge = json!({"spec": "x".repeat(2 * 1024 * 1024)});
    let answer = bench.call("POST", releases, Some(huge)).await;
    assert_eq!(
        (answer.status.as_u16(), answer.code().as_str()),
        (413, "too_large")
    );
    let mut broken = request("POST", releases, Some(spec()));
    *broken.body_mut() = Body::from("{\"spec\":");
    assert_eq!(bench.send(broken).await.code(), "bad_request");
}

#[tokio::test(start_paused = true)]
async fn a_create_with_a_key_is_made_once() {
    let bench = Bench::new().await;
    let with_key = |key: &str, body: Value| {
        let create = request("POST", "/api/v1/apps/notes/releases", Some(body));
        with(create, "idempotency-key", key)
    };
    let first = bench.send(with_key("one", spec())).await.json();
    let again = bench.send(with_key("one", spec())).await.json();
    assert_eq!(first["id"], again["id"]);
    bench.until_over(&first).await;
    let later = bench.send(with_key("one", spec())).await.json();
    assert_eq!(
        (&later["id"], &later["state"]),
        (&first["id"], &json!("succeeded"))
    );
    let mut other = spec();
    other["spec"]["port"] = json!(9000);
    let answer = bench.send(with_key("one", other.clone())).await;
    let found = (answer.status.as_u16(), answer.code());
    assert_eq!(found, (409, "idempotency_mismatch".to_owned()));
    let second = bench.send(with_key("two", other)).await.json();
    assert_eq!(bench.until_over(&second).await["result"], "2");
    let long = "k".repeat(129);
    assert_eq!(bench.send(with_key(&long, spec())).await.code(), "invalid");
    let many = (0..8).map(|_| bench.send(with_key("many", spec())));
    let ids: Vec<_> = futures_util::future::join_all(many).await;
    let ids: std::collections::BTreeSet<_> = ids
        .iter()
        .map(|answer| answer.json()["id"].to_string())
        .collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
}

#[tokio::test(start_paused = true)]
async fn a_key_counts_for_every_create_of_one_account_and_one_day() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    bench.deploy("notes", |_| {}).await;
    let from = json!({"kind": "packages", "packages": ["python3"]});
    let build = json!({"name": "mine/base", "from": from});
    let back = json!({"to": 1});
    for (path, key, body) in [
        ("/api/v1/images", "build", &build),
        ("/api/v1/apps/notes/rollback", "back", &back),
    ] {
        let create = || {
            with(
                request("POST", path, Some(body.clone())),
                "idempotency-key",
                key,
            )
        };
        let first = bench.send(create()).await.json();
        assert_eq!(
            bench.until_over(&first).await["state"],
            "succeeded",
            "{path}"
        );
        let again = bench.send(create()).await.json();
        let told = (&again["id"], &again["state"]);
        assert_eq!(told, (&first["id"], &json!("succeeded")), "{path}");
    }
    let path = "/api/v1/apps/notes/releases";
    let elsewhere = with(
        request("POST", path, Some(spec())),
        "idempotency-key",
        "back",
    );
    assert_eq!(bench.send(elsewhere).await.code(), "idempotency_mismatch");

    let me = "me".parse().unwrap();
    let at = idempotency_key(&me, "back");
    let stored = load::<IdempotencyRecord>(&*bench.store, &at).await.unwrap();
    let mut record = stored.unwrap().record;
    record.created_at_ms -= 1000 * i64::try_from(IDEMPOTENCY_S).unwrap() + 1000;
    let write = Transaction::default().put(at, encode(&record));
    bench.store.commit(write).await.unwrap();
    let a_day_later = with(
        request("POST", path, Some(spec())),
        "idempotency-key",
        "back",
    );
    let done = bench.send(a_day_later).await.json();
    assert_eq!(bench.until_over(&done).await["result"], "3");
}

#[tokio::test(start_paused = true)]
async fn an_operation_tells_its_steps_as_they_come() {
    let bench = Bench::new().await;
    bench.nodes.act("notes", 1, Act::Ready(20_000));
    let path = "/api/v1/apps/notes/releases";
    let operation = bench.ok("POST", path, Some(spec())).await;
    let id = operation["id"].as_str().unwrap();
    let (mut seen, mut revision) = (Vec::new(), 0);
    loop {
        let path = format!("/api/v1/operations/{id}?wait_ms=30000&after={revision}");
        let now = bench.ok("GET", &path, None).await;
        let newer = now["revision"].as_u64().unwrap();
        assert!(newer > revision, "an answer before there was news: {now}");
        revision = newer;
        let steps = now["steps"].as_array().unwrap().clone();
        if now["state"] != "running" {
            assert!(steps.iter().all(|step| step["ms"].is_u64()), "{now}");
            assert!(
                steps.iter().any(|step| step["ms"].as_u64() >= Some(20_000)),
                "{now}"
            );
            break;
        }
        if let Some(last) = steps.last() {
            assert_eq!(
                last["ms"],
                Value::Null,
                "a step under way took no time yet: {now}"
            );
            seen.push(last["text"].as_str().unwrap().to_owned());
        }
    }
    seen.dedup();
    assert!(seen.contains(&"Booting it".to_owned()), "{seen:?}");
    let path = format!("/api/v1/operations/{id}?wait_ms=30001");
    assert_eq!(bench.call("GET", &path, None).await.code(), "invalid");
}

/// The series of a page of metrics, without their values.
fn series(page: &str) -> std::collections::BTreeSet<&str> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| Some(line.rsplit_once(' ')?.0))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn metrics_tell_wakes_by_phase_requests_states_and_failures_and_no_names() {
    let bench = Bench::new().await;
    let page = async || String::from_utf8(bench.call("GET", "/metrics", None).await.body).unwrap();
    bench.deploy("notes", |_| {}).await;
    bench.nodes.act("notes", 2, Act::Crash);
    bench.deploy("notes", |_| {}).await;
    bench.nodes.act("none", 1, Act::NoRoom);
    bench.deploy("none", |_| {}).await;
    let counts = spore_wire::gateway::Counts {
        by_class: [1, 2, 30, 4, 5, 6],
        waited: 7,
        refused_full: 8,
        vm_died: 9,
    };
    for _report in 0..2 {
        let counts = counts.clone();
        bench.control.door_event(FromGateway::Counts(counts));
    }
    let told = page().await;
    for line in [
        "spore_wake_seconds_count{phase=\"boot\"} 1",
        "spore_wake_seconds_sum{phase=\"boot\"} 0.002",
        "spore_wake_seconds_count{phase=\"app\"} 1",
        "spore_wake_seconds_sum{phase=\"total\"} 0.0025",
        "spore_wake_seconds_bucket{le=\"0.005\",phase=\"total\"} 1",
        "spore_requests_total{class=\"none\"} 2",
        "spore_requests_total{class=\"2xx\"} 60",
        "spore_requests_total{class=\"5xx\"} 12",
        "spore_request_waits_total{outcome=\"waited\"} 14",
        "spore_request_waits_total{outcome=\"refused_full\"} 16",
        "spore_request_waits_total{outcome=\"vm_died\"} 18",
        "spore_apps{state=\"awake\"} 1",
        "spore_apps{state=\"new\"} 1",
        "spore_apps{state=\"asleep\"} 0",
        "spore_apps{state=\"waking\"} 0",
        "spore_apps{state=\"draining\"} 0",
        "spore_apps{state=\"disabled\"} 0",
        "spore_apps{state=\"failing\"} 0",
        "spore_failures_total{code=\"app_failed\"} 1",
        "spore_failures_total{code=\"vm_failed\"} 1",
        "spore_failures_total{code=\"no_capacity\"} 1",
        "spore_api_calls_total{class=\"2xx\"}",
    ] {
        let found = told.lines().any(|found| found.starts_with(line));
        assert!(found, "{line}: {told}");
    }
    for n in 0..20 {
        bench.deploy(&format!("many-{n}"), |_| {}).await;
    }
    bench.ok("POST", "/api/v1/apps/notes/stop", None).await;
    let more = page().await;
    assert_eq!(series(&more), series(&told), "labels are of fixed sets");
    assert!(more.contains("spore_apps{state=\"awake\"} 20"), "{more}");
    assert!(!more.contains("notes") && !more.contains("many-"), "{more}");
    let yours = with(
        request("GET", "/metrics", None),
        "authorization",
        &format!("Bearer {YOUR_TOKEN}"),
    );
    assert_eq!(bench.send(yours).await.code(), "forbidden");
}

#[tokio::test(start_paused = true)]
async fn a_thousand_apps_come_in_pages_each_once() {
    let bench = Bench::new().await;
    let me = "me".parse().unwrap();
    for n in 0..1000 {
        let key = app_key(&me, &format!("app-{n}").parse().unwrap());
        let write = Transaction::default().put(key, encode(&AppRecord::new(0)));
        bench.store.commit(write).await.unwrap();
    }
    let mut names = Vec::new();
    let mut path = "/api/v1/apps?limit=137".to_owned();
    loop {
        let page = bench.ok("GET", &path, None).await;
        let items = page["items"].as_array().unwrap();
        assert!(items.len() <= 137);
        names.extend(
            items
                .iter()
                .map(|app| app["name"].as_str().unwrap().to_owned()),
        );
        let Some(next) = page["next"].as_str() else {
            break;
        };
        path = format!("/api/v1/apps?limit=137&cursor={next}");
    }
    assert_eq!(names.len(), 1000);
    assert!(names.is_sorted_by(|a, b| a < b));
}

#[tokio::test]
async fn a_secret_is_in_no_answer_no_record_and_no_file_and_reaches_only_the_vm() {
    const CANARY: &str = "canary-5e1f0c2b";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let bench = Bench::over(Arc::new(EmbeddedStore::open(&path).await.unwrap())).await;
    let mut answers = String::new();
    let at = "/api/v1/apps/notes/secrets/KEY";
    for (method, path, body) in [
        ("PUT", at, json!({"value": CANARY})),
        ("PUT", at, json!({"value": CANARY, "more": 1})),
        ("PUT", at, json!({"valeu": CANARY})),
        ("PUT", at, json!(CANARY)),
        ("PUT", at, json!([CANARY])),
        (
            "PUT",
            "/api/v1/apps/notes/secrets/NUL",
            json!({"value": format!("{CANARY}\0")}),
        ),
        (
            "PUT",
            "/api/v1/apps/notes/secrets/BIG",
            json!({"value": CANARY.repeat(10_000)}),
        ),
    ] {
        let answer = bench.call(method, path, Some(body)).await;
        answers.push_str(&String::from_utf8_lossy(&answer.body));
    }
    let done = bench.deploy("notes", |body| {
        body["spec"]["secrets"] = json!({"names": ["KEY"], "files": ["KEY"]});
    });
    answers.push_str(&done.await.to_string());
    for path in [
        "/api/v1/apps/notes/secrets",
        "/api/v1/apps/notes",
        "/api/v1/apps/notes/releases",
        "/api/v1/status",
        "/metrics",
    ] {
        let answer = bench.call("GET", path, None).await;
        answers.push_str(&String::from_utf8_lossy(&answer.body));
    }
    assert!(answers.contains("\"used\":true"), "{answers}");
    assert!(!answers.contains(CANARY), "{answers}");
    {
        let state = bench.nodes.state.lock().unwrap();
        let process = state.starts.last().unwrap().process.as_ref().unwrap();
        assert_eq!(process.secret_environment[0].1.expose(), CANARY.as_bytes());
        assert_eq!(process.secret_files[0].1.expose(), CANARY.as_bytes());
        assert!(!format!("{process:?}").contains(CANARY));
    }
    let holds = |file: &std::path::Path, needle: &[u8]| {
        let bytes = std::fs::read(file).unwrap();
        bytes.windows(needle.len()).any(|window| window == needle)
    };
    assert!(
        holds(&path, b"secret/me/notes/KEY"),
        "the search finds what is there in clear"
    );
    let base64 = data_encoding::BASE64.encode(CANARY.as_bytes());
    for file in [path, bench.folder.path().join("key")] {
        assert!(!holds(&file, CANARY.as_bytes()) && !holds(&file, &base64.as_bytes()[..16]));
    }
    bench.ok("DELETE", at, None).await;
    let list = bench.ok("GET", "/api/v1/apps/notes/secrets", None).await;
    assert_eq!(list["items"], json!([]));
    let woken = bench.call("POST", "/api/v1/apps/notes/restart", None).await;
    assert!(
        woken.json()["message"]
            .as_str()
            .unwrap()
            .contains("spore secret set notes KEY")
    );
}

#[tokio::test(start_paused = true)]
async fn the_secrets_of_an_app_fit_one_message_together() {
    let bench = Bench::new().await;
    let set = async |name: &str, bytes: usize| {
        let path = format!("/api/v1/apps/notes/secrets/{name}");
        let value = "s".repeat(bytes);
        bench
            .call("PUT", &path, Some(json!({"value": value})))
            .await
    };
    for name in ["A", "B", "C", "D"] {
        assert_eq!(set(name, 65_536).await.status, 200);
    }
    let over = set("E", 1).await;
    assert_eq!(over.code(), "invalid");
    let message = over.json()["message"].as_str().unwrap().to_owned();
    for figure in ["1 bytes long", "262145 bytes", "262144"] {
        assert!(message.contains(figure), "{figure}: {message}");
    }
    assert_eq!(set("A", 65_536).await.status, 200, "it may be replaced");
    assert_eq!(set("A", 65_000).await.status, 200);
    assert_eq!(set("E", 536).await.status, 200);
    let done = bench.deploy("notes", |body| {
        let all = json!(["A", "B", "C", "D", "E"]);
        body["spec"]["secrets"] = json!({"names": all, "files": all});
        let part = "\u{1}".repeat(9_000);
        body["spec"]["environment"] =
            json!([["A1", part], ["A2", part], ["A3", part], ["A4", part]]);
    });
    assert_eq!(done.await["state"], "succeeded");
    let told = {
        let state = bench.nodes.state.lock().unwrap();
        let process = state.starts.last().unwrap().process.as_ref().unwrap();
        let environment = serde_json::to_vec(&(&process.command, &process.environment));
        let secrets = (&process.secret_environment, &process.secret_files);
        environment.unwrap().len() + serde_json::to_vec(&secrets).unwrap().len()
    };
    assert!(told < spore_wire::frame::MESSAGE_BYTES_MAX, "{told}");

    let mut body = spec();
    let part = "x".repeat(30_000);
    body["spec"]["command"] = json!(vec![part; 9]);
    let path = "/api/v1/apps/notes/releases";
    let answer = bench.call("POST", path, Some(body)).await;
    assert_eq!(answer.code(), "invalid");
    let message = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("270033 bytes") && message.contains("262144"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_is_set_while_its_app_is_removed_is_no_orphan() {
    let store = MoodyStore::new();
    let bench = Bench::over(store.clone()).await;
    bench.deploy("notes", |_| {}).await;
    store.holds_removals.send_replace(true);
    let remove = bench
        .router
        .clone()
        .oneshot(request("DELETE", "/api/v1/apps/notes", None));
    let remove = tokio::spawn(remove);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let at = "/api/v1/apps/notes/secrets/KEY";
    bench.ok("PUT", at, Some(json!({"value": "x"}))).await;
    store.holds_removals.send_replace(false);
    assert_eq!(remove.await.unwrap().unwrap().status(), 204);
    let left = every(&*bench.store, "").await.unwrap();
    let of_app = |key: &&str| key.split('/').nth(2) == Some("notes");
    let left: Vec<_> = left.iter().map(|e| e.key.as_str()).filter(of_app).collect();
    assert_eq!(left, Vec::<&str>::new());
}

#[tokio::test(start_paused = true)]
async fn every_list_comes_in_pages_and_refuses_a_foreign_cursor() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    bench.deploy("notes", |_| {}).await;
    bench.deploy("other", |_| {}).await;
    for name in ["ONE", "TWO"] {
        let path = format!("/api/v1/apps/notes/secrets/{name}");
        bench.ok("PUT", &path, Some(json!({"value": "x"}))).await;
    }
    let me = "me".parse().unwrap();
    let second = image_key(&me, &"debian/second".parse().unwrap());
    let record = ImageRecord {
        id: spore_wire::id::ImageId::from_hash([2; 32]),
        bytes: 20,
        created_at_ms: 0,
        origin: ImageOrigin::Own,
    };
    let write = Transaction::default().put(second, encode(&record));
    bench.store.commit(write).await.unwrap();
    for path in [
        "/api/v1/apps",
        "/api/v1/images",
        "/api/v1/apps/notes/secrets",
        "/api/v1/apps/notes/releases",
    ] {
        let whole = bench.ok("GET", path, None).await;
        assert_eq!(whole["items"].as_array().unwrap().len(), 2, "{path}");
        assert_eq!(whole["next"], Value::Null, "{path}");
        let first = bench.ok("GET", &format!("{path}?limit=1"), None).await;
        let next = first["next"].as_str().unwrap();
        let rest = format!("{path}?limit=1&cursor={next}");
        let second = bench.ok("GET", &rest, None).await;
        assert_eq!(second["next"], Value::Null, "{path}");
        let both = [&first["items"][0], &second["items"][0]];
        assert_eq!(both, [&whole["items"][0], &whole["items"][1]], "{path}");
        for (bad, code) in [
            ("limit=0", "invalid"),
            ("limit=501", "invalid"),
            ("cursor=%25", "invalid"),
            ("cursor=AA", "invalid"),
            ("page=2", "bad_request"),
        ] {
            let answer = bench.call("GET", &format!("{path}?{bad}"), None).await;
            assert_eq!(answer.code(), code, "{path} {bad}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn uploads_files_logs_and_images_work() {
    let bench = Bench::new().await;
    let upload = |path: &str| {
        let mut upload = request("POST", path, None);
        *upload.body_mut() = Body::from("a folder as tar.zst");
        with(upload, "content-type", "application/zstd")
    };
    let source = bench.send(upload("/api/v1/sources")).await.json();
    let done = bench
        .deploy("notes", |body| body["source"] = source["id"].clone())
        .await;
    assert_eq!(done["state"], "succeeded");
    assert!(bench.nodes.state.lock().unwrap().starts[0].folder.is_some());
    let too_long = with(upload("/api/v1/sources"), "content-length", "600000000");
    assert_eq!(bench.send(too_long).await.code(), "too_large");

    bench.ok("POST", "/api/v1/apps/notes/stop", None).await;
    let mut put = request("PUT", "/api/v1/apps/notes/files?path=/app/x&mode=600", None);
    *put.body_mut() = Body::from("hello");
    let put = with(put, "content-type", "application/octet-stream");
    assert_eq!(bench.send(put).await.status, 204);
    let got = bench
        .call("GET", "/api/v1/apps/notes/files?path=/app/x", None)
        .await;
    assert_eq!(got.body, b"hello");
    assert_eq!(
        bench.nodes.running().len(),
        1,
        "a sleeping app is woken for a file"
    );

    let logs = bench
        .call("GET", "/api/v1/apps/notes/logs?tail=2", None)
        .await;
    assert_eq!(logs.headers["content-type"], "application/x-ndjson");
    let lines: Vec<Value> = String::from_utf8(logs.body)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (lines.len(), &lines[1]["text"]),
        (2, &json!("notes line 1"))
    );

    let build = |from: Value| Some(json!({"name": "mine/base", "from": from}));
    let from = json!({"kind": "packages", "packages": ["python3"]});
    let operation = bench.ok("POST", "/api/v1/images", build(from)).await;
    let built = bench.until_over(&operation).await;
    assert_eq!(built["state"], "succeeded", "{built}");
    assert_eq!(built["steps"][1]["text"], "Packing");
    let root = bench.send(upload("/api/v1/sources?kind=root")).await.json();
    let from = json!({"kind": "source", "source": root["id"]});
    let operation = bench.ok("POST", "/api/v1/images", build(from)).await;
    assert_eq!(bench.until_over(&operation).await["result"], root["id"]);
    let images = bench.ok("GET", "/api/v1/images", None).await;
    assert_eq!(images["items"][0]["used_by"], 1, "{images}");
    let bad = json!({"kind": "packages", "packages": ["-o"]});
    assert_eq!(
        bench
            .call("POST", "/api/v1/images", build(bad))
            .await
            .code(),
        "invalid"
    );
    let report = bench
        .ok("POST", "/api/v1/images/gc", Some(json!({"dry_run": true})))
        .await;
    assert_eq!(
        (&report["dry_run"], &report["bytes"]),
        (&json!(true), &json!(3))
    );
    let kept = bench.nodes.state.lock().unwrap().kept.clone().unwrap();
    assert_eq!(
        kept.len(),
        2,
        "the release's image, and the upload that it and the name use"
    );
    bench.ok("DELETE", "/api/v1/images/mine/base", None).await;
}

#[tokio::test]
async fn a_program_runs_beside_a_sleeping_app_over_a_websocket() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    bench.ok("POST", "/api/v1/apps/notes/stop", None).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(axum::serve(listener, bench.router.clone()).into_future());
    let connect = || async {
        let url = format!("ws://{address}/api/v1/apps/notes/exec");
        let mut request = url.into_client_request().unwrap();
        let headers = request.headers_mut();
        headers.insert("host", "127.0.0.1:8889".parse().unwrap());
        headers.insert("authorization", format!("Bearer {TOKEN}").parse().unwrap());
        headers.insert("sec-websocket-protocol", "spore.exec.v1".parse().unwrap());
        tokio_tungstenite::connect_async(request).await.unwrap()
    };
    let (mut socket, response) = connect().await;
    assert_eq!(
        response.headers()["sec-websocket-protocol"],
        "spore.exec.v1"
    );
    let start = json!({"argv": ["cat"], "pty": {"rows": 2, "columns": 3}}).to_string();
    socket.send(Message::text(start)).await.unwrap();
    socket
        .send(Message::binary(b"\x00hello".to_vec()))
        .await
        .unwrap();
    let resize = [b"\x04".as_slice(), br#"{"rows":5,"columns":6}"#].concat();
    socket.send(Message::binary(resize)).await.unwrap();
    socket
        .send(Message::binary(b"\x00".to_vec()))
        .await
        .unwrap();
    let mut told = Vec::new();
    while let Some(Ok(Message::Binary(bytes))) = socket.next().await {
        told.push(bytes.to_vec());
    }
    assert_eq!(told[0], b"\x01hello");
    assert!(told[1].starts_with(b"\x02Resize"), "{told:?}");
    assert_eq!(
        told[2],
        [b"\x03".as_slice(), br#"{"by":"code","code":3}"#].concat()
    );
    assert_eq!(bench.nodes.running().len(), 1);

    // A program that ends while its client still sends: the client hears of it all the same.
    let (mut socket, _) = connect().await;
    let start = Message::text(json!({"argv": ["cat"]}).to_string());
    socket.send(start).await.unwrap();
    socket.send(Message::binary(vec![0])).await.unwrap();
    for _piece in 0..256 {
        let piece = Message::binary(vec![0; 64 * 1024]);
        socket.send(piece).await.expect("it hung up on its client");
    }
    let exit = socket.next().await.unwrap().unwrap().into_data();
    assert_eq!(exit[0], 3, "{exit:?}");

    for (first, code) in [
        (json!({"argv": []}), "invalid"),
        (json!({"argv": ["missing"]}), "not_found"),
        (json!({"argv": ["cat"], "more": 1}), "bad_request"),
    ] {
        let (mut socket, _) = connect().await;
        socket.send(Message::text(first.to_string())).await.unwrap();
        let answer = socket.next().await.unwrap().unwrap().into_data();
        assert_eq!(answer[0], 6);
        let error: Value = serde_json::from_slice(&answer[1..]).unwrap();
        assert_eq!(error["code"], code, "{error}");
    }
    serving.abort();
    assert!(serving.await.is_err_and(|error| error.is_cancelled()));
}

#[tokio::test(start_paused = true)]
async fn what_waits_ends_when_control_stops() {
    let bench = Bench::new().await;
    bench.deploy("notes", |_| {}).await;
    let follow = request("GET", "/api/v1/apps/notes/logs?follow=true", None);
    let response = bench.router.clone().oneshot(follow).await.unwrap();
    let reading = tokio::spawn(to_bytes(response.into_body(), usize::MAX));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!reading.is_finished());
    bench.control.stop().await;
    let lines = reading.await.unwrap().unwrap();
    assert_eq!(lines.iter().filter(|b| **b == b'\n').count(), 3);
}
