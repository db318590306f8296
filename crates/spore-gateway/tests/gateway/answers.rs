//! Stories of answers that no app should give, and of some that few give.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::client::{Answer, Client, request};
use crate::daemon::{Daemon, Rig, patient, serving, vm};

/// A gateway whose app says exactly this to every request, and hangs up.
async fn saying(words: impl Into<Vec<u8>>) -> (Rig, Daemon, JoinHandle<()>) {
    let (rig, daemon, _app) = serving(patient()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    daemon.on_wake("app", vm(1), listener.local_addr().unwrap());
    let words = words.into();
    let app = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(&words).await.ok();
            stream.shutdown().await.ok();
        }
    });
    (rig, daemon, app)
}

async fn heard(words: impl Into<Vec<u8>>) -> Answer {
    let (rig, _daemon, _app) = saying(words).await;
    Client::connect(rig.address).await.get("app", "/").await
}

#[tokio::test]
async fn an_answer_of_two_lengths_goes_by_its_chunks_alone() {
    for lengths in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 300",
    ] {
        let words = format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\na\r\n0123456789\r\n0\r\n\r\n");
        let answer = heard(words).await;
        assert_eq!(answer.header("content-length"), None, "{lengths}");
        assert_eq!(answer.text(), "0123456789", "{lengths}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_the_protocol_is_a_502() {
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: 1\r\n".repeat(1_000));
    let large = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1_000_000));
    for words in [
        "garbage\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX Y: 1\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        &many,
        &large,
    ] {
        let answer = heard(words).await;
        let shown = &words[..words.len().min(80)];
        assert_eq!(answer.status, 502, "{shown}");
        assert!(answer.text().contains("app_"), "{shown}: {}", answer.text());
    }
}

#[tokio::test]
async fn an_answer_that_ends_early_is_never_whole() {
    for words in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let (rig, _daemon, _app) = saying(words).await;
        let mut client = Client::connect(rig.address).await;
        client.send(request("GET", "app", "/")).await;
        // Its head may come or not.
        let said = String::from_utf8(client.rest().await).unwrap();
        let whole = said.contains("content-length: 4") || said.ends_with("0\r\n\r\n");
        assert!(!whole, "{said}");
    }
}

#[tokio::test]
async fn answers_before_the_answer_are_left_out() {
    let words = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n\
                 HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let answer = heard(words).await;
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    assert_eq!(answer.header("link"), None);
}

#[tokio::test]
async fn bytes_behind_an_answer_are_nobodys() {
    for words in [
        // More than was announced, and a second answer that nobody asked for.
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\
         Content-Length: 4\r\n\r\nevil",
        "HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nevil",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nevil",
    ] {
        let (rig, _daemon, _app) = saying(words).await;
        let mut client = Client::connect(rig.address).await;
        for _ in 0..3 {
            let answer = client.get("app", "/").await;
            assert!(matches!(answer.status, 200 | 204 | 304), "{}", answer.head);
            assert!(answer.status != 204 || answer.header("content-length").is_none());
            assert!(!answer.text().contains("evil"), "{words}");
        }
    }
}

#[tokio::test]
async fn what_is_meant_for_the_gateway_alone_stays_there() {
    let answer = heard(
        "HTTP/1.1 200 OK\r\nConnection: X-Mine\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\n\
         Upgrade: websocket\r\nProxy-Connection: close\r\nX-Request-Id: theirs\r\n\
         Set-Cookie: a=1; Domain=localhost\r\nContent-Length: 2\r\n\r\nok",
    )
    .await;
    for gone in ["x-mine", "keep-alive", "upgrade", "proxy-connection"] {
        assert_eq!(answer.header(gone), None, "{gone}");
    }
    assert_ne!(answer.header("x-request-id").unwrap(), "theirs");
    assert_eq!(answer.header("set-cookie").unwrap(), "a=1");
}
