//! The client against a server that answers what each test wrote down.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};

use super::{CallError, Client, SourceKind};
use crate::error::{ApiError, ErrorCode};
use crate::log::LogQuery;
use crate::operation::{Operation, OperationState};
use crate::release::{CreateRelease, ReleaseSpec};

const APP: &str = r#"{"name":"notes","account":"me","url":"http://notes.localhost:8080/",
    "state":"asleep","enabled":true,"created_at":"2026-01-01T00:00:00Z"}"#;

/// A server that gives each connection the next answer, and keeps what it was sent.
struct Canned {
    client: Client,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Canned {
    async fn new(answers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&heard);
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut bytes = Vec::new();
                while !is_whole(&bytes) {
                    let mut piece = [0; 4096];
                    let read = stream.read(&mut piece).await.unwrap();
                    assert_ne!(read, 0, "the client left early");
                    bytes.extend_from_slice(&piece[..read]);
                }
                kept.lock()
                    .unwrap()
                    .push(String::from_utf8_lossy(&bytes).into_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let client = Client::new(address.parse().unwrap()).with_token("t0ken");
        Self { client, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    if head.contains("transfer-encoding: chunked") {
        return body.ends_with("0\r\n\r\n");
    }
    let length = head
        .split("content-length: ")
        .nth(1)
        .map_or("0", |rest| rest.split("\r\n").next().unwrap());
    body.len() >= length.parse().unwrap()
}

fn answer(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn refusal(code: ErrorCode) -> String {
    answer(
        code.status(),
        &serde_json::to_string(&ApiError::new(code, "because")).unwrap(),
    )
}

fn operation(revision: u64, state: OperationState) -> Operation {
    Operation {
        id: "op1".into(),
        kind: "deploy".into(),
        target: "notes".into(),
        state,
        steps: Vec::new(),
        revision,
        error: None,
        result: None,
        created_at: String::new(),
    }
}

fn release() -> CreateRelease {
    CreateRelease {
        spec: ReleaseSpec {
            image: "debian/python3".parse().unwrap(),
            command: vec!["true".into()],
            port: 8000,
            resources: Default::default(),
            idle: Default::default(),
            warm: Default::default(),
            health: Default::default(),
            egress: Vec::new(),
            secrets: Default::default(),
            environment: Vec::new(),
        },
        source: None,
    }
}

#[tokio::test]
async fn a_call_carries_the_token_and_reads_the_answer() {
    let canned = Canned::new(vec![answer(200, APP)]).await;
    let app = canned.client.app(&"notes".parse().unwrap()).await.unwrap();
    assert_eq!(app.url, "http://notes.localhost:8080/");
    let heard = canned.heard().remove(0);
    assert!(
        heard.starts_with("GET /api/v1/apps/notes HTTP/1.1\r\n"),
        "{heard}"
    );
    assert!(heard.contains("authorization: Bearer t0ken\r\n"), "{heard}");
    assert!(!format!("{:?}", canned.client).contains("t0ken"));
}

#[tokio::test]
async fn a_safe_call_is_sent_again_when_the_server_says_later() {
    let canned = Canned::new(vec![refusal(ErrorCode::NoCapacity), answer(200, APP)]).await;
    canned.client.wake(&"notes".parse().unwrap()).await.unwrap();
    assert_eq!(canned.heard().len(), 2);
}

#[tokio::test]
async fn a_call_that_acts_anew_is_sent_once() {
    let canned = Canned::new(vec![refusal(ErrorCode::NoCapacity), answer(200, APP)]).await;
    let error = canned
        .client
        .restart(&"notes".parse().unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.api().unwrap().code, ErrorCode::NoCapacity);
    assert_eq!(canned.heard().len(), 1);
}

#[tokio::test]
async fn a_create_is_sent_again_under_the_same_key_after_a_broken_connection() {
    let created = serde_json::to_string(&operation(1, OperationState::Running)).unwrap();
    let canned = Canned::new(vec![String::new(), answer(202, &created)]).await;
    canned
        .client
        .create_release(&"notes".parse().unwrap(), &release())
        .await
        .unwrap();
    let keys: Vec<String> = canned
        .heard()
        .iter()
        .map(|text| {
            let key = text.split("idempotency-key: ").nth(1).unwrap();
            key.split("\r\n").next().unwrap().to_owned()
        })
        .collect();
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0], keys[1]);
    assert_eq!(keys[0].len(), 32);
}

#[tokio::test]
async fn a_refusal_that_no_retry_mends_is_given_at_once() {
    let canned = Canned::new(vec![refusal(ErrorCode::NotFound)]).await;
    let error = canned
        .client
        .app(&"notes".parse().unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "because");
}

#[tokio::test]
async fn an_answer_of_another_program_is_named_as_such() {
    let canned = Canned::new(vec![answer(404, "<html>nginx")]).await;
    let error = canned.client.status().await.unwrap_err().to_string();
    assert!(
        error.contains("another program") && error.contains("nginx"),
        "{error}"
    );
    let canned = Canned::new(vec![answer(200, "{}")]).await;
    let error = canned.client.status().await.unwrap_err().to_string();
    assert!(error.contains("spore --version"), "{error}");
}

#[tokio::test]
async fn a_missing_daemon_is_told_with_the_verb_that_starts_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let client = Client::new(path.to_str().unwrap().parse().unwrap());
    let error = client.status().await.unwrap_err().to_string();
    assert!(
        error.contains("spore up") && error.contains("api.sock"),
        "{error}"
    );
    // A socket that nobody listens on any more, as a killed daemon leaves it.
    drop(UnixListener::bind(&path).unwrap());
    let error = client.status().await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn all_pages_of_a_list_are_read() {
    let first = format!(r#"{{"items":[{APP}],"next":"a b"}}"#);
    let last = format!(r#"{{"items":[{APP}]}}"#);
    let canned = Canned::new(vec![answer(200, &first), answer(200, &last)]).await;
    assert_eq!(canned.client.apps().await.unwrap().len(), 2);
    assert!(
        canned.heard()[1].contains("cursor=a%20b"),
        "{:?}",
        canned.heard()
    );
}

#[tokio::test]
async fn log_lines_are_put_together_from_pieces() {
    let line = r#"{"at":"t","vm":"v","release":1,"from":"stdout","text":"ää"}"#;
    let body = format!("{line}\n\n{line}");
    let (left, right) = body.split_at(10);
    let (middle, right) = right.split_at(line.len());
    let mut chunked = "HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for piece in [left, middle, right, ""] {
        chunked.push_str(&format!("{:x}\r\n{piece}\r\n", piece.len()));
    }
    let canned = Canned::new(vec![chunked]).await;
    let query = LogQuery {
        tail: Some(5),
        follow: false,
    };
    let mut lines = canned
        .client
        .logs(&"notes".parse().unwrap(), &query)
        .await
        .unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap().text, "ää");
    assert_eq!(lines.next().await.unwrap().unwrap().text, "ää");
    assert!(lines.next().await.unwrap().is_none());
    assert!(canned.heard()[0].contains("follow=false&tail=5"));
}

#[tokio::test]
async fn a_stream_that_ends_early_is_an_error_and_not_an_end() {
    let cut = "HTTP/1.1 200 X\r\ncontent-length: 500\r\n\r\n{\"at\"".to_owned();
    let canned = Canned::new(vec![cut]).await;
    let query = LogQuery::default();
    let mut lines = canned
        .client
        .logs(&"notes".parse().unwrap(), &query)
        .await
        .unwrap();
    assert!(matches!(lines.next().await, Err(CallError::Broken { .. })));
}

#[tokio::test]
async fn an_operation_is_followed_to_its_end_with_every_change_seen_once() {
    let json = |revision, state| {
        answer(
            200,
            &serde_json::to_string(&operation(revision, state)).unwrap(),
        )
    };
    let canned = Canned::new(vec![
        json(1, OperationState::Running),
        json(2, OperationState::Running),
        json(3, OperationState::Succeeded),
    ])
    .await;
    let mut seen = Vec::new();
    let begun = operation(1, OperationState::Running);
    let ended = canned
        .client
        .wait(begun, |now| seen.push(now.revision))
        .await
        .unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
    assert_eq!(seen, [1, 2, 3]);
    assert!(
        canned.heard()[2].contains("after=2"),
        "{:?}",
        canned.heard()
    );
}

#[tokio::test]
async fn an_upload_whose_source_fails_says_so() {
    let canned = Canned::new(vec![answer(200, "{}")]).await;
    let pieces = [
        Ok("abc".into()),
        Err(std::io::Error::other("the disk broke")),
    ];
    let bytes = futures_util::stream::iter(pieces);
    let error = canned
        .client
        .upload(SourceKind::App, bytes)
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::Upload { .. }), "{error:?}");
    let mut chain = String::new();
    let mut next: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = next {
        chain.push_str(&error.to_string());
        next = error.source();
    }
    assert!(chain.contains("the disk broke"), "{chain}");
}
