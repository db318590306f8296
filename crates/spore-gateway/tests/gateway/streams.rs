//! Stories of bodies and events.

use std::time::Duration;

use spore_gateway::Limits;
use spore_wire::gateway::FromGateway;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Client, request};
use crate::daemon::{patient, serving, vm};

const LARGE: usize = 100 * 1024 * 1024;

#[tokio::test]
async fn events_arrive_when_they_are_sent() {
    let (rig, _daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/sse")).await;
    assert!(client.head().await.contains("text/event-stream"));
    // The app does not go on before the first event was read here.
    assert_eq!(client.bytes(14).await, b"9\r\ndata: 1\n\n\r\n");
    app.go_on();
    assert_eq!(client.bytes(14).await, b"9\r\ndata: 2\n\n\r\n");
    app.go_on();
    assert_eq!(client.bytes(5).await, b"0\r\n\r\n");
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.unwrap().split_whitespace().nth(1);
    number.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_hundred_megabytes_go_both_ways_past_a_slow_reader_in_little_memory() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let client = Client::connect(rig.address).await;
    let before = resident_kib();
    let (mut read, mut write) = client.stream.into_split();
    let writer = tokio::spawn(async move {
        let head = format!(
            "POST /echo HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: {LARGE}\r\n\
             Connection: close\r\n\r\n"
        );
        write.write_all(head.as_bytes()).await.unwrap();
        let piece = vec![b'x'; 64 * 1024];
        for _ in 0..LARGE / piece.len() {
            write.write_all(&piece).await.unwrap();
        }
        write
    });
    // Nothing is read for a while: everything in between must stop, not swell.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!writer.is_finished());
    let mut received = 0;
    let mut most = before;
    let mut piece = vec![0; 256 * 1024];
    loop {
        let count = read.read(&mut piece).await.unwrap();
        if count == 0 {
            break;
        }
        received += count;
        most = most.max(resident_kib());
    }
    assert!(received > LARGE, "{received}");
    assert!(most - before < 32 * 1024, "grew by {} KiB", most - before);
    drop(writer.await.unwrap());
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_request_does_not_stop_the_request() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client
        .send("POST /echo HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    // Both directions move in turn, on one exchange.
    client.send("3\r\none\r\n").await;
    client.head().await;
    assert_eq!(client.bytes(8).await, b"3\r\none\r\n");
    client.send("3\r\ntwo\r\n").await;
    assert_eq!(client.bytes(8).await, b"3\r\ntwo\r\n");
    client.send("0\r\n\r\n").await;
    assert_eq!(client.bytes(5).await, b"0\r\n\r\n");
}

#[tokio::test]
async fn a_chunked_get_keeps_its_body_and_trailers_pass_both_ways() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    client
        .send(
            "GET /echo HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n\
             5\r\nhello\r\n0\r\n\r\n",
        )
        .await;
    assert_eq!(client.answer().await.text(), "hello");
    let mut client = Client::connect(rig.address).await;
    client
        .send(
            "POST /trailers HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\
             TE: trailers\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 42\r\n\r\n",
        )
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.text()), (200, "body"));
    assert_eq!(answer.header("x-sum").unwrap(), "42");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_app() {
    let (rig, daemon, app) = serving(patient()).await;
    let mut hanging = Client::connect(rig.address).await;
    hanging.send(request("GET", "app", "/hang")).await;
    let mut flooded = Client::connect(rig.address).await;
    flooded.send(request("GET", "app", "/flood")).await;
    app.asked("/hang").await;
    app.asked("/flood").await;
    drop(hanging);
    drop(flooded);
    daemon.reaped("app", vm(1)).await;
    daemon
        .heard(
            1,
            |heard| matches!(heard, FromGateway::Counts(counts) if counts.by_class[0] > 0),
        )
        .await;
}

#[tokio::test]
async fn a_client_that_is_refused_while_it_sends_can_still_read_why() {
    let limits = Limits {
        linger_timeout: Duration::from_secs(60),
        ..patient()
    };
    let (rig, daemon, app) = serving(limits).await;
    // Nobody knows the first host, the second head is none, the app of the third dies.
    for (path, host, status) in [
        ("/hang", "nobody.localhost", 404),
        ("/hang", "app localhost", 400),
        ("hang", "app.localhost", 400),
        ("/hang", "app.localhost", 502),
    ] {
        let mut client = Client::connect(rig.address).await;
        client
            .send(format!(
                "POST {path} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"
            ))
            .await;
        if status == 502 {
            app.asked("/hang").await;
            daemon.gone("app", vm(1));
        }
        assert_eq!(client.answer().await.status, status);
        for _ in 0..20 {
            let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
            let sent = client.stream.write_all(chunk.as_bytes()).await;
            assert!(sent.is_ok(), "reset under the answer {status}: {sent:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        client.stream.shutdown().await.unwrap();
        assert_eq!(client.rest().await, b"");
    }
}
