//! Stories of heads: hosts, hop-by-hop headers, versions, shapes that smuggle.

use crate::client::{Answer, Client};
use crate::daemon::{Rig, patient, serving};

async fn exchange(rig: &Rig, bytes: &str) -> Answer {
    let mut client = Client::connect(rig.address).await;
    client.send(bytes).await;
    client.answer().await
}

#[tokio::test]
async fn a_host_is_found_in_every_shape_it_may_have() {
    let (rig, _daemon, app) = serving(patient()).await;
    for head in [
        "GET /tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        "GET /tag HTTP/1.1\r\nHost: APP.localhost:8080\r\n\r\n",
        "GET /tag HTTP/1.1\r\nhost: app.localhost.:80\r\n\r\n",
        "GET http://app.localhost/tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        "GET http://app.localhost:8080/tag HTTP/1.1\r\nHost: other.localhost\r\n\r\n",
        "GET http://app.localhost/tag HTTP/1.0\r\n\r\n",
        "GET HTTPS://APP.localhost./tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        // A bare line feed ends a line as well (RFC 9112, 2.2).
        "GET /tag HTTP/1.1\nHost: app.localhost\n\n",
    ] {
        assert_eq!(exchange(&rig, head).await.text(), "app", "{head}");
    }
    assert_eq!(app.requests("/tag"), 8);
}

#[tokio::test]
async fn a_host_that_is_missing_repeated_or_invalid_is_a_400() {
    let (rig, _daemon, app) = serving(patient()).await;
    for (lines, code) in [
        ("", "host_missing"),
        (
            "Host: app.localhost\r\nHost: app.localhost\r\n",
            "host_repeated",
        ),
        (
            "Host: app.localhost\r\nHost: two.localhost\r\n",
            "host_repeated",
        ),
        ("Host:\r\n", "host_invalid"),
        ("Host: app.localhost:99999\r\n", "host_invalid"),
        ("Host: app.localhost:80:80\r\n", "host_invalid"),
        ("Host: user@app.localhost\r\n", "host_invalid"),
        ("Host: app.localhost/x\r\n", "host_invalid"),
        ("Host: app localhost\r\n", "host_invalid"),
    ] {
        let answer = exchange(&rig, &format!("GET /tag HTTP/1.1\r\n{lines}\r\n")).await;
        assert_eq!(answer.status, 400, "{lines}");
        assert!(answer.text().contains(code), "{lines}: {}", answer.text());
        assert_eq!(answer.header("connection").unwrap(), "close");
    }
    for head in [
        "GET /tag HTTP/1.0\r\n\r\n",
        "GET http://app.localhost/tag HTTP/1.1\r\n\r\n",
        "GET http://user@app.localhost/tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        "GET http:///tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        "GET app.localhost:80 HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
        "GET tag HTTP/1.1\r\nHost: app.localhost\r\n\r\n",
    ] {
        assert_eq!(exchange(&rig, head).await.status, 400, "{head}");
    }
    let tunnel = "CONNECT app.localhost:443 HTTP/1.1\r\nHost: app.localhost\r\n\r\n";
    assert_eq!(exchange(&rig, tunnel).await.status, 405);
    assert_eq!((app.requests("/tag"), app.requests("/")), (0, 0));
}

#[tokio::test]
async fn shapes_that_smuggle_are_refused_or_cannot_be_misread() {
    let (rig, _daemon, app) = serving(patient()).await;
    for lines in [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length : 5\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "X: 1\r\n Transfer-Encoding: chunked\r\n",
        "X: 1\r\n\tmore\r\n",
        "Content-Length: 5\r\nX\0: 1\r\n",
        "Content-Length: 5\r\nX: a\rTransfer-Encoding: chunked\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length:\r\n",
    ] {
        let head = format!("POST /tag HTTP/1.1\r\nHost: app.localhost\r\n{lines}\r\nhello");
        let answer = exchange(&rig, &head).await;
        assert_eq!(answer.status, 400, "{lines}");
    }
    let old = "POST /tag HTTP/1.0\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(exchange(&rig, old).await.status, 400);
    assert_eq!(app.requests("/tag"), 0);
    // Both lengths: the parser goes by the chunks and drops the other. What came behind is not
    // taken for a request, and the app never sees the number.
    for both in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    ] {
        let mut client = Client::connect(rig.address).await;
        client
            .send(format!(
                "POST /echo HTTP/1.1\r\nHost: app.localhost\r\n{both}\r\n0\r\n\r\n\
                 GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
            ))
            .await;
        let answer = client.answer().await;
        assert!(matches!(answer.status, 200 | 400), "{}", answer.head);
        assert_eq!(answer.header("connection").unwrap(), "close");
        assert_eq!(client.rest().await, b"");
    }
    assert_eq!(app.requests("/smuggled"), 0);
}

#[tokio::test]
async fn hop_by_hop_headers_stay_and_claims_about_the_client_are_replaced() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let answer = exchange(
        &rig,
        "GET /head HTTP/1.1\r\nHost: app.localhost:8080\r\nConnection: keep-alive, X-Mine, Host\r\n\
         X-Mine: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: gzip\r\n\
         Proxy-Authorization: basic x\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\
         X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Proto: https\r\n\
         X-Forwarded-Port: 1\r\nX_Forwarded_For: 6.6.6.6\r\nX_Real-IP: 6.6.6.6\r\n\
         Forwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\n\
         X-Request-Id: mine\r\nX-Kept: yes\r\n\r\n",
    )
    .await;
    let seen = answer.text();
    for gone in [
        "x-mine",
        "keep-alive",
        "proxy-",
        "upgrade",
        "http2-settings",
        "6.6.6.6",
        "evil",
        "https",
        "forwarded-port",
        "\"forwarded\"",
        "mine",
        "\"te\"",
        "\"connection\"",
    ] {
        assert!(!seen.contains(gone), "{gone} in {seen}");
    }
    let id = answer.header("x-request-id").unwrap();
    for kept in [
        "GET /head",
        "\"host\": \"app.localhost:8080\"",
        "\"x-forwarded-for\": \"127.0.0.1\"",
        "\"x-real-ip\": \"127.0.0.1\"",
        "\"x-forwarded-host\": \"app.localhost:8080\"",
        "\"x-forwarded-proto\": \"http\"",
        "\"x-kept\": \"yes\"",
        id.as_str(),
    ] {
        assert!(seen.contains(kept), "{kept} not in {seen}");
    }
}

#[tokio::test]
async fn a_cookie_reaches_no_further_than_its_app() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let answer = exchange(&rig, "GET /cookie HTTP/1.1\r\nHost: app.localhost\r\n\r\n").await;
    let cookies = answer.header("set-cookie").unwrap();
    assert_eq!(cookies, "a=1; Path=/\nb=2; Domain=app.localhost");
    assert_eq!(answer.header("keep-alive"), None);
}

#[tokio::test]
async fn http_1_0_clients_get_answers_they_can_read() {
    let (rig, _daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    let kept = "GET /tag HTTP/1.0\r\nHost: app.localhost\r\nConnection: keep-alive\r\n\r\n";
    for _ in 0..2 {
        client.send(kept).await;
        let answer = client.answer().await;
        assert!(answer.head.starts_with("HTTP/1.0 200"), "{}", answer.head);
        assert_eq!(answer.text(), "app");
    }
    // An answer without a length ends with the connection, never in chunks.
    client
        .send("GET /sse HTTP/1.0\r\nHost: app.localhost\r\n\r\n")
        .await;
    app.go_on();
    app.go_on();
    let events = async {
        let answer = client.answer().await;
        assert_eq!(answer.header("transfer-encoding"), None);
        answer.text().to_owned()
    };
    let go_on = async {
        app.asked("/sse").await;
        loop {
            app.go_on();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        events = events => assert_eq!(events, "data: 1\n\ndata: 2\n\n"),
        () = go_on => {}
    }
}

#[tokio::test]
async fn answers_without_a_body_leave_the_connection_in_step() {
    let (rig, _daemon, app) = serving(patient()).await;
    let mut client = Client::connect(rig.address).await;
    for (method, path, status) in [
        ("HEAD", "/tag", 200),
        ("GET", "/nothing", 204),
        ("GET", "/same", 304),
        ("HEAD", "/flood", 200),
        ("OPTIONS", "/tag", 200),
    ] {
        client
            .send(crate::client::request(method, "app", path))
            .await;
        let answer = client.answer_to(method).await;
        assert_eq!(answer.status, status, "{method} {path}");
        if (method, path) == ("HEAD", "/tag") {
            assert_eq!(answer.header("content-length").unwrap(), "3");
        }
    }
    assert_eq!(client.get("app", "/tag").await.text(), "app");
    assert!(app.connections() <= 2, "{}", app.connections());
}

#[tokio::test]
async fn heads_beyond_the_limits_are_refused() {
    let (rig, _daemon, app) = serving(patient()).await;
    let many = "X: 1\r\n".repeat(200);
    let large = format!("X: {}\r\n", "x".repeat(100_000));
    for lines in [many, large] {
        let mut client = Client::connect(rig.address).await;
        client
            .send(format!(
                "GET /tag HTTP/1.1\r\nHost: app.localhost\r\n{lines}\r\n"
            ))
            .await;
        assert!(client.head().await.starts_with("HTTP/1.1 431"));
    }
    assert_eq!(app.requests("/tag"), 0);
}

#[tokio::test]
async fn chunks_that_could_be_read_in_two_ways_end_the_connection() {
    let (rig, _daemon, app) = serving(patient()).await;
    for chunks in [
        "5\nhello\n0\n\n",
        "5\r\nhello0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
    ] {
        let mut client = Client::connect(rig.address).await;
        client
            .send(format!(
                "POST /sink HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\r\n\
                 {chunks}GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n"
            ))
            .await;
        let said = String::from_utf8(client.rest().await).unwrap();
        assert!(!said.contains(" 200 "), "{chunks:?}: {said}");
        assert!(said.matches("HTTP/1.1 ").count() <= 1, "{chunks:?}: {said}");
    }
    assert_eq!(app.requests("/smuggled"), 0);
}

#[tokio::test]
async fn a_client_cannot_say_behind_its_body_what_it_may_not_say_before() {
    let (rig, _daemon, _app) = serving(patient()).await;
    let answer = exchange(
        &rig,
        "POST /trailers HTTP/1.1\r\nHost: app.localhost\r\nTransfer-Encoding: chunked\r\n\
         Trailer: X-Sum, X-Forwarded-For, X_Real_IP, Host\r\nTE: trailers\r\n\r\n\
         1\r\na\r\n0\r\nX-Sum: 42\r\nX-Forwarded-For: 6.6.6.6\r\nX_Real_IP: 6.6.6.6\r\n\
         Host: evil\r\nConnection: x-sum\r\n\r\n",
    )
    .await;
    assert_eq!(answer.header("x-sum").unwrap(), "42");
    assert_eq!(answer.header("x-seen").unwrap(), "x-sum");
}

#[tokio::test]
async fn the_whole_server_may_be_asked_for() {
    let (rig, _daemon, app) = serving(patient()).await;
    let asterisk = "OPTIONS * HTTP/1.1\r\nHost: app.localhost\r\n\r\n";
    assert_eq!(exchange(&rig, asterisk).await.status, 404);
    assert_eq!(app.requests("*"), 1);
}
