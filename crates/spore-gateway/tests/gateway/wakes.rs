//! Stories of requests that find their app asleep.

use std::time::Duration;

use spore_wire::gateway::{Admission, FromGateway, ToGateway, WakeFailure};

use crate::app::App;
use crate::client::{Client, request};
use crate::daemon::{Rig, awake, key, route, vm};

#[tokio::test]
async fn fifty_waiters_one_wake_all_200() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let address = rig.address;
        waiting.spawn(async move { Client::connect(address).await.get("app", "/tag").await });
    }
    daemon.counted(50, |counts| counts.waited).await;
    assert_eq!(app.requests("/tag"), 0);
    daemon.awake("app", vm(1), app.address);
    for answer in waiting.join_all().await {
        assert_eq!((answer.status, answer.text()), (200, "app"));
        let timing = answer.header("server-timing").unwrap();
        assert!(
            timing.starts_with("boot;dur=1.500, app;dur=1.500, wait;dur="),
            "{timing}"
        );
    }
    assert_eq!(daemon.wakes("app"), 1);
    let mut late = Client::connect(rig.address).await;
    let answer = late.get("app", "/tag").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("server-timing"), None);
}

#[tokio::test]
async fn a_body_stays_unread_until_the_app_is_awake() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    let mut client = Client::connect(rig.address).await;
    client
        .send(
            "POST /echo HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 5\r\n\
             Expect: 100-continue\r\n\r\n",
        )
        .await;
    daemon
        .heard(1, |heard| matches!(heard, FromGateway::Wake { .. }))
        .await;
    let early = tokio::time::timeout(Duration::from_millis(200), client.line()).await;
    assert!(early.is_err(), "asked for the body while asleep: {early:?}");
    daemon.awake("app", vm(1), app.address);
    assert_eq!(client.head().await, "HTTP/1.1 100 Continue\r\n");
    client.send("hello").await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.text()), (200, "hello"));
}

#[tokio::test]
async fn a_wake_that_takes_too_long_is_answered_with_why_and_when() {
    let rig = Rig::start();
    let mut slow = route("app");
    slow.policy.wake_deadline_ms = 200;
    let daemon = rig.daemon(vec![slow]).await;
    let mut client = Client::connect(rig.address).await;
    let answer = client.get("app", "/tag").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after").unwrap(), "10");
    let page: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(page["code"], "wake_deadline");
    assert_eq!(page["blame"], "platform");
    assert_eq!(page["retry"], true);
    assert_eq!(
        page["request_id"].as_str(),
        answer.header("x-request-id").as_deref()
    );
    client
        .send("GET / HTTP/1.1\r\nHost: app.localhost\r\nAccept: text/html\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("still waking up"));
    assert_eq!(daemon.wakes("app"), 1);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let rig = Rig::start();
    let mut narrow = route("app");
    narrow.policy.waiters_max = 2;
    let daemon = rig.daemon(vec![narrow]).await;
    let app = App::start("app").await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = Client::connect(rig.address).await;
        client.send(request("GET", "app", "/tag")).await;
        held.push(client);
    }
    daemon.counted(2, |counts| counts.waited).await;
    let mut third = Client::connect(rig.address).await;
    let refused = third.get("app", "/tag").await;
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("wake_queue_full"));
    assert!(refused.header("retry-after").is_some());
    // One that leaves makes room.
    held.pop();
    daemon.counted(1, |counts| counts.by_class[0]).await;
    third.send(request("GET", "app", "/tag")).await;
    daemon.counted(3, |counts| counts.waited).await;
    daemon.awake("app", vm(1), app.address);
    assert_eq!(third.answer().await.status, 200);
    assert_eq!(held[0].answer().await.status, 200);
    daemon.counted(1, |counts| counts.refused_full).await;
}

#[tokio::test]
async fn a_client_that_leaves_during_the_wake_is_never_sent() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    let mut without_body = Client::connect(rig.address).await;
    without_body.send(request("GET", "app", "/gone")).await;
    let mut with_body = Client::connect(rig.address).await;
    with_body
        .send("POST /gone HTTP/1.1\r\nHost: app.localhost\r\nContent-Length: 9\r\n\r\nhalf")
        .await;
    daemon.counted(2, |counts| counts.waited).await;
    drop(without_body);
    drop(with_body);
    daemon.counted(2, |counts| counts.by_class[0]).await;
    daemon.awake("app", vm(1), app.address);
    let mut client = Client::connect(rig.address).await;
    assert_eq!(client.get("app", "/tag").await.status, 200);
    assert_eq!(app.requests("/gone"), 0);
}

#[tokio::test]
async fn a_failed_wake_answers_all_and_the_next_request_tries_again() {
    let rig = Rig::start();
    let daemon = rig.daemon(vec![route("app")]).await;
    let app = App::start("app").await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/tag")).await;
    daemon
        .heard(1, |heard| matches!(heard, FromGateway::Wake { .. }))
        .await;
    daemon.say(ToGateway::WakeFailed {
        app: key("app"),
        failure: WakeFailure {
            code: "no_capacity".into(),
            message: "The platform is full. Try again later.".into(),
            retry_after_s: 7,
        },
    });
    let answer = client.answer().await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after").unwrap(), "7");
    assert!(answer.text().contains("no_capacity"));
    daemon.on_wake("app", vm(2), app.address);
    assert_eq!(client.get("app", "/tag").await.text(), "app");
    assert_eq!(daemon.wakes("app"), 2);
}

#[tokio::test]
async fn disabled_undeployed_and_unknown_have_pages_of_their_own() {
    let rig = Rig::start();
    let mut disabled = route("off");
    disabled.policy.admission = Admission::Disabled;
    let mut fresh = route("fresh");
    fresh.policy.admission = Admission::NoRelease;
    let daemon = rig.daemon(vec![disabled, fresh]).await;
    let mut client = Client::connect(rig.address).await;
    for (name, status, code) in [
        ("off", 503, "app_disabled"),
        ("fresh", 503, "no_release"),
        ("nobody", 404, "host_unknown"),
    ] {
        let answer = client.get(name, "/").await;
        assert_eq!(answer.status, status);
        assert!(answer.text().contains(code), "{}", answer.text());
    }
    let woken = daemon.count(|heard| matches!(heard, FromGateway::Wake { .. }));
    assert_eq!(woken, 0);
}

#[tokio::test]
async fn a_request_before_the_first_table_is_held_and_not_404() {
    let rig = Rig::start();
    let app = App::start("app").await;
    let mut client = Client::connect(rig.address).await;
    client.send(request("GET", "app", "/tag")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let daemon = rig.daemon(vec![route("app")]).await;
    daemon.on_wake("app", vm(1), app.address);
    let woken = |heard: &FromGateway| matches!(heard, FromGateway::Wake { .. });
    daemon.heard(1, woken).await;
    daemon.say(awake(key("app"), vm(1)));
    assert_eq!(client.answer().await.text(), "app");
}
